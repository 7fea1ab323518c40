"""Prunes adapters: replaces every update by its best approximation of a smaller rank.

The truncated singular value decomposition of `s B A` is the closest matrix of its rank (Eckart and Young, 1936). It is
computed from the factors; the new factors are `B' = U √σ` and `A' = √σ Vᵀ`, with a scale of 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from logo.adapters.config import read_raw
from logo.adapters.format import Adapter, LoraWeights
from logo.adapters.initial import WithInitial, doubled
from logo.adapters.upkeep.spectra import rank_for, relative_error, spectrum
from logo.adapters.writing import plain_tensors, save_adapter, unscaled
from logo.errors import AdapterError, UsageError


@dataclass(frozen=True)
class Budget:
    """The size of pruned updates: a share of the squared norm to keep, or a rank.

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
    """A pruned adapter.

    Attributes:
        weights: by module path, in the adapter's dtype, with scale 1 unless `kept`.
        error: `‖ΔW - ΔW'‖ / ‖ΔW‖` over all modules, including rounding to the dtype.
        kept: whether no module's rank became smaller, so that these are the original factors.
    """

    adapter: Adapter
    weights: dict[str, LoraWeights]
    error: float
    kept: bool

    @property
    def ranks(self) -> dict[str, int]:
        """By module path."""
        return {path: len(one.A) for path, one in self.weights.items()}

    @property
    def parameters(self) -> int:
        """The number of its parameters."""
        return sum(one.A.numel() + one.B.numel() for one in self.weights.values())


def pruned(adapter: Adapter, budget: Budget) -> Pruned:
    """Prunes an adapter. No rank grows, and no module is left out: an update of zeros keeps rank 1.

    An adapter that is within the budget keeps its factors, since new ones would be rounded again.

    Raises:
        AdapterError: it cannot be read, or the new factors do not fit in its dtype.
    """
    adapter.check_linear()
    own, weights = adapter.read(), dict[str, LoraWeights]()
    cut = {}
    for path, one in own.items():
        found = spectrum(one)
        rank = rank_for(found.values, budget.energy) if budget.energy is not None else budget.rank
        rank = min(rank or 1, len(one.A))
        weights[path] = rounded(found.truncated(rank), one.A.dtype)
        cut[path] = rank < len(one.A)
    if not any(cut.values()):
        return Pruned(adapter, own, 0.0, True)
    for path, smaller in weights.items():
        if not all(bool(factor.isfinite().all()) for factor in (smaller.A, smaller.B)):
            raise AdapterError(adapter.name, f"the pruned factors of {path} do not fit in {smaller.A.dtype}")
    return Pruned(adapter, weights, relative_error(own, weights), False)


def rounded(weights: LoraWeights, dtype: torch.dtype) -> LoraWeights:
    """The factors in another dtype."""
    return LoraWeights(weights.A.to(dtype), weights.B.to(dtype), weights.scaling)


def write_pruned(result: Pruned, folder: Path) -> None:
    """Writes a pruned adapter as a PEFT folder with its old settings but for ranks and scales."""
    config = read_raw(result.adapter.folder)
    if isinstance(result.adapter.file, WithInitial):
        config |= doubled(config)
    if not result.kept:
        # PEFT initialises an adapter before it reads its factors, and some initialisations allow only some ranks.
        config |= {**unscaled(result.ranks), "init_lora_weights": True}
    save_adapter(folder, plain_tensors(result.weights), config)
