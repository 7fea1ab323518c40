"""`plan`: the points of a model that a signal reads, and the adapters of a pool that can be scored there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from logo.adapters.adapter import Adapter
from logo.adapters.layout import linear_shape
from logo.adapters.pool import AdapterPool
from logo.errors import ModelError, PoolError, listed
from logo.selection.points import LEAST_POINTS, Point, decoder_layers, last_query, points_of, residual_points
from logo.selection.settings import SelectionSettings
from logo.selection.signals import Signal

# How far a probe runs for responses, as a share of the layers, if the prompt is read again under its mixture.
_DEPTH = 0.5
# Behind which shares of the layers prompts are described, to be compared with example prompts.
_DESCRIBED = (1 / 3, 1 / 2, 5 / 6, 1)
# How many points a signal chooses at most: as many as an index of this size has room for, within these bounds. In deep
# models, twelve points miss what tells near relatives apart (docs/how-selection-works.md).
_INDEX_BYTES = 256e6
_FEWEST_POINTS = 12
_MOST_POINTS = 48


@dataclass(frozen=True)
class Plan:
    """What a signal reads and scores.

    Attributes:
        points: the points that are read; or, if `most` is not 0, candidates for them.
        most: how many of the points are chosen at most; 0: all are read.
        adapters: those that are scored, in pool order.
    """

    points: tuple[Point, ...]
    most: int
    adapters: tuple[Adapter, ...]


def plan(model: nn.Module, pool: AdapterPool, settings: SelectionSettings, signal: str | None = None) -> Plan:
    """The plan of a signal (None: the settings' own) for a pool that is fitted to the model.

    Raises:
        ModelError: there is no such point in the model, or it cannot be read as the signal asks.
        PoolError: adapters that do not touch what is probed, unless `settings.unscorable` is `"skip"`.
    """
    pool_signal = settings.signal_for(pool, signal)
    most = 0
    if pool_signal.layers == "last":
        points: tuple[Point, ...] = (last_query(model),)
    else:
        points, depth = _early_points(model, pool, pool_signal)
        # If the whole model runs anyway, every point is read.
        if pool_signal.chosen and not pool_signal.activations:
            points = _candidates(points, depth, pool)
            most = _most_points(points, pool)
    modules = {point.module for point in points}
    adapters = tuple(adapter for adapter in pool if not modules.isdisjoint(adapter.modules))
    if len(adapters) < len(pool) and (settings.unscorable == "error" or not adapters):
        raise _not_scorable(pool, modules, pool_signal)
    if pool_signal.input == "residual":
        _check_width(model, points)
    return Plan(points, most, adapters)


def described_points(model: nn.Module, settings: SelectionSettings, signal: Signal) -> tuple[Point, ...]:
    """Where prompts are described, if adapters have example prompts; () if the signal or the settings use none."""
    if signal.scale != "whitened" or settings.examples != "use":
        return ()
    return residual_points(model, _DESCRIBED)


def _early_points(model: nn.Module, pool: AdapterPool, pool_signal: Signal) -> tuple[tuple[Point, ...], int]:
    """The points that adapters touch up to where the probe stops, and the number of layers up to there."""
    layers = len(decoder_layers(model)[1])
    depth = layers if pool_signal.activations else max(1, math.floor(_DEPTH * layers))
    points = points_of(model, {module for adapter in pool for module in adapter.modules}, depth)
    if not points:
        where = f"the first {depth} of {layers} layers, where the probe stops"
        raise PoolError(f"no adapter touches a module in {where}; use the signal 'norm'")
    return points, depth


def _candidates(points: Sequence[Point], depth: int, pool: AdapterPool) -> tuple[Point, ...]:
    """The points among which a signal chooses: hidden vectors of the first layers say little more than which words a
    prompt has, so these layers are read only for adapters that touch few later points."""
    modules = {point.module for point in points}
    late = {point.module for point in points if point.layer >= math.ceil(depth / 4)}
    candidates = set(late)
    for adapter in pool:
        own = modules.intersection(adapter.modules)
        if len(own & late) < min(LEAST_POINTS, len(own)):
            candidates |= own
    return tuple(point for point in points if point.module in candidates)


def _most_points(points: Sequence[Point], pool: AdapterPool) -> int:
    """How many of these points are chosen at most."""
    touched = [adapter.modules[point.module] for adapter in pool for point in points if point.module in adapter.modules]
    bytes_per_point = sum(4 * module.rank * module.in_features for module in touched) / len(points)
    return max(_FEWEST_POINTS, min(_MOST_POINTS, int(_INDEX_BYTES / bytes_per_point)))


def _not_scorable(pool: AdapterPool, modules: set[str], pool_signal: Signal) -> PoolError:
    """The error of a pool with adapters that touch none of the probed modules."""
    lacking = [adapter.name for adapter in pool if modules.isdisjoint(adapter.modules)]
    where = f"any of {len(modules)} probed modules"
    if len(modules) <= 4:
        where = f"the probed module {', '.join(sorted(modules))}"
    way = "prompts are read up to the middle layers:"
    if pool_signal.layers == "last":
        way = "use the signal 'calibrated', which reads the modules that adapters touch, or"
    return PoolError(
        f"{len(lacking)} of {len(pool)} adapters do not touch {where} and cannot be scored: {listed(lacking, 5)}; "
        f"{way} leave them out (Python: unscorable='skip')"
    )


def _check_width(model: nn.Module, points: Sequence[Point]) -> None:
    """Raises ModelError if the module of a point does not take vectors as wide as the residual stream."""
    width = model.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
    for point in points:
        shape = linear_shape(model.get_submodule(point.module))
        if shape is not None and shape.in_features != width:
            raise ModelError(
                f"{point.module} takes {shape.in_features} features, the residual stream that the signal reads has "
                f"{width}; use the signal 'calibrated'"
            )
