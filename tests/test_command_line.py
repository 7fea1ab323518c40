"""Options on the command line and in files: `--config`, devices, options of vLLM and of another method."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from logo import LoGo
from logo.cli import belonging
from logo.cli.app import app, run
from logo.cli.opening import device_of
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
    assert "--gpu," in official and "--selection-strategy," in official
    assert "--gpu," not in ours and "--selection-strategy" not in ours


@pytest.mark.parametrize(
    ("command", "model", "signal"),
    [
        ("generate", "demo", "calibrated"),
        ("eval run", "Llama-3.1-8B", "norm"),
        ("evaluate", "Llama-3.1-8B", "norm"),
    ],
)
def test_help_shows_the_defaults_of_the_command_itself(
    command: str, model: str, signal: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shown, _ = said(capsys, *command.split(), "--help")
    words = " ".join(shown.split())
    assert f"Hub id, folder or short name. [{model}]" in words
    assert re.search(rf"`calibrated`[^\[]* \[{signal}\]", words)


def test_options_that_few_need_stand_below_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    shown, _ = said(capsys, "generate", "--help")
    assert (
        shown.index("--max-new-tokens")
        < shown.index("--config")
        < shown.index("Rarely needed")
        < shown.index("--top-p")
    )


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu"], "--device: the engine 'vllm' has no such option; set CUDA_VISIBLE_DEVICES"),
        (["--device-map", "auto"], "--device-map: the engine 'vllm' has no such option; use `--vllm-options"),
        (["--no-merge"], "--no-merge: the engine 'vllm' has no such option; nothing is merged there"),
        (["--allow-pickle"], "--allow-pickle: the engine 'vllm' has no such option"),
        (["--batch-size", "4"], "--batch-size: the engine 'vllm' runs all prompts at once"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.parametrize("command", ["generate", "select"])
def test_options_without_effect_in_vllm_are_errors(
    command: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _, error = said(capsys, command, "x", "--base-model", "demo", "--engine", "vllm", *arguments, code=2)
    assert message in error


def test_options_without_effect_in_vllm_are_errors_in_python_too() -> None:
    with pytest.raises(UsageError, match="merge: the engine 'vllm' has no such option"):
        LoGo.from_pretrained("demo", engine="vllm", merge=False)


# --- files


def selected(capsys: pytest.CaptureFixture[str], *options: str) -> Any:
    out, _ = said(capsys, "select", "What is 7 plus 5?", *DEMO, "--json", *options)
    return json.loads(out)


def test_a_file_says_what_options_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("signal: norm\nk: 2\nunsure_below: 0.4\ncandidate: [french, plural, capital]\nmerge: null\n")
    among = [word for name in ("french", "plural", "capital") for word in ("--candidate", name)]
    asked = ("--signal", "norm", "--unsure-below", "0.4", *among)
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
    how = ["--base-model", "demo", *ROWS, "--limit", "1", "--max-new-tokens", "2", "--result-dir", str(tmp_path)]
    said(capsys, "evaluate", "--config", str(file), *how)
    [run_file] = tmp_path.rglob("*/run.json")
    assert run_file.parent.parent.name == "demo_selection_norm_n_2_seed_0"


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [
        ("sgnal: norm", 2, "no option 'sgnal' (did you mean 'signal'?); `logo select --help` shows all"),
        ("- norm", 1, "expected options by name, found list"),
        ("a: [", 1, "expected YAML or JSON"),
        ("k: many", 2, "Invalid value for"),
        ("command: {name: eval study, options: {}}", 2, "`logo eval study` wrote it; expected"),
        ("command: {name: select}", 1, "expected the command's options by name, found NoneType"),
        ("command: {name: select, options: {}, plugins: ['a:b']}", 2, "add --plugin a:b"),
        ("help: 1", 2, "no option 'help'"),
        ("config: x", 2, "no option 'config'"),
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


def test_an_answer_is_repeated_from_its_own_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    asked = ["What is 7 plus 5?", *DEMO, "--max-new-tokens", "4", "--unsure-below", "0.4", "--signal", "norm"]
    said(capsys, "generate", *asked, "--save", str(first))
    said(capsys, "generate", "--config", str(first), "--save", str(second))
    one, two = (json.loads(file.read_text()) for file in (first, second))
    for name in ("prompt", "text", "adapters"):
        assert one["answers"][0][name] == two["answers"][0][name]
    assert {**one["command"]["options"], "save": ""} == {**two["command"]["options"], "save": ""}
    assert one["command"]["options"]["unsure_below"] == 0.4


@pytest.mark.parametrize("command", [["eval", "run"], ["evaluate"]], ids=" ".join)
def test_a_run_is_repeated_from_its_own_file(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    how = [*DEMO, *ROWS, "--limit", "2", "--max-new-tokens", "4", "--n-selected-modules", "2"]
    said(capsys, *command, *how, "--result-dir", str(tmp_path / "one"))
    [file] = (tmp_path / "one").rglob("run.json")
    said(capsys, "eval", "run", "--config", str(file), "--result-dir", str(tmp_path / "two"))
    [again] = (tmp_path / "two").rglob("run.json")
    one, two = (json.loads(found.read_text()) for found in (file, again))
    assert one["fingerprint"] == two["fingerprint"] and one["options"]["n_selected_modules"] == 2
    for name in ("predictions.json", "weights.json", "selected_loras.json"):
        assert file.with_name(name).read_bytes() == again.with_name(name).read_bytes()
    said(capsys, "eval", "run", "--config", str(file))  # and is done already, where it was written
    assert not (ROOT / "results").exists() or file.exists()


def test_the_file_of_a_run_gives_no_leave_to_replace_its_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    how = [*DEMO, *ROWS, "--max-new-tokens", "2", "--result-dir", str(tmp_path)]
    said(capsys, "eval", "run", *how, "--limit", "2", "--overwrite")
    [file] = tmp_path.rglob("run.json")
    before = file.read_bytes()
    _, err = said(capsys, "eval", "run", "--config", str(file), "--limit", "1", code=2)
    assert "rows is 2, not 1; --overwrite replaces it" in err and file.read_bytes() == before


# --- options of another method


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", *ROWS, "--method", "uniform", "--lorahub-budget", "3"], "lorahub, but the method is uniform"),
        (["eval", "run", *ROWS, "--shots", "3"], "--shots is only for --method best-single, lorahub"),
        (["eval", "run", *ROWS, "--method", "base", "--signal", "norm"], "--signal is only for --method logo, but the"),
        (["evaluate", *ROWS, "--method", "uniform", "-k", "3"], "--n-selected-modules is only for --method logo"),
        (["eval", "study", *ROWS[:2], "--save", "s.json", "--shots", "2"], "but the method is logo"),
        (["select", "x", "--signal", "entropy", "--examples", "ignore"], "but the signal is entropy"),
        (["eval", "study", *ROWS[:2], "--save", "s.json", "--signals", "norm", "--signal", "norm"], "leave out one"),
        (["generate", "x", "--seed", "3"], "--seed 3 is only for sampling"),
        (["generate", "x", "--adapter", "antonym", "-k", "2"], "-k configures how adapters are selected, but"),
        (["generate", "x", "--base-only", "--when-unsure", "refuse"], "--when-unsure configures how adapters"),
        (["generate", "x", "--sample", "--temperature", "0"], "--temperature 0: expected more than 0"),
        (["serve", "--no-merge"], "--no-merge is not for this server"),
    ],
)  # fmt: skip
def test_an_option_of_something_else_is_an_error(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _, err = said(capsys, *arguments, "--base-model", "demo", code=2)
    assert message in err


def test_the_options_that_belong_to_something_exist() -> None:
    def parameters(group: Any) -> set[str]:
        below = [parameters(one) for one in getattr(group, "commands", {}).values()]
        return {one.name for one in group.params}.union(*below)

    assert {*belonging.OF_METHODS, *belonging.OF_SELECTION, belonging.K} <= parameters(get_command(app))
