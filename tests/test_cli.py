"""The command line as its users meet it: what it reads and prints, options in files, one line for what goes wrong."""

from __future__ import annotations

import io
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cyclopts import App

from logo import LoGo, UsageError
from logo.cli import generate as generate_module
from logo.cli.app import app, run
from logo.cli.opening import device_of
from logo.cli.output import BASE_ALONE, selection_line
from logo.cli.prompts import PromptOptions, forced
from logo.core import Selection
from logo.demo import adapters_dir
from logo.errors import Unsure
from logo.selection.selector import PRIOR, UNSURE
from test_evaluate import DATA, F1, ROOT
from tolerances import PATIENCE

pytestmark = pytest.mark.slow
ENGINE = ["--base-model", str(F1 / "model"), "--adapters", str(F1 / "adapters"), "--device", "cpu"]
DEMO = ["--base-model", "demo", "--device", "cpu"]
ROWS = ["--rows", "src/logo/demo/assets/heldout", "--dataset", "antonym"]


@pytest.fixture(autouse=True)
def at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "100")


def said(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> tuple[str, str]:
    """What a command prints, and what it says beside, in one line."""
    assert run(list(arguments)) == code
    captured = capsys.readouterr()
    return captured.out, " ".join(captured.err.split())


# -- help --------------------------------------------------------------------------------------------------------------

COMMANDS = [
    *("demo", "generate", "select", "serve", "verify", "train", "evaluate"),
    *("eval run", "eval compare", "eval report", "eval study", "eval shadow", "eval lm-eval"),
    *("data list", "data prepare"),
    *("pool inspect", "pool calibrate", "pool examples", "pool lock", "pool export", "pool push"),
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_of_one_screen_with_an_example(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown, _ = said(capsys, *command.split(), "--help")
    assert len(shown.splitlines()) <= 45 and "Example: logo" in " ".join(shown.split())
    assert command.split()[0] in said(capsys, "--help")[0]


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

    assert len(COMMANDS) == 21 and slots(app) <= 192  # the last one is `logo demo --write`


def test_the_official_command_shows_the_official_names(capsys: pytest.CaptureFixture[str]) -> None:
    official, _ = said(capsys, "evaluate", "--help")
    ours, _ = said(capsys, "eval", "run", "--help")
    for name in ("--gpu", "--selection-strategy", "--save-dir", "--generation-early-stop"):
        assert name in official and name not in ours


def test_help_shows_the_defaults_of_the_command_itself(capsys: pytest.CaptureFixture[str]) -> None:
    ours = ("demo", "calibrated")
    for command, model, signal in (("generate", *ours), ("eval run", *ours), ("evaluate", "Llama-3.1-8B", "norm")):
        words = " ".join(said(capsys, *command.split(), "--help")[0].split())
        assert f"Hub id, folder or short name. [default: {model}]" in words
        assert re.search(rf"norm[^\[]* \[default: {signal}\]", words)


# -- selecting and answering -------------------------------------------------------------------------------------------


def test_select_lists_k_adapters_also_if_one_answers_alone(capsys: pytest.CaptureFixture[str]) -> None:
    def shown(prompt: str, *options: str) -> tuple[list[list[str]], dict[str, Any]]:
        asked = ["select", prompt, "-k", "4", *options]
        *rows, sure = [line.split() for line in said(capsys, *asked)[0].splitlines()[1:]]
        found = json.loads(said(capsys, *asked, "--json")[0])
        unsure = ["(unsure)"] if found["confidence"] < UNSURE else []
        assert sure == ["confidence", f"{found['confidence']:.2f}", *unsure]
        return rows, found

    def best(scores: dict[str, float]) -> list[str]:
        return sorted(scores, key=scores.__getitem__, reverse=True)[:4]

    alone, found = shown("What is 7 plus 5?")
    assert found["adapters"] == ["add_numbers"] and [row[0] for row in alone] == best(found["scores"])
    assert float(alone[0][1]) > 0.98 and [row[1] for row in alone[1:]] == ["-"] * 3
    base, found = shown("Bake a cake", "--when-unsure", "base")
    assert not found["adapters"] and base[0] == ["base", "model", "alone"]
    assert [row[:2] for row in base[1:]] == [[name, "-"] for name in best(found["scores"])]


def test_prompts_from_stdin_on_a_terminal_without_unicode(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdin", io.StringIO("one two\n"))
        patch.setattr("sys.stdout", terminal)
        assert run(["select", "zero", "--prompts", "-", *ENGINE, "-k", "1"]) == 0
    shown = terminal.buffer.getvalue().decode("ascii")
    assert capsys.readouterr().err == "" and "?" in shown
    assert [line for line in shown.splitlines() if line in ("zero", "one", "one two")] == ["zero", "one two"]


def test_a_line_of_a_file_of_prompts_ends_where_a_line_ends(tmp_path: Path) -> None:
    """Not at a form feed or one of Unicode's separators; and a byte order mark belongs to no prompt."""
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffone\u2028still one\x0c\x85\r\ntwo\n".encode())
    assert PromptOptions(prompts=file).read([])[0] == ["one\u2028still one\x0c\x85", "two"]
    file.write_text("one\n \ntwo\n\n")
    assert PromptOptions(prompts=file).read(["zero"])[0] == ["zero", "one", "two"]
    file.write_text("\n\n")
    with pytest.raises(UsageError, match="no prompt"):
        PromptOptions(prompts=file).read([])


def test_generate(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["generate", "Hello", *ENGINE, "--max_new_tokens", "5"]

    def answer(*options: str) -> Any:
        return json.loads(said(capsys, *asked, "--json", *options)[0])

    record = answer()
    assert record["tokens"] == 5 and record["finish_reason"] == "length" and 1 <= len(record["adapters"]) <= 12
    assert "base model alone" in said(capsys, *asked, "--base-only")[1]
    weighted = answer("--adapter", "ad03=0.5")
    assert (weighted["adapters"], weighted["weights"]) == (["ad03"], [0.5])
    sampled = ("--temperature", "1", "--seed", "7")
    assert answer(*sampled)["text"] == answer(*sampled)["text"]


def test_an_answer_is_printed_as_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Tabs, names of emoji and markup would all mean something to the library that draws tables."""
    code = "def f(x):\n\treturn x[':key:'] + '[bold]' + ':100:'"
    chosen = Selection(("[a]",), (1.0,), {"[a]": 1.0})
    answer = SimpleNamespace(text=f"{code}\n", selection=chosen, token_ids=[1], finish_reason="stop", seconds={})
    engine = SimpleNamespace(generate=lambda *_, **__: [answer], close=lambda: None, k=1)
    monkeypatch.setattr(generate_module, "open_engine", lambda *_, **__: engine)
    out, err = said(capsys, "generate", "Hello", "--base-model", "demo")
    assert out == f"{code}\n" and "[a] 1.00" in err


def test_an_adapter_has_one_weight_and_its_name_may_look_like_one() -> None:
    assert forced(["a=1", "b", "c=d=0.5"], []) == {"a": 1.0, "b": 1.0, "c=d": 0.5}
    assert forced(["lr=0.1", "lr=0.2"], names=["lr=0.1", "lr=0.2"]) == {"lr=0.1": 1.0, "lr=0.2": 1.0}
    assert forced(["eq=1", "a=0.5"], names=("eq=1", "a")) == {"eq=1": 1.0, "a": 0.5}
    assert forced(["eq=1=0.5"], names=("eq=1",)) == forced(["eq=1=0.5"], ()) == {"eq=1": 0.5}
    with pytest.raises(UsageError, match=r"--adapter 'a': given with the weights 1 and 0\.5; give it once"):
        forced(["a=1", "a=0.5"], names=["a"])
    with pytest.raises(UsageError, match="an adapter of this name is 'eq=x=1'"):
        forced(["eq=x"], ())


def test_a_mixture_in_a_line() -> None:
    for mixture, line in (
        ({}, BASE_ALONE),
        ({"a": 0.004}, "1 adapter with weights below 0.005"),
        ({"a": 0.0, "b": 0.0, "c": 0.0, "d": 1.0}, "4 more"),
        ({"a": 0.5, "b": 0.004}, "a 0.50"),
        ({"a": 0.5, "b": 0.2, "c": 0.1, "d": 0.1}, "a 0.50 · b 0.20 · c 0.10 · 1 more"),
    ):
        assert selection_line(Selection.forced(mixture)) == line


def test_the_demo_can_be_written_to_try_other_commands_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shown, _ = said(capsys, "demo", "--write", "play")
    assert shown.split() == ["play/model", "play/adapters", "play/rows"]
    how = ["--base-model", "play/model", "--adapters", "play/adapters", "--device", "cpu"]
    out, _ = said(capsys, "generate", "What is 7 plus 5?", *how, "--json")
    bundled, _ = said(capsys, "generate", "What is 7 plus 5?", "--base-model", "demo", "--device", "cpu", "--json")
    written, shipped = json.loads(out), json.loads(bundled)
    del written["seconds"], shipped["seconds"]
    assert written == shipped
    assert len(list(Path("play/rows").glob("*.jsonl"))) == len(list(Path("play/adapters").glob("*/"))) == 16
    _, error = said(capsys, "demo", "--write", "play", code=2)
    assert "play exists already and is not an empty folder; name another one" in error


def test_without_a_base_model_the_demo_is_used_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    out, err = said(capsys, "select", "What is 7 plus 5?", "--json")
    assert "using the bundled demo model" in err and 1 <= len(json.loads(out)["adapters"]) <= 3
    asked = ("generate", "What is 7 plus 5?", "--base_model", "demo", "--adapter", "add_numbers", "--json")
    out, err = said(capsys, *asked)
    assert json.loads(out)["text"].strip() == "12" and "using the bundled" not in err


def test_the_prior_reaches_the_confidence(capsys: pytest.CaptureFixture[str]) -> None:
    def odds(*options: str) -> float:
        found = float(json.loads(said(capsys, "select", "Tell me of hot.", *DEMO, "--json", *options)[0])["confidence"])
        return found / (1 - found)

    assert odds() == pytest.approx(odds("--prior", str(PRIOR))) == pytest.approx(4 * odds("--prior", "0.5"), rel=0.05)


# -- what goes wrong ---------------------------------------------------------------------------------------------------

BAD = [
    ("select x --adapters /no/such", 1, "no adapters in /no/such: No such file or directory"),
    ("select x ENGINE -k 0", 2, 'Invalid value "0" for -k. Must be >= 1'),
    ("select x ENGINE -k 1.5", 2, "expected a whole number, found '1.5'"),
    ("select x ENGINE --when-unsure sure", 2, 'for --when-unsure. Choose from: "mix", "base", "refuse"'),
    ("eval run ROWS --ray auto", 2, "--ray is for workers; add --workers N"),
    ("generate '  ' ENGINE", 2, "prompt 1 is empty"),
    ("select x --base-modle y", 2, "Unknown option: --base-modle. Did you mean --base-model?"),
    ("select x ENGINE --signal nrom", 2, "did you mean 'norm'"),
    ("slect x", 2, 'Unknown command "slect". Did you mean "select"? Available commands: pool, eval, '),
    ("slect x", 2, "serve, verify, ... (see `logo --help`)"),
    ("select x --base-model Qwen2.5-8B POOL", 1, "did you mean 'Qwen2.5-7B'"),
    ("generate x ENGINE --adapter ad01=much", 2, "expected NAME or NAME=WEIGHT"),
    ("generate x ENGINE --max-new-tokens 5000", 2, "context holds 4096 tokens"),
    ("select --prompts /no/such ENGINE", 1, "prompt file /no/such"),
    ("select x ENGINE --dtype int8", 2, "expected 'auto', 'float32'"),
    ("eval run ROWS --method uniform --method-args budget=3", 2, "'uniform' has no option 'budget'"),
    ("eval run ROWS --method base -k 3", 2, "method 'base' has no number of adapters"),
    ("eval run ROWS --method-args rows=3", 2, "--method-args is for --method; the method is logo"),
    ("eval run ROWS --method random --method-args seed=5", 2, "--method-args seed: expected options of the method"),
    ("eval run ROWS --engine-args max_model_len=64", 2, "--engine-args is only for --engine vllm; leave it out"),
    ("generate x --adapter antonym --base-only", 2, "--base-only and --adapter exclude each other"),
    ("serve --replicas 2", 2, "--replicas is only for --engine vllm"),
    ("serve -- --max-model-len 9", 2, "--max-model-len is only for --engine vllm"),
    ("serve --engine vllm x", 2, "'x': expected options only; flags for vLLM follow after `--`"),
    ("serve --engine vllm --max-queue 2", 2, "Unknown option: --max-queue"),
]


@pytest.mark.parametrize(("command", "code", "message"), BAD, ids=lambda value: str(value)[:40])
def test_bad_input_is_one_line(command: str, code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    named = {"ENGINE": ENGINE, "POOL": ENGINE[2:], "ROWS": ROWS}
    assert run([word for one in shlex.split(command) for word in named.get(one, [one])]) == code
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line and not line.startswith("No --base-model")]
    assert len(lines) == 1 and lines[0].startswith("logo: error: ") and message in lines[0]
    assert captured.out == "" and "Traceback" not in captured.err


def test_who_refuses_a_prompt_names_options_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    """The command line its own, and Python those of Python."""
    _, err = said(capsys, "select", "Bake a cake", *DEMO, "--when-unsure", "refuse", code=1)
    assert err.startswith("logo: error: no adapter of the pool seems to be made for this prompt")
    assert "--when-unsure base lets the base model answer" in err and "--adapter" not in err
    engine = LoGo.from_pretrained("demo", device="cpu", when_unsure="refuse")
    with closing(engine), pytest.raises(Unsure) as refused:
        engine.select("Bake a cake")
    assert 'let the base model answer (when_unsure="base")' in str(refused.value) and "--" not in str(refused.value)


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Traceback" in said(capsys, "select", "x", "--adapters", "/no/such", "--debug", code=1)[1]


def test_bad_data_and_results_leave_nothing_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "bbh" / "navigate" / "test.jsonl"
    rows.parent.mkdir(parents=True)
    rows.write_text('{"context": "a", "completion": "b"}\n{"context": "a"\n')
    (tmp_path / "file").write_text("")
    usual = ["evaluate", "--data_dir", str(DATA), *ENGINE, "--limit", "4"]
    for message, arguments in {
        "test.jsonl:2: expected": ["--data_dir", str(tmp_path), "--dataset", "bbh.navigate"],
        "did you mean 'bbh.boolean_expressions'": ["--dataset", "bbh.boolean_expression"],
        "cannot be written": ["--dataset", "bbh.boolean_expressions", "--result_dir", str(tmp_path / "file" / "out")],
        "--dataset is given 2 times: separate": ["--dataset", "bbh.navigate", "--dataset=bbh.boolean_expressions"],
    }.items():
        assert run([*usual, "--result_dir", str(tmp_path / "results"), *arguments]) in (1, 2)
        err = capsys.readouterr().err
        assert message in err and len(err.splitlines()) == 1
    assert not [path for path in (tmp_path / "results").rglob("*") if path.is_file()]


def test_output_can_be_piped_to_a_reader_that_stops() -> None:
    code = "from logo.cli import main; main()"
    for words in ("select --help | head -n 1", "data list --json | true"):
        shell = f"{sys.executable} -c '{code}' {words}"
        done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=PATIENCE)
        assert bool(done.stdout) == ("head" in words) and done.stderr == ""


def main(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Runs `main.py` in this process, and returns its exit code."""
    monkeypatch.setattr("sys.argv", ["main.py", *words])
    code: int = runpy.run_path(str(ROOT / "main.py"))["main"]()
    return code


def test_numbers_that_main_cannot_use(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for option, least in (
        *((option, 1) for option in ("--batch_size", "--limit", "--n_selected_modules", "--max_new_tokens")),
        ("--seed", 0),
    ):
        for wrong, expected in ((str(least - 1), f"Must be >= {least}"), ("1.5", "expected a whole number")):
            assert main(monkeypatch, option, wrong) == 2
            [line] = capsys.readouterr().err.splitlines()
            assert option in line and wrong in line and expected in line


@pytest.mark.filterwarnings("always")
def test_main_warns_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pool = shutil.copytree(F1 / "adapters", tmp_path / "pool")
    (pool / "ad00" / "examples.jsonl").write_text("nothing")
    asked = [
        *("--dataset", "bbh.word_sorting", "--data_dir", str(DATA), "--limit", "1", "--max_new_tokens", "2"),
        *("--base_model", str(F1 / "model"), "--adapters", str(pool), "--gpu", "-1", "--result_dir", str(tmp_path)),
    ]
    assert main(monkeypatch, *asked) == 0
    err = capsys.readouterr().err
    assert "UserWarning" not in err
    [line] = [line for line in err.splitlines() if "examples.jsonl" in line]
    assert line.startswith("logo: warning: ") and line.endswith("the examples are left out")


def test_main_without_the_package_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text((ROOT / "main.py").read_text())
    done = subprocess.run([sys.executable, "-S", "-I", "main.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "run `make demo` or `pip install -e .` first" in done.stderr


def test_devices_that_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for gpus, devices in (
        (0, {**dict.fromkeys(("auto", "cpu", "0", "3"), "cpu"), "cuda:1": "device 'cuda:1': this machine has no GPU"}),
        (4, {"auto": "cuda:0", "cpu": "cpu", "0": "cuda:0", "3": "cuda:3", "cuda": "cuda:0", "cuda:1": "cuda:1"}),
        (2, {"2": "device 'cuda:2': this machine has 2 GPU(s)"}),
    ):
        monkeypatch.setattr("torch.cuda.is_available", lambda gpus=gpus: gpus > 0)
        monkeypatch.setattr("torch.cuda.device_count", lambda gpus=gpus: gpus)
        monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
        for name, want in devices.items():
            if want.startswith("device"):
                with pytest.raises(UsageError, match=re.escape(want)):
                    device_of(name)
            else:
                assert device_of(name) == want


def test_options_without_effect_in_vllm_are_errors_in_python() -> None:
    with pytest.raises(UsageError, match="merge: the engine 'vllm' has no such option"):
        LoGo.from_pretrained("demo", engine="vllm", merge=False)


# -- files of options --------------------------------------------------------------------------------------------------


def test_a_file_says_what_options_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def selected(*options: str) -> Any:
        return json.loads(said(capsys, "select", "What is 7 plus 5?", *DEMO, "--json", *options)[0])

    file = tmp_path / "run.yaml"
    some = [str(adapters_dir() / name) for name in ("french", "plural", "capital")]
    file.write_text(f"signal: norm\nn_selected_modules: 2\nadapters: [{', '.join(some)}]\nsystem: null\n")
    asked = ("--signal", "norm", *(word for place in some for word in ("--adapters", place)))
    assert selected("--config", str(file)) == selected(*asked, "-k", "2")
    # The command line counts more than the file, in any order.
    three = selected(*asked, "-k", "3")
    assert selected("-k", "3", "--config", str(file)) == selected("--config", str(file), "-k", "3") == three


def test_of_several_files_the_later_ones_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def selected(*options: str, code: int = 0) -> Any:
        out, err = said(capsys, "select", "What is 7 plus 5?", *DEMO, "--json", *options, code=code)
        return err if code else json.loads(out)

    shared = tmp_path / "shared.yaml"
    shared.write_text("signal: norm\nn_selected_modules: 2\n")
    mine = tmp_path / "mine.yaml"
    mine.write_text("n-selected-modules: 3\n")
    files = ("--config", str(shared), "--config", str(mine))
    assert selected(*files) == selected("--signal", "norm", "-k", "3")
    assert len(selected(*files[2:], *files[:2])["adapters"]) == 2
    assert len(selected(*files, "-k", "1")["adapters"]) == 1
    assert str(tmp_path / "none.yaml") in selected("--config", str(tmp_path / "none.yaml"), *files[:2], code=1)


def test_a_file_may_name_options_as_short_as_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "short.yaml"
    file.write_text("signal: norm\nk: 2\n")
    asked = ("select", "What is 7 plus 5?", *DEMO, "--json", "--config", str(file))
    assert len(json.loads(said(capsys, *asked)[0])["adapters"]) == 2
    assert len(json.loads(said(capsys, *asked, "-k", "1")[0])["adapters"]) == 1
    file.write_text("k: 2\nn_selected_modules: 3\n")
    line = f"logo: error: --config {file}: k and n_selected_modules are the same option; keep one of them"
    assert said(capsys, *asked, code=2)[1] == line


def test_official_names_in_files_of_the_official_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"selection_strategy": "norm", "gpu": -1, "n_selected_modules": 2}))
    how = ["--base-model", "demo", "--data-dir", *ROWS[1:], "--limit", "1", "--max-new-tokens", "2"]
    how += ["--result-dir", str(tmp_path)]
    said(capsys, "evaluate", "--config", str(file), *how)
    [run_file] = tmp_path.rglob("*/run.json")
    assert run_file.parent.parent.name == "demo_selection_norm_n_2_seed_0"


def test_the_authors_names_are_other_names_of_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(f"dataset: antonym\nresult_dir: {tmp_path / 'of-file'}\nlimit: 1\nmax_new_tokens: 2\n")
    rows = ["eval", "run", *DEMO, *ROWS[:2], "--config", str(file)]
    said(capsys, *rows)
    said(capsys, *rows, "--tasks", "capital", "--save", str(tmp_path / "of-line"))
    found = {run_file.parent.relative_to(tmp_path) for run_file in tmp_path.rglob("*/run.json")}
    assert {(path.parts[0], path.name) for path in found} == {("of-file", "antonym"), ("of-line", "capital")}
    _, err = said(capsys, *rows, "--tasks", "capital", "--dataset", "plural", code=2)
    assert "--tasks is given 2 times" in err
    file.write_text("dataset: antonym\ntasks: capital\n")
    assert "dataset and tasks are the same option; keep one of them" in said(capsys, *rows, code=2)[1]
    repeated = ["--method", "best-single", "--method-args", "rows=2", "--method-args", "rows=3"]
    assert "--method-args is given 2 times" in said(capsys, *rows[:-2], *repeated, code=2)[1]


def test_what_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content, code, message in (
        ("sgnal: norm", 2, 'Unknown option: "[sgnal]" from --config'),
        ("- norm", 1, "expected options by name, found list"),
        ("a: [", 1, "expected YAML or JSON"),
        ("n_selected_modules: many", 2, 'unable to convert "many" into int'),
        ("command: {name: eval study, options: {}}", 2, "`logo eval study` wrote it; expected a file for"),
        ("command: {name: select, options: {}, plugins: ['a:b']}", 2, "add --plugin a:b"),
        (None, 1, "cannot be read"),
    ):
        file = tmp_path / ("none.yaml" if content is None else "run.yaml")
        (tmp_path / "run.yaml").write_text(content or "")
        _, err = said(capsys, "select", "x", *DEMO, "--config", str(file), code=code)
        assert message in err and err.startswith("logo: error: ")


def test_a_runs_file_gives_no_leave_to_replace_its_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    how = [*DEMO, *ROWS, "--max-new-tokens", "2", "--result-dir", str(tmp_path)]
    said(capsys, "eval", "run", *how, "--limit", "2", "--overwrite")
    [file] = tmp_path.rglob("run.json")
    before = file.read_bytes()
    _, err = said(capsys, "eval", "run", "--config", str(file), "--limit", "1", code=2)
    assert "rows is 2, not 1; --overwrite replaces it" in err and file.read_bytes() == before
    own = tmp_path / "own.yaml"  # the user's file says what the user says
    own.write_text("overwrite: true")
    said(capsys, "eval", "run", *how, "--limit", "1", "--config", str(own))
    assert file.read_bytes() != before
