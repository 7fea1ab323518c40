"""Runs that were killed go on: real processes on the bundled model, kill -9 in the middle, the same bytes at last."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from logo import LoGo
from logo.cli.run import run
from logo.errors import UsageError
from logo.evaluation.results import RESULT_FILES
from logo.evaluation.resume import journal_of
from warm import python

pytestmark = pytest.mark.slow

SAME = [name for name in RESULT_FILES if name not in ("run.json", "time_dict.json")]
RUN = "demo_selection_norm_n_3_seed_0"
COUNT = 24
# Long answers, so that there is time to be killed in.
ENGINE = ["--base-model", "demo", "-k", "3", "--device", "cpu", "--no-merge"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks of the demo world; some of their prompts are long enough to share what they begin with."""
    from logo.demo import heldout

    root = tmp_path_factory.mktemp("rows")
    held = heldout()
    for name in ("antonym", "capital"):
        some = [
            row | {"context": "Please answer me. " * 12 * (i % 3 == 0) + row["context"]}
            for i, row in enumerate(held[name][:COUNT])
        ]
        (root / f"{name}.jsonl").write_text("\n".join(map(json.dumps, some)))
    return root


def command(rows: Path, results: Path, *more: str) -> list[str]:
    return ["evaluate", *ENGINE, "--rows", str(rows), "--result-dir", str(results), "--max-new-tokens", "48", *more]


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in SAME}


# Runs `logo` and dies, as of kill -9, of the first batch that is answered while the journal has so many records: its
# answers are there and not yet written down.
DOOMED = """
import os, signal, sys
from pathlib import Path
from logo import LoGo
from logo.cli import main
journal, after = Path(sys.argv.pop(1)), int(sys.argv.pop(1))
generate = LoGo.generate
def deadly(*arguments, **options):
    answers = generate(*arguments, **options)
    if journal.exists() and journal.read_bytes().count(b"\\n") > after:
        os.kill(os.getpid(), signal.SIGKILL)
    return answers
LoGo.generate = deadly
main()
"""


