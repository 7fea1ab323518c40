"""`logo eval sweep` end to end on the demo: cells, the table in two formats, going on, and what is refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from logo import LoGo
from logo.cli.run import run
from logo.errors import AdapterError
from logo.evaluation.resume import journal_of
from test_resume import count_prompts, interrupt, kill_in_the_middle

HELDOUT = Path(__file__).parent.parent / "src" / "logo" / "demo" / "assets" / "heldout"
GRID = ["--grid", "k=1,3", "--grid", "signal=norm,calibrated"]
ROWS = ["--rows", str(HELDOUT), "--dataset", "antonym,capital", "--limit", "3", "--batch-size", "3"]
COMMON = ["eval", "sweep", "--base-model", "demo", *ROWS, "--max-new-tokens", "6"]


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sweep") / "out"
    assert run([*COMMON, *GRID, "-o", str(out)]) == 0
    return out


def without_times(out: Path) -> str:
    """The CSV less its two columns of seconds."""
    lines = list(csv.reader((out / "sweep.csv").read_text(encoding="utf-8").splitlines()))
    kept = [at for at, name in enumerate(lines[0]) if not name.startswith("seconds_")]
    assert len(kept) == len(lines[0]) - 2
    return "\n".join(",".join(line[at] for at in kept) for line in lines)


def rows(out: Path) -> list[dict[str, str]]:
    with open(out / "sweep.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
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


def test_a_sweep_that_is_refused_keeps_the_earlier_table(swept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["sweep.csv", "sweep.json", *(["sweep.parquet"] if (swept / "sweep.parquet").exists() else [])]
    before = {name: (swept / name).read_bytes() for name in names}
    assert run([*COMMON, *GRID, "--limit", "2", "-o", str(swept)]) == 1
    assert {name: (swept / name).read_bytes() for name in names} == before
    refused = capsys.readouterr().err
    assert f"cell k=1_signal=norm, dataset 'antonym': {swept}" in refused
    assert "holds the result of another run" in refused


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


@pytest.mark.slow
@pytest.mark.long
def test_kill_9_in_the_middle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Killed in the third of four cells: the second command ends with the table of a whole sweep."""
    some = ["--rows", str(HELDOUT), "--dataset", "antonym,capital", "--limit", "8", "--batch-size", "1"]
    # Long answers, so that there is time to be killed in.
    slow = [
        "eval",
        "sweep",
        "--base-model",
        "demo",
        "--device",
        "cpu",
        *some,
        *GRID,
        "--max-new-tokens",
        "48",
        "--no-fold",
    ]
    folder = tmp_path / "killed" / "runs" / "k=1_signal=calibrated" / "capital"
    done = kill_in_the_middle([*slow, "-o", str(tmp_path / "killed")], journal_of(folder), after=2)
    assert 2 <= done < 8 and not folder.exists() and (folder.parent / "antonym").exists()
    assert not (tmp_path / "killed" / "sweep.csv").exists()
    assert json.loads((tmp_path / "killed" / "sweep.json").read_text())["command"]["name"] == "eval sweep"
    for name in ("killed", "whole"):
        assert run([*slow, "-o", str(tmp_path / name)]) == 0
    assert without_times(tmp_path / "killed") == without_times(tmp_path / "whole")
    for picture in (tmp_path / "whole" / "plots").iterdir():
        assert (tmp_path / "killed" / "plots" / picture.name).read_bytes() == picture.read_bytes()


@pytest.mark.slow
def test_interrupted_sweeps_say_that_they_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [*COMMON, *GRID, "-o", str(tmp_path / "out")]
    interrupt(monkeypatch, arguments, after=5)
    assert "repeat the command to continue" in capsys.readouterr().err
    asked = count_prompts(monkeypatch)
    assert run(arguments) == 0 and len(asked) == 3 * (8 - 5)  # a batch is a dataset here
    asked.clear()
    assert run([*COMMON, "--grid", "signal=norm,calibrated,entropy", *GRID[:2], "-o", str(tmp_path / "out")]) == 0
    assert len(asked) == 3 * 4  # the axes in another order, and one value more
    assert run([*arguments, "--overwrite"]) == 0 and len(asked) == 3 * (4 + 8)


