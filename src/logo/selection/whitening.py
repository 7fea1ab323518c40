"""Whitening: removes from a hidden vector what all text has in common.

Hidden vectors have a large mean, and vary mostly along a few directions that say little about the prompt. With mean `μ`
and covariance `C` of neutral tokens,

    W = (C / m + λ) ^ -1/2, up to a constant        m = mean eigenvalue of C

shrinks every direction in which neutral text varies much, so that `W (h - μ)` is what is particular about `h`. A
whitening belongs to the base model and a point and is shared by all adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

# λ: between 0.1 and 1 little changes (docs/how-selection-works.md).
SHRINKAGE = 0.3
# Rows of the random projection that estimates the length of a whitened vector.
SKETCHED = 64
# Directions that would shrink by less than this share are left as they are, which bounds the memory of a whitening.
_NEGLIGIBLE = 0.02


@dataclass(frozen=True)
class Whitening:
    """`W = I - V diag(1 - gain) Vᵀ`, in float32: mean `μ` (d,), orthonormal basis `V` (d, n), and gain (n,) in (0, 1),
    the factor by which each of these directions is multiplied. `stacked` ones have a dimension in front."""

    mean: Tensor
    basis: Tensor
    gain: Tensor

    @classmethod
    def of(cls, hidden: Tensor) -> Whitening:
        """The whitening of these hidden vectors (tokens, d); directions that they do not span are left alone."""
        hidden = hidden.float()
        count, width = hidden.shape
        mean = hidden.mean(dim=0)
        centred = hidden - mean
        # The smaller of the two Gram matrices has all eigenvalues that are not zero.
        gram = centred.T @ centred if width <= count else centred @ centred.T
        # On the CPU, since not every accelerator has double precision.
        values, vectors = torch.linalg.eigh(gram.cpu().double() / count)
        values = values.clamp_min(0)
        floor = SHRINKAGE * values.sum() / width
        gain = (floor / (values + floor)).sqrt() if floor > 0 else torch.ones_like(values)
        shrunk = gain < 1 - _NEGLIGIBLE
        basis = vectors[:, shrunk].float().to(hidden.device)
        if width > count:
            basis = centred.T @ basis / (values[shrunk] * count).sqrt().float().to(hidden.device)
        return cls(mean, basis, gain[shrunk].float().to(hidden.device))

    @classmethod
    def of_some(cls, hidden: Tensor, picked: Tensor) -> Whitening:
        """The whitening of those hidden vectors (tokens, d) for which `picked` (tokens,) is true. If they are fewer
        than dimensions, the mean is theirs, and the directions are those of all tokens."""
        own = hidden[picked].float()
        if len(own) >= hidden.shape[1]:
            return cls.of(own)
        return replace(cls.of(hidden), mean=own.mean(dim=0))

    @classmethod
    def stacked(cls, spaces: Sequence[Whitening]) -> Whitening:
        """Several whitenings of one width: mean (s, 1, d), basis (s, d, n) and gain (s, 1, n); some do nothing."""
        most = max(len(space.gain) for space in spaces)
        bases = [pad(space.basis, (0, most - len(space.gain))) for space in spaces]
        gains = [pad(space.gain, (0, most - len(space.gain)), value=1.0) for space in spaces]
        means = [space.mean for space in spaces]
        return cls(torch.stack(means)[:, None], torch.stack(bases), torch.stack(gains)[:, None])

    def fold(self, factor: Tensor) -> Tensor:
        """`T W` for a factor `T` (r, d), so that `‖T W (h - μ)‖` takes one product and one offset."""
        return factor - (factor @ self.basis) * (1 - self.gain) @ self.basis.mT

    def sketch(self) -> Tensor:
        """(`SKETCHED`, d): `S W` with fixed random rows `S`, so that `‖S W (h - μ)‖` is nearly `‖W (h - μ)‖`; the error
        has a standard deviation of 9 % and is the same for all adapters."""
        seeded = torch.Generator().manual_seed(0)
        rows = torch.randn(SKETCHED, len(self.mean), generator=seeded, dtype=torch.float32) / SKETCHED**0.5
        return self.fold(rows.to(self.mean.device))

    def to(self, device: torch.device) -> Whitening:
        """The same on another device."""
        return Whitening(self.mean.to(device), self.basis.to(device), self.gain.to(device))
