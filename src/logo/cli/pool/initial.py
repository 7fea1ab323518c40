"""`logo pool export --initial`: an adapter that was initialised with a part of the base weights as a plain one.

Adapters that were initialised with a part of the base weights (PiSSA, OLoRA, CorDA, LoRA-GA) train
`W - s B_0 A_0 + s B A`, so on the untouched base their update is `s [B, -B_0] [A; A_0]`, a plain LoRA of twice the rank
and the same scale. PEFT does the same with `path_initial_model_for_weight_conversion`.
"""

from __future__ import annotations

import math
from pathlib import Path

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
    import torch

    adapter, start = (open_adapter(one, allow_pickle=allow_pickle, unconverted=True) for one in (trained, initial))
    config = read_raw(trained)
    if changed_base(config) is None:
        init = f"init_lora_weights is {config.get('init_lora_weights', True)!r}"
        raise AdapterError(adapter.name, f"{init}, which names no initialisation that changed the base weights")
    weights, first = linear_weights(adapter), {core_path(path): one for path, one in linear_weights(start).items()}
    if first.keys() != {core_path(path) for path in weights}:
        raise AdapterError(adapter.name, f"its initial adapter {initial} adapts other modules")
    both, same = dict[str, LoraWeights](), True
    for path, one in weights.items():
        before = first[core_path(path)]
        alike = before.A.shape == one.A.shape and before.B.shape == one.B.shape
        if not alike or not math.isclose(before.scaling, one.scaling, rel_tol=1e-9):
            raise AdapterError(adapter.name, f"its initial adapter {initial} has another shape or scale at {path}")
        same = same and torch.equal(one.A, before.A) and torch.equal(one.B, before.B)
        # Different dtypes are promoted to the wider one.
        both[path] = LoraWeights(torch.cat([one.A, before.A]), torch.cat([one.B, -before.B], dim=1), one.scaling)
    if same:
        raise AdapterError(adapter.name, f"its initial adapter {initial} is the same: give that before training")
    # Twice the rank and the same scale: alpha grows by 2 with `alpha / r`, by √2 with `alpha / √r`.
    grown = math.sqrt(2) if config.get("use_rslora") else 2
    for key, pattern, factor in (("r", "rank_pattern", 2), ("lora_alpha", "alpha_pattern", grown)):
        config[key] = factor * config.get(key, 8)
        config[pattern] = {module: factor * value for module, value in (config.get(pattern) or {}).items()}
    note = activation_note(out, adapter.activation)
    with new_folder(out) as part:
        save_adapter(part, plain_tensors(both), config | {"init_lora_weights": True}, note)
