"""Adapters of the sequences in flight, stacked once while sequences join and leave at any step.

    A (C, d_in)   B (C, d_out)   gate (tokens, C)        per module; one gate for all of them

An adapter gets columns when the first sequence that uses it begins, and keeps them for the next one as long as there
is room. Rows of a packed batch are tokens, so that each is gated by the mixture of its own sequence. The output head
may be given one token per sequence only; it then has a gate of its own.

Joining is all or nothing. Everything that needs memory is made first; then the columns are written, which nobody uses
yet; and then the books are changed, which cannot fail.

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
from logo.errors import NotFinite
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


@dataclass
class _Columns:
    """Columns, and the stacks that have room for them: prepared, not yet in use.

    Attributes:
        own: adapter -> the columns that it gets.
        free: those that nobody has, as a heap.
        capacity: how many there are.
        stacks: module path -> A (capacity, d_in), B (capacity, d_out).
    """

    own: dict[Hashable, list[int]]
    free: list[int]
    capacity: int
    stacks: dict[str, tuple[Tensor, Tensor]]


class Resident:
    """Stacks of adapters in use, and the gates of the step at hand.

    Args:
        modules: base module path -> linear module.
        dtype: what mixtures compute in; scales are applied in float32 before the cast.
        head: path of the module that is given one row per sequence instead of all tokens: first the last tokens of
            those whose next token is drawn, in order, and then anything for the others. None: there is no such module.
    """

    def __init__(self, modules: Mapping[str, nn.Module], dtype: torch.dtype, head: str | None = None) -> None:
        self._modules = modules
        self._dtype = dtype
        self._head = head
        self._held: dict[Hashable, _Held] = {}
        self._idle: OrderedDict[Hashable, None] = OrderedDict()
        self._free: list[int] = []
        self._capacity = 0
        self._width = 0  # columns up to the last one that is held
        self._stacks: dict[str, tuple[Tensor, Tensor]] = {}
        self._views: dict[str, Stack] = {}
        self._shown: tuple[int, int, int] | None = None
        self._gates: Gates | None = None
        self._head_gates: Gates | None = None

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
        """Makes room for a sequence's adapters; `leave` has to follow, unless this fails and nothing has changed.

        Raises:
            NotFinite: an adapter that the dtype of the mixtures cannot hold.
        """
        parts = [part for part in parts if part.weight]
        new = {part.key: part.weights for part in parts if part.key not in self._held}
        made = self._made(new)
        columns = [made.own[part.key] if part.key in new else self._held[part.key].columns for part in parts]
        gates = [part.weight for part, own in zip(parts, columns, strict=True) for _ in own]
        flat = [column for own in columns for column in own]
        share = Share(tuple(part.key for part in parts), torch.tensor(flat, dtype=torch.int64), torch.tensor(gates))
        self._write(made, new)
        # From here on nothing can fail.
        self._free, self._capacity, self._stacks = made.free, made.capacity, made.stacks
        self._held |= {key: _Held(own, 0) for key, own in made.own.items()}
        for key in share.keys:
            self._held[key].users += 1
            self._idle.pop(key, None)
        self._trim()
        return share

    def leave(self, share: Share) -> None:
        """A sequence has ended."""
        for key in share.keys:
            held = self._held[key]
            held.users -= 1
            if not held.users:
                self._idle[key] = None
        self._trim()

    def gate(self, step: Sequence[tuple[Share, int, bool]]) -> bool:
        """Sets whose tokens the next forward pass holds.

        Args:
            step: for each sequence, in the order of the packed row: its mixture, its number of tokens, and whether its
                next token is drawn. Empty: the base model alone.

        Returns:
            whether any token has a mixture.
        """
        if not any(share.keys for share, _, _ in step):
            self._gates = self._head_gates = None
            return False
        self._show()
        rows = torch.zeros(len(step), self._width)
        for row, (share, _, _) in enumerate(step):
            rows[row, share.columns] = share.gates
        lengths = torch.tensor([tokens for _, tokens, _ in step])
        gates = Gates(rows.repeat_interleave(lengths, dim=0), per_token=True)
        drawn_first = sorted(range(len(step)), key=lambda row: not step[row][2])
        self._gates, self._head_gates = gates, Gates(rows[drawn_first], per_token=True)
        return True

    def _hook(self, path: str) -> Any:
        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            stack, gates = self._views.get(path), self._head_gates if path == self._head else self._gates
            if gates is None or stack is None:
                return None
            return output + low_rank(inputs[0], stack, gates).to(output.dtype)

        return add

    def _made(self, new: Mapping[Hashable, Mapping[str, LoraWeights]]) -> _Columns:
        """Columns for these adapters, as many as the highest rank of each, and stacks that are long enough."""
        ranks = {key: max((len(factors.A) for factors in weights.values()), default=0) for key, weights in new.items()}
        needed, free, capacity = sum(ranks.values()), list(self._free), self._capacity
        if len(free) < needed:
            capacity = max(2 * capacity, capacity + needed)
            free += range(self._capacity, capacity)
            heapq.heapify(free)
        own = {key: [heapq.heappop(free) for _ in range(rank)] for key, rank in ranks.items()}
        more = capacity - self._capacity
        stacks = dict(self._stacks)
        if more:
            for path, (A, B) in stacks.items():
                stacks[path] = (
                    torch.cat([A, A.new_zeros(more, A.shape[1])]),
                    torch.cat([B, B.new_zeros(more, B.shape[1])]),
                )
        for weights in new.values():
            for path, factors in weights.items():
                if path not in stacks:
                    device = device_of(self._modules[path])
                    A, B = (
                        torch.zeros(capacity, width, dtype=self._dtype, device=device)
                        for width in (factors.A.shape[1], len(factors.B))
                    )
                    stacks[path] = A, B
        return _Columns(own, free, capacity, stacks)

    def _write(self, made: _Columns, new: Mapping[Hashable, Mapping[str, LoraWeights]]) -> None:
        """Writes adapters into their columns, zeros where a module has fewer than the others or none."""
        for key, weights in new.items():
            columns = made.own[key]
            for path, (A, B) in made.stacks.items():
                found = weights.get(path)
                own = columns[: 0 if found is None else len(found.A)]
                A[columns[len(own) :]] = B[columns[len(own) :]] = 0
                if found is not None:
                    A[own] = self._cast(found.A, path).to(A.device)
                    B[own] = self._cast(found.scaled_b().T, path).to(B.device)

    def _cast(self, factor: Tensor, path: str) -> Tensor:
        """In the dtype of the mixtures."""
        cast = factor.to(self._dtype)
        if not bool(cast.isfinite().all()):  # no gate would keep it from the tokens of others: 0 times infinity is NaN
            raise NotFinite(
                f"an adapter of this mixture holds a number on {path} that {str(self._dtype).removeprefix('torch.')} "
                "cannot: serve the base model in another dtype (--dtype)"
            )
        return cast

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
