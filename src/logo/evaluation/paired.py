"""Comparison of two runs on the same instances, as pure functions on arrays.

A measure is a function of sums over instances (see `logo.evaluation.corpus`), so exact match, ROUGE and corpus BLEU are
compared alike. Over several datasets the difference is the mean of the datasets' differences. There are two questions:
how large is the difference (`difference`), and could it be chance (`significance`). Each pair of runs has one test:
McNemar's if the answers to one dataset are right or wrong, approximate randomisation otherwise. scipy is imported at
the first use.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from logo.evaluation.corpus import Corpus
from logo.evaluation.intervals import BATCH, EQUAL, LEVEL, Interval, Values, bootstrap, of_mean

SWAPS = 9_999  # 10,000 with the observed one
ALPHA = 0.05  # a p-value below it is called significant

TestName = Literal["mcnemar", "randomisation"]
TESTS: Mapping[TestName, str] = {
    "mcnemar": "McNemar's exact test",
    "randomisation": "approximate randomisation with 10,000 swaps",
}
"""Names of the tests in sentences."""
COLUMN: Mapping[TestName, str] = {"mcnemar": "McNemar", "randomisation": "randomised"}
"""Names of the tests in columns of tables."""


class Pair(NamedTuple):
    """One measure of two runs on the same instances of one dataset, row by row."""

    a: Corpus
    b: Corpus

    @property
    def right_or_wrong(self) -> bool:
        """Whether each instance is right or wrong in both runs."""
        return self.a.right_or_wrong and self.b.right_or_wrong


@dataclass(frozen=True)
class Difference:
    """How much better run B is than run A.

    Attributes:
        a, b: the runs' values; means over datasets if there are several.
        value: b - a.
        interval: its 95 % interval; None if too few instances differ.
    """

    a: float
    b: float
    value: float
    interval: Interval | None


@dataclass(frozen=True)
class Record:
    """The number of instances on which B's score is higher than A's, lower, or equal."""

    wins: int
    losses: int
    ties: int

    def __add__(self, other: Record) -> Record:
        """The sums of both records' counts."""
        return Record(self.wins + other.wins, self.losses + other.losses, self.ties + other.ties)


@dataclass(frozen=True)
class Significance:
    """The test and its two-sided p-value."""

    test: TestName
    p: float


@dataclass(frozen=True)
class Paired:
    """Two runs compared on the same instances.

    Attributes:
        difference: B minus A, each the mean over datasets.
        record: the number of instances on which B's score is higher, lower, or equal.
        significance: the test of the difference and its p-value.
        p_holm: the p-value corrected by Holm's method for all comparisons made together.
    """

    difference: Difference
    record: Record
    significance: Significance
    p_holm: float


def paired(
    comparisons: Sequence[Sequence[Pair]], *, seed: int = 0, known: Sequence[Significance] | None = None
) -> list[Paired]:
    """Makes several comparisons, whose p-values are corrected together.

    Args:
        comparisons: the pairs of each, one per dataset.
        seed: seed of intervals and tests.
        known: the tests of all comparisons, if they were computed before.
    """
    tests = known or [significance(pairs, seed=seed) for pairs in comparisons]
    corrected = holm([test.p for test in tests])
    return [
        Paired(difference(pairs, seed=seed), sum(map(record, pairs), Record(0, 0, 0)), test, p)
        for pairs, test, p in zip(comparisons, tests, corrected, strict=True)
    ]


def difference(pairs: Sequence[Pair], *, seed: int = 0) -> Difference:
    """The mean over datasets of B's value minus A's.

    Its interval comes from the datasets' intervals (`intervals.of_mean`). If instances are right or wrong, a dataset's
    interval is that of Bonett and Price (2012), otherwise that of a bootstrap that draws the same instances for both
    runs.

    Args:
        pairs: one per dataset.
        seed: of the draws; each dataset has its own stream.

    Raises:
        ValueError: no pairs, or runs of unequal numbers of instances.
    """
    _check(pairs)
    a, b = (float(np.mean([pair[run].value for pair in pairs])) for run in (0, 1))
    gaps = [pair.b.value - pair.a.value for pair in pairs]
    intervals = [_interval(pair, [seed, number]) for number, pair in enumerate(pairs)]
    return Difference(a, b, b - a, of_mean(gaps, intervals))


