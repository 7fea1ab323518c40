"""From a pool to a calibration: which points come into question, what is known of them already, which are read.

`plan` says where the probe may read, `calibrate` listens to what the store does not know yet and chooses.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from logo.adapters.format import Adapter
from logo.adapters.pool import AdapterPool
from logo.errors import PoolError
from logo.selection.calibration import choose, contrast
from logo.selection.listening import Texts, candidates, listen
from logo.selection.points import Point, decoder_layers, find_points, named_points
from logo.selection.settings import SelectionSettings
from logo.selection.store import CalibrationStore
from logo.selection.whitening import Whitening

# Points that are read at most, and the agreement with them at which fewer are enough.
MOST_POINTS = 12
ENOUGH = 0.97


@dataclass(frozen=True)
class Plan:
    """Where the probe may read.

    Attributes:
        points: candidates, or the points themselves.
        count: how many of them may be chosen; 0: all of them are read.
        all_points: an adapter has to touch every point to be scored.
    """

    points: tuple[Point, ...]
    count: int
    all_points: bool


@dataclass(frozen=True)
class Calibrated:
    """A pool's calibration at the points that are read.

    Attributes:
        points: where prompts are read, best first.
        ranking: every candidate with its contrast, best first; empty where the points were given.
        neutral: `a` (adapters, points, neutral texts); NaN where an adapter does not touch a point.
        requests: the same of the requests; none of them where the signal listens to neutral texts only.
        whitenings: module path -> whitening; empty where the signal uses none.
        file: where the choice was written down.
        listened: how many adapters were not known yet.
        seconds: how long the calibration took.
    """

    points: tuple[Point, ...]
    ranking: tuple[tuple[Point, float], ...]
    neutral: Tensor
    requests: Tensor
    whitenings: dict[str, Whitening]
    file: Path | None
    listened: int
    seconds: float


def plan(model: nn.Module, pool: AdapterPool, settings: SelectionSettings) -> Plan:
    """The points that settings and signal ask for.

    Raises:
        UsageError, ModelError: a point that does not exist.
        PoolError: no adapter touches a module within the probe's depth.
    """
    signal = settings.reading
    wanted = settings.probe_points
    if wanted is not None and not isinstance(wanted, int):
        return Plan(named_points(model, wanted), 0, signal.scale == "raw")
    given = (settings.probe_layer, settings.probe_module) != (None, None)
    if given or signal.layers == "last":
        layer = "last" if settings.probe_layer is None else settings.probe_layer
        return Plan(find_points(model, layer, settings.probe_module), 0, signal.scale == "raw")
    path, layers = decoder_layers(model)
    depth = max(1, math.floor(settings.probe_depth * len(layers)))
    points = candidates(model, {i: f"{path}.{i}" for i in range(depth)}, list(pool))
    if not points:
        raise PoolError(
            f"no adapter touches a module in the first {depth} of {len(layers)} layers, which is how far the probe "
            "goes; let it go deeper (--probe-depth)"
        )
    count = (wanted or MOST_POINTS) if signal.chosen else 0
    return Plan(tuple(points), count, False)


def calibrate(
    model: nn.Module,
    adapters: Sequence[Adapter],
    planned: Plan,
    texts: Texts,
    settings: SelectionSettings,
    store: CalibrationStore,
) -> Calibrated:
    """Baselines of these adapters, from the store or by listening, and the points to read.

    Args:
        model: the base model, with no adapter active.
        adapters: those that are scored, in pool order.
        planned: where to read.
        texts: neutral texts, and requests for signals that listen to them.
        settings: for the signal.
        store: what is known already, and where what is new is put.
    """
    started = time.perf_counter()
    signal = settings.reading
    known = {adapter.name: store.responses(adapter) for adapter in adapters}
    missing = {
        point: [a for a in adapters if point.module in a.modules and point.module not in known[a.name]]
        for point in planned.points
    }
    heard = listen(model, {point: absent for point, absent in missing.items() if absent}, texts, signal, store)
    for adapter in adapters:
        if adapter.name in heard:
            known[adapter.name] |= heard[adapter.name]
            store.keep_responses(adapter, known[adapter.name])
    responses = _table(adapters, planned.points, known, len(texts.rows))
    neutral, requests = responses[:, :, : len(texts.neutral)], responses[:, :, len(texts.neutral) :]
    ranking: tuple[tuple[Point, float], ...] = ()
    chosen = list(range(len(planned.points)))
    if planned.count:
        chosen = choose(neutral, requests, planned.count, ENOUGH)
        values = contrast(neutral, requests).tolist()
        ranking = tuple(sorted(zip(planned.points, values, strict=True), key=lambda entry: -entry[1]))
    points = tuple(planned.points[i] for i in chosen)
    whitenings = _whitenings(model, points, texts, settings, store) if signal.scale == "whitened" else {}
    file = (
        store.keep_choice(adapters, _choice(points, ranking, adapters, settings, planned.count))
        if planned.count
        else None
    )
    listened = len(heard)
    seconds = time.perf_counter() - started
    return Calibrated(points, ranking, neutral[:, chosen], requests[:, chosen], whitenings, file, listened, seconds)


def _table(
    adapters: Sequence[Adapter], points: Sequence[Point], known: dict[str, dict[str, Tensor]], texts: int
) -> Tensor:
    """(adapters, points, texts), NaN where an adapter does not touch a point."""
    nothing = torch.full((texts,), torch.nan)
    return torch.stack([torch.stack([known[a.name].get(p.module, nothing) for p in points]) for a in adapters])


def _whitenings(
    model: nn.Module,
    points: Sequence[Point],
    texts: Texts,
    settings: SelectionSettings,
    store: CalibrationStore,
) -> dict[str, Whitening]:
    found = {point.module: store.whitening(point.module) for point in points}
    missing = [point for point in points if found[point.module] is None]
    listen(model, {point: [] for point in missing}, texts, settings.reading, store)
    found |= {point.module: store.whitening(point.module) for point in missing}
    return {module: whitening for module, whitening in found.items() if whitening is not None}


def _choice(
    points: Sequence[Point],
    ranking: Sequence[tuple[Point, float]],
    adapters: Sequence[Adapter],
    settings: SelectionSettings,
    most: int,
) -> dict[str, object]:
    """What is written down for people."""
    return {
        "signal": settings.signal,
        "probe_depth": settings.probe_depth,
        "most_points": most,
        "adapters": [adapter.name for adapter in adapters],
        "points": [point.name for point in points],
        "ranking": [{"point": point.name, "contrast": round(value, 4)} for point, value in ranking],
    }
