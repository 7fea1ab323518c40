"""`logo eval report` as its users meet it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from logo.cli.run import run
from report_runs import ROWS, TASKS, demo_results, write_result


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo_results(tmp_path_factory)


def test_a_page_tables_and_numbers(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "r.html"
    more = ["--latex", str(tmp_path / "t.tex"), "--data_dir", str(demo / "data")]
    assert run(["eval", "report", str(demo / "results"), "-o", str(out), *more, "--title", "A <title>", "--json"]) == 0
    captured = capsys.readouterr()
    told = json.loads(captured.out)
    assert captured.err == ""
    assert {name: Path(name).stat().st_size for name in told["files"]} == told["files"]
    assert [each["label"] for each in told["runs"]] == ["entropy", "norm"]
    assert {each["dataset"] for each in told["datasets"]} == {f"demo.{task}" for task in TASKS}
    assert "<title>A &lt;title&gt;</title>" in out.read_text(encoding="utf-8")


def test_without_json_it_says_where_and_how_large(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    [first, _] = sorted((demo / "results").iterdir())
    assert run(["eval", "report", str(first)]) == 0
    captured = capsys.readouterr()
    assert captured.out == "report.html\n"
    assert f"1 run · {len(TASKS)} datasets · {ROWS * len(TASKS)} answers · page 0." in captured.err


def test_prompts_that_are_not_at_hand_are_one_warning(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(3):
        write_result(tmp_path / "r" / f"d.x{number}", [1, 0])
    assert run(["eval", "report", str(tmp_path / "r"), "-o", str(tmp_path / "r.html")]) == 0
    [warning] = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert "3 results without prompts" in warning and "and 2 more" in warning


def test_wrong_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = write_result(tmp_path / "r" / "d.x", [1])
    page = str(tmp_path / "r.html")
    broken = tmp_path / "broken"
    shutil.copytree(tmp_path / "r", broken)
    (broken / "d.x" / "weights.json").write_text("{")
    wrong = [
        (["eval", "report"], 2, "RESULTS"),
        (["eval", "report", str(tmp_path / "absent"), "-o", page], 2, "no such folder"),
        (["eval", "report", str(result), "-o", str(tmp_path)], 2, "found a folder"),
        (["eval", "report", str(result), "-o", page, "--seed", "-1"], 2, "seed"),
        (["eval", "report", str(broken), "-o", page], 1, "weights.json"),
        (
            ["eval", "report", str(result), "-o", str(result / "run" / "x.html"), "--latex", str(result)],
            2,
            "found a folder",
        ),
        (["eval", "report", str(result), "-o", page, "--metric", "bleurt"], 2, "expected a metric"),
        (["eval", "report", str(result), "-o", page, "--metric", "bleu"], 1, "its answers cannot be judged by bleu"),
    ]
    for arguments, code, message in wrong:
        assert run(arguments) == code, arguments
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1, error
        assert not Path(page).exists()
