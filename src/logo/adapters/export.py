"""A mixture written down as one plain PEFT adapter, which any tool that reads LoRA adapters answers with.

    A = [A_1; A_2; ...]   (R, d_in)        B = [w_1 s_1 B_1, w_2 s_2 B_2, ...]   (d_out, R)        alpha = r = R

so that `B A = Σ w_i s_i B_i A_i`, exactly, whatever ranks and targets the adapters have.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from logo.adapters.config import CONFIG
from logo.adapters.format import Adapter
from logo.adapters.weights import SAFETENSORS
from logo.errors import StorageError, UsageError

if TYPE_CHECKING:
    from torch import Tensor


def write_mixture(
    parts: Sequence[tuple[Adapter, float]], folder: Path, linear: Collection[str], base_model: str | None = None
) -> Path:
    """Writes the weighted sum of adapters as one adapter, in float32.

    Args:
        parts: adapters fitted to the base model, with their weights; those of weight 0 are left out.
        folder: must not exist yet, or be empty.
        linear: paths of the base model's linear modules.
        base_model: its name or folder, for the configuration.

    Returns:
        The folder.

    Raises:
        UsageError: there is nothing to write, or the folder holds something already.
        StorageError: it cannot be written.
    """
    parts = [(adapter, weight) for adapter, weight in parts if weight]
    if not parts:
        raise UsageError("the mixture holds no adapter: there is nothing to write, the base model alone answers so")
    tensors, ranks = _stacked(parts)
    [(rank, _)] = Counter(ranks.values()).most_common(1)
    others = {re.escape(path): found for path, found in ranks.items() if found != rank}
    config: dict[str, object] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "bias": "none",
        "lora_dropout": 0.0,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": _targets(ranks, linear),
    }
    _write(folder, tensors, config)
    return folder


def _stacked(parts: Sequence[tuple[Adapter, float]]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Tensors by PEFT's keys, and the rank of every module."""
    import torch

    read = [(adapter.read(), weight) for adapter, weight in parts]
    tensors, ranks = {}, {}
    for path in dict.fromkeys(path for weights, _ in read for path in weights):
        held = [(weights[path], weight) for weights, weight in read if path in weights]
        a = torch.cat([one.A.float() for one, _ in held])
        tensors[f"base_model.model.{path}.lora_A.weight"] = a
        tensors[f"base_model.model.{path}.lora_B.weight"] = torch.cat([w * one.scaled_b() for one, w in held], dim=1)
        ranks[path] = len(a)
    return tensors, ranks


def _targets(paths: Collection[str], linear: Collection[str]) -> list[str]:
    """Names where every module of that name is adapted, as people write them; else full paths."""
    names = {path.rsplit(".", 1)[-1] for path in paths}
    named = {path for path in linear if path.rsplit(".", 1)[-1] in names}
    return sorted(names if named == set(paths) else paths)


def _write(folder: Path, tensors: dict[str, Tensor], config: dict[str, object]) -> None:
    """All of the folder or nothing: it is written under another name and renamed."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UsageError(f"{folder} exists already and is not an empty folder; name another one, or remove it")
    part = folder.with_name(f".{folder.name}-{os.getpid()}")
    try:
        part.mkdir(parents=True)
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, part / SAFETENSORS, {"format": "pt"})
        (part / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        os.replace(part, folder)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"the mixture cannot be written to {folder}: {error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