def significance(pairs: Sequence[Pair], *, seed: int = 0) -> Significance:
    """Whether the difference that `difference` reports could be chance.

    McNemar's exact test asks how often a fair coin would divide the instances that just one run has right as unevenly.
    Approximate randomisation swaps the two answers of each instance at random, and its p-value is the share of swaps
    whose difference is at least as large as the one that was found; that one counts as a swap, so p is never 0. Where
    instances are so few that all ways to swap them are fewer than that, each way is tried once.

    Args:
        pairs: one per dataset.
        seed: of the swaps.

    Raises:
        ValueError: as `difference`.
    """
    from scipy.stats import binomtest, permutation_test

    _check(pairs)
    if len(pairs) == 1 and pairs[0].right_or_wrong:
        found = record(pairs[0])
        decided = found.wins + found.losses
        return Significance("mcnemar", float(binomtest(found.wins, decided).pvalue) if decided else 1.0)
    ends = np.cumsum([0, *(len(pair.a.rows) for pair in pairs)])
    gaps = [pair.b.rows - pair.a.rows for pair in pairs]
    totals = [pair.a.rows.sum(axis=0) + pair.b.rows.sum(axis=0) for pair in pairs]
    scale = max(abs(side.value) for pair in pairs for side in pair) or 1.0

    def swapped(signs: Values, _: Values, axis: int) -> Any:
        """The difference of the runs after swapping the answers of instances whose sign is -1."""
        apart = np.zeros(signs.shape[:-1])
        for pair, start, end, gap, total in zip(pairs, ends[:-1], ends[1:], gaps, totals, strict=True):
            sums = signs[..., start:end] @ gap  # B's less A's
            apart = apart + pair.b.worth((total + sums) / 2) - pair.a.worth((total - sums) / 2)
        return np.round(np.abs(apart) / (scale * len(pairs)), 9)  # equal up to rounding counts as equal

    # A pair of 1 and -1 for each instance: which of the two comes first says whether its answers are swapped.
    signs = np.ones(ends[-1])
    if len(signs) == 1:  # swapped or not, the runs are as far apart
        return Significance("randomisation", 1.0)
    found = permutation_test(
        (signs, -signs),
        swapped,
        permutation_type="samples",
        n_resamples=SWAPS,
        batch=max(1, BATCH // len(signs)),
        alternative="greater",
        vectorized=True,
        rng=np.random.default_rng(seed),
    )
    return Significance("randomisation", float(found.pvalue))


def holm(p: Sequence[float]) -> list[float]:
    """P-values corrected by Holm's method, which bounds the chance that any of those below a limit is a false positive
    by that limit.
    """
    order = np.argsort(p, kind="stable")
    steps = np.maximum.accumulate(np.array(p)[order] * np.arange(len(p), 0, -1))
    found = np.empty(len(p))
    found[order] = np.minimum(steps, 1.0)
    return [float(value) for value in found]


def tests_in_words(used: Iterable[Significance]) -> str:
    """The tests that some p-values come from, in words."""
    names = {one.test for one in used}
    return " or ".join(text for name, text in TESTS.items() if name in names)


def record(pair: Pair) -> Record:
    """The number of instances on which B's score is higher than A's, lower, or equal.

    Raises:
        ValueError: as in `difference`.
    """
    _check([pair])
    a, b = pair.a.worth(pair.a.rows), pair.b.worth(pair.b.rows)
    even = np.isclose(a, b, rtol=EQUAL, atol=0.0)
    wins, losses = int((~even & (b > a)).sum()), int((~even & (b < a)).sum())
    return Record(wins, losses, len(even) - wins - losses)


def _interval(pair: Pair, seed: Sequence[int]) -> Interval | None:
    if pair.right_or_wrong:
        return _of_proportions(record(pair))
    parts = pair.a.rows.shape[1]
    rows = np.concatenate([pair.a.rows, pair.b.rows], axis=1)
    return bootstrap(rows, lambda sums: pair.b.worth(sums[..., parts:]) - pair.a.worth(sums[..., :parts]), seed=seed)


def _of_proportions(found: Record) -> Interval:
    """The interval of the difference of two proportions of the same instances, after Bonett and Price: with one win and
    one loss more than were found."""
    from scipy.stats import norm

    count = found.wins + found.losses + found.ties + 2
    won, lost = (found.wins + 1) / count, (found.losses + 1) / count
    reach = float(norm.ppf((1 + LEVEL) / 2) * np.sqrt((won + lost - (won - lost) ** 2) / count))
    return Interval(max(-1.0, won - lost - reach), min(1.0, won - lost + reach))


def _check(pairs: Sequence[Pair]) -> None:
    if not pairs or any(pair.a.rows.shape != pair.b.rows.shape or not len(pair.a.rows) for pair in pairs):
        raise ValueError("paired runs: expected one dataset or more, and the same instances of each in both runs")
