"""What `logo evaluate` says about its numbers: which metric, whose rows, how many adapters, what it takes."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from logo.cli.run import run
from logo.demo import heldout

DEMO = ("--base-model", "demo", "--gpu", "-1")


def write_rows(folder: Path, **tasks: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in tasks.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def record(folder: Path, name: str = "run.json") -> Any:
    return json.loads((folder / name).read_text())


# -- training rows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shared", "method"), [(3, "best-single"), (0, "best-single"), (3, "uniform")])
def test_training_rows_that_are_test_rows_are_said(
    shared: int, method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With their number, for a method that learns from them; in `run.json` as well."""
    held = heldout()["antonym"]
    rows = write_rows(tmp_path / "rows", antonym=held[:4])
    train = write_rows(tmp_path / "train", antonym=held[4 - shared : 9])
    command = ["evaluate", *DEMO, "--rows", str(rows), "--train-rows", str(train), "--result-dir", str(tmp_path / "r")]
    learns = method == "best-single"
    expected = f"dataset 'antonym': {shared} of its {5 + shared} training rows are test rows too"
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert run([*command, "--method", method, "--shots", "2", "--max-new-tokens", "2"]) == 0
    assert (expected in capsys.readouterr().err) == bool(shared and learns)
    [folder] = (tmp_path / "r").glob("*/antonym")
    assert record(folder)["found_out"].get("train_rows_also_tested") == (shared if learns else None)
