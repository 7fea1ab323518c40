"""`logo eval run`, `logo evaluate` and `main.py`: result folders, what a repeated command does, kill -9, bad rows."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dying import Dying
from dying import dying as commands_dying
from logo.cli.app import run
from logo.demo import heldout
from logo.evaluation.results import FILES, OFFICIAL, lines, read, read_run
from tolerances import PATIENCE
from warm import python

ROOT = Path(__file__).parent.parent
DATA = Path(__file__).parent / "data"
F1 = DATA / "golden" / "F1"
DEMO = ("--base-model", "demo", "--device", "cpu", "--max-new-tokens", "4")
TIMES = ("time_dict.json", "run.json", "rows.jsonl")  # hold seconds


def write_rows(folder: Path, **tasks: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in tasks.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def evaluated(results: Path, rows: Path, *more: str, code: int = 0) -> list[Path]:
    """The result folders of a run on the bundled model."""
    assert run(["eval", "run", *DEMO, "--rows", str(rows), "--result-dir", str(results), *more]) == code
    return sorted(file.parent for file in results.rglob("eval_results.json"))


def contents(folder: Path) -> dict[str, Any]:
    """All that a result says, without seconds."""
    found: dict[str, Any] = {name: (folder / name).read_bytes() for name in FILES if name not in TIMES}
    found["rows"] = [{**line, "seconds": None} for line in lines(folder)]
    about = read_run(folder)
    return {**found, **{name: about[name] for name in ("identity", "scores", "found_out", "score_columns", "dataset")}}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    held = heldout()
    return write_rows(tmp_path_factory.mktemp("rows"), antonym=held["antonym"][:6], plural=held["plural"][:6])


@pytest.fixture(scope="module")
def whole(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The results of a run that nobody stopped."""
    return {folder.name: contents(folder) for folder in evaluated(tmp_path_factory.mktemp("whole"), rows)}


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("logo: error:")]
    return line


# -- the official command and its files --------------------------------------------------------------------------------


def official(results: Path) -> list[str]:
    return [
        *("--dataset", "bbh.boolean_expressions", "--data_dir", str(DATA), "--base_model", str(F1 / "model")),
        *("--adapters", str(F1 / "adapters"), "--n_selected_modules", "3", "--limit", "4", "--max_new_tokens", "8"),
        *("--gpu", "-1", "--result_dir", str(results)),
    ]


@pytest.mark.slow
def test_the_official_command_and_ours_write_the_same_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["evaluate", "--preset", "official", *official(tmp_path / "ours")]) == 0
    folder = "model_selection_norm_n_3_seed_0/bbh.boolean_expressions"
    assert capsys.readouterr().out.splitlines() == ["Accuracy: 0.00", str(tmp_path / "ours" / folder)]
    command = [*python(), "main.py", *official(tmp_path / "theirs")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, cwd=ROOT)
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, "Accuracy: 0.00"), done.stderr
    mine, theirs = (contents(tmp_path / name / folder) for name in ("ours", "theirs"))
    assert mine == theirs and {file.name for file in (tmp_path / "ours" / folder).iterdir()} == set(FILES)
    scores = json.loads(mine["metric_dict.json"])
    assert list(scores) == ["norm"] and [len(row) for row in scores["norm"]] == [12] * 4
    assert mine["score_columns"] == [f"ad{i:02}" for i in range(12)]
    times = json.loads((tmp_path / "ours" / folder / "time_dict.json").read_text())
    assert set(times) >= {"loading", "inference"}


def test_what_the_official_script_wrote_can_be_read(rows: Path, tmp_path: Path) -> None:
    """Its six files alone give the same values, answers, adapters and weights."""
    [folder, _] = evaluated(tmp_path / "r", rows)
    full = read([folder])
    for name in set(FILES) - {f"{name}.json" for name in OFFICIAL}:
        (folder / name).unlink()
    bare = read([tmp_path / "r"])
    bare = bare[bare["dataset"] == "antonym"]
    for column in ("value", "prediction", "selected", "weights", "score"):
        assert list(bare[column]) == list(full[column])
    assert set(bare["method"]) == {"calibrated"} and set(bare["k"]) == {3} and set(bare["base"]) == {"demo"}


def test_a_run_says_all_that_it_depends_on(whole: dict[str, dict[str, Any]]) -> None:
    about = whole["antonym"]
    assert about["identity"]["method"] == {"method": "logo"} and about["identity"]["rows"] == 6
    assert len(about["identity"]["pool"]) == 16 and about["dataset"]["rows"] == 6
    low, high = about["scores"]["em"]["interval"]
    assert low <= about["scores"]["em"]["value"] <= high and set(about["scores"]["extra"]) == {"exact_match", "f1"}
    row = about["rows"][0]
    assert row["selected"] and row["completion"] and 0 <= row["confidence"] <= 1 and row["error"] is None


