"""Converts adapters that were initialised with a part of the base weights (PiSSA, OLoRA, CorDA, LoRA-GA) to plain LoRA.

They train `W - s B_0 A_0 + s B A`, so on the untouched base their update is `s [B, -B_0] [A; A_0]`, a plain LoRA of
twice the rank and the same scale. PEFT does the same when it saves an adapter with
`path_initial_model_for_weight_conversion`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from logo.adapters.config import Refusal, changed_base, parse_config, read_raw
from logo.adapters.format import Adapter, LoraWeights, adapter_of, own_name, weight_file
from logo.adapters.layout import core_path
from logo.adapters.writing import plain_tensors, save_adapter
from logo.errors import AdapterError
from logo.files import new_folder


def convert_initial(trained: Path, initial: Path, out: Path, *, allow_pickle: bool = False) -> None:
    """Writes an adapter of this kind as a plain one, with the settings that it had.

    Args:
        trained: its folder.
        initial: the folder of its state before training.
        out: must not exist yet, or be empty.

    Raises:
        AdapterError: a folder cannot be used; the configuration names no such initialisation; or the initial state is
            that of another adapter, or equal to the trained one.
        UsageError, StorageError: as `new_folder`.
    """
    import torch

    (adapter, config), (start, _) = (_opened(folder, allow_pickle) for folder in (trained, initial))
    if changed_base(config) is None:
        raise AdapterError(
            adapter.name,
            f"init_lora_weights is {config.get('init_lora_weights', True)!r}, which names no initialisation that "
            "changed the base weights (PEFT writes true after a conversion); an adapter of this kind names it, such as "
            "'pissa'",
        )
    first = {core_path(path): one for path, one in start.read().items()}
    weights = adapter.read()
    if first.keys() != {core_path(path) for path in weights}:
        raise AdapterError(adapter.name, f"its initial adapter {initial} adapts other modules")
    both: dict[str, LoraWeights] = {}
    for path, one in weights.items():
        before = first[core_path(path)]
        alike = before.A.shape == one.A.shape and before.B.shape == one.B.shape
        if not alike or not math.isclose(before.scaling, one.scaling, rel_tol=1e-9):
            raise AdapterError(adapter.name, f"its initial adapter {initial} has another shape or scale at {path}")
        # Different dtypes are promoted to the wider one.
        both[path] = LoraWeights(torch.cat([one.A, before.A]), torch.cat([one.B, -before.B], dim=1), one.scaling)
    same = (torch.equal(one.A, first[core_path(path)].A) for path, one in weights.items())
    if all(same) and all(torch.equal(one.B, first[core_path(path)].B) for path, one in weights.items()):
        raise AdapterError(
            adapter.name, f"its initial adapter {initial} is the same: give the adapter as it was before training"
        )
    with new_folder(out, "the adapter") as part:
        save_adapter(part, plain_tensors(both), config | _doubled(config))


def _opened(folder: Path, allow_pickle: bool) -> tuple[Adapter, dict[str, Any]]:
    name = own_name(folder)
    try:
        raw = read_raw(folder)
        adapter = adapter_of(name, folder, parse_config(raw, unconverted=True), weight_file(folder, allow_pickle))
    except Refusal as refusal:
        raise AdapterError(name, " ".join(str(refusal).splitlines())) from refusal.__cause__
    adapter.check_linear()
    return adapter, raw


def _doubled(config: dict[str, Any]) -> dict[str, Any]:
    """Settings for twice the rank and the same scale: alpha grows by 2 with `alpha / r`, by √2 with `alpha / √r`."""
    grown = math.sqrt(2) if config.get("use_rslora") else 2
    return {
        "init_lora_weights": True,
        "r": 2 * config.get("r", 8),
        "lora_alpha": grown * config.get("lora_alpha", 8),
        "rank_pattern": {key: 2 * rank for key, rank in (config.get("rank_pattern") or {}).items()},
        "alpha_pattern": {key: grown * alpha for key, alpha in (config.get("alpha_pattern") or {}).items()},
    }
