"""Result folders as values: what runs there are, and one dataset of one run with all its columns checked.

Reads what `logo evaluate` and the official script write. Only the six official files must be there; without `run.json`
a run is known by its folder's name, and score columns by the adapters that were selected from them. Nothing is
computed here beyond that: see `numbers`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from logo.errors import DataError, StorageError, UsageError
from logo.evaluation.datasets import OFFICIAL
from logo.evaluation.intervals import Values
from logo.evaluation.metrics import Value
from logo.evaluation.report.prompts import Prompt, prompts_of
from logo.evaluation.shards import is_shard_folder

MARK = "eval_results.json"  # a folder with this file is the result of one dataset
_NAME = re.compile(r"(?P<base>.+)_(?:selection|method)_(?P<method>.+)_n_(?P<k>\d+)_seed_(?P<seed>\d+)")
_DEPTH = 2  # results/, the run, the dataset
_ROUGE = ("rouge-1", "rouge-2", "rouge-L")


@dataclass(frozen=True)
class Result:
    """One dataset of one run; everything per instance is in dataset order.

    Attributes:
        dataset: its name.
        folder: where it was read.
        values: what each answer is worth.
        predictions: the answers.
        selected: adapters of each, best first; `weights` are parallel to it.
        columns: the adapters that were scored, in pool order.
        scores: (instances, columns); nan where an instance has none.
        seconds: by stage.
        prompts: what was asked, or None; then `no_prompts` says why.
        errors: what went wrong, by instance.
        intervals: (low, high) of the official means where the run has written them.
        extra: the measures beside the official ones, with `extra_intervals` and sacrebleu's `signatures`.
        run: `run.json`, or nothing.
    """

    dataset: str
    folder: Path
    values: tuple[Value, ...]
    predictions: tuple[str, ...]
    selected: tuple[tuple[str, ...], ...]
    weights: tuple[tuple[float, ...], ...]
    columns: tuple[str, ...]
    scores: Values
    seconds: Mapping[str, float]
    prompts: tuple[Prompt, ...] | None
    no_prompts: str = ""
    errors: Mapping[int, str] = field(default_factory=dict)
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    extra: Mapping[str, float] = field(default_factory=dict)
    extra_intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    signatures: Mapping[str, str] = field(default_factory=dict)
    run: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.values)

    @property
    def options(self) -> Mapping[str, Any]:
        """The run's options by name, as far as they were written."""
        options = self.run.get("options")
        return options if isinstance(options, dict) else {}


@dataclass(frozen=True)
class Run:
    """One run folder. `results` by dataset, official names first.

    `base`, `method`, `k` and `seed` are None where neither `run.json` nor the folder's name says.
    """

    folder: Path
    results: Mapping[str, Result]
    base: str | None = None
    method: str | None = None
    k: int | None = None
    seed: int | None = None

    @property
    def options(self) -> Mapping[str, Any]:
        """The first dataset's options."""
        return next(iter(self.results.values())).options


def read_runs(paths: Iterable[Path], data_dir: Path | None = None) -> list[Run]:
    """Every run in the folders, in the order they were named, then by name.

    Args:
        paths: run folders, a folder that holds several, or folders of single datasets.
        data_dir: where prompts are looked for when a result lacks them and `run.json`'s path leads nowhere.

    Raises:
        UsageError: a folder without results in it, or no folder.
        DataError: a file that is missing or not what the official script writes (names the file).
        StorageError: a file that cannot be read.
    """
    folders: dict[Path, dict[Path, None]] = {}  # run -> its datasets, ordered sets
    for path in paths:
        found = list(_found(path))
        if not found:
            raise UsageError(
                f"results {str(path)!r}: expected a folder with {MARK} in it or at most two levels below, as "
                f"`logo evaluate` writes, found {_kind(path)}"
            )
        for folder in found:
            folders.setdefault(folder.parent, {})[folder] = None
    if not folders:
        raise UsageError("no result folder: expected at least one, such as results/")
    return [_run(folder, datasets, data_dir) for folder, datasets in folders.items()]