def test_a_cell_that_fails_is_told_and_the_rest_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = LoGo.generate

    def refusing(self: LoGo, prompts: list[str], **options: Any) -> Any:
        if self.settings.k == 2:
            raise AdapterError("antonym", "its file is gone")
        return generate(self, prompts, **options)

    monkeypatch.setattr(LoGo, "generate", refusing)
    cells = ["--grid", "k=1,2,3", "--grid", "probe-layer=0,99", "-o", str(tmp_path / "out")]
    for _ in range(2):  # and again
        assert run([*COMMON, *cells, "--json"]) == 1
        captured = capsys.readouterr()
        lines = [line for line in captured.err.splitlines() if line.startswith("logo: error: cell ")]
        found = json.loads(captured.out)
        assert [cell["values"] for cell in found["cells"]] == [{"k": k, "probe-layer": "0"} for k in (1, 3)]
        assert len(lines) == len(found["failures"]) == 2 + 3
        assert "cell k=2_probe-layer=0, dataset 'antonym': adapter 'antonym': its file is gone" in "\n".join(lines)
        assert sum("probe-layer=99: " in line for line in lines) == 3
    assert {(row["k"], row["probe_layer"]) for row in rows(tmp_path / "out")} == {("1", "0"), ("3", "0")}
    assert run([*COMMON, *cells]) == 1
    shown = capsys.readouterr()
    assert shown.out.split()[:3] == ["k", "probe-layer", "mean"] and "Traceback" not in shown.err


def test_one_row_without_an_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = LoGo.generate
    bad = json.loads((HELDOUT / "capital.jsonl").read_text().splitlines()[1])["context"]

    def refusing(self: LoGo, prompts: list[str], **options: Any) -> Any:
        if bad in prompts and self.settings.k == 3:
            raise AdapterError("antonym", "not now")
        return generate(self, prompts, **options)

    monkeypatch.setattr(LoGo, "generate", refusing)
    assert run([*COMMON, "--grid", "k=1,3", "-o", str(tmp_path)]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == ("logo: error: cell k=3, dataset 'capital': 1 row has no answer; row 2: adapter 'antonym': not now")
    assert {(row["k"], row["dataset"]): row["errors"] for row in rows(tmp_path)} == {
        ("1", "antonym"): "0",
        ("1", "capital"): "0",
        ("3", "antonym"): "0",
        ("3", "capital"): "1",
    }


@pytest.mark.slow
def test_methods_beside_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Cells that do the same share a run; every merge is what its own run would be."""
    cells = ["--grid", "k=1,3", "--grid", "method=logo,base,oracle,random", "--grid", "merge=mixture,linear"]
    assert run([*COMMON, *cells, "-o", str(tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    found = [row for row in rows(tmp_path / "out") if row["kind"] == "official"]
    assert len(found) == 2 * 4 * 2 * 2
    assert len({row["folder"] for row in found}) == 2 * (4 + 2 + 2 + 4)
    assert captured.out.splitlines()[1 + 12].startswith("· makes no difference.")
    plain = ["evaluate", "--base-model", "demo", *ROWS, "--max-new-tokens", "6", "-k", "3", "--method", "random"]
    assert run([*plain, "--merge", "linear", "--result-dir", str(tmp_path / "alone")]) == 0
    alone = tmp_path / "alone" / "demo_method_random-linear_n_3_seed_0" / "capital"
    cell = tmp_path / "out" / "runs" / "k=3_merge=linear_method=random" / "capital"
    for name in ("predictions.json", "selected_loras.json", "metrics.json"):
        assert (cell / name).read_bytes() == (alone / name).read_bytes()
    one, other = (json.loads((folder / "run.json").read_text()) for folder in (cell, alone))
    assert one["fingerprint"] == other["fingerprint"]
    assert [found["options"].pop("command")["name"] for found in (one, other)] == ["eval sweep", "evaluate"]
    assert {**one["options"], **other["options"]} == {**other["options"], **one["options"]}


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--grid", "method=logo,lorahub"], "needs training rows"),
        (["--grid", "method=logo,adaptersoup"], "--adapter-samples"),
        (["--grid", "k=1", "--dataset", "antonmy"], "did you mean 'antonym'"),
        (["--grid", "weighting=adaptive"], "none of the combinations (1) is possible"),
        (["--grid", "k=1", "--base-model", "no/such-folder/here"], "no/such-folder/here"),
        ([], "--grid"),
    ],
)
def test_what_is_wrong_is_told_before_anything_runs(
    more: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*COMMON, *more, "-o", str(tmp_path / "out")]) in (1, 2)
    lines = capsys.readouterr().err.splitlines()
    assert expected in lines[-1] and lines[-1].startswith("logo: error:")
    assert not (tmp_path / "out" / "runs").exists()


def test_the_list_runs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["eval", "sweep", "--grid", "k=1,3", "--grid", "method=logo,base", "--list"]) == 0
    captured = capsys.readouterr()
    assert [line.split() for line in captured.out.splitlines()] == [
        ["k", "method", "folder"],
        ["1", "logo", "k=1_method=logo"],
        ["·", "base", "method=base"],
        ["3", "logo", "k=3_method=logo"],
    ]
    assert "3 runs" in captured.err and "4 cells" in captured.err
