"""Intervals of means, and comparisons of two runs on the same rows, with scipy.

What is computed follows the scale that a metric declares (`logo.evaluation.metrics.Scale`), and not the values that it
happened to give. An interval of 95 % is Wilson's for a binary metric, so that it stays within [0, 1] and always has a
width; for a graded one it is percentiles of a bootstrap over rows, which fewer than `FEWEST` rows do not have, nor rows
that are all worth the same. It says how much a mean would vary with other rows of the same datasets; that of a mean
over datasets comes from the datasets' squared distances (MOVER; Zou and Donner 2008). scipy is imported at the first
use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logo.evaluation.metrics import Scale

LEVEL = 0.95
ALPHA = 0.05
DRAWS = 1_000
SWAPS = 9_999  # 10,000 with the observed one
FEWEST = 10  # rows; percentiles of fewer are far too close together
_BATCH = 2**22  # numbers that are drawn at once: 32 MB
MCNEMAR = "McNemar"  # names of the tests
RANDOMISED = "randomised"

Values = NDArray[np.float64]
Interval = tuple[float, float]


def interval(values: Sequence[float] | Values, scale: Scale, seed: int = 0) -> Interval | None:
    """The interval of the mean of values (rows,) of a metric of this scale; None: there are none, or of graded ones too
    few, or all are equal."""
    from scipy.stats import binomtest

    rows = np.asarray(values, dtype=np.float64)
    if scale == "graded" or not len(rows):
        return _drawn(rows, seed)
    ends = binomtest(int(rows.sum()), len(rows)).proportion_ci(LEVEL, "wilson")
    return float(ends.low), float(ends.high)


def over_tasks(values: Sequence[float] | Values, seed: int = 0) -> Interval | None:
    """The interval of the mean of tasks' values (tasks,), which says how much it would vary with other tasks."""
    return _drawn(np.asarray(values, dtype=np.float64), seed)


