"""Finds unusual adapters of a pool: those that are zero, far larger than others, or of another training recipe."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from logo.adapters.format import Adapter
from logo.adapters.layout import core_path
from logo.adapters.upkeep.anatomy import Anatomy, kind_of

# A norm is unusual if it is so many times the pool's median, or the median so many times the norm.
FAR = 5.0
# A property is usual if at least this share of the pool has it; only then are the others unusual.
HABIT = 2 / 3


@dataclass(frozen=True)
class Outlier:
    """Something unusual: a key, the same in words, and the adapters concerned."""

    kind: str
    text: str
    adapters: tuple[str, ...]


def outliers(adapters: Sequence[Adapter], found: Anatomy) -> list[Outlier]:
    """Everything unusual, the most important first."""
    listed = [*_untrained(found), *_other_base(adapters), *_far(found)]
    for kind, of, words in _HABITS:
        listed += _unlike(kind, adapters, of, words)
    return listed


def _untrained(found: Anatomy) -> Iterator[Outlier]:
    dead = {
        name: sum(update.norm == 0 for update in updates.values()) == len(updates)
        for name, updates in found.updates.items()
    }
    if any(dead.values()):
        names = tuple(name for name in found.names if dead[name])
        yield Outlier("untrained", "does nothing: its update is zero in every module (B = 0)", names)
    for name, updates in found.updates.items():
        zeros = sum(update.norm == 0 for update in updates.values())
        if zeros and not dead[name]:
            yield Outlier("partly untrained", f"its update is zero in {zeros} of {len(updates)} modules", (name,))


def _other_base(adapters: Sequence[Adapter]) -> Iterator[Outlier]:
    """Adapters with a module of another shape than most, which belong to another base model."""
    shapes: dict[str, Counter[tuple[int, int]]] = {}
    of = {adapter.name: {core_path(path): module for path, module in adapter.modules.items()} for adapter in adapters}
    for modules in of.values():
        for path, module in modules.items():
            shapes.setdefault(path, Counter())[module.in_features, module.out_features] += 1
    for name, modules in of.items():
        for path, module in modules.items():
            usual, count = shapes[path].most_common(1)[0]
            if (module.in_features, module.out_features) != usual and count >= HABIT * shapes[path].total():
                text = (
                    f"was made for another base model: {path} goes from {module.in_features} to {module.out_features}, "
                    f"in the others from {usual[0]} to {usual[1]}"
                )
                yield Outlier("base", text, (name,))
                break


def _far(found: Anatomy) -> Iterator[Outlier]:
    norms = {name: norm for name in found.names if (norm := found.norm(name)) > 0}
    if len(norms) < 3:  # the median of two says nothing
        return
    middle = median(norms.values())
    for name, norm in norms.items():
        if norm >= FAR * middle:
            yield Outlier("large", f"norm {norm:.3g}, {norm / middle:.1f} times the median of the pool", (name,))
        elif norm <= middle / FAR:
            yield Outlier("small", f"norm {norm:.3g}, 1/{middle / norm:.1f} of the median of the pool", (name,))


def _unlike(
    kind: str, adapters: Sequence[Adapter], of: Callable[[Adapter], Hashable], words: Callable[[Adapter], str]
) -> Iterator[Outlier]:
    """Adapters without the property that most have, grouped by the one that they have."""
    habits = Counter(map(of, adapters))
    [(habit, count)] = habits.most_common(1) or [(None, 0)]
    if len(adapters) < 3 or count < HABIT * len(adapters):
        return
    usual = next(words(adapter) for adapter in adapters if of(adapter) == habit)
    for other in habits:
        alike = [adapter for adapter in adapters if of(adapter) == other]
        if other != habit:
            names = tuple(adapter.name for adapter in alike)
            yield Outlier(kind, f"{words(alike[0])}; {count} of {len(adapters)} have {usual}", names)


def _scales(adapter: Adapter) -> tuple[float, ...]:
    return tuple(sorted({round(module.scaling, 9) for module in adapter.modules.values()}))


def _targets(adapter: Adapter) -> tuple[str, ...]:
    return tuple(sorted(set(map(kind_of, adapter.modules))))


def _listed(values: Sequence[object]) -> str:
    return "/".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)


_HABITS: tuple[tuple[str, Callable[[Adapter], Hashable], Callable[[Adapter], str]], ...] = (
    ("rank", lambda adapter: adapter.ranks, lambda adapter: f"rank {_listed(adapter.ranks)}"),
    ("scale", _scales, lambda adapter: f"scale {_listed(_scales(adapter))}"),
    ("targets", _targets, lambda adapter: f"targets {', '.join(_targets(adapter))}"),
    ("modules", lambda adapter: len(adapter.modules), lambda adapter: f"{len(adapter.modules)} modules"),
)
