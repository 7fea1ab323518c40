"""`Spectrum`: the singular value decomposition of an update `ΔW = s B A`, from its factors alone.

    B = Q_B R_B        Aᵀ = Q_A R_A        ΔW = Q_B (s R_B R_Aᵀ) Q_Aᵀ

The matrix in the middle is at most r x r and has the singular values of ΔW, so no matrix of ΔW's size is made. Float64
is necessary, since an update and its rounded copy differ by less than the rounding of sums in float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from logo.adapters.format import LoraWeights

# Directions below this share of `‖ΔW‖_F²` are rounding errors of float64.
_ROUNDING = 1e-28


@dataclass(frozen=True)
class Spectrum:
    """`ΔW = U diag(σ) Vᵀ`, restricted to the directions of the factors.

    Attributes:
        left: U (out, k), float64.
        values: σ (k,), descending; zeros for directions that the product does not have.
        right: Vᵀ (k, in).
    """

    left: Tensor
    values: Tensor
    right: Tensor

    @property
    def norm(self) -> float:
        """`‖ΔW‖_F`."""
        return float(self.values.norm())

    def truncated(self, rank: int) -> LoraWeights:
        """The best approximation of this rank (Eckart and Young), as factors of equal norm, in float64 with scale 1.

        Args:
            rank: 1 or more; all directions are kept if there are fewer.
        """
        roots = self.values[:rank].sqrt()
        return LoraWeights(roots[:, None] * self.right[:rank], self.left[:, :rank] * roots, 1.0)


def spectrum(weights: LoraWeights) -> Spectrum:
    """The singular value decomposition of an update."""
    left_basis, left_factor = torch.linalg.qr(weights.B.double())  # (out, p), (p, r)
    right_basis, right_factor = torch.linalg.qr(weights.A.double().T)  # (in, q), (q, r)
    left, values, right = torch.linalg.svd(weights.scaling * left_factor @ right_factor.T, full_matrices=False)
    return Spectrum(left_basis @ left, values, right @ right_basis.T)


def norm(weights: LoraWeights) -> float:
    """`‖ΔW‖_F`."""
    left = torch.linalg.qr(weights.B.double(), mode="r").R
    right = torch.linalg.qr(weights.A.double().T, mode="r").R
    return float((weights.scaling * left @ right.T).norm())


def difference(one: LoraWeights, other: LoraWeights) -> LoraWeights:
    """Factors of `ΔW - ΔW'`, whose rank is the sum of both; ΔW and ΔW' have to have the same shape."""
    return LoraWeights(
        torch.cat([one.A.double(), other.A.double()]),
        torch.cat([one.scaling * one.B.double(), -other.scaling * other.B.double()], dim=1),
        1.0,
    )


def relative_error(exact: Mapping[str, LoraWeights], other: Mapping[str, LoraWeights]) -> float:
    """`‖ΔW - ΔW'‖ / ‖ΔW‖` over all modules; exactly 0 if no factor differs."""
    lost = [
        norm(difference(one, other[path]))
        for path, one in exact.items()
        if not (_equal(one.A, other[path].A) and _equal(one.B, other[path].B) and one.scaling == other[path].scaling)
    ]
    total = math.hypot(*map(norm, exact.values())) if lost else 0.0
    return math.hypot(*lost) / total if total else 0.0


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.double(), other.double())


def inner(one: LoraWeights, other: LoraWeights) -> float:
    """`⟨ΔW, ΔW'⟩ = tr(ΔWᵀ ΔW')`, the sum of the products of their entries."""
    left = one.B.double().T @ other.B.double()  # (r, r')
    right = one.A.double() @ other.A.double().T  # (r, r')
    return one.scaling * other.scaling * float((left * right).sum())


def effective_rank(values: Tensor) -> float:
    """`exp(H)` with `H = -Σ q ln q` and `q = σ² / Σ σ²` (Roy and Vetterli, EUSIPCO 2007, use σ instead of σ²).

    It is between 1 and the rank; 0 for an update of zeros.
    """
    energy = values.double() ** 2
    total = energy.sum()
    if not total > 0:
        return 0.0
    shares = energy / total
    return float(torch.special.entr(shares).sum().exp())


def rank_for(values: Tensor, energy: float) -> int:
    """The smallest rank whose truncation keeps this share of `‖ΔW‖_F²`; at least 1.

    Args:
        values: singular values, descending.
        energy: above 0 and up to 1.
    """
    squares = values.double() ** 2
    total = float(squares.sum())
    if not total > 0:
        return 1
    # The discarded sum is compared, not the kept one, which has too few digits near a share of 1.
    left = squares.flip(0).cumsum(0).flip(0)  # left[k]: squares from k on, which rank k discards
    return max(1, int((left > max(1.0 - energy, _ROUNDING) * total).sum()))
