"""Writes adapters as plain PEFT folders; a folder appears complete or not at all."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from logo.adapters.files import CONFIG, SAFETENSORS

if TYPE_CHECKING:
    from torch import Tensor

    from logo.adapters.format import LoraWeights


def save_adapter(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, object]) -> None:
    """Writes one PEFT folder in place, which may exist; for use inside `new_folder`."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / SAFETENSORS, {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def plain_tensors(weights: Mapping[str, LoraWeights]) -> dict[str, Tensor]:
    """Factors under PEFT's keys; scales are left to the configuration."""
    return {
        f"base_model.model.{path}.lora_{side}.weight": tensor
        for path, one in weights.items()
        for side, tensor in (("A", one.A), ("B", one.B))
    }


def unscaled(ranks: Mapping[str, int]) -> dict[str, Any]:
    """Settings that give every module the scale 1, for ranks by module path."""
    [(rank, _)] = Counter(ranks.values()).most_common(1)
    others = {re.escape(path): found for path, found in ranks.items() if found != rank}
    return {
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "rank_pattern": others,
        "alpha_pattern": dict(others),
    }
