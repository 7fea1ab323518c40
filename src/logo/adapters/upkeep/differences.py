"""How two pools differ: which adapters only one has, which are the same, and how far apart the others' updates are."""

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

# Relative difference up to which two updates are one: what float32 factors of the same product leave.
SAME = 1e-6


@dataclass(frozen=True)
class Difference:
    """Two adapters of one name.

    Attributes:
        name: in both pools.
        kind: `same bytes`: the same weight file and scales; `same update`: other factors or another dtype of the same
            product; `other shapes`: they were made for different base models.
        relative: `‖ΔA - ΔB‖ / ‖ΔA‖` over all modules; infinite where only ΔA is zero, NaN with other shapes.
        cosine: `⟨ΔA, ΔB⟩ / (‖ΔA‖ ‖ΔB‖)`; 1 for the same bytes, NaN where one is zero, and with other shapes.
        modules: how many both adapt; `only`: how many only the first, and only the second.
    """

    name: str
    kind: Kind
    relative: float
    cosine: float
    modules: int
    only: tuple[int, int]

    @property
    def same(self) -> bool:
        """Whether they add the same to the base model."""
        return self.kind in ("same bytes", "same update")


@dataclass(frozen=True)
class Differences:
    """Two pools.

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
    """Every adapter of two pools; `tell` is called after each that both have.

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
    """How two adapters differ.

    Raises:
        AdapterError: one cannot be read.
    """
    left, right = (_by_core(adapter) for adapter in (one, other))
    both = [path for path in left if path in right]
    only = len(left) - len(both), len(right) - len(both)
    if adapter_key(one) == adapter_key(other):
        return Difference(name, "same bytes", 0.0, 1.0, len(both), only)
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