def read_result(folder: Path, data_dir: Path | None = None) -> Result:
    """One dataset's folder.

    Raises:
        DataError, StorageError: as `read_runs`.
    """
    values = tuple(_value(folder / MARK, index, value) for index, value in enumerate(_list(folder / MARK)))
    if not values:
        raise DataError(f"{folder / MARK}: expected one value per instance, found an empty list")
    if len({_shape(value) for value in values}) > 1:
        raise DataError(f"{folder / MARK}: expected either numbers or ROUGE objects, found both")
    rows = len(values)
    predictions = tuple(str(text) for text in _list(folder / "predictions.json", rows))
    selected = _nested(folder / "selected_loras.json", rows, str)
    weights = _nested(folder / "weights.json", rows, _finite)
    for index, (names, shares) in enumerate(zip(selected, weights, strict=True)):
        if len(names) != len(shares):
            raise DataError(
                f"{folder / 'weights.json'}: instance {index}: expected {len(names)} weights, one per selected "
                f"adapter, found {len(shares)}"
            )
    run = _object(folder / "run.json", missing={})
    scores = _scores(folder / "metric_dict.json", rows)
    metrics = _object(folder / "metrics.json", missing={})
    prompts, reason = prompts_of(folder, run, rows, data_dir)
    return Result(
        dataset=folder.name,
        folder=folder,
        values=values,
        predictions=predictions,
        selected=selected,
        weights=weights,
        columns=_columns(run, scores, selected),
        scores=scores,
        seconds=_numbers(_object(folder / "time_dict.json")),
        prompts=prompts,
        no_prompts=reason,
        errors=_errors(metrics),
        intervals=_intervals(_part(metrics, "official_intervals")),
        extra=_numbers(_part(metrics, "extra")),
        extra_intervals=_intervals(_part(metrics, "extra_intervals")),
        signatures={str(name): str(text) for name, text in _part(metrics, "signatures").items()},
        run=run,
    )


def _run(folder: Path, datasets: Iterable[Path], data_dir: Path | None) -> Run:
    order = {name: number for number, name in enumerate(OFFICIAL)}
    names = sorted(datasets, key=lambda dataset: (order.get(dataset.name, len(order)), dataset.name))
    results = {dataset.name: read_result(dataset, data_dir) for dataset in names}
    options = next(iter(results.values())).options
    name = _NAME.fullmatch(folder.resolve().name)
    parts: dict[str, Any] = name.groupdict() if name else {}
    method = options.get("method") or "logo"
    if method == "logo":
        method = options.get("signal") or options.get("selection_strategy") or parts.get("method")
    base = options.get("base_model") or parts.get("base")
    return Run(
        folder=folder,
        results=results,
        base=None if base is None else Path(str(base)).name or str(base),
        method=None if method is None else str(method),
        # The folder's name first: a method may use another number of adapters than was asked for.
        k=_whole(parts.get("k"), options.get("k"), options.get("n_selected_modules")),
        seed=_whole(parts.get("seed"), options.get("seed")),
    )


def _found(path: Path, depth: int = _DEPTH) -> Iterator[Path]:
    """The dataset folders at or below a folder; hidden ones are another process's work in progress, shards are parts of
    a dataset."""
    if (path / MARK).is_file():
        yield path
    elif depth and path.is_dir():
        for child in sorted(path.iterdir()):
            if child.is_dir() and not child.name.startswith(".") and not is_shard_folder(child):
                yield from _found(child, depth - 1)


def _kind(path: Path) -> str:
    if path.is_dir():
        shards = any(is_shard_folder(child) for child in path.rglob("*.shard-*"))
        return "only shards, of which `logo merge-results` makes one" if shards else "none"
    return "a file" if path.exists() else "no such folder"


