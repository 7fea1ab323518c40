"""The result of one dataset as a value, with all its columns checked, and its prompts.

Reads what `logo eval run` and the official script write. Only the six official files must be there; without `run.json`
score columns are known by the adapters that were selected from them. Which folders there are: see `runs`.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from logo.errors import DataError, StorageError
from logo.evaluation.corpus import extra_metrics
from logo.evaluation.datasets import dataset_file
from logo.evaluation.intervals import Interval, Values
from logo.evaluation.metrics import Kind, Value, by_measure, judged, mean, measures, recorded_kind
from logo.identity import file_sha256
from logo.rows import Row, read_rows

MARK = "eval_results.json"  # a folder with this file is the result of one dataset
RUN = "run.json"
_ROUGE = measures("rouge")


@dataclass(frozen=True)
class Result:
    """One dataset of one run; everything per instance is in dataset order.

    Attributes:
        dataset: its name.
        folder: where it was read.
        values: the score of each answer.
        predictions: the answers.
        selected: adapters of each, best first; `weights` are parallel to it.
        columns: the adapters that were scored, in pool order.
        scores: (instances, columns); nan where an instance has none.
        seconds: by stage.
        prompts: the rows with the prompts; None if they are unknown, and then `no_prompts` says why.
        errors: error messages by instance.
        official: the means of the official measures, with `official_intervals`, as far as the run wrote them.
        extra: the measures beside them, with `extra_intervals` and sacrebleu's `signatures`.
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
    prompts: tuple[Row, ...] | None
    no_prompts: str = ""
    errors: Mapping[int, str] = field(default_factory=dict)
    official: Mapping[str, float] = field(default_factory=dict)
    official_intervals: Mapping[str, Interval] = field(default_factory=dict)
    extra: Mapping[str, float] = field(default_factory=dict)
    extra_intervals: Mapping[str, Interval] = field(default_factory=dict)
    signatures: Mapping[str, str] = field(default_factory=dict)
    run: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.values)

    @property
    def options(self) -> Mapping[str, Any]:
        """The run's options by name, as far as they were written."""
        options = self.run.get("options")
        return options if isinstance(options, dict) else {}

    @property
    def metric(self) -> Kind:
        """The metric by which the answers were judged."""
        return recorded_kind(self.run, self.dataset)

    @property
    def measures(self) -> dict[str, Values]:
        """The score of each answer (instances,) by official measure: one, or the three of ROUGE; the primary one comes
        last."""
        return {name: np.array(column) for name, column in by_measure(self.metric, self.values).items()}

    @property
    def primary(self) -> str:
        """The name of the measure that is shown where there is room for one: ROUGE-L where there are three."""
        return measures(self.metric)[-1]

    @property
    def data_sha256(self) -> str | None:
        """The SHA-256 of the file that the rows came from; None if the run did not record it."""
        data = self.run.get("dataset")
        found = data.get("sha256") if isinstance(data, dict) else None
        return None if found is None else str(found)


def read_result(folder: Path, dataset: str, data_dir: Path | None = None) -> Result:
    """One dataset's folder.

    Args:
        dataset: its name.
        data_dir: where prompts are looked for when the result lacks them and `run.json`'s path leads nowhere.

    Raises:
        DataError: a file that is missing or not what the official script writes; names it.
        StorageError: a file that cannot be read.
    """
    values = tuple(_value(folder / MARK, index, value) for index, value in enumerate(_list(folder / MARK)))
    if not values:
        raise DataError(f"{folder / MARK}: expected one value per instance, found an empty list")
    if len({isinstance(value, dict) for value in values}) > 1:
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
    run = read_object(folder / RUN, missing={})
    metric = recorded_kind(run, dataset)
    if (metric == "rouge") != isinstance(values[0], dict):
        expected = "ROUGE objects" if metric == "rouge" else "numbers"
        raise DataError(f"{folder / MARK}: expected {expected}, since the metric is {metric}, found {values[0]!r:.60}")
    scores = _scores(folder / "metric_dict.json", rows)
    metrics = read_object(folder / "metrics.json", missing={})
    prompts, reason = _prompts(folder, dataset, run, rows, data_dir)
    return Result(
        dataset=dataset,
        folder=folder,
        values=values,
        predictions=predictions,
        selected=selected,
        weights=weights,
        columns=_columns(run, scores, selected),
        scores=scores,
        seconds=_numbers(read_object(folder / "time_dict.json")),
        prompts=prompts,
        no_prompts=reason,
        errors=_errors(metrics),
        official=_numbers(_part(metrics, "official")),
        official_intervals=_intervals(_part(metrics, "official_intervals")),
        extra=_numbers(_part(metrics, "extra")),
        extra_intervals=_intervals(_part(metrics, "extra_intervals")),
        signatures={str(name): str(text) for name, text in _part(metrics, "signatures").items()},
        run=run,
    )


