"""Where a base model's modules compute, and in which dtype mixtures on it do."""

from __future__ import annotations

from collections.abc import Iterable

import psutil
import torch
from torch import nn

# The share of the memory that is free beside the model which adapters may have where nobody says how much.
ADAPTER_SHARE = 0.3


def dtype_of(model: nn.Module) -> torch.dtype:
    """What mixtures on a model compute in: its own floating point type."""
    dtype: torch.dtype = model.dtype  # type: ignore[assignment]
    return dtype if dtype.is_floating_point else torch.float32


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes; under accelerate's offloading that is not where its weights rest."""
    hook_device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    if hook_device is not None:
        return torch.device(hook_device)
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")


def unwaited(device: torch.device) -> bool:
    """Whether a copy from host memory that is not pinned may be left to the device (`non_blocking`).

    CUDA has taken the numbers out of such memory when the call returns, and waits for no kernel.
    """
    return device.type == "cuda"


def free_bytes(devices: Iterable[torch.device]) -> int:
    """Memory that is free on these devices together; host memory for all that are no GPUs."""
    found = 0
    for device in set(devices):
        found += torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else int(psutil.virtual_memory().available)
    return found
