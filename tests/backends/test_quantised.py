"""Scores and mixtures on a quantised base model inside vLLM, against the local engine on the weights it stands for.

Four bits, in the form of compressed-tensors: what vLLM multiplies on a CPU beside adapters. It does not start with
adapters beside eight bits there, since it gives up the weights that its own layers of adapters ask for their device.
"""

from __future__ import annotations

import importlib
import json
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import mixtures
from safetensors.torch import load_file, save_file
from torch import Tensor
from vllm_server import ASSETS

from logo import LoGo

# The tolerance is a share of the largest score: four units in bfloat16's last place, because processors with matrix
# instructions for bfloat16 round more often than others (0.0108 on one of them).
DTYPE, TOLERANCE = "bfloat16", 2**-6
GROUP = 32  # columns of a weight that share a scale


def quantised(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """One weight in 4 bits as a checkpoint of compressed-tensors holds it, and what it stands for."""
    height, width = weight.shape
    grouped = weight.view(height, width // GROUP, GROUP)
    scale = (grouped.abs().amax(dim=2, keepdim=True) / 7).bfloat16()
    values = (grouped / scale.float()).round().clamp(-8, 7)
    nibbles = (values.view(height, width // 8, 8) + 8).to(torch.int64)  # the first column in the lowest bits
    packed = (nibbles << (4 * torch.arange(8))).sum(dim=2)
    packed = torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)
    held = {"weight_packed": packed, "weight_scale": scale[:, :, 0], "weight_shape": torch.tensor([height, width])}
    return held, (values * scale.float()).view(height, width)


def written(folder: Path) -> tuple[Path, Path]:
    """The demo model quantised, and the same with the weights that this stands for."""
    packed, plain = folder / "packed", folder / "plain"
    for place in (packed, plain):
        shutil.copytree(ASSETS / "model", place)
    held: dict[str, Tensor] = {}
    stands: dict[str, Tensor] = {}
    for name, tensor in load_file(ASSETS / "model" / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            parts, stands[name] = quantised(tensor.float())
            held |= {f"{name.removesuffix('weight')}{part}": value.contiguous() for part, value in parts.items()}
        else:
            held[name], stands[name] = tensor, tensor.float()
    save_file(held, packed / "model.safetensors", metadata={"format": "pt"})
    save_file(stands, plain / "model.safetensors", metadata={"format": "pt"})
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": "pack-quantized",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    (packed / "config.json").write_text(json.dumps(config))
    return packed, plain


def test_a_quantised_base_model(settings_of_vllm: None, tmp_path: Path, rows: list[str]) -> None:
    importlib.import_module("vllm._custom_ops")  # loads its kernels
    if not hasattr(torch.ops._C, "cpu_gemm_wna16"):
        pytest.skip("vLLM multiplies weights of four bits on processors with AVX-512 only")
    packed, plain = written(tmp_path)
    logo = LoGo.from_pretrained(str(plain), ASSETS / "adapters", device="cpu", dtype="float32")
    flags = {"enforce_eager": True, "max_model_len": 512}
    inside: Any = LoGo.from_pretrained(
        str(packed), ASSETS / "adapters", engine="vllm", k=4, dtype=DTYPE, model_kwargs=flags
    )
    with closing(inside):
        for signal in ("calibrated", "norm"):
            found, expected = (one.select(rows[:6], signal=signal) for one in (inside, logo))
            for own, other in zip(found, expected, strict=True):
                scores, values = (torch.tensor(list(one.scores.values())) for one in (own, other))
                assert float((scores - values).abs().max() / values.abs().max()) <= TOLERANCE, signal
        count = 32
        wanted = mixtures(logo.names, count)
        made = inside.generate(rows[:count], adapters=wanted, max_new_tokens=4)
    answers, base = (
        logo.generate(rows[:count], adapters=some, max_new_tokens=4, batch_size=8) for some in (wanted, [{}] * count)
    )
    same, unmixed = (
        sum(own.token_ids == other.token_ids for own, other in zip(made, others, strict=True))
        for others in (answers, base)
    )
    # Rounding decides between tokens that are nearly as likely as each other.
    assert same >= 0.8 * count and unmixed < 0.6 * count, (same, unmixed)
