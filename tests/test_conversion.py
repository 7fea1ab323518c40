"""Converted pools: other dtypes, no pickles, and PiSSA and the like as PEFT converts them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import tiny
from logo.adapters.format import open_adapter
from logo.cli.run import run
from make_adapters import (
    CONFIG,
    PICKLE,
    SAFETENSORS,
    edit_config,
    edit_weights,
    load_peft,
    lora_layers,
    tensors,
    write,
    write_peft,
)
from tolerances import same_tensor

IDS = torch.tensor([tiny.prompts([9])[0]])


def convert(pool: Path, out: Path, *arguments: str) -> int:
    return run(["pool", "convert", str(pool), "--out", str(out), *arguments])


def trained_from(folder: Path, **settings: Any) -> torch.Tensor:
    """An adapter whose initialisation changed the base, as PEFT leaves it: `initial`, `trained`, and PEFT's own
    conversion as `plain`. Returns what the trained model answers."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **settings})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(tiny.model("llama"), config)
        wrapped.peft_config["default"].init_lora_weights = True
        wrapped.save_pretrained(folder / "initial")
        wrapped.peft_config["default"].init_lora_weights = settings["init_lora_weights"]
        generator = torch.Generator().manual_seed(0)
        for layer in lora_layers(wrapped).values():
            for side in (layer.lora_A, layer.lora_B):
                weight = side["default"].weight.data
                weight += 0.1 * torch.randn(weight.shape, generator=generator)
        wrapped.save_pretrained(folder / "trained" / "task")
        with torch.no_grad():
            answer: torch.Tensor = wrapped(input_ids=IDS).logits
        if not (settings.get("use_rslora") and settings.get("alpha_pattern")):  # which PEFT refuses
            wrapped.save_pretrained(folder / "plain", path_initial_model_for_weight_conversion=str(folder / "initial"))
    return answer


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {r"layers\.1.*q_proj": 3}},
        {"use_rslora": True, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}},
    ],
    ids=["plain", "rslora", "patterns", "rslora_patterns"],
)
def test_as_peft_converts(tmp_path: Path, init: str, settings: dict[str, Any]) -> None:
    answer = trained_from(tmp_path, init_lora_weights=init, **settings)
    assert convert(tmp_path / "trained", tmp_path / "out", "--initial", str(tmp_path / "initial")) == 0
    out = tmp_path / "out" / "task"
    with torch.no_grad():
        same_tensor(load_peft(out)(input_ids=IDS).logits, answer)  # on the untouched base
    if (tmp_path / "plain").exists():
        theirs, ours = load_file(tmp_path / "plain" / SAFETENSORS), load_file(out / SAFETENSORS)
        assert theirs.keys() == ours.keys()
        for key, tensor in theirs.items():
            torch.testing.assert_close(ours[key], tensor)
        expected, config = (json.loads((folder / CONFIG).read_text()) for folder in (tmp_path / "plain", out))
        assert config.pop("lora_alpha") == pytest.approx(expected.pop("lora_alpha"))
        assert sorted(config.pop("target_modules")) == sorted(expected.pop("target_modules"))  # PEFT's is a set
        assert config == expected


def test_one_initial_for_each_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, seed in (("a", 0), ("deep/b", 1)):
        write(tmp_path / "pool" / name, tensors(seed=seed), init_lora_weights="pissa_niter_4")
        write(tmp_path / "initial" / name, tensors(seed=10 + seed))
    arguments = ("--initial", str(tmp_path / "initial"), "--json")
    assert convert(tmp_path / "pool", tmp_path / "out", *arguments) == 0
    listed = {one["name"]: one for one in json.loads(capsys.readouterr().out)["adapters"]}
    assert (listed["a"]["from"]["init"], listed["a"]["from"]["ranks"], listed["a"]["to"]["ranks"]) == (
        "pissa_niter_4",
        [4],
        [8],
    )
    for name in ("a", "deep/b"):
        made, trained, first = (open_adapter(tmp_path / p / name, unconverted=True) for p in ("out", "pool", "initial"))
        for path, one in made.read().items():
            was, start = trained.read()[path], first.read()[path]
            torch.testing.assert_close(one.scaled_b() @ one.A, was.scaled_b() @ was.A - start.scaled_b() @ start.A)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda at: edit_config(at / "initial" / "a", lora_alpha=9), "has another scale at model.layers.0"),
        (lambda at: (at / "initial" / "a").rename(at / "initial" / "x"), "its initial adapter is missing from"),
        (
            lambda at: write(at / "initial" / "a", {k: v for k, v in tensors().items() if "q_proj" in k}),
            "adapts other modules",
        ),
        (lambda at: write(at / "initial" / "a", tensors(rank=2), r=2), "has other shapes at model.layers.0"),
    ],
    ids=["scale", "name", "modules", "rank"],
)
def test_an_initial_adapter_of_something_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Any, said: str
) -> None:
    write(tmp_path / "pool" / "a", init_lora_weights="olora")
    write(tmp_path / "initial" / "a", tensors(seed=1))
    write(tmp_path / "initial" / "other", tensors(seed=2))
    spoil(tmp_path)
    assert convert(tmp_path / "pool", tmp_path / "out", "--initial", str(tmp_path / "initial")) == 1
    error = capsys.readouterr().err
    assert "adapter 'a'" in error and said in error and not (tmp_path / "out").exists()


