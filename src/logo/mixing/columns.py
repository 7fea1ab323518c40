"""`Columns`: the factor matrices of some modules of one model, and which adapter has which columns.

    A (C, d_in)   B (C, d_out)      row c of both is column c; the scale is folded into B

All modules of a `Columns` are adapted by the same adapters, which have the same columns in each of them. Column 0 is
zero and belongs to no adapter, so that an index may be padded with it. Budgets and threads are not known here.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Hashable, Mapping, Sequence

import torch
from torch import Tensor

from logo.adapters.adapter import LoraWeights
from logo.errors import NotFinite


class Columns:
    """Columns on some modules.

    Args:
        factors: module path -> (A, B), both with as many rows as there are columns.
        placed: key -> its columns.

    Attributes:
        capacity: columns that every module has memory for, column 0 included; 0 if there is none.
    """

    def __init__(
        self,
        factors: Mapping[str, tuple[Tensor, Tensor]],
        capacity: int = 0,
        placed: Mapping[Hashable, tuple[int, ...]] | None = None,
    ) -> None:
        self.factors = dict(factors)
        self.capacity = capacity
        self.placed = dict(placed or {})
        taken = {column for columns in self.placed.values() for column in columns}
        self._free = [column for column in range(1, capacity) if column not in taken]

    @classmethod
    def on(cls, weights: Mapping[str, LoraWeights], devices: Mapping[str, torch.device], dtype: torch.dtype) -> Columns:
        """An empty `Columns` on the modules of these factors."""
        return cls(
            {
                path: (
                    torch.zeros(0, factors.A.shape[1], dtype=dtype, device=devices[path]),
                    torch.zeros(0, len(factors.B), dtype=dtype, device=devices[path]),
                )
                for path, factors in weights.items()
            }
        )

    def split(self, paths: Collection[str]) -> tuple[Columns, Columns]:
        """The same columns on these modules, and on the others. No tensor is copied."""
        inside = {path: pair for path, pair in self.factors.items() if path in paths}
        outside = {path: pair for path, pair in self.factors.items() if path not in paths}
        return Columns(inside, self.capacity, self.placed), Columns(outside, self.capacity, self.placed)

    @property
    def column_bytes(self) -> int:
        """Memory of one column in all modules."""
        return sum((A.shape[1] + B.shape[1]) * A.element_size() for A, B in self.factors.values())

    @property
    def width(self) -> int:
        """The number of columns up to the last one that is taken, column 0 included."""
        return 1 + max((max(columns) for columns in self.placed.values() if columns), default=0)

    def missing(self, rank: int) -> int:
        """The number of columns to add before so many can be taken."""
        return max(0, rank - len(self._free)) + (rank > 0 and not self.capacity)

    def grow(self, more: int) -> None:
        """Adds columns of zeros. If memory runs out half-way, the capacity stays as it was."""
        capacity = self.capacity + more
        for path, (A, B) in self.factors.items():
            if len(A) < capacity:
                self.factors[path] = _longer(A, capacity), _longer(B, capacity)
        for column in range(max(1, self.capacity), capacity):
            heapq.heappush(self._free, column)
        self.capacity = capacity

    def trim(self) -> None:
        """Frees the memory of columns behind the last one that is taken."""
        self.capacity = capacity = self.width if self.placed else 0
        self._free = [column for column in self._free if column < capacity]
        heapq.heapify(self._free)
        for path, (A, B) in self.factors.items():  # if memory runs out, a longer tensor does no harm
            if len(A) > capacity:
                self.factors[path] = A[:capacity].clone(), B[:capacity].clone()

    def take(self, key: Hashable, rank: int) -> tuple[int, ...]:
        """Gives a key the first free columns, so that the columns in use are contiguous."""
        self.placed[key] = columns = tuple(heapq.heappop(self._free) for _ in range(rank))
        return columns

    def leave(self, key: Hashable) -> None:
        """Frees the columns of a key, if it has any."""
        for column in self.placed.pop(key, ()):
            heapq.heappush(self._free, column)

    @torch.no_grad()
    def write(self, name: str, columns: Sequence[int], weights: Mapping[str, LoraWeights]) -> None:
        """Writes factors into columns that are taken; zeros where a module's rank is lower than their number.

        Raises:
            NotFinite: a factor that is not finite in the dtype of the columns. As all columns may be multiplied
                together, it would make the term of every row NaN.
        """
        for path, (A, B) in self.factors.items():
            place = torch.tensor(columns, dtype=torch.int64, device=A.device)
            factors = weights[path]
            rank = len(factors.A)
            for target, found in ((A, factors.A), (B, factors.scaled_b().T)):
                written = found.to(target.device, target.dtype)
                if not bool(written.isfinite().all()):
                    raise NotFinite(
                        f"adapter {name!r}: module {path} overflows {target.dtype}, in which mixtures compute; load "
                        "the base model with a wider --dtype"
                    )
                target.index_copy_(0, place[:rank], written)
                target.index_fill_(0, place[rank:], 0)


def _longer(tensor: Tensor, rows: int) -> Tensor:
    longer = tensor.new_zeros(rows, tensor.shape[1])
    longer[: len(tensor)] = tensor
    return longer
