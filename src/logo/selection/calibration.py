"""Calibration: the responses of every adapter to neutral texts and requests, which the base model reads once.

    candidates -> measure (what is not stored) -> choose points -> Calibration -> whitenings

One forward pass of the base model per group of layers serves every adapter. What is measured is stored under digests of
what it depends on, so that the calibration of another pool of known adapters takes no pass at all:

    <cache>/calibration/<base model, texts and reading>/<adapter>.safetensors     `a` per point, neutral texts first
    <cache>/calibration/<base model, texts and reading>/whitening/<module>.safetensors
    <cache>/calibration/<base model, texts and reading>/rows/<adapter>.safetensors     those in indices, whitened
    <cache>/calibration/<base model, texts and reading>/weights.safetensors     `‖W‖_F` of the base model per point
    <cache>/calibration/<base model, texts and reading>/described/<texts>.safetensors     descriptions
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from logo.adapters.activation import earliest
from logo.adapters.adapter import Adapter
from logo.adapters.layout import linear_shape
from logo.errors import ModelError, NotFinite
from logo.files import Store
from logo.identity import base_digest
from logo.models import tensor_of
from logo.selection.index import IndexRequest, ScoringIndex, read_indices
from logo.selection.plan import Plan
from logo.selection.points import Point
from logo.selection.probe import Probe
from logo.selection.reference import FADING, both_means, choose, contrast, emphasis, finished
from logo.selection.signals import Signal
from logo.selection.texts import Texts
from logo.selection.whitening import SHRINKAGE, SKETCHED, Whitening

_T = TypeVar("_T")

# Fewer points than allowed are read if they agree with all that are allowed at least this well.
ENOUGH = 0.985
# Bytes of hidden vectors that are held at once; the rest is read in further passes, each up to its own last layer.
_HELD_BYTES = 2**30
_BATCH = 16
_CPU = torch.device("cpu")
# To be raised when the content of the stored files changes its meaning.
_FORMAT = 7
# Types whose values are the weights themselves; quantised weights have scales somewhere else.
_PLAIN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class HiddenVectors:
    """The hidden vectors of all texts at one point; points that read the same vectors are given one tensor.

    Attributes:
        hidden: (vectors, d) of all tokens that are read, including those before adapters act.
        owners: (vectors,) int64 on the CPU: the text that each belongs to.
        acted: (vectors,) bool on the CPU: those to which adapters respond; None: all of them.
    """

    hidden: Tensor
    owners: Tensor
    acted: Tensor | None = None

    @property
    def responding(self) -> tuple[Tensor, Tensor]:
        """The vectors to which adapters respond, and their owners."""
        if self.acted is None:
            return self.hidden, self.owners
        return self.hidden[self.acted.to(self.hidden.device)], self.owners[self.acted]


# Runs texts through the base model and yields its hidden vectors at each point.
TextRunner = Callable[[Sequence[Point], Texts, Signal], Iterator[HiddenVectors]]


@dataclass(frozen=True)
class Reading:
    """What the base model (or a skeleton of it), with no adapter active, reads for a calibration. The key names what is
    in the store, by a digest of the base model, the texts and the reading."""

    model: nn.Module
    signal: Signal
    texts: Texts
    store: Store
    key: str

    @classmethod
    def of(cls, model: nn.Module, signal: Signal, texts: Texts, store: Store) -> Reading:
        """The reading with its key."""
        function = getattr(signal.score, "__name__", "")
        read: list[Any] = [signal.input, signal.token, signal.scale, function, signal.readings, signal.window]
        if signal.plugin is not None:  # of a fused projection, one layer's query or all rows are read
            read += [signal.plugin, signal.layers]
        if signal.token == "tail":  # where adapters act in these texts; see `logo.adapters.activation.earliest`
            read += [[list(activation.tokens), activation.last] for activation in signal.activations]
        rows = [[list(row) for row in part] for part in (texts.neutral, texts.requests)]
        content = json.dumps([_FORMAT, SHRINKAGE, SKETCHED, FADING, read, rows, base_digest(model)])
        key = f"calibration/{hashlib.sha256(content.encode()).hexdigest()[:24]}"
        return cls(model, signal, texts, store, key)

    def whitening(self, point: Point) -> Whitening | None:
        """The whitening of the input of a point's module; None if there is none yet."""
        tensors = self.store.get(f"{self.key}/whitening/{point.module}", hold=False)
        return Whitening(**tensors) if set(tensors) == {"mean", "basis", "gain"} else None

    def keep_whitening(self, point: Point, whitening: Whitening) -> None:
        """Stores the whitening of the input of a point's module."""
        self.store.put(f"{self.key}/whitening/{point.module}", vars(whitening), hold=False)


