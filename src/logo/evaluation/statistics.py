"""Intervals of means, and comparisons of two runs on the same rows, with scipy.

An interval of 95 % is Wilson's where each row is right or wrong, so that it stays within [0, 1] and always has a width;
otherwise it is percentiles of a bootstrap over rows, which fewer than `FEWEST` rows do not have. It says how much a
mean would vary with other rows of the same datasets; that of a mean over datasets comes from the datasets' squared
distances (MOVER; Zou and Donner 2008). scipy is imported at the first use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

LEVEL, ALPHA = 0.95, 0.05
DRAWS, SWAPS = 1_000, 9_999  # 10,000 swaps with the observed one
FEWEST = 10  # rows; percentiles of fewer are far too close together
_BATCH = 2**22  # numbers that are drawn at once: 32 MB
MCNEMAR, RANDOMISED = "McNemar", "randomised"  # names of the tests

Values = NDArray[np.float64]
Interval = tuple[float, float]


def is_right_or_wrong(values: Values) -> bool:
    """Whether each row is worth 0 or 1."""
    return bool(np.isin(values, (0.0, 1.0)).all())


def interval(values: Sequence[float] | Values, seed: int = 0) -> Interval | None:
    """The interval of the mean of values (rows,); None: there are too few, or all are equal."""
    from scipy.stats import binomtest

    found = np.asarray(values, dtype=np.float64)
    if len(found) and is_right_or_wrong(found):
        ends = binomtest(int(found.sum()), len(found)).proportion_ci(LEVEL, "wilson")
        return float(ends.low), float(ends.high)
    return _drawn(found, seed)


def over_tasks(values: Sequence[float] | Values, seed: int = 0) -> Interval | None:
    """The interval of the mean of tasks' values (tasks,), which says how much it would vary with other tasks."""
    return _drawn(np.asarray(values, dtype=np.float64), seed)


