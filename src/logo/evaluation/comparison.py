"""Two finished runs side by side: their result folders matched by dataset, rows checked to be the same, compared.

Reads result folders only, neither models nor data. What a difference is and whether it could be chance: see `paired`.
"""

from __future__ import annotations

import fnmatch
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from logo.errors import DataError, StorageError, UsageError, closest
from logo.evaluation.corpus import Corpus, corpora, mean_of
from logo.evaluation.groups import grouped
from logo.evaluation.metrics import Kind, measures, recorded_kind
from logo.evaluation.paired import Difference, Pair, Record, bootstrap, randomisation, record, sign_test
from logo.evaluation.shards import is_shard_folder

EXTRA = "extra."  # before the names of measures beside the official ones, some of which have the same names
_EVALUATED, _PREDICTIONS, _ROWS, _RUN = "eval_results.json", "predictions.json", "rows.json", "run.json"


@dataclass(frozen=True)
class Finished:
    """One dataset of a finished run.

    Attributes:
        dataset: its name.
        folder: where it was read from.
        values: 0 or 1, a BLEU, or the three ROUGE F-measures per instance.
        predictions: parallel to `values`.
        metric: by which answers were judged.
        rows: {"context", "completion", ...} per instance; None where the run did not write them.
        sha256: of the data file; None where the run did not write it.
    """

    dataset: str
    folder: Path
    values: tuple[Any, ...]
    predictions: tuple[str, ...]
    metric: Kind
    rows: tuple[dict[str, Any], ...] | None
    sha256: str | None


@dataclass(frozen=True)
class Compared:
    """One measure of two runs, on a dataset or over the datasets of a group.

    Attributes:
        name: the dataset's or the group's.
        metric: `em`, `bleu`, `rouge-1`, ..., or with `extra.` before it one of `logo.evaluation.corpus`.
        datasets: how many; `rows`: how many instances they have together.
        difference: B less A, each the mean over datasets.
        record: on how many instances B's answer is worth more, less, the same.
        p: two-sided, by approximate randomisation.
        exact_p: of answers that are right or wrong on a single dataset: McNemar's exact test; else None.
    """

    name: str
    metric: str
    datasets: int
    rows: int
    difference: Difference
    record: Record
    p: float
    exact_p: float | None

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        return asdict(self)


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