@dataclass(frozen=True)
class Calibration:
    """The responses of a pool's adapters to neutral texts and requests at the points that are read, in model order.

    Attributes:
        ranking: every candidate with its contrast, best first; empty if all points are read.
        neutral: `a` (adapters, readings, neutral texts): the even readings of all points, then the late ones if the
            signal has them; NaN if an adapter does not touch a point.
        requests: `a` of the requests likewise, of which there may be none.
        endings: the number of the ending (`Signal.endings`) behind which each adapter acts; all texts are behind the
            first one first, and so on. Empty: there is one ending.
        ending_count: how many endings there are.
        weight_norms: `‖W‖_F` of the base model at each point; NaN where it is not known.
        measured: the number of adapters whose responses were not stored.
    """

    points: tuple[Point, ...]
    ranking: tuple[tuple[Point, float], ...]
    neutral: Tensor
    requests: Tensor
    weight_norms: tuple[float, ...]
    measured: int
    seconds: float
    endings: tuple[int, ...] = ()
    ending_count: int = 1

    @property
    def reference_texts(self) -> tuple[Tensor, Tensor]:
        """`neutral` and `requests`, of which each adapter has the texts that end as the prompts do on which it acts."""
        if self.ending_count == 1:
            return self.neutral, self.requests
        return self._behind_own(self.neutral), self._behind_own(self.requests)

    def _behind_own(self, responses: Tensor) -> Tensor:
        """Responses (adapters, readings, texts) of each adapter to the texts with its ending alone."""
        by_ending = responses.reshape(*responses.shape[:2], self.ending_count, -1)
        return torch.stack([by_ending[adapter, :, ending] for adapter, ending in enumerate(self.endings)])


def calibrate(reading: Reading, plan: Plan, run: TextRunner) -> Calibration:
    """Calibrates the adapters of a plan, with stored responses where there are any, and chooses the points to read."""
    started = time.perf_counter()
    responses, measured = _responses(reading, plan, run)
    count = len(reading.texts.neutral)
    chosen = list(range(len(plan.points)))
    ranking: list[tuple[Point, float]] = []
    if plan.most:
        even = responses[:, 0]
        chosen = sorted(choose(even[..., :count], even[..., count:], plan.most, ENOUGH))
        contrasts = contrast(even[..., :count], even[..., count:]).tolist()
        ranking = sorted(zip(plan.points, contrasts, strict=True), key=lambda entry: -entry[1])
    points = tuple(plan.points[number] for number in chosen)
    read = responses[:, :, chosen].flatten(1, 2)
    return Calibration(
        points=points,
        ranking=tuple(ranking),
        neutral=read[..., :count],
        requests=read[..., count:],
        weight_norms=_weight_norms(reading, points),
        measured=measured,
        seconds=time.perf_counter() - started,
    )


def _responses(reading: Reading, plan: Plan, run: TextRunner) -> tuple[Tensor, int]:
    """`a` (adapters, readings of a point, points of the plan, texts), neutral texts first, NaN where an adapter does
    not touch a point; and the number of adapters that were measured, since not all of theirs was stored."""
    store = reading.store
    files = {adapter.name: f"{reading.key}/{adapter.digest}" for adapter in plan.adapters}
    by_module = {name: dict(store.get(file)) for name, file in files.items()}
    missing: dict[Point, list[Adapter]] = {}
    for point in plan.points:
        for adapter in plan.adapters:
            if point.module in adapter.modules and point.module not in by_module[adapter.name]:
                missing.setdefault(point, []).append(adapter)
    measured = _measure(reading, missing, run)
    for name, new in measured.items():
        by_module[name] |= new
        store.put(files[name], by_module[name])
    untouched = torch.full((reading.signal.readings, len(reading.texts.rows)), torch.nan, dtype=torch.float32)
    responses = [
        torch.stack([by_module[adapter.name].get(point.module, untouched) for point in plan.points], dim=1)
        for adapter in plan.adapters
    ]
    return torch.stack(responses), len(measured)


