"""How large an adapter's updates `ΔW = s B A` are, and how many directions they have, from their factors alone.

    B = Q_B R_B        Aᵀ = Q_A R_A        ΔW = Q_B (s R_B R_Aᵀ) Q_Aᵀ

The matrix in the middle is at most r x r and has the singular values of ΔW, so no matrix of ΔW's size is made.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from logo.adapters.format import Adapter, LoraWeights


@dataclass(frozen=True)
class Size:
    """The size of an adapter: `‖ΔW‖_F` over all modules, and the mean effective rank of the updates that are not 0."""

    norm: float
    effective_rank: float


def size_of(adapter: Adapter) -> Size:
    """Decomposes the updates of an adapter.

    Raises:
        AdapterError: it cannot be read.
    """
    spectra = [singular_values(one) for one in adapter.read().values()]
    ranks = [effective_rank(values) for values in spectra if values.norm() > 0]
    return Size(math.hypot(*(float(values.norm()) for values in spectra)), fmean(ranks) if ranks else 0.0)


def singular_values(weights: LoraWeights) -> Tensor:
    """The singular values of an update, descending, float64: `(k,)` with k the smallest side of the factors."""
    left = torch.linalg.qr(weights.B.double(), mode="r").R  # (p, r)
    right = torch.linalg.qr(weights.A.double().T, mode="r").R  # (q, r)
    values: Tensor = torch.linalg.svdvals(weights.scaling * left @ right.T)
    return values


def effective_rank(values: Tensor) -> float:
    """`exp(H)` with `H = -Σ q ln q` and `q = σ² / Σ σ²` (Roy and Vetterli, EUSIPCO 2007, use σ instead of σ²).

    It is between 1 and the rank; 0 for an update of zeros.
    """
    energy = values.double() ** 2
    total = energy.sum()
    if not total > 0:
        return 0.0
    return float(torch.special.entr(energy / total).sum().exp())
