"""`logo eval run`, `logo evaluate`, `main.py` and `logo eval study`: result folders, what a repeated command does, kill
-9, bad rows, and the numbers of a study."""

from __future__ import annotations

import itertools
import json
import random
import re
import runpy
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logo import LoGo, UsageError
from logo.adapters.examples import write_examples
from logo.cli.app import run
from logo.cli.evaluate import show
from logo.demo import adapters_dir, heldout
from logo.evaluation.contest import ALWAYS, IN_POOL, OUT_OF_POOL, REMOVED
from logo.evaluation.results import FILES, lines, read_run
from logo.evaluation.statistics import auroc, calibration_error
from logo.evaluation.study_summary import summary
from logo.rows import read_rows
from logo.selection.selector import UNSURE
from tolerances import PATIENCE, same_scores
from warm import python
from written import write_rows

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
DATA = Path(__file__).parent / "data"
F1 = DATA / "golden" / "F1"
MODEL = ("--base-model", "demo", "--device", "cpu")
DEMO = (*MODEL, "--max-new-tokens", "4")
TIMES = ("time_dict.json", "run.json", "rows.jsonl")  # hold seconds


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
    root = tmp_path_factory.mktemp("rows")
    for name in ("antonym", "plural"):
        write_rows(root / f"{name}.jsonl", heldout()[name][:6])
    return root