def _drawn(values: Values, seed: int) -> Interval | None:
    from scipy.stats import bootstrap

    if len(values) < FEWEST or np.ptp(values) == 0:
        return None
    how: dict[str, Any] = {"n_resamples": DRAWS, "method": "percentile", "batch": max(1, _BATCH // len(values))}
    found = bootstrap((values,), np.mean, confidence_level=LEVEL, rng=np.random.default_rng(seed), **how)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def of_mean(values: Sequence[float], intervals: Sequence[Interval | None]) -> Interval | None:
    """The interval of the mean of some datasets' values, from theirs; None if one of them has none."""
    known = [one for one in intervals if one is not None]
    if not known or len(known) < len(values):
        return None
    middle, ends = np.array(values), np.array(known)
    reach = np.sqrt(((ends - middle[:, None]) ** 2).sum(axis=0)) / len(values)
    return float(middle.mean() - reach[0]), float(middle.mean() + reach[1])


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


def paired(datasets: Sequence[tuple[Values, Values]], seed: int = 0) -> Paired:
    """Compares two runs, given as their values (rows,) of each dataset.

    The test is McNemar's exact one if the rows of a single dataset are right or wrong, else approximate randomisation:
    the share of 10,000 swaps of both runs' values of each row whose difference is at least as large as the one found.

    Raises:
        ValueError: no datasets, or unequal numbers of rows.
    """
    from scipy.stats import binomtest

    if not datasets or any(a.shape != b.shape or not len(a) for a, b in datasets):
        raise ValueError("paired runs: expected one dataset or more, and the same rows of each in both runs")
    gaps = [np.where(np.isclose(a, b, rtol=1e-9, atol=0.0), 0.0, b - a) for a, b in datasets]
    means = [float(np.mean([one.mean() for one in side])) for side in zip(*datasets, strict=True)]
    better, worse = (sum(int((sign * gap > 0).sum()) for gap in gaps) for sign in (1, -1))
    ends = [_of_gaps(gap, a, b, seed + n) for n, (gap, (a, b)) in enumerate(zip(gaps, datasets, strict=True))]
    around = ends[0] if len(ends) == 1 else of_mean([float(gap.mean()) for gap in gaps], ends)
    exact = len(gaps) == 1 and all(map(is_right_or_wrong, datasets[0]))
    # Each row counts by its dataset's size: the difference is a mean over datasets.
    weighted = np.concatenate([gap / len(gap) for gap in gaps])
    if exact:
        p = float(binomtest(better, better + worse).pvalue) if better + worse else 1.0
    else:
        p = _swapped(weighted[weighted != 0], seed)
    return Paired(sum(map(len, gaps)), means[0], means[1], around, better, worse, MCNEMAR if exact else RANDOMISED, p)


def _swapped(gaps: Values, seed: int) -> float:
    """The share of swaps of gaps (rows,) whose sum is as far from zero as theirs; of all swaps if they are few."""
    # Ten times as fast as `scipy.stats.permutation_test`, whose samples are sorted row by row.
    least = abs(gaps.sum()) - 1e-9 * np.abs(gaps).sum()  # equal up to rounding is equal
    if 2 ** len(gaps) <= SWAPS + 1:
        sums = np.zeros(1)
        for gap in gaps:
            sums = np.concatenate([sums + gap, sums - gap])
        return float(np.mean(np.abs(sums) >= least))
    random, far, size = np.random.default_rng(seed), 1, _BATCH // len(gaps) + 1  # 1: the one that was found
    for start in range(0, SWAPS, size):
        signs = random.integers(0, 2, (min(size, SWAPS - start), len(gaps)), dtype=np.int8)
        far += int((np.abs(gaps.sum() - 2 * (signs @ gaps)) >= least).sum())
    return far / (SWAPS + 1)


def holm(p: Sequence[float]) -> list[float]:
    """P-values corrected by Holm's method: the chance that any of those below a limit is a false positive is at most
    that limit."""
    order = np.argsort(p, kind="stable")
    found = np.empty(len(p))
    found[order] = np.minimum(np.maximum.accumulate(np.array(p)[order] * np.arange(len(p), 0, -1)), 1.0)
    return [float(value) for value in found]


def _of_gaps(gap: Values, a: Values, b: Values, seed: int) -> Interval | None:
    """The interval of the mean of differences; where rows are right or wrong, that of Bonett and Price (2012), who add
    one better and one worse row."""
    if not (is_right_or_wrong(a) and is_right_or_wrong(b)):
        return _drawn(gap, seed)
    from scipy.stats import norm

    count = len(gap) + 2
    won, lost = (((sign * gap > 0).sum() + 1) / count for sign in (1, -1))
    reach = norm.ppf((1 + LEVEL) / 2) * np.sqrt((won + lost - (won - lost) ** 2) / count)
    return max(-1.0, float(won - lost - reach)), min(1.0, float(won - lost + reach))


def auroc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """The share of pairs in which the first has the higher value; ties count half."""
    from scipy.stats import mannwhitneyu

    return float(mannwhitneyu(positive, negative).statistic) / (len(positive) * len(negative))


def calibration_error(confidence: Sequence[float], truth: Sequence[bool], bins: int = 10) -> float:
    """The expected calibration error (Naeini et al. 2015) of confidences in [0, 1], in which rows of both kinds count
    half: the mean distance between confidence and share of true rows, over bins."""
    values, true = np.array(confidence), np.array(truth)
    weights = np.where(true, 0.5 / max(1, true.sum()), 0.5 / max(1, (~true).sum()))
    places = np.minimum((values * bins).astype(int), bins - 1)
    return float(sum(abs((weights * (values - true))[places == place].sum()) for place in range(bins)))


def scores(measures: Mapping[str, Sequence[float]], seed: int = 0) -> dict[str, dict[str, Any]]:
    """The mean of each measure's values and its interval, as JSON."""
    return {
        name: {"value": float(np.mean(values)), "interval": interval(values, seed)} for name, values in measures.items()
    }
