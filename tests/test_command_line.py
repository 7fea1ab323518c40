"""Options on the command line and in files: old names, `--config`, `--set`, `--help-all`, options of another method."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from logo import LoGo
from logo.cli.opening import device_of
from logo.cli.options import EngineOptions, device_name
from logo.cli.renamed import modernised
from logo.cli.run import run
from logo.errors import UsageError
from logo.models import pick_device

DEMO = ["--base-model", "demo", "--device", "cpu"]
ROWS = ["--rows", "src/logo/demo/assets/heldout", "--dataset", "antonym"]
ROOT = Path(__file__).parent.parent
RUNS = ["generate", "select", "serve", "train", "evaluate", "eval run", "eval sweep", "eval study", "pool calibrate"]


@pytest.fixture(autouse=True)
def at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "100")


def said(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> tuple[str, str]:
    assert run(list(arguments)) == code
    captured = capsys.readouterr()
    return captured.out, " ".join(captured.err.split())


# --- help


@pytest.mark.parametrize("command", RUNS)
def test_help_fits_a_screen_and_help_all_shows_every_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    short, _ = said(capsys, *command.split(), "--help")
    assert len(short.splitlines()) <= 40, short
    everything, _ = said(capsys, *command.split(), "--help-all")
    shown = {word for word in short.split() if word.startswith("--")}
    assert shown <= set(everything.split()) and "--help-all" in shown
    if command not in ("train",):
        assert "--probe-text" in everything and "--probe-text" not in short


def test_the_official_command_shows_the_official_names(capsys: pytest.CaptureFixture[str]) -> None:
    official, _ = said(capsys, "evaluate", "--help")
    ours, _ = said(capsys, "eval", "run", "--help")
    assert "--gpu" in official and "--selection-strategy" in official
    assert "--gpu" not in ours and "--selection-strategy" not in ours


@pytest.mark.parametrize(
    ("command", "model", "signal"),
    [
        ("generate", "demo", "calibrated"),
        ("eval sweep", "demo", "norm"),
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
    assert f"`norm` or `entropy`. [{signal}]" in words


# --- old names


@pytest.mark.parametrize(
    ("command", "known", "old", "new"),
    [
        ("select", {"--signal"}, ["--selection_strategy", "norm"], ["--signal", "norm"]),
        ("select", {"--device"}, ["--gpu=-1"], ["--device=-1"]),
        ("select", {"--device"}, ["--", "--gpu"], ["--", "--gpu"]),
        ("plan", {"--gpu"}, ["--gpu", "H100"], ["--gpu", "H100"]),
        ("study", {"--save", "--json"}, ["--json", "s.json"], ["--save", "s.json"]),
        ("study", {"--save", "--json"}, ["--save", "s.json", "--json"], ["--save", "s.json", "--json"]),
        ("study", {"--png"}, ["--heatmap", "s.png"], ["--png", "s.png"]),
        ("generate", {"--save", "--json"}, ["--json", "a prompt"], ["--json", "a prompt"]),
        ("report", {"--pictures"}, ["--png", "d"], ["--pictures", "d"]),
        ("health", {"--png"}, ["--png", "d"], ["--png", "d"]),
        ("train", {"--rows", "--tasks"}, ["--tasks", "d", "--only", "a"], ["--rows", "d", "--tasks", "a"]),
        ("train", {"--rows", "--tasks"}, ["--rows", "d", "--tasks", "a"], ["--rows", "d", "--tasks", "a"]),
        ("train", {"--rows", "--tasks"}, ["--tasks", "src"], ["--rows", "src"]),
        ("train", {"--rows", "--tasks"}, ["--config", "c", "--tasks", "a"], ["--config", "c", "--tasks", "a"]),
        (
            "prepare",
            {"--limit", "--train-limit"},
            ["--rows", "3", "--train-rows=2"],
            ["--limit", "3", "--train-limit=2"],
        ),
        ("run", {"--rows", "--limit"}, ["--rows", "d"], ["--rows", "d"]),
    ],
)
def test_old_options_become_the_new_ones(
    command: str, known: set[str], old: list[str], new: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert list(modernised(old, known, command)) == new
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == sum(one != other for one, other in zip(old, new, strict=True))
    assert all("is called --" in note and "next version" in note for note in notes)


def test_an_old_option_answers_as_the_new_one(capsys: pytest.CaptureFixture[str]) -> None:
    new, quiet = said(capsys, "select", "What is 7 plus 5?", *DEMO, "--signal", "norm", "--json")
    asked = ("--base-model", "demo", "--gpu", "-1", "--selection-strategy", "norm", "--json")
    old, notes = said(capsys, "select", "What is 7 plus 5?", *asked)
    assert old == new and quiet == ""
    assert "--gpu is called --device now" in notes and "--selection-strategy is called --signal now" in notes


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
    for name in ("cuda", "cuda:1"):
        with pytest.raises(UsageError, match=f"device '{name}': this machine has no GPU; use device 'cpu'"):
            device_of(name)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert (device_of("cuda"), device_of("cuda:1")) == ("cuda:0", "cuda:1")
    with pytest.raises(UsageError, match=r"device 'cuda:2': this machine has 2 GPU\(s\)"):
        device_of("2")


def test_one_rule_chooses_the_device_for_the_command_line_and_for_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for apple, auto in ((True, "mps"), (False, "cpu")):
        monkeypatch.setattr("torch.backends.mps.is_available", lambda apple=apple: apple)
        assert device_of(device_name("auto")) == str(pick_device("auto")) == auto
        assert device_of(device_name("0")) == auto
        assert device_of(device_name("-1")) == "cpu"
    with pytest.raises(UsageError, match="device 'mps': this machine has no GPU of Apple's; use device 'cpu'"):
        device_of(device_name("mps"))


# --- options that vLLM does not have


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu"], "--device: the engine 'vllm' has no such option; set CUDA_VISIBLE_DEVICES"),
        (["--device", "cuda:0"], "--device: the engine 'vllm' has no such option"),
        (["--device-map", "auto"], "--device-map: the engine 'vllm' has no such option; use `--vllm-options"),
        (["--no-fold"], "--no-fold: the engine 'vllm' has no such option; nothing is folded there"),
        (["--fold"], "--fold: the engine 'vllm' has no such option"),
        (["--adapter-memory-gb", "1"], "--adapter-memory-gb: the engine 'vllm' has no such option; vLLM keeps"),
        (["--adapter-cache-gb", "1"], "--adapter-cache-gb: the engine 'vllm' has no such option; vLLM keeps"),
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
    for fold in (True, False):
        with pytest.raises(UsageError, match="fold: the engine 'vllm' has no such option"):
            LoGo.from_pretrained("demo", engine="vllm", fold=fold)


# --- files and --set


def selected(capsys: pytest.CaptureFixture[str], *options: str) -> Any:
    out, _ = said(capsys, "select", "What is 7 plus 5?", *DEMO, "--json", *options)
    return json.loads(out)


def test_set_and_config_say_what_options_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("signal: norm\nk: 2\nprobe-text: all\n")
    asked = ("--signal", "norm", "--probe-text", "all")
    by_options = selected(capsys, *asked, "-k", "2")
    assert selected(capsys, "--config", str(file)) == by_options
    assert selected(capsys, *(f"--set={pair}" for pair in ("signal=norm", "k=2", "probe_text=all"))) == by_options
    # The command line counts more than --set, and that more than the file, in any order.
    three = selected(capsys, *asked, "-k", "3")
    assert selected(capsys, "-k", "3", "--config", str(file), "--set", "k=1") == three
    assert selected(capsys, "--set", "k=3", "--config", str(file)) == three
    assert selected(capsys, "--config", str(file), "--set", "k=3") == three


def test_old_and_official_names_are_read_from_files_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"selection_strategy": "norm", "gpu": -1, "n_selected_modules": 2, "fold": None}))
    assert selected(capsys, "--config", str(file)) == selected(capsys, "--signal", "norm", "-k", "2")


@pytest.mark.parametrize(
    ("content", "options", "code", "message"),
    [
        ("sgnal: norm", [], 2, "no option 'sgnal' (did you mean 'signal'?); `logo select --help-all` shows all"),
        ("- norm", [], 1, "expected options by name, found list"),
        ("a: [", [], 1, "expected YAML or JSON"),
        ("k: many", [], 2, "Invalid value for"),
        ("{versions: {}, options: {}}", [], 1, "an earlier version wrote this run"),
        (
            "command: {name: eval sweep, options: {}}",
            [],
            2,
            "`logo eval sweep` wrote it; expected",
        ),
        ("command: {name: select}", [], 1, "expected the command's options by name, found NoneType"),
        ("command: {name: select, options: {}, plugins: ['a:b']}", [], 2, "add --plugin a:b"),
        ("{}", ["--set", "k"], 2, "--set 'k': expected KEY=VALUE"),
        ("{}", ["--set", "help=1"], 2, "no option 'help'"),
        ("{}", ["--set", "config=x"], 2, "no option 'config'"),
    ],
)
def test_what_cannot_be_read(
    content: str, options: list[str], code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(content)
    _, err = said(capsys, "select", "x", *DEMO, "--config", str(file), *options, code=code)
    assert message in err and err.startswith("logo: error: ")
    assert "cannot be read" in said(capsys, "select", "x", "--config", str(tmp_path / "none"), code=1)[1]


def test_an_answer_is_repeated_from_its_own_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    asked = ["What is 7 plus 5?", *DEMO, "--max-new-tokens", "4", "--set", "probe-text=all", "--signal", "norm"]
    said(capsys, "generate", *asked, "--save", str(first))
    said(capsys, "generate", "--config", str(first), "--save", str(second))
    one, two = (json.loads(file.read_text()) for file in (first, second))
    for name in ("prompt", "text", "adapters"):
        assert one["answers"][0][name] == two["answers"][0][name]
    assert {**one["command"]["options"], "save": ""} == {**two["command"]["options"], "save": ""}
    assert one["command"]["options"]["probe_text"] == "all"


@pytest.mark.parametrize("command", [["eval", "run"], ["evaluate"]], ids=" ".join)
def test_a_run_is_repeated_from_its_own_file(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    how = [*DEMO, *ROWS, "--limit", "2", "--max-new-tokens", "4", "--merge", "ties", "--merge-density", "0.4"]
    said(capsys, *command, *how, "--result-dir", str(tmp_path / "one"))
    [file] = (tmp_path / "one").rglob("run.json")
    said(capsys, "eval", "run", "--config", str(file), "--result-dir", str(tmp_path / "two"))
    [again] = (tmp_path / "two").rglob("run.json")
    one, two = (json.loads(found.read_text()) for found in (file, again))
    assert one["fingerprint"] == two["fingerprint"] and one["options"]["merge"] == two["options"]["merge"] == "ties"
    for name in ("predictions.json", "weights.json", "selected_loras.json"):
        assert file.with_name(name).read_bytes() == again.with_name(name).read_bytes()
    said(capsys, "eval", "run", "--config", str(file))  # and is done already, where it was written
    assert not (ROOT / "results").exists() or file.exists()


def test_the_file_of_a_run_gives_no_leave_to_replace_its_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    how = [*DEMO, *ROWS, "--dataset", "antonym", "--max-new-tokens", "2", "--result-dir", str(tmp_path)]
    said(capsys, "eval", "run", *how, "--limit", "2", "--overwrite")
    [file] = tmp_path.rglob("run.json")
    before = file.read_bytes()
    _, err = said(capsys, "eval", "run", "--config", str(file), "--limit", "1", code=2)
    assert "rows is 2, not 1; --overwrite replaces it" in err and file.read_bytes() == before
    said(capsys, "eval", "run", "--config", str(file), "--limit", "1", "--overwrite")
    assert json.loads(file.read_text())["dataset"]["rows"] == 1


def test_a_sweep_is_repeated_from_its_own_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    how = [*DEMO, *ROWS, "--limit", "1", "--max-new-tokens", "2", "--grid", "k=1,2", "--grid", "signal=norm"]
    said(capsys, "eval", "sweep", *how, "-o", str(tmp_path / "one"))
    said(capsys, "eval", "sweep", "--config", str(tmp_path / "one" / "sweep.json"), "-o", str(tmp_path / "two"))
    names = [sorted(file.relative_to(tmp_path / at) for file in (tmp_path / at).rglob("*")) for at in ("one", "two")]
    assert names[0] == names[1] and len(names[0]) > 10


def test_a_value_that_is_none_of_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    _, err = said(capsys, "select", "x", "--when-unsure", "sure", code=2)
    assert "error: Invalid value for '--when-unsure': 'sure' is not one of 'mix', 'base', 'refuse'" in err


# --- options of another method


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", *ROWS, "--method", "uniform", "--lorahub-budget", "3"], "lorahub, but the method is uniform"),
        (["eval", "run", *ROWS, "--merge-density", "0.3"], "ties, dare_linear, dare_ties, but the merge is mixture"),
        (["eval", "run", *ROWS, "--set", "shots=3"], "best-single, lorahub, lorauter, but the method is logo"),
        (["evaluate", *ROWS, "--arrow-top-k", "2"], "--arrow-top-k is only for --merge arrow, spectr"),
        (["eval", "sweep", *ROWS, "--grid", "method=base,uniform", "--shots", "2"], "--shots is only for --method"),
        (["eval", "run", *ROWS, "--method", "base", "--signal", "norm"], "--signal is only for --method logo, but the"),
        (["evaluate", *ROWS, "--method", "uniform", "-k", "3"], "--n-selected-modules is only for --method logo"),
        (["eval", "run", *ROWS, "--method", "base", "--set", "probe_text=all"], "--probe-text is only for --method"),
        (["eval", "study", *ROWS[:2], "--save", "s.json", "--shots", "2"], "lorahub, lorauter, but the method is logo"),
        (
            ["eval", "sweep", *ROWS, "--grid", "method=base,uniform", "--signal", "norm"],
            "--signal is only for --method",
        ),
        (["generate", "x", "--seed", "3"], "--seed 3 is only for sampling"),
        (["select", "x", "--signal", "entropy", "--examples", "ignore"], "but the signal is entropy"),
        (["eval", "study", *ROWS[:2], "--save", "s.json", "--merge", "ties"], "of a --method, and none"),
        (
            ["eval", "study", *ROWS[:2], "--save", "s.json", "--method", "logo", "--merge", "ties"],
            "none is given beside those that every study has (logo, uniform, base, oracle)",
        ),
        (["eval", "study", *ROWS[:2], "--save", "s.json", "--merge-density", "0.3"], "but the merge is mixture"),
        (["eval", "study", *ROWS[:2], "--save", "s.json", "--signals", "norm", "--signal", "norm"], "leave out one"),
        (["generate", "x", "--adapter", "antonym", "-k", "2"], "-k configures how adapters are selected, but"),
        (["generate", "x", "--base-only", "--when-unsure", "refuse"], "--when-unsure configures how adapters"),
        (["generate", "x", "--sample", "--temperature", "0"], "--temperature 0: expected more than 0"),
        (["serve", "--fold"], "--fold is not for this server"),
        (["serve", "--no-fold"], "--no-fold is not for this server"),
    ],
)  # fmt: skip
def test_an_option_of_something_else_is_an_error(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _, err = said(capsys, *arguments, "--base-model", "demo", code=2)
    assert message in err


def test_an_option_that_some_cell_reads_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    grid = ["--grid", "method=best-single,base", "--grid", "merge=mixture,ties"]
    said(
        capsys,
        "eval",
        "sweep",
        *ROWS,
        "--base-model",
        "demo",
        *grid,
        "--shots",
        "2",
        "--merge-density",
        "0.3",
        "--list",
    )


def test_what_the_engine_is_given_by_default() -> None:
    assert EngineOptions().device == "auto" and EngineOptions().signal is None