@pytest.fixture(scope="module")
def whole(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The results of a run that nobody stopped."""
    return {folder.name: contents(folder) for folder in evaluated(tmp_path_factory.mktemp("whole"), rows)}


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("logo: error:")]
    return line


def official(results: Path) -> list[str]:
    return [
        *("--dataset", "bbh.boolean_expressions", "--data_dir", str(DATA), "--base_model", str(F1 / "model")),
        *("--adapters", str(F1 / "adapters"), "--n_selected_modules", "3", "--limit", "4", "--max_new_tokens", "8"),
        *("--gpu", "-1", "--result_dir", str(results)),
    ]


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


def test_a_finished_run_is_not_repeated(
    whole: dict[str, dict[str, Any]], rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says all that it depends on, and what it came to."""
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
    about, row = whole["antonym"], whole["antonym"]["rows"][0]
    identity = about["identity"]
    assert identity["method"] == {"method": "logo"} and identity["rows"] == about["dataset"]["rows"] == 6
    low, high = about["scores"]["em"]["interval"]
    assert low <= about["scores"]["em"]["value"] <= high and set(about["scores"]["extra"]) == {"exact_match", "f1"}
    assert len(identity["pool"]) == 16 and row["selected"] and row["completion"] and row["error"] is None
    assert 0 <= row["confidence"] <= 1


def test_another_runs_result_is_refused(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [folder] = evaluated(tmp_path, rows, "--dataset", "antonym")
    before = (folder / "run.json").read_bytes()
    for message, *more in (
        ('settings.when_unsure is "mix", not "base"', "--when-unsure", "base"),
        ("max_new_tokens is 4, not 3", "--max-new-tokens", "3"),
        ("--metric bleu --save report.html` judges its answers anew", "--metric", "bleu"),
    ):
        evaluated(tmp_path, rows, "--dataset", "antonym", *more, code=2)
        line = one_line(capsys)
        assert message in line and "--overwrite replaces it, another --result-dir keeps both" in line
    assert len(evaluated(tmp_path, rows, "--dataset", "antonym", *more, "--run-name", "other")) == 2
    assert (folder / "run.json").read_bytes() == before


# -- interruptions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "again"), [([], "repeat the command to continue."), (["--overwrite"], "repeat the command for the ")]
)
def test_what_ctrl_c_leaves_of_the_official_command(
    more: list[str], again: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(LoGo, "generate", interrupted)
    monkeypatch.setattr("sys.argv", ["main.py", *official(tmp_path), *more])
    assert runpy.run_path(str(ROOT / "main.py"))["main"]() == 130
    kept, last = capsys.readouterr().err.splitlines()[-2:]
    assert kept.startswith(f"Finished datasets are kept: {again}") and last == "logo: error: interrupted"


# Runs a command that kills itself before a given step, so that it dies at the same point on every machine. Steps are
# changes of files below the folder of results, calls of `fsync` and `generate`, and parts of lines.
DYING = """
import io, json, os, signal, sys
import transformers.models.llama.modeling_llama
import logo.evaluation.results, logo.evaluation.run
from logo import LoGo
from logo.cli.app import run

for line in sys.stdin:  # each command in a fork, since importing all this takes longer than what it does
    last, root, steps, *arguments = json.loads(line)
    child = os.fork()
    if not child:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
done = 0

def step():
    global done
    if done == last:
        os.kill(os.getpid(), signal.SIGKILL)
    done += 1

def counted(function):
    def call(*arguments, **options):
        step()
        return function(*arguments, **options)
    return call

def happening(event, arguments):
    if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir") and str(arguments[0]).startswith(root):
        step()

class Halving(io.FileIO):
    "A disk that takes a part of a line at a time."
    def write(self, data):
        taken = super().write(bytes(data)[: 1 + len(data) // 2])
        step()
        return taken

logo.evaluation.results.open = lambda path, mode, buffering: Halving(path, mode)
LoGo.generate, os.fsync = counted(LoGo.generate), counted(os.fsync)
sys.addaudithook(happening)
code = run(arguments)
with open(steps, "w") as file:
    file.write(str(done))
os._exit(code)
"""


@pytest.fixture
def run_until() -> Iterator[Callable[[int, list[str], Path], int]]:
    """Runs a command that ends before the step given (-1: never), and writes how many steps it made; its exit code."""
    with subprocess.Popen([*python(), "-c", DYING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as dying:
        assert dying.stdin is not None and dying.stdout is not None
        asked, codes = dying.stdin, dying.stdout

        def run_until(last: int, command: list[str], steps: Path) -> int:
            words = [last, command[command.index("--result-dir") + 1], str(steps), *command]
            print(json.dumps(words), file=asked, flush=True)
            return int(codes.readline())

        yield run_until


def test_kill_9_at_ten_moments(
    run_until: Callable[[int, list[str], Path], int], whole: dict[str, dict[str, Any]], rows: Path, tmp_path: Path
) -> None:
    """Of answering, in the middle of a line, between two files, between two renames: the same files in the end."""

    def command(results: Path) -> list[str]:
        return ["eval", "run", *DEMO, "--rows", str(rows), "--result-dir", str(results)]

    assert run_until(-1, command(tmp_path / "whole"), tmp_path / "steps") == 0
    steps, dice = int((tmp_path / "steps").read_text()), random.Random(0)
    for moment in range(5):
        results = tmp_path / str(moment)
        first = dice.randrange(moment * steps // 5, (moment + 1) * steps // 5)
        assert run_until(first, command(results), tmp_path / "steps") == -signal.SIGKILL
        # It is another process then, which is stopped once more while it goes on.
        again = dice.randrange(1, 2 + (steps - first) // 2)
        assert run_until(again, command(results), tmp_path / "steps") in (-signal.SIGKILL, 0)
        assert run(command(results)) == 0
        home = results / "demo_selection_calibrated_n_3_seed_0"
        found = {folder.name: contents(folder) for folder in home.iterdir() if folder.name[0] != "."}
        assert found == whole and not [*home.glob(".*.partial")]


def test_a_row_that_is_refused_has_an_error_and_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And where all of them are, nothing is written."""
    some, generate = heldout()["antonym"][:4], LoGo.generate
    hard = {some[2]["context"]}

    def refusing(self: Any, prompts: Any, **options: Any) -> Any:
        if any(prompt.cut or prompt.text in hard for prompt in prompts):
            raise UsageError("prompt: too hard")
        return generate(self, prompts, **options)

    monkeypatch.setattr(LoGo, "generate", refusing)
    rows = write_rows(tmp_path / "rows" / "mixed.jsonl", some).parent
    [folder] = evaluated(tmp_path / "r", rows, "--batch-size", "2", code=1)
    found = list(lines(folder))
    assert [one["error"] for one in found] == [None, None, "prompt: too hard", None]
    assert (found[2]["prediction"], found[2]["value"], found[2]["selected"]) == ("", 0, []) and found[3]["selected"]
    assert "mixed row 3 has no answer: prompt: too hard" in one_line(capsys)
    long = {**some[0], "context": "Give the opposite of: " + "hot, cold and " * 300}
    rows = write_rows(tmp_path / "long" / "mixed.jsonl", [long, *some[:2]]).parent
    [folder] = evaluated(tmp_path / "cut", rows, code=1)
    assert [bool(one["error"]) for one in lines(folder)] == [True, False, False]
    assert [one["cut"] > 0 for one in lines(folder)] == [True, False, False]
    capsys.readouterr()
    rows = tmp_path / "rows"
    hard |= {row["context"] for row in some}
    assert evaluated(tmp_path / "none", rows, code=1) == []
    assert "dataset 'mixed': prompt: too hard" in one_line(capsys)


def test_rows_that_nothing_is_made_for_end_no_run(tmp_path: Path) -> None:
    asked = [{"context": "Bake a cake of apples", "completion": "x"}] * 2
    rows = write_rows(tmp_path / "rows" / "mixed.jsonl", [*asked, *heldout()["antonym"][:2]]).parent
    [folder] = evaluated(tmp_path / "r", rows, "--when-unsure", "refuse", code=1)
    errors = [one["error"] for one in lines(folder)]
    assert errors[2:] == [None, None] and errors[0] == errors[1]
    assert re.fullmatch(r"no adapter of the pool seems to be made for this prompt \(confidence .*\)", errors[0])


def test_another_metric_judges_what_an_unfinished_run_has_answered(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, generate, how = itertools.count(), LoGo.generate, ["--dataset", "antonym", "--metric", "rouge"]

    def stopped(self: Any, *arguments: Any, **options: Any) -> Any:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return generate(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(LoGo, "generate", stopped)
        assert evaluated(tmp_path / "r", rows, *how[:2], code=130) == []
    [folder], [fresh] = (evaluated(tmp_path / name, rows, *how) for name in ("r", "fresh"))
    assert contents(folder) == contents(fresh) and next(calls) == 4


@pytest.mark.parametrize(
    ("method", "picks"),
    [("base", 0), ("uniform", 16), ("random", 20), ("target", 1), ("best-single", 1), ("lorahub", 20)],
)
def test_methods_are_named_in_folder_and_record(method: str, picks: int, rows: Path, tmp_path: Path) -> None:
    train = write_rows(tmp_path / "train" / "antonym.jsonl", heldout()["antonym"][8:12]).parent
    learns = method in ("best-single", "lorahub")
    args = ["--method-args", "rows=2,budget=6" if method == "lorahub" else "rows=2"] if learns else []
    how = ["--dataset", "antonym", "--method", method, "--train-rows", str(train), *args]
    [folder] = evaluated(tmp_path / "r", rows, *how)
    assert folder.parent.name == f"demo_method_{method}_n_{picks}_seed_0"
    about = read_run(folder)
    assert about["identity"]["method"]["method"] == method and ("train_sha256" in about["identity"]) == learns
    assert bool(about["found_out"]) == (learns or method == "target")
    if method == "target":
        assert {tuple(line["selected"]) for line in lines(folder)} == {("antonym",)}


def test_target_fails_before_anything_is_computed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("antonym", "planets"):
        write_rows(tmp_path / "rows" / f"{name}.jsonl", heldout()["antonym"][:2])
    assert evaluated(tmp_path / "r", tmp_path / "rows", "--method", "target", code=1) == []
    assert "target: dataset 'planets': there are rows that name no adapter" in one_line(capsys)


@pytest.mark.filterwarnings("always")
def test_a_prompt_that_is_cut_is_recorded_by_its_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By how many tokens, in an evaluation, its report and a study, and not by its place in a batch."""
    short, long = heldout()["antonym"][:2], {"context": "It rains. " * 700, "completion": "x"}
    rows = write_rows(tmp_path / "rows" / "antonym.jsonl", [*short, long]).parent
    prompts = LoGo.from_pretrained("demo", device="cpu").prompts
    [prompt] = prompts.read([long["context"]], room=None)
    assert prompts.context is not None and len(prompt) > prompts.context
    cut = len(prompt) - (prompts.context - 4)
    capsys.readouterr()
    [folder] = evaluated(tmp_path / "r", rows, "--batch-size", "2")
    said = capsys.readouterr().err
    assert [line["cut"] for line in lines(folder)] == [0, 0, cut] and "prompt 1 has" not in said
    assert f"antonym: 1 of 3 prompts were cut to fit, by up to {cut} tokens: rows 3; `cut` in rows.jsonl" in said
    assert run(["eval", "report", str(folder), "--save", str(tmp_path / "tables"), "--json"]) == 0
    [note] = json.loads(capsys.readouterr().out)["notes"]
    assert note.endswith(f"1 of 3 prompts of antonym were cut, by up to {cut} tokens")
    report = studied(tmp_path / "s", rows, "--signals", "norm", "--protocols", "in-pool", "--generate", "4")
    said = capsys.readouterr().err
    assert [line["cut"] for line in lines(tmp_path / "s")] == [0, 0, cut] and report["cut"] == 1
    assert "1 of 3 prompts were cut to fit" in said and "prompt 1 has" not in said


def test_names_of_datasets_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    scores = {"em": {"value": 1.0, "interval": None}}
    show([{"dataset": "[b]x", "rows": 1, "seconds": 1.0, "scores": scores, "errors": []}], json=False)
    assert "[b]x" in capsys.readouterr().err


@pytest.mark.filterwarnings("always")
def test_training_rows_that_are_tested_are_said(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = write_rows(tmp_path / "train" / "antonym.jsonl", heldout()["antonym"][3:9]).parent
    how = ["--dataset", "antonym", "--method", "best-single", "--method-args", "rows=2", "--train-rows", str(train)]
    evaluated(tmp_path / "r", rows, *how)
    assert "3 of 6 training rows are test rows too" in capsys.readouterr().err


# -- studies: against the public calls, protocols, prompts without answers ---------------------------------------------

TASKS = ("antonym", "plural", "french")
ASKED = ("--signals", "calibrated,norm", "--methods", "random", "--generate", "8")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks with an adapter, and one without."""
    root = tmp_path_factory.mktemp("tasks")
    for name in TASKS:
        write_rows(root / f"{name}.jsonl", heldout()[name][:3])
    other = [{"context": f"Name the {n}th planet.", "completion": "Mars"} for n in range(2)]
    return write_rows(root / "planets.jsonl", other).parent


def studied(save: Path, tasks: Path, *more: str, code: int = 0) -> dict[str, Any]:
    assert run(["eval", "study", *MODEL, "--rows", str(tasks), "--save", str(save), *more]) == code
    return read_run(save)["report"] if code == 0 else {}


@pytest.fixture(scope="module")
def finished(tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    save = tmp_path_factory.mktemp("out") / "study"
    studied(save, tasks, *ASKED)
    return save


def test_the_protocols_and_their_arms(finished: Path) -> None:
    report = read_run(finished)["report"]
    arms = ["calibrated", "norm", "target", "uniform", "base", "random"]
    others = [name for name in arms if name != "target"]
    found = {name: [*protocol] for name, protocol in report["protocols"].items()}
    assert found == {IN_POOL: arms, REMOVED: others, OUT_OF_POOL: others}
    assert (report["tasks"], report["rows"]) == (4, 11)
    in_pool = report["protocols"][IN_POOL]
    assert in_pool["target"]["of_target"]["value"] == 1.0 and "top1" not in in_pool["target"]
    assert in_pool["calibrated"]["top1"]["value"] == 1.0 and report["confidence"]["calibrated"]["auroc"][REMOVED] > 0.9
    assert "norm" not in report["confidence"] and "of_target" not in report["protocols"][OUT_OF_POOL]["base"]


def test_numbers_are_means_of_task_means(finished: Path) -> None:
    """Everything once more, row by row, through the public calls."""
    logo = LoGo.from_pretrained("demo", device="cpu")
    report, found = read_run(finished)["report"], Counter[tuple[str, str, str]]()
    rows = [(task, row) for task in TASKS for row in heldout()[task][:3]]
    for (task, row), name, protocol in itertools.product(rows, ("calibrated", "norm"), (IN_POOL, REMOVED)):
        among = None if protocol == IN_POOL else [one for one in logo.names if one != task]
        selection = logo.select(row["context"], signal=name, candidates=among)
        [scored] = logo.score(row["context"], row["completion"], [selection])
        answer = logo.generate(row["context"], adapters=selection, max_new_tokens=8, stop_at_newline=True)
        found[protocol, name, "nll"] += scored.nll / 9
        found[protocol, name, "exact_match"] += scored.exact_match / 9
        found[protocol, name, "score"] += (answer.text.strip().lower() == row["completion"].lower()) / 9
        if protocol == IN_POOL:
            rank = sum(score >= selection.scores[task] for score in selection.scores.values())
            found[protocol, name, "mrr"] += 1 / rank / 9
    for (protocol, name, metric), value in found.items():
        assert report["protocols"][protocol][name][metric]["value"] == same_scores(value), (protocol, name, metric)


@pytest.mark.filterwarnings("always")
def test_a_finished_study_is_shown_again(finished: Path, tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And another one is refused."""
    before = (finished / "run.json").read_bytes()
    studied(finished, tasks, *ASKED)
    shown = capsys.readouterr().out
    assert "in-pool" in shown and "reliability error" in shown and (finished / "run.json").read_bytes() == before
    earlier = json.loads(before)
    earlier["environment"]["logo"] = "0.0.1"
    del earlier["report"]["cut"]  # which nobody counted then
    (finished / "run.json").write_text(json.dumps(earlier))
    studied(finished, tasks, *ASKED)
    assert "under other versions or on another device: logo 0.0.1 (now " in " ".join(capsys.readouterr().err.split())
    (finished / "run.json").write_bytes(before)
    studied(finished, tasks, *ASKED, "--limit", "2", code=2)
    assert "another run" in capsys.readouterr().err and (finished / "run.json").read_bytes() == before
    assert run(["eval", "study", "--config", str(finished / "run.json")]) == 0
    assert capsys.readouterr().out == shown and (finished / "run.json").read_bytes() == before


def test_what_a_study_cannot_measure_ends_it_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, *_ = heldout()["antonym"]
    for last, said in (
        ({"context": "a", "completion": "word " * 600}, "antonym.jsonl:2: the completion has "),
        ({**first, "adapter": "french"}, "antonym.jsonl:2: expected a row of the adapter that the file is named after"),
    ):
        rows = write_rows(tmp_path / "rows" / "antonym.jsonl", [first, last]).parent
        studied(tmp_path / "study", rows, code=1)
        assert said in one_line(capsys) and [file.name for file in tmp_path.iterdir()] == ["rows"]


@pytest.mark.filterwarnings("always")
def test_training_rows_are_read_once_and_are_part_of_a_study(
    tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train, reads = tmp_path / "train" / "antonym.jsonl", list[Path]()
    asked = ("--tasks", "antonym", "--limit", "1", "--signals", "norm", "--methods", "best-single,lorahub")
    asked += ("--method-args", "rows=1,budget=2", "--train-rows", str(train.parent))

    def counted(file: Path, *arguments: Any, **options: Any) -> Any:
        reads.append(file)
        return read_rows(file, *arguments, **options)

    monkeypatch.setattr("logo.evaluation.datasets.read_rows", counted)
    write_rows(train, [*heldout()["antonym"][8:9], *heldout()["antonym"][:1]])
    studied(tmp_path / "s", tasks, *asked)
    assert reads.count(train) == 1
    assert capsys.readouterr().err.count("1 of 2 training rows are test rows too, and method") == 2
    write_rows(train, heldout()["antonym"][10:12])
    studied(tmp_path / "s", tasks, *asked, code=2)
    assert "tasks.antonym.train_sha256 is" in one_line(capsys)


def test_ctrl_c_keeps_the_earlier_result(
    finished: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was to replace it goes on with the next command."""
    shutil.copytree(finished, tmp_path / "s")
    before, calls, score = (finished / "run.json").read_bytes(), list[Any](), LoGo.score

    def interrupted(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return score(*arguments, **options)

    monkeypatch.setattr(LoGo, "score", interrupted)
    studied(tmp_path / "s", tasks, *ASKED, "--overwrite", code=130)
    *_, said, last = capsys.readouterr().err.splitlines()
    assert said == "Finished rows are kept: repeat the command without --overwrite to continue."
    assert last == "logo: error: interrupted"
    assert (tmp_path / "s" / "run.json").read_bytes() == before
    names = ",".join(sorted((path.stem for path in tasks.glob("*.jsonl")), reverse=True))  # in another order
    report, whole = studied(tmp_path / "s", tasks, *ASKED, "--tasks", names), read_run(finished)["report"]
    assert (tmp_path / "s" / "run.json").read_bytes() != before
    seconds = [set(one.pop("milliseconds")) for one in (report, whole)]
    assert seconds == [{"calibrated", "norm", "random", *ALWAYS}] * 2
    assert len(calls) == 11 + 1 and report == whole
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_what_cannot_be_studied_is_said(tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "predictions.json").write_text("[]")  # as the official script writes it
    later = write_rows(tmp_path / "own" / "later.jsonl", heldout()["antonym"][:1])  # of another study
    for message, *more in (
        ("theirs holds a result without a run.json", "--limit", "1", "--save", str(tmp_path / "theirs")),
        ("protocol 'own'; known: in-pool, removed, out-of-pool", "--protocols", "own"),
        ("they ask for none of these rows", "--protocols", "out-of-pool", "--tasks", "antonym"),
        ("did you mean 'antonym'", "--tasks", "antonyms"),
        ("--save .: expected a folder of the study's own, found the current folder", "--save", "."),
        ("expected a folder of the study's own, found one with rows, antonym.jsonl, ", "--save", str(tasks)),
        ("expected a folder of the study's own, found one with rows, later.jsonl;", "--save", str(later.parent)),
    ):
        assert run(["eval", "study", *MODEL, "--rows", str(tasks), "--save", str(tmp_path / "s"), *more]) in (1, 2)
        err = capsys.readouterr().err
        assert message in err and "Traceback" not in err
    assert (tmp_path / "theirs" / "predictions.json").exists()


def test_prompts_without_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in TASKS:
        write_rows(tmp_path / "prompts" / f"{name}.jsonl", [{"prompt": row["context"]} for row in heldout()[name][:3]])
    write_rows(tmp_path / "prompts" / "other.jsonl", [{"prompt": "What is the capital of Peru?"}, {"prompt": "w8 # é"}])
    report = studied(tmp_path / "s", tmp_path / "prompts", "--signals", "norm,calibrated")
    assert set(report["protocols"][IN_POOL]) == {"norm", "calibrated"}
    assert set(report["protocols"][IN_POOL]["calibrated"]) == {"top1", "top3", "mrr", "confidence"}
    arms = [(line["task"], arm) for line in lines(tmp_path / "s") for arm in line["arms"]]
    others = (REMOVED, OUT_OF_POOL)
    for kind, among, name, sure in (("mistaken", others, "calibrated", UNSURE), ("confusions", (IN_POOL,), "norm", 0)):
        asked = [(task, arm) for task, arm in arms if arm["protocol"] in among and arm["arm"] == name]
        firsts = [(task, arm["first"]) for task, arm in asked if (arm["confidence"] or 0) >= sure]
        confused = Counter((task, first) for task, first in firsts if first != task)
        assert {(one["task"], one["first"]): one["rows"] for one in report[kind].get(name, [])} == confused
    top1 = report["protocols"][IN_POOL]["norm"]["top1"]["value"]
    assert top1 == same_scores(1 - sum(confused.values()) / 9)
    said = report["confidence"]["calibrated"]["sure"]
    high = [arm["confidence"] >= UNSURE for task, arm in arms if task == "other" and arm["arm"] == "calibrated"]
    assert said[IN_POOL] == 1 and 0 < said[OUT_OF_POOL] == sum(high) / len(high)
    shown = capsys.readouterr().out
    assert "norm puts another adapter first" in shown and "calibrated is 0.5 or more: 100% of in-pool, " in shown


def test_any_gold_text_counts_and_no_prompt_is_cut_for_a_longer_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"context": "What is 7 plus 5?", "completion": ["twelve", "12"]}]
    rows += [{"context": f"What is 4 plus 5? {'It rains. ' * 30}", "completion": "9"}]
    write_rows(tmp_path / "rows" / "add_numbers.jsonl", rows)
    studied(tmp_path / "s", tmp_path / "rows", "--signals", "calibrated", "--protocols", "in-pool")
    [several, _] = [line["arms"][0] for line in lines(tmp_path / "s")]
    assert several["exact_match"] == 1 and several["nll"] < 1 and "is cut" not in capsys.readouterr().err


def test_a_study_has_the_selections_that_its_options_say(tmp_path: Path, tasks: Path) -> None:
    how = ("--tasks", "antonym", "--limit", "1", "--signals", "calibrated", "--protocols", "in-pool")
    studied(tmp_path / "s", tasks, *how, "-k", "2", "--prior", "0.3")
    settings = read_run(tmp_path / "s")["identity"]["settings"]
    assert (settings["k"], settings["prior"]) == (2, 0.3)
    [record] = lines(tmp_path / "s")
    [row] = heldout()["antonym"][:1]
    selection = LoGo.from_pretrained("demo", device="cpu", k=2, prior=0.3).select(row["context"])
    assert record["arms"][0]["selected"] == list(selection.adapters)
    assert record["arms"][0]["confidence"] == same_scores(selection.confidence)


@pytest.mark.filterwarnings("always")
@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_prompts_that_adapters_know_are_said(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("antonym", "plural", "french"):
        shutil.copytree(adapters_dir() / name, tmp_path / "pool" / name)
        write_rows(tmp_path / "rows" / f"{name}.jsonl", heldout()[name][:4])
    for name, count in (("antonym", 3), ("french", 2)):  # two rows are of both
        write_examples(tmp_path / "pool" / name, [row["context"] for row in heldout()["antonym"][:count]])
    learnt = tmp_path / "learnt" / f"plural.{suffix}"
    known = heldout()["plural"][2:8]
    write_rows(learnt, known)
    if suffix == "csv":
        learnt.write_text("context,completion\n" + "".join(f"{row['context']},x\n" for row in known))
    (tmp_path / "pool" / "plural" / "logo.yaml").write_text(f"rows: {{file: {learnt}}}\n")
    how = ("--adapters", str(tmp_path / "pool"), "--limit", "4", "--signals", "norm", "--protocols", "in-pool")
    studied(tmp_path / "s", tmp_path / "rows", *how)
    said = capsys.readouterr().err
    assert "3 rows are example prompts of adapters in the pool (3 of antonym, 2 of french): " in said
    assert "2 rows are training rows of adapters in the pool (2 of plural): " in said


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=2, max_size=40))
def test_confidence_against_its_definitions(values: list[tuple[float, bool]]) -> None:
    arm = {"arm": "s", "selected": [], "weights": []}
    own, others = ([value for value, is_own in values if is_own is kind] for kind in (True, False))
    arms = [arm | {"protocol": IN_POOL if is_own else OUT_OF_POOL, "confidence": value} for value, is_own in values]
    records = [{"task": f"t{n}", "seconds": {"s": n}, "arms": [one]} for n, one in enumerate(arms)]
    report = summary(records)
    if not own or not others:
        return
    pairs = [(a > b) + (a == b) / 2 for a in own for b in others]
    assert auroc(own, others) == pytest.approx(fmean(pairs))
    assert report["confidence"]["s"]["auroc"] == {OUT_OF_POOL: pytest.approx(fmean(pairs))}
    error = 0.0
    for low in range(10):
        inside = [(v, k) for v, k in values if min(int(v * 10), 9) == low]
        weights = [0.5 / len(own) if k else 0.5 / len(others) for _, k in inside]
        error += abs(float(np.dot(weights, [v - k for v, k in inside])))
    assert report["confidence"]["s"]["error"] == pytest.approx(error)
    assert report["milliseconds"] == {"s": 500 * (len(values) - 1)}
    assert calibration_error([1.0] * 3 + [0.0] * 2, [True] * 3 + [False] * 2) == 0.0
