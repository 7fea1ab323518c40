"""Pruning: every update replaced by the best one of a smaller rank.

The truncated singular value decomposition of `s B A` is the closest matrix of its rank (Eckart and Young, 1936). It is
made from the factors, and its own factors are `B' = U √σ` and `A' = √σ Vᵀ`, with a scale of 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from logo.adapters.config import read_raw
from logo.adapters.format import Adapter, LoraWeights
from logo.adapters.spectra import difference, norm, rank_for, spectrum
from logo.adapters.writing import plain_tensors, save_adapter, unscaled
from logo.errors import AdapterError, UsageError


@dataclass(frozen=True)
class Budget:
    """How small an update becomes: a share of its squared norm to keep, or a rank.

    Raises:
        UsageError: both or neither is given, or one is out of range.
    """

    energy: float | None = None
    rank: int | None = None

    def __post_init__(self) -> None:
        if (self.energy is None) == (self.rank is None):
            raise UsageError("pruning: expected either an energy or a rank")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UsageError(f"energy: expected a share above 0 and up to 1, found {self.energy}")
        if self.rank is not None and self.rank < 1:
            raise UsageError(f"rank: expected 1 or more, found {self.rank}")


@dataclass(frozen=True)
class Pruned:
    """An adapter of smaller rank.

    Attributes:
        weights: by module path, of scale 1, in the dtype that the adapter had.
        error: `‖ΔW - ΔW'‖ / ‖ΔW‖` over all modules, rounding to that dtype included.
    """

    adapter: Adapter
    weights: dict[str, LoraWeights]
    error: float

    @property
    def ranks(self) -> dict[str, int]:
        """By module path."""
        return {path: len(one.A) for path, one in self.weights.items()}

    @property
    def parameters(self) -> int:
        """How many numbers it holds."""
        return sum(one.A.numel() + one.B.numel() for one in self.weights.values())


def pruned(adapter: Adapter, budget: Budget) -> Pruned:
    """The adapter within the budget. No module's rank grows, and none is left out: an update of zeros keeps rank 1.

    Raises:
        AdapterError: it cannot be read, or the new factors do not fit in its dtype.
    """
    weights: dict[str, LoraWeights] = {}
    lost = total = 0.0
    for path, one in adapter.read().items():
        found = spectrum(one)
        rank = rank_for(found.values, budget.energy) if budget.energy is not None else budget.rank
        smaller = rounded(found.truncated(min(rank or 1, len(one.A))), one.A.dtype)
        if not all(bool(factor.isfinite().all()) for factor in (smaller.A, smaller.B)):
            raise AdapterError(adapter.name, f"the pruned factors of {path} do not fit in {one.A.dtype}")
        weights[path] = smaller
        lost += norm(difference(one, smaller)) ** 2
        total += found.norm**2
    return Pruned(adapter, weights, math.sqrt(lost / total) if total else 0.0)


def rounded(weights: LoraWeights, dtype: torch.dtype) -> LoraWeights:
    """The factors in another dtype."""
    return LoraWeights(weights.A.to(dtype), weights.B.to(dtype), weights.scaling)


def write_pruned(result: Pruned, folder: Path) -> None:
    """Writes it as a PEFT folder with the settings that the adapter had, but for ranks and scales."""
    config = read_raw(result.adapter.folder) | unscaled(result.ranks)
    save_adapter(folder, plain_tensors(result.weights), config)
