"""Options on the command line and in files: `--config`, devices, options of vLLM and of another method."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from logo import LoGo
from logo.cli.app import run
from logo.cli.opening import device_of
from logo.demo import adapters_dir
from logo.errors import UsageError

DEMO = ["--base-model", "demo", "--device", "cpu"]
ROWS = ["--rows", "src/logo/demo/assets/heldout", "--dataset", "antonym"]
ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "100")


def said(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> tuple[str, str]:
    assert run(list(arguments)) == code
    captured = capsys.readouterr()
    return captured.out, " ".join(captured.err.split())


# --- help


def test_the_official_command_shows_the_official_names(capsys: pytest.CaptureFixture[str]) -> None:
    official, _ = said(capsys, "evaluate", "--help")
    ours, _ = said(capsys, "eval", "run", "--help")
    for name in ("--gpu", "--selection-strategy", "--save-dir", "--generation-early-stop"):
        assert name in official and name not in ours


@pytest.mark.parametrize(
    ("command", "model", "signal"),
    [("generate", "demo", "calibrated"), ("eval run", "demo", "calibrated"), ("evaluate", "Llama-3.1-8B", "norm")],
)
def test_help_shows_the_defaults_of_the_command_itself(
    command: str, model: str, signal: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shown, _ = said(capsys, *command.split(), "--help")
    words = " ".join(shown.split())
    assert f"Hub id, folder or short name. [default: {model}]" in words
    assert re.search(rf"norm[^\[]* \[default: {signal}\]", words)


# --- devices


@pytest.mark.parametrize("name", ["auto", "cpu", "0", "3"])
def test_devices_that_may_be_missing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    assert device_of(name) == "cpu"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert device_of(name) == {"auto": "cuda:0", "cpu": "cpu", "0": "cuda:0", "3": "cuda:3"}[name]


def test_a_gpu_that_is_named_has_to_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(UsageError, match="device 'cuda:1': this machine has no GPU; use device 'cpu'"):
        device_of("cuda:1")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert (device_of("cuda"), device_of("cuda:1")) == ("cuda:0", "cuda:1")
    with pytest.raises(UsageError, match=r"device 'cuda:2': this machine has 2 GPU\(s\)"):
        device_of("2")


# --- options that vLLM does not have


def test_options_without_effect_in_vllm_are_errors_in_python() -> None:
    with pytest.raises(UsageError, match="merge: the engine 'vllm' has no such option"):
        LoGo.from_pretrained("demo", engine="vllm", merge=False)


# --- files


def selected(capsys: pytest.CaptureFixture[str], *options: str) -> Any:
    out, _ = said(capsys, "select", "What is 7 plus 5?", *DEMO, "--json", *options)
    return json.loads(out)


def test_a_file_says_what_options_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    some = [str(adapters_dir() / name) for name in ("french", "plural", "capital")]
    file.write_text(f"signal: norm\nn_selected_modules: 2\nadapters: [{', '.join(some)}]\nsystem: null\n")
    asked = ("--signal", "norm", *(word for place in some for word in ("--adapters", place)))
    assert selected(capsys, "--config", str(file)) == selected(capsys, *asked, "-k", "2")
    # The command line counts more than the file, in any order.
    three = selected(capsys, *asked, "-k", "3")
    assert (
        selected(capsys, "-k", "3", "--config", str(file))
        == selected(capsys, "--config", str(file), "-k", "3")
        == three
    )


def test_official_names_are_read_from_files_of_the_official_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"selection_strategy": "norm", "gpu": -1, "n_selected_modules": 2}))
    how = ["--base-model", "demo", "--data-dir", *ROWS[1:], "--limit", "1", "--max-new-tokens", "2"]
    how += ["--result-dir", str(tmp_path)]
    said(capsys, "evaluate", "--config", str(file), *how)
    [run_file] = tmp_path.rglob("*/run.json")
    assert run_file.parent.parent.name == "demo_selection_norm_n_2_seed_0"


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [
        ("sgnal: norm", 2, 'Unknown option: "[sgnal]" from --config'),
        ("- norm", 1, "expected options by name, found list"),
        ("a: [", 1, "expected YAML or JSON"),
        ("seed: many", 2, 'Unknown option: "[seed]"'),
        ("n_selected_modules: many", 2, 'unable to convert "many" into int'),
        (
            "command: {name: eval study, options: {}}",
            2,
            "`logo eval study` wrote it; expected a file for",
        ),
        ("command: {name: select}", 1, "expected options by name, found NoneType"),
        ("command: {name: select, options: {}, plugins: ['a:b']}", 2, "add --plugin a:b"),
        ("config: x", 2, 'Unknown option: "[config]"'),
    ],
)
def test_what_cannot_be_read(
    content: str, code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(content)
    _, err = said(capsys, "select", "x", *DEMO, "--config", str(file), code=code)
    assert message in err and err.startswith("logo: error: ")
    assert "cannot be read" in said(capsys, "select", "x", "--config", str(tmp_path / "none"), code=1)[1]


def test_the_file_of_a_run_gives_no_leave_to_replace_its_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    how = [*DEMO, *ROWS, "--max-new-tokens", "2", "--result-dir", str(tmp_path)]
    said(capsys, "eval", "run", *how, "--limit", "2", "--overwrite")
    [file] = tmp_path.rglob("run.json")
    before = file.read_bytes()
    _, err = said(capsys, "eval", "run", "--config", str(file), "--limit", "1", code=2)
    assert "rows is 2, not 1; --overwrite replaces it" in err and file.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["eval", "run", *ROWS, "--method", "uniform", "--method-args", "budget=3"],
            "'uniform' has no option 'budget'",
        ),
        (["eval", "run", *ROWS, "--method", "base", "-k", "3"], "method 'base' has no number of adapters"),
        (["eval", "run", *ROWS, "--method-args", "rows=3"], "--method-args is for --method; the method is logo"),
        (["generate", "x", "--adapter", "antonym", "--base-only"], "--base-only and --adapter exclude each other"),
        (["serve", "--replicas", "2"], "--replicas is only for --engine vllm"),
        (["serve", "--engine", "vllm", "x"], "'x': expected options only; flags for vLLM follow after `--`"),
        (["serve", "--", "--max-model-len", "9"], "--max-model-len is only for --engine vllm"),
        (["serve", "--engine", "vllm", "--max-queue", "2"], "Unknown option: --max-queue"),
        (["serve", "--engine", "vllm", "--log", "json"], "--log is not for --engine vllm: set VLLM_LOGGING_CONFIG"),
    ],
)
def test_an_option_of_something_else_is_an_error(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    at = arguments.index("--") if "--" in arguments else len(arguments)
    _, err = said(capsys, *arguments[:at], "--base-model", "demo", *arguments[at:], code=2)
    assert message in err
