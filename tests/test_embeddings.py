"""Adapters on the embedding of tokens: as PEFT, in every way in which the library mixes; refused where it cannot."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch

import tiny
from logo import AdapterPool, LoGo, PoolError, SelectionSettings
from logo.adapters.layout import BaseLayout
from make_adapters import edit_weights, write_peft
from test_engine import PROMPTS, tokenizer
from test_mixing import Mixed, peft_logits, peft_model, save
from tolerances import same_tensor

EMBEDDINGS = {"llama": "embed_tokens", "qwen2": "embed_tokens", "gemma3": "embed_tokens", "gpt2": "wte"}


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_equals_peft(name: str, tmp_path: Path) -> None:
    base = tiny.model(name)
    linear = {"gpt2": ["c_attn"]}.get(name, ["q_proj", "down_proj"])
    configs = [
        peft.LoraConfig(r=rank, lora_alpha=7, target_modules=[EMBEDDINGS[name], *more], fan_in_fan_out=name == "gpt2")
        for rank, more in ((3, linear), (5, []))
    ]
    oracle = peft_model(base, configs, seed=1)
    pool = save(oracle, tmp_path)
    assert [module.embedding for module in pool["a1"].modules.values()] == [True]
    ids, mask = tiny.padded(tiny.prompts([6, 9, 4]))
    rows = [{"a0": 0.7, "a1": 0.3}, {"a1": 1.0}, {"a0": 1.0}]
    ours = Mixed(base, pool).logits(rows, ids, mask)
    for i, weights in enumerate(rows):
        length = int(mask[i].sum())
        same_tensor(ours[i, :length], peft_logits(oracle, weights, ids, mask)[i, :length])


@pytest.fixture
def pool(tmp_path: Path) -> AdapterPool:
    for i in range(3):
        write_peft(
            tmp_path / "pool" / f"t{i}",
            seed=i,
            target_modules=["embed_tokens", "q_proj"] if i else ["q_proj", "v_proj"],
            save={"save_embedding_layers": False},
        )

        def larger(weights: dict[str, torch.Tensor], i: int = i) -> None:
            generator = torch.Generator().manual_seed(i)
            for key in weights:
                if "embedding" in key:  # PEFT begins with zeros in A here
                    weights[key] = torch.randn(weights[key].shape, generator=generator)

        edit_weights(tmp_path / "pool" / f"t{i}", larger)
    return AdapterPool.open(tmp_path / "pool")


@pytest.mark.parametrize("merge", [None, True, False])
def test_batches_equal_single_prompts(pool: AdapterPool, merge: bool | None) -> None:
    settings = SelectionSettings.of(signal="norm", cache="")
    logo = LoGo(tiny.model("llama"), tokenizer(), pool, settings=settings, merge=merge)
    forced = [{"t1": 1.0}, {"t2": 0.6, "t0": 0.4}, {}, {"t0": 1.0}, {"t1": 0.5, "t2": 0.5}]
    together = logo.generate(PROMPTS, adapters=forced, max_new_tokens=6)
    alone = [logo.generate(p, adapters=row, max_new_tokens=6) for p, row in zip(PROMPTS, forced, strict=True)]
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]
    base = logo.generate(PROMPTS[0], adapters={}, max_new_tokens=6)
    assert base.token_ids != alone[0].token_ids  # the embedding counts
    assert logo.select(PROMPTS[0], k=3).adapters


def test_where_there_is_no_model_it_is_refused_by_name(pool: AdapterPool) -> None:
    with pytest.raises(PoolError, match=r"'t1': it adapts an embedding .*, which is not mixed here"):
        pool.fit(BaseLayout.of(tiny.model("llama")))


def test_another_vocabulary_does_not_fit(pool: AdapterPool) -> None:
    base = tiny.model("llama", vocab_size=97)
    with pytest.raises(PoolError, match=r"embed_tokens \(adapter 96 -> 32, base 97 -> 32\)"):
        pool.fit(BaseLayout.of(base), model=base)