def _drawn(values: Values, seed: int) -> Interval | None:
    from scipy.stats import bootstrap

    if len(values) < FEWEST or np.ptp(values) == 0:
        return None
    draws: dict[str, Any] = {"n_resamples": DRAWS, "method": "percentile", "batch": max(1, _BATCH // len(values))}
    drawn = bootstrap((values,), np.mean, confidence_level=LEVEL, rng=np.random.default_rng(seed), **draws)
    return float(drawn.confidence_interval.low), float(drawn.confidence_interval.high)


def of_mean(values: Sequence[float], intervals: Sequence[Interval | None]) -> Interval | None:
    """The interval of the mean of some datasets' values, from theirs; None if one of them has none."""
    ends = [interval for interval in intervals if interval is not None]
    if not ends or len(ends) < len(values):
        return None
    distances = np.array(ends) - np.array(values)[:, None]  # (datasets, 2)
    below, above = np.sqrt((distances**2).sum(axis=0)) / len(values)
    mean = np.mean(values)
    return float(mean - below), float(mean + above)


@dataclass(frozen=True)
class Paired:
    """Two runs on the same rows of one dataset, or of several.

    Attributes:
        rows: how many there are.
        a, b: the runs' means, over datasets if there are several.
        interval: of `b - a`; None: it has none.
        better, worse: the number of rows on which b's value is higher, or lower.
        test: the name of the test; `p`: two-sided.
        p_holm: corrected for all comparisons that are made together.
    """

    rows: int
    a: float
    b: float
    interval: Interval | None
    better: int
    worse: int
    test: str
    p: float
    p_holm: float = 1.0

    @property
    def difference(self) -> float:
        """How much better b is than a."""
        return self.b - self.a

    @property
    def is_marked(self) -> bool:
        """Whether the difference is significant among all that are shown."""
        return self.p_holm < ALPHA


def paired(datasets: Sequence[tuple[Values, Values]], scale: Scale, seed: int = 0) -> Paired:
    """Compares two runs, given as their values (rows,) of each dataset by a metric of this scale.

    The test is McNemar's exact one for a single dataset and a binary metric, else approximate randomisation: the share
    of 10,000 swaps of both runs' values of each row whose difference is at least as large as the one found.

    Raises:
        ValueError: no datasets, or unequal numbers of rows.
    """
    from scipy.stats import binomtest

    if not datasets or any(a.shape != b.shape or not len(a) for a, b in datasets):
        raise ValueError("paired runs: expected one dataset or more, and the same rows of each in both runs")
    gaps = [np.where(np.isclose(a, b, rtol=1e-9, atol=0.0), 0.0, b - a) for a, b in datasets]
    better = sum(int((gap > 0).sum()) for gap in gaps)
    worse = sum(int((gap < 0).sum()) for gap in gaps)
    intervals = [_of_gaps(gap, scale, seed + number) for number, gap in enumerate(gaps)]
    mean_gaps = [float(gap.mean()) for gap in gaps]
    if scale == "binary" and len(gaps) == 1:
        test = MCNEMAR
        p = float(binomtest(better, better + worse).pvalue) if better + worse else 1.0
    else:
        test = RANDOMISED
        # Each row counts by its dataset's size: the difference is a mean over datasets.
        weighted = np.concatenate([gap / len(gap) for gap in gaps])
        p = _swapped(weighted[weighted != 0], seed)
    return Paired(
        rows=sum(map(len, gaps)),
        a=float(np.mean([a.mean() for a, _ in datasets])),
        b=float(np.mean([b.mean() for _, b in datasets])),
        interval=intervals[0] if len(intervals) == 1 else of_mean(mean_gaps, intervals),
        better=better,
        worse=worse,
        test=test,
        p=p,
    )


def _swapped(gaps: Values, seed: int) -> float:
    """The share of swaps of gaps (rows,) whose sum is as far from zero as theirs; of all swaps if they are few."""
    # Ten times as fast as `scipy.stats.permutation_test`, whose samples are sorted row by row.
    least = abs(gaps.sum()) - 1e-9 * np.abs(gaps).sum()  # equal up to rounding is equal
    if 2 ** len(gaps) <= SWAPS + 1:
        sums = np.zeros(1)
        for gap in gaps:
            sums = np.concatenate([sums + gap, sums - gap])
        return float(np.mean(np.abs(sums) >= least))
    random = np.random.default_rng(seed)
    as_far = 1  # the one that was found
    swaps_at_once = _BATCH // len(gaps) + 1
    for start in range(0, SWAPS, swaps_at_once):
        signs = random.integers(0, 2, (min(swaps_at_once, SWAPS - start), len(gaps)), dtype=np.int8)
        as_far += int((np.abs(gaps.sum() - 2 * (signs @ gaps)) >= least).sum())
    return as_far / (SWAPS + 1)


def holm(p: Sequence[float]) -> list[float]:
    """P-values corrected by Holm's method: the chance that any of those below a limit is a false positive is at most
    that limit."""
    order = np.argsort(p, kind="stable")
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(np.maximum.accumulate(np.array(p)[order] * np.arange(len(p), 0, -1)), 1.0)
    return [float(value) for value in corrected]


def _of_gaps(gap: Values, scale: Scale, seed: int) -> Interval | None:
    """The interval of the mean of differences (rows,); of a binary metric, that of Bonett and Price (2012), who add one
    better and one worse row."""
    if scale == "graded":
        return _drawn(gap, seed)
    from scipy.stats import norm

    count = len(gap) + 2
    won = ((gap > 0).sum() + 1) / count
    lost = ((gap < 0).sum() + 1) / count
    reach = norm.ppf((1 + LEVEL) / 2) * np.sqrt((won + lost - (won - lost) ** 2) / count)
    return max(-1.0, float(won - lost - reach)), min(1.0, float(won - lost + reach))


def auroc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """The share of pairs in which the first has the higher value; ties count half."""
    from scipy.stats import mannwhitneyu

    return float(mannwhitneyu(positive, negative).statistic) / (len(positive) * len(negative))


def calibration_error(confidence: Sequence[float], truth: Sequence[bool], bins: int = 10) -> float:
    """The expected calibration error (Naeini et al. 2015) of confidences in [0, 1], in which rows of both kinds count
    half: the mean distance between confidence and share of true rows, over bins."""
    values = np.array(confidence)
    true = np.array(truth)
    weights = np.where(true, 0.5 / max(1, true.sum()), 0.5 / max(1, (~true).sum()))
    places = np.minimum((values * bins).astype(int), bins - 1)
    return float(sum(abs((weights * (values - true))[places == place].sum()) for place in range(bins)))


def means(measures: Mapping[str, Sequence[float]], scale: Scale, seed: int = 0) -> dict[str, dict[str, Any]]:
    """The mean of each measure's values, which are of this scale, and its interval, as JSON."""
    return {
        name: {"value": float(np.mean(values)), "interval": interval(values, scale, seed)}
        for name, values in measures.items()
    }