def whitenings(reading: Reading, points: Sequence[Point], run: TextRunner) -> dict[str, Whitening]:
    """Module of a point -> the whitening of its input, stored or computed now; empty if the signal does not whiten."""
    if reading.signal.scale != "whitened":
        return {}
    _measure(reading, {point: [] for point in points if reading.whitening(point) is None}, run)
    spaces = {point.module: reading.whitening(point) for point in points}
    return {module: space for module, space in spaces.items() if space is not None}


def _measure(
    reading: Reading, missing: Mapping[Point, Sequence[Adapter]], run: TextRunner
) -> dict[str, dict[str, Tensor]]:
    """Scores adapters at the points where their responses are missing (none: only the whitening is, which is stored);
    returns adapter name -> module of the point -> `a` (readings, texts), neutral ones first."""
    measured: dict[str, dict[str, Tensor]] = {}
    tokens = sum(map(len, reading.texts.rows))

    def size(layer: Sequence[Point]) -> int:
        """Bytes of the hidden vectors of a layer."""
        shapes = [linear_shape(reading.model.get_submodule(point.module)) for point in layer]
        return 4 * tokens * sum(shape.in_features for shape in shapes if shape is not None)

    # Whole layers, of which as many are read in one pass as their hidden vectors have room.
    by_layer = groupby(sorted(missing, key=lambda point: point.layer), key=lambda point: point.layer)
    for layers in portions([list(points) for _, points in by_layer], size, _HELD_BYTES):
        points = [point for layer in layers for point in layer]
        vectors = dict(zip(points, read_finite(run, points, reading.texts, reading.signal), strict=True))
        spaces = _whitened_now(reading, vectors)
        requests = [
            IndexRequest(missing[point], point, vectors[point].hidden.device, spaces.get(point))
            for point in points
            if missing[point]
        ]
        # In as few passes over the adapters as memory allows.
        for part in portions(requests, lambda request: request.bytes, _HELD_BYTES):
            for index in read_indices(part):
                responses = _mean_responses(reading, index, vectors[index.point])
                for adapter, response in zip(index.adapters, responses.permute(2, 1, 0), strict=True):
                    measured.setdefault(adapter.name, {})[index.point.module] = response.clone()
    return measured


def _whitened_now(reading: Reading, vectors: Mapping[Point, HiddenVectors]) -> dict[Point, Whitening]:
    """The whitenings of points, of which new ones are stored; points that read one tensor share theirs."""
    if reading.signal.scale != "whitened":
        return {}
    spaces: dict[Point, Whitening] = {}
    shared: dict[int, Whitening] = {}  # by tensor
    for point, own in vectors.items():
        space = reading.whitening(point)
        if space is None:
            space = shared.get(id(own.hidden)) or _whitening(own, len(reading.texts.neutral))
            reading.keep_whitening(point, space)
        spaces[point] = shared[id(own.hidden)] = space
    return spaces


def _mean_responses(reading: Reading, index: ScoringIndex, vectors: HiddenVectors) -> Tensor:
    """`a` (texts, readings, adapters) of the adapters in an index, on the CPU."""
    hidden, owners = vectors.responding
    responses = reading.signal(index, hidden)
    means = both_means(responses, owners, *emphasis(owners, len(reading.texts.rows)))
    return finished(means[:, : reading.signal.readings], reading.signal.scale).cpu()


def portions(items: Iterable[_T], size: Callable[[_T], float], most: float) -> Iterator[list[_T]]:
    """Neighbours in portions whose sizes sum to `most` at most, or of one item."""
    part: list[_T] = []
    held = 0.0
    for item in items:
        share = size(item)
        if part and held + share > most:
            yield part
            part = []
            held = 0.0
        part.append(item)
        held += share
    if part:
        yield part


def _whitening(vectors: HiddenVectors, neutral: int) -> Whitening:
    """The whitening of neutral texts; if adapters act on the last tokens only, that of these tokens in all texts."""
    device = vectors.hidden.device
    if vectors.acted is None:
        return Whitening.of(vectors.hidden[(vectors.owners < neutral).to(device)]).to(_CPU)
    return Whitening.of_some(vectors.hidden, vectors.acted.to(device)).to(_CPU)


