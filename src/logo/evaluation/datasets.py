"""The datasets of a folder, each with its rows, its metric and its training rows: one loader for all that reads rows.

A folder has one of two layouts. In the official one a dataset is `{folder}/{main}/{sub}/test.jsonl`, with training rows
in `train.jsonl` beside it, and is called `main.sub` (the first dot separates, `sub` may hold more of them). In a flat
one it is `{folder}/NAME.jsonl`, where NAME may be a path, as adapters are named by theirs. `logo.rows` describes a
line. `metric: NAME` in a YAML file beside the rows, of the same name, declares how answers are judged.

In a flat folder, files of folders that hold a result (`run.json`) or an adapter (`adapter_config.json`) are no rows.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path

from logo.errors import DataError, StorageError, UsageError, closest, listed
from logo.evaluation.metrics import OFFICIAL_KINDS, Kind, checked_kind, metric_kind
from logo.rows import Row, passed_over, read_rows, requested, row_files, unread, why_passed_over

OFFICIAL: tuple[str, ...] = (
    "bbh.boolean_expressions", "bbh.causal_judgement", "bbh.formal_fallacies", "bbh.navigate", "bbh.object_counting",
    "bbh.sports_understanding", "bbh.web_of_lies", "bbh.word_sorting",
    "wmt14.fr-en", "wmt14.en-fr", "wmt16.de-en", "wmt16.en-de", "wmt16.ro-en", "wmt16.en-ro",
    "gem.common_gen", "gem.dart", "gem.e2e_nlg", "gem.web_nlg", "ai2_arc.ARC-Challenge", "ai2_arc.ARC-Easy",
    "nq.natural-questions", "tqa.rc", "anli.r1", "anli.r2", "anli.r3", "glue.qnli",
)  # fmt: skip
"""The names of the official dataset list, in its order."""


@dataclass(frozen=True)
class Dataset:
    """The rows of one dataset.

    Attributes:
        name: `main.sub`, or in a flat folder the path without `.jsonl`; the name of its adapter, if there is one.
        file: the file of the rows.
        rows: those that were asked for.
        metric: how answers are judged.
        train_file: the file of the training rows, which need not exist; None if there is none.
        wording: how its prompts are worded, where a study has the same tasks in several wordings.
    """

    name: str
    file: Path
    rows: tuple[Row, ...]
    metric: Kind = "em"
    train_file: Path | None = None
    wording: str = ""

    @cached_property
    def train(self) -> tuple[Row, ...]:
        """The training rows, for methods that learn from them. They are read once, so that a run records those that it
        has used, even if the file changes meanwhile.

        Raises:
            UsageError: no folder of them was named.
            DataError: there is no such file, or it has a malformed line.
        """
        needs = f"dataset {self.name!r}: the method learns from training rows"
        if self.train_file is None:
            raise UsageError(f"{needs}; name a folder that has {self.name}.jsonl with --train-rows")
        if not self.train_file.is_file():
            raise DataError(
                f"{needs}, expected the file {self.train_file}, found none; --train-rows names another folder"
            )
        return tuple(read_rows(self.train_file))


def dataset_file(data_dir: str | os.PathLike[str], dataset: str, split: str = "test") -> Path:
    """The file that holds a dataset's rows; it need not exist.

    Raises:
        DataError: the name is not `main.sub`, or would lead out of the data folder.
    """
    main, _, sub = dataset.partition(".")
    if not main or not sub or sub.startswith(".") or any(part in dataset for part in ("/", "\\", "\0")):
        raise DataError(
            f"dataset {dataset!r}: expected a name like 'bbh.navigate' (folder, dot, sub-folder, no slash), "
            f"which is the file {Path(data_dir) / 'bbh' / 'navigate' / f'{split}.jsonl'}"
        )
    return Path(data_dir) / main / sub / f"{split}.jsonl"


def find_datasets(
    folder: str | os.PathLike[str],
    request: str = "",
    *,
    limit: int | None = None,
    metrics: Mapping[str, Kind] | None = None,
    official: bool = False,
    train_rows: str | os.PathLike[str] | None = None,
    answers: bool = True,
) -> list[Dataset]:
    """The datasets that a request means, every line of them checked: official names in the official order, then the
    others sorted; a list keeps its own order. Warns of official datasets that a pattern meant, if only some are there,
    and of files that are passed over.

    Args:
        request: names, patterns (`bbh.*`) or first parts of names (`bbh`), separated by commas; empty: all.
        limit: only the first rows of each; training rows are not limited.
        metrics: as `metric_choices` reads them; of other datasets, the one declared beside the rows, else by the
            dataset's name.
        official: use the official script's form of each metric (`metrics.OFFICIAL_KINDS`) that is not in `metrics`.
        train_rows: folder of `NAME.jsonl` with training rows, instead of `train.jsonl` beside `test.jsonl`.
        answers: False: rows may be prompts without gold texts.

    Raises:
        DataError: no such folder or dataset, nothing found, or a malformed line (names the file and the line).
        StorageError: a file cannot be read.
        UsageError: a limit below 1, a list without a name in it, or a metric for a dataset that is not among them.
    """
    root = Path(folder)
    files, official_layout = dataset_files(root)
    if train_rows is not None and not official_layout:
        files = _outside(files, root, Path(train_rows))

    def unknown(name: str) -> DataError:
        for mark, skipped in passed_over(root).items():
            if root / f"{name}.jsonl" in skipped:
                return DataError(f"dataset {name!r}: {why_passed_over(root, {mark: skipped})}")
        there = f"there are {listed([*files], 5)}; `logo data prepare` fetches official ones"
        return DataError(f"dataset {name!r}: not in {root}{closest(name, files)}; {there}")

    if request and not request.replace(",", " ").strip():
        raise UsageError(f"datasets {request!r}: expected names separated by commas, found none")
    names = requested(request, files, unknown)
    _warn_of_unread(root, request, files, official_layout, train_rows)
    chosen = chosen_metrics(names, metrics) if metrics else {}
    datasets = []
    for name in names:
        file = files[name]
        usual = declared_metric(file) or metric_kind(name)
        if official:
            usual = OFFICIAL_KINDS.get(usual, usual)
        train_file = file.with_name("train.jsonl") if official_layout else None
        if train_rows is not None:
            train_file = Path(train_rows) / f"{name}.jsonl"
        rows = tuple(read_rows(file, limit, answers=answers))
        datasets.append(Dataset(name, file, rows, chosen.get(name, usual), train_file))
    return datasets


def _outside(files: Mapping[str, Path], root: Path, train_rows: Path) -> dict[str, Path]:
    """The files of a flat folder without those of its training rows, which may lie among the others."""
    learned = train_rows.resolve()
    if learned in (root.resolve(), *root.resolve().parents):
        return dict(files)
    return {name: file for name, file in files.items() if learned not in file.resolve().parents}


def _warn_of_unread(
    root: Path,
    request: str,
    files: Mapping[str, Path],
    official_layout: bool,
    train_rows: str | os.PathLike[str] | None,
) -> None:
    """Warns of official datasets that are meant and not there, and where all are meant, of files that may hold rows and
    are not read."""
    missing = _missing(request, files) if official_layout else []
    if missing:
        warnings.warn(f"not in {root}, left out: {', '.join(missing)}", UserWarning, stacklevel=3)
    if request:
        return
    skipped = {} if official_layout else passed_over(root)
    if skipped:
        warnings.warn(f"{root}: {why_passed_over(root, skipped)}", UserWarning, stacklevel=3)
    read = {path.parent if official_layout else path for path in files.values()}
    if train_rows is not None:
        read.add(Path(train_rows))
    where = "main/sub/test.jsonl, without a dot in main" if official_layout else "NAME.jsonl"
    elsewhere = unread(root, read)
    if elsewhere:
        warnings.warn(
            f"{root}: {listed(elsewhere)} not read: here rows are in files {where}", UserWarning, stacklevel=3
        )


# -- metrics that the user names ---------------------------------------------------------------------------------------

ALL_DATASETS = "*"


def metric_choices(texts: Sequence[str] | None, where: str = "--metric") -> dict[str, Kind]:
    """The metrics that a user names, by the datasets that they are for: of `["bleu", "nq=em_first"]` it is
    `{"*": "bleu", "nq": "em_first"}`.

    Raises:
        UsageError: there is no such metric, or two are for the same datasets.
    """
    choices: dict[str, Kind] = {}
    for text in texts or ():
        datasets, equals, name = text.rpartition("=")
        meant = datasets.strip() if equals else ALL_DATASETS
        kind = checked_kind(name.strip(), where)
        if choices.setdefault(meant, kind) != kind:
            expected = f"one metric for {'all datasets' if meant == ALL_DATASETS else meant}"
            both = f"{choices[meant]} and {kind}"
            raise UsageError(f"{where}: expected {expected}, found {both}; DATASET=METRIC is for some datasets")
    return choices


def chosen_metrics(names: Sequence[str], choices: Mapping[str, Kind], where: str = "--metric") -> dict[str, Kind]:
    """The metric of each dataset for which the user names one; what is said of some datasets counts more than what is
    said of all, and of what is said of some, the last.

    Args:
        names: of all datasets.
        choices: as `metric_choices` reads them: metrics by names, patterns (`bbh.*`) or first parts of names (`bbh`).

    Raises:
        UsageError: a metric for datasets that are not there.
    """

    def unknown(name: str) -> UsageError:
        there = f"there are {listed(list(names), 5)}"
        return UsageError(f"{where} {name}=...: expected a dataset, found {name!r}{closest(name, names)}; {there}")

    chosen = dict.fromkeys(names, choices[ALL_DATASETS]) if ALL_DATASETS in choices else {}
    for datasets, kind in choices.items():
        if datasets != ALL_DATASETS:
            chosen |= dict.fromkeys(requested(datasets, names, unknown), kind)
    return chosen


# -- files -------------------------------------------------------------------------------------------------------------


def dataset_files(root: Path) -> tuple[dict[str, Path], bool]:
    """The files of a folder's datasets by name, in order, and whether its layout is the official one. Hidden files are
    passed over, and so are folders that no name can reach.

    Raises:
        DataError: no such folder, or no such file in it.
    """
    paths = [(path.parent.parent.name, path.parent.name, path) for path in root.glob("*/*/test.jsonl")]
    nested = {f"{main}.{sub}": path for main, sub, path in paths if "." not in main and sub[0] != "."}
    if nested:
        order = [*(name for name in OFFICIAL if name in nested), *sorted(nested.keys() - {*OFFICIAL})]
        return {name: nested[name] for name in order}, True
    rows = [path for path in row_files(root) if path.suffix == ".jsonl"]
    flat = dict(sorted((path.relative_to(root).as_posix().removesuffix(".jsonl"), path) for path in rows))
    if not flat:
        expected = 'expected NAME.jsonl or {main}/{sub}/test.jsonl with lines {"context": ..., "completion": ...}'
        skipped = passed_over(root)
        if skipped:
            raise DataError(f"{str(root)!r}: {expected}, found none: {why_passed_over(root, skipped)}")
        raise DataError(
            f"{str(root)!r}: {expected}, found {_content(root)}; `logo data prepare` writes those of the paper"
        )
    return flat, False


def _content(root: Path) -> str:
    """What there is in place of a folder of rows, in words."""
    if root.is_dir():
        return listed(sorted(path.name for path in root.iterdir()), 5) or "no files"
    return "a file" if root.exists() else "nothing"


def _missing(request: str, there: Collection[str]) -> list[str]:
    """The official names that a request's patterns mean and that are not there; none if no official name is there."""
    patterns = [pattern.strip() for pattern in request.split(",") if pattern.strip()] or ["*"]
    meant = [
        name
        for name in OFFICIAL
        if any(fnmatchcase(name, pattern) or name.partition(".")[0] == pattern for pattern in patterns)
    ]
    return [name for name in meant if name not in there] if any(name in there for name in meant) else []


def declared_metric(file: Path) -> Kind | None:
    """The metric that is declared beside a file of rows: `metric: rouge` in NAME.yaml beside NAME.jsonl; None: none.

    Raises:
        DataError: the file holds something else.
        StorageError: it cannot be read.
    """
    import yaml

    beside = file.with_suffix(".yaml")
    try:
        content = yaml.safe_load(beside.read_bytes()) if beside.exists() else {}
    except OSError as error:
        raise StorageError(f"{beside}: cannot be read ({error.strerror or error}); check its permissions") from error
    except yaml.YAMLError as error:
        raise DataError(f"{beside}: expected 'metric: NAME', found invalid YAML: {error}") from None
    if content == {}:
        return None
    if not isinstance(content, dict) or set(content) != {"metric"}:
        raise DataError(f"{beside}: expected 'metric: NAME' and nothing else, found {str(content)[:60]!r}")
    try:
        return checked_kind(content["metric"], str(beside))
    except UsageError as error:
        raise DataError(str(error)) from None
