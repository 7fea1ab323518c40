"""Gated products over vLLM's adapter slots.

    y += ((x Aᵀ) ⊙ gate) B        A (slots, rank, d_in)   B (slots, rank, d_out)   gate (tokens, slots)

One token's gate is its request's mixture: a weight at the slot of each adapter. The inputs of a step are written into
fixed buffers before the model runs, and the product over all slots does not branch on data, so that it runs alike
eagerly, compiled and in a captured graph. On a CPU, which does not capture, rows meet few slots but their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Rows of one request from which on they are multiplied by themselves, so that they meet only their own adapters.
_ALONE = 16
# Copying a number takes about as long as this many products: slots between open ones are multiplied if that is less.
_COPY = 32

# Consecutive rows of a step that belong to one request: the first of them, and their gate (rows, slots) on the CPU.
Rows = tuple[int, Tensor]


@dataclass(frozen=True)
class Group:
    """Rows of a step that are multiplied together: (n,) int64 or a slice, the slots (int64 or a slice) that are
    multiplied, and the gate (n, slots) of the rows at these slots; `closed`: where it is 0, None if nowhere."""

    rows: slice | Tensor
    slots: slice | Tensor
    gate: Tensor
    closed: Tensor | None

    @classmethod
    def of(cls, rows: slice | Tensor, gate: Tensor) -> Group:
        """The group of these rows, given their gates (n, slots), some of which are open."""
        opened = (gate != 0).any(dim=0).nonzero()[:, 0]
        first = int(opened[0])
        end = int(opened[-1]) + 1
        slots: slice | Tensor = opened
        if len(gate) * (end - first - len(opened)) <= _COPY * len(opened):
            slots = slice(first, end)
        gate = gate[:, slots]
        closed = gate == 0
        return cls(rows, slots, gate, closed if bool(closed.any()) else None)

    def add(self, y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> None:
        """Adds the product to the group's rows of `y` (tokens, d_out); other arguments as `gated`."""
        opened = _opened(x[self.rows], a[self.slots], self.gate, self.closed)
        b = b[self.slots].flatten(0, 1)
        if isinstance(self.rows, slice):
            y[self.rows].addmm_(opened.to(y.dtype), b.to(y.dtype))
        else:
            y.index_add_(0, self.rows, (opened @ b).to(y.dtype))


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
    groups = [Group.of(slice(row, row + len(gate)), gate) for row, gate in opened if len(gate) >= _ALONE]
    short = [(torch.arange(row, row + len(gate)), gate) for row, gate in opened if len(gate) < _ALONE]
    if short:
        numbers, gates = map(torch.cat, zip(*short, strict=True))
        without_gaps = bool((numbers.diff() == 1).all())
        groups.append(Group.of(slice(int(numbers[0]), int(numbers[-1]) + 1) if without_gaps else numbers, gates))
    return tuple(groups)


def gated(x: Tensor, a: Tensor, b: Tensor, gate: Tensor) -> Tensor:
    """`((x Aᵀ) ⊙ gate) B`, (tokens, d_out) in the type of the adapters, of x (tokens, d_in), A (slots, rank, d_in),
    B (slots, rank, d_out) with the scale folded in, and gate (tokens, slots).

    A closed gate gives 0, even if `x Aᵀ` is not finite, so an adapter that overflows affects only its own rows.
    """
    return _opened(x, a, gate, gate == 0) @ b.flatten(0, 1)


def _opened(x: Tensor, a: Tensor, gate: Tensor, closed: Tensor | None) -> Tensor:
    """`(x Aᵀ) ⊙ gate`, (tokens, slots times rank); `closed`: where the gate is 0, None if nowhere."""
    product = (x.to(a.dtype) @ a.flatten(0, 1).T).view(-1, *a.shape[:2])
    product *= gate[..., None]
    if closed is not None:
        product.masked_fill_(closed[..., None], 0)
    return product.flatten(1)


def turned(b: Tensor) -> Tensor:
    """Zeros of the shape of vLLM's stacked B, `(slots, 1, d_out, rank)`, stored in memory as `(slots, 1, rank, d_out)`.

    vLLM writes adapters into it as into its own tensor; `gated` multiplies it without a copy.
    """
    return b.new_zeros(b.shape[0], b.shape[1], b.shape[3], b.shape[2]).transpose(2, 3)
