"""Rows of a batch in groups that use the same adapters, so that each row is multiplied by fewer factors.

Multiplying all rows by the factors of all adapters reads each factor once, but multiplies rows by adapters that they do
not use. In `n` groups of one size, the rows of a group are multiplied by the factors of its own adapters:

    A (n, R, d_in)   B (n, R, d_out)   gates (n, rows, R)      R: the largest sum of ranks; others are padded

so that one batched matrix product serves all groups. The adapters that rows share decide which grouping is cheapest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from logo.mixing.costs import Work, kind_of
from logo.mixing.stacks import GroupedStack

# A gate, and a mask of where it is 0; None: it is 0 nowhere.
Gate = tuple[Tensor, Tensor | None]


def gated_product(response: Tensor, gate: Gate) -> Tensor:
    """`g ⊙ (A x)`: 0 where the gate is 0, even if `A x` is not finite there."""
    factor, closed = gate
    product = response * factor
    return product if closed is None else product.masked_fill_(closed, 0)


@dataclass(frozen=True)
class Groups:
    """Rows in groups of one size.

    Attributes:
        rows: (n, m) the rows of each group; -1 at the end of a group is no row.
        adapters: per group, the adapters that its rows use, as ascending columns of the weights.
    """

    rows: Tensor
    adapters: tuple[tuple[int, ...], ...]


def cheapest(
    weights: Tensor, sizes: Sequence[float], work: Work, read: float | None, room: float = torch.inf
) -> Groups:
    """The grouping of least cost.

    Args:
        weights: (rows, adapters), 0 if a row does not use an adapter.
        sizes: the number of parameters of each adapter, in any unit.
        work: what the mixtures will be used for.
        read: cost of reading one weight, in multiplications (`Kind.group_read`); None: all rows are one group.
        room: the most parameters that several groups may hold together, in the same unit.
    """
    used, size = weights != 0, torch.tensor(sizes, dtype=torch.float64)
    count = len(weights)
    found = []
    for number in {1} if read is None else {min(2**i, count) for i in range(count.bit_length() + 1)}:
        groups = _grouped(used, size, -(-count // number))
        largest = max(float(size[list(adapters)].sum()) for adapters in groups.adapters)
        tokens = work.prompt + work.rows * work.steps
        # Every group is padded to the largest. Each pass reads the factors of all groups, and multiplies every token.
        cost = largest * ((read or 0.0) * len(groups.adapters) * (1 + work.steps) + tokens)
        if number == 1 or largest * len(groups.adapters) <= room:
            found.append((cost, len(groups.adapters), groups))
    return min(found, key=lambda entry: entry[:2])[2]


def _grouped(used: Tensor, size: Tensor, m: int) -> Groups:
    """Groups of m rows: each begins with the first row that is left, and takes the rows that add least to it."""
    left = torch.ones(len(used), dtype=torch.bool)
    rows, adapters = [], []
    while left.any():
        members = [int(left.nonzero()[0])]
        left[members] = False
        union = used[members[0]].clone()
        while len(members) < m and left.any():
            added = ((used & ~union) * size).sum(dim=1)
            best = int(torch.where(left, added, torch.inf).argmin())
            members.append(best)
            left[best] = False
            union |= used[best]
        rows.append(members + [-1] * (m - len(members)))
        adapters.append(tuple(union.nonzero()[:, 0].tolist()))
    return Groups(torch.tensor(rows), tuple(adapters))


class GroupedMixture:
    """The mixtures of a batch in groups, which forward hooks add.

    Args:
        groups: the rows of each group.
        weights: (rows, adapters).

    A batch dimension that is a multiple of `rows` (beam search, several return sequences) repeats every row that many
    times.
    """

    def __init__(self, groups: Groups, weights: Tensor) -> None:
        self.weights = weights
        flat = groups.rows.flatten()
        self._shape = groups.rows.shape  # (n, m)
        self._order = flat.clamp_min(0)
        self._place = torch.empty(len(weights), dtype=torch.int64)
        self._place[flat[flat >= 0]] = (flat >= 0).nonzero()[:, 0]
        self._in_order = flat.tolist() == list(range(len(weights)))
        self._present = (flat >= 0).view(*self._shape, 1)
        self._gates: dict[tuple[int, torch.device, torch.dtype], Gate] = {}
        self._moved: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def low_rank(self, x: Tensor, stack: GroupedStack) -> Tensor:
        """`B (g ⊙ (A x))` for `x` (batch, ..., d_in) -> (batch, ..., d_out), in the stack's dtype. For an embedding,
        `x` is tokens (batch, ...).

        Raises:
            ValueError: the batch size is no multiple of the number of rows.
        """
        rows, (n, m) = len(self.weights), self._shape
        if len(x) % rows:
            raise ValueError(f"gates for {rows} rows cannot serve a batch of {len(x)} rows")
        tokens = not x.is_floating_point()
        lead = x.shape if tokens else x.shape[:-1]
        each = lead.numel() // rows
        x = (x if tokens else x.to(stack.dtype)).reshape(rows, each, -1)
        if not self._in_order:
            x = x[self._indices(x.device)[0]]
        x = x.view(n, m * each, -1)
        keep = each == 1  # decoding reads the same factors in many passes, a prompt in one
        A = stack.A(keep)
        if tokens:
            picked = x.transpose(1, 2).expand(-1, A.shape[1], -1)
            shrunk = A.gather(2, picked).transpose(1, 2)
        elif m * each <= kind_of(x.device).turned_group:
            shrunk = torch.bmm(A, x.transpose(1, 2)).transpose(1, 2)  # (n, m * each, R)
        else:
            shrunk = torch.bmm(x, A.transpose(1, 2))
        gated = gated_product(shrunk.reshape(n, m, each, -1), self._gate(stack, A))
        result = torch.bmm(gated.view(n, m * each, -1), stack.B(keep))  # (n, m * each, d_out)
        if not self._in_order:
            result = result.view(n * m, each, -1)[self._indices(x.device)[1]]
        return result.view(*lead, -1)

    def _gate(self, stack: GroupedStack, like: Tensor) -> Gate:
        """(n, m, 1, R), cached by the owner tensor, which modules with the same adapters share."""
        key = (id(stack.owner), like.device, like.dtype)
        if key not in self._gates:
            owner = stack.owner.cpu()
            nobody = self.weights.new_zeros(len(self.weights), 1)
            weights = torch.cat([self.weights, nobody], dim=1)[self._order].view(*self._shape, -1)
            picked = weights.gather(2, owner[:, None].expand(-1, self._shape[1], -1))
            gate = torch.where(self._present, picked, torch.zeros(()))
            gate = gate.to(like.dtype)[:, :, None]
            closed = None if gate.all() else (gate == 0).to(like.device)
            self._gates[key] = gate.to(like.device), closed
        return self._gates[key]

    def _indices(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._moved:
            self._moved[device] = self._order.to(device), self._place.to(device)
        return self._moved[device]
