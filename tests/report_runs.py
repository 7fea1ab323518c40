"""Result folders for the report's tests: real ones of the demo model, and synthetic ones of any content."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import logo.demo
from logo.cli.run import run

HELDOUT = Path(logo.demo.__file__).parent / "assets" / "heldout"
TASKS = ("antonym", "capital", "plural")
ROWS = 6
SIGNALS = ("norm", "entropy")
_made: list[Path] = []


def demo_results(factory: pytest.TempPathFactory) -> Path:
    """Two runs on three datasets of six rows, made once by `logo evaluate`: a folder with `data` and `results`."""
    if not _made:
        root = factory.mktemp("demo-results")
        for task in TASKS:
            rows = (HELDOUT / f"{task}.jsonl").read_text().splitlines(keepends=True)[:ROWS]
            file = root / "data" / "demo" / task / "test.jsonl"
            file.parent.mkdir(parents=True)
            file.write_text("".join(rows))
        for signal in SIGNALS:
            where = ["--data_dir", str(root / "data"), "--result_dir", str(root / "results")]
            how = ["--base-model", "demo", "-k", "3", "--signal", signal, "--batch-size", "6"]
            assert run(["evaluate", *how, *where, "--max_new_tokens", "8", "--device", "cpu"]) == 0
        _made.append(root)
    return _made[0]


def write_result(
    folder: Path,
    values: Sequence[object],
    *,
    predictions: Sequence[str] | None = None,
    selected: Sequence[Sequence[str]] | None = None,
    weights: Sequence[Sequence[float]] | None = None,
    scores: Mapping[str, Sequence[Sequence[float | None]]] | None = None,
    rows: Sequence[Mapping[str, Any]] | None = None,
    run_json: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    seconds: Mapping[str, float] | None = None,
) -> Path:
    """One dataset's folder; what is not given is as simple as it can be, or left out if it is optional."""
    count = len(values)
    contents: dict[str, object] = {
        "eval_results": values,
        "predictions": [f"answer {i}" for i in range(count)] if predictions is None else predictions,
        "selected_loras": [["a", "b"]] * count if selected is None else selected,
        "weights": [[0.75, 0.25]] * count if weights is None else weights,
        "metric_dict": {"norm": [[3.0, 1.0]] * count} if scores is None else scores,
        "time_dict": {"loading": 1.0, "inference": 2.0} if seconds is None else seconds,
    }
    optional = {"rows": rows, "run": run_json, "metrics": metrics}
    contents |= {name: content for name, content in optional.items() if content is not None}
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder
