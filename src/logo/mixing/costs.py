"""When folding pays: arithmetic on sizes, so that a mixture takes the same form whatever ran before it.

Costs are counted in multiplications of one large matrix product. A factor pair of rank R on a module costs

    folded   out · in · R                                                           once
    gated    R (in + out) · (tokens + READ)                                         in every pass

because a pass multiplies every token by the factors and has to read them from memory besides. Nothing folds by itself
where the weights are of half precision: `W + ΔW` is rounded to their dtype there, and other tokens may follow.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from logo.mixing.work import Work
from logo.mixing.working_set import Stack, WorkingSet

# What reading a number of a factor takes, in multiplications, by kind of device. Nothing folds by itself on others.
READ = {
    # Folding, and the gates of one token, timed on an AMD EPYC with PyTorch's CPU build and one thread: 10.6 to 13.0 at
    # widths of 1024 to 4096 and a rank of 320.
    "cpu": 10.0,
    # Not measured: the data sheet of an H100 SXM says 67 · 10¹² float32 operations, two to a multiplication, and
    # 3.35 · 10¹² bytes per second.
    "cuda": 40.0,
}
# Answers may end before the most tokens that they may have. Expecting all of them would make every answer that ends
# early pay for a fold it does not need; expecting too few costs a few percent of each step at most.
EXPECTED = 0.25


def folding_pays(working_set: WorkingSet, modules: Mapping[str, nn.Module], work: Work) -> bool:
    """Whether one mixture of this working set is cheaper folded than gated.

    Args:
        modules: base module path -> linear module.
        work: what the mixture will be used for.
    """
    folded = gated = 0.0
    for path, stack in working_set.stacks.items():
        read = READ.get(stack.A.device.type)
        if read is None or _half(modules[path]):
            return False
        folded += fold_size(stack)
        gated += gate_size(stack) * (work.prompt + read + work.steps * (work.rows + read))
    return folded < gated


def _half(module: nn.Module) -> bool:
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    return weight.element_size() < torch.float32.itemsize


def fold_size(stack: Stack) -> int:
    """Multiplications that folding one module takes."""
    return len(stack.A) * stack.A.shape[1] * len(stack.B)


def gate_size(stack: Stack) -> int:
    """Multiplications that gates on one module take for one token."""
    return len(stack.A) * (stack.A.shape[1] + len(stack.B))
