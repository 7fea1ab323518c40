"""The command line as its users meet it: real processes for the main jobs, one line for everything that goes wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cyclopts import App

from logo.cli.app import app, run
from logo.selection.selector import PRIOR, UNSURE
from tolerances import PATIENCE
from warm import python

ROOT = Path(__file__).parent.parent
F1 = Path(__file__).parent / "data" / "golden" / "F1"
DATA = Path(__file__).parent / "data"
ENGINE = ["--base-model", str(F1 / "model"), "--adapters", str(F1 / "adapters"), "--device", "cpu"]


def logo(*arguments: str, cwd: Path | None = None, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    command = [*python(), "-c", "from logo.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, cwd=cwd, **kwargs)


def evaluate_arguments(result_dir: Path, *more: str) -> list[str]:
    return [
        *("--dataset", "bbh.boolean_expressions", "--data_dir", str(DATA), "--base_model", str(F1 / "model")),
        *("--adapters", str(F1 / "adapters"), "--n_selected_modules", "3", "--limit", "4", "--max_new_tokens", "8"),
        *("--device", "cpu", "--result_dir", str(result_dir), *more),
    ]


def test_help_is_light() -> None:
    """No torch, no transformers for --help; every command explains itself with an example."""
    code = (
        "import sys; from logo.cli.app import run; code = run(['--help']); "
        "heavy = [m for m in ('torch', 'transformers', 'huggingface_hub', 'nltk', 'safetensors') if m in sys.modules]; "
        "assert not heavy, heavy; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    for command in ("demo", "generate", "select", "train", "evaluate", "eval", "data", "pool"):
        assert command in done.stdout


COMMANDS = [
    *("demo", "generate", "select", "serve", "verify", "train", "evaluate"),
    *("eval run", "eval compare", "eval report", "eval study", "eval lm-eval", "data list", "data prepare"),
    *("pool inspect", "pool calibrate", "pool examples", "pool lock", "pool export", "pool push"),
]


@pytest.mark.parametrize("command", [name.split() for name in COMMANDS], ids=COMMANDS)
def test_every_command_has_help_of_one_screen_with_an_example(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) <= 45 and "Example: logo" in " ".join(shown.split())


def test_options_are_few() -> None:
    def slots(group: App) -> int:
        found = 0
        for name in (name for name in group if not name.startswith("-")):
            command = group[name]
            if command.default_command is not None:
                options = [one for one in command.assemble_argument_collection() if not list(one.children)]
                found += sum(any(flag.startswith("-") for flag in one.names) for one in options)
            found += slots(command)
        return found

    assert len(COMMANDS) == 20 and slots(app) <= 180


def test_the_shell_completes_commands_and_options(tmp_path: Path) -> None:
    script = app.generate_completion(shell="bash")
    assert "study" in script and "--max-new-tokens" in script


def test_select_lists_k_adapters_also_if_one_answers_alone(capsys: pytest.CaptureFixture[str]) -> None:
    def shown(prompt: str, *options: str) -> tuple[list[list[str]], dict[str, Any]]:
        asked = ["select", prompt, "-k", "4", *options]
        assert run(asked) == 0
        *rows, sure = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
        assert run([*asked, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        unsure = ["(unsure)"] if found["confidence"] < UNSURE else []
        assert sure == ["confidence", f"{found['confidence']:.2f}", *unsure]
        return rows, found

    alone, found = shown("What is 7 plus 5?")
    assert found["adapters"] == ["add_numbers"] and [row[0] for row in alone] == best(found["scores"], 4)
    assert float(alone[0][1]) > 0.98 and [row[1] for row in alone[1:]] == ["-"] * 3
    base, found = shown("Bake a cake", "--when-unsure", "base")
    assert not found["adapters"] and base[0] == ["base", "model", "alone"]
    assert [row[:2] for row in base[1:]] == [[name, "-"] for name in best(found["scores"], 4)]


def best(scores: dict[str, float], count: int) -> list[str]:
    return sorted(scores, key=scores.__getitem__, reverse=True)[:count]


@pytest.mark.slow
def test_prompts_from_stdin_and_a_file_on_a_terminal_without_unicode(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    for file, expected in (("-", ["zero", "one two"]), (str(tmp_path / "prompts.txt"), ["zero", "one", "two"])):
        asked = ["select", "zero", "--prompts", file, *ENGINE, "-k", "1"]
        done = logo(*asked, input="one two\n", env={**os.environ, "PYTHONIOENCODING": "ascii"})
        assert done.returncode == 0 and done.stderr == "" and "?" in done.stdout
        assert [line for line in done.stdout.splitlines() if line in ("zero", "one", "two", "one two")] == expected


def test_generate(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", "Hello", *ENGINE, "--max_new_tokens", "5", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["tokens"] == 5 and record["finish_reason"] == "length" and 1 <= len(record["adapters"]) <= 12
    assert run(["generate", "Hello", *ENGINE, "--max_new_tokens", "5", "--base-only"]) == 0
    captured = capsys.readouterr()
    assert "base model alone" in captured.err
    assert run(["generate", "Hello", *ENGINE, "--max_new_tokens", "5", "--adapter", "ad03=0.5", "--json"]) == 0
    forced = json.loads(capsys.readouterr().out)
    assert (forced["adapters"], forced["weights"]) == (["ad03"], [0.5])
    sampled = ["generate", "Hello", *ENGINE, "--max_new_tokens", "5", "--temperature", "1", "--seed", "7", "--json"]
    texts = set()
    for _ in range(2):
        assert run(sampled) == 0
        texts.add(json.loads(capsys.readouterr().out)["text"])
    assert len(texts) == 1


def test_main_without_the_package_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text((ROOT / "main.py").read_text())
    done = subprocess.run([sys.executable, "-S", "-I", "main.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "run `make demo` or `pip install -e .` first" in done.stderr


BAD = {
    "no such folder": (
        ["select", "x", "--adapters", "/no/such"],
        1,
        "no adapters in /no/such: No such file or directory",
    ),
    "k": (["select", "x", *ENGINE, "-k", "0"], 2, 'Invalid value "0" for -k. Must be >= 1'),
    "empty prompt": (["generate", "  ", *ENGINE], 2, "prompt 1 is empty"),
    "option": (["select", "x", "--base-modle", "y"], 2, "Unknown option: --base-modle. Did you mean --base-model?"),
    "choice": (
        ["select", "x", *ENGINE, "--when-unsure", "sure"],
        2,
        'Invalid value "sure" for --when-unsure. Choose from: "mix", "base", "refuse"',
    ),
    "signal": (["select", "x", *ENGINE, "--signal", "nrom"], 2, "did you mean 'norm'"),
    "command": (["slect", "x"], 2, 'Unknown command "slect". Did you mean "select"?'),
    "base model": (["select", "x", "--base-model", "Qwen2.5-8B", *ENGINE[2:]], 1, "did you mean 'Qwen2.5-7B'"),
    "weight": (["generate", "x", *ENGINE, "--adapter", "ad01=much"], 2, "expected NAME or NAME=WEIGHT"),
    "adapter": (["generate", "x", *ENGINE, "--adapter", "ad99"], 1, "did you mean 'ad0"),
    "context": (["generate", "x", *ENGINE, "--max-new-tokens", "5000"], 2, "context holds 4096 tokens"),
    "prompt file": (["select", "--prompts", "/no/such", *ENGINE], 1, "prompt file /no/such"),
    "pool": (["pool", "inspect", "/no/such"], 1, "no adapters in /no/such: No such file"),
    "dtype": (["select", "x", *ENGINE, "--dtype", "int8"], 2, "expected 'auto', 'float32'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, code, message = BAD[case]
    assert run(arguments) == code
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line and not line.startswith("No --base-model")]
    assert len(lines) == 1 and lines[0].startswith("logo: error: ") and message in lines[0]
    assert captured.out == "" and "Traceback" not in captured.err


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["select", "x", "--adapters", "/no/such", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_bad_data_and_results_leave_nothing_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "bbh" / "navigate" / "test.jsonl"
    rows.parent.mkdir(parents=True)
    rows.write_text('{"context": "a", "completion": "b"}\n{"context": "a"\n')
    (tmp_path / "file").write_text("")
    cases = {
        "test.jsonl:2: expected": ["--data_dir", str(tmp_path), "--dataset", "bbh.navigate"],
        "did you mean 'bbh.boolean_expressions'": ["--dataset", "bbh.boolean_expression"],
        "cannot be written": ["--result_dir", str(tmp_path / "file" / "results")],
    }
    for message, arguments in cases.items():
        assert run(["evaluate", *evaluate_arguments(tmp_path / "results"), *arguments]) in (1, 2)
        err = capsys.readouterr().err
        assert message in err and len(err.splitlines()) == 1
    assert not [path for path in (tmp_path / "results").rglob("*") if path.is_file()]


def test_output_can_be_piped_to_a_reader_that_stops() -> None:
    code = "from logo.cli import main; main()"
    shell = f"{sys.executable} -c '{code}' select --help | head -n 1"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=PATIENCE)
    assert done.stdout and done.stderr == ""


@pytest.mark.slow
def test_demo_measures_what_it_shows(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["demo", "--limit", "2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["tasks"]) >= 12 and len(report["prompts"]) >= 12
    assert all(task["rows"] == 2 for task in report["tasks"].values())
    average = report["average"]
    assert average["base"] <= 0.3 and average["target"] >= 0.8
    assert average["logo"] == average["calibrated"] > average["norm"]
    assert average["calibrated"] >= 0.85 * average["target"]  # 0.95 on all rows, which is too long for a test
    for shown in report["prompts"]:
        assert 1 <= len(shown["adapters"]) <= report["k"] == 3 and set(shown["scores"]) == set(report["tasks"])


def test_without_a_base_model_the_demo_is_used_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["select", "What is 7 plus 5?", "--json"]) == 0
    captured = capsys.readouterr()
    assert "using the bundled demo model" in captured.err
    assert 1 <= len(json.loads(captured.out)["adapters"]) <= 3
    assert run(["generate", "What is 7 plus 5?", "--base_model", "demo", "--adapter", "add_numbers", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["text"].strip() == "12" and "using the bundled" not in captured.err


def test_the_prior_reaches_the_confidence(capsys: pytest.CaptureFixture[str]) -> None:
    def odds(*options: str) -> float:
        assert run(["select", "Tell me of hot.", "--base-model", "demo", "--device", "cpu", "--json", *options]) == 0
        found = float(json.loads(capsys.readouterr().out)["confidence"])
        return found / (1 - found)

    assert odds() == pytest.approx(odds("--prior", str(PRIOR))) == pytest.approx(4 * odds("--prior", "0.5"), rel=0.05)
    assert run(["select", "hi", "--prior", "1"]) == 2
