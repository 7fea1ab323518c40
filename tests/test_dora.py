"""DoRA adapters: alone, with weight 1, as PEFT; refused by name wherever they would be mixed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tiny
from logo import AdapterPool, LoGo, PoolError, SelectionSettings
from logo.adapters.layout import BaseLayout
from logo.cli.run import run
from logo.errors import UsageError
from logo.mixing.merges import Merge
from logo.mixing.mixer import Mixer
from logo.mixing.store import adapter_store
from logo.selecting import Choosing
from logo.selection.confidence import RESPONSES
from logo.selection.size import USUAL
from make_adapters import edit_config, edit_weights, load_peft, write_peft
from test_engine import PROMPTS, tokenizer
from tolerances import same_tensor

IDS = torch.tensor(tiny.prompts([9, 9]))


def write_dora(folder: Path, name: str = "llama", **settings: Any) -> Path:
    """A DoRA adapter whose magnitudes were trained."""
    write_peft(folder, tiny.model(name), use_dora=True, **settings)

    def trained(weights: dict[str, torch.Tensor]) -> None:
        generator = torch.Generator().manual_seed(7)
        for key, tensor in weights.items():
            if "magnitude" in key:
                weights[key] = tensor * (1 + 0.3 * torch.randn(tensor.shape, generator=generator))

    return edit_weights(folder, trained)


def mixer_on(base: nn.Module, fold: bool | None = None) -> Mixer:
    return Mixer(base, adapter_store(base, 0.1, None), fold)


@pytest.mark.parametrize("fold", [None, False, True])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_alone_it_is_as_in_peft_and_the_base_is_back_afterwards(name: str, fold: bool | None, tmp_path: Path) -> None:
    gpt2 = {"target_modules": ["c_attn"], "fan_in_fan_out": True} if name == "gpt2" else {}
    write_dora(tmp_path / "a", name, **gpt2)
    write_peft(tmp_path / "b", tiny.model(name), **gpt2)
    base = tiny.model(name)
    pool = AdapterPool.from_directory(tmp_path, cache=tmp_path / ".cache").fit(BaseLayout.of(base), model=base)
    assert [adapter.alone for adapter in pool] == [True, False]
    again = AdapterPool.from_directory(tmp_path, cache=tmp_path / ".cache")
    assert [adapter.alone for adapter in again] == [True, False]
    mixer = mixer_on(base, fold)
    with torch.no_grad():
        plain = base(input_ids=IDS).logits
        for rows in ([{"a": 1.0}], [{"a": 1.0}, {"a": 1.0}], [{"b": 1.0}], [{"a": 1.0}]):  # one after the other
            with mixer.active(pool, rows) as form:
                ours = base(input_ids=IDS).logits
            [adapter] = rows[0]
            assert form == "folded" or adapter == "b"
            same_tensor(ours, load_peft(tmp_path / adapter, tiny.model(name))(input_ids=IDS).logits)
        assert torch.equal(base(input_ids=IDS).logits, plain)


@pytest.mark.parametrize(
    "rows", [[{"a": 0.5}], [{"a": 1.0, "b": 0.2}], [{"a": 1.0}, {"b": 1.0}], [{"a": 1.0}, {}], [{"a": 1.0}, {"a": 0.0}]]
)
def test_mixed_it_is_refused(rows: list[dict[str, float]], tmp_path: Path) -> None:
    write_dora(tmp_path / "a")
    write_peft(tmp_path / "b")
    base = tiny.model("llama")
    pool = AdapterPool.from_directory(tmp_path).fit(BaseLayout.of(base), model=base)
    with pytest.raises(UsageError, match=r"'a' is a DoRA adapter.*answers alone"), mixer_on(base).active(pool, rows):
        pass
    merge = Merge("ties")
    with pytest.raises(UsageError, match="answers alone"), mixer_on(base).active(pool, [{"a": 1.0}], merge=merge):
        pass


def test_an_engine_answers_with_one_adapter_a_prompt(tmp_path: Path) -> None:
    write_dora(tmp_path / "a")
    write_peft(tmp_path / "b")
    base = tiny.model("llama")
    settings = SelectionSettings.of(signal="norm", k=1, cache="")
    logo = LoGo(base, tokenizer(), AdapterPool.from_directory(tmp_path), settings=settings)
    answers = logo.generate(PROMPTS, max_new_tokens=5)
    assert {name for one in answers for name in one.selection.adapters} <= {"a", "b"}
    forced = logo.generate(PROMPTS, adapters=[{"a": 1.0}, {"b": 1.0}, {}, {"a": 1.0}, {"b": 0.5}], max_new_tokens=5)
    ids = torch.tensor([tokenizer()(PROMPTS[0])["input_ids"]])
    with torch.no_grad():
        theirs = load_peft(tmp_path / "a").generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    assert theirs[0, ids.shape[1] :].tolist() == list(forced[0].token_ids)
    assert forced[0].token_ids != logo.generate(PROMPTS[0], adapters={}, max_new_tokens=5).token_ids
    assert "".join(logo.stream(PROMPTS[0], adapters={"a": 1.0}, max_new_tokens=5)) == forced[0].text
    mixtures: list[dict[str, float]] = [{"a": 1.0}, {}, {"b": 0.5}]
    scored = logo.score(PROMPTS[0], "w5", mixtures)
    assert scored == [logo.score(PROMPTS[0], "w5", [mixture])[0] for mixture in mixtures]
    with pytest.raises(UsageError, match="answers alone"):
        logo.generate(PROMPTS[0], adapters={"a": 0.5, "b": 0.5}, max_new_tokens=2)
    with pytest.warns(UserWarning, match="1 of 2 adapters are DoRA adapters"):
        LoGo(base, tokenizer(), AdapterPool.from_directory(tmp_path), settings=SelectionSettings.of(k=2, cache=""))


def test_an_unsure_selection_gives_it_weight_1(tmp_path: Path) -> None:
    """A mixture of others would be weaker."""
    write_dora(tmp_path / "a")
    write_peft(tmp_path / "b")
    base = tiny.model("llama")
    pool = AdapterPool.from_directory(tmp_path).fit(BaseLayout.of(base), model=base)
    choosing = Choosing(pool, SelectionSettings.of(signal="calibrated", k=1, cache=""))
    weights = {}
    for scores in ([0.2, 0.1], [0.1, 0.2]):
        found = choosing.choose(torch.tensor(scores), ["a", "b"], choosing.call_settings({}))
        weights[found.adapters] = found.weights
    assert weights == {("a",): (1.0,), ("b",): pytest.approx((RESPONSES.weight_sum(0.0, USUAL),))}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(next(key for key in w if "magnitude" in key)), "expected a magnitude .* found none"),
        (lambda w: w.update({k: v[:-1].clone() for k, v in w.items() if "magnitude" in k}), "expected a magnitude"),
        (lambda w: w.update({"base_model.model.x.lora_magnitude_vector": torch.ones(3)}), "no LoRA factors"),
        (lambda w: w.update({k: v * float("nan") for k, v in w.items() if "magnitude" in k}), "holds NaN"),
    ],
)
def test_what_is_damaged_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    edit_weights(write_dora(tmp_path / "a"), change)
    with pytest.raises(PoolError, match=message):
        AdapterPool.from_directory(tmp_path)


def test_where_it_would_be_mixed_or_written_it_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dora(tmp_path / "pool" / "a")
    pool = AdapterPool.from_directory(tmp_path / "pool")
    with pytest.raises(PoolError, match="'a': it is a DoRA adapter"):
        pool.fit(BaseLayout.of(tiny.model("llama")))
    for command in (["prune", "--rank", "2"], ["convert", "--dtype", "bf16"]):
        out = str(tmp_path / command[0])
        assert run(["pool", command[0], str(tmp_path / "pool"), "--out", out, *command[1:]]) == 1
    assert capsys.readouterr().err.count("it is a DoRA adapter") == 2
    edit_config(tmp_path / "pool" / "a", init_lora_weights="pissa")
    write_peft(tmp_path / "pool" / "a" / "pissa_init")
    with pytest.raises(PoolError, match="DoRA adapter whose initialisation changed the base"):
        AdapterPool.from_directory(tmp_path / "pool")
