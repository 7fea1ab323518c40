"""Adapters in vLLM's form, with their scales folded into B."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from logo.adapters.adapter import Adapter


def lora_model(number: int, adapter: Adapter, dtype: torch.dtype) -> Any:
    """An adapter as vLLM's `LoRAModel`.

    Args:
        number: its id in vLLM.
        dtype: of vLLM's slots.
    """
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.lora_weights import LoRALayerWeights

    loras = {}
    for module, weights in adapter.read().items():
        a, b = weights.A.to(dtype), weights.scaled_b().to(dtype)
        loras[module] = LoRALayerWeights(module, len(a), 1, a, b, scaling=1.0)  # else vLLM would multiply B in place
    return LoRAModel(number, max(adapter.ranks), loras)


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
            made = lora_model(number, adapter, dtype)
            manager.add_adapter(made)
            manager.activate_adapter(number)
            manager.pin_adapter(number)
            made.loras.clear()  # the slots hold it now
