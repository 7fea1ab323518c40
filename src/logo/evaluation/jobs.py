"""What one command evaluates: a `Job` per dataset, its rows read and checked before a model is loaded.

Rows come from a data folder (`logo.evaluation.datasets`) or from a flat folder of `NAME.jsonl` files, as
`logo eval study` takes them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from logo.errors import DataError, StorageError, UsageError
from logo.evaluation.datasets import Found, dataset_file, find_datasets
from logo.evaluation.metrics import Kind, checked_kind, metric_kind, official_kind
from logo.rows import Row, file_sha256, read_rows

if TYPE_CHECKING:
    from logo.baselines.method import Example

DATA_DIR = "./data"


@dataclass(frozen=True)
class Job:
    """One dataset.

    Attributes:
        dataset: its name.
        rows: the requested rows of the dataset.
        metric: the metric of the answers.
        file: the file of the rows; `sha256`: of its bytes.
        folder: the folder of the result.
        train_file: the file of the training rows; None if there is none.
    """

    dataset: str
    rows: tuple[Row, ...]
    metric: Kind
    file: Path
    sha256: str
    folder: Path
    train_file: Path | None = None

    @cached_property
    def train(self) -> tuple[Row, ...]:
        """The training rows, for methods that learn from them. They are read once, so that a run records those that it
        has used, even if the file changes meanwhile.

        Raises:
            UsageError: no folder of training rows was named.
            DataError: the file is missing or has a malformed line.
        """
        if self.train_file is None:
            raise UsageError(
                f"dataset {self.dataset!r}: this method needs training rows; name a folder that has "
                f"{self.dataset}.jsonl with --train-rows"
            )
        if not self.train_file.is_file():
            raise DataError(
                f"dataset {self.dataset!r}: this method needs training rows, expected the file {self.train_file}, "
                "found none; put it there or name another folder with --train-rows"
            )
        return tuple(read_rows(self.train_file))


def find_jobs(
    run_folder: Path,
    request: str = "",
    *,
    data_dir: str | os.PathLike[str] = DATA_DIR,
    rows: str | os.PathLike[str] | None = None,
    train_rows: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    metric: Kind | None = None,
    official: bool = False,
) -> tuple[list[Job], tuple[str, ...]]:
    """The jobs that a request stands for, every row checked, and the official datasets that it meant but did not find.

    Args:
        run_folder: results go into `run_folder / dataset`.
        request: names, a list or patterns, see `find_datasets`; empty: all.
        data_dir: folder of `{main}/{sub}/test.jsonl`.
        rows: a folder of `NAME.jsonl`, one dataset each, instead of `data_dir`.
        train_rows: folder of `NAME.jsonl` with training rows; without it, those of `data_dir` are `train.jsonl`.
        limit: only the first rows of each dataset.
        metric: of all datasets; None: the one declared beside the rows (`declared_metric`), else by the dataset's name.
        official: use the official script's form of each metric (`metrics.official_kind`), unless `metric` is given.

    Raises:
        DataError: no such folder, file or dataset, or a malformed line.
        UsageError: both kinds of folder, or a limit below 1.
    """
    if rows is None:
        found = find_datasets(data_dir, request)
        files = {name: dataset_file(data_dir, name) for name in found.names}
        named = [(name, file, read_rows(file, limit)) for name, file in files.items()]
    else:
        if os.fspath(data_dir) != DATA_DIR:
            raise UsageError(f"--data_dir {data_dir} and --rows {rows}: expected one of them, found both")
        from logo.evaluation.study import find_tasks  # which imports methods, and with them PyTorch

        tasks = find_tasks(rows, request, limit)
        found = Found(tuple(task.name for task in tasks))
        named = [(task.name, task.file, list(task.rows)) for task in tasks]
    jobs = []
    for name, file, some in named:
        train = None
        if train_rows is not None:
            train = Path(train_rows) / f"{name}.jsonl"
        elif rows is None:
            train = dataset_file(data_dir, name, "train")
        kind = metric or declared_metric(file) or metric_kind(name)
        kind = official_kind(kind) if official and metric is None else kind
        jobs.append(Job(name, tuple(some), kind, file, file_sha256(file), run_folder / name, train))
    return jobs, found.missing


def declared_metric(file: Path) -> Kind | None:
    """The metric that a file beside the rows declares: `metric: rouge` in NAME.yaml beside NAME.jsonl; None without
    one.

    Raises:
        DataError: the file holds something else.
        StorageError: it cannot be read.
    """
    import yaml

    beside = file.with_suffix(".yaml")
    try:
        content = yaml.safe_load(beside.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError(f"{beside}: cannot be read ({error.strerror or error}); check its permissions") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{beside}: expected 'metric: NAME', found invalid YAML: {error}") from None
    if not isinstance(content, dict) or set(content) != {"metric"}:
        raise DataError(f"{beside}: expected 'metric: NAME' and nothing else, found {str(content)[:60]!r}")
    try:
        return checked_kind(content["metric"], str(beside))
    except UsageError as error:
        raise DataError(str(error)) from None


def trained_and_tested(job: Job) -> int:
    """The number of training rows whose context is that of a test row."""
    return _shared(job.train, job.rows)


def overlap(where: str, train: Sequence[Example], tested: Sequence[Row], methods: Sequence[str]) -> str:
    """The warning that training rows are test rows, too; "" if none is.

    Args:
        where: what is tested, such as `dataset 'x'`.
        methods: those that choose adapters by them.
    """
    if not (shared := _shared(train, tested)):
        return ""
    return (
        f"{where}: {shared} of {len(train)} training rows are test rows too (they have the same context), and "
        f"{'methods' if methods[1:] else 'method'} {', '.join(map(repr, methods))} chose by them: the result may be "
        "too good"
    )


def _shared(rows: Sequence[Example], tested: Sequence[Row]) -> int:
    contexts = {row.context for row in tested}
    return sum(row.context in contexts for row in rows)
