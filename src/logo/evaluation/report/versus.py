"""One run against another on the instances that both have answered, and the marks of the best in tables.

A report may hold runs with different prompts, so instances are matched by their prompts. Every number is computed once,
so a pair of runs has one p-value everywhere.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from logo.evaluation.corpus import mean_of
from logo.evaluation.groups import grouped
from logo.evaluation.paired import ALPHA, Pair, Paired, Record, Significance, holm, paired, significance
from logo.evaluation.runs import Run
from logo.evaluation.stored import Result

Mark = Literal["", "best", "tied"]


class Compared(NamedTuple):
    """A line of a table in which runs are compared: their `values` (None: not comparable), on the datasets `names`;
    `metric`: official, None: the primary one."""

    values: Sequence[float | None]
    names: Sequence[str]
    metric: str | None


@dataclass(frozen=True)
class Versus(Paired):
    """Run `b` against run `a` (their places) on the instances that both have answered, primary measures. `datasets`: on
    how many of them b is better, worse, the same."""

    a: int
    b: int
    datasets: Record


@dataclass(frozen=True)
class Pairing:
    """Runs whose results are compared.

    Attributes:
        runs: at least one.
        seed: seed of intervals and tests.
    """

    runs: tuple[Run, ...]
    seed: int = 0
    _known: dict[tuple[object, ...], Significance | None] = field(default_factory=dict, repr=False, compare=False)

    @property
    def datasets(self) -> list[str]:
        """Every dataset of any run, grouped as the paper does."""
        present = dict.fromkeys(name for run in self.runs for name in run.results)
        return [name for names in grouped(present).values() for name in names]

    @property
    def unlike(self) -> list[str]:
        """Datasets whose primary measure is not the same in all runs, so that no comparison holds for them."""
        found = {
            name: {run.results[name].primary for run in self.runs if name in run.results} for name in self.datasets
        }
        return [name for name, primary in found.items() if len(primary) > 1]

    def pairs(self, a: int, b: int, names: Iterable[str], metric: str | None = None) -> list[Pair]:
        """The shared instances of two runs (by index) on these datasets; `metric`: official, None: the primary one."""
        sides = (self.runs[a].results, self.runs[b].results)
        found = [_pair(sides[0][name], sides[1][name], metric) for name in names if all(name in side for side in sides)]
        return [pair for pair in found if pair is not None]

    def significance(self, a: int, b: int, names: Iterable[str], metric: str | None = None) -> Significance | None:
        """The test of two runs on the datasets that both have of these; None where they share no instances."""
        both = tuple(name for name in names if all(name in self.runs[run].results for run in (a, b)))
        key = self._key(a, b, both, metric)
        if key not in self._known:
            pairs = self.pairs(a, b, both, metric)
            self._known[key] = significance(pairs, seed=self.seed) if pairs else None
        return self._known[key]

    def _key(self, a: int, b: int, names: Sequence[str], metric: str | None) -> tuple[object, ...]:
        """What a comparison asks, the same for the same instances and measure."""
        if metric is None:
            primary = {run.results[name].primary for run in self.runs for name in names if name in run.results}
            metric = primary.pop() if len(primary) == 1 else None
        return a, b, tuple(names), metric

    def marks(self, lines: Sequence[Compared]) -> list[list[Mark]]:
        """The best of the runs in every line.

        A run is `best` if it has the highest value and is significantly better than every other run of the line. Where
        none is, `tied` are the run with the highest value and all that are not significantly worse, or have answered
        other instances, so that no test covers what the values are of. If all values are equal, none is marked. The
        best is known only from the data, and several lines are looked at, so p-values are corrected by Holm's method
        for all pairs of runs in all lines together, and on all datasets.
        """
        corrected = self._corrected(lines)
        return [self._marks(line, corrected) for line in lines]

    def _corrected(self, lines: Sequence[Compared]) -> dict[tuple[object, ...], float]:
        """The p-values of all pairs of runs, on all datasets and in these lines, corrected together."""
        runs = range(len(self.runs))
        tests = {
            self._key(a, b, self.datasets, None): found.p
            for a, b in itertools.combinations(runs, 2)
            if (found := self.significance(a, b, self.datasets)) is not None
        }
        for values, names, metric in lines:
            for a, b in itertools.combinations([run for run in runs if values[run] is not None], 2):
                if self._same(a, b, names, metric):
                    found = self.significance(a, b, names, metric)
                    tests[self._key(a, b, names, metric)] = 1.0 if found is None else found.p
        return dict(zip(tests, holm(list(tests.values())), strict=True))

    def _marks(self, line: Compared, corrected: Mapping[tuple[object, ...], float]) -> list[Mark]:
        marks: list[Mark] = ["" for _ in line.values]
        present = [(value, run) for run, value in enumerate(line.values) if value is not None]
        if len({value for value, _ in present}) < 2:
            return marks
        _, top = max(present, key=lambda one: (one[0], -one[1]))
        others = [run for _, run in present if run != top]
        asked = {run: (min(top, run), max(top, run), line.names, line.metric) for run in others}
        tied = [run for run in others if not self._same(*asked[run]) or corrected[self._key(*asked[run])] >= ALPHA]
        marks[top] = "tied" if tied else "best"
        for run in tied:
            marks[run] = "tied"
        return marks

    def versus(self, lines: Sequence[Compared] = ()) -> list[Versus]:
        """Every later run against every earlier one, where they share instances.

        Args:
            lines: shown beside them; p-values are corrected for these as well.
        """
        every = itertools.combinations(range(len(self.runs)), 2)
        tests = {(a, b): test for a, b in every if (test := self.significance(a, b, self.datasets)) is not None}
        pairs = [self.pairs(a, b, self.datasets) for a, b in tests]
        found = paired(pairs, seed=self.seed, known=list(tests.values()))
        corrected = self._corrected(lines)
        return [
            Versus(
                one.difference,
                one.record,
                one.significance,
                corrected[self._key(a, b, self.datasets, None)],
                a=a,
                b=b,
                datasets=_datasets_won(some),
            )
            for (a, b), some, one in zip(tests, pairs, found, strict=True)
        ]

    def _same(self, a: int, b: int, names: Sequence[str], metric: str | None) -> bool:
        """Whether two runs have answered the same instances, which the test of the shared ones then covers. Datasets
        that are judged by other metrics than this one count in neither run."""
        shared = sum(len(pair.a.rows) for pair in self.pairs(a, b, names, metric))
        sides = [[self.runs[run].results[name] for name in names if name in self.runs[run].results] for run in (a, b)]
        asked = [sum(len(one) for one in side if metric is None or metric in one.measures) for side in sides]
        return asked == [shared, shared]


def shared_rows(a: Result, b: Result) -> tuple[list[int], list[int]]:
    """The indices of the instances that two results share, parallel.

    Instances are equal if prompt and gold texts are equal. Without prompts, the index decides, if both results are
    equally long and not known to come from different files.
    """
    if a.prompts is not None and b.prompts is not None:
        places = {key: place for place, key in enumerate(keys(b))}
        both = [(place, places[key]) for place, key in enumerate(keys(a)) if key in places]
        return [place for place, _ in both], [place for _, place in both]
    files = {result.data_sha256 for result in (a, b)} - {None}
    same = len(a) == len(b) and len(files) < 2
    return (list(range(len(a))), list(range(len(a)))) if same else ([], [])


def keys(result: Result) -> list[tuple[object, ...]]:
    """The identity of each of a result's instances, in order; repeated rows are numbered."""
    seen: Counter[tuple[object, ...]] = Counter()
    found: list[tuple[object, ...]] = []
    for prompt in result.prompts or ():
        key = (prompt.key, prompt.golds)
        found.append((*key, seen[key]))
        seen[key] += 1
    return found


def _datasets_won(pairs: Sequence[Pair]) -> Record:
    gaps = [pair.b.value - pair.a.value for pair in pairs]
    wins, losses = sum(gap > 0 for gap in gaps), sum(gap < 0 for gap in gaps)
    return Record(wins, losses, len(gaps) - wins - losses)


def _pair(a: Result, b: Result, metric: str | None) -> Pair | None:
    here, there = shared_rows(a, b)
    if not here or a.primary != b.primary or (metric or a.primary) not in a.measures:
        return None
    name = metric or a.primary
    return Pair(mean_of(a.measures[name][here]), mean_of(b.measures[name][there]))
