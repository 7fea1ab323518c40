"""When folding pays: arithmetic on sizes, so that a mixture takes the same form whatever ran before it.

Costs are counted in multiplications of one large matrix product. A factor pair of rank R on a module costs

    folded   out · in · R                                                           once
    gated    R (in + out) · (tokens + read)                                         in every pass

because a pass multiplies every token by the factors and has to read them from memory besides. Nothing folds by itself
where the weights are of half precision: `W + ΔW` is rounded to their dtype there, and other tokens may follow.
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
    """What a mixture is going to be used for, which says in what form it is cheapest.

    Attributes:
        prompt: tokens that are read in one pass, over all rows.
        rows: sequences that are decoded together.
        steps: decoding steps to be expected, from what the call allows and from nothing that ran before.
    """

    prompt: int
    rows: int
    steps: float


@dataclass(frozen=True)
class Kind:
    """What decides, on one kind of device, how mixtures are multiplied.

    Attributes:
        fold_read: what reading a number of a factor takes, in multiplications, where folding is weighed against gates.
            None: nothing is folded by itself.
        group_read: the same where one grouping of rows is weighed against another. None: all rows are one group, which
            is multiplied by the adapters that any of them uses.
        turned: tokens of a pass, from and to, for which products with the factors on the left are faster. None: never.
        turned_group: the same for the tokens of one group, from one on.
    """

    fold_read: float | None = None
    group_read: float | None = None
    turned: tuple[int, int] | None = None
    turned_group: int = 0


KINDS = {
    # Timed on an AMD EPYC with PyTorch's CPU build (docs/performance.md). Folding, and the gates of one token, with one
    # thread: 10.6 to 13.0 at widths of 1024 to 4096 and a rank of 320. Groups: 1 to 16 rows. Turned products: 20 to
    # 30 % faster at 16 to 256 tokens; of groups, 28 to 50 % at 1 to 4 tokens, and slower at 8.
    "cpu": Kind(fold_read=10.0, group_read=4.0, turned=(12, 256), turned_group=4),
}


def kind_of(device: torch.device) -> Kind:
    """What decides on this device; nothing is folded, grouped or turned where nobody has measured that it pays."""
    return KINDS.get(device.type, Kind())


# Answers may end before the most tokens that they may have. Expecting all of them would make every answer that ends
# early pay for a fold it does not need; expecting too few costs a few percent of each step at most.
EXPECTED = 0.25


def folding_pays(ranks: Mapping[str, int], modules: Mapping[str, nn.Module], work: Work) -> bool:
    """Whether one mixture is cheaper folded than gated.

    Args:
        ranks: module path -> the ranks of the mixture's adapters there, together.
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
