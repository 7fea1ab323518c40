"""Calibration: the responses of every adapter to neutral texts and requests, which the base model reads once.

    candidates -> measure (what is not stored) -> choose points -> Calibration -> whitenings

One forward pass of the base model per group of layers serves every adapter. What is measured is stored under digests of
what it depends on, so that the calibration of another pool of known adapters takes no pass at all:

    <cache>/calibration/<base model, texts and reading>/<adapter>.safetensors     `a` per point, neutral texts first
    <cache>/calibration/<base model, texts and reading>/whitening/<module>.safetensors
    <cache>/calibration/<base model, texts and reading>/weights.safetensors     `‖W‖_F` of the base model per point
    <cache>/calibration/<base model, texts and reading>/described/<texts>.safetensors     descriptions, or their mean
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from logo.adapters.activation import ERROR, OFF, earliest
from logo.adapters.digests import adapter_key
from logo.adapters.format import Adapter
from logo.adapters.layout import linear_shape
from logo.errors import ModelError
from logo.files import read_cached, write_cached
from logo.models import stored, tensor_of
from logo.selection.index import ScoringIndex, Wanted, read_indices
from logo.selection.points import Plan, Point
from logo.selection.probe import Probe, padded, pick
from logo.selection.reference import FADING, choose, contrast, emphasised, finished, row_means
from logo.selection.signals import Signal
from logo.selection.texts import Texts
from logo.selection.whitening import SHRINKAGE, SKETCHED, Whitening

# Fewer points than allowed are read if they agree with all that are allowed at least this well.
ENOUGH = 0.985
# Bytes of hidden vectors that are held at once; the rest is read in further passes, each up to its own last layer.
_HELD_BYTES = 2**30
_BATCH = 16
# To be raised when the content of the stored files changes its meaning.
_FORMAT = 5
_SAMPLED = 64
# Types whose values are the weights themselves; quantised weights have scales somewhere else.
_PLAIN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Store:
    """Tensors by name, in the cache folder and in memory.

    Small ones are held in memory while a pool uses them, so that adapters can be added after files of others are gone;
    and whatever the folder does not take, so that nothing is computed twice. What is missing or damaged in the folder
    is computed again.

    Args:
        folder: the cache folder; None: in memory only.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._held: dict[str, dict[str, Tensor]] = {}
        self._used: set[str] = set()
        self._written: set[str] = set()

    def get(self, name: str, shape: tuple[int, ...] | None = None, *, hold: bool = True) -> dict[str, Tensor]:
        """The tensors of this name; empty if there are none.

        Args:
            shape: of every one of them, in float32; others count as damaged.
            hold: whether to hold them in memory.
        """
        self._used.add(name)
        if name in self._held or self._folder is None:
            return self._held.get(name, {})

        def read(file: Path) -> dict[str, Tensor]:
            tensors: dict[str, Tensor] = load_file(file)
            for key, tensor in tensors.items():
                if shape is not None and (tensor.shape != shape or tensor.dtype != torch.float32):
                    found = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
                    raise ValueError(f"{key!r}: expected float32 of shape {shape}, found {found}")
            return tensors

        tensors = read_cached(self._folder / f"{name}.safetensors", read) or {}
        if tensors and hold:
            self._held[name] = tensors
            self._written.add(name)
        return tensors

    def put(self, name: str, tensors: Mapping[str, Tensor], *, hold: bool = True) -> None:
        """Stores all tensors of a name."""
        self._used.add(name)
        given, file = {key: tensor.contiguous() for key, tensor in tensors.items()}, f"{name}.safetensors"
        data = b"" if self._folder is None else save(given)
        if self._folder is not None and write_cached(self._folder, file, data):
            self._written.add(name)
            if not hold:
                return
        self._held[name] = given

    def release(self, key: str) -> None:
        """Frees the memory of what is below a key, was not used since the last call, and is in the folder."""
        below = {name for name in (*self._held, *self._used) if name.startswith(f"{key}/")}
        for name in below & self._held.keys() & self._written - self._used:
            del self._held[name]
        self._used -= below


