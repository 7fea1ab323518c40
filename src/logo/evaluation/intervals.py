"""95 % intervals of measures over rows, and of means over datasets.

If every row is right or wrong, it is Wilson's interval, which stays within [0, 1] and always has a width. Otherwise it
is percentiles of a bootstrap over rows. With fewer than `FEWEST` rows, or if every draw gives the same number, a
bootstrap is meaningless and there is no interval. The interval of a mean over datasets comes from the datasets' squared
distances (MOVER; Zou and Donner 2008). Datasets are fixed: an interval says how much a number would vary with other
rows of the same datasets. scipy is imported at the first use.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

DRAWS = 1000
LEVEL = 0.95
FEWEST = 10  # rows; percentiles of fewer are far too close together
BATCH = 2**22  # numbers drawn at once: 32 MB
EQUAL = 1e-9  # numbers that are closer, relative to the larger, differ by rounding

Values = NDArray[np.float64]


class Interval(NamedTuple):
    """The two ends of an interval, in the unit of its number."""

    low: float
    high: float


def proportion(right: int, rows: int) -> Interval:
    """Wilson's interval of a share of right rows.

    Raises:
        ValueError: no rows, or more right ones than there are.
    """
    from scipy.stats import binomtest

    found = binomtest(right, rows).proportion_ci(LEVEL, "wilson")
    return Interval(float(found.low), float(found.high))


def bootstrap(rows: Values, worth: Callable[[Values], Values], *, seed: Sequence[int]) -> Interval | None:
    """The percentile interval of a measure under rows drawn again with replacement.

    Args:
        rows: (rows, parts), the statistics of each row.
        worth: sums (..., parts) -> values (...); draws for which it is NaN do not count.
        seed: of the draws, any number of integers; the draws are equal for equal numbers of rows.

    Returns:
        None if there are fewer than `FEWEST` rows, or if every draw has the same value.
    """
    from scipy.stats import DegenerateDataWarning
    from scipy.stats import bootstrap as draw

    count, parts = rows.shape
    if count < FEWEST:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateDataWarning)  # scipy's intervals count NaN, too
        drawn = draw(
            (np.arange(count),),
            lambda places, axis: worth(rows[places].sum(axis=-2)),
            n_resamples=DRAWS,
            batch=max(1, BATCH // (count * parts)),
            vectorized=True,
            confidence_level=LEVEL,
            method="percentile",
            rng=np.random.default_rng(seed),
        )
    low, high = drawn.confidence_interval
    if np.isnan(drawn.bootstrap_distribution).any():
        low, high = np.nanpercentile(drawn.bootstrap_distribution, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    if not high - low > EQUAL * max(abs(low), abs(high)):
        return None
    value = float(worth(rows.sum(axis=0)))
    return Interval(min(float(low), value), max(float(high), value))


def of_mean(values: Sequence[float], intervals: Sequence[Interval | None]) -> Interval | None:
    """The interval of the mean of some datasets' values; None if one of them has no interval.

    Each end is as far from the mean as the root of the sum of the datasets' squared distances, divided by how many
    they are. Of a single dataset it is that dataset's interval.

    Raises:
        ValueError: no datasets, or not one interval for each.
    """
    if not values or len(values) != len(intervals):
        raise ValueError(f"a mean of {len(values)} values needs at least one, and as many intervals as values")
    known = [interval for interval in intervals if interval is not None]
    if len(values) == 1 or len(known) < len(values):
        return intervals[0] if len(values) == 1 else None
    middle, ends = np.array(values), np.array(known)
    reach = np.sqrt(((ends - middle[:, None]) ** 2).sum(axis=0)) / len(values)
    return Interval(float(middle.mean() - reach[0]), float(middle.mean() + reach[1]))
