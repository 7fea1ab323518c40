"""Rows of many tasks in one dataset repository on the Hub, such as `Styxxxx/LoraRetriever_EvalSet`.

    inputs, targets, task [, metric]     FLAN's names, as LoraRetriever's rows have them; or context, completion, task

Only Parquet or JSON lines of the test split are fetched, and nothing of the repository is run. FLAN's task names end
with the number of templates (`anli_r1_10templates`); that ending is removed, since names of adapters lack it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from logo.errors import DataError, closest
from logo.evaluation.metrics import checked_kind
from logo.evaluation.sources.declarations import Hub, Layout, usual_places
from logo.evaluation.sources.places import fetch
from logo.evaluation.sources.readers import read_raw
from logo.evaluation.study import Task
from logo.rows import Row, requested, row_of

_COLUMNS = (("inputs", "targets"), ("context", "completion"))
_SPLIT = "test"
_PLACES = (*usual_places("default", _SPLIT), f"{_SPLIT}.parquet", f"{_SPLIT}.jsonl", f"data/{_SPLIT}.jsonl")
_TEMPLATES = re.compile(r"_\d+templates$")


def hub_tasks(spec: str, request: str = "", *, prompt_end: str = "") -> list[Task]:
    """The tasks of a dataset repository, sorted by name.

    Args:
        spec: `org/name` or `org/name@revision`.
        request: names or patterns, as of `logo.evaluation.study.find_tasks`.
        prompt_end: put after every prompt, where the data leaves out what separates it from the answer.

    Raises:
        HubError: it cannot be fetched, or has no such file.
        DataError: a row is malformed, or a requested task does not exist.
    """
    repo, _, revision = spec.partition("@")
    layout = Layout({_SPLIT: _PLACES}, {})
    place = fetch(Hub(repo, revision or "main"), layout, [_SPLIT])
    names = place.names[_SPLIT]
    rows: dict[str, list[Row]] = {}
    metrics: dict[str, Any] = {}
    for where, raw in read_raw(place.root, names):
        task, row = _read(f"{repo}: {where}", raw, prompt_end)
        rows.setdefault(task, []).append(row)
        metrics.setdefault(task, raw.get("metric"))
    found = [_task(name, repo, rows[name], metrics[name]) for name in sorted(rows)]
    chosen = requested(
        request, rows, lambda item: DataError(f"task {item!r}: no such task in {repo!r}{closest(item, sorted(rows))}")
    )
    return [task for task in found if task.name in chosen]


def named_like(tasks: Sequence[Task], adapters: Sequence[str]) -> list[Task]:
    """The tasks, each renamed to the one adapter whose name ends with it (`anli_r1`: `llama2_7b_lora-anli_r1`)."""
    found = []
    for task in tasks:
        ending = [name for name in adapters if re.search(rf"(^|[-/.]){re.escape(task.name)}$", name)]
        found.append(replace(task, name=ending[0]) if len(ending) == 1 else task)
    return found


def _read(where: str, raw: Mapping[str, Any], prompt_end: str) -> tuple[str, Row]:
    for context, completion in _COLUMNS:
        if context in raw and completion in raw:
            break
    else:
        raise DataError(f"{where}: expected columns inputs and targets, found {', '.join(map(str, raw))}")
    name = raw.get("task")
    if not isinstance(name, str) or not name:
        raise DataError(f"{where}: expected the column task to name the row's task, found {name!r}")
    row = row_of({"context": raw[context], "completion": raw[completion]}, where)
    return _TEMPLATES.sub("", name), replace(row, context=row.context + prompt_end)


def _task(name: str, repo: str, rows: Sequence[Row], metric: object) -> Task:
    kind = None if metric is None else checked_kind(metric, f"{repo}: task {name!r}")
    return Task(name, Path(repo), tuple(rows), kind)
