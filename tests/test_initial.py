"""`logo pool export --initial`: PiSSA and the like as plain LoRA, as PEFT converts them."""

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
from logo.cli.app import run
from make_adapters import CONFIG, SAFETENSORS, load_peft, lora_layers, tensors, write
from tolerances import same_tensor

IDS = torch.tensor([tiny.prompts([9])[0]])


def convert(root: Path, *more: str) -> int:
    line = ["--adapters", str(root / "trained"), "--initial", str(root / "initial"), "--save", str(root / "out")]
    return run(["pool", "export", *line, *more])


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
        wrapped.save_pretrained(folder / "trained")
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
    assert convert(tmp_path) == 0
    with torch.no_grad():
        same_tensor(load_peft(tmp_path / "out")(input_ids=IDS).logits, answer)  # on the untouched base
    if (tmp_path / "plain").exists():
        theirs, ours = (load_file(tmp_path / name / SAFETENSORS) for name in ("plain", "out"))
        assert theirs.keys() == ours.keys()
        for key, tensor in theirs.items():
            same_tensor(ours[key], tensor)
        expected, config = (json.loads((tmp_path / name / CONFIG).read_text()) for name in ("plain", "out"))
        assert config.pop("lora_alpha") == pytest.approx(expected.pop("lora_alpha"))
        assert sorted(config.pop("target_modules")) == sorted(expected.pop("target_modules"))  # PEFT's is a set
        assert config == expected


@pytest.mark.parametrize(
    ("trained", "initial", "said"),
    [
        ({"init_lora_weights": "pissa"}, {"lora_alpha": 9}, "another shape or scale at model.layers.0"),
        ({"init_lora_weights": "pissa"}, {"weights": tensors(rank=2), "r": 2}, "another shape or scale"),
        (
            {"init_lora_weights": "olora"},
            {"weights": {key: value for key, value in tensors().items() if "q_proj" in key}},
            "adapts other modules",
        ),
        ({"init_lora_weights": "pissa"}, {"weights": tensors(seed=0)}, "is the same: give that before training"),
        ({}, {}, "init_lora_weights is True, which names no initialisation that changed the base weights"),
        ({"init_lora_weights": "pissa", "use_dora": True}, {}, "it is a DoRA adapter"),
    ],
    ids=["scale", "rank", "modules", "equal", "plain", "dora"],
)
def test_what_cannot_be_converted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], trained: Any, initial: Any, said: str
) -> None:
    write(tmp_path / "trained", tensors(seed=0), **trained)
    write(tmp_path / "initial", **{"weights": tensors(seed=1), **initial})
    assert convert(tmp_path) == 1
    error = capsys.readouterr().err
    assert "adapter 'trained'" in error and said in error and not (tmp_path / "out").exists()


def test_one_thing_is_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(tmp_path, "a prompt") == 2
    assert "expected one of: a prompt, which selects" in capsys.readouterr().err
    assert run(["pool", "export", "--initial", str(tmp_path), "--save", str(tmp_path / "out")]) == 2
    assert "name the folder of the trained adapter with --adapters" in capsys.readouterr().err
