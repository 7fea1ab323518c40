"""The scoring index of one point: every adapter's response to a hidden vector, in a few stacked products.

With `s_i B_i = Q_i R_i` (QR), `‖ΔW_i h‖ = ‖R_i A_i h‖`: norms need an (r, d) factor per adapter and no output-sized
vector. Whole responses `ΔW_i h` are computed in bounded chunks for the signals that need them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from logo.adapters.format import Adapter
from logo.selection.points import Point
from logo.selection.whitening import Whitening

# Floats of one chunk of whole responses (64 MiB): bounds memory whatever the pool's size.
_CHUNK = 16 * 2**20


class ScoringIndex:
    """All scorable adapters of a pool at one point.

    Args:
        factors: per adapter, `A (r_i, d)` and `s B (out, r_i)`, in pool order.
        device: where scores are computed.
        whitening: applied to hidden vectors before they are scored by their norm.
    """

    def __init__(
        self, factors: Sequence[tuple[Tensor, Tensor]], device: torch.device, whitening: Whitening | None = None
    ) -> None:
        self._factors = [(a.float().to(device), b.float().to(device)) for a, b in factors]
        self._whitening = None if whitening is None else whitening.to(device)
        self.device = device

    @classmethod
    def read(
        cls, adapters: Sequence[Adapter], point: Point, device: torch.device, whitening: Whitening | None = None
    ) -> ScoringIndex:
        """The index of adapters that all touch the point; reads their tensors at that point only."""
        factors = []
        for adapter in adapters:
            weights = adapter.read([point.module])[point.module]
            b = weights.scaled_b()
            factors.append((weights.A, b if point.rows is None else b[list(point.rows)]))
        return cls(factors, device, whitening)

    def __len__(self) -> int:
        return len(self._factors)

    @property
    def width(self) -> int | None:
        """Length of the hidden vectors it scores; None for an empty index."""
        return self._factors[0][0].shape[1] if self._factors else None

    @property
    def bytes(self) -> int:
        """Memory of the factors and of what was made of them so far."""
        tensors = [tensor for pair in self._factors for tensor in pair]
        tensors += [self.__dict__[name] for name in ("_stacked", "_directions") if name in self.__dict__]
        return sum(tensor.nbytes for tensor in tensors)

    def norms(self, hidden: Tensor) -> Tensor:
        """`‖ΔW_i h‖₂` for hidden (rows, d), or `‖ΔW_i W (h - μ)‖₂` with a whitening; (rows, adapters), float32."""
        responses = hidden.to(self.device, torch.float32) @ self._stacked.T - self._offset  # (rows, R)
        squares = torch.zeros(len(hidden), len(self), device=self.device)
        return squares.index_add_(1, self._owner, responses.square()).sqrt()

    def alignments(self, hidden: Tensor) -> Tensor:
        """`|v_iᵀ h|` for hidden (rows, d), `v_i` the first right singular vector of `ΔW_i`; (rows, adapters)."""
        return (hidden.to(self.device, torch.float32) @ self._directions.T).abs()

    def responses(self, hidden: Tensor) -> Iterator[Tensor]:
        """`ΔW_i h` for hidden (rows, d), in pool order: chunks (rows, adapters of the chunk, out), float32."""
        hidden = hidden.to(self.device, torch.float32)
        if not self._factors:
            return
        out = self._factors[0][1].shape[0]
        size = max(1, _CHUNK // (len(hidden) * out))
        for start in range(0, len(self), size):
            part = self._factors[start : start + size]
            yield torch.stack([(hidden @ a.T) @ b.T for a, b in part], dim=1)

    def _products(self) -> list[Tensor]:
        """`R_i A_i` (min(r_i, out), d) per adapter."""
        return [torch.linalg.qr(b, mode="r").R @ a for a, b in self._factors]

    @cached_property
    def _stacked(self) -> Tensor:
        """(R, d): the rows `R_i A_i` of all adapters, whitened where a whitening is given."""
        stacked = torch.cat(self._products())
        return stacked if self._whitening is None else self._whitening.fold(stacked)

    @cached_property
    def _offset(self) -> Tensor | float:
        """(R,): the stacked response to the mean hidden vector."""
        return 0.0 if self._whitening is None else self._stacked @ self._whitening.mean

    @cached_property
    def _directions(self) -> Tensor:
        """(adapters, d): unit vectors; zeros for an adapter of zeros, which has no direction."""
        directions = []
        for factor in self._products():
            _, values, right = torch.linalg.svd(factor, full_matrices=False)
            directions.append(right[0] * (values[0] > 0))
        return torch.stack(directions)

    @cached_property
    def _owner(self) -> Tensor:
        """(R,): which adapter each row of `_stacked` belongs to."""
        ranks = torch.tensor([min(b.shape) for _, b in self._factors])
        return torch.repeat_interleave(torch.arange(len(self)), ranks).to(self.device)