def read_finite(run: TextRunner, points: Sequence[Point], texts: Texts, signal: Signal) -> Iterator[HiddenVectors]:
    """What a runner reads at points; NotFinite if hidden vectors overflow there: no adapter would respond."""
    for point, vectors in zip(points, run(points, texts, signal), strict=True):
        if not bool(vectors.hidden.isfinite().all()):
            raise NotFinite(
                f"the base model's hidden vectors overflow at {point.name} on a calibration text or example prompt; "
                "load it as bfloat16 or float32 (--dtype)"
            )
        yield vectors


def read_texts(model: nn.Module, points: Sequence[Point], texts: Texts, signal: Signal) -> Iterator[HiddenVectors]:
    """The `TextRunner` of a model in this process."""
    probe = Probe(model, points, signal.input)
    rows = texts.rows
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
    batches = [order[start : start + _BATCH] for start in range(0, len(order), _BATCH)]
    parts = [_read_batch(probe, [rows[number] for number in batch], signal) for batch in batches]
    whole: dict[int, HiddenVectors] = {}  # by the tensor of the first batch, which points may share
    for of_point in zip(*parts, strict=True):
        first = of_point[0]
        if id(first.hidden) not in whole:
            owners = [torch.tensor(batch)[part.owners] for batch, part in zip(batches, of_point, strict=True)]
            acted = [part.acted for part in of_point if part.acted is not None]
            hidden = torch.cat([part.hidden for part in of_point])
            whole[id(first.hidden)] = HiddenVectors(hidden, torch.cat(owners), torch.cat(acted) if acted else None)
        yield whole[id(first.hidden)]


def _read_batch(probe: Probe, rows: Sequence[Sequence[int]], signal: Signal) -> list[HiddenVectors]:
    """What is read of a batch of texts, whose numbers in it are the owners, at each point."""
    begins = list(map(signal.begin_of_text, rows))
    hidden, owners = probe.read(rows, begins)
    acted = None
    if signal.token == "tail":
        first_acted = torch.tensor([earliest(signal.activations, row) for row in rows])
        positions = torch.cat([torch.arange(begin, len(row)) for begin, row in zip(begins, rows, strict=True)])
        acted = positions >= first_acted[owners]
    return [HiddenVectors(vectors, owners, acted) for vectors in hidden]


def _weight_norms(reading: Reading, points: Sequence[Point]) -> tuple[float, ...]:
    """`‖W‖_F` of the base model at each point, stored or measured now; NaN where it is not known."""
    file = f"{reading.key}/weights"
    stored = dict(reading.store.get(file))
    new = {point.module: weight_norm(reading.model, point) for point in points if point.module not in stored}
    finite = {module: torch.tensor(norm, dtype=torch.float64) for module, norm in new.items() if math.isfinite(norm)}
    if finite:
        stored |= finite
        reading.store.put(file, stored)
    return tuple(float(stored.get(point.module, math.nan)) for point in points)


def weight_norm(model: nn.Module, point: Point) -> float:
    """`‖W‖_F` of the base model (or of a skeleton, see `logo.vllm.skeleton`) at a point; NaN if its weights
    are quantised or not at hand."""
    module = model.get_submodule(point.module)
    shape = linear_shape(module)
    weight: Any = getattr(module, "weight", None)
    # Quantised weights have types of their own, or integers.
    if shape is None or type(weight) not in (nn.Parameter, Tensor):
        return math.nan
    if getattr(weight, "stored", weight.dtype) not in _PLAIN:
        return math.nan
    if weight.is_meta:
        try:
            weight = tensor_of(model, f"{point.module}.weight")
        except ModelError:  # kept by another library than accelerate
            return math.nan
    transposed = type(module).__name__ == "Conv1D"
    expected = (shape.out_features, shape.in_features)
    if weight.shape != (expected[::-1] if transposed else expected):
        return math.nan
    if point.rows is not None:
        weight = weight.index_select(int(transposed), torch.tensor(point.rows, device=weight.device))
    norm = float(torch.linalg.vector_norm(weight.detach(), dtype=torch.promote_types(weight.dtype, torch.float32)))
    return norm if 0 < norm < math.inf else math.nan
