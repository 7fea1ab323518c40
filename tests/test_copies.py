"""Whole weights in an adapter's file: left out where they are the base model's own, refused by name otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tiny
from logo import AdapterPool, LoGo, PoolError, SelectionSettings
from logo.adapters.layout import BaseLayout
from logo.cli.app import run
from logo.errors import AdapterError
from make_adapters import edit_config, edit_weights, load_peft, write_peft
from test_engine import tokenizer
from test_mixing import Mixed
from tolerances import same_tensor

IDS = torch.tensor([tiny.prompts([9])[0]])
HEAD = "base_model.model.lm_head.weight"
KINDS: dict[str, dict[str, Any]] = {
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "a_norm": {"modules_to_save": ["norm"]},
    "adapted_head": {"target_modules": ["lm_head", "q_proj"]},
    "resized": {"save": {"save_embedding_layers": True}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_copies_of_the_base_are_left_out_and_answers_are_pefts(kind: str, tmp_path: Path) -> None:
    write_peft(tmp_path / "pool" / "a", **KINDS[kind])
    write_peft(tmp_path / "pool" / "b")
    base = tiny.model("llama")
    pool = AdapterPool.open(tmp_path / "pool")
    assert AdapterPool.open(tmp_path / "pool")["a"].copies == pool["a"].copies
    assert pool["a"].copies and not pool["b"].copies
    with pytest.raises(AdapterError, match=r"holds full weights .* unless they equal the base model's"):
        pool["a"].read()
    with pytest.raises(PoolError, match="holds full weights"):
        pool.fit(BaseLayout.of(base))
    with pytest.warns(UserWarning, match="adapters a: copies of base weights .* are left out"):
        pool.fit(BaseLayout.of(base), model=base)
    with pytest.warns(UserWarning, match="are left out"):
        ours = Mixed(base, pool).logits([{"a": 1.0}], IDS)
    with torch.no_grad():
        same_tensor(ours, load_peft(tmp_path / "pool" / "a")(input_ids=IDS).logits)
    with pytest.warns(UserWarning, match="are left out"):
        logo = LoGo(base, tokenizer(), pool, settings=SelectionSettings.of(signal="norm", cache=""))
    assert logo.names == ("a", "b")


def with_bias() -> Any:
    """A model whose head has a bias."""
    base = tiny.model("llama")
    base.lm_head = nn.Linear(32, 96)
    base.lm_head.weight.data = tiny.model("llama").lm_head.weight.data.clone()  # type: ignore[union-attr]
    base.lm_head.bias.data = torch.linspace(-1, 1, 96)
    return base


@pytest.mark.parametrize("kind", [{"target_modules": ["lm_head", "q_proj"]}, {"modules_to_save": ["lm_head"]}])
def test_the_bias_of_a_copied_module_is_a_copy_too(kind: dict[str, Any], tmp_path: Path) -> None:
    write_peft(tmp_path / "a", with_bias(), **kind)
    pool = AdapterPool.open(tmp_path)
    assert sorted(pool["a"].copies.values()) == ["lm_head.bias", "lm_head.weight"]
    with pytest.warns(UserWarning, match="adapters a: copies of base weights .* are left out"):
        pool.fit(BaseLayout.of(with_bias()), model=with_bias())
    bias = next(key for key in pool["a"].copies if key.endswith("bias"))
    edit_weights(tmp_path / "a", lambda w: w[bias].view(-1).__setitem__(3, 9.0))
    with pytest.raises(PoolError, match=r"a weight of the base model, lm_head\.bias, with other values"):
        AdapterPool.open(tmp_path).fit(BaseLayout.of(with_bias()), model=with_bias())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w[HEAD].view(-1).__setitem__(3, 9.0), "lm_head.weight, with other values"),
        (lambda w: w.update({HEAD: w[HEAD][:-1].clone()}), "lm_head.weight, of shape"),
        (lambda w: w.update({"base_model.model.score.weight": torch.ones(2, 3)}), "score.weight, which the base model"),
        (lambda w: w[HEAD].fill_(float("nan")), "lm_head.weight, with other values"),
    ],
    ids=["trained", "resized", "another", "nan"],
)
def test_what_is_not_the_bases_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    write_peft(tmp_path / "a", modules_to_save=["lm_head"])
    write_peft(tmp_path / "b")
    edit_weights(tmp_path / "a", change)
    base = tiny.model("llama")
    pool = AdapterPool.open(tmp_path)
    with pytest.raises(PoolError, match=f"it replaces a weight of the base model, {message}"):
        pool.fit(BaseLayout.of(base), model=base)
    fitted = pool.fit(BaseLayout.of(base), model=base, on_bad_adapter="skip")
    assert fitted.names == ("b",) and [bad.name for bad in fitted.refused] == ["a"]


def test_the_bases_dtype_decides(tmp_path: Path) -> None:
    write_peft(tmp_path / "a", modules_to_save=["lm_head"])
    base: nn.Module = tiny.model("llama").to(torch.bfloat16)
    with pytest.warns(UserWarning, match="are left out"):
        assert AdapterPool.open(tmp_path).fit(BaseLayout.of(base), model=base).names == ("a",)


def test_a_manifest_leaves_it_as_it_is(tmp_path: Path) -> None:
    write_peft(tmp_path / "pool" / "a", modules_to_save=["lm_head"])
    edit_config(tmp_path / "pool" / "a", modules_to_save=None)  # the tensors tell
    assert run(["pool", "lock", str(tmp_path / "pool"), "--save", str(tmp_path / "pool.yaml")]) == 0
    assert AdapterPool.open(tmp_path / "pool.yaml")["a"].copies
