"""Short forms that tests use: the rows of a dataset in a data folder, and all of an engine's answers to rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from logo.evaluation.datasets import dataset_file
from logo.evaluation.journal import Journal
from logo.evaluation.metrics import Kind
from logo.evaluation.runner import Answered, DatasetResult
from logo.rows import Row, read_rows


def load_rows(root: Path | str, name: str, limit: int | None = None, split: str = "test") -> list[Row]:
    return read_rows(dataset_file(root, name, split), limit)


def evaluate(
    engine: Any,
    rows: Sequence[Row],
    *,
    dataset: str,
    metric: Kind | None = None,
    batch_size: int = 1,
    max_new_tokens: int = 256,
    journal: Journal | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> DatasetResult:
    answered = Answered(dataset, rows, batch_size, metric, journal)
    answered.complete(engine, max_new_tokens, on_progress or (lambda done: None))
    return answered.result()
