"""Calibration: the responses of every adapter to neutral texts and requests, which the base model reads once.

    candidates -> measure (what is not stored) -> choose points -> Calibration -> whitenings

One forward pass of the base model per group of layers serves every adapter. What is measured is stored under digests of
what it depends on, so that the calibration of another pool of known adapters takes no pass at all:

    <cache>/calibration/<base model, texts and reading>/<adapter>.safetensors     `a` per point, neutral texts first
    <cache>/calibration/<base model, texts and reading>/whitening/<module>.safetensors
    <cache>/calibration/<base model, texts and reading>/rows/<adapter>.safetensors     those in indices, whitened
    <cache>/calibration/<base model, texts and reading>/weights.safetensors     `‖W‖_F` of the base model per point
    <cache>/calibration/<base model, texts and reading>/described/<texts>.safetensors     descriptions, or their mean
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
from logo.models import input_device, padded, tensor_of
from logo.selection.index import Wanted, read_indices
from logo.selection.points import Plan, Point
from logo.selection.probe import Probe, pick
from logo.selection.reference import FADING, both_means, choose, contrast, emphasis, finished, row_means
from logo.selection.signals import Signal
from logo.selection.texts import Texts
from logo.selection.whitening import SHRINKAGE, SKETCHED, Whitening

_T = TypeVar("_T")

# Fewer points than allowed are read if they agree with all that are allowed at least this well.
ENOUGH = 0.985
# Bytes of hidden vectors that are held at once; the rest is read in further passes, each up to its own last layer.
_HELD_BYTES = 2**30
_BATCH, _CPU = 16, torch.device("cpu")
# To be raised when the content of the stored files changes its meaning.
_FORMAT = 6
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
        name = getattr(signal.score, "__name__", "")
        how: list[Any] = [signal.input, signal.token, signal.scale, name, signal.readings, signal.window]
        if signal.plugin is not None:  # of a fused projection, one layer's query or all rows are read
            how += [signal.plugin, signal.layers]
        if signal.token == "tail":  # where adapters act in these texts; see `logo.adapters.activation.earliest`
            how += [[list(a.tokens), a.last] for a in signal.activations]
        rows = [[list(row) for row in part] for part in (texts.neutral, texts.requests)]
        parts = json.dumps([_FORMAT, SHRINKAGE, SKETCHED, FADING, how, rows, base_digest(model)])
        key = f"calibration/{hashlib.sha256(parts.encode()).hexdigest()[:24]}"
        return cls(model, signal, texts, store, key)

    def whitening(self, point: Point) -> Whitening | None:
        """The whitening of the input of a point's module; None if there is none yet."""
        tensors = self.store.get(f"{self.key}/whitening/{point.module}", hold=False)
        return Whitening(**tensors) if set(tensors) == {"mean", "basis", "gain"} else None


