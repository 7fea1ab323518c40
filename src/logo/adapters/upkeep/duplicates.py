"""Finds the adapters of a pool that can be removed, because one that stays is nearly the same update."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from logo.adapters.format import Adapter
from logo.adapters.upkeep.anatomy import Anatomy


@dataclass(frozen=True)
class Gone:
    """An adapter to remove and the one that stays instead, each with its norm."""

    name: str
    kept: str
    overlap: float
    cosine: float
    norm: float
    kept_norm: float


def duplicates(adapters: Sequence[Adapter], found: Anatomy, threshold: float) -> list[Gone]:
    """The adapters to remove, in pool order.

    Adapters are visited by falling number of parameters, then by name. Each stays, unless it is a near-duplicate of one
    that stays, so that every removed adapter is as close to one that stays as the threshold says. Adapters that act on
    different tokens are never duplicates, unless both are zero. A DoRA adapter always stays: its magnitudes are not
    compared.
    """
    alike: dict[str, dict[str, tuple[float, float]]] = {adapter.name: {} for adapter in adapters}
    where = {adapter.name: adapter.activation for adapter in adapters if not adapter.alone}
    for one, other, overlap, cosine in found.near_duplicates(threshold):
        if one in where and other in where and where[one] == where[other]:
            alike[one][other] = alike[other][one] = overlap, cosine
    idle = [name for name in found.names if name in where and found.norm(name) == 0]
    for name in idle:
        alike[name] |= {other: (1.0, 1.0) for other in idle if other != name}
    kept: list[str] = []
    gone: dict[str, Gone] = {}
    for adapter in sorted(adapters, key=lambda adapter: (-adapter.parameters, adapter.name)):
        near = alike[adapter.name]
        stays = max((name for name in kept if name in near), default=None, key=_least(near))
        if stays is None:
            kept.append(adapter.name)
        else:
            gone[adapter.name] = Gone(adapter.name, stays, *near[stays], found.norm(adapter.name), found.norm(stays))
    return [gone[adapter.name] for adapter in adapters if adapter.name in gone]


def _least(near: Mapping[str, tuple[float, float]]) -> Callable[[str], float]:
    return lambda name: min(near[name])