@dataclass(frozen=True)
class HiddenVectors:
    """The hidden vectors of all texts at one point; points that read the same vectors are given one tensor.

    Attributes:
        hidden: (vectors, d) of all tokens that are read, including those before adapters act.
        owners: (vectors,) int64 on the CPU: the text that each belongs to.
        acted: (vectors,) bool on the CPU: the vectors to which adapters respond; None: all of them.
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
class Calibration:
    """The responses of a pool's adapters to neutral texts and requests at the points that are read.

    Attributes:
        points: where prompts are read, best first.
        ranking: every candidate with its contrast, best first; empty if all points are read.
        neutral: `a` (adapters, readings, neutral texts): the even readings of all points, then the late ones if the
            signal has them; NaN if an adapter does not touch a point.
        requests: `a` of the requests likewise; of no requests if the signal uses neutral texts only.
        weight_norms: `‖W‖_F` of the base model at each point; NaN where it is not known.
        measured: the number of adapters whose responses were not stored.
        seconds: duration of the calibration.
    """

    points: tuple[Point, ...]
    ranking: tuple[tuple[Point, float], ...]
    neutral: Tensor
    requests: Tensor
    weight_norms: tuple[float, ...]
    measured: int
    seconds: float


def calibrate(
    model: nn.Module, plan: Plan, signal: Signal, texts: Texts, store: Store, key: str, run: TextRunner
) -> Calibration:
    """Calibrates adapters, with stored responses where there are any, and chooses the points to read.

    Args:
        model: the base model, with no adapter active; or a skeleton of it.
        plan: the adapters that are scored, and the points that may be read.
        signal: how they are read.
        texts: what is read, cut to the signal's window.
        store: where responses and whitenings are.
        key: of this base model, these texts and this reading; see `key_of`.
        run: runs the base model.
    """
    started, readings, count = time.perf_counter(), signal.readings, len(texts.neutral)
    shape, candidates = (readings, len(texts.rows)), plan.points
    files = {adapter.name: f"{key}/{adapter_key(adapter)}" for adapter in plan.adapters}
    known = {name: dict(store.get(file, shape)) for name, file in files.items()}
    missing = {
        point: [a for a in plan.adapters if point.module in a.modules and point.module not in known[a.name]]
        for point in candidates
    }
    measured = _measure(model, {point: some for point, some in missing.items() if some}, signal, texts, store, key, run)
    for name, responses in measured.items():
        known[name] |= responses
        store.put(files[name], known[name])
    nothing = torch.full(shape, torch.nan)
    responses = torch.stack(
        [torch.stack([known[a.name].get(p.module, nothing) for p in candidates], dim=1) for a in plan.adapters]
    )  # (adapters, readings of a point, candidates, texts)
    neutral, requests = responses[:, 0, :, :count], responses[:, 0, :, count:]
    chosen = choose(neutral, requests, plan.most, ENOUGH) if plan.most else list(range(len(candidates)))
    points, read = tuple(candidates[i] for i in chosen), responses[:, :, chosen].flatten(1, 2)
    ranking: list[tuple[Point, float]] = []
    if plan.most:
        values = contrast(neutral, requests).tolist()
        ranking = sorted(zip(candidates, values, strict=True), key=lambda entry: -entry[1])
    norms, seconds = _weight_norms(model, points, store, key), time.perf_counter() - started
    return Calibration(points, tuple(ranking), read[..., :count], read[..., count:], norms, len(measured), seconds)


def whitenings(
    model: nn.Module, points: Sequence[Point], signal: Signal, texts: Texts, store: Store, key: str, run: TextRunner
) -> dict[str, Whitening]:
    """Module of a point -> the whitening of its input, stored or computed now; empty if the signal does not whiten.
    Arguments as `calibrate`."""
    if signal.scale != "whitened":
        return {}
    unknown = [point for point in points if _whitening_at(point, store, key) is None]
    _measure(model, {point: [] for point in unknown}, signal, texts, store, key, run)
    found = {point.module: _whitening_at(point, store, key) for point in points}
    return {module: whitening for module, whitening in found.items() if whitening is not None}


def key_of(model: nn.Module, texts: Texts, signal: Signal) -> str:
    """The name under which a calibration is stored: a digest of the base model, the texts and the reading."""
    config: Any = model.config
    settings = {k: v for k, v in config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    name = getattr(signal.score, "__name__", "")
    reading: list[Any] = [signal.input, signal.token, signal.scale, name, signal.readings, signal.window]
    if signal.plugin is not None:  # of a fused projection, one layer's query or all rows are read
        reading += [signal.plugin, signal.layers]
    if signal.token == "tail":  # where adapters act in these texts; see `logo.adapters.activation.earliest`
        reading += [[list(a.tokens), a.last, *({a.without} - {OFF, ERROR})] for a in signal.activations]
    rows = [[list(row) for row in part] for part in (texts.neutral, texts.requests)]
    parts = [_FORMAT, SHRINKAGE, SKETCHED, FADING, reading, rows, settings]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode())
    for name, tensor in stored(model):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        # A skeleton of a model has its weights elsewhere, and holds a sample of them.
        sample = getattr(tensor, "sample", None) if hasattr(tensor, "read") else sampled(tensor_of(model, name))
        if sample is not None:
            digest.update(sample.numpy().tobytes())
    digest.update(getattr(model, "others", b""))
    return f"calibration/{digest.hexdigest()[:24]}"


def sampled(tensor: Tensor) -> Tensor:
    """A sample of a tensor, float32 on the CPU: reading a large model whole takes longer than calibrating."""
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, len(flat) // _SAMPLED)][:_SAMPLED].to("cpu", torch.float32)


def _whitening_at(point: Point, store: Store, key: str) -> Whitening | None:
    tensors = store.get(f"{key}/whitening/{point.module}", hold=False)
    return Whitening(**tensors) if set(tensors) == {"mean", "basis", "gain"} else None


def _measure(
    model: nn.Module,
    wanted: Mapping[Point, Sequence[Adapter]],
    signal: Signal,
    texts: Texts,
    store: Store,
    key: str,
    run: TextRunner,
) -> dict[str, dict[str, Tensor]]:
    """Runs the texts through the base model and scores adapters at points; whitenings of these points are stored.

    Args:
        wanted: point -> adapters to score there; none: only the whitening is needed.

    Returns:
        adapter name -> module of the point -> `a` (readings, texts), neutral ones first.
    """
    measured: dict[str, dict[str, Tensor]] = {}
    for points in _groups(model, list(wanted), sum(map(len, texts.rows))):
        read = dict(zip(points, run(points, texts, signal), strict=True))
        latest: tuple[Tensor, Whitening] | None = None  # points of one layer may read the same tensor
        asked = []
        for point, vectors in read.items():
            whitening = None
            if signal.scale == "whitened":
                whitening = _whitening_at(point, store, key)
                if whitening is None:
                    if latest is None or latest[0] is not vectors.hidden:
                        latest = vectors.hidden, _whitening(vectors, len(texts.neutral)).to(torch.device("cpu"))
                    whitening = latest[1]
                    store.put(f"{key}/whitening/{point.module}", vars(whitening), hold=False)
                latest = vectors.hidden, whitening
            if wanted[point]:
                asked.append(Wanted(wanted[point], point, vectors.hidden.device, whitening))
        for index in _indices(asked):
            hidden, owners = read[index.point].responding
            values = signal(index, hidden)
            means = [emphasised(values, owners, len(texts.rows), late) for late in range(signal.readings)]
            found = finished(torch.stack(means), signal.scale).cpu()  # (readings, texts, adapters)
            for adapter, response in zip(index.adapters, found.permute(2, 0, 1), strict=True):
                measured.setdefault(adapter.name, {})[index.point.module] = response.clone()
    return measured


def _whitening(vectors: HiddenVectors, neutral: int) -> Whitening:
    """The whitening of neutral texts; if adapters act on the last tokens only, that of these tokens in all texts."""
    hidden = vectors.hidden
    if vectors.acted is None:
        return Whitening.of(hidden[(vectors.owners < neutral).to(hidden.device)])
    return Whitening.of_some(hidden, vectors.acted.to(hidden.device))


def _indices(wanted: Sequence[Wanted]) -> Iterator[ScoringIndex]:
    """Yields the indices, read in as few passes over the adapters as memory allows."""
    part: list[Wanted] = []
    for one in wanted:
        if part and sum(other.bytes for other in part) + one.bytes > _HELD_BYTES:
            yield from read_indices(part)
            part = []
        part.append(one)
    yield from read_indices(part)


def _groups(model: nn.Module, points: Sequence[Point], tokens: int) -> Iterator[list[Point]]:
    """Yields points by layer, in groups of whole layers whose hidden vectors fit into memory together."""
    group: list[Point] = []
    size = 0
    for _, layer in groupby(sorted(points, key=lambda point: point.layer), key=lambda point: point.layer):
        part = list(layer)
        shapes = [linear_shape(model.get_submodule(point.module)) for point in part]
        bytes_needed = sum(4 * tokens * shape.in_features for shape in shapes if shape is not None)
        if group and size + bytes_needed > _HELD_BYTES:
            yield group
            group, size = [], 0
        group += part
        size += bytes_needed
    if group:
        yield group


def read_texts(model: nn.Module, points: Sequence[Point], texts: Texts, signal: Signal) -> Iterator[HiddenVectors]:
    """The `TextRunner` of a model in this process."""
    probe, rows, tail = Probe(model, points, signal.input), texts.rows, signal.token == "tail"
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    parts: list[list[Tensor]] = []
    owners, acted = [], []
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


def _weight_norms(model: nn.Module, points: Sequence[Point], store: Store, key: str) -> tuple[float, ...]:
    """`‖W‖_F` of the base model at each point, stored or measured now; NaN where it is not known."""
    known = store.get(f"{key}/weights")
    missing = [point for point in points if point.module not in known]
    norms = {point.module: weight_norm(model, point) for point in missing}
    finite = {module: torch.tensor(norm, dtype=torch.float64) for module, norm in norms.items() if math.isfinite(norm)}
    if finite:
        store.put(f"{key}/weights", {**known, **finite})
    norms |= {module: float(norm) for module, norm in known.items()}
    return tuple(norms[point.module] for point in points)


def weight_norm(model: nn.Module, point: Point) -> float:
    """`‖W‖_F` of the base model at a point; NaN if its weights are quantised or not at hand.

    Args:
        model: loaded, where accelerate may keep its weights elsewhere; or a skeleton, see
            `logo.backends.vllm.skeleton`.
    """
    module = model.get_submodule(point.module)
    weight, shape = getattr(module, "weight", None), linear_shape(module)
    if weight is None or shape is None or type(weight) not in (nn.Parameter, Tensor):  # the types of quantised ones
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