def read_run(folder: str | os.PathLike[str]) -> dict[str, Finished]:
    """The finished datasets of a run by name: those in the folder, or the one that the folder is.

    Raises:
        DataError: no such folder, no results in it, or a file that is not what it should be.
        StorageError: a file cannot be read.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(
            f"run {str(root)!r}: expected a result folder, found {'a file' if root.exists() else 'nothing'}"
        )
    folders = [root] if (root / _EVALUATED).is_file() else sorted(path.parent for path in root.glob(f"*/{_EVALUATED}"))
    # Hidden folders are half written, shards are parts of a dataset.
    whole = [path for path in folders if not path.name.startswith(".") and not is_shard_folder(path)]
    found = [_read_dataset(path) for path in ([root] if folders == [root] else whole)]
    if not found:
        raise DataError(
            f"run {str(root)!r}: expected {_EVALUATED} in it or in its sub-folders, found none; name a folder below "
            "the --result_dir of `logo evaluate`"
        )
    return {finished.dataset: finished for finished in found}


def compare(a: Mapping[str, Finished], b: Mapping[str, Finished], metrics: str = "", *, seed: int = 0) -> Comparison:
    """Compares two runs on the datasets that both have.

    Args:
        a, b: what `read_run` returned.
        metrics: names or patterns (`rouge-*`, `extra.chrf`), separated by commas; empty: the official ones.
        seed: of the draws.

    Raises:
        DataError: no dataset in common, or other rows in one run than in the other.
        UsageError: a metric that none of the datasets has.
    """
    names = [name for name in a if name in b]
    if not names:
        raise DataError(
            f"no dataset in common: the first run has {_listed(a)}, the second {_listed(b)}; evaluate the same "
            "datasets in both"
        )
    unchecked = [name for name in names if not _same_rows(a[name], b[name])]
    measures = {
        name: _wanted(_pair(a[name], b[name], extra=EXTRA in metrics or "*" in metrics), metrics) for name in names
    }
    if not any(measures.values()):
        known = dict.fromkeys(metric for name in names for metric in _pair(a[name], b[name], extra=True))
        rows = "" if all(a[name].rows or b[name].rows for name in names) else f"; {EXTRA}* need {_ROWS} in a run"
        raise UsageError(
            f"metric {metrics!r}: expected names or patterns of {', '.join(known)}, found no such"
            f"{closest(metrics, known)}{rows}"
        )
    return Comparison(
        datasets=tuple(
            _compared(name, metric, [pair], seed) for name in names for metric, pair in measures[name].items()
        ),
        groups=tuple(
            _compared(group, metric, [measures[name][metric] for name in members], seed)
            for group, metric, members in _groups(measures)
        ),
        only_a=tuple(name for name in a if name not in b),
        only_b=tuple(name for name in b if name not in a),
        unchecked=tuple(unchecked),
    )


# -- comparing ------------------------------------------------------------------------------------------------------


def _compared(name: str, metric: str, pairs: Sequence[Pair], seed: int) -> Compared:
    records = [record(pair) for pair in pairs]
    total = sum(records[1:], records[0])
    right_or_wrong = len(pairs) == 1 and metric in ("em", "em_first", f"{EXTRA}exact_match")
    return Compared(
        name=name,
        metric=metric,
        datasets=len(pairs),
        rows=sum(len(pair.a.rows) for pair in pairs),
        difference=bootstrap(pairs, seed=seed),
        record=total,
        p=randomisation(pairs, seed=seed),
        exact_p=sign_test(total.wins, total.losses) if right_or_wrong else None,
    )


def _pair(a: Finished, b: Finished, *, extra: bool) -> dict[str, Pair]:
    """Every measure that both have, the official ones first."""
    if measures(a.metric) != measures(b.metric):
        raise DataError(
            f"dataset {a.dataset!r}: expected one metric in both runs, found {a.metric} in {a.folder} and {b.metric} "
            f"in {b.folder}; evaluate both with the same --metric"
        )
    sides = [_official(side) | (_extra(side, a.rows or b.rows) if extra else {}) for side in (a, b)]
    return {metric: Pair(sides[0][metric], sides[1][metric]) for metric in sides[0]}


def _official(side: Finished) -> dict[str, Corpus]:
    names = measures(side.metric)
    if side.metric == "rouge":
        return {key: mean_of([value[key] for value in side.values]) for key in names}
    return {names[0]: mean_of([float(value) for value in side.values])}


def _extra(side: Finished, rows: Sequence[Mapping[str, Any]] | None) -> dict[str, Corpus]:
    """The measures beside the official ones; none without the rows, which hold the gold texts."""
    if rows is None:
        return {}
    golds = [_golds(row) for row in rows]
    return {
        EXTRA + name: corpus
        for name, corpus in corpora(side.dataset, side.predictions, golds, metric=side.metric).items()
    }


def _golds(row: Mapping[str, Any]) -> list[str]:
    texts = row["completion"]
    return list(dict.fromkeys([*([texts] if isinstance(texts, str) else texts), *row.get("references", ())]))


def _wanted(pairs: Mapping[str, Pair], metrics: str) -> dict[str, Pair]:
    patterns = [item.strip() for item in metrics.split(",") if item.strip()]
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


def _same_rows(a: Finished, b: Finished) -> bool:
    """True when the rows are known to be the same, False when nobody can tell.

    Raises:
        DataError: they are not.
    """
    found = ""
    if len(a.values) != len(b.values):
        found = f"{len(a.values)} and {len(b.values)} rows"
    elif a.rows is not None and b.rows is not None:
        differing = [
            number
            for number, (x, y) in enumerate(zip(a.rows, b.rows, strict=True), start=1)
            if (x["context"], _golds(x)) != (y["context"], _golds(y))
        ]
        if not differing:
            return True
        found = f"row {differing[0]} differs" + (f" and {len(differing) - 1} more" if differing[1:] else "")
    elif a.sha256 is not None and b.sha256 is not None:
        if a.sha256 == b.sha256:
            return True
        found = f"data files with sha256 {a.sha256[:12]}... and {b.sha256[:12]}..."
    if found:
        raise DataError(
            f"dataset {a.dataset!r}: expected the same rows in both runs, found {found}; evaluate both on the same "
            f"data with the same --limit ({a.folder}, {b.folder})"
        )
    return False


# -- reading --------------------------------------------------------------------------------------------------------


def _read_dataset(folder: Path) -> Finished:
    values, predictions = _read(folder / _EVALUATED, list), _read(folder / _PREDICTIONS, list)
    rows = _read(folder / _ROWS, list) if (folder / _ROWS).exists() else None
    run = _read(folder / _RUN, dict) if (folder / _RUN).exists() else {}
    data = run.get("dataset", {})
    name = str(data.get("name", folder.resolve().name))
    metric = recorded_kind(run, name)
    number = dict if metric == "rouge" else (int, float)
    if not values or not all(isinstance(value, number) for value in values):
        raise DataError(f"{folder / _EVALUATED}: expected one value per row as `logo evaluate` writes them")
    for file, found in ((_PREDICTIONS, predictions), (_ROWS, rows)):
        if found is not None and len(found) != len(values):
            raise DataError(f"{folder / file}: expected {len(values)} entries as in {_EVALUATED}, found {len(found)}")
    return Finished(name, folder, tuple(values), tuple(predictions), metric, rows and tuple(rows), data.get("sha256"))


def _read(file: Path, kind: type) -> Any:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{file}: expected a file beside {_EVALUATED}, found none") from None
    except OSError as error:
        raise StorageError(f"{file}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise DataError(f"{file}: not JSON ({error}); evaluate again to write it") from None
    if not isinstance(content, kind):
        raise DataError(f"{file}: expected a JSON {'list' if kind is list else 'object'}, found another value")
    return content


def _listed(run: Mapping[str, Finished], most: int = 3) -> str:
    names = list(run)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
