"""From columns of the store to the factors that one batch is multiplied by.

    Stack          A (R, d_in)      B (R, d_out)         all rows of the batch are multiplied by all of it
    GroupedStack   A (n, R, d_in)   B (n, R, d_out)      the rows of a group are multiplied by their group's part

`stacked` and `grouped` take columns in the order of the adapters that are held, wherever the store has put them, so
that a result does not depend on what ran before. `as_they_lie` takes all columns up to the last one that is used. That
copies nothing, but its sums run in the order in which adapters have come.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from logo.mixing.columns import Columns
from logo.mixing.store import AdapterStore, Hold

# The share of columns that have to be used for all of them to be multiplied instead of copying those that are.
_MOST = 0.5


@dataclass(frozen=True)
class Stack:
    """Some adapters on one module: `ΔW_i = B[owner == i].T A[owner == i]`."""

    A: Tensor  # (R, d_in)
    B: Tensor  # (R, d_out), scale folded in
    owner: Tensor  # (R,) int64: which of the adapters each column belongs to; their number for columns of nobody


@dataclass(frozen=True)
class GroupedStack:
    """The adapters of each of n groups on one module, padded to the ranks of the group that has most."""

    A: Tensor  # (n, R, d_in)
    B: Tensor  # (n, R, d_out), scale folded in
    owner: Tensor  # (n, R) int64: as in `Stack`


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
    """As `stacked`, but where half of the columns are used, all columns as they lie, without a copy."""
    stacks: dict[str, Stack] = {}
    with store.still():
        for part in store.parts:
            columns, owners = _columns(part, hold, range(len(hold.residents)))
            if columns and len(columns) >= _MOST * part.width:
                owner = torch.full((part.width,), len(hold.residents))
                owner[columns] = torch.tensor(owners)
                places = _Places(owner, owner)
                for path, (A, B) in part.factors.items():
                    stacks[path] = Stack(A[: part.width], B[: part.width], places.on(A.device)[1])
            elif columns:
                stacks |= _picked(part, columns, owners)
    return stacks


def grouped(store: AdapterStore, hold: Hold, groups: Sequence[Sequence[int]]) -> dict[str, GroupedStack]:
    """Module path -> the factors of every group, zeros where a group has fewer ranks than another.

    Args:
        groups: per group, which of the held adapters its rows use.
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
        for path, (A, B) in part.factors.items():
            flat, own = places.on(A.device)
            shape = (len(groups), ranks, -1)
            stacks[path] = GroupedStack(A.index_select(0, flat).view(shape), B.index_select(0, flat).view(shape), own)
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
    """These rows; where they lie one behind the other, without a copy."""
    first, last = columns[0], columns[-1]
    if last - first + 1 == len(columns) and all(b == a + 1 for a, b in pairwise(columns)):
        return factors[first : last + 1]
    return factors.index_select(0, index)
