"""Gated products over vLLM's adapter slots.

    y += ((x Aᵀ) ⊙ gate) B        A (slots, rank, d_in)   B (slots, rank, d_out)   gate (tokens, slots)

One token's gate is its request's mixture: a weight at the slot of each adapter. The inputs of a step are written into
fixed buffers before the model runs, and the product over all slots does not branch on data, so that it runs alike
eagerly, compiled and in a captured graph. On a CPU, which does not capture, rows meet little but the columns that
their own adapters have in the layer: slots have the rank of the pool's largest adapter in every layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Rows of one request from which on they are multiplied by themselves, so that they meet only their own adapters.
_ALONE = 16
# What a product costs, as measured in bfloat16 on a CPU with AVX512-BF16. Fewer rows than these take as long, since the
# factors are read all the same.
_FEWEST_ROWS = 30
# Copying a number takes as long as multiplying it with this many rows.
_COPY = 75
# A call takes as long as multiplying this many numbers with a row.
_CALL = 9_000_000
# The most products of a layer whose columns are not neighbours: each one rounds the output once more.
_MOST_PRODUCTS = 4

# Consecutive rows of a step that belong to one request: the first of them, and their gate (rows, slots) on the CPU.
Rows = tuple[int, Tensor]


@dataclass(frozen=True)
class _Columns:
    """Columns of a layer's factors, `(slots times rank, d)`, that are multiplied at once: which they are, the gate
    (rows, columns), and where it is 0; `closed` is None if nowhere."""

    chosen: slice | Tensor
    gate: Tensor
    closed: Tensor | None


@dataclass(frozen=True, eq=False)
class Group:
    """Rows of a step that are multiplied together: (n,) int64 or a slice, and their gate (n, slots)."""

    rows: slice | Tensor
    gate: Tensor
    # The columns to multiply, by the ranks of the adapters in the slots and the width of the layer.
    _products: dict[tuple[tuple[int, ...], int, int], tuple[_Columns, ...]] = field(default_factory=dict)

    def add(self, y: Tensor, x: Tensor, a: Tensor, b: Tensor, ranks: tuple[int, ...] | None = None) -> None:
        """Adds the product to the group's rows of `y` (tokens, d_out); other arguments as `gated`.

        Args:
            ranks: of the adapters in the slots in this layer, 0 where one does not act on it; None: all have the rank
                of the slots.
        """
        slots, rank = a.shape[:2]
        products = self._products_of(ranks or (rank,) * slots, rank, a.shape[2] + b.shape[2])
        if not products:
            return
        a = a.flatten(0, 1)
        b = b.flatten(0, 1)
        entering = x[self.rows].to(a.dtype)
        for columns in products:
            opened = entering @ a[columns.chosen].T
            opened *= columns.gate
            if columns.closed is not None:
                opened.masked_fill_(columns.closed, 0)
            if isinstance(self.rows, slice):
                y[self.rows].addmm_(opened.to(y.dtype), b[columns.chosen].to(y.dtype))
            else:
                y.index_add_(0, self.rows, (opened @ b[columns.chosen]).to(y.dtype))

    def _products_of(self, ranks: tuple[int, ...], rank: int, width: int) -> tuple[_Columns, ...]:
        """What to multiply in a layer, many of which are alike."""
        key = ranks, rank, width
        if key not in self._products:
            self._products[key] = tuple(self._columns(ranks, rank, width))
        return self._products[key]

    def _columns(self, ranks: tuple[int, ...], rank: int, width: int) -> Iterator[_Columns]:
        """The columns of adapters that act on a layer and are open for some row: each run of neighbours by itself, all
        that lie between the first and the last, or a copy of them side by side, whichever takes the least time."""
        runs = self._runs(ranks, rank)
        if not runs:
            return
        first = runs[0][0]
        end = runs[-1][1]
        wanted = sum(behind - begin for begin, behind in runs)
        per_column = max(len(self.gate), _FEWEST_ROWS) * width
        together = (end - first) * per_column + _CALL
        copied = wanted * (per_column + _COPY * width) + 2 * _CALL
        apart = wanted * per_column + len(runs) * _CALL
        if len(runs) <= _MOST_PRODUCTS and apart < min(together, copied):
            for begin, behind in runs:
                yield self._gated(slice(begin, behind), torch.arange(begin, behind), rank)
        elif together <= copied:
            yield self._gated(slice(first, end), torch.arange(first, end), rank)
        else:
            side_by_side = torch.cat([torch.arange(begin, behind) for begin, behind in runs])
            yield self._gated(side_by_side, side_by_side, rank)

    def _runs(self, ranks: tuple[int, ...], rank: int) -> list[tuple[int, int]]:
        """The columns of those adapters, as runs of neighbours: the first, and the one behind the last."""
        is_open = (self.gate != 0).any(dim=0).tolist()
        runs: list[tuple[int, int]] = []
        for slot, own in enumerate(ranks):
            if not own or not is_open[slot]:
                continue
            begin = slot * rank
            if runs and runs[-1][1] == begin:
                runs[-1] = runs[-1][0], begin + own
            else:
                runs.append((begin, begin + own))
        return runs

    def _gated(self, chosen: slice | Tensor, numbers: Tensor, rank: int) -> _Columns:
        """The chosen columns, which have these numbers, with their gate."""
        gate = self.gate.index_select(1, numbers // rank)
        closed = gate == 0
        return _Columns(chosen, gate, closed if bool(closed.any()) else None)


class StepGates:
    """The gates of the current step, which has at most so many tokens and requests.

    Attributes:
        eager: whether layers run in Python in every step, on a CPU.
        tokens, sampled: the gate (tokens, slots) of every token, and of every token whose logits are computed; unless
            eager.
        groups, sampled_groups: the rows of both that have open gates, if eager.
    """

    def __init__(
        self, tokens: int, requests: int, slots: int, device: torch.device, dtype: torch.dtype, *, eager: bool
    ) -> None:
        self.eager = eager
        self.tokens = torch.zeros(tokens, slots, device=device, dtype=dtype)
        self.sampled = torch.zeros(requests, slots, device=device, dtype=dtype)
        self.groups: tuple[Group, ...] = ()
        self.sampled_groups: tuple[Group, ...] = ()
        self._written = {"tokens": 0, "sampled": 0}  # rows of both that the last step has written

    def write(self, tokens: Sequence[Rows], sampled: Sequence[Rows]) -> None:
        """Sets the gates of a step; rows that are not given have none."""
        if self.eager:
            self.groups = _grouped(tokens, self.tokens.dtype)
            self.sampled_groups = _grouped(sampled, self.sampled.dtype)
        else:
            self._copy("tokens", self.tokens, tokens)
            self._copy("sampled", self.sampled, sampled)

    def _copy(self, name: str, buffer: Tensor, rows: Sequence[Rows]) -> None:
        """Copies the gates of a step into a buffer, whose other rows become 0."""
        end = max((row + len(gate) for row, gate in rows), default=0)
        whole = torch.zeros(max(end, self._written[name]), buffer.shape[1])  # also what a longer step has left
        for row, gate in rows:
            whole[row : row + len(gate)] = gate
        if len(whole):
            buffer[: len(whole)] = whole.to(buffer.device, buffer.dtype)
        self._written[name] = end


def _grouped(rows: Sequence[Rows], dtype: torch.dtype) -> tuple[Group, ...]:
    """The rows that have open gates: long requests each alone, all others together."""
    opened = [(row, gate.to(dtype)) for row, gate in rows if bool(gate.any())]
    groups = [Group(slice(row, row + len(gate)), gate) for row, gate in opened if len(gate) >= _ALONE]
    short = [(torch.arange(row, row + len(gate)), gate) for row, gate in opened if len(gate) < _ALONE]
    if short:
        numbers, gates = map(torch.cat, zip(*short, strict=True))
        without_gaps = bool((numbers.diff() == 1).all())
        groups.append(Group(slice(int(numbers[0]), int(numbers[-1]) + 1) if without_gaps else numbers, gates))
    return tuple(groups)


def gated(x: Tensor, a: Tensor, b: Tensor, gate: Tensor) -> Tensor:
    """`((x Aᵀ) ⊙ gate) B`, (tokens, d_out) in the type of the adapters, of x (tokens, d_in), A (slots, rank, d_in),
    B (slots, rank, d_out) with the scale folded in, and gate (tokens, slots).

    A closed gate gives 0, even if `x Aᵀ` is not finite, so an adapter that overflows affects only its own rows.
    """
    product = (x.to(a.dtype) @ a.flatten(0, 1).T).view(-1, *a.shape[:2])
    product *= gate[..., None]
    product.masked_fill_((gate == 0)[..., None], 0)
    return product.flatten(1) @ b.flatten(0, 1)


def turned(b: Tensor) -> Tensor:
    """Zeros of the shape of vLLM's stacked B, `(slots, 1, d_out, rank)`, stored in memory as `(slots, 1, rank, d_out)`.

    vLLM writes adapters into it as into its own tensor; `gated` multiplies it without a copy.
    """
    return b.new_zeros(b.shape[0], b.shape[1], b.shape[3], b.shape[2]).transpose(2, 3)
