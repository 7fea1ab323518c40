"""When folding pays: measured on the machine, the model and the sizes at hand.

Folding costs `Σ out · in · R` once; gates cost `Σ R (in + out)` for every token. What a unit of either takes is timed
on one module the first time that sizes of an order come up, and from then on the rule is arithmetic.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from logo.mixing.folding import fold
from logo.mixing.gated import Gates, low_rank
from logo.mixing.working_set import Stack, WorkingSet

# Tokens at which gates are timed: one decoding step of one row, and enough to keep the processor busy.
_FEW, _MANY = 1, 64


@dataclass(frozen=True)
class Work:
    """What a mixture is going to be used for.

    Attributes:
        prompt: tokens that are read in one pass, over all rows.
        rows: sequences that are decoded together.
        steps: decoding steps to be expected.
    """

    prompt: int
    rows: int
    steps: float


@dataclass(frozen=True)
class Rates:
    """Seconds per unit of work; see the module's docstring."""

    fold: float
    few: float
    many: float

    def gates(self, size: int, tokens: int) -> float:
        """Seconds of gates of this size, `Σ R (in + out)`, for one pass over so many tokens."""
        # Few tokens cost the reading of the factors, whatever their number; many are bound by arithmetic.
        return size * max(self.few, self.many * tokens)


class Costs:
    """Measured costs on one base model.

    Args:
        modules: base module path -> linear module.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = modules
        self._rates: dict[tuple[int, torch.dtype, str], Rates] = {}

    def folding_pays(self, working_set: WorkingSet, work: Work) -> bool:
        """Whether one mixture of this working set is cheaper folded than gated."""
        sizes = [(len(stack.A), stack.A.shape[1], len(stack.B)) for stack in working_set.stacks.values()]
        rates = self._measured(working_set)
        folding = rates.fold * sum(rank * width * out for rank, width, out in sizes)
        size = sum(rank * (width + out) for rank, width, out in sizes)
        return folding < rates.gates(size, work.prompt) + work.steps * rates.gates(size, work.rows)

    def _measured(self, working_set: WorkingSet) -> Rates:
        path = max(working_set.stacks, key=lambda path: working_set.stacks[path].B.numel())
        stack = working_set.stacks[path]
        # Within a factor of two, a unit of work takes the same time.
        key = len(stack.A).bit_length(), stack.A.dtype, str(stack.A.device)
        if key not in self._rates:
            self._rates[key] = _measure(self._modules[path], stack, len(working_set.names))
        return self._rates[key]


@torch.no_grad()
def _measure(module: nn.Module, stack: Stack, adapters: int) -> Rates:
    weights = torch.full((adapters,), 1 / adapters)
    (rank, width), out = stack.A.shape, len(stack.B)
    gates = Gates(weights[None])
    few, many = (torch.zeros(1, n, width, dtype=stack.A.dtype, device=stack.A.device) for n in (_FEW, _MANY))
    memory = fold(module, stack, weights)
    size = rank * (width + out)
    return Rates(
        _seconds(lambda: fold(module, stack, weights, out=memory), stack) / (rank * width * out),
        _seconds(lambda: low_rank(few, stack, gates), stack) / size,
        _seconds(lambda: low_rank(many, stack, gates), stack) / (size * _MANY),
    )


def _seconds(run: Callable[[], object], stack: Stack) -> float:
    """The best of three, after one to warm up."""
    times = []
    for _ in range(4):
        started = time.perf_counter()
        run()
        if stack.A.device.type == "cuda":
            torch.cuda.synchronize(stack.A.device)
        times.append(time.perf_counter() - started)
    return min(times[1:])
