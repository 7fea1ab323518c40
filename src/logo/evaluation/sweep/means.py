"""Means over datasets of every cell's primary measure, with 95 % intervals.

Rows are drawn alike for all cells, so that cells differ by what they answer and not by the draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from logo.evaluation.groups import grouped
from logo.evaluation.intervals import estimate
from logo.evaluation.sweep.running import Cell, Outcome


@dataclass(frozen=True)
class Mean:
    """The mean of some datasets' means, a fraction of one, and its 95 % interval; `datasets`: how many they are."""

    value: float
    low: float
    high: float
    datasets: int


@dataclass(frozen=True)
class Standing:
    """A cell among the others.

    Attributes:
        mean: over all datasets that it has.
        groups: over those of each group; a group of which a dataset is missing is not there.
        complete: no dataset is missing that another cell has.
        seconds: of wall time that its answers took.
    """

    cell: Cell
    mean: Mean
    complete: bool
    seconds: float
    groups: dict[str, Mean] = field(default_factory=dict)


def datasets_of(outcomes: Sequence[Outcome]) -> list[str]:
    """Every dataset that any cell has, in their order."""
    return list(dict.fromkeys(outcome.dataset for outcome in outcomes))


def means(outcomes: Sequence[Outcome], datasets: Sequence[str], *, seed: int = 0) -> list[tuple[Cell, Mean]]:
    """Of every cell that has all of these datasets, in the order of cells.

    Args:
        outcomes: of any cells and datasets.
        seed: of the bootstrap.
    """
    wanted = set(datasets)
    found: list[tuple[Cell, dict[str, Outcome]]] = []
    for outcome in outcomes:
        if not found or found[-1][0].key != outcome.cell.key:
            found.append((outcome.cell, {}))
        found[-1][1][outcome.dataset] = outcome
    whole = [(cell, by_name) for cell, by_name in found if wanted and wanted <= by_name.keys()]
    if not whole:
        return []
    tasks = [np.hstack([by_name[name].values for _, by_name in whole]) for name in datasets]
    drawn = estimate(tasks, seed=seed)
    ends = zip(drawn.mean.tolist(), drawn.low.tolist(), drawn.high.tolist(), strict=True)
    return [(cell, Mean(*three, len(datasets))) for (cell, _), three in zip(whole, ends, strict=True)]


def standings(outcomes: Sequence[Outcome], *, seed: int = 0) -> list[Standing]:
    """The cells, best first; those that lack a dataset come after those that have all, and are not compared with them.

    Args:
        outcomes: in the order of cells.
        seed: of the bootstrap.
    """
    everything = datasets_of(outcomes)
    groups = {
        group: {cell.key: mean for cell, mean in means(outcomes, names, seed=seed)}
        for group, names in grouped(everything).items()
    }
    all_of = {cell.key: mean for cell, mean in means(outcomes, everything, seed=seed)}
    found = []
    for cell in {outcome.cell.key: outcome.cell for outcome in outcomes}.values():
        mine = [outcome for outcome in outcomes if outcome.cell.key == cell.key]
        mean = all_of.get(cell.key)
        if mean is None:
            [(_, mean)] = means(mine, datasets_of(mine), seed=seed)
        seconds = sum(outcome.seconds["inference"] for outcome in mine)
        own = {group: by_cell[cell.key] for group, by_cell in groups.items() if cell.key in by_cell}
        found.append(Standing(cell, mean, cell.key in all_of, seconds, own))
    return sorted(found, key=lambda standing: (not standing.complete, -standing.mean.value))
