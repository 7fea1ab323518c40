"""The result files of one dataset: their folder and their content.

There are nine JSON files per dataset: six that the official script also writes, `run.json` with everything needed to
repeat the run, `rows.json` with the answered rows, so that a report needs no data folder, and `metrics.json` with the
scores of all answers together. They appear together or not at all: see `logo.files.new_folder`.
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path, PurePath
from typing import Any

from logo import __version__
from logo.errors import StorageError, UsageError
from logo.evaluation.corpus import extra_metrics, mean_of
from logo.evaluation.metrics import Kind, by_measure, mean, metric_kind
from logo.evaluation.runner import DatasetResult
from logo.files import new_folder
from logo.identity import fingerprint
from logo.recorded import without_secrets
from logo.rows import Row

_RUN_NAME = re.compile(r"[^\W_]([\w.+=-]{0,62}[^\W_])?")
LOGO = "logo"  # the method that is not a baseline

RESULT_FILES = (
    "eval_results.json",
    "predictions.json",
    "selected_loras.json",
    "weights.json",
    "metric_dict.json",
    "time_dict.json",
    "run.json",
    "rows.json",
    "metrics.json",
)
_INDENTED = frozenset({"run.json", "metrics.json"})  # for reading; the others are as the official script writes them

_LIBRARIES = ("torch", "transformers", "huggingface_hub", "nltk", "rouge_score", "sacrebleu")  # in run.json


def run_folder(
    result_dir: str | PurePath,
    base_model: str | PurePath,
    strategy: str,
    k: int,
    seed: int,
    method: str = LOGO,
    run_name: str | None = None,
) -> Path:
    """`{result_dir}/{base}_selection_{strategy}_n_{k}_seed_{seed}`, base being the last part of the model's Hub id,
    folder (a slash at its end does not matter) or name. With another method it is
    `{base}_method_{method}_n_{k}_seed_{seed}`; a run's own name follows after `_`.

    Raises:
        UsageError: the run's name cannot be part of a folder's name.
    """
    if run_name is not None and not _RUN_NAME.fullmatch(run_name):
        raise UsageError(
            f"--run-name {run_name!r}: expected up to 64 letters, digits and any of . _ - + = , beginning and ending "
            "with a letter or a digit"
        )
    base = PurePath(base_model).name
    if base in ("", ".."):  # '.', '..', 'models/..': the folder's own name says more
        base = Path(base_model).resolve().name or "model"
    chosen = f"selection_{strategy}" if method == LOGO else f"method_{method}"
    own = "" if run_name is None else f"_{run_name}"
    return Path(result_dir) / f"{base}_{chosen}_n_{k}_seed_{seed}{own}"


def result_files(
    result: DatasetResult,
    rows: Sequence[Row],
    *,
    strategy: str,
    loading_seconds: float,
    run: Mapping[str, object],
    seed: int = 0,
) -> dict[str, object]:
    """The content of all files by name.

    Args:
        rows: that were answered, parallel to the result.
        strategy: the signal's name, the one key of `metric_dict.json`.
        loading_seconds: wall time of loading the model and the pool.
        run: what `run_record` returned; the names of the score columns are added to it, and how many rows' mixtures
            were folded or gated.
        seed: of the intervals in `metrics.json`.
    """
    return {
        "eval_results.json": result.eval_results,
        "predictions.json": result.predictions,
        "selected_loras.json": result.selected,
        "weights.json": result.weights,
        "metric_dict.json": {strategy: result.scores},
        "time_dict.json": {"loading": loading_seconds, **result.seconds},
        "run.json": {**run, "score_columns": result.scored, "forms": result.forms},
        "rows.json": [row.as_dict() for row in rows],
        "metrics.json": metrics_record(result, [row.golds for row in rows], seed=seed),
    }


def metrics_record(result: DatasetResult, golds: Sequence[Sequence[str]], *, seed: int = 0) -> dict[str, object]:
    """What `metrics.json` holds: means of the official metric and the measures of `logo.evaluation.corpus`, each with
    its 95 % interval as far as it has one, the rows that have no answer, and how sure each selection was where that is
    known.

    Args:
        golds: all gold texts of each row.
        seed: of the intervals that are drawn.
    """
    columns = by_measure(result.metric, result.eval_results)
    intervals = {key: mean_of(column).interval(seed=[seed]) for key, column in columns.items()}
    extra = extra_metrics(result.dataset, result.predictions, golds, metric=result.metric, seed=seed)
    return {
        "official": mean(result.metric, result.eval_results),
        "official_intervals": {key: interval for key, interval in intervals.items() if interval is not None},
        "extra": extra.values,
        "extra_intervals": extra.intervals,
        "signatures": extra.signatures,
        "errors": [{"index": index, "message": message} for index, message in sorted(result.errors.items())],
        **({"confidence": result.confidences} if result.confidences else {}),
    }


def write_results(folder: str | PurePath, files: Mapping[str, object]) -> None:
    """Write the files into the folder, all or none. An earlier result there stays until the new one is complete; files
    of other names (notes, plots) are kept.

    Raises:
        StorageError: the folder cannot be written or the disk is full; nothing has changed then.
        TypeError, ValueError: a content that JSON cannot hold; nothing was touched.
    """
    texts = {name: json.dumps(content, indent=2 if name in _INDENTED else None) for name, content in files.items()}
    with new_folder(Path(folder), replaced=RESULT_FILES) as new:
        for name, text in texts.items():
            (new / name).write_bytes(text.encode())


def read_results(folder: str | PurePath) -> dict[str, Any]:
    """The content of a folder's result files by name; other files are ignored.

    Raises:
        StorageError: a file is missing or cannot be read.
    """
    files = {}
    for name in RESULT_FILES:
        file = Path(folder) / name
        try:
            files[name] = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise StorageError(
                f"result {str(folder)!r}: expected the file {name}, found none; answer it again with --overwrite"
            ) from None
        except (OSError, ValueError) as error:
            raise StorageError(
                f"result {str(folder)!r}: {name} cannot be read ({error}); answer it again with --overwrite"
            ) from None
    return files


def run_record(
    *,
    options: Mapping[str, object],
    pool: Mapping[str, str],
    dataset: str,
    metric: Kind | None = None,
    data_file: str | PurePath,
    data_sha256: str,
    rows: int,
    device: str,
    started: datetime,
    seconds: float,
    identity: Mapping[str, object] | None = None,
    found_out: Mapping[str, object] | None = None,
    environment: Mapping[str, object] | None = None,
) -> dict[str, object]:
    """The content of `run.json`: enough to repeat the run and to recognise it.

    Args:
        options: every option by name; those that carry a secret (`token`, ...) are left out, and values that JSON
            does not know are written as text.
        pool: sha256 by adapter name, in pool order.
        metric: by which the dataset was judged; None: by its name.
        data_file: the dataset's file; `data_sha256`: its digest when the rows were read.
        rows: how many were evaluated.
        device: in words, for example `cuda:0 (NVIDIA H100)` or `cpu`.
        started: when this dataset began, with a time zone; `seconds`: how long it took.
        identity: what the results depend on (`logo.evaluation.identity`); with the pool it makes the fingerprint by
            which the same run is known again.
        found_out: what the method found out about the dataset before its first prompt.
        environment: what the rows were answered on, see `logo.evaluation.identity.environment`.
    """
    plain: dict[str, Any] = without_secrets(json.loads(json.dumps(dict(options), default=str)))
    return {
        "date": started.astimezone(timezone.utc).isoformat(timespec="seconds"),
        "duration": seconds,
        "dataset": {"name": dataset, "file": str(data_file), "sha256": data_sha256, "rows": rows},
        "metric": metric or metric_kind(dataset),
        "options": plain,
        "pool": dict(pool),
        "identity": dict(identity or {}),
        "fingerprint": fingerprint({**(identity or {}), "pool": dict(pool)}),
        "found_out": dict(found_out or {}),
        "environment": dict(environment or {}),
        "device": device,
        "versions": versions(),
    }


def versions() -> dict[str, str | None]:
    """The versions that a result depends on, from the installed distributions, so that nothing heavy is imported; None
    for one that is not installed.
    """
    found: dict[str, str | None] = {"python": platform.python_version(), "platform": platform.platform()}
    found["logo"] = __version__
    for library in _LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            found[library] = None
    return found
