"""`ScoringIndex`: every adapter's response to a hidden vector at one point, in a few stacked products.

With `s_i B_i = Q_i R_i` (QR), `‖ΔW_i h‖ = ‖R_i A_i h‖`, so norms need an (r, d) factor per adapter and no vector of the
output's size. The factors of all adapters are in one matrix, so that a pool of any size takes one product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, groupby

import torch
from torch import Tensor

from logo.adapters.adapter import Adapter, LoraWeights
from logo.adapters.peft import WeightFile
from logo.files import Store
from logo.selection.points import Point
from logo.selection.whitening import Whitening

# Floats of one chunk of whole responses (64 MiB), which bounds memory for pools of any size.
_CHUNK = 16 * 2**20
# The least length of a hidden vector, to divide by.
_SHORTEST = 1e-6
# Progress is reported after so many adapters.
_REPORTED = 1000

Tell = Callable[[int, int], None]  # (done, of how many)


# `A (r, d)` and `s B (out, r)` of one adapter, float32.
Factors = tuple[Tensor, Tensor]


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
        factors: of those adapters whose whole responses were computed, by file; it grows when a signal needs them.
    """

    stacked: Tensor
    ranks: Sequence[int]
    offset: Tensor | None
    adapters: Sequence[Adapter]
    point: Point
    sketch: tuple[Tensor, Tensor] | None
    updates: Tensor
    factors: dict[WeightFile, Factors] = field(default_factory=dict)

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
        hidden = hidden.to(self.stacked.device, torch.float32)
        size = max(1, _CHUNK // max(1, len(self.stacked)))
        norms = []
        for part in [hidden] if len(hidden) <= size else torch.split(hidden, size):
            responses = self.stacked @ part.T  # (R, rows): CPU libraries are faster with the many rows on the left
            if self.offset is not None:
                responses -= self.offset[:, None]
            squares = responses.square_()
            if self._owner is None:
                sums = squares.view(len(self.ranks), -1, len(part)).sum(dim=1)
            else:
                sums = squares.new_zeros(len(self), len(part)).index_add_(0, self._owner, squares)
            norms.append(sums.sqrt_().T)
        return norms[0] if len(norms) == 1 else torch.cat(norms)

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
    def _pairs(self) -> list[Factors]:
        """The factors of every adapter; those that are not in `factors` are read."""
        module = self.point.module
        for adapter in self.adapters:
            if adapter.file not in self.factors:
                weights = adapter.read([module])[module]
                self.factors[adapter.file] = _factors(weights, self.point, self.device)
        return [self.factors[adapter.file] for adapter in self.adapters]

    @cached_property
    def _owner(self) -> Tensor | None:
        """(R,): which adapter each row of `stacked` belongs to; None: all have the same number of rows."""
        if len(set(self.ranks)) == 1:
            return None
        return torch.repeat_interleave(torch.arange(len(self)), torch.tensor(self.ranks)).to(self.device)


@dataclass(frozen=True)
class IndexRequest:
    """An index that is to be read, of adapters in pool order that touch the point, for scores on a device.

    Attributes:
        whitening: on the CPU; applied to hidden vectors before they are scored by their norm.
        before: an index of the same point and whitening, of which all is reused that it has of these adapters.
    """

    adapters: Sequence[Adapter]
    point: Point
    device: torch.device
    whitening: Whitening | None = None
    before: ScoringIndex | None = None

    @property
    def width(self) -> int:
        """The size of the hidden vectors."""
        return self.adapters[0].modules[self.point.module].in_features

    @property
    def ranks(self) -> list[int]:
        """Rows per adapter: the smaller side of the part of `B_i` that belongs to the point."""
        shapes = [adapter.modules[self.point.module] for adapter in self.adapters]
        rows = self.point.rows
        return [min(shape.rank, shape.out_features if rows is None else len(rows)) for shape in shapes]

    @property
    def bytes(self) -> int:
        """Memory of the stacked factors."""
        return 4 * sum(self.ranks) * self.width

    def begun(self) -> _BegunIndex:
        """The index with what is reused of the one before."""
        ranks = self.ranks
        stacked = torch.empty(sum(ranks), self.width, dtype=torch.float32, device=self.device)
        updates = torch.empty(len(ranks), dtype=torch.float32, device=self.device)
        whitening = self.whitening
        sketch = None
        if whitening is not None:
            rows = whitening.sketch()
            sketch = rows.to(self.device), (rows @ whitening.mean).to(self.device)
            whitening = whitening.to(_with_qr(self.device))
        index = ScoringIndex(stacked, ranks, None, self.adapters, self.point, sketch, updates)
        return _BegunIndex(index, self._reuse(index), whitening)

    def _reuse(self, index: ScoringIndex) -> dict[str, int]:
        """Copies what is known of adapters to their places in the index; returns the names and places of the others."""
        before = self.before
        if before is None:
            return {adapter.name: place for place, adapter in enumerate(self.adapters)}
        missing: dict[str, int] = {}
        # A file is an object that stands for one content: a file that was replaced is opened anew.
        earlier_places = {adapter.file: place for place, adapter in enumerate(before.adapters)}
        for place, adapter in enumerate(self.adapters):
            earlier_place = earlier_places.get(adapter.file)
            if earlier_place is None:
                missing[adapter.name] = place
                continue
            index.updates[place] = before.updates[earlier_place]
            index.stacked[index.rows[place]] = before.stacked[before.rows[earlier_place]]
            if adapter.file in before.factors and before.device == index.device:
                index.factors[adapter.file] = before.factors[adapter.file]
        return missing


@dataclass(frozen=True)
class _BegunIndex:
    """An index, of which the rows of some adapters are missing.

    Attributes:
        missing: name -> place in the index, of the adapters that have to be read.
        whitening: where rows are computed; None: there is none.
    """

    index: ScoringIndex
    missing: Mapping[str, int]
    whitening: Whitening | None

    def rows_of(self, weights: LoraWeights) -> tuple[Tensor, Tensor]:
        """`R_i A_i` (rows, d) of an adapter, whitened, and `‖ΔW_i‖_F`."""
        a, b = _factors(weights, self.index.point, _with_qr(self.index.device))
        # A product of several adapters would make the last digits of one depend on the others.
        product = torch.linalg.qr(b, mode="r").R @ a
        size = product.norm()
        return (product if self.whitening is None else self.whitening.fold(product)), size

    def whole(self) -> ScoringIndex:
        """The index, with its offset, once nothing is missing any more."""
        if self.whitening is None:
            return self.index
        return replace(self.index, offset=self.index.stacked @ self.whitening.mean.to(self.index.device))


def read_indices(
    requests: Sequence[IndexRequest], tell: Tell | None = None, store: Store | None = None, key: str = ""
) -> list[ScoringIndex]:
    """Reads the tensors of every adapter at these points, and makes an index of each point; files are opened once.

    Args:
        tell: called with the number of adapters that are done and of all.
        store: where the rows of adapters are kept, below a key that belongs to the whitenings; None: nowhere.

    Raises AdapterError: one cannot be read.
    """
    begun = [request.begun() for request in requests]
    adapters = {adapter.name: adapter for request in requests for adapter in request.adapters}
    for done, adapter in enumerate(adapters.values(), start=1):
        if tell is not None and (done % _REPORTED == 0 or done == len(adapters) > _REPORTED):
            tell(done, len(adapters))
        lacking = [index for index in begun if adapter.name in index.missing]
        if lacking:
            _read_rows(adapter, lacking, store, key)
    return [index.whole() for index in begun]


def _read_rows(adapter: Adapter, lacking: Sequence[_BegunIndex], store: Store | None, key: str) -> None:
    """Fills in the rows of an adapter in the indices that lack them, from the store or from its file."""
    file = "" if store is None else f"{key}/{adapter.digest}"
    tensors = {} if store is None else dict(store.get(file, hold=None))
    modules = [begun.index.point.module for begun in lacking]
    new = [module for module in modules if module not in tensors]
    weights = adapter.read(new) if new else {}
    for begun, module in zip(lacking, modules, strict=True):
        if module in weights:
            tensors[module], tensors[f"{module} size"] = begun.rows_of(weights[module])
        index = begun.index
        place = begun.missing[adapter.name]
        index.stacked[index.rows[place]] = tensors[module]
        index.updates[place] = tensors[f"{module} size"]
    if store is not None and new:
        store.put(file, {name: tensor.cpu() for name, tensor in tensors.items()}, hold=None)


@dataclass(frozen=True)
class PointGroup:
    """Neighbouring points that read the same hidden vectors, so that one product scores the adapters of all.

    Attributes:
        first: the number of the first of these points.
        index: of the adapters of the first point, then of the next one, and so on.
    """

    first: int
    index: ScoringIndex


def side_by_side(indices: Sequence[ScoringIndex]) -> tuple[list[ScoringIndex], list[PointGroup]]:
    """Stacks the indices of neighbours that read the same vectors. Returns the same indices, whose rows are parts of
    these stacks, and the groups of points; an index of several points has no `responses`."""
    parts: list[ScoringIndex] = []
    groups: list[PointGroup] = []
    for _, neighbours in groupby(indices, key=_vectors_read):
        members = list(neighbours)
        stacked = torch.cat([index.stacked for index in members])
        offsets = [index.offset for index in members if index.offset is not None]
        whole = ScoringIndex(
            stacked=stacked,
            ranks=[rank for index in members for rank in index.ranks],
            offset=torch.cat(offsets) if offsets else None,
            adapters=[adapter for index in members for adapter in index.adapters],
            point=members[0].point,
            sketch=members[0].sketch,
            updates=torch.cat([index.updates for index in members]),
        )
        groups.append(PointGroup(len(parts), whole))
        rows = torch.split(stacked, [len(index.stacked) for index in members])
        parts += [replace(index, stacked=own_rows) for index, own_rows in zip(members, rows, strict=True)]
    return parts, groups


def _vectors_read(index: ScoringIndex) -> tuple[object, ...]:
    """Equal for indices that read the same vectors: the whitenings of these have the same mean."""
    width = index.stacked.shape[1]
    return (width, id(index)) if index.sketch is None else (width, index.sketch[1].tolist())


def _with_qr(device: torch.device) -> torch.device:
    """The device, or the CPU: not every accelerator has QR."""
    return device if device.type == "cuda" else torch.device("cpu")


def _factors(weights: LoraWeights, point: Point, device: torch.device) -> Factors:
    """`A (r, d)` and `s B (out, r)` in float32, on a device."""
    b = weights.B if point.rows is None else weights.B[list(point.rows)]
    return weights.A.to(device).float(), b.to(device).float() * weights.scaling
