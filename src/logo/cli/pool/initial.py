"""`logo pool export --initial`: an adapter that was initialised with a part of the base weights as a plain one.

Adapters that were initialised with a part of the base weights (PiSSA, OLoRA, CorDA, LoRA-GA) train
`W - s B_0 A_0 + s B A`, so on the untouched base their update is `s [B, -B_0] [A; A_0]`, a plain LoRA of twice the rank
and the same scale. PEFT does the same with `path_initial_model_for_weight_conversion`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from logo.adapters.adapter import LoraWeights, open_adapter
from logo.adapters.layout import core_path
from logo.adapters.peft import changed_base, read_raw
from logo.adapters.write import activation_note, linear_weights, plain_tensors, save_adapter
from logo.errors import AdapterError
from logo.files import new_folder


def convert_initial(trained: Path, initial: Path, out: Path, *, allow_pickle: bool = False) -> None:
    """Writes an adapter that was initialised with a part of the base weights as a plain one, with its settings.

    Raises AdapterError if a folder cannot be used, the configuration names no such initialisation, or the `initial`
    state, before training, is that of another adapter or equal to the trained one; and as `new_folder`.
    """
    adapter = open_adapter(trained, allow_pickle=allow_pickle, unconverted=True)
    start = open_adapter(initial, allow_pickle=allow_pickle, unconverted=True)
    config = read_raw(trained)
    if changed_base(config) is None:
        init = f"init_lora_weights is {config.get('init_lora_weights', True)!r}"
        raise AdapterError(adapter.name, f"{init}, which names no initialisation that changed the base weights")
    after = linear_weights(adapter)
    before = {core_path(path): weights for path, weights in linear_weights(start).items()}
    if before.keys() != {core_path(path) for path in after}:
        raise AdapterError(adapter.name, f"its initial adapter {initial} adapts other modules")
    for path, weights in after.items():
        if not _alike(weights, before[core_path(path)]):
            raise AdapterError(adapter.name, f"its initial adapter {initial} has another shape or scale at {path}")
    if all(_equal(weights, before[core_path(path)]) for path, weights in after.items()):
        raise AdapterError(adapter.name, f"its initial adapter {initial} is the same: give that before training")
    difference = {path: _difference(weights, before[core_path(path)]) for path, weights in after.items()}
    # Twice the rank and the same scale: alpha grows by 2 with `alpha / r`, by √2 with `alpha / √r`.
    _multiply(config, "r", "rank_pattern", 2)
    _multiply(config, "lora_alpha", "alpha_pattern", math.sqrt(2) if config.get("use_rslora") else 2)
    note = activation_note(out, adapter.activation)
    with new_folder(out) as part:
        save_adapter(part, plain_tensors(difference), config | {"init_lora_weights": True}, note)


def _alike(after: LoraWeights, before: LoraWeights) -> bool:
    """Whether two updates have the same shapes and scale."""
    same_shapes = after.A.shape == before.A.shape and after.B.shape == before.B.shape
    return same_shapes and math.isclose(after.scaling, before.scaling, rel_tol=1e-9)


def _equal(after: LoraWeights, before: LoraWeights) -> bool:
    import torch

    return torch.equal(after.A, before.A) and torch.equal(after.B, before.B)


def _difference(after: LoraWeights, before: LoraWeights) -> LoraWeights:
    """The update that is `after` without `before`; different dtypes are promoted to the wider one."""
    import torch

    return LoraWeights(torch.cat([after.A, before.A]), torch.cat([after.B, -before.B], dim=1), after.scaling)


def _multiply(config: dict[str, Any], key: str, pattern: str, factor: float) -> None:
    """Multiplies a number of PEFT's configuration, and those of single modules."""
    config[key] = factor * config.get(key, 8)
    config[pattern] = {module: factor * number for module, number in (config.get(pattern) or {}).items()}
