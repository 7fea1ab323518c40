"""`ScoringIndex`: every adapter's response to a hidden vector at one point, in a few stacked products.

With `s_i B_i = Q_i R_i` (QR), `‖ΔW_i h‖ = ‖R_i A_i h‖`, so norms need an (r, d) factor per adapter and no vector of the
output's size. The factors of all adapters are in one matrix, so that a pool of any size takes one product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, groupby

import torch
from torch import Tensor

from logo.adapters.adapter import Adapter, LoraWeights
from logo.files import Store
from logo.selection.points import Point
from logo.selection.whitening import Whitening

# Floats of one chunk of whole responses (64 MiB), which bounds memory for pools of any size.
_CHUNK = 16 * 2**20
# The least length of a hidden vector, to divide by.
_SHORTEST = 1e-6
# Progress is reported after so many adapters.
_TOLD = 1000

Tell = Callable[[int, int], None]  # (done, of how many)


@dataclass(frozen=True, eq=False)
class ScoringIndex:
    """All scorable adapters of a pool at one point.

    Attributes:
        stacked: (R, d) float32, the rows `R_i A_i` of all adapters, whitened where there is a whitening.
        ranks: rows per adapter.
        offset: (R,): the stacked response to the mean hidden vector, which is subtracted from every response; None: 0.
        adapters: in pool order; they all touch the point.
        sketch: of a whitening, its `Whitening.sketch` (m, d) and the sketch of the mean (m,).
        updates: (adapters,), `‖ΔW_i‖_F`.
    """

    stacked: Tensor
    ranks: Sequence[int]
    offset: Tensor | None
    adapters: Sequence[Adapter]
    point: Point
    sketch: tuple[Tensor, Tensor] | None
    updates: Tensor

    def __len__(self) -> int:
        return len(self.ranks)

    @property
    def device(self) -> torch.device:
        """The device on which scores are computed."""
        return self.stacked.device

    @cached_property
    def rows(self) -> list[slice]:
        """The rows of each adapter in `stacked`."""
        return [slice(end - rank, end) for end, rank in zip(accumulate(self.ranks), self.ranks, strict=True)]

    def norms(self, hidden: Tensor) -> Tensor:
        """`‖ΔW_i h‖₂` for hidden (rows, d), or `‖ΔW_i W (h - μ)‖₂` with a whitening; (rows, adapters), float32."""
        hidden, size = hidden.to(self.stacked.device, torch.float32), max(1, _CHUNK // max(1, len(self.stacked)))
        parts = []
        for part in [hidden] if len(hidden) <= size else torch.split(hidden, size):
            responses = self.stacked @ part.T  # (R, rows): CPU libraries are faster with the many rows on the left
            if self.offset is not None:
                responses -= self.offset[:, None]
            squares = responses.square_()
            if self._owner is None:
                sums = squares.view(len(self.ranks), -1, len(part)).sum(dim=1)
            else:
                sums = squares.new_zeros(len(self), len(part)).index_add_(0, self._owner, squares)
            parts.append(sums.sqrt_().T)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def relative(self, hidden: Tensor) -> Tensor:
        """`‖ΔW_i W (h - μ)‖₂ / √‖W (h - μ)‖₂`, the length estimated by the sketch; arguments as `norms`."""
        if self.sketch is None:
            raise RuntimeError(f"the index at {self.point.name} has no whitening")
        rows, offset = self.sketch
        squares = (hidden.to(self.stacked.device, torch.float32) @ rows.T - offset).square().sum(dim=1)
        return self.norms(hidden) / squares.sqrt().clamp_min(_SHORTEST).sqrt()[:, None]

    def responses(self, hidden: Tensor) -> Iterator[Tensor]:
        """`ΔW_i h` for hidden (rows, d), in pool order: chunks (rows, adapters of the chunk, out), float32."""
        hidden = hidden.to(self.device, torch.float32)
        size = max(1, _CHUNK // (len(hidden) * self._pairs[0][1].shape[0]))
        for start in range(0, len(self), size):
            part = self._pairs[start : start + size]
            yield torch.stack([(hidden @ a.T) @ b.T for a, b in part], dim=1)

    @cached_property
    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        """`A (r, d)` and `s B (out, r)` per adapter; they are read when a signal needs them."""
        module = self.point.module
        return [_factors(adapter.read([module])[module], self.point, self.device) for adapter in self.adapters]

    @cached_property
    def _owner(self) -> Tensor | None:
        """(R,): which adapter each row of `stacked` belongs to; None: all have the same number of rows."""
        if len(set(self.ranks)) == 1:
            return None
        return torch.repeat_interleave(torch.arange(len(self)), torch.tensor(self.ranks)).to(self.device)


@dataclass(frozen=True)
class Wanted:
    """An index that is to be read, of adapters in pool order that touch the point, for scores on a device.

    Attributes:
        whitening: on the CPU; applied to hidden vectors before they are scored by their norm.
        before: an index of the same point and whitening, whose rows are reused for the adapters that it has.
    """

    adapters: Sequence[Adapter]
    point: Point
    device: torch.device
    whitening: Whitening | None = None
    before: ScoringIndex | None = None

    @property
    def ranks(self) -> list[int]:
        """Rows per adapter: the smaller side of the part of `B_i` that belongs to the point."""
        shapes, rows = [adapter.modules[self.point.module] for adapter in self.adapters], self.point.rows
        return [min(shape.rank, shape.out_features if rows is None else len(rows)) for shape in shapes]

    @property
    def bytes(self) -> int:
        """Memory of the stacked factors."""
        return 4 * sum(self.ranks) * self.adapters[0].modules[self.point.module].in_features

    def begun(self) -> tuple[ScoringIndex, dict[str, int], Whitening | None]:
        """The index with the rows that are known, the positions of the adapters that have to be read, and the whitening
        where their rows are computed."""
        adapters, before, whitening, sketch = self.adapters, self.before, self.whitening, None
        if whitening is not None:
            rows = whitening.sketch()
            sketch = rows.to(self.device), (rows @ whitening.mean).to(self.device)
            whitening = whitening.to(_with_qr(self.device))
        width, ranks = adapters[0].modules[self.point.module].in_features, self.ranks
        stacked = torch.empty(sum(ranks), width, dtype=torch.float32, device=self.device)
        updates = torch.empty(len(ranks), dtype=torch.float32, device=self.device)
        index = ScoringIndex(stacked, ranks, None, adapters, self.point, sketch, updates)
        # A file is an object that stands for one content: a file that was replaced is opened anew.
        known = {} if before is None else {adapter.file: at for at, adapter in enumerate(before.adapters)}
        missing = {}
        for at, adapter in enumerate(adapters):
            if before is not None and adapter.file in known:
                updates[at] = before.updates[known[adapter.file]]
                stacked[index.rows[at]] = before.stacked[before.rows[known[adapter.file]]]
            else:
                missing[adapter.name] = at
        return index, missing, whitening


def read_indices(
    wanted: Sequence[Wanted], tell: Tell | None = None, store: Store | None = None, key: str = ""
) -> list[ScoringIndex]:
    """Reads the tensors of every adapter at these points, and makes an index of each point; files are opened once.

    Args:
        tell: called with the number of adapters that are done and of all.
        store: where the rows of adapters are kept, below a key that belongs to the whitenings; None: nowhere.

    Raises AdapterError: one cannot be read.
    """
    every = {adapter.name: adapter for one in wanted for adapter in one.adapters}
    begun = [one.begun() for one in wanted]
    for done, (name, adapter) in enumerate(every.items(), start=1):
        if tell is not None and (done % _TOLD == 0 or done == len(every) > _TOLD):
            tell(done, len(every))
        parts = [(index, missing[name], whitening) for index, missing, whitening in begun if name in missing]
        file = f"{key}/{adapter.digest}" if store and parts else ""
        kept = store.get(file, hold=None) if store and parts else {}
        new = [index.point.module for index, *_ in parts if index.point.module not in kept]
        weights = adapter.read(new) if new else {}
        for index, at, whitening in parts:
            module = index.point.module
            if module in weights:
                a, b = _factors(weights[module], index.point, _with_qr(index.device))
                product = torch.linalg.qr(b, mode="r").R @ a
                # A product of several adapters would make the last digits of one depend on the others.
                kept[module] = product if whitening is None else whitening.fold(product)
                kept[f"{module} size"] = product.norm()
            index.stacked[index.rows[at]], index.updates[at] = kept[module], kept[f"{module} size"]
        if store and new:
            store.put(file, {name: tensor.cpu() for name, tensor in kept.items()}, hold=None)
    return [
        index if whitening is None else replace(index, offset=index.stacked @ whitening.mean.to(index.device))
        for index, _, whitening in begun
    ]


def joined(indices: Sequence[ScoringIndex]) -> tuple[list[ScoringIndex], list[tuple[int, ScoringIndex]]]:
    """The same indices, where neighbours that read the same vectors (their whitenings are equal) are parts of one; and
    these, each with the number of its first point. They have no `responses`."""
    parts, every = list[ScoringIndex](), list[tuple[int, ScoringIndex]]()
    for _, group in groupby(
        indices, key=lambda at: (at.stacked.shape[1], (at.sketch and at.sketch[1].tolist()) or id(at))
    ):
        some = list(group)
        offsets, updates = [one.offset for one in some if one.offset is not None], [one.updates for one in some]
        stacked, offset = torch.cat([one.stacked for one in some]), torch.cat(offsets) if offsets else None
        ranks, adapters = [n for one in some for n in one.ranks], [one for index in some for one in index.adapters]
        whole = ScoringIndex(stacked, ranks, offset, adapters, some[0].point, some[0].sketch, torch.cat(updates))
        every.append((len(parts), whole))
        rows = torch.split(stacked, [len(one.stacked) for one in some])
        parts += [replace(one, stacked=own) for one, own in zip(some, rows, strict=True)]
    return parts, every


def _with_qr(device: torch.device) -> torch.device:
    """The device, or the CPU: not every accelerator has QR."""
    return device if device.type == "cuda" else torch.device("cpu")


def _factors(weights: LoraWeights, point: Point, device: torch.device) -> tuple[Tensor, Tensor]:
    """`A (r, d)` and `s B (out, r)` in float32, on a device."""
    b = weights.B if point.rows is None else weights.B[list(point.rows)]
    return weights.A.to(device).float(), b.to(device).float() * weights.scaling
