"""Two finished runs side by side: their results matched by dataset, rows checked to be the same, compared.

Reads result folders only, neither models nor data. What a difference is and whether it could be chance: see `paired`.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from logo.errors import DataError, UsageError, closest, listed
from logo.evaluation.corpus import Corpus, corpora, mean_of
from logo.evaluation.groups import grouped
from logo.evaluation.paired import Pair, Paired, paired
from logo.evaluation.runs import Run
from logo.evaluation.stored import Result
from logo.rows import Row

EXTRA = "extra."  # before the names of measures beside the official ones, some of which have the same names


@dataclass(frozen=True)
class Compared(Paired):
    """One measure of two runs, on a dataset or over the datasets of a group.

    Attributes:
        name: the dataset's or the group's.
        metric: `em`, `bleu`, `rouge-1`, ..., or with `extra.` before it one of `logo.evaluation.corpus`.
        datasets: number of datasets; `rows`: number of their instances together.
    """

    name: str
    metric: str
    datasets: int
    rows: int

    def as_json(self) -> dict[str, Any]:
        """The comparison as JSON, with `test` and `p`."""
        first = {name: getattr(self, name) for name in ("name", "metric", "datasets", "rows")}
        return first | asdict(self) | asdict(self.significance)


@dataclass(frozen=True)
class Comparison:
    """All that two runs have in common.

    Attributes:
        datasets: by dataset and metric; `groups`: by the paper's groups that have two datasets or more with the metric,
            and `all` where there are several groups.
        only_a, only_b: datasets that just one run has.
        unchecked: datasets whose rows could not be compared, because a run wrote neither rows nor a checksum.
    """

    datasets: tuple[Compared, ...]
    groups: tuple[Compared, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    unchecked: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """The comparison as JSON."""
        shown = {name: [one.as_json() for one in getattr(self, name)] for name in ("datasets", "groups")}
        return asdict(self) | shown


def compare(a: Run, b: Run, metrics: str = "", *, seed: int = 0) -> Comparison:
    """Compares two runs on the datasets that both have.

    Args:
        a, b: as `logo.evaluation.runs.read_run` returns them.
        metrics: names or patterns (`rouge-*`, `extra.chrf`), separated by commas; empty: the official ones.
        seed: seed of the intervals and tests.

    Raises:
        DataError: no dataset in common, or different rows in the two runs.
        UsageError: a name or pattern that fits no metric of the datasets.
    """
    ours, theirs = a.results, b.results
    names = [name for name in ours if name in theirs]
    if not names:
        raise DataError(
            f"no dataset in common: the first run has {listed(list(ours))}, the second {listed(list(theirs))}; "
            "evaluate the same datasets in both"
        )
    unchecked = [name for name in names if not _same_rows(ours[name], theirs[name])]
    extra = EXTRA in metrics or "*" in metrics
    measures = {name: _wanted(_pairs(ours[name], theirs[name], extra=extra), metrics) for name in names}
    shown = {metric for pairs in measures.values() for metric in pairs}
    unknown = [one for one in _patterns(metrics) if not any(fnmatch.fnmatchcase(metric, one) for metric in shown)]
    if unknown or not shown:
        known = dict.fromkeys(metric for name in names for metric in _pairs(ours[name], theirs[name], extra=True))
        asked = unknown[0] if unknown else metrics
        rows = all(ours[name].prompts or theirs[name].prompts for name in names)
        raise UsageError(
            f"metric {asked!r}: expected names or patterns of {', '.join(known)}, found none of them"
            f"{closest(asked, known)}{'' if rows else f'; {EXTRA}* need rows.json in a run'}"
        )
    datasets = [(name, metric, [name]) for name in names for metric in measures[name]]
    groups = _groups(measures)
    lines = [*datasets, *groups]
    pairs = [[measures[name][metric] for name in members] for _, metric, members in lines]
    compared = [
        Compared(**vars(one), name=name, metric=metric, datasets=len(some), rows=sum(len(pair.a.rows) for pair in some))
        for (name, metric, _), some, one in zip(lines, pairs, paired(pairs, seed=seed), strict=True)
    ]
    return Comparison(
        datasets=tuple(compared[: len(datasets)]),
        groups=tuple(compared[len(datasets) :]),
        only_a=tuple(name for name in ours if name not in theirs),
        only_b=tuple(name for name in theirs if name not in ours),
        unchecked=tuple(unchecked),
    )


def _pairs(a: Result, b: Result, *, extra: bool) -> dict[str, Pair]:
    """Every measure that both have, the official ones first.

    Raises:
        DataError: they were judged by different metrics.
    """
    if list(a.measures) != list(b.measures):
        raise DataError(
            f"dataset {a.dataset!r}: expected one metric in both runs, found {a.metric} in {a.folder} and {b.metric} "
            f"in {b.folder}; evaluate both with the same --metric"
        )
    prompts = a.prompts or b.prompts
    sides = [
        {name: mean_of(values) for name, values in side.measures.items()}
        | (_extra(side, prompts) if extra and prompts else {})
        for side in (a, b)
    ]
    return {metric: Pair(sides[0][metric], sides[1][metric]) for metric in sides[0] if metric in sides[1]}


def _extra(side: Result, prompts: Sequence[Row]) -> dict[str, Corpus]:
    """The measures beside the official ones, which need the gold texts."""
    golds = [prompt.golds for prompt in prompts]
    found = corpora(side.dataset, side.predictions, golds, metric=side.metric)
    return {EXTRA + name: corpus for name, corpus in found.items()}


def _patterns(metrics: str) -> list[str]:
    return [item.strip() for item in metrics.split(",") if item.strip()]


def _wanted(pairs: Mapping[str, Pair], metrics: str) -> dict[str, Pair]:
    patterns = _patterns(metrics)
    if not patterns:
        return {metric: pair for metric, pair in pairs.items() if not metric.startswith(EXTRA)}
    return {
        metric: pair
        for metric, pair in pairs.items()
        if any(fnmatch.fnmatchcase(metric, pattern) for pattern in patterns)
    }


def _groups(measures: Mapping[str, Mapping[str, Pair]]) -> list[tuple[str, str, list[str]]]:
    """Group, metric, and the datasets in it that have the metric."""
    found = []
    for metric in dict.fromkeys(metric for pairs in measures.values() for metric in pairs):
        groups = grouped(name for name, pairs in measures.items() if metric in pairs)
        everything = [("all", [name for members in groups.values() for name in members])] if len(groups) > 1 else []
        found += [(group, metric, members) for group, members in [*groups.items(), *everything] if len(members) > 1]
    return found


def _same_rows(a: Result, b: Result) -> bool:
    """Whether the rows are known to be the same; False if it is not known whether they are.

    Raises:
        DataError: they are known to differ.
    """
    found = ""
    if len(a) != len(b):
        found = f"{len(a)} and {len(b)} rows"
    elif a.prompts is not None and b.prompts is not None:
        differing = [
            number
            for number, (x, y) in enumerate(zip(a.prompts, b.prompts, strict=True), start=1)
            if (x.key, x.golds) != (y.key, y.golds)
        ]
        if not differing:
            return True
        found = f"row {differing[0]} differs" + (f" and {len(differing) - 1} more" if differing[1:] else "")
    elif a.data_sha256 is not None and b.data_sha256 is not None:
        if a.data_sha256 == b.data_sha256:
            return True
        found = f"data files with sha256 {a.data_sha256[:12]}... and {b.data_sha256[:12]}..."
    if found:
        raise DataError(
            f"dataset {a.dataset!r}: expected the same rows in both runs, found {found}; evaluate both on the same "
            f"data with the same --limit ({a.folder}, {b.folder})"
        )
    return False
