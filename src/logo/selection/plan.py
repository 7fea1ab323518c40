"""`plan`: the points at which a signal reads a model, and the adapters that can be scored there. No model is run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, replace

from torch import nn

from logo.adapters.adapter import Adapter
from logo.adapters.layout import linear_shape
from logo.adapters.pool import AdapterPool
from logo.errors import ModelError, PoolError, listed
from logo.selection.points import Point, decoder_layers, last_query, points_of
from logo.selection.reference import LEAST_POINTS
from logo.selection.settings import SelectionSettings

# How many points a signal chooses at most: as many as an index of this size has room for,
# within these bounds. Small pools can afford more, and where adapters touch many modules of a deep model, twelve points
# miss what tells near relatives apart (docs/how-selection-works.md).
_INDEX_BYTES = 256e6
_FEWEST_POINTS, _MOST_POINTS = 12, 48


@dataclass(frozen=True)
class Plan:
    """What is read, and what is scored.

    Attributes:
        points: the points that are read, or candidates for them.
        most: how many of the candidates are chosen at most; 0: all points are read.
        adapters: those that are scored, in pool order.
    """

    points: tuple[Point, ...]
    most: int
    adapters: tuple[Adapter, ...]


def with_activations(settings: SelectionSettings, pool: AdapterPool) -> SelectionSettings:
    """The settings with `activations` filled in, if no adapter of the pool acts everywhere."""
    return replace(settings, activations=pool.activations if pool.read_once else ())


def plan(model: nn.Module, pool: AdapterPool, settings: SelectionSettings) -> Plan:
    """The plan that settings ask for.

    Args:
        pool: adapters fitted to the model.

    Raises:
        ModelError: there is no such point in the model, or it cannot be read as the signal asks.
        PoolError: adapters that do not touch what is probed, unless `settings.unscorable` is `"skip"`.
    """
    settings = with_activations(settings, pool)
    signal, most = settings.reading, 0
    if signal.layers == "last":
        points: tuple[Point, ...] = (last_query(model),)
    else:
        layers = len(decoder_layers(model)[1])
        depth = max(1, math.floor(settings.depth * layers))
        points = points_of(model, {module for adapter in pool for module in adapter.modules}, depth)
        if not points:
            raise PoolError(
                f"no adapter touches a module in the first {depth} of {layers} layers, where the probe stops; use the "
                "signal 'norm'"
            )
        # If the whole model runs anyway, every point is read (docs/read-once.md says what choosing would cost there).
        if signal.chosen and not settings.activations:
            points = later(points, first_layer(depth), [set(adapter.modules) for adapter in pool])
            most = most_points(_bytes_of(pool, points) / len(points))
    adapters = _scorable(pool, points, settings)
    if signal.input == "residual":
        _check_widths(model, points)
    return Plan(points, most, adapters)


def most_points(bytes_each: float) -> int:
    """How many points are chosen at most if a point takes so many bytes of the index on average."""
    return max(_FEWEST_POINTS, min(_MOST_POINTS, int(_INDEX_BYTES / bytes_each)))


def _bytes_of(pool: AdapterPool, points: Sequence[Point]) -> int:
    """The size of an index of all these points, in float32."""
    modules = [point.module for point in points]
    touched = (adapter.modules[module] for adapter in pool for module in modules if module in adapter.modules)
    return sum(4 * one.rank * one.in_features for one in touched)


def first_layer(depth: int) -> int:
    """The first layer whose points are candidates, if the probe runs through the first `depth` layers."""
    return math.ceil(depth / 4)


def later(points: tuple[Point, ...], first: int, pool: Iterable[Set[str]]) -> tuple[Point, ...]:
    """The points from layer `first` on, and every point of an adapter that touches fewer than `LEAST_POINTS` of those.

    Hidden vectors of the first layers say little more than which words a prompt has, so they miss prompts that are
    worded differently from an adapter's training prompts.

    Args:
        pool: the modules that each adapter touches.
    """
    every, late = {point.module for point in points}, {point.module for point in points if point.layer >= first}
    lacking = (every & modules for modules in pool if len(late & modules) < min(LEAST_POINTS, len(every & modules)))
    chosen = late.union(*lacking)
    return tuple(point for point in points if point.module in chosen)


def _scorable(pool: AdapterPool, points: Sequence[Point], settings: SelectionSettings) -> tuple[Adapter, ...]:
    """The adapters that touch at least one of the points."""
    modules = {point.module for point in points}
    lacking = [adapter.name for adapter in pool if not modules & set(adapter.modules)]
    if lacking and (settings.unscorable == "error" or len(lacking) == len(pool)):
        names = ", ".join(sorted(modules))
        where = f"the probed module {names}" if len(modules) <= 4 else f"any of {len(modules)} probed modules"
        raise PoolError(
            f"{len(lacking)} of {len(pool)} adapters do not touch {where} and cannot be scored: {listed(lacking, 5)}; "
            "use the signal 'calibrated', which reads the modules that adapters touch, or leave them out "
            "(--unscorable skip)"
        )
    left_out = set(lacking)
    return tuple(adapter for adapter in pool if adapter.name not in left_out)


def _check_widths(model: nn.Module, points: Sequence[Point]) -> None:
    width = model.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
    for point in points:
        shape = linear_shape(model.get_submodule(point.module))
        if shape is not None and shape.in_features != width:
            raise ModelError(
                f"{point.module} takes {shape.in_features} features, the residual stream that the signal reads has "
                f"{width}; use the signal 'calibrated'"
            )
