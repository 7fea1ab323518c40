"""`logo sweep` end to end on the demo: cells, the table in two formats, going on, and what is refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from logo.cli.run import run

HELDOUT = Path(__file__).parent.parent / "src" / "logo" / "demo" / "assets" / "heldout"
GRID = ["--grid", "k=1,3", "--grid", "signal=norm,calibrated"]
ROWS = ["--rows", str(HELDOUT), "--dataset", "antonym,capital", "--limit", "3", "--batch-size", "3"]
COMMON = ["sweep", "--base-model", "demo", *ROWS, "--max-new-tokens", "6"]


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sweep") / "out"
    assert run([*COMMON, *GRID, "-o", str(out)]) == 0
    return out


def rows(out: Path) -> list[dict[str, str]]:
    with open(out / "sweep.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_row_per_cell_dataset_and_metric(swept: Path) -> None:
    found = rows(swept)
    official = [row for row in found if row["kind"] == "official"]
    assert len(official) == 4 * 2
    assert {(row["k"], row["signal"]) for row in found} == {(k, s) for k in "13" for s in ("norm", "calibrated")}
    for row in official:
        values = json.loads((swept / row["folder"] / "eval_results.json").read_text())
        assert float(row["value"]) == pytest.approx(sum(values) / len(values))
        assert float(row["low"]) <= float(row["value"]) <= float(row["high"])
    assert (swept / "plots" / "k.png").read_bytes()[:4] == b"\x89PNG"


def test_both_formats_hold_the_same(swept: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(swept / "sweep.parquet").to_pylist()
    texts = [{name: "" if value is None else str(value) for name, value in row.items()} for row in table]
    assert texts == rows(swept)


def test_a_cell_is_what_evaluate_does(swept: Path, tmp_path: Path) -> None:
    single = ["evaluate", "--base-model", "demo", *ROWS, "--max-new-tokens", "6", "-k", "3"]
    assert run([*single, "--result-dir", str(tmp_path)]) == 0
    [cell] = [
        row["folder"] for row in rows(swept) if (row["k"], row["signal"], row["dataset"]) == ("3", "norm", "capital")
    ][:1]
    for name in ("predictions.json", "selected_loras.json", "weights.json", "metric_dict.json"):
        alone = tmp_path / "demo_selection_norm_n_3_seed_0" / "capital" / name
        assert (swept / cell / name).read_bytes() == alone.read_bytes()


def test_going_on_answers_nothing_again(swept: Path) -> None:
    before = (swept / "sweep.csv").read_bytes()
    stamps = {path: path.stat().st_mtime_ns for path in (swept / "runs").rglob("predictions.json")}
    assert run([*COMMON, *GRID, "-o", str(swept)]) == 0
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert (swept / "sweep.csv").read_bytes() == before


def test_combinations_that_cannot_be_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = ["--grid", "signal=norm,calibrated", "--grid", "weighting=linear,adaptive"]
    assert run([*COMMON, *grid, "-o", str(tmp_path), "--list", "--json"]) == 0
    shown = capsys.readouterr()
    assert "adaptive" in shown.err and "norm" in shown.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("grid", "expected"),
    [("signal=nrom", "norm"), ("sinal=norm", "signal"), ("k=one", "whole number"), ("k", "k"), ("k=0", "1 or more")],
)
def test_a_wrong_grid_is_one_line(grid: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*COMMON, "--grid", grid, "-o", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert expected in error[-1] and error[-1].startswith("logo: error:")
    assert not (tmp_path / "out").exists()
