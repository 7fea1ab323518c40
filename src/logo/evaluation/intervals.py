"""Means over tasks and how far they can be trusted: a bootstrap that draws each task's rows again.

The mean is the mean of the tasks' means, so that a task with many rows counts no more than one with few. Tasks are
kept as they are: an interval says how much the numbers would move with other rows of the same tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DRAWS = 1000
LEVEL = 0.95
_COUNTS = 2**23  # drawn at once: 64 MB

Values = NDArray[np.float64]  # (rows, metrics) of one task


@dataclass(frozen=True)
class Estimate:
    """Means and their percentile interval, each (metrics,)."""

    mean: Values
    low: Values
    high: Values


def estimate(tasks: Sequence[Values], *, seed: int = 0, draws: int = DRAWS, level: float = LEVEL) -> Estimate:
    """Mean of task means, with bootstrap intervals.

    A draw takes whole rows, so that metrics stay paired. A task of one row cannot vary.

    Args:
        tasks: (rows, metrics) for each task; at least one task, each with at least one row.
        seed: of the draws; each task has its own stream, so that the order of work does not matter.
        level: share of the draws inside the interval.

    Raises:
        ValueError: no tasks, or a task without rows.
    """
    if not tasks or not all(len(values) for values in tasks):
        raise ValueError("intervals need at least one task, and at least one row in each")
    mean = np.mean([values.mean(axis=0) for values in tasks], axis=0)
    drawn = np.zeros((draws, tasks[0].shape[1]))
    for number, values in enumerate(tasks):
        drawn += resampled(values, seed=[seed, number], draws=draws) / (len(values) * len(tasks))
    low, high = percentiles(drawn, mean, level)
    return Estimate(mean, low, high)


def resampled(values: Values, *, seed: Sequence[int], draws: int = DRAWS) -> Values:
    """Sums (draws, metrics) over as many rows as there are, drawn with replacement.

    The draws depend on the seed and the number of rows alone, so that two runs on the same rows can be drawn alike.

    Args:
        values: (rows, metrics), at least one row.
        seed: of the draws; any number of integers.

    Raises:
        ValueError: no rows.
    """
    rows = len(values)
    if not rows:
        raise ValueError("a bootstrap needs at least one row")
    random = np.random.default_rng(seed)
    drawn = np.empty((draws, values.shape[1]))
    part = max(1, _COUNTS // rows)
    for start in range(0, draws, part):
        size = min(part, draws - start)
        # How often each row was drawn. Drawing in parts goes on in the same stream.
        counts = random.multinomial(rows, np.full(rows, 1 / rows), size=size)
        drawn[start : start + size] = counts @ values
    return drawn


def percentiles(drawn: Values, value: Values | float, level: float = LEVEL) -> tuple[Values, Values]:
    """The lower and upper end (...) of the share `level` of draws (draws, ...).

    Args:
        value: (...), what the draws are draws of; it never lies outside, not even by rounding where all are equal.
    """
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return np.minimum(low, value), np.maximum(high, value)
