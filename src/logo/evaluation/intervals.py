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
        rows = len(values)
        random = np.random.default_rng([seed, number])
        counts = random.multinomial(rows, np.full(rows, 1 / rows), size=draws)  # how often each row was drawn
        drawn += counts @ values / (rows * len(tasks))
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=0)
    # Where all draws are equal, rounding must not put the mean outside.
    return Estimate(mean, np.minimum(low, mean), np.maximum(high, mean))
