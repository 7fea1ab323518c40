"""The data of the page's script: instances by dataset, and answers by dataset and run.

The data is divided into blocks that are decompressed one by one when they are opened. A block is JSON, gzipped, in
base64, so no text in it can end its element.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from logo.evaluation.report.adapters import right_adapter, right_ranks
from logo.evaluation.report.analysis import Analysis
from logo.evaluation.report.numbers import NAMES
from logo.evaluation.report.versus import keys, shared_rows
from logo.evaluation.stored import Result
from logo.rows import Row

WEIGHT_DIGITS = 4  # of weights and scores as the page shows them; the result files have all


@dataclass
class _Rows:
    """The instances of one dataset that any run has answered, and each run's places among them."""

    prompts: list[Row | None] = field(default_factory=list)
    known: dict[tuple[object, ...], int] = field(default_factory=dict)
    places: dict[int, list[int]] = field(default_factory=dict)


def blocks(analysis: Analysis) -> dict[str, str]:
    """Block name -> its content in base64: `index`, `p{dataset}` and `a{run}-{dataset}`."""
    adapters: dict[str, int] = {}
    found: dict[str, Any] = {}
    datasets = []
    for number, name in enumerate(analysis.datasets):
        results = [run.results.get(name) for run in analysis.runs]
        rows = _rows(results)
        found[f"p{number}"] = [None if p is None else [p.context, list(p.golds)] for p in rows.prompts]
        values, errors = [], []
        for run, result in enumerate(results):
            values.append(None if result is None else _values(result, rows, run))
            errors.append(
                [] if result is None else sorted(rows.places[run][i] for i in result.errors if i < len(result))
            )
            if result is not None:
                found[f"a{run}-{number}"] = _answers(result, rows, run, adapters)
        first = next(result for result in results if result is not None)
        datasets.append(
            {
                "name": name,
                "metric": NAMES.get(first.primary, first.primary),
                "graded": not first.primary.startswith("em"),
                "values": values,
                "errors": errors,
                "why": "" if all(rows.prompts) else next((r.no_prompts for r in results if r and r.no_prompts), ""),
            }
        )
    index = {"runs": list(analysis.labels), "adapters": list(adapters), "datasets": datasets}
    return {name: packed(content) for name, content in {"index": index, **found}.items()}


def packed(content: object) -> str:
    """JSON, gzipped, in base64; the same for the same content at any time."""
    text = json.dumps(content, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


def _rows(results: Sequence[Result | None]) -> _Rows:
    """The same instance of several runs becomes one row; `versus.shared_rows` says which instances are the same."""
    rows = _Rows()
    present = [(run, result) for run, result in enumerate(results) if result is not None]
    present.sort(key=lambda pair: pair[1].prompts is None)  # results with prompts come first
    for order, (run, result) in enumerate(present):
        if result.prompts is not None:
            places = []
            for key, prompt in zip(keys(result), result.prompts, strict=True):
                if key not in rows.known:
                    rows.known[key] = len(rows.prompts)
                    rows.prompts.append(prompt)
                places.append(rows.known[key])
            rows.places[run] = places
            continue
        for other, earlier in present[:order]:
            if shared_rows(earlier, result)[0]:
                rows.places[run] = rows.places[other]
                break
        else:
            start = len(rows.prompts)
            rows.prompts += [None] * len(result)
            rows.places[run] = list(range(start, len(rows.prompts)))
    return rows


def _values(result: Result, rows: _Rows, run: int) -> list[float | None]:
    values: list[float | None] = [None] * len(rows.prompts)
    for place, value in zip(rows.places[run], result.measures[result.primary].tolist(), strict=True):
        values[place] = _rounded(value)
    return values


def _answers(result: Result, rows: _Rows, run: int, adapters: dict[str, int]) -> list[list[Any] | None]:
    """Per row [answer, adapters, weights, values, right adapter, its rank, how many were scored, error], or None."""
    answers: list[list[Any] | None] = [None] * len(rows.prompts)
    measures = result.measures
    ranks = right_ranks(result)
    for index, place in enumerate(rows.places[run]):
        answers[place] = [
            result.predictions[index],
            [adapters.setdefault(name, len(adapters)) for name in result.selected[index]],
            [_rounded(weight) for weight in result.weights[index]],
            {NAMES.get(name, name): _rounded(float(values[index])) for name, values in measures.items()},
            right_adapter(result, index),
            ranks[index],
            len(result.columns),
            result.errors.get(index),
        ]
    return answers


def _rounded(value: float) -> float | int:
    rounded = round(value, WEIGHT_DIGITS)
    return int(rounded) if rounded == int(rounded) else rounded
