"""Means over datasets of every cell's primary measure, and how far each is from the best.

All cells answer the same rows, so a difference to the best is paired: its interval and its test compare the two answers
to each row. Two cells whose own intervals overlap may well differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from logo.evaluation.corpus import Corpus, mean_of, mean_over
from logo.evaluation.groups import grouped
from logo.evaluation.intervals import Interval
from logo.evaluation.paired import Pair, Paired, paired
from logo.evaluation.sweep.running import Cell, Outcome


@dataclass(frozen=True)
class Mean:
    """The mean of some datasets' means, a fraction of one, and its 95 % `interval` if it has one; `datasets`: their
    number."""

    value: float
    interval: Interval | None
    datasets: int


@dataclass(frozen=True)
class Standing:
    """A cell among the others.

    Attributes:
        mean: over all datasets that it has.
        complete: no dataset is missing that another cell has.
        seconds: wall time of its answers.
        groups: group -> mean over its datasets; groups of which a dataset is missing are absent.
        behind: this cell minus the best one, with a test corrected for all cells; None for the best cell, and if a
            dataset is missing.
    """

    cell: Cell
    mean: Mean
    complete: bool
    seconds: float
    groups: dict[str, Mean] = field(default_factory=dict)
    behind: Paired | None = None


def datasets_of(outcomes: Sequence[Outcome]) -> list[str]:
    """Every dataset that any cell has, in their order."""
    return list(dict.fromkeys(outcome.dataset for outcome in outcomes))


def means(outcomes: Sequence[Outcome], datasets: Sequence[str], *, seed: int = 0) -> list[tuple[Cell, Mean]]:
    """The mean of every cell that has all of these datasets, in the order of cells.

    Args:
        outcomes: of any cells and datasets.
        seed: of intervals that are drawn.
    """
    found = _by_cell(outcomes)
    whole = [(cell, by_name) for cell, by_name in found if datasets and all(name in by_name for name in datasets)]
    return [(cell, _mean([by_name[name] for name in datasets], seed)) for cell, by_name in whole]


def standings(outcomes: Sequence[Outcome], *, seed: int = 0) -> list[Standing]:
    """The cells, best first; those that lack a dataset come after those that have all, and are not compared with them.

    Args:
        outcomes: in the order of cells.
        seed: of intervals and tests that are drawn.
    """
    everything = datasets_of(outcomes)
    groups = {
        group: {cell.key: mean for cell, mean in means(outcomes, names, seed=seed)}
        for group, names in grouped(everything).items()
    }
    found = []
    for cell, by_name in _by_cell(outcomes):
        mine = list(by_name.values())
        own = {group: by_cell[cell.key] for group, by_cell in groups.items() if cell.key in by_cell}
        seconds = sum(outcome.result.seconds["inference"] for outcome in mine)
        found.append(Standing(cell, _mean(mine, seed), len(mine) == len(everything), seconds, own))
    found.sort(key=lambda standing: (not standing.complete, -standing.mean.value))
    return _beside_the_best(found, dict((cell.key, by_name) for cell, by_name in _by_cell(outcomes)), seed)


def _beside_the_best(
    found: Sequence[Standing], answers: dict[tuple[object, ...], dict[str, Outcome]], seed: int
) -> list[Standing]:
    others = [standing for standing in found[1:] if standing.complete]
    best = answers[found[0].cell.key] if found else {}
    pairs = [[Pair(_worth(best[name]), _worth(answers[other.cell.key][name])) for name in best] for other in others]
    compared = [replace(other, behind=one) for other, one in zip(others, paired(pairs, seed=seed), strict=True)]
    return [*found[:1], *compared, *(standing for standing in found[1:] if not standing.complete)]


def _by_cell(outcomes: Sequence[Outcome]) -> list[tuple[Cell, dict[str, Outcome]]]:
    """Every cell's outcomes by dataset, in the order of cells."""
    found: dict[tuple[object, ...], tuple[Cell, dict[str, Outcome]]] = {}
    for outcome in outcomes:
        found.setdefault(outcome.cell.key, (outcome.cell, {}))[1][outcome.dataset] = outcome
    return list(found.values())


def _mean(outcomes: Sequence[Outcome], seed: int) -> Mean:
    return Mean(*mean_over([_worth(outcome) for outcome in outcomes], seed=seed), len(outcomes))


def _worth(outcome: Outcome) -> Corpus:
    """The primary measure of each row."""
    return mean_of(outcome.result.measures[outcome.result.primary])