# -- a repeated command ------------------------------------------------------------------------------------------------


def test_a_finished_run_is_not_repeated(
    whole: dict[str, dict[str, Any]], rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = evaluated(tmp_path, rows)
    before = [(folder / "run.json").read_bytes() for folder in folders]
    evaluated(tmp_path, rows)
    assert "antonym is done already" in capsys.readouterr().err
    assert before == [(folder / "run.json").read_bytes() for folder in folders]
    assert {folder.name: contents(folder) for folder in folders} == whole
    (folders[0] / "notes.txt").write_text("mine")
    evaluated(tmp_path, rows, "--overwrite")
    assert before != [(folder / "run.json").read_bytes() for folder in folders]
    assert (folders[0] / "notes.txt").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--limit", "2"], "rows is 6, not 2"),
        (["--when-unsure", "base"], 'settings.when_unsure is "mix", not "base"'),
        (["--max-new-tokens", "3"], "max_new_tokens is 4, not 3"),
        (["--metric", "bleu"], "--metric bleu` judges its answers anew"),
    ],
)
def test_another_runs_result_is_refused(
    more: list[str], message: str, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    [folder] = evaluated(tmp_path, rows, "--dataset", "antonym")
    before = (folder / "run.json").read_bytes()
    evaluated(tmp_path, rows, "--dataset", "antonym", *more, code=2)
    line = one_line(capsys)
    assert message in line and "--overwrite replaces it, --run-name NAME keeps both" in line
    assert (folder / "run.json").read_bytes() == before
    evaluated(tmp_path, rows, "--dataset", "antonym", *more, "--run-name", "other")
    assert (folder / "run.json").read_bytes() == before


def test_a_run_is_repeated_from_its_own_file(whole: dict[str, dict[str, Any]], rows: Path, tmp_path: Path) -> None:
    [folder] = evaluated(tmp_path / "one", rows, "--dataset", "antonym", "-k", "2")
    assert run(["eval", "run", "--config", str(folder / "run.json"), "--result-dir", str(tmp_path / "two")]) == 0
    [again] = [file.parent for file in (tmp_path / "two").rglob("run.json")]
    assert contents(again) == contents(folder) and again.parent.name == "demo_selection_calibrated_n_2_seed_0"


# -- interruptions -----------------------------------------------------------------------------------------------------

IMPORTS = """
import transformers.models.llama.modeling_llama
import logo.cli.app, logo.evaluation.results, logo.evaluation.run
from logo import LoGo
"""
STEPS = '''
    class Halving(io.FileIO):
        """A disk that takes a part of a line at a time."""
        def write(self, data):
            taken = super().write(bytes(data)[: 1 + len(data) // 2])
            step()
            return taken

    logo.evaluation.results.open = lambda path, mode, buffering: Halving(path, mode)
    LoGo.generate = counted(LoGo.generate)
'''


@pytest.fixture(scope="module")
def dying() -> Iterator[Dying]:
    with commands_dying("--result-dir", IMPORTS, STEPS) as run_until:
        yield run_until


@pytest.mark.slow
def test_kill_9_at_ten_moments(whole: dict[str, dict[str, Any]], rows: Path, dying: Dying, tmp_path: Path) -> None:
    """Of answering, in the middle of a line, between two files, between two renames: the same files in the end."""

    def command(results: Path) -> list[str]:
        return ["eval", "run", *DEMO, "--rows", str(rows), "--result-dir", str(results)]

    assert dying(-1, command(tmp_path / "whole"), tmp_path / "steps") == 0
    steps, dice = int((tmp_path / "steps").read_text()), random.Random(0)
    for moment in range(10):
        results = tmp_path / str(moment)
        first = dice.randrange(moment * steps // 10, (moment + 1) * steps // 10)
        assert dying(first, command(results), tmp_path / "steps") == -signal.SIGKILL
        # It is another process then, which is stopped once more while it goes on.
        again = dice.randrange(1, 2 + (steps - first) // 2)
        assert dying(again, command(results), tmp_path / "steps") in (-signal.SIGKILL, 0)
        assert run(command(results)) == 0
        home = results / "demo_selection_calibrated_n_3_seed_0"
        found = {folder.name: contents(folder) for folder in home.iterdir() if folder.name[0] != "."}
        assert found == whole and not [*home.glob(".*.partial")]


def test_ctrl_c_keeps_the_earlier_result(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from logo import LoGo

    [folder] = evaluated(tmp_path, rows, "--dataset", "antonym")
    before, calls, generate = (folder / "run.json").read_bytes(), list[Any](), LoGo.generate

    def interrupted(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(*arguments, **options)

    monkeypatch.setattr(LoGo, "generate", interrupted)
    evaluated(tmp_path, rows, "--dataset", "antonym", "--overwrite", code=130)
    assert capsys.readouterr().err.splitlines()[-1] == "logo: error: interrupted"
    assert (folder / "run.json").read_bytes() == before
    evaluated(tmp_path, rows, "--dataset", "antonym")  # goes on, and replaces it
    assert len(calls) == 3 + 4 and (folder / "run.json").read_bytes() != before
    assert [path.name for path in folder.parent.iterdir()] == ["antonym"]


# -- rows that cannot be answered --------------------------------------------------------------------------------------


def test_a_row_that_is_refused_has_an_error_and_no_answer(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from logo import LoGo, UsageError

    some, generate = heldout()["antonym"][:4], LoGo.generate

    def refusing(self: Any, prompts: Any, **options: Any) -> Any:
        if some[2]["context"] in prompts:
            raise UsageError("prompt: too hard")
        return generate(self, prompts, **options)

    monkeypatch.setattr(LoGo, "generate", refusing)
    [folder] = evaluated(tmp_path / "r", write_rows(tmp_path / "rows", mixed=some), "--batch-size", "2", code=1)
    found = list(lines(folder))
    assert [one["error"] for one in found] == [None, None, "prompt: too hard", None]
    assert (found[2]["prediction"], found[2]["value"], found[2]["selected"]) == ("", 0, []) and found[3]["selected"]
    assert "mixed row 3 has no answer: prompt: too hard" in one_line(capsys)


def test_a_run_in_which_nothing_can_be_answered_ends(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from logo import LoGo, UsageError

    def refused(*arguments: Any, **options: Any) -> Any:
        raise UsageError("no such option")

    monkeypatch.setattr(LoGo, "generate", refused)
    assert evaluated(tmp_path, rows, code=1) == []
    assert "dataset 'antonym': no such option" in one_line(capsys)


# -- methods and metrics -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["em", "em_multi", "em_first", "bleu", "rouge"])
def test_any_metric_for_any_dataset(kind: str, tmp_path: Path) -> None:
    """Said on the command line or beside the rows; and stored answers are judged by another one."""
    some = [row | {"completion": [str(row["completion"]), "x"]} for row in heldout()["antonym"][:3]]
    rows = write_rows(tmp_path / "rows", mine=some)
    [said] = evaluated(tmp_path / "said", rows, "--metric", kind)
    (rows / "mine.yaml").write_text(f"metric: {kind}\n")
    [beside] = evaluated(tmp_path / "beside", rows)
    assert contents(said) == contents(beside) and read_run(said)["metric"] == kind
    again = read([beside], metric="em")
    right = [line["prediction"] in row["completion"] for line, row in zip(lines(said), some, strict=True)]
    assert list(again["score"]) == [float(one) for one in right]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["base", "uniform", "random", "target", "best-single", "lorahub"])
def test_methods_are_named_in_folder_and_record(method: str, rows: Path, tmp_path: Path) -> None:
    train = write_rows(tmp_path / "train", antonym=heldout()["antonym"][8:12])
    learns = method in ("best-single", "lorahub")
    args = ["--method-args", "rows=2,budget=6" if method == "lorahub" else "rows=2"] if learns else []
    [folder] = evaluated(
        tmp_path / "r", rows, "--dataset", "antonym", "--method", method, "--train-rows", str(train), *args
    )
    picks = {"base": 0, "uniform": 3, "random": 20, "target": 1, "best-single": 1, "lorahub": 20}[method]
    assert folder.parent.name == f"demo_method_{method}_n_{picks}_seed_0"
    about = read_run(folder)
    assert about["identity"]["method"]["method"] == method and ("train_sha256" in about["identity"]) == learns
    assert bool(about["found_out"]) == (learns or method == "target")
    if method == "target":
        assert {tuple(line["selected"]) for line in lines(folder)} == {("antonym",)}


def test_training_rows_that_are_test_rows_are_said(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = write_rows(tmp_path / "train", antonym=heldout()["antonym"][3:9])
    how = ["--dataset", "antonym", "--method", "best-single", "--method-args", "rows=2", "--train-rows", str(train)]
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        evaluated(tmp_path / "r", rows, *how)
    assert "3 of 6 training rows are test rows too" in capsys.readouterr().err
