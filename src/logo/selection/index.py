"""The scoring index of one point: every adapter's response to a hidden vector, in a few stacked products.

With `s_i B_i = Q_i R_i` (QR), `‖ΔW_i h‖ = ‖R_i A_i h‖`: norms need an (r, d) factor per adapter and no output-sized
vector. Whole responses `ΔW_i h` are computed in bounded chunks for the signals that need them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

# Floats of one chunk of whole responses (64 MiB): bounds memory whatever the pool's size.
_CHUNK = 16 * 2**20


class ScoringIndex:
    """All scorable adapters of a pool at one point.

    Args:
        factors: per adapter, `A (r_i, d)` and `s B (out, r_i)`, in pool order.
        device: where scores are computed.
    """

    def __init__(self, factors: Sequence[tuple[Tensor, Tensor]], device: torch.device) -> None:
        self._factors = [(a.float().to(device), b.float().to(device)) for a, b in factors]
        self.device = device

    def __len__(self) -> int:
        return len(self._factors)

    @property
    def width(self) -> int | None:
        """Length of the hidden vectors it scores; None for an empty index."""
        return self._factors[0][0].shape[1] if self._factors else None

    def norms(self, hidden: Tensor) -> Tensor:
        """`‖ΔW_i h‖₂` for hidden (rows, d); returns (rows, adapters), float32."""
        responses = hidden.to(self.device, torch.float32) @ self._stacked.T  # (rows, R)
        squares = torch.zeros(len(hidden), len(self), device=self.device)
        return squares.index_add_(1, self._owner, responses.square()).sqrt()

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

    @cached_property
    def _stacked(self) -> Tensor:
        """(R, d): the rows `R_i A_i` of all adapters."""
        return torch.cat([torch.linalg.qr(b, mode="r").R @ a for a, b in self._factors])

    @cached_property
    def _owner(self) -> Tensor:
        """(R,): which adapter each row of `_stacked` belongs to."""
        ranks = torch.tensor([min(b.shape) for _, b in self._factors])
        return torch.repeat_interleave(torch.arange(len(self)), ranks).to(self.device)
