"""Results of one run are not replaced by those of another run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from logo import LoGo
from logo.cli.run import run
from logo.demo import heldout
from logo.errors import UsageError
from logo.evaluation.results import RESULT_FILES, run_folder
from logo.evaluation.resume import journal_of
from test_resume import count_prompts, interrupt

DEMO = ["evaluate", "--base-model", "demo", "--device", "cpu", "--no-merge", "--max-new-tokens", "4"]
RUN = "demo_selection_norm_n_3_seed_0"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rows")
    for folder, some in (("rows", slice(0, 8)), ("train", slice(8, 16))):
        (root / folder).mkdir()
        for name in ("antonym", "capital"):
            (root / folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, heldout()[name][some])))
    return root


def command(rows: Path, results: Path, *more: str) -> list[str]:
    where = ["--rows", str(rows / "rows"), "--train-rows", str(rows / "train"), "--result-dir", str(results)]
    k = [] if "best-single" in more else ["-k", "3"]  # it takes one
    return [*DEMO, *where, *k, "--dataset", "antonym", *more]


def everything(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command ends with which does nothing."""
    capsys.readouterr()
    assert run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = captured.err.splitlines()
    return line


@pytest.mark.parametrize(
    ("first", "then", "differs"),
    [
        (
            ["--limit", "8"],
            ["--limit", "2", "--max-new-tokens", "3"],
            ["max_new_tokens is 4, not 3", "rows is 8, not 2"],
        ),
        (["--preset", "official"], [], ['settings.probe_context is "carry", not "base"']),
        ([], ["--preset", "official"], ['settings.probe_context is "base", not "carry"']),
        ([], ["--generation-early-stop"], ["generation.stop_at_newline is false, not true"]),
        (
            ["--method", "lorahub", "--lorahub-budget", "3"],
            ["--method", "lorahub", "--lorahub-budget", "4"],
            ["method.budget is 3, not 4"],
        ),
        (
            ["--method", "best-single", "--shots", "1"],
            ["--method", "best-single", "--shots", "2"],
            ["method.rows is 1, not 2"],
        ),
    ],
    ids=["limit", "official", "plain", "stop", "lorahub", "best-single"],
)
def test_the_result_of_another_run_is_not_replaced(
    first: list[str],
    then: list[str],
    differs: list[str],
    rows: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limit = ["--limit", "2"]
    first, then = ([*([] if "--limit" in more else limit), *more] for more in (first, then))
    assert run(command(rows, tmp_path, *first)) == 0
    before = everything(tmp_path)
    [folder] = tmp_path.glob("*/antonym")
    with monkeypatch.context() as patch:
        asked = count_prompts(patch)
        line = refusal(command(rows, tmp_path, *then), capsys)
        assert not asked
    assert line.startswith(f"logo: error: dataset 'antonym': {folder} holds the result of another run: ")
    assert line.endswith("; --overwrite replaces it, --run-name NAME keeps both")
    assert all(part in line for part in differs), line
    assert everything(tmp_path) == before
    assert run(command(rows, tmp_path, *then, "--run-name", "again")) == 0
    beside = folder.parents[1] / f"{folder.parent.name}_again" / "antonym"
    after = everything(tmp_path)
    assert before.items() <= after.items() and sorted(RESULT_FILES) == sorted(path.name for path in beside.iterdir())
    assert run(command(rows, tmp_path, *then, "--overwrite")) == 0
    same = [name for name in RESULT_FILES if name not in ("run.json", "time_dict.json")]
    assert all((folder / name).read_bytes() == (beside / name).read_bytes() for name in same)
    assert (
        json.loads((beside / "run.json").read_text())["fingerprint"]
        == (json.loads((folder / "run.json").read_text())["fingerprint"])
    )


def gone(file: Path) -> None:
    file.unlink()


def garbled(file: Path) -> None:
    file.write_text(file.read_text()[:-9])


def without(key: str) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        record = json.loads(file.read_text())
        del record[key]
        file.write_text(json.dumps(record))

    return change


def a_list(file: Path) -> None:
    file.write_text("[]")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (gone, "holds eval_results.json, predictions.json"),
        (garbled, "holds a result whose run.json cannot be read ("),
        (without("identity"), "holds a result whose run.json does not say which run it is of"),
        (without("pool"), "does not say which run it is of"),
        (a_list, "does not say which run it is of"),
    ],
    ids=["gone", "garbled", "no identity", "no pool", "a list"],
)
def test_what_cannot_be_told_is_not_replaced(
    change: Callable[[Path], None], said: str, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command(rows, tmp_path, "--limit", "1")
    assert run(arguments) == 0
    change(tmp_path / RUN / "antonym" / "run.json")
    before = everything(tmp_path)
    line = refusal(arguments, capsys)
    assert said in line and line.endswith("--overwrite replaces it, --run-name NAME keeps both")
    assert everything(tmp_path) == before
    assert run([*arguments, "--overwrite"]) == 0
    assert run(arguments) == 0 and "is done already" in capsys.readouterr().err


def test_the_six_files_of_the_authors_script_are_not_replaced(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / RUN / "antonym"
    folder.mkdir(parents=True)
    for name in RESULT_FILES[:6]:
        (folder / name).write_text("[]")
    before = everything(tmp_path)
    line = refusal(command(rows, tmp_path), capsys)
    assert "time_dict.json without a run.json that says which run it is of" in line and everything(tmp_path) == before
    for name in RESULT_FILES[:6]:
        (folder / name).unlink()
    (folder / "notes.txt").write_text("mine")  # no result
    assert run(command(rows, tmp_path, "--limit", "1")) == 0 and (folder / "notes.txt").read_text() == "mine"


@pytest.mark.slow
def test_an_overwriting_run_that_was_interrupted_may_still_replace(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(command(rows, tmp_path, "--limit", "3")) == 0
    other = command(rows, tmp_path, "--limit", "4")
    interrupt(monkeypatch, [*other, "--overwrite"], after=2)
    folder = tmp_path / RUN / "antonym"
    assert len(json.loads((folder / "predictions.json").read_text())) == 3
    asked = count_prompts(monkeypatch)
    assert run(other) == 0 and len(asked) == 2 and not journal_of(folder).exists()
    assert len(json.loads((folder / "predictions.json").read_text())) == 4


def test_a_result_that_appears_meanwhile_is_not_replaced(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a drive that several machines write, without locks: the answers stay in the journal."""
    assert run(command(rows, tmp_path / "other", "--limit", "3")) == 0
    folder = tmp_path / RUN / "antonym"
    arguments = command(rows, tmp_path, "--limit", "2")
    generate = LoGo.generate

    def meanwhile(self: LoGo, prompts: list[str], **options: Any) -> Any:
        if not folder.exists():
            shutil.copytree(tmp_path / "other" / RUN / "antonym", folder)
        return generate(self, prompts, **options)

    with monkeypatch.context() as patch:
        patch.setattr(LoGo, "generate", meanwhile)
        assert "rows is 3, not 2" in refusal(arguments, capsys)
    assert len(json.loads((folder / "predictions.json").read_text())) == 3
    shutil.rmtree(folder)
    asked = count_prompts(monkeypatch)
    assert run(arguments) == 0 and not asked


@pytest.mark.parametrize("name", ["a/b", "../x", "", ".", "..", "a b", "-a", "_a", "a.", "a\\b", "a\nb", "a" * 65])
def test_names_of_runs_that_cannot_be(
    name: str, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal(command(rows, tmp_path, f"--run-name={name}"), capsys)
    assert line.startswith(f"logo: error: --run-name {name!r}: expected up to 64 letters")
    assert not list(tmp_path.iterdir())


def test_names_of_runs() -> None:
    for name in ("a", "second", "lr=3e-4", "2026-01-02", "Ämter.v2", "a" * 64):
        assert run_folder("r", "M", "norm", 3, 0, run_name=name) == Path(f"r/M_selection_norm_n_3_seed_0_{name}")
    with pytest.raises(UsageError):
        run_folder("r", "M", "norm", 3, 0, run_name="a/../../b")
