"""Where the results of one dataset go, and what is in them.

Seven JSON files per dataset, six of them as the official script writes them and `run.json` with everything one needs
to do the run again. They appear together or not at all: see `folders.replace_folder`.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path, PurePath
from typing import Any

from logo.evaluation.folders import check_writable, replace_folder
from logo.evaluation.runner import DatasetResult

__all__ = ["RESULT_FILES", "check_writable", "result_files", "result_folder", "run_record", "versions", "write_results"]

RESULT_FILES = (
    "eval_results.json",
    "predictions.json",
    "selected_loras.json",
    "weights.json",
    "metric_dict.json",
    "time_dict.json",
    "run.json",
)

_SECRETS = frozenset({"token", "hf_token", "auth_token", "api_key", "password", "secret"})
_DISTRIBUTIONS = {  # key in run.json: distribution
    "logo": "lora-on-the-go",
    "torch": "torch",
    "transformers": "transformers",
    "huggingface_hub": "huggingface_hub",
    "nltk": "nltk",
    "rouge_score": "rouge_score",
}


def result_folder(
    result_dir: str | PurePath, base_model: str | PurePath, strategy: str, k: int, seed: int, dataset: str
) -> Path:
    """`{result_dir}/{base}_selection_{strategy}_n_{k}_seed_{seed}/{dataset}`, base being the last part of the model's
    Hub id, folder (a slash at its end does not matter) or name."""
    base = PurePath(base_model).name
    if base in ("", ".."):  # '.', '..', 'models/..': the folder's own name says more
        base = Path(base_model).resolve().name or "model"
    return Path(result_dir) / f"{base}_selection_{strategy}_n_{k}_seed_{seed}" / dataset


def result_files(
    result: DatasetResult, *, strategy: str, loading_seconds: float, run: Mapping[str, object]
) -> dict[str, object]:
    """The content of the seven files by name.

    Args:
        strategy: the signal's name, the one key of `metric_dict.json`.
        loading_seconds: wall time of loading the model and the pool.
        run: what `run_record` returned; the names of the score columns are added to it.
    """
    return {
        "eval_results.json": result.eval_results,
        "predictions.json": result.predictions,
        "selected_loras.json": result.selected,
        "weights.json": result.weights,
        "metric_dict.json": {strategy: result.scores},
        "time_dict.json": {"loading": loading_seconds, **result.seconds},
        "run.json": {**run, "score_columns": result.scored},
    }


def write_results(folder: str | PurePath, files: Mapping[str, object]) -> None:
    """Write the files into the folder, all or none. An earlier result there stays until the new one is complete; files
    of other names (notes, plots) are kept.

    Raises:
        StorageError: the folder cannot be written or the disk is full; nothing has changed then.
        TypeError, ValueError: a content that JSON cannot hold; nothing was touched.
    """
    texts = {name: json.dumps(content, indent=2 if name == "run.json" else None) for name, content in files.items()}
    replace_folder(Path(folder), texts, owned=RESULT_FILES)


def run_record(
    *,
    options: Mapping[str, object],
    pool: Mapping[str, str],
    dataset: str,
    data_file: str | PurePath,
    data_sha256: str,
    rows: int,
    device: str,
    started: datetime,
    seconds: float,
) -> dict[str, object]:
    """What `run.json` holds: enough to do the run again and to see that it was the same one.

    Args:
        options: every option by name; those that carry a secret (`token`, ...) are left out, and values that JSON
            does not know are written as text.
        pool: sha256 by adapter name, in pool order.
        data_file: the dataset's file; `data_sha256`: its digest when the rows were read.
        rows: how many were evaluated.
        device: in words, for example `cuda:0 (NVIDIA H100)` or `cpu`.
        started: when this dataset began, with a time zone; `seconds`: how long it took.
    """
    kept = {name: value for name, value in options.items() if name.strip("-").replace("-", "_") not in _SECRETS}
    plain: dict[str, Any] = json.loads(json.dumps(kept, default=str))
    return {
        "date": started.astimezone(timezone.utc).isoformat(timespec="seconds"),
        "duration": seconds,
        "dataset": {"name": dataset, "file": str(data_file), "sha256": data_sha256, "rows": rows},
        "options": plain,
        "pool": dict(pool),
        "device": device,
        "versions": versions(),
    }


def versions() -> dict[str, str | None]:
    """Of what a result stands on, read from the installed distributions, so that nothing heavy is imported; None where
    one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "platform": platform.platform()}
    for key, distribution in _DISTRIBUTIONS.items():
        try:
            found[key] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            found[key] = None
    return found
