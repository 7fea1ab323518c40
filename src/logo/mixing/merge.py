"""Merging: a mixture is added to the weights that it acts on, so that decoding costs what the base model costs.

`W' = W + Σ_i w_i s_i B_i A_i` replaces `W` inside a block. `W` itself is never written to. There is at most one copy,
and none if it does not fit into memory. Quantised and offloaded modules cannot be merged, so they keep their gates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from logo.mixing.cache import Stack, free_bytes

# The share of free memory that a merged copy may take.
_SHARE = 0.9


def mergeable(module: nn.Module) -> bool:
    """Whether a module's weight is a plain floating-point matrix on the device where it computes."""
    weight = module._parameters.get("weight")
    return (
        (type(module) is nn.Linear or type(module).__name__ == "Conv1D")
        and type(weight) is nn.Parameter
        and weight.is_floating_point()
        and weight.element_size() > 1
        and weight.device.type != "meta"
        and not hasattr(module, "_hf_hook")
    )


class Merger:
    """Merges mixtures into the modules of one base model, by path, and keeps the merged copy for the next call."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.modules = modules
        self._merged: dict[str, nn.Parameter] = {}
        self._key: Hashable = None  # of the mixture that is merged

    @contextmanager
    def active(self, key: Hashable, stacks: Callable[[], Mapping[str, Stack]], weights: Tensor) -> Iterator[None]:
        """Adds one mixture, with weights (n,) of the adapters of the stacks, to `mergeable` modules inside the block.

        The mixture that was merged last is known by its key (adapters and weights; not None) and needs no stacks.
        """
        if self._key != key:
            self._key = None  # until the copy is complete
            factors = stacks()
            for path in self._merged.keys() - factors.keys():
                del self._merged[path]
            with torch.inference_mode(False):  # a caller's inference tensors could not be written to later
                for path, stack in factors.items():
                    copy = merged_weight(self.modules[path], stack, weights, out=self._merged.get(path))
                    self._merged[path] = nn.Parameter(copy, requires_grad=False)
            self._key = key
        originals = {path: self.modules[path].weight for path in self._merged}
        try:
            for path, merged in self._merged.items():
                self.modules[path]._parameters["weight"] = merged
            yield
        finally:
            for path, weight in originals.items():
                self.modules[path]._parameters["weight"] = weight  # type: ignore[assignment]

    def fits(self, paths: Collection[str]) -> bool:
        """Whether a copy of these modules' weights fits into memory, once the present copy is freed."""
        needed: Counter[torch.device] = Counter()
        for path in paths:
            weight: Tensor = self.modules[path].weight  # type: ignore[assignment]
            needed[weight.device] += weight.nbytes
        for copy in self._merged.values():
            needed[copy.device] -= copy.nbytes
        return all(size <= _SHARE * free_bytes([device]) for device, size in needed.items() if size > 0)


@torch.no_grad()
def merged_weight(module: nn.Module, stack: Stack, weights: Tensor, out: Tensor | None = None) -> Tensor:
    """`W + B diag(w) A` in the layout of the weight of a `mergeable` module, for weights (n,) of the adapters.

    `out` is memory to use if it fits, never that of the weight.
    """
    weight: Tensor = module.weight  # type: ignore[assignment]
    gate = weights[stack.owner].to(stack.A.device, stack.A.dtype)  # (R,)
    left = (stack.B * gate[:, None]).T
    right = stack.A
    if type(module).__name__ == "Conv1D":  # (in, out)
        left, right = right.T, left.T
    if weight.dtype != stack.A.dtype:
        return (weight.to(stack.A.dtype) + left @ right).to(weight.dtype)
    if out is None or out.shape != weight.shape or out.dtype != weight.dtype or out.device != weight.device:
        out = torch.empty_like(weight)
    return torch.addmm(weight, left, right, out=out)
