"""Compares two pools: adapters that only one has, equal ones, and how far apart the updates of others are."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from logo.adapters.digests import adapter_key
from logo.adapters.format import Adapter, LoraWeights
from logo.adapters.layout import core_path
from logo.adapters.pool import AdapterPool
from logo.adapters.upkeep.spectra import difference, inner, norm

Kind = Literal["same bytes", "same update", "other update", "other shapes"]

# A relative difference up to which two updates are equal but for the rounding of float32 factors.
SAME = 1e-6


@dataclass(frozen=True)
class Difference:
    """Two adapters of one name.

    Attributes:
        name: in both pools.
        kind: `same bytes`: equal weight files and scales; `same update`: other factors or another dtype of the same
            product; `other shapes`: adapters of different base models.
        relative: `‖ΔA - ΔB‖ / ‖ΔA‖` over all modules; infinite if only ΔA is zero, NaN with other shapes.
        cosine: `⟨ΔA, ΔB⟩ / (‖ΔA‖ ‖ΔB‖)`; 1 for the same bytes, NaN if one is zero or with other shapes.
        modules: the number of modules that both adapt; `only`: that only the first, and only the second adapts.
    """

    name: str
    kind: Kind
    relative: float
    cosine: float
    modules: int
    only: tuple[int, int]

    @property
    def same(self) -> bool:
        """Whether both are the same update."""
        return self.kind in ("same bytes", "same update")


@dataclass(frozen=True)
class Differences:
    """The differences of two pools.

    Attributes:
        shared: the adapters of both, by name.
        only: names that only the first pool has, and only the second.
        renamed: name in the first -> name in the second, of those with the same bytes.
    """

    shared: tuple[Difference, ...]
    only: tuple[tuple[str, ...], tuple[str, ...]]
    renamed: dict[str, str]

    @property
    def same(self) -> bool:
        """Whether both hold the same updates under the same names."""
        return not any(self.only) and all(one.same for one in self.shared)


def compared(one: AdapterPool, other: AdapterPool, tell: Callable[[], None] | None = None) -> Differences:
    """Compares two pools; `tell` is called after each adapter that both have.

    Raises:
        AdapterError: one cannot be read.
    """
    shared = []
    for name in (name for name in one.names if name in other):
        shared.append(difference_of(name, one[name], other[name]))
        if tell is not None:
            tell()
    only = tuple(n for n in one.names if n not in other), tuple(n for n in other.names if n not in one)
    keys = {adapter_key(other[name]): name for name in reversed(only[1])}
    found = {name: keys.get(adapter_key(one[name])) for name in only[0]} if keys else {}
    return Differences(tuple(shared), only, {name: to for name, to in found.items() if to is not None})


def difference_of(name: str, one: Adapter, other: Adapter) -> Difference:
    """Compares two adapters.

    Raises:
        AdapterError: one cannot be read.
    """
    left, right = (_by_core(adapter) for adapter in (one, other))
    both = [path for path in left if path in right]
    only = len(left) - len(both), len(right) - len(both)
    if adapter_key(one) == adapter_key(other):
        return Difference(name, "same bytes", 0.0, 1.0, len(both), only)
    if one.alone or other.alone:  # the factors of DoRA do not say what its magnitudes change
        return Difference(name, "other update", math.nan, math.nan, len(both), only)
    if any(_shape(left[path]) != _shape(right[path]) for path in both):
        return Difference(name, "other shapes", math.nan, math.nan, len(both), only)
    sizes = [{path: norm(weights) for path, weights in side.items()} for side in (left, right)]
    first, second = (math.hypot(*side.values()) for side in sizes)
    apart = [norm(difference(left[path], right[path])) for path in both]
    for side, others in ((sizes[0], right), (sizes[1], left)):
        apart += [size for path, size in side.items() if path not in others]
    distance = math.hypot(*apart)
    relative = distance / first if first else (math.inf if distance else 0.0)
    cosine = _cosine([inner(left[path], right[path]) for path in both], first, second)
    return Difference(name, "same update" if relative <= SAME else "other update", relative, cosine, len(both), only)


def _cosine(products: Sequence[float], first: float, second: float) -> float:
    return math.fsum(products) / (first * second) if first and second else math.nan


def _by_core(adapter: Adapter) -> dict[str, LoraWeights]:
    return {core_path(path): weights for path, weights in adapter.read().items()}


def _shape(weights: LoraWeights) -> tuple[int, int]:
    return weights.A.shape[1], weights.B.shape[0]
