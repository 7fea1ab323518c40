"""The adapters that some row of a batch uses, stacked per module along the rank axis.

    A (R, d_in)   B (d_out, R)   owner (R,)      R = Σ r_i, the scale folded into B

Knows adapters and devices; knows nothing about prompts, rows or gates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from logo.adapters.format import LoraWeights


@dataclass(frozen=True)
class Stack:
    """The working set's adapters on one module: `ΔW_i = B[:, owner == i] A[owner == i]`."""

    A: Tensor  # (R, d_in)
    B: Tensor  # (d_out, R), scale folded in
    owner: Tensor  # (R,) int64: index into WorkingSet.names of the adapter that each rank column belongs to


@dataclass(frozen=True)
class WorkingSet:
    """Stacks per module for a fixed, ordered set of adapters.

    Attributes:
        names: the adapters; a weight matrix over this working set has one column for each, in this order.
        stacks: base module path -> stack. Modules that none of the adapters touches are absent. Stacks whose
            columns belong to the same adapters share one `owner` tensor.
    """

    names: tuple[str, ...]
    stacks: Mapping[str, Stack]

    @classmethod
    def of(
        cls,
        names: Sequence[str],
        weights: Sequence[Mapping[str, LoraWeights]],
        modules: Mapping[str, nn.Module],
        dtype: torch.dtype,
    ) -> WorkingSet:
        """Stacks adapters on the device of each module.

        Args:
            names: in the order that weights will have.
            weights: per adapter, fitted to the base: module path -> factors.
            modules: base module path -> module, for placement.
            dtype: what the stacks compute in; scales are applied in float32 before the cast.
        """
        paths = dict.fromkeys(path for adapter in weights for path in adapter)
        owners: dict[tuple[tuple[int, int], ...], Tensor] = {}
        stacks = {}
        for path in paths:
            parts = [(i, w[path]) for i, w in enumerate(weights) if path in w]
            device = device_of(modules[path])
            columns = tuple((i, part.A.shape[0]) for i, part in parts)
            if columns not in owners:
                owners[columns] = torch.repeat_interleave(
                    torch.tensor([i for i, _ in columns]), torch.tensor([r for _, r in columns])
                ).to(device)
            stacks[path] = Stack(
                _joined([part.A.to(dtype) for _, part in parts], 0, device),
                _joined([part.scaled_b().to(dtype) for _, part in parts], 1, device),
                owners[columns],
            )
        return cls(tuple(names), stacks)


def _joined(parts: Sequence[Tensor], dim: int, device: torch.device) -> Tensor:
    """The parts in one tensor on the device: joined in host memory, and then one copy."""
    if device.type != "cuda":
        return torch.cat(list(parts), dim=dim).to(device)
    shape = list(parts[0].shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    pinned = torch.empty(shape, dtype=parts[0].dtype, pin_memory=True)  # so that the copy runs beside other work
    return torch.cat(list(parts), dim=dim, out=pinned).to(device, non_blocking=True)


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