def judged_by(result: Result, metric: Kind) -> Result:
    """The result with its answers judged by another metric; the measures beside the official one are computed again.

    Raises:
        DataError: the gold texts are unknown.
        PluginError: a plugin's metric fails.
    """
    if result.prompts is None:
        raise DataError(f"{result.folder}: its answers cannot be judged by {metric}: {result.no_prompts}")
    values = tuple(
        judged(metric, prediction, row.completion, failed=index in result.errors)
        for index, (prediction, row) in enumerate(zip(result.predictions, result.prompts, strict=True))
    )
    found = extra_metrics(result.dataset, result.predictions, [row.golds for row in result.prompts], metric=metric)
    return replace(
        result,
        values=values,
        official=mean(metric, values),
        official_intervals={},
        extra=found.values,
        extra_intervals=found.intervals,
        signatures=found.signatures,
        run={**result.run, "metric": metric},
    )


def read_object(file: Path, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    """A file that holds a JSON object; `missing` where there is no such file.

    Raises:
        DataError: there is no such file, or it holds something else.
        StorageError: it cannot be read.
    """
    content = _json(file) if missing is None or file.exists() else missing
    if not isinstance(content, dict):
        raise DataError(f"{file}: expected an object, found {type(content).__name__}")
    return content


def _prompts(
    folder: Path, dataset: str, run: Mapping[str, Any], rows: int, data_dir: Path | None
) -> tuple[tuple[Row, ...] | None, str]:
    """The prompts of a result folder; or None, and why.

    A data file is used only if its SHA-256 is the one in `run.json`.
    """
    file = folder / "rows.json"
    if file.exists():
        return tuple(_written(file, rows)), ""
    data = run.get("dataset")
    if not isinstance(data, dict) or not data.get("sha256"):
        return None, "the result holds no prompts and does not say which file they came from"
    changed = False
    for candidate in _candidates(str(data.get("file", "")), dataset, data_dir):
        try:
            if file_sha256(candidate) == data["sha256"]:
                return tuple(read_rows(candidate, rows)), ""
            changed = True
        except (DataError, OSError):
            continue
    state = "has changed since" if changed else "is not there any more"
    return None, f"the result holds no prompts, and its data file {data.get('file')} {state}"


def _candidates(file: str, dataset: str, data_dir: Path | None) -> Iterator[Path]:
    if file:
        yield Path(file)
    if data_dir is not None:
        yield data_dir / f"{dataset}.jsonl"
        with contextlib.suppress(DataError):  # not a name that a data folder could hold
            yield dataset_file(data_dir, dataset)


def _written(file: Path, rows: int) -> Iterator[Row]:
    content = _json(file)
    if not isinstance(content, list) or len(content) != rows:
        found = len(content) if isinstance(content, list) else type(content).__name__
        raise DataError(f"{file}: expected a list of {rows} rows, one per instance, found {found}")
    for index, row in enumerate(content):
        if not isinstance(row, dict) or "context" not in row or "completion" not in row:
            raise DataError(f"{file}: row {index}: expected an object with 'context' and 'completion'")
        completion = row["completion"]
        if not isinstance(completion, (str, list)):
            found = type(completion).__name__
            raise DataError(f"{file}: row {index}: completion: expected a text or a list of texts, found {found}")
        for name in ("references", "messages"):
            if not isinstance(row.get(name) or [], list):
                raise DataError(f"{file}: row {index}: {name}: expected a list, found {type(row[name]).__name__}")
        golds = completion if isinstance(completion, str) else tuple(map(str, completion))
        yield Row(
            str(row["context"]),
            golds,
            tuple(map(str, row.get("references") or ())),
            row.get("adapter"),
            tuple(row.get("messages") or ()),
        )


def _columns(run: Mapping[str, Any], scores: Values, selected: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Names of the score columns: as recorded, or inferred from the order of scores and of selected adapters."""
    width = scores.shape[1]
    for names in (run.get("score_columns"), list(run.get("pool") or {})):
        if isinstance(names, list) and len(names) == width:
            return tuple(str(name) for name in names)
    found: dict[int, str] = {}
    for row, names in zip(scores, selected, strict=True):
        if width and not np.isnan(row).any() and len(set(row.tolist())) == width:  # ties have no unique order
            found |= dict(zip(np.argsort(-row).tolist(), names, strict=False))
    unique = len(set(found.values())) == len(found)
    return tuple(found.get(column, f"#{column}") if unique else f"#{column}" for column in range(width))


def _scores(file: Path, rows: int) -> Values:
    content = read_object(file)
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


def _intervals(content: Mapping[str, Any]) -> dict[str, Interval]:
    """The valid intervals."""
    pairs = {name: pair for name, pair in content.items() if isinstance(pair, list) and len(pair) == 2}
    return {str(name): Interval(float(a), float(b)) for name, (a, b) in pairs.items() if _number(a) and _number(b)}
