"""When folding pays, from sizes alone, so that the form of a mixture does not depend on what ran before.

The unit of cost is one multiplication in a large matrix product. A factor pair of rank R on a module costs

    folded   out · in · R                                                           once
    gated    R (in + out) · (tokens + read)                                         in every pass

since a pass multiplies every token by the factors and also reads them from memory; `read` is the cost of reading one
weight. Nothing is folded automatically into weights of half precision, because `W + ΔW` would be rounded to their dtype
and could change the answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from logo.adapters.layout import linear_shape
from logo.mixing.placement import device_of


@dataclass(frozen=True)
class Work:
    """The work that a mixture will be used for; it decides which form is cheapest.

    Attributes:
        prompt: tokens that are read in one pass, over all rows.
        rows: sequences that are decoded together.
        steps: expected decoding steps, from what the call allows.
    """

    prompt: int
    rows: int
    steps: float


@dataclass(frozen=True)
class Kind:
    """How mixtures are multiplied on one kind of device.

    Attributes:
        fold_read: cost of reading one weight of a factor, in multiplications, for the choice between folding and gates.
            None: nothing is folded automatically.
        group_read: the same cost for the choice between groupings of rows. None: all rows are one group, which is
            multiplied by the adapters of all of them.
        turned: the least and the most tokens of a pass for which products with the factors on the left are faster.
            None: they never are.
        turned_group: the most tokens of a group for which such products are faster.
    """

    fold_read: float | None = None
    group_read: float | None = None
    turned: tuple[int, int] | None = None
    turned_group: int = 0


KINDS = {
    # Measured on an AMD EPYC with PyTorch's CPU build (docs/performance.md). Folding, and the gates of one token, with
    # one thread: 10.6 to 13.0 at widths of 1024 to 4096 and a rank of 320. Groups: 1 to 16 rows. Turned products: 20 to
    # 30 % faster at 16 to 256 tokens; of groups, 28 to 50 % at 1 to 4 tokens, and slower at 8.
    "cpu": Kind(fold_read=10.0, group_read=4.0, turned=(12, 256), turned_group=4),
}


def kind_of(device: torch.device) -> Kind:
    """The `Kind` of a device; on a device that was not measured nothing is folded, grouped or turned."""
    return KINDS.get(device.type, Kind())


# The expected share of the tokens that an answer may have. A share that is too large folds for answers that end early;
# one that is too small costs a few percent of each step at most.
EXPECTED = 0.25


def folding_pays(ranks: Mapping[str, int], modules: Mapping[str, nn.Module], work: Work) -> bool:
    """Whether a mixture is cheaper folded than gated.

    Args:
        ranks: module path -> the sum of the ranks of the mixture's adapters there.
        modules: base module path -> linear module.
        work: what the mixture will be used for.
    """
    folded = gated = 0.0
    for path, rank in ranks.items():
        module = modules[path]
        read, shape = kind_of(device_of(module)).fold_read, linear_shape(module)
        if read is None or shape is None or _half(module):
            return False
        folded += rank * shape.in_features * shape.out_features
        gated += (
            rank * (shape.in_features + shape.out_features) * (work.prompt + read + work.steps * (work.rows + read))
        )
    return folded < gated


def _half(module: nn.Module) -> bool:
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    return weight.element_size() < torch.float32.itemsize
