"""Spectra of LoRA updates: the singular values of `ΔW = s B A` and what follows from them, from the factors alone.

    B = Q_B R_B        Aᵀ = Q_A R_A        ΔW = Q_B (s R_B R_Aᵀ) Q_Aᵀ

The middle is at most r x r, and it has the singular values of ΔW, so that no matrix of ΔW's size is ever made. All of
it is computed in float64: what an update and its rounded copy differ by is far below float32's own rounding of a sum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from logo.adapters.format import LoraWeights

# Share of `‖ΔW‖_F²` below which directions are rounding errors of float64 and not of the update.
_ROUNDING = 1e-28


@dataclass(frozen=True)
class Spectrum:
    """`ΔW = U diag(σ) Vᵀ`, without the directions that no factor has.

    Attributes:
        left: U (out, k), float64.
        values: σ (k,), descending; zeros for directions that the factors have and the product has not.
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
        """The best approximation of this rank (Eckart and Young), as factors of equal size, in float64 and of scale 1.

        Args:
            rank: 1 or more; more than there are directions keeps all of them.
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
    """Factors of `ΔW - ΔW'`, of the sum of their ranks. Shapes of A's rows and of B's columns have to agree."""
    return LoraWeights(
        torch.cat([one.A.double(), other.A.double()]),
        torch.cat([one.scaling * one.B.double(), -other.scaling * other.B.double()], dim=1),
        1.0,
    )


def relative_error(exact: Mapping[str, LoraWeights], other: Mapping[str, LoraWeights]) -> float:
    """`‖ΔW - ΔW'‖ / ‖ΔW‖` over all modules; exactly 0 where no factor differs."""
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
    """`exp(H)` with `H = -Σ q ln q` and `q = σ² / Σ σ²`: as many equal directions would be as spread out.

    Between 1 and the rank; 0 for an update of zeros. (Roy and Vetterli, EUSIPCO 2007, who take σ instead of σ².)
    """
    energy = values.double() ** 2
    total = energy.sum()
    if not total > 0:
        return 0.0
    shares = energy / total
    return float(torch.special.entr(shares).sum().exp())


def rank_for(values: Tensor, energy: float) -> int:
    """The smallest rank whose truncation holds this share of `‖ΔW‖_F²`; 1 at least.

    Args:
        values: singular values, descending.
        energy: above 0 and up to 1.
    """
    squares = values.double() ** 2
    total = float(squares.sum())
    if not total > 0:
        return 1
    # The sum of what is left is compared, not that of what is kept: near a share of 1 only the former has the digits.
    left = squares.flip(0).cumsum(0).flip(0)  # left[k]: squares from k on, that is what rank k gives up
    return max(1, int((left > max(1.0 - energy, _ROUNDING) * total).sum()))
