"""From columns of the store to the factors by which a batch is multiplied.

    Stack          A (R, d_in)      B (R, d_out)         all rows of the batch are multiplied by all of it
    GroupedStack   A (n, R, d_in)   B (n, R, d_out)      the rows of a group are multiplied by its part of it

`stacked` and `grouped` take columns in the order of the held adapters, so that a result does not depend on where the
store has put them. `as_they_lie` takes all columns up to the last one in use: it copies nothing, but the order of its
sums depends on the order in which adapters were loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from logo.mixing.columns import Columns
from logo.mixing.store import AdapterStore, Hold

# If at least this share of the columns is in use, all are multiplied; else those in use are copied.
_MOST = 0.5


@dataclass(frozen=True)
class Stack:
    """Some adapters on one module: `ΔW_i = B[owner == i].T A[owner == i]`."""

    A: Tensor  # (R, d_in)
    B: Tensor  # (R, d_out), scale folded in
    owner: Tensor  # (R,) int64: the adapter of each column; the number of adapters for columns that belong to none
    gaps: bool = False  # whether there are columns that belong to no adapter; they may hold anything


class Copies:
    """Memory for copies of factors, which the next batch uses again.

    Copies that several passes read have their own memory for each module. All others share one piece of memory, which
    stays in the processor's caches, so that copying costs hardly more than reading.
    """

    def __init__(self) -> None:
        self._own: dict[tuple[str, str], Tensor] = {}
        self._shared: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def own(self, place: tuple[str, str], factors: Tensor, index: Tensor) -> Tensor:
        """A copy (len(index), width) of these rows of factors; the next call for the same place overwrites it."""
        return self._copied(self._own, place, factors, index)

    def shared(self, factors: Tensor, index: Tensor) -> Tensor:
        """Such a copy in the memory that all modules share; the next call overwrites it."""
        return self._copied(self._shared, (factors.device, factors.dtype), factors, index)

    def clear(self) -> None:
        """Frees the memory."""
        self._own.clear()
        self._shared.clear()

    @staticmethod
    def _copied(memory: dict[Any, Tensor], place: Any, factors: Tensor, index: Tensor) -> Tensor:
        size = len(index) * factors.shape[1]
        if place not in memory or memory[place].numel() < size:
            memory[place] = factors.new_empty(size)
        out = memory[place][:size].view(len(index), -1)
        return torch.index_select(factors, 0, index, out=out)


class GroupedStack:
    """The adapters of each of n groups on one module, padded to the largest sum of ranks.

    Args:
        path: of the module.
        factors: A (C, d_in) and B (C, d_out) of the store.
        index: (n * R,) int64: the columns of all groups.
        owner: (n, R) int64: as in `Stack`.
        copies: the memory for copies. The stacks of a batch are valid until those of the next batch are used.
    """

    def __init__(self, path: str, factors: tuple[Tensor, Tensor], index: Tensor, owner: Tensor, copies: Copies) -> None:
        self.owner = owner
        self._path = path
        self._factors = factors
        self._index = index
        self._copies = copies
        self._own: dict[str, Tensor] = {}

    @property
    def dtype(self) -> torch.dtype:
        """Of the factors."""
        return self._factors[0].dtype

    def A(self, keep: bool) -> Tensor:
        """(n, R, d_in). Without `keep`, it is valid until the next factor of any module is taken."""
        return self._copied("A", self._factors[0], keep)

    def B(self, keep: bool) -> Tensor:
        """(n, R, d_out), scale folded in; as `A`."""
        return self._copied("B", self._factors[1], keep)

    def _copied(self, name: str, factors: Tensor, keep: bool) -> Tensor:
        if keep and name not in self._own:
            self._own[name] = self._copies.own((self._path, name), factors, self._index)
        found = self._own[name] if name in self._own else self._copies.shared(factors, self._index)
        return found.view(*self.owner.shape, -1)


def stacked(store: AdapterStore, hold: Hold) -> dict[str, Stack]:
    """Module path -> the held adapters that touch it. Modules that none of them touches are absent.

    Modules that the same adapters touch share one `owner` tensor per device.
    """
    stacks: dict[str, Stack] = {}
    for part in store.parts:
        columns, owners = _columns(part, hold, range(len(hold.residents)))
        if columns:
            stacks |= _picked(part, columns, owners)
    return stacks


def as_they_lie(store: AdapterStore, hold: Hold) -> dict[str, Stack]:
    """As `stacked`, but all columns without a copy if at least half of them are in use."""
    stacks: dict[str, Stack] = {}
    with store.still():
        for part in store.parts:
            columns, owners = _columns(part, hold, range(len(hold.residents)))
            if columns and len(columns) >= _MOST * part.width:
                owner = torch.full((part.width,), len(hold.residents))
                owner[columns] = torch.tensor(owners)
                places = _Places(owner, owner)
                for path, (A, B) in part.factors.items():
                    stacks[path] = Stack(A[: part.width], B[: part.width], places.on(A.device)[1], gaps=True)
            elif columns:
                stacks |= _picked(part, columns, owners)
    return stacks


def grouped(
    store: AdapterStore, hold: Hold, groups: Sequence[Sequence[int]], copies: Copies
) -> dict[str, GroupedStack]:
    """Module path -> the factors of every group, padded with zeros.

    Args:
        groups: per group, which of the held adapters its rows use.
        copies: the memory for them, which no other stacks may use any more.
    """
    stacks: dict[str, GroupedStack] = {}
    for part in store.parts:
        found = [_columns(part, hold, group) for group in groups]
        ranks = max(len(columns) for columns, _ in found)
        if not ranks:
            continue
        index = torch.zeros(len(groups), ranks, dtype=torch.int64)  # column 0 is zero
        owner = torch.full((len(groups), ranks), len(hold.residents))
        for g, (columns, owners) in enumerate(found):
            index[g, : len(columns)] = torch.tensor(columns, dtype=torch.int64)
            owner[g, : len(columns)] = torch.tensor(owners, dtype=torch.int64)
        places = _Places(index.flatten(), owner)
        for path, factors in part.factors.items():
            stacks[path] = GroupedStack(path, factors, *places.on(factors[0].device), copies)
    return stacks


def ranks(store: AdapterStore, hold: Hold) -> dict[str, int]:
    """Module path -> the ranks of the held adapters there, together."""
    found: dict[str, int] = {}
    for part in store.parts:
        columns, _ = _columns(part, hold, range(len(hold.residents)))
        if columns:
            found |= dict.fromkeys(part.factors, len(columns))
    return found


def _picked(part: Columns, columns: Sequence[int], owners: Sequence[int]) -> dict[str, Stack]:
    places = _Places(torch.tensor(columns), torch.tensor(owners))
    stacks = {}
    for path, (A, B) in part.factors.items():
        index, owner = places.on(A.device)
        stacks[path] = Stack(_rows(A, columns, index), _rows(B, columns, index), owner)
    return stacks


class _Places:
    """An index of columns and their owners, on every device that asks."""

    def __init__(self, index: Tensor, owner: Tensor) -> None:
        self._made = {torch.device("cpu"): (index, owner)}

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._made:
            index, owner = self._made[torch.device("cpu")]
            self._made[device] = index.to(device), owner.to(device)
        return self._made[device]


def _columns(part: Columns, hold: Hold, members: Sequence[int]) -> tuple[list[int], list[int]]:
    """The columns of these adapters in a part, and whose each is."""
    columns: list[int] = []
    owners: list[int] = []
    for member in members:
        own = part.placed.get(hold.residents[member].source.key, ())
        columns += own
        owners += [member] * len(own)
    return columns, owners


def _rows(factors: Tensor, columns: Sequence[int], index: Tensor) -> Tensor:
    """These rows, without a copy if they are consecutive."""
    first, last = columns[0], columns[-1]
    if last - first + 1 == len(columns) and all(b == a + 1 for a, b in pairwise(columns)):
        return factors[first : last + 1]
    return factors.index_select(0, index)
