"""`ScoringIndex`: every adapter's response to a hidden vector at one point, in a few stacked products.

With `s_i B_i = Q_i R_i` (QR), `‖ΔW_i h‖ = ‖R_i A_i h‖`, so norms need an (r, d) factor per adapter and no vector of the
output's size. The factors of all adapters are in one matrix, so that a pool of any size takes one product. Whole
responses `ΔW_i h`, which need `B_i`, are computed in bounded chunks for the signals that use them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from logo.adapters.adapter import Adapter, LoraWeights
from logo.selection.points import Point
from logo.selection.whitening import Whitening

# Floats of one chunk of whole responses (64 MiB), which bounds memory for pools of any size.
_CHUNK = 16 * 2**20
# The least length of a hidden vector, to divide by.
_SHORTEST = 1e-6
# Progress is reported after so many adapters.
_TOLD = 1000

Tell = Callable[[int, int], None]  # (done, of how many)


class ScoringIndex:
    """All scorable adapters of a pool at one point.

    Args:
        stacked: (R, d) float32, the rows `R_i A_i` of all adapters, whitened where there is a whitening.
        ranks: rows per adapter.
        offset: (R,): the stacked response to the mean hidden vector, which is subtracted from every response; None: 0.
        sketch: of a whitening, its `Whitening.sketch` (m, d) and the sketch of the mean (m,).
        adapters: in pool order; they all touch the point.
        point: where.
        updates: (adapters,), `‖ΔW_i‖_F`; None: not known.
    """

    def __init__(
        self,
        stacked: Tensor,
        ranks: Sequence[int],
        offset: Tensor | None,
        adapters: Sequence[Adapter],
        point: Point,
        sketch: tuple[Tensor, Tensor] | None = None,
        updates: Tensor | None = None,
    ) -> None:
        self.stacked = stacked
        self.ranks = tuple(ranks)
        self.offset = offset
        self.adapters = tuple(adapters)
        self.point = point
        self.sketch = sketch
        self.updates = torch.full((len(ranks),), math.nan) if updates is None else updates

    @classmethod
    def read(
        cls, adapters: Sequence[Adapter], point: Point, device: torch.device, whitening: Whitening | None = None
    ) -> ScoringIndex:
        """The index of adapters that all touch the point; see `read_indices`."""
        [index] = read_indices([Wanted(adapters, point, device, whitening)])
        return index

    def __len__(self) -> int:
        return len(self.ranks)

    @property
    def device(self) -> torch.device:
        """The device on which scores are computed."""
        return self.stacked.device

    @cached_property
    def rows(self) -> list[slice]:
        """The rows of each adapter in `stacked`."""
        return _rows(self.ranks)

    @property
    def bytes(self) -> int:
        """Memory of the stacked factors and of everything that was computed from the adapters so far."""
        tensors = [self.stacked, *(() if self.offset is None else (self.offset,)), *(self.sketch or ())]
        tensors += [tensor for pair in self.__dict__.get("_pairs", ()) for tensor in pair]
        return sum(tensor.nbytes for tensor in tensors)

    def norms(self, hidden: Tensor) -> Tensor:
        """`‖ΔW_i h‖₂` for hidden (rows, d), or `‖ΔW_i W (h - μ)‖₂` with a whitening; (rows, adapters), float32."""
        hidden = hidden.to(self.device, torch.float32)
        size = max(1, _CHUNK // max(1, len(self.stacked)))
        return torch.cat([self._norms(part) for part in torch.split(hidden, size)])

    def relative(self, hidden: Tensor) -> Tensor:
        """`‖ΔW_i W (h - μ)‖₂ / √‖W (h - μ)‖₂`, for an index with a whitening; arguments as `norms`."""
        return self.norms(hidden) / self.units(hidden)[:, None]

    def units(self, hidden: Tensor) -> Tensor:
        """An estimate of `√‖W (h - μ)‖₂` for hidden (rows, d); (rows,), float32 on the index's device."""
        if self.sketch is None:
            raise RuntimeError(f"the index at {self.point.name} has no whitening")
        rows, offset = self.sketch
        squares = (hidden.to(self.device, torch.float32) @ rows.T - offset).square().sum(dim=1)
        return squares.sqrt().clamp_min(_SHORTEST).sqrt()

    def _norms(self, hidden: Tensor) -> Tensor:
        responses = self.stacked @ hidden.T  # (R, rows): CPU libraries are faster with the many rows on the left
        if self.offset is not None:
            responses -= self.offset[:, None]
        squares = responses.square_()
        if len(set(self.ranks)) == 1:
            return squares.view(len(self), -1, len(hidden)).sum(dim=1).sqrt_().T
        sums = torch.zeros(len(self), len(hidden), device=self.device)
        return sums.index_add_(0, self._owner, squares).sqrt_().T

    def responses(self, hidden: Tensor) -> Iterator[Tensor]:
        """`ΔW_i h` for hidden (rows, d), in pool order: chunks (rows, adapters of the chunk, out), float32."""
        hidden = hidden.to(self.device, torch.float32)
        if not len(self):
            return
        out = self._pairs[0][1].shape[0]
        size = max(1, _CHUNK // (len(hidden) * out))
        for start in range(0, len(self), size):
            part = self._pairs[start : start + size]
            yield torch.stack([(hidden @ a.T) @ b.T for a, b in part], dim=1)

    @cached_property
    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        """`A (r, d)` and `s B (out, r)` per adapter; they are read when a signal needs them."""
        module = self.point.module
        return [_factors(adapter.read([module])[module], self.point, self.device) for adapter in self.adapters]

    @cached_property
    def _owner(self) -> Tensor:
        """(R,): which adapter each row of `stacked` belongs to."""
        return torch.repeat_interleave(torch.arange(len(self)), torch.tensor(self.ranks)).to(self.device)


@dataclass(frozen=True)
class Wanted:
    """An index that is to be read.

    Attributes:
        adapters: in pool order; they all touch the point.
        point: where.
        device: where scores are computed.
        whitening: on the CPU; applied to hidden vectors before they are scored by their norm.
        before: an index of the same point and whitening, whose rows are reused for the adapters that it has.
    """

    adapters: Sequence[Adapter]
    point: Point
    device: torch.device
    whitening: Whitening | None = None
    before: ScoringIndex | None = None

    @cached_property
    def ranks(self) -> list[int]:
        """Rows per adapter."""
        return [_rank(adapter, self.point) for adapter in self.adapters]

    @property
    def shape(self) -> tuple[int, int]:
        """Of the stacked factors."""
        width = self.adapters[0].modules[self.point.module].in_features if self.adapters else 0
        return sum(self.ranks), width


def read_indices(wanted: Sequence[Wanted], tell: Tell | None = None) -> list[ScoringIndex]:
    """Reads the tensors of every adapter at these points, and makes an index of each point; files are opened once.

    Args:
        tell: called with the number of adapters that are done and of all, after every thousand.

    Raises:
        AdapterError: an adapter that cannot be read.
    """
    building = [_Building(one) for one in wanted]
    every = {adapter.name: adapter for one in wanted for adapter in one.adapters}.values()
    for done, adapter in enumerate(every, start=1):
        if tell is not None and (done % _TOLD == 0 or done == len(every) > _TOLD):
            tell(done, len(every))
        parts = [part for part in building if adapter.name in part.missing]
        if parts:
            weights = adapter.read([part.point.module for part in parts])
            for part in parts:
                part.add(adapter.name, weights[part.point.module])
    return [part.index() for part in building]


class _Building:
    """An index under construction, whose rows come one adapter at a time."""

    def __init__(self, wanted: Wanted) -> None:
        self.point, self._wanted, before = wanted.point, wanted, wanted.before
        self.missing: dict[str, int] = {}  # the places of adapters that have to be read
        files = list(map(_file, wanted.adapters))
        self._same = before is not None and files == list(map(_file, before.adapters))
        if self._same:
            return
        device = built_on(wanted.device)
        self._ranks = wanted.ranks
        self._stacked = torch.empty(wanted.shape, device=device)
        self._whitening = None if wanted.whitening is None else wanted.whitening.to(device)
        self._rows, self._updates = _rows(self._ranks), torch.empty(len(files), device=device)
        known = {} if before is None else {file: place for place, file in enumerate(map(_file, before.adapters))}
        for place, (adapter, file) in enumerate(zip(wanted.adapters, files, strict=True)):
            if before is not None and file in known:
                self._stacked[self._rows[place]] = before.stacked[before.rows[known[file]]].to(device)
                self._updates[place] = before.updates[known[file]]
            else:
                self.missing[adapter.name] = place

    def add(self, name: str, weights: LoraWeights) -> None:
        a, b = _factors(weights, self.point, self._stacked.device)
        product, place = torch.linalg.qr(b, mode="r").R @ a, self.missing[name]
        # A product of several adapters would make the last digits of one depend on the others.
        self._stacked[self._rows[place]] = product if self._whitening is None else self._whitening.fold(product)
        self._updates[place] = product.norm()

    def index(self) -> ScoringIndex:
        wanted = self._wanted
        if self._same and wanted.before is not None:
            return wanted.before
        offset = None if self._whitening is None else (self._stacked @ self._whitening.mean).to(wanted.device)
        sketch = None if wanted.whitening is None else sketched(wanted.whitening, wanted.device)
        stacked, updates = self._stacked.to(wanted.device), self._updates.to(wanted.device)
        return ScoringIndex(stacked, self._ranks, offset, wanted.adapters, wanted.point, sketch, updates)


def sketched(whitening: Whitening, device: torch.device) -> tuple[Tensor, Tensor]:
    """The `sketch` of an index."""
    rows = whitening.sketch()
    return rows.to(device), (rows @ whitening.mean).to(device)


def device_of(model: nn.Module, point: Point) -> torch.device:
    """The device of the hidden vectors of a point, and so of its index."""
    device = next(model.get_submodule(point.layer_path).parameters()).device
    return torch.device("cpu") if device.type == "meta" else device


def built_on(device: torch.device) -> torch.device:
    """Where an index for a device is made: on the CPU unless it is CUDA, as not every accelerator has QR."""
    return device if device.type == "cuda" else torch.device("cpu")


def _file(adapter: Adapter) -> int:
    """An id that stays the same when a pool is fitted again."""
    return id(adapter.file)


def _rows(ranks: Sequence[int]) -> list[slice]:
    ends = torch.tensor(ranks, dtype=torch.int64).cumsum(0).tolist()
    return [slice(end - rank, end) for end, rank in zip(ends, ranks, strict=True)]


def _rank(adapter: Adapter, point: Point) -> int:
    """Rows of `R_i`: the smaller side of `B_i`, or of the part of it that belongs to the point."""
    module = adapter.modules[point.module]
    return min(module.rank, module.out_features if point.rows is None else len(point.rows))


def _factors(weights: LoraWeights, point: Point, device: torch.device) -> tuple[Tensor, Tensor]:
    """`A (r, d)` and `s B (out, r)` in float32, on a device."""
    b = weights.B if point.rows is None else weights.B[list(point.rows)]
    return weights.A.to(device).float(), b.to(device).float() * weights.scaling