@dataclass(frozen=True)
class Calibration:
    """The responses of a pool's adapters to neutral texts and requests at the points that are read, in model order.

    Attributes:
        ranking: every candidate with its contrast, best first; empty if all points are read.
        neutral: `a` (adapters, readings, neutral texts): the even readings of all points, then the late ones if the
            signal has them; NaN if an adapter does not touch a point.
        requests: `a` of the requests likewise, of which there may be none.
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


def calibrate(reading: Reading, plan: Plan, run: TextRunner) -> Calibration:
    """Calibrates the adapters of a plan, with stored responses where there are any, and chooses the points to read."""
    started, store, neutral_count = time.perf_counter(), reading.store, len(reading.texts.neutral)
    shape, candidates = (reading.signal.readings, len(reading.texts.rows)), plan.points
    files = {adapter.name: f"{reading.key}/{adapter.digest}" for adapter in plan.adapters}
    known = {name: dict(store.get(file)) for name, file in files.items()}
    missing = {
        point: [a for a in plan.adapters if point.module in a.modules and point.module not in known[a.name]]
        for point in candidates
    }
    measured = _measure(reading, {point: some for point, some in missing.items() if some}, run)
    for name, found in measured.items():
        known[name] |= found
        store.put(files[name], known[name])
    nothing = torch.full(shape, torch.nan, dtype=torch.float32)
    responses = torch.stack(
        [torch.stack([known[a.name].get(p.module, nothing) for p in candidates], dim=1) for a in plan.adapters]
    )  # (adapters, readings of a point, candidates, texts)
    chosen: list[int] = list(range(len(candidates)))
    ranking: list[tuple[Point, float]] = []
    if plan.most:
        neutral, requests = responses[:, 0, :, :neutral_count], responses[:, 0, :, neutral_count:]
        chosen = sorted(choose(neutral, requests, plan.most, ENOUGH))
        values = contrast(neutral, requests).tolist()
        ranking = sorted(zip(candidates, values, strict=True), key=lambda entry: -entry[1])
    points, read = tuple(candidates[i] for i in chosen), responses[:, :, chosen].flatten(1, 2)
    norms, seconds = _weight_norms(reading, points), time.perf_counter() - started
    parts = read[..., :neutral_count], read[..., neutral_count:]
    return Calibration(points, tuple(ranking), *parts, norms, len(measured), seconds)


def whitenings(reading: Reading, points: Sequence[Point], run: TextRunner) -> dict[str, Whitening]:
    """Module of a point -> the whitening of its input, stored or computed now; empty if the signal does not whiten."""
    if reading.signal.scale != "whitened":
        return {}
    _measure(reading, {point: [] for point in points if reading.whitening(point) is None}, run)
    return {point.module: found for point in points if (found := reading.whitening(point)) is not None}


def _measure(
    reading: Reading, wanted: Mapping[Point, Sequence[Adapter]], run: TextRunner
) -> dict[str, dict[str, Tensor]]:
    """Scores adapters at the points where they are wanted (none: only the whitening, which is stored); returns adapter
    name -> module of the point -> `a` (readings, texts), neutral ones first."""
    measured: dict[str, dict[str, Tensor]] = {}
    signal, rows = reading.signal, reading.texts.rows
    tokens = sum(map(len, rows))

    def size(layer: Sequence[Point]) -> int:
        shapes = [linear_shape(reading.model.get_submodule(point.module)) for point in layer]
        return 4 * tokens * sum(shape.in_features for shape in shapes if shape is not None)

    # Whole layers, of which as many are read in one pass as their hidden vectors have room.
    by_layer = groupby(sorted(wanted, key=lambda point: point.layer), key=lambda point: point.layer)
    for group in portions([list(layer) for _, layer in by_layer], size, _HELD_BYTES):
        points = [point for layer in group for point in layer]
        read = dict(zip(points, read_finite(run, points, reading.texts, signal), strict=True))
        asked, shared = [], dict[int, Whitening]()  # by tensor, since points of one layer may read the same one
        for point, vectors in read.items():
            whitening = None
            if signal.scale == "whitened":
                whitening = reading.whitening(point)
                if whitening is None:
                    whitening = shared.get(id(vectors.hidden)) or _whitening(vectors, len(reading.texts.neutral))
                    reading.store.put(f"{reading.key}/whitening/{point.module}", vars(whitening), hold=False)
                shared[id(vectors.hidden)] = whitening
            if wanted[point]:
                asked.append(Wanted(wanted[point], point, vectors.hidden.device, whitening))
        # In as few passes over the adapters as memory allows.
        for part in portions(asked, lambda one: one.bytes, _HELD_BYTES):
            for index in read_indices(part):
                hidden, owners = read[index.point].responding
                values = signal(index, hidden)
                means = both_means(values, owners, *emphasis(owners, len(rows)))[:, : signal.readings]
                found = finished(means, signal.scale).cpu()  # (texts, readings, n)
                for adapter, response in zip(index.adapters, found.permute(2, 1, 0), strict=True):
                    measured.setdefault(adapter.name, {})[index.point.module] = response.clone()
    return measured


def portions(items: Iterable[_T], size: Callable[[_T], float], most: float) -> Iterator[list[_T]]:
    """Neighbours in portions whose sizes sum to `most` at most, or of one item."""
    part, held = list[_T](), 0.0
    for item in items:
        one = size(item)
        if part and held + one > most:
            yield part
            part, held = [], 0.0
        part.append(item)
        held += one
    if part:
        yield part


def _whitening(vectors: HiddenVectors, neutral: int) -> Whitening:
    """The whitening of neutral texts; if adapters act on the last tokens only, that of these tokens in all texts."""
    if vectors.acted is None:
        return Whitening.of(vectors.hidden[(vectors.owners < neutral).to(vectors.hidden.device)]).to(_CPU)
    return Whitening.of_some(vectors.hidden, vectors.acted.to(vectors.hidden.device)).to(_CPU)


def read_finite(run: TextRunner, points: Sequence[Point], texts: Texts, signal: Signal) -> Iterator[HiddenVectors]:
    """What a runner reads at points; NotFinite if hidden vectors overflow there: no adapter would respond."""
    for point, vectors in zip(points, run(points, texts, signal), strict=True):
        if not bool(vectors.hidden.isfinite().all()):
            found = f"the base model's hidden vectors overflow at {point.name} on a calibration text or example prompt"
            raise NotFinite(f"{found}; load it as bfloat16 or float32 (--dtype)")
        yield vectors


def read_texts(model: nn.Module, points: Sequence[Point], texts: Texts, signal: Signal) -> Iterator[HiddenVectors]:
    """The `TextRunner` of a model in this process."""
    probe, rows, tail = Probe(model, points, signal.input), texts.rows, signal.token == "tail"
    device = input_device(model)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    parts, owners, acted = list[list[Tensor]](), [], []
    for start in range(0, len(order), _BATCH):
        batch = [rows[i] for i in order[start : start + _BATCH]]
        ids, mask = padded(batch, device)
        begins = [int(len(row) > 1) if tail else signal.begin(row) for row in batch]
        picked, owner = pick(begins, list(map(len, batch)), ids.shape[1])
        hidden = probe(ids, mask, picked.to(device))
        if tail:
            acts = torch.tensor([earliest(signal.activations, row) for row in batch])
            acted.append(picked % ids.shape[1] >= acts[owner])
        if signal.token == "mean":
            means = {id(vectors): row_means(vectors, owner, len(batch)) for vectors in hidden}
            hidden = [means[id(vectors)] for vectors in hidden]
            owner = torch.arange(len(batch))
        parts.append(hidden)
        owners.append(torch.tensor(order[start : start + _BATCH])[owner])
    joined: dict[int, Tensor] = {}
    for i, first in enumerate(parts[0]):
        if id(first) not in joined:
            joined[id(first)] = torch.cat([part[i] for part in parts])
        yield HiddenVectors(joined[id(first)], torch.cat(owners), torch.cat(acted) if acted else None)


def _weight_norms(reading: Reading, points: Sequence[Point]) -> tuple[float, ...]:
    """`‖W‖_F` of the base model at each point, stored or measured now; NaN where it is not known."""
    name = f"{reading.key}/weights"
    known = reading.store.get(name)
    norms = {point.module: weight_norm(reading.model, point) for point in points if point.module not in known}
    finite = {module: torch.tensor(norm, dtype=torch.float64) for module, norm in norms.items() if math.isfinite(norm)}
    if finite:
        reading.store.put(name, {**known, **finite})
    return tuple(norms.get(point.module, float(known.get(point.module, math.nan))) for point in points)


def weight_norm(model: nn.Module, point: Point) -> float:
    """`‖W‖_F` of the base model (or of a skeleton, see `logo.vllm.skeleton`) at a point; NaN if its weights
    are quantised or not at hand."""
    module = model.get_submodule(point.module)
    weight, shape = getattr(module, "weight", None), linear_shape(module)
    plain = type(weight) in (nn.Parameter, Tensor)  # quantised ones have types of their own, or integers
    if weight is None or shape is None or not plain or getattr(weight, "stored", weight.dtype) not in _PLAIN:
        return math.nan
    if weight.is_meta:
        try:
            weight = tensor_of(model, f"{point.module}.weight")
        except ModelError:  # kept by another library than accelerate
            return math.nan
    expected, transposed = (shape.out_features, shape.in_features), type(module).__name__ == "Conv1D"
    if weight.shape != (expected[::-1] if transposed else expected):
        return math.nan
    if point.rows is not None:
        weight = weight.index_select(int(transposed), torch.tensor(point.rows, device=weight.device))
    norm = float(torch.linalg.vector_norm(weight.detach(), dtype=torch.promote_types(weight.dtype, torch.float32)))
    return norm if 0 < norm < math.inf else math.nan
