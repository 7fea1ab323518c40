"""`Taps.tap` as an operator of PyTorch, for layers that are compiled or captured.

The operator is declared to change `seen`, since a compiler removes code without a visible effect. On a GPU it is one of
vLLM's splitting operators, so that it runs between captured graphs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from logo.backends.vllm.taps import Gather, Taps

# Operators take only tensors, numbers and strings, so they find taps by their index in this list.
_TAPS: list[tuple[Taps, Gather | None]] = []

NAME = "logo::tap"


def registered(taps: Taps, gather: Gather | None) -> int:
    """The number under which the operator finds these taps."""
    _TAPS.append((taps, gather))
    return len(_TAPS) - 1


@torch.library.custom_op(NAME, mutates_args=("seen",))
def tap(entering: Tensor, seen: Tensor, number: int, place: str) -> None:
    """Calls `Taps.tap`, if something is read at the place in the current step.

    Args:
        entering: (rows, d), what enters the place.
        seen: (1,), claimed to be changed.
        number: what `registered` returned.
        place: as `Taps.tap`.
    """
    taps, gather = _TAPS[number]
    if taps.active(place):
        taps.tap(place, entering, gather)


@tap.register_fake
def _(entering: Tensor, seen: Tensor, number: int, place: str) -> None:
    return None
