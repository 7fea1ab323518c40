"""The devices on which a base model's modules compute, and the dtype of mixtures on it."""

from __future__ import annotations

from collections.abc import Iterable

import psutil
import torch
from torch import nn

# The share of the free memory that adapters may have by default.
ADAPTER_SHARE = 0.3


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of mixtures on a model: its own floating-point type."""
    dtype: torch.dtype = model.dtype  # type: ignore[assignment]
    return dtype if dtype.is_floating_point else torch.float32


def device_of(module: nn.Module) -> torch.device:
    """The device on which a module computes; under accelerate's offloading its weights are elsewhere."""
    hook_device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    if hook_device is not None:
        return torch.device(hook_device)
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")


def unwaited(device: torch.device) -> bool:
    """Whether host memory that is not pinned may be copied to the device with `non_blocking`.

    On CUDA such a copy has read the host memory when the call returns, and does not wait for running kernels.
    """
    return device.type == "cuda"


def free_bytes(devices: Iterable[torch.device]) -> int:
    """Free memory on these devices together; host memory for devices that are no GPUs."""
    found = 0
    for device in set(devices):
        found += torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else int(psutil.virtual_memory().available)
    return found
