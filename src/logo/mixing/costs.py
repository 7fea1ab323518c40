"""When folding pays: measured on the machine, the model and the sizes at hand.

Folding costs `Σ out · in · R` once; gates cost `Σ R (in + out)` for every token. What a unit of either takes is timed
the first time that sizes of an order come up, and from then on the rule is arithmetic.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from logo.mixing.folding import fold
from logo.mixing.gated import Gates, low_rank
from logo.mixing.work import Work
from logo.mixing.working_set import Stack, WorkingSet

# Tokens at which gates are timed: one decoding step of one row, and enough to keep the processor busy.
_FEW, _MANY = 1, 64


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
        rates, stacks = self._measured(working_set), working_set.stacks.values()
        folding = rates.fold * sum(map(fold_size, stacks))
        size = sum(map(gate_size, stacks))
        return folding < rates.gates(size, work.prompt) + work.steps * rates.gates(size, work.rows)

    def _measured(self, working_set: WorkingSet) -> Rates:
        stack = next(iter(working_set.stacks.values()))
        # Within a factor of two, a unit of work takes the same time.
        rank = max(len(stack.A) for stack in working_set.stacks.values())
        key = rank.bit_length(), stack.A.dtype, str(stack.A.device)
        if key not in self._rates:
            self._rates[key] = _measure(self._modules, working_set)
        return self._rates[key]


@torch.no_grad()
def _measure(modules: Mapping[str, nn.Module], working_set: WorkingSet) -> Rates:
    """Folds one module; runs the gates of all, since in a cache that holds one module's factors they seem cheaper."""
    adapters, stacks = len(working_set.names), working_set.stacks
    weights = torch.full((adapters,), 1 / adapters)
    gates = Gates(weights[None])
    path = max(stacks, key=lambda path: stacks[path].B.numel())
    module, stack = modules[path], stacks[path]
    memory = fold(module, stack, weights)
    size = sum(gate_size(stack) for stack in stacks.values())

    def run(tokens: int) -> Callable[[], None]:
        inputs = {s.A.shape[1]: torch.zeros(1, tokens, s.A.shape[1], dtype=s.A.dtype) for s in stacks.values()}

        def gated() -> None:
            for stack in stacks.values():
                low_rank(inputs[stack.A.shape[1]].to(stack.A.device), stack, gates)

        return gated

    return Rates(
        _seconds(lambda: fold(module, stack, weights, out=memory), stack) / fold_size(stack),
        _seconds(run(_FEW), stack) / size,
        _seconds(run(_MANY), stack) / (size * _MANY),
    )


def fold_size(stack: Stack) -> int:
    """Multiplications that folding one module takes."""
    return len(stack.A) * stack.A.shape[1] * len(stack.B)


def gate_size(stack: Stack) -> int:
    """Multiplications that gates on one module take for one token."""
    return len(stack.A) * (stack.A.shape[1] + len(stack.B))


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
