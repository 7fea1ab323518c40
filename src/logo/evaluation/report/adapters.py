"""Adapters in a report: weights by dataset, and statistics of selections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from logo.evaluation.intervals import Values
from logo.evaluation.runs import Run
from logo.evaluation.stored import Result


@dataclass(frozen=True)
class Weights:
    """Mean weights (datasets, adapters)."""

    datasets: tuple[str, ...]
    adapters: tuple[str, ...]
    values: Values


@dataclass(frozen=True)
class Selected:
    """Statistics of selections.

    Attributes:
        heaviest: mean weight of the first adapter.
        effective: mean of (sum of |weights|)² / sum of squared weights, the effective number of adapters.
        known: instances whose right adapter is known and scored; `first`, `in_three`: the share of them in which it has
            the highest score, or one of the three highest; `reciprocal`: the mean of 1 / its rank.
    """

    heaviest: float
    effective: float
    known: int
    first: float
    in_three: float
    reciprocal: float


def pool(run: Run) -> list[str]:
    """Every adapter of a run: its pool as far as it is recorded, and selected adapters."""
    names: dict[str, None] = {}
    for result in run.results.values():
        names |= dict.fromkeys(result.run.get("pool") or ())
        names |= dict.fromkeys(result.columns)
    for result in run.results.values():
        names |= dict.fromkeys(name for selected in result.selected for name in selected)
    return list(names)


def weights(run: Run) -> Weights | None:
    """Mean weight of each adapter by dataset, over the instances that did not fail; None where none was selected."""
    names = pool(run)
    place = {name: number for number, name in enumerate(names)}
    values = np.zeros((len(run.results), len(names)))
    for row, result in enumerate(run.results.values()):
        for selected, shares in zip(result.selected, result.weights, strict=True):
            for name, share in zip(selected, shares, strict=True):
                values[row, place[name]] += share
        values[row] /= max(1, len(result) - len(result.errors))
    return Weights(tuple(run.results), tuple(names), values) if values.any() else None


def selected(run: Run) -> Selected | None:
    """Statistics of a run's selections; None if nothing was selected."""
    results = list(run.results.values())
    shares = [np.array(row) for result in results for row in result.weights if row]
    if not shares:
        return None
    numbers = [float(np.abs(row).sum()) ** 2 / float((row**2).sum()) for row in shares if row.any()]
    ranks = np.array([rank for result in results for rank in right_ranks(result) if rank is not None])
    return Selected(
        heaviest=float(np.mean([row.max() for row in shares])),
        effective=float(np.mean(numbers or [0.0])),
        known=len(ranks),
        first=float((ranks <= 1).mean()) if len(ranks) else 0.0,
        in_three=float((ranks <= 3).mean()) if len(ranks) else 0.0,
        reciprocal=float((1.0 / ranks).mean()) if len(ranks) else 0.0,
    )


def right_adapter(result: Result, index: int) -> str | None:
    """The adapter of an instance, by its row or else by the dataset's name; None if it is unknown."""
    named = result.prompts[index].adapter if result.prompts is not None else None
    return named if named is not None else own_adapter(result.dataset, result.columns)


def own_adapter(dataset: str, adapters: Sequence[str]) -> str | None:
    """The adapter that is named like a dataset, or like the part after the dot; None if there is none."""
    return next((name for name in (dataset, dataset.partition(".")[2]) if name and name in adapters), None)


def right_ranks(result: Result) -> list[int | None]:
    """The rank of each instance's right adapter among the adapters that were scored for it, from 1; ties count against
    it. None if the right adapter is unknown or was not scored.
    """
    place = {name: column for column, name in enumerate(result.columns)}
    ranks: list[int | None] = []
    for index in range(len(result)):
        adapter = right_adapter(result, index)
        column = place.get(adapter) if adapter is not None else None
        known = column is not None and not np.isnan(result.scores[index, column])
        ranks.append(int((result.scores[index] >= result.scores[index, column]).sum()) if known else None)
    return ranks