def kill_in_the_middle(arguments: list[str], journal: Path, after: int) -> int:
    """Starts the command and kills it once the journal has so many records; returns how many it had then."""
    done = subprocess.run([*python(), "-c", DOOMED, str(journal), str(after), *arguments], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    return journal.read_bytes().count(b"\n") - 1


def count_prompts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts that are answered from here on."""
    asked: list[str] = []
    generate = LoGo.generate

    def counting(self: LoGo, prompts: list[str], **options: Any) -> Any:
        asked.extend(prompts)
        return generate(self, prompts, **options)

    monkeypatch.setattr(LoGo, "generate", counting)
    return asked


def test_kill_9_in_the_middle(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the first dataset and again in the second: the third command ends with the bytes of a whole run."""
    arguments = command(rows, tmp_path / "killed", "--batch-size", "3")
    assert run(command(rows, tmp_path / "whole", "--batch-size", "3")) == 0
    whole = capsys.readouterr()
    first, second = (tmp_path / "killed" / RUN / name for name in ("antonym", "capital"))
    done = kill_in_the_middle(arguments, journal_of(first), after=2)
    assert 2 <= done < COUNT // 3 and not first.exists()
    done = kill_in_the_middle(arguments, journal_of(second), after=1)
    assert 1 <= done < COUNT // 3 and first.exists() and not second.exists() and not journal_of(first).exists()
    with journal_of(second).open("ab") as stream:  # the last record was cut
        stream.write(b'{"instances": [{"value": 1, "pred')
    asked = count_prompts(monkeypatch)
    assert run(arguments) == 0
    assert len(asked) == COUNT - 3 * done
    for name in ("antonym", "capital"):
        assert contents(tmp_path / "killed" / RUN / name) == contents(tmp_path / "whole" / RUN / name)
    captured = capsys.readouterr()
    assert captured.out == whole.out.replace("whole", "killed")  # the official lines, of the skipped dataset too
    assert "antonym is done already (--overwrite answers it again)" in captured.err
    assert sorted(path.name for path in second.parent.iterdir()) == ["antonym", "capital"]
    one, other = (json.loads((tmp_path / at / RUN / "capital" / "run.json").read_text()) for at in ("killed", "whole"))
    assert one["fingerprint"] == other["fingerprint"]
    assert one["forms"] == other["forms"] == {"gated": COUNT}  # of all rows, whichever process answered them
    assert one["identity"]["merge"] is False
    times = json.loads((second / "time_dict.json").read_text())
    assert times["inference"] >= times["probe"] + times["generate"]  # what the killed process took counts


def test_an_unfinished_run_goes_on_with_another_metric(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers do not depend on the metric: those that are there are judged again, and a finished result is not."""
    same = ["--dataset", "antonym", "--batch-size", "3"]
    arguments, folder = command(rows, tmp_path / "killed", *same), tmp_path / "killed" / RUN / "antonym"
    done = kill_in_the_middle([*arguments, "--metric", "em"], journal_of(folder), after=2)
    asked = count_prompts(monkeypatch)
    assert run([*arguments, "--metric", "rouge"]) == 0
    assert len(asked) == COUNT - 3 * done
    assert run(command(rows, tmp_path / "whole", *same, "--metric", "rouge")) == 0
    assert contents(folder) == contents(tmp_path / "whole" / RUN / "antonym")
    capsys.readouterr()
    assert run([*arguments, "--metric", "em"]) == 2
    assert f"judged anew by `logo eval report {folder} --metric em`" in capsys.readouterr().err


def test_what_is_done_is_not_done_again(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = command(rows, tmp_path, "--dataset", "antonym", "--limit", "3")
    assert run(arguments) == 0
    folder = tmp_path / RUN / "antonym"
    before, first = contents(folder), capsys.readouterr()
    asked = count_prompts(monkeypatch)
    assert run([*arguments, "--batch-size", "2"]) == 0 and not asked  # how many at once makes no difference
    again = capsys.readouterr()
    assert again.out == first.out and "done already" in again.err
    assert run([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["skipped"] is True
    (folder / "rows.json").unlink()  # of a result of this run: it is made whole
    assert run(arguments) == 0 and len(asked) == 3 and contents(folder) == before
    assert f"antonym is answered again: {folder} lacks rows.json" in capsys.readouterr().err
    assert run([*arguments, "--overwrite"]) == 0 and len(asked) == 6
    assert contents(folder) == before


def interrupt(monkeypatch: pytest.MonkeyPatch, arguments: list[str], after: int) -> None:
    generate, calls = LoGo.generate, []

    def interrupted(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        if len(calls) > after:
            raise KeyboardInterrupt
        return generate(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(LoGo, "generate", interrupted)
        assert run(arguments) == 130


def test_another_runs_journal_is_refused_before_anything_is_done(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = command(rows, tmp_path, "--limit", "4", "--dataset", "capital")
    folder = tmp_path / RUN / "capital"
    interrupt(monkeypatch, arguments, after=2)
    assert "repeat the command to continue" in capsys.readouterr().err
    before = journal_of(folder).read_bytes()
    asked = count_prompts(monkeypatch)
    assert run([*arguments, "--max-new-tokens", "7"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"logo: error: dataset 'capital': {journal_of(folder)} was left by")
    assert "(max_new_tokens is 48, not 7)" in lines[0] and lines[0].endswith("--overwrite; --run-name NAME keeps both")
    assert journal_of(folder).read_bytes() == before and not asked
    assert run([*arguments, "--max-new-tokens", "7", "--overwrite"]) == 0
    assert len(asked) == 4 and not journal_of(folder).exists()


def test_an_option_that_cannot_be_used_leaves_nothing_in_the_way(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command(rows, tmp_path, "--dataset", "antonym", "--limit", "3")
    assert run([*arguments, "--max-new-tokens", "5000"]) == 2
    assert "max_new_tokens is 5000, but the model's context holds 512" in capsys.readouterr().err
    assert not (tmp_path / RUN / "antonym").exists()
    assert run(arguments) == 0


def test_an_earlier_result_stays_until_the_new_one_is_whole(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = command(rows, tmp_path, "--dataset", "antonym", "--limit", "4")
    assert run(arguments) == 0
    before = contents(tmp_path / RUN / "antonym")
    interrupt(monkeypatch, [*arguments, "--overwrite"], after=2)
    assert contents(tmp_path / RUN / "antonym") == before
    asked = count_prompts(monkeypatch)
    assert run(arguments) == 0 and len(asked) == 2  # a journal means that there is something to finish


@pytest.mark.parametrize(
    "more",
    [
        ["--probe-context", "carry"],
        ["--preset", "official"],
    ],
    ids=["carry", "official"],
)
def test_where_rows_depend_on_each_other_a_dataset_begins_again(
    more: list[str], rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = (command(rows, tmp_path / at, "--limit", "4", *more) for at in ("whole", "parts"))
    assert run(whole) == 0
    interrupt(monkeypatch, parts, after=6)
    asked = count_prompts(monkeypatch)
    assert run(parts) == 0
    assert len(asked) == 4
    for folder in (tmp_path / "whole").glob("*/*"):
        assert contents(tmp_path / "parts" / folder.relative_to(tmp_path / "whole")) == contents(folder)


def test_one_bad_row_is_told_and_the_rest_is_there(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = LoGo.generate
    bad = json.loads((rows / "capital.jsonl").read_text().splitlines()[2])["context"]

    def refusing(self: LoGo, prompts: list[str], **options: Any) -> Any:
        if bad in prompts:
            raise UsageError("prompt 1: not this one")
        return generate(self, prompts, **options)

    monkeypatch.setattr(LoGo, "generate", refusing)
    arguments = command(rows, tmp_path, "--limit", "4", "--batch-size", "2")
    for _ in range(2):  # and told again when the same command is given again
        assert run([*arguments, "--json"]) == 1
        captured = capsys.readouterr()
        assert captured.err.splitlines()[-1] == "logo: error: capital row 3 has no answer: prompt 1: not this one"
        first, second = json.loads(captured.out)
        assert first["errors"] == [] and second["errors"] == [{"row": 3, "message": "prompt 1: not this one"}]
    folder = tmp_path / RUN / "capital"
    files = {name: json.loads((folder / name).read_text()) for name in SAME}
    assert files["predictions.json"][2] == "" and files["eval_results.json"][2] == 0
    assert files["selected_loras.json"][2] == files["weights.json"][2] == []
    assert files["metric_dict.json"]["norm"][2] == [None] * 16
    assert [len(files["selected_loras.json"][i]) for i in (0, 1, 3)] == [3, 3, 3]
    assert files["metrics.json"]["errors"] == [{"index": 2, "message": "prompt 1: not this one"}]
    assert run(arguments) == 1
    table = capsys.readouterr().err
    assert "no answer" in table and "Accuracy" in table


def test_two_processes_do_not_work_on_one_dataset(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = command(rows, tmp_path, "--dataset", "antonym", "--limit", "3")
    generate = LoGo.generate
    codes = []

    def twice(self: LoGo, prompts: list[str], **options: Any) -> Any:
        if not codes:
            codes.append(0)
            codes[0] = run(arguments)
        return generate(self, prompts, **options)

    monkeypatch.setattr(LoGo, "generate", twice)
    assert run(arguments) == 0 and codes == [2]
    assert "another process is working on this run" in capsys.readouterr().err
