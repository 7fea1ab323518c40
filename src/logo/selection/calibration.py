"""Calibration: the responses of every adapter to neutral texts and requests, which the base model reads once.

    candidates -> measure (what is not cached) -> choose points -> Calibration -> whitenings

One forward pass of the base model per group of layers serves every adapter. The responses of each adapter are cached,
so that the calibration of another pool of known adapters takes no pass at all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch
from torch import Tensor, nn

from logo.adapters.adapter import Adapter
from logo.adapters.layout import linear_shape
from logo.selection.cache import CalibrationCache
from logo.selection.emphasis import emphasised
from logo.selection.index import ScoringIndex, Wanted, read_indices
from logo.selection.points import Point
from logo.selection.probe import Probe
from logo.selection.reference import choose, contrast, finished
from logo.selection.settings import SelectionSettings
from logo.selection.signals import Signal
from logo.selection.texts import Texts
from logo.selection.whitening import Whitening

# Fewer points than allowed are read if they agree with all that are allowed at least this well.
ENOUGH = 0.985
# Bytes of hidden vectors that are held at once; the rest is read in further passes, each up to its own last layer.
_HELD_BYTES = 2**30
_BATCH = 16


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
        measured: the number of adapters whose responses were not cached.
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
    model: nn.Module,
    adapters: Sequence[Adapter],
    candidates: Sequence[Point],
    most: int,
    settings: SelectionSettings,
    cache: CalibrationCache,
    run_texts: TextRunner | None = None,
) -> Calibration:
    """Calibrates adapters, with cached responses where there are any, and chooses the points to read.

    Args:
        model: the base model, with no adapter active.
        adapters: those that are scored, in pool order.
        candidates: the points that may be read.
        most: how many of them are chosen at most; 0: all of them are read.
        settings: name the signal.
        cache: holds the texts and the responses; new ones are stored there.
        run_texts: runs the base model; None: `model` itself runs.
    """
    started, texts = time.perf_counter(), cache.texts
    known = {adapter.name: cache.responses(adapter) for adapter in adapters}
    missing = {p: [a for a in adapters if p.module in a.modules and p.module not in known[a.name]] for p in candidates}
    measured = measure(model, {point: some for point, some in missing.items() if some}, settings, cache, run_texts)
    for adapter in adapters:
        if adapter.name in measured:
            known[adapter.name] |= measured[adapter.name]
            cache.keep_responses(adapter, known[adapter.name])
    nothing = torch.full((settings.reading.readings, len(texts.rows)), torch.nan)
    responses = torch.stack(
        [torch.stack([known[a.name].get(p.module, nothing) for p in candidates], dim=1) for a in adapters]
    )  # (adapters, readings of a point, candidates, texts)
    even = responses[:, 0]
    neutral, requests = even[:, :, : len(texts.neutral)], even[:, :, len(texts.neutral) :]
    chosen = choose(neutral, requests, most, ENOUGH) if most else list(range(len(candidates)))
    points = tuple(candidates[i] for i in chosen)

    read = responses[:, :, chosen].flatten(1, 2)
    ranking: tuple[tuple[Point, float], ...] = ()
    if most:
        values = contrast(neutral, requests).tolist()
        ranking = tuple(sorted(zip(candidates, values, strict=True), key=lambda entry: -entry[1]))
    of_neutral, of_requests = read[:, :, : len(texts.neutral)], read[:, :, len(texts.neutral) :]
    norms, seconds = cache.weight_norms(model, points), time.perf_counter() - started
    return Calibration(points, ranking, of_neutral, of_requests, norms, len(measured), seconds)


def whitenings(
    model: nn.Module,
    points: Sequence[Point],
    settings: SelectionSettings,
    cache: CalibrationCache,
    run_texts: TextRunner | None = None,
) -> dict[str, Whitening]:
    """Module path -> the whitening of its input, cached or computed now; empty if the signal does not whiten."""
    if settings.reading.scale != "whitened":
        return {}
    found = {point.module: cache.whitening(point.module) for point in points}
    measure(model, {point: [] for point in points if found[point.module] is None}, settings, cache, run_texts)
    found = {module: known or cache.whitening(module) for module, known in found.items()}
    return {module: whitening for module, whitening in found.items() if whitening is not None}


def measure(
    model: nn.Module,
    wanted: Mapping[Point, Sequence[Adapter]],
    settings: SelectionSettings,
    cache: CalibrationCache,
    run_texts: TextRunner | None = None,
) -> dict[str, dict[str, Tensor]]:
    """Runs the texts through the base model and scores these adapters at these points.

    Args:
        model: the base model, with no adapter active.
        wanted: point -> adapters to score there; none: only the whitening is needed.
        settings: name the signal.
        cache: holds the texts and the whitenings; new whitenings are stored there.
        run_texts: as in `calibrate`.

    Returns:
        adapter name -> module of the point -> `a` (readings, texts), neutral ones first.
    """
    measured: dict[str, dict[str, Tensor]] = {}
    if run_texts is None:
        run_texts = partial(read_texts, model)
    for points in _groups(model, list(wanted), sum(map(len, cache.texts.rows))):
        part = {point: wanted[point] for point in points}
        for index, responses in _measured(run_texts, part, settings.reading, cache):
            for adapter, response in zip(index.adapters, responses.permute(2, 0, 1), strict=True):
                measured.setdefault(adapter.name, {})[index.point.module] = response.clone()
    return measured


def _measured(
    run_texts: TextRunner,
    wanted: Mapping[Point, Sequence[Adapter]],
    signal: Signal,
    cache: CalibrationCache,
) -> Iterator[tuple[ScoringIndex, Tensor]]:
    """Yields each index at these points and its `a` (readings, texts, adapters); vectors of all points are held."""
    texts = cache.texts
    read = dict(zip(wanted, run_texts(list(wanted), texts, signal), strict=True))
    latest: tuple[Tensor, Whitening] | None = None  # points of one layer may read the same tensor
    asked = []
    for point, vectors in read.items():
        whitening = None
        if signal.scale == "whitened":
            whitening = cache.whitening(point.module)
            if whitening is None:
                if latest is None or latest[0] is not vectors.hidden:
                    latest = vectors.hidden, _whitening(vectors, len(texts.neutral)).to(torch.device("cpu"))
                whitening = latest[1]
                cache.keep_whitening(point.module, whitening)
            latest = vectors.hidden, whitening
        if wanted[point]:
            asked.append(Wanted(wanted[point], point, vectors.hidden.device, whitening))
    for index in _indices(asked):
        hidden, owners = read[index.point].responding
        values = signal(index, hidden)
        means = [emphasised(values, owners, len(texts.rows), late) for late in range(signal.readings)]
        yield index, finished(torch.stack(means), signal.scale).cpu()


def _whitening(vectors: HiddenVectors, neutral: int) -> Whitening:
    """The whitening of neutral texts; if adapters act on the last tokens only, that of these tokens in all texts."""
    hidden = vectors.hidden
    if vectors.acted is None:
        return Whitening.of(hidden[(vectors.owners < neutral).to(hidden.device)])
    return Whitening.of_some(hidden, vectors.acted.to(hidden.device))


def _indices(wanted: Sequence[Wanted]) -> Iterator[ScoringIndex]:
    """Yields the indices, read in as few passes over the adapters as memory allows."""
    part: list[Wanted] = []
    size = 0
    for one in wanted:
        rows, width = one.shape
        if part and size + 4 * rows * width > _HELD_BYTES:
            yield from read_indices(part)
            part, size = [], 0
        part.append(one)
        size += 4 * rows * width
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
    tail = signal.token == "tail"
    probe = Probe(model, points, signal.input, "each" if tail else signal.token)
    acting = Probe(model, (), signal.input, "tail", signal.activations) if tail else None
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    rows = texts.rows
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    parts: list[list[Tensor]] = []
    owners, acted = [], []
    for start in range(0, len(order), _BATCH):
        batch = order[start : start + _BATCH]
        ids, mask = _pad([rows[i] for i in batch], device)
        parts.append(probe(ids, mask))
        owners.append(torch.tensor(batch)[probe.owners(ids, mask)])
        if acting is not None:
            acted.append(acting.among(probe, ids, mask))
    owner, some = torch.cat(owners), torch.cat(acted) if acted else None
    joined: dict[int, Tensor] = {}
    for i, first in enumerate(parts[0]):
        if id(first) not in joined:
            joined[id(first)] = torch.cat([part[i] for part in parts])
        yield HiddenVectors(joined[id(first)], owner, some)


def _pad(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(rows, length) ids and mask, padded on the right."""
    length = max(map(len, rows))
    ids = torch.tensor([[*row, *[row[-1]] * (length - len(row))] for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device=device)
    return ids, mask
