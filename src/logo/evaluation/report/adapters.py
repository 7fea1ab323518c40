"""Adapters in a report: weights by dataset, similarity of scores, spread of scores, and statistics of selections.

A picture cannot show ten thousand adapters; everything here is about the adapters with most weight, at most `LARGEST`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from logo.evaluation.intervals import Values
from logo.evaluation.runs import Run
from logo.evaluation.stored import Result

LARGEST = 400
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_FEWEST = 3  # instances that a correlation needs to say anything


@dataclass(frozen=True)
class Weights:
    """Mean weights (datasets, adapters); adapters in the order of the dataset that uses them most. `left_out`: number
    of adapters that were selected too little to be shown.
    """

    datasets: tuple[str, ...]
    adapters: tuple[str, ...]
    values: Values
    left_out: int


@dataclass(frozen=True)
class Similarity:
    """Spearman's correlation (adapters, adapters) of scores over `instances`, with similar adapters side by side."""

    adapters: tuple[str, ...]
    values: Values
    instances: int


@dataclass(frozen=True)
class Spread:
    """`QUANTILES` of each adapter's scores (adapters, 5), highest median first."""

    adapters: tuple[str, ...]
    values: Values


@dataclass(frozen=True)
class Selected:
    """Statistics of selections.

    Attributes:
        heaviest: mean weight of the first adapter.
        effective: mean of (sum of weights)² / sum of squared weights, the effective number of adapters.
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
    total = np.abs(values).sum(axis=0)
    if not total.any():
        return None
    kept = [int(n) for n in np.argsort(-total, kind="stable")[:LARGEST] if total[n] > 0]
    kept.sort(key=lambda n: (int(np.argmax(values[:, n])), -float(values[:, n].max()), names[n]))
    shown = tuple(names[n] for n in kept)
    return Weights(tuple(run.results), shown, values[:, kept], len(names) - len(kept))


def similarity(run: Run) -> Similarity | None:
    """The rank correlation of the adapters' scores over a run's instances; None if too few of them have scores."""
    from scipy.stats import rankdata

    names, scores = _scores(run)
    if len(scores) < _FEWEST or len(names) < 2:
        return None
    ranks = rankdata(scores, axis=0)
    ranks -= ranks.mean(axis=0)
    length = np.sqrt((ranks**2).sum(axis=0))
    ranks /= np.where(length > 0, length, 1.0)  # an adapter with a constant score correlates with no other
    values = np.clip(ranks.T @ ranks, -1.0, 1.0)
    np.fill_diagonal(values, 1.0)
    order = leaf_order(1.0 - values)
    return Similarity(tuple(names[n] for n in order), values[np.ix_(order, order)], len(scores))


def spread(run: Run) -> Spread | None:
    """The quantiles of each adapter's scores over a run's instances; None without scores."""
    names, scores = _scores(run)
    if not scores.size:
        return None
    values = np.quantile(scores, QUANTILES, axis=0).T
    order = sorted(range(len(names)), key=lambda n: (-float(values[n, 2]), names[n]))
    return Spread(tuple(names[n] for n in order), values[order])


def selected(run: Run) -> Selected | None:
    """Statistics of a run's selections; None if nothing was selected."""
    results = list(run.results.values())
    shares = [np.array(row) for result in results for row in result.weights if row]
    if not shares:
        return None
    numbers = [float(row.sum()) ** 2 / float((row**2).sum()) for row in shares if row.any()]
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


def leaf_order(distance: Values) -> list[int]:
    """The leaves of a clustering by average linkage, ordered so that neighbours are as similar as possible.

    Args:
        distance: (n, n), symmetric.
    """
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    if len(distance) < 2:
        return list(range(len(distance)))
    between = squareform(distance, checks=False)
    return [int(leaf) for leaf in leaves_list(linkage(between, "average", optimal_ordering=True))]


def _scores(run: Run) -> tuple[list[str], Values]:
    """Scores (instances, adapters) of all datasets that scored the same adapters as the first, without those that
    failed; of a large pool the adapters with most weight."""
    results = [result for result in run.results.values() if result.columns]
    if not results:
        return [], np.zeros((0, 0))
    names = list(results[0].columns)
    stacked = np.concatenate([result.scores for result in results if list(result.columns) == names])
    stacked = stacked[~np.isnan(stacked).any(axis=1)]
    kept = _heaviest(run, names)
    return [names[n] for n in kept], stacked[:, kept]


def _heaviest(run: Run, names: Sequence[str]) -> list[int]:
    if len(names) <= LARGEST:
        return list(range(len(names)))
    total = dict.fromkeys(names, 0.0)
    for result in run.results.values():
        for selected, shares in zip(result.selected, result.weights, strict=True):
            for name, share in zip(selected, shares, strict=True):
                total[name] = total.get(name, 0.0) + share
    return sorted(sorted(range(len(names)), key=lambda n: (-total[names[n]], n))[:LARGEST])
