"""Whether one run is better than another on the same instances: pure functions on arrays.

A measure is a function of sums over instances (see `logo.evaluation.corpus`), so exact match, ROUGE and corpus BLEU are
compared alike. Over several datasets the difference is the mean of the datasets' differences. Two questions are
answered: how large is the difference, by a bootstrap that draws the same instances for both runs; and could it be
chance, by swapping the runs' answers at random, or exactly by the binomial distribution where answers are right or
wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from logo.evaluation.corpus import Corpus
from logo.evaluation.intervals import DRAWS, LEVEL, Values, percentiles, resampled

SWAPS = 10_000
_COUNTS = 2**22  # swaps drawn at once: 32 MB
_EQUAL = 1e-9  # differences that are closer, relative to the larger, are rounding


class Pair(NamedTuple):
    """One measure of two runs on the same instances of one dataset, row by row."""

    a: Corpus
    b: Corpus


@dataclass(frozen=True)
class Difference:
    """How much better run B is than run A, with its percentile interval.

    Attributes:
        a, b: the runs' values; means over datasets where there are several.
        value: b - a.
        low, high: of the value.
        won: the share of draws in which B is better; draws that are equal count half.
    """

    a: float
    b: float
    value: float
    low: float
    high: float
    won: float


@dataclass(frozen=True)
class Record:
    """On how many instances B's answer is worth more than A's, less, and the same."""

    wins: int
    losses: int
    ties: int

    def __add__(self, other: Record) -> Record:
        """Both together."""
        return Record(self.wins + other.wins, self.losses + other.losses, self.ties + other.ties)


def bootstrap(pairs: Sequence[Pair], *, seed: int = 0, draws: int = DRAWS, level: float = LEVEL) -> Difference:
    """The mean over datasets of B's value less A's. A draw takes the same instances for both runs.

    Args:
        pairs: one per dataset; datasets are kept as they are, their instances are drawn, each in its own stream.
        seed: of the draws.
        level: share of the draws inside the interval.

    Raises:
        ValueError: no pairs, or runs of unequal numbers of instances.
    """
    _check(pairs)
    a, b = (float(np.mean([pair[run].value for pair in pairs])) for run in (0, 1))
    drawn = np.zeros(draws)
    for number, pair in enumerate(pairs):
        sums = resampled(np.concatenate([pair.a.rows, pair.b.rows], axis=1), seed=[seed, number], draws=draws)
        parts = pair.a.rows.shape[1]
        drawn += (pair.b.worth(sums[:, parts:]) - pair.a.worth(sums[:, :parts])) / len(pairs)
    drawn[np.abs(drawn) <= _EQUAL * max(abs(a), abs(b))] = 0.0
    low, high = percentiles(drawn, b - a, level)
    return Difference(a, b, b - a, float(low), float(high), float((np.sign(drawn).mean() + 1) / 2))


def randomisation(pairs: Sequence[Pair], *, seed: int = 0, swaps: int = SWAPS) -> float:
    """Two-sided p-value of the difference that `bootstrap` reports, by approximate randomisation.

    If the runs were alike, each instance's two answers could have come from either. So they are swapped with
    probability 1/2, and p is the share of swaps whose difference is at least as large as the one found; that one counts
    as a swap, so p is never 0, and 1 where both runs are worth the same.

    Args:
        pairs: one per dataset.
        seed: of the swaps.
        swaps: how many.

    Raises:
        ValueError: as `bootstrap`.
    """
    _check(pairs)
    found = _mean_difference([(pair, pair.a.rows.sum(axis=0), pair.b.rows.sum(axis=0)) for pair in pairs])
    drawn = np.zeros(swaps)
    for number, pair in enumerate(pairs):
        random = np.random.default_rng([seed, number])
        gap, total = pair.b.rows - pair.a.rows, pair.a.rows.sum(axis=0) + pair.b.rows.sum(axis=0)
        part = max(1, _COUNTS // len(gap))
        for start in range(0, swaps, part):
            size = min(part, swaps - start)
            signs = random.integers(0, 2, (size, len(gap))) * 2.0 - 1.0
            apart = signs @ gap  # B's sums less A's
            first, second = (total - apart) / 2, (total + apart) / 2
            drawn[start : start + size] += (pair.b.worth(second) - pair.a.worth(first)) / len(pairs)
    scale = float(np.mean([abs(pair.a.value) + abs(pair.b.value) for pair in pairs]))
    extreme = np.abs(drawn) >= abs(found) - _EQUAL * scale
    return float((extreme.sum() + 1) / (swaps + 1))


def record(pair: Pair) -> Record:
    """On how many instances B's answer is worth more than A's, each instance taken alone.

    Raises:
        ValueError: as `bootstrap`.
    """
    _check([pair])
    a, b = pair.a.worth(pair.a.rows), pair.b.worth(pair.b.rows)
    even = np.isclose(a, b, rtol=_EQUAL, atol=0.0)
    wins, losses = int((~even & (b > a)).sum()), int((~even & (b < a)).sum())
    return Record(wins, losses, len(even) - wins - losses)


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact p-value of wins against losses under even odds, ties left out; 1 where there are neither.

    Raises:
        ValueError: a negative number.
    """
    if wins < 0 or losses < 0:
        raise ValueError(f"expected numbers of wins and losses, found {wins} and {losses}")
    total = wins + losses
    tail = sum(math.comb(total, count) for count in range(min(wins, losses) + 1))
    return float(min(1.0, 2 * tail / 2**total))  # whole numbers until here: exact for any total


def mcnemar(a: Sequence[int], b: Sequence[int]) -> float:
    """McNemar's exact test of two runs that are right (1) or wrong (0) on each instance: `sign_test` of the instances
    on which just one of them is right.

    Raises:
        ValueError: unequal lengths, or a value that is neither 0 nor 1.
    """
    if len(a) != len(b) or not {*a, *b} <= {0, 1}:
        raise ValueError("McNemar's test: expected as many values of one run as of the other, each 0 or 1")
    return sign_test(sum(x < y for x, y in zip(a, b, strict=True)), sum(x > y for x, y in zip(a, b, strict=True)))


def _mean_difference(sums: Sequence[tuple[Pair, Values, Values]]) -> float:
    return float(np.mean([pair.b.worth(b) - pair.a.worth(a) for pair, a, b in sums]))


def _check(pairs: Sequence[Pair]) -> None:
    if not pairs or any(pair.a.rows.shape != pair.b.rows.shape or not len(pair.a.rows) for pair in pairs):
        raise ValueError("paired runs: expected one dataset or more, and the same instances of each in both runs")
