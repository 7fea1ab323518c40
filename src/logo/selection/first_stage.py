"""The first stage of a two-stage index: a few numbers per adapter that bound or estimate its response to a vector.

The response of adapter i is `‖T_i x‖` with a factor `T_i (r, d)`, which a rotation of its rows does not change. The
rows are rotated so that the first q hold as much as q rows can, and the others are summarised:

    L = ‖lead x‖          the first q rows, whole, in half precision
    K = ‖known Qᵀ x‖      the other rows within a small space Q that all adapters share: where vectors are largest
    e = ‖x - Q Qᵀ x‖      the part of the vector outside Q
    σ                     the largest singular value of the other rows outside Q
    ρ                     rounding: of half precision, and the most that float32 may lose

    (L - ρ‖x‖)² + (K - σ e - ρ‖x‖)²  <=  ‖T x‖²  <=  (L + ρ‖x‖)² + (K + σ e + ρ‖x‖)²       (differences below 0 are 0)

The bounds hold for every vector. They are tight if the singular values of adapters fall quickly, and useless otherwise
(docs/many-adapters.md). `√(L² + K²)` is an estimate between them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from logo.selection.emphasis import emphasised
from logo.selection.index import ScoringIndex
from logo.selection.reference import prompt_means

# Dimensions of the space that all adapters share.
SHARED = 8
# Floats of the rows that are processed at once, so that they stay in the processor's cache.
_PIECE = 2**20


@dataclass(frozen=True)
class FirstStage:
    """The summaries of N adapters at one point. Adapters of smaller rank have rows of zeros.

    Attributes:
        lead: (N, q, d) float16, in units of `unit`.
        unit: (N,): the largest entry of each adapter's leading rows, so that half precision suffices.
        known: (N, r - q, m).
        rest: (N,): σ.
        lost: (N,): ρ.
        basis: Q (d, m), orthonormal.
        mean: (d,): subtracted from every vector first.
    """

    lead: Tensor
    unit: Tensor
    known: Tensor
    rest: Tensor
    lost: Tensor
    basis: Tensor
    mean: Tensor

    @classmethod
    def of(cls, index: ScoringIndex, mean: Tensor | None, hidden: Tensor, rank: int) -> FirstStage:
        """The first stage of an index.

        Args:
            mean: μ of the index's whitening; None where it has none.
            hidden: (vectors, d) of ordinary texts, for the shared space.
            rank: q.
        """
        width = index.stacked.shape[1]
        mean = torch.zeros(width) if mean is None else mean.cpu()
        basis = shared_space(hidden.cpu().float() - mean, SHARED)
        parts = [_reduced(rows, rank, basis) for rows in _pieces(index)]
        if not parts:
            parts = [_reduced(torch.zeros(0, 1, width), rank, basis)]
        lead, unit, known, rest, lost = (torch.cat(kind) for kind in zip(*parts, strict=True))
        return cls(lead, unit, known, rest, lost, basis, mean)

    def __len__(self) -> int:
        return len(self.rest)

    @property
    def bytes(self) -> int:
        """Memory it takes."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def tensors(self) -> dict[str, Tensor]:
        """By field, for a file."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def bounds(self, hidden: Tensor, owners: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Lower and upper bounds of every adapter's mean response per prompt, (rows, N) each.

        Args:
            hidden: (vectors, d).
            owners: (vectors,): the prompt each vector belongs to.
            rows: the number of prompts.
        """
        x = hidden.cpu().float() - self.mean
        inside = x @ self.basis
        outside = (x - inside @ self.basis.T).norm(dim=1)
        low, high = [], []
        for lead, known, part in self._parts(x, inside):
            lost = self.lost[part, None] * x.norm(dim=1)
            beyond = self.rest[part, None] * outside + lost
            least = torch.hypot((lead - lost).clamp_min(0), (known - beyond).clamp_min(0))
            most = torch.hypot(lead + lost, known + beyond)
            low.append(prompt_means(least.T, owners, rows))
            high.append(prompt_means(most.T, owners, rows))
        return torch.cat(low, dim=1), torch.cat(high, dim=1)

    def estimates(
        self, hidden: Tensor, owners: Tensor, rows: int, units: Tensor | None = None, late: int = 0
    ) -> Tensor:
        """Estimates of every adapter's mean response per prompt, (rows, N); arguments as those of `bounds`.

        Args:
            units: (vectors,): what responses are divided by; None: 1.
            late: 1 weighs the last tokens of each prompt most; see `logo.selection.emphasis`.
        """
        x = hidden.cpu().float() - self.mean
        unit = torch.ones(len(x)) if units is None else units.cpu()
        parts = self._parts(x, x @ self.basis)
        means = (emphasised((torch.hypot(lead, known) / unit).T, owners, rows, late) for lead, known, _ in parts)
        return torch.cat(list(means), dim=1)

    def _parts(self, x: Tensor, inside: Tensor) -> Iterator[tuple[Tensor, Tensor, slice]]:
        """Yields `L` and `K` (adapters, vectors) of a few adapters at a time, and which adapters these are."""
        count, rank, width = self.lead.shape
        size = max(1, _PIECE // max(1, rank * max(width, len(x))))
        for start in range(0, count, size):
            part = slice(start, start + size)
            lead, known = self.lead[part].float(), self.known[part]
            responses = (lead.view(-1, width) @ x.T).view(len(lead), rank, len(x))
            within = (known.reshape(-1, known.shape[2]) @ inside.T).view(*known.shape[:2], len(x))
            # Sums of squares, since a norm over the middle dimension is many times slower.
            sizes = [values.square_().sum(dim=1).sqrt_() for values in (responses, within)]
            yield sizes[0].mul_(self.unit[part, None]), sizes[1], part


def shared_space(vectors: Tensor, most: int) -> Tensor:
    """The `most` directions (d, m) in which vectors (n, d) are largest, orthonormal; fewer where they span fewer."""
    gram = vectors.double().T @ vectors.double()
    values, directions = torch.linalg.eigh(gram)
    kept = (values > values[-1:] * 1e-10).nonzero()[:, 0][-most:]
    basis: Tensor = directions[:, kept].float().contiguous()
    return basis


def _pieces(index: ScoringIndex) -> Iterator[Tensor]:
    """Yields factors (n, r, d) of a few adapters at a time, in order; smaller ranks are padded with zeros."""
    width, ranks, rows = index.stacked.shape[1], index.ranks, index.rows
    rank = max(ranks, default=1)
    size = max(1, _PIECE // (rank * width))
    for start in range(0, len(ranks), size):
        some = rows[start : start + size]
        if set(ranks) == {rank}:
            yield index.stacked[some[0].start : some[-1].stop].cpu().view(-1, rank, width)
        else:
            piece = torch.zeros(len(some), rank, width)
            for i, part in enumerate(some):
                piece[i, : part.stop - part.start] = index.stacked[part].cpu()
            yield piece


def _reduced(factors: Tensor, rank: int, basis: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`lead`, `unit`, `known`, `rest` and `lost` of factors (n, r, d)."""
    inside = factors @ basis  # (n, r, m)
    outside = factors - inside @ basis.T
    # The rotation puts the rows that are largest outside the shared space first; it follows from an (r, r) matrix.
    double = outside.double()
    values, rotation = torch.linalg.eigh(double @ double.transpose(1, 2))
    rotation = rotation.flip(2).transpose(1, 2).float()  # (n, r, r), rows in falling order
    lead = torch.zeros(len(factors), rank, factors.shape[2])
    whole = rotation[:, :rank] @ factors
    lead[:, : whole.shape[1]] = whole
    unit = lead.abs().amax(dim=(1, 2)).clamp_min(1e-30)
    half = (lead / unit[:, None, None]).half()
    rounded = (lead - half.float() * unit[:, None, None]).flatten(1).norm(dim=1)
    others = rotation[:, rank:]
    size = factors.flatten(1).norm(dim=1)
    rest = values.flip(1)[:, rank].clamp_min(0).sqrt().float() if others.shape[1] else torch.zeros(len(factors))
    # The most that products of float32 may lose, here and in one stage.
    lost = rounded + (factors.shape[2] ** 0.5 + 8) * 2**-22 * size
    return half, unit, others @ inside, rest, lost
