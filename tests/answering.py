"""A short form that tests use: the rows of a dataset in a data folder."""

from __future__ import annotations

from pathlib import Path

from logo.evaluation.datasets import dataset_file
from logo.rows import Row, read_rows


def load_rows(root: Path | str, name: str, limit: int | None = None, split: str = "test") -> list[Row]:
    return read_rows(dataset_file(root, name, split), limit)