def _columns(run: Mapping[str, Any], scores: Values, selected: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Names of the score columns: as written, or the names that stand at the same places of both rankings."""
    width = scores.shape[1]
    for names in (run.get("score_columns"), list(run.get("pool") or {})):
        if isinstance(names, list) and len(names) == width:
            return tuple(str(name) for name in names)
    found: dict[int, str] = {}
    for row, names in zip(scores, selected, strict=True):
        if width and not np.isnan(row).any() and len(set(row.tolist())) == width:  # ties have no one order
            found |= dict(zip(np.argsort(-row).tolist(), names, strict=False))
    unique = len(set(found.values())) == len(found)
    return tuple(found.get(column, f"#{column}") if unique else f"#{column}" for column in range(width))


def _scores(file: Path, rows: int) -> Values:
    content = _object(file)
    if len(content) > 1:
        raise DataError(f"{file}: expected the scores of one signal, found {', '.join(map(str, content))}")
    lists: Any = next(iter(content.values()), [[]] * rows)
    if not isinstance(lists, list) or len(lists) != rows or not all(isinstance(row, list) for row in lists):
        raise DataError(f"{file}: expected a list of {rows} lists of scores, one per instance")
    width = max((len(row) for row in lists), default=0)
    scores = np.full((rows, width), np.nan)
    for index, row in enumerate(lists):
        if row and len(row) != width:
            raise DataError(f"{file}: instance {index}: expected {width} scores like the others, found {len(row)}")
        if row:
            try:
                scores[index] = np.array(row, dtype=np.float64)  # null becomes nan
            except (TypeError, ValueError):
                raise DataError(f"{file}: instance {index}: expected numbers, found something else") from None
    scores[~np.isfinite(scores)] = np.nan
    return scores


def _value(file: Path, index: int, value: object) -> Value:
    if isinstance(value, (int, float)) and math.isfinite(value):
        return value
    if isinstance(value, dict) and all(isinstance(value.get(key), (int, float)) for key in _ROUGE):
        return {key: float(value[key]) for key in _ROUGE}
    raise DataError(f"{file}: instance {index}: expected a number or {{{', '.join(_ROUGE)}}}, found {value!r:.60}")


def _shape(value: Value) -> bool:
    return isinstance(value, dict)


def _finite(value: object) -> float:
    if not _number(value):
        raise ValueError(value)
    return float(value)  # type: ignore[arg-type]


def _nested(file: Path, rows: int, kind: Callable[[Any], Any]) -> tuple[tuple[Any, ...], ...]:
    lists = _list(file, rows)
    try:
        return tuple(tuple(kind(item) for item in row) for row in lists)
    except (TypeError, ValueError):
        raise DataError(f"{file}: expected a list of lists, one per instance") from None


def _list(file: Path, rows: int | None = None) -> list[Any]:
    content = _json(file)
    if not isinstance(content, list):
        raise DataError(f"{file}: expected a list, found {type(content).__name__}")
    if rows is not None and len(content) != rows:
        raise DataError(f"{file}: expected {rows} entries, as many as {MARK} has, found {len(content)}")
    return content


def _object(file: Path, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    content = _json(file) if missing is None or file.exists() else missing
    if not isinstance(content, dict):
        raise DataError(f"{file}: expected an object, found {type(content).__name__}")
    return content


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{file}: expected a file, found none; the result is not complete") from None
    except OSError as error:
        raise StorageError(f"{file}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: expected JSON, found something else ({error})") from None


def _part(metrics: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = metrics.get(name)
    return part if isinstance(part, dict) else {}


def _errors(metrics: Mapping[str, Any]) -> dict[int, str]:
    entries = metrics.get("errors") or []
    return {e["index"]: str(e.get("message", "")) for e in entries if isinstance(e, dict) and "index" in e}


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _numbers(content: Mapping[str, Any]) -> dict[str, float]:
    return {str(name): float(value) for name, value in content.items() if _number(value)}


def _intervals(content: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Those that are two numbers; an interval of nothing is null in the file."""
    pairs = {name: pair for name, pair in content.items() if isinstance(pair, list) and len(pair) == 2}
    return {str(name): (float(a), float(b)) for name, (a, b) in pairs.items() if _number(a) and _number(b)}


def _whole(*candidates: object) -> int | None:
    for candidate in candidates:
        if candidate is not None and str(candidate).lstrip("-").isdigit():
            return int(str(candidate))
    return None
