"""Mixtures as vLLM adapters, built in memory: factors are concatenated, weights and scales are folded into B."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from logo.adapters.format import Adapter


def lora_model(number: int, parts: Sequence[tuple[Adapter, float]], dtype: torch.dtype) -> Any:
    """A mixture as vLLM's `LoRAModel`.

    Args:
        number: its id in vLLM.
        parts: adapters and weights, one or more.
        dtype: of vLLM's slots.
    """
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for adapter, weight in parts:
        for module, weights in adapter.read().items():
            found.setdefault(module, []).append((weights.A.float(), weight * weights.scaled_b()))
    factors = {}
    for module, pairs in found.items():
        a = torch.cat([a for a, _ in pairs])  # (R, d_in)
        b = torch.cat([b for _, b in pairs], dim=1)  # (d_out, R)
        factors[module] = a, b
    return _made(number, factors, dtype)


def hold(manager: Any, adapters: Mapping[int, Adapter], dtype: torch.dtype) -> None:
    """Loads adapters into vLLM's slots, where they stay; leaves alone those that are there.

    Args:
        manager: vLLM's manager of adapters.
        adapters: by their ids in vLLM.
        dtype: of vLLM's slots.

    Raises:
        AdapterError: one cannot be read; those before it are loaded.
    """
    held = set(manager.lora_index_to_id)
    for number, adapter in adapters.items():
        if number not in held:
            manager.remove_adapter(number)
            made = lora_model(number, [(adapter, 1.0)], dtype)
            manager.add_adapter(made)
            manager.activate_adapter(number)
            manager.pin_adapter(number)
            made.loras.clear()  # the slots hold it now


def nothing(number: int, like: Adapter, dtype: torch.dtype) -> Any:
    """A `LoRAModel` of zeros. vLLM takes no adapter without layers, so it has the first one that `like` adapts."""
    path, shape = next(iter(like.modules.items()))
    return _made(number, {path: (torch.zeros(1, shape.in_features), torch.zeros(shape.out_features, 1))}, dtype)


def _made(number: int, factors: Mapping[str, tuple[Tensor, Tensor]], dtype: torch.dtype) -> Any:
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.lora_weights import LoRALayerWeights

    # With another scaling than 1, vLLM would multiply B in place.
    loras = {
        module: LoRALayerWeights(module, len(a), 1, a.to(dtype), b.to(dtype), scaling=1.0)
        for module, (a, b) in factors.items()
    }
    return LoRAModel(number, max((len(a) for a, _ in factors.values()), default=1), loras)
