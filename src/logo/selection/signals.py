"""Signals: pure functions from an index and hidden vectors to one score per adapter.

A signal is registered by name. Both official ones are those of the paper (arXiv 2511.07129, section 3) with the
constants of the authors' code.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from logo.errors import UsageError, closest
from logo.selection.index import ScoringIndex

Signal = Callable[[ScoringIndex, Tensor], Tensor]  # (index, hidden (rows, d)) -> scores (rows, adapters)

SIGNALS: dict[str, Signal] = {}


def register(name: str) -> Callable[[Signal], Signal]:
    """Adds a signal under a name that `get_signal` and the command line know."""

    def add(signal: Signal) -> Signal:
        SIGNALS[name] = signal
        return signal

    return add


def get_signal(name: str) -> Signal:
    """The signal of this name.

    Raises:
        UsageError: there is none.
    """
    try:
        return SIGNALS[name]
    except KeyError:
        raise UsageError(f"unknown signal {name!r}{closest(name, SIGNALS)}; known: {', '.join(SIGNALS)}") from None


@register("norm")
def norm(index: ScoringIndex, hidden: Tensor) -> Tensor:
    """`‖ΔW_i h‖₂`: how large the adapter's response to this input is."""
    return index.norms(hidden)


@register("entropy")
def entropy(index: ScoringIndex, hidden: Tensor) -> Tensor:
    """`1 / (H + 1e-6)`, `H = -Σ q log(q + 1e-8)`, `q = softmax(ΔW_i h)`: how concentrated the response is."""
    chunks = []
    for response in index.responses(hidden):
        q = response.softmax(dim=-1)
        chunks.append(1 / (-(q * (q + 1e-8).log()).sum(dim=-1) + 1e-6))
    return torch.cat(chunks, dim=1)
