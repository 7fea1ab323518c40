"""Adapters of the sequences in flight, stacked once while sequences join and leave at any step.

    A (C, d_in)   B (C, d_out)   gate (tokens, C)        per module; one gate for all of them

An adapter gets columns when the first sequence that uses it begins, and keeps them for the next one as long as there
is room. Rows of a packed batch are tokens, so that each is gated by the mixture of its own sequence.

Not safe for threads: everything is called by the one that runs the model.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from logo.adapters.format import LoraWeights
from logo.mixing.gated import Gates, hooked, low_rank
from logo.mixing.working_set import Stack, device_of

# Columns of adapters that nobody uses now may stay while they are no more than those in use, or than this: they are
# multiplied in every step, for which a new sequence with the same adapters begins at once.
_IDLE_COLUMNS = 256


@dataclass(frozen=True)
class Part:
    """One adapter of a mixture.

    Attributes:
        key: what tells its tensors from those of others.
        weights: module path -> factors, fitted to the base.
        weight: its share.
    """

    key: Hashable
    weights: Mapping[str, LoraWeights]
    weight: float


@dataclass(frozen=True)
class Share:
    """The columns of one sequence's mixture, and its gate on each."""

    keys: tuple[Hashable, ...]
    columns: Tensor  # (n,) int64
    gates: Tensor  # (n,)


@dataclass
class _Held:
    columns: list[int]
    users: int


class Resident:
    """Stacks of adapters in use, and the gates of the step at hand.

    Args:
        modules: base module path -> linear module.
        dtype: what mixtures compute in; scales are applied in float32 before the cast.
    """

    def __init__(self, modules: Mapping[str, nn.Module], dtype: torch.dtype) -> None:
        self._modules = modules
        self._dtype = dtype
        self._held: dict[Hashable, _Held] = {}
        self._idle: OrderedDict[Hashable, None] = OrderedDict()
        self._free: list[int] = []
        self._capacity = 0
        self._width = 0  # columns up to the last one that is held
        self._stacks: dict[str, tuple[Tensor, Tensor]] = {}
        self._views: dict[str, Stack] = {}
        self._shown: tuple[int, int, int] | None = None
        self._gates: Gates | None = None

    @property
    def adapters(self) -> int:
        """How many adapters are stacked, in use or not."""
        return len(self._held)

    @property
    def columns(self) -> int:
        """How many columns there is room for."""
        return self._capacity

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Adds the gated term to every module inside the block; nothing where no gate is set."""
        with hooked(self._modules, {path: self._hook(path) for path in self._modules}):
            yield

    def join(self, parts: Sequence[Part]) -> Share:
        """Makes room for a sequence's adapters; `leave` has to follow."""
        parts = [part for part in parts if part.weight]
        for part in parts:
            held = self._held.get(part.key)
            if held is None:
                held = self._held[part.key] = _Held(self._place(part.weights), 0)
            held.users += 1
            self._idle.pop(part.key, None)
        self._trim()
        columns = [self._held[part.key].columns for part in parts]
        gates = [part.weight for part, own in zip(parts, columns, strict=True) for _ in own]
        flat = [column for own in columns for column in own]
        return Share(tuple(part.key for part in parts), torch.tensor(flat, dtype=torch.int64), torch.tensor(gates))

    def leave(self, share: Share) -> None:
        """A sequence has ended."""
        for key in share.keys:
            held = self._held[key]
            held.users -= 1
            if not held.users:
                self._idle[key] = None
        self._trim()

    def gate(self, step: Sequence[tuple[Share, int]]) -> bool:
        """Sets whose tokens the next forward pass holds.

        Args:
            step: the mixture and the number of tokens of each sequence, in the order of the packed row. Empty: the
                base model alone.

        Returns:
            whether any token has a mixture.
        """
        if not any(share.keys for share, _ in step):
            self._gates = None
            return False
        self._show()
        rows = torch.zeros(len(step), self._width)
        for row, (share, _) in enumerate(step):
            rows[row, share.columns] = share.gates
        lengths = torch.tensor([tokens for _, tokens in step])
        self._gates = Gates(rows.repeat_interleave(lengths, dim=0), per_token=True)
        return True

    def _hook(self, path: str) -> Any:
        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            stack = self._views.get(path)
            if self._gates is None or stack is None:
                return None
            return output + low_rank(inputs[0], stack, self._gates).to(output.dtype)

        return add

    def _place(self, weights: Mapping[str, LoraWeights]) -> list[int]:
        """Writes an adapter into free columns: as many as its highest rank, zeros where a module has fewer."""
        rank = max((len(factors.A) for factors in weights.values()), default=0)
        if len(self._free) < rank:
            self._grow(rank)
        columns = [heapq.heappop(self._free) for _ in range(rank)]
        for path, factors in weights.items():
            if path not in self._stacks:
                device = device_of(self._modules[path])
                A, B = (
                    torch.zeros(self._capacity, width, dtype=self._dtype, device=device)
                    for width in (factors.A.shape[1], len(factors.B))
                )
                self._stacks[path] = A, B
        for path, (A, B) in self._stacks.items():
            found = weights.get(path)
            own = columns[: 0 if found is None else len(found.A)]
            A[columns[len(own) :]] = B[columns[len(own) :]] = 0
            if found is not None:
                A[own] = found.A.to(A.device, A.dtype)
                B[own] = found.scaled_b().to(B.device, B.dtype).T
        return columns

    def _grow(self, rank: int) -> None:
        before, self._capacity = self._capacity, max(2 * self._capacity, self._capacity + rank)
        for column in range(before, self._capacity):
            heapq.heappush(self._free, column)
        more = self._capacity - before
        for path, (A, B) in self._stacks.items():
            self._stacks[path] = (
                torch.cat([A, A.new_zeros(more, A.shape[1])]),
                torch.cat([B, B.new_zeros(more, B.shape[1])]),
            )

    def _trim(self) -> None:
        """Takes columns from adapters that have been idle longest, and notes how far the columns in use reach."""
        idle = sum(len(self._held[key].columns) for key in self._idle)
        used = sum(len(held.columns) for held in self._held.values()) - idle
        while idle > max(used, _IDLE_COLUMNS):
            key, _ = self._idle.popitem(last=False)
            columns = self._held.pop(key).columns
            idle -= len(columns)
            for column in columns:
                heapq.heappush(self._free, column)
        self._width = max((max(held.columns, default=-1) + 1 for held in self._held.values()), default=0)

    def _show(self) -> None:
        """The columns in use of every stack, as they are multiplied; made again only where something has moved."""
        shape = (self._width, self._capacity, len(self._stacks))
        if shape == self._shown:
            return
        owner = torch.arange(self._width)
        self._views = {
            path: Stack(A[: self._width], B[: self._width].T, owner) for path, (A, B) in self._stacks.items()
        }
        self._shown = shape