def test_without_an_initial_adapter_it_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "pool" / "a", init_lora_weights="pissa")
    assert convert(tmp_path / "pool", tmp_path / "out") == 1
    assert "give the adapter as it was before training with --initial" in capsys.readouterr().err
    assert convert(tmp_path / "pool", tmp_path / "out", "--initial", str(tmp_path)) == 1
    (tmp_path / "nothing").mkdir()
    assert convert(tmp_path / "pool", tmp_path / "out", "--initial", str(tmp_path / "nothing")) == 1
    assert "expected PEFT folders, found none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_dtypes(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    write(tmp_path / "pool" / "a", something_new=1)
    before = open_adapter(tmp_path / "pool" / "a").read()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert convert(tmp_path / "pool", tmp_path / "out", "--dtype", name) == 0
    for path, one in open_adapter(tmp_path / "out" / "a").read().items():
        assert one.A.dtype == one.B.dtype == dtype
        assert torch.equal(one.A, before[path].A.to(dtype)) and torch.equal(one.B, before[path].B.to(dtype))
    assert json.loads((tmp_path / "out" / "a" / CONFIG).read_text()) == json.loads(
        (tmp_path / "pool" / "a" / CONFIG).read_text()
    )


def test_a_value_too_large_for_the_dtype(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_weights(write(tmp_path / "pool" / "a"), lambda w: next(iter(w.values())).view(-1).__setitem__(3, 1e6))
    assert convert(tmp_path / "pool", tmp_path / "out", "--dtype", "fp16") == 1
    assert "does not fit in torch.float16; use bf16 or fp32" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_pickles_become_safetensors_where_they_are_allowed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_peft(tmp_path / "pool" / "a", save={"safe_serialization": False}, seed=2)
    assert convert(tmp_path / "pool", tmp_path / "out") == 1
    assert "--allow-pickle" in capsys.readouterr().err
    assert convert(tmp_path / "pool", tmp_path / "out", "--allow-pickle") == 0
    assert "pickle" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out" / "a").iterdir()} == {CONFIG, SAFETENSORS}
    assert (tmp_path / "pool" / "a" / PICKLE).is_file()
    with torch.no_grad():
        answers = [load_peft(tmp_path / p / "a")(input_ids=IDS).logits for p in ("pool", "out")]
    same_tensor(*answers)


def test_keys_that_other_tools_leave_become_pefts(tmp_path: Path) -> None:
    write(tmp_path / "pool" / "a", tensors(prefix="_orig_mod.base_model.model."))
    assert convert(tmp_path / "pool", tmp_path / "out") == 0
    assert load_file(tmp_path / "out" / "a" / SAFETENSORS).keys() == tensors().keys()
    assert len(lora_layers(load_peft(tmp_path / "out" / "a"))) == 6


@pytest.mark.parametrize("settings", [{}, {"init_lora_weights": True}, {"init_lora_weights": "gaussian"}])
def test_initial_adapters_are_for_those_that_say_what_they_began_as(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, Any]
) -> None:
    write(tmp_path / "pool" / "a", **settings)
    write(tmp_path / "initial" / "a", tensors(seed=1))
    assert convert(tmp_path / "pool", tmp_path / "out", "--initial", str(tmp_path / "initial")) == 1
    error = capsys.readouterr().err
    assert f"init_lora_weights is {settings.get('init_lora_weights', True)!r}" in error
    assert "convert it without --initial" in error and not (tmp_path / "out").exists()
    assert convert(tmp_path / "pool", tmp_path / "out") == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trained_adapter_is_not_its_own_initial_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: torch.dtype
) -> None:
    write(tmp_path / "pool" / "a", tensors(dtype=dtype), init_lora_weights="pissa")
    assert convert(tmp_path / "pool", tmp_path / "out", "--initial", str(tmp_path / "pool")) == 1
    assert "has the same update, so their difference is zero" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_small_factors_are_not_lost_silently(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An update of usual size whose B is below what float16 can hold."""

    def shrink(weights: dict[str, torch.Tensor]) -> None:
        for key in weights:
            weights[key] *= 1e-9 if "lora_B" in key else 1.0

    edit_weights(write(tmp_path / "pool" / "small", lora_alpha=8e9), shrink)
    assert convert(tmp_path / "pool", tmp_path / "out", "--dtype", "fp16") == 1
    said = capsys.readouterr().err
    assert "'small': rounding to torch.float16 costs 100.0% of its update" in said and "use bf16 or fp32" in said
    assert not (tmp_path / "out").exists()
    assert convert(tmp_path / "pool", tmp_path / "out", "--dtype", "bf16", "--json") == 0
    [told] = json.loads(capsys.readouterr().out)["adapters"]
    assert 1e-3 < told["error"] < 5e-3
    [change] = json.loads((tmp_path / "out" / "pool.json").read_text())["changes"]
    assert change["relative_errors"] == {"small": told["error"]}
    assert convert(tmp_path / "out", tmp_path / "back", "--dtype", "fp32", "--json") == 0
    assert json.loads(capsys.readouterr().out)["adapters"][0]["error"] == 0.0
