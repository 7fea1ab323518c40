"""Plugins: from installed distributions and from `--plugin`, in Python, in commands, in servers and elsewhere."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import urllib.error
from pathlib import Path
from typing import Any

import pytest
import torch

from logo import LoGo, PluginError, SelectionSettings, UsageError, plugins
from logo.adapters.format import LoraWeights
from logo.baselines import Answering, Task, get_method
from logo.baselines.registry import METHODS, register_method
from logo.cli.run import plugins_first, run
from logo.evaluation.identity import engine_identity
from logo.evaluation.metrics import METRICS, checked_kind, measure, measures, recorded_kind, summary_line
from logo.mixing import Merge
from logo.mixing.merges import MERGES, merged, register_merge
from logo.plugins import Registry, Source
from logo.selection.signals import SIGNALS, get_signal, register_signal
from serving import served
from tolerances import PATIENCE, same_scores, same_weights
from warm import python

pytestmark = pytest.mark.usefixtures("plugins_forgotten")

ROWS = "src/logo/demo/assets/heldout"
ROOT = Path(__file__).parent.parent
REGISTRIES: tuple[Registry[Any], ...] = (SIGNALS, METHODS, METRICS, MERGES)
PROMPT = "What is the opposite of hot?"

SIGNAL = """
from logo import register_signal

@register_signal("quiet", layers="early", input="projection", token="each", scale="zscore")
def quiet(index, hidden):
    return index.norms(hidden).sqrt()
"""
OTHERS = """
from dataclasses import dataclass
import torch
from logo import LoraWeights, Method, Prepared, Selection, register_merge, register_method, register_metric

@register_metric("length")
def length(prediction, golds):
    return min(1.0, len(prediction) / 100)

@register_merge("last")
def last(merge, parts, weights, generator):
    return parts[-1]

@register_method
@dataclass(frozen=True, kw_only=True)
class Third(Method):
    "The third adapter."
    name = "third"
    k: int = 1

    def prepare(self, logo, task):
        name = task.candidates(logo)[2]
        return Prepared(lambda prompts, size: [Selection.forced({name: 1.0}) for _ in prompts])
"""


def installed(site: Path, distribution: str, entries: dict[str, dict[str, str]], **modules: str) -> Path:
    """An installed distribution: its modules, and the folder in which importlib.metadata finds its entry points."""
    info = site / f"{distribution.replace('-', '_')}-1.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(
        "".join(f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in of.items()) for group, of in entries.items())
    )
    for name, text in modules.items():
        (site / f"{name}.py").write_text(text)
    return site


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One good distribution, in Python's path; its modules leave a mark when they are imported."""
    said = f"import pathlib; pathlib.Path({str(tmp_path)!r}, __name__ + '.imported').touch()\n"
    entries = {
        "logo.signals": {"quiet": "plug_signals:quiet"},
        "logo.methods": {"third": "plug_others:Third"},
        "logo.metrics": {"length": "plug_others:length"},
        "logo.merges": {"last": "plug_others:last"},
    }
    found = installed(tmp_path / "site", "plug-good", entries, plug_signals=said + SIGNAL, plug_others=said + OTHERS)
    monkeypatch.syspath_prepend(str(found))
    return found


def imported(site: Path) -> set[str]:
    return {file.stem for file in site.parent.glob("*.imported")}


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The error that a command has printed."""
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("logo: error:")]
    return line


# -- the registry ------------------------------------------------------------------------------------------------------


def test_what_is_installed_is_imported_when_it_is_asked_for(site: Path) -> None:
    assert get_signal("norm") and measure("em", "a", "a") == 1 and Merge("ties") and get_method("base")
    assert imported(site) == set()
    with pytest.raises(
        UsageError, match=r"unknown signal 'quite' \(did you mean 'quiet'\?\); known: norm, .*, quiet; one .*--plugin"
    ):
        get_signal("quite")
    with pytest.raises(UsageError, match=r"unknown merge 'lats' \(did you mean 'last'\?\); known: .*, arrow, .*, last"):
        Merge("lats")
    assert imported(site) == set() and "quiet" in SIGNALS.known and "quiet" not in SIGNALS
    assert get_signal("quiet").scale == "zscore"
    assert imported(site) == {"plug_signals"}
    third: Any = get_method("third", k=4)
    assert checked_kind("length", "here") == "length" and third.k == 4 and Merge("last").kind == "last"
    assert measures("length") == ("length",) and summary_line("length", [0.5, 1.0]) == "length: 75.00"


def test_a_broken_plugin_is_one_line_and_no_affair_of_others(
    site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = {"broken": "plug_broken:signal", "silent": "plug_silent:signal", "gone": "plug_gone:signal"}
    bad = {"plug_broken": "import nothing_of_this_name", "plug_silent": "signal = 3"}
    monkeypatch.syspath_prepend(str(installed(site.parent / "bad", "plug-bad", {"logo.signals": entries}, **bad)))
    select = ["select", PROMPT, "--base-model", "demo", "--json", "-k", "2"]
    for name, why in (
        ("broken", r"cannot be imported \(ModuleNotFoundError: No module named 'nothing_of_this_name'\)"),
        ("silent", "registers no signal 'silent': use @logo.register_signal there"),
        ("gone", r"cannot be imported \(ModuleNotFoundError: No module named 'plug_gone'\)"),
    ):
        with pytest.raises(PluginError, match=f"signal '{name}' of the plugin plug-bad 1.2: plug_{name}:signal {why}"):
            get_signal(name)
        assert run([*select, "--signal", name]) == 1
        assert "plug-bad 1.2" in one_line(capsys)
    assert run([*select, "--signal", "norm"]) == 0
    assert run([*select, "--signal", "quiet"]) == 0


def test_a_name_belongs_to_one_plugin(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    second = SIGNAL.replace("def quiet", "def loud")
    for number, (entry, module) in enumerate({"quiet": "plug_second", "loud": "plug_third"}.items()):
        folder = site.parent / str(number)
        entries = {"logo.signals": {entry: f"{module}:loud"}}
        monkeypatch.syspath_prepend(str(installed(folder, f"plug-{number}", entries, **{module: second})))
    both = r"plug-0 1.2 \(plug_second:loud\) and plug-good 1.2 \(plug_signals:quiet\)"
    with pytest.raises(PluginError, match=f"signal 'quiet': two plugins have this name, {both}; uninstall one"):
        get_signal("quiet")
    plugins.load("plug_signals:quiet")
    with pytest.raises(PluginError, match=r"plug-1 1.2: .*the name is taken by plug_signals:quiet; choose another one"):
        get_signal("loud")
    with pytest.raises(PluginError, match=r"plug_second:loud.*the name is taken by plug_signals:quiet"):
        plugins.load("plug_second:loud")


@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda one: one.kind)
def test_our_names_are_taken(registry: Registry[Any]) -> None:
    def mine() -> None: ...

    for name in [*registry, *registry._others]:
        taken = registry._places.get(name, "logo itself")
        assert taken.startswith("logo")
        with pytest.raises(
            UsageError, match=rf"{registry.kind} '{name}' \(test_plugins:.*mine\): .* taken by {taken}; "
        ):
            registry.add(name, mine, mine)
    for name in ("", "two words", "a,b", "a=b", "1st", "a.b", "ä"):
        with pytest.raises(UsageError, match="expected a name of letters, digits"):
            registry.add(name, mine, mine)
    assert not registry.sources


def test_aliases_and_choices_are_refused() -> None:
    with pytest.raises(UsageError, match="merge 'cat': the name is taken by 'mixture'"):
        register_merge("cat")(lambda merge, parts, weights, generator: parts[0])
    with pytest.raises(UsageError, match=r"signal 'x': token: expected one of \('last', .*found 'all'"):
        register_signal("x", token="all")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"method '' .*expected a name"):
        register_method(type("Nameless", (), {}))  # type: ignore[type-var]


def test_what_is_defined_anew_replaces_what_was(site: Path) -> None:
    before = get_signal("quiet")
    file = site / "plug_signals.py"
    file.write_text(file.read_text().replace(".sqrt()", ".square()"))
    os.utime(file, (1, 1))  # bytecode is told apart by whole seconds
    importlib.reload(sys.modules["plug_signals"])
    assert get_signal("quiet").score is not before.score and get_signal("quiet").plugin != before.plugin


def test_a_digest_is_of_the_whole_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    package = tmp_path / "plug_whole" / "inner"
    package.mkdir(parents=True)
    for place in (package, package.parent):
        (place / "__init__.py").write_text("")
    (package / "mine.py").write_text("def f(): ...")
    (package / "helps.py").write_text("x = 1")
    definition = importlib.import_module("plug_whole.inner.mine").f
    first = Source.of(definition)
    assert (first.place, first.folder) == ("plug_whole.inner.mine:f", str(tmp_path))
    assert Source.of(definition) == first
    (package / "helps.py").write_text("x = 2")
    assert Source.of(definition).digest != first.digest

    space: dict[str, Any] = {"__name__": "plug_nowhere"}
    exec("def f(): ...", space)  # as in a prompt: nobody knows its text
    assert Source.of(space["f"]).folder is None and Source.of(space["f"]).digest != Source.of(space["f"]).digest


# -- what they compute -------------------------------------------------------------------------------------------------


def test_a_signal_scores_as_it_says(site: Path, tmp_path: Path) -> None:
    engine = LoGo.from_pretrained("demo", signal="quiet", k=3, cache=str(tmp_path / "cache"))
    found = engine.select([PROMPT, "Spell the word: tree"])
    assert all(len(one.adapters) == 3 and one.confidence is not None for one in found)
    [alone] = engine.select([PROMPT])
    assert alone.scores == same_scores(found[0].scores)
    assert (
        engine.select(PROMPT, signal="norm").adapters
        == LoGo.from_pretrained("demo", signal="norm", k=3).select(PROMPT).adapters
    )

    (site / "plug_raw.py").write_text(
        "from logo import register_signal\n@register_signal('loud')\ndef loud(index, hidden):\n"
        "    return index.norms(hidden).square()\n"
    )
    plugins.load("plug_raw:loud")
    [loud], [norm] = engine.select([PROMPT], signal="loud"), engine.select([PROMPT], signal="norm")
    assert loud.scores == same_scores({name: score**2 for name, score in norm.scores.items()})


@pytest.mark.parametrize("returns", ["hidden", "index.norms(hidden).T[:1]", "[1.0]", "None"])
def test_a_signal_that_returns_something_else_is_named(site: Path, returns: str) -> None:
    (site / "plug_wrong.py").write_text(
        f"from logo import register_signal\n@register_signal('wrong')\ndef wrong(index, hidden): return {returns}\n"
    )
    plugins.load("plug_wrong:wrong")
    with pytest.raises(PluginError, match=r"signal plug_wrong:wrong: expected scores \(vectors, adapters\) \(1, 16\)"):
        LoGo.from_pretrained("demo", signal="wrong", k=2).select(PROMPT)


@pytest.mark.parametrize(
    ("scale", "returns", "found"),
    [
        ("zscore", "index.norms(hidden) * float('nan')", "nan for adapter 1 of 16"),
        ("zscore", "index.norms(hidden).index_fill(1, torch.tensor([2]), float('nan'))", "nan for adapter 3 of 16"),
        ("raw", "index.norms(hidden) / 0", "inf for adapter 1 of 16"),
        (
            "whitened",
            "-1 - 0 * index.norms(hidden)",
            r"none below 0 \(.*\), found -1.0 for adapter 1",
        ),
    ],
)
def test_a_score_that_is_no_number_is_named(site: Path, scale: str, returns: str, found: str) -> None:
    """A calibration took NaN for an adapter without a response, and the selection looked like any other."""
    (site / "plug_nan.py").write_text(
        f"import torch\nfrom logo import register_signal\n@register_signal('numb', layers='early', scale={scale!r})\n"
        f"def numb(index, hidden): return {returns}\n"
    )
    plugins.load("plug_nan:numb")
    with pytest.raises(PluginError, match=f"signal plug_nan:numb: expected finite scores.*{found}"):
        LoGo.from_pretrained("demo", signal="numb", k=2).select(PROMPT)


def test_a_signal_that_fails_is_named(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (site / "plug_broken.py").write_text(SIGNAL.replace("index.norms(hidden).sqrt()", "index.norms(hidden)[:, 99]"))
    plugins.load("plug_broken:quiet")
    assert run(["select", "hot", "--base-model", "demo", "--signal", "quiet"]) == 1
    told = capsys.readouterr().err
    assert "unexpected RuntimeError: signal plug_broken:quiet failed: IndexError: index 99 is out of bounds" in told
    assert "--debug" in told


PICK = """
from dataclasses import dataclass
from logo import Method, Prepared, register_method

@register_method
@dataclass(frozen=True, kw_only=True)
class Pick(Method):
    name = "pick"

    def prepare(self, logo, task):
        return Prepared(lambda prompts, size: logo.select(list(prompts), {options}))
"""


@pytest.mark.parametrize(("options", "code"), [("k=2", 2), ("k=2, candidates=task.candidates(logo)", 0)])
def test_a_study_removes_the_own_adapter_from_methods_of_others_too(
    site: Path, tmp_path: Path, options: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """The column "left out" held answers of the adapter that had been left out."""
    (site / "plug_pick.py").write_text(PICK.format(options=options))
    asked = ["--rows", ROWS, "--tasks", "antonym", "--limit", "1", "--signals", "norm", "--method", "pick"]
    plugins.load("plug_pick:Pick")
    save = ["--save", str(tmp_path / "study.json")]
    assert run(["eval", "study", "--base-model", "demo", "-k", "2", *asked, *save]) == code
    if code:
        assert "method 'pick' chose 'antonym', which is not among the 15 adapters" in one_line(capsys)


@pytest.mark.parametrize(
    ("returns", "error", "message"),
    [
        ("None", PluginError, r"expected LoraWeights\(A, B, scaling\), found NoneType"),
        (
            "LoraWeights(parts[0].A.T, parts[0].B.T, 1.0)",
            PluginError,
            r"found A \(\d+, 8\) and B ",
        ),
        ("LoraWeights(parts[0].A / 0, parts[0].B, 1.0)", PluginError, "finite numbers, found NaN or infinity"),
        ("parts[99]", RuntimeError, "failed: IndexError: "),
    ],
)
def test_a_merge_that_fails_is_named(site: Path, returns: str, error: type[Exception], message: str) -> None:
    (site / "plug_merge.py").write_text(
        "from logo import LoraWeights, register_merge\n@register_merge('wrong')\n"
        f"def wrong(merge, parts, weights, generator): return {returns}\n"
    )
    plugins.load("plug_merge:wrong")
    engine = LoGo.from_pretrained("demo", signal="norm", k=2)
    engine.merge = "wrong"
    with pytest.raises(error, match=f"merge 'wrong'.*{message}"):
        engine.generate(PROMPT, max_new_tokens=1)


@pytest.mark.parametrize(
    ("returns", "error", "message"),
    [
        ("None", PluginError, "`prepare` has to return Prepared, found None"),
        ("1 / 0", RuntimeError, "failed: ZeroDivisionError"),
        ("Prepared(lambda prompts, size: prompts[99])", RuntimeError, "failed: IndexError"),
        ("Prepared(lambda prompts, size: [])", PluginError, "expected one selection for each of 1 prompts, found 0"),
    ],
)
def test_a_method_that_fails_is_named(site: Path, returns: str, error: type[Exception], message: str) -> None:
    (site / "plug_method.py").write_text(
        "from dataclasses import dataclass\nfrom logo import Method, Prepared, register_method\n"
        "@register_method\n@dataclass(frozen=True, kw_only=True)\nclass Odd(Method):\n    name = 'odd'\n"
        f"    def prepare(self, logo, task): return {returns}\n"
    )
    plugins.load("plug_method:Odd")
    engine = LoGo.from_pretrained("demo", signal="norm", k=2)
    with pytest.raises(error, match=f"method 'odd'.*{message}"):
        Answering(engine, get_method("odd"), Task("x")).generate([PROMPT], max_new_tokens=1, batch_size=1)


def test_a_metric_says_a_number_from_0_to_1(site: Path) -> None:
    (site / "plug_metric.py").write_text(
        "from logo import register_metric\n@register_metric('as_told')\ndef as_told(prediction, golds):\n"
        "    assert not isinstance(golds, str)\n    return eval(prediction)\n"
    )
    plugins.load("plug_metric:as_told")
    assert measure("as_told", "1", "gold") == measure("as_told", "True", ("gold",)) == 1.0
    assert measure("as_told", "len(golds) / 2", "gold") == 0.5
    assert measure("as_told", "__import__('numpy').float32(0.5)", "gold") == 0.5
    assert measure("as_told", "__import__('numpy').bool_(True)", "gold") == 1.0
    assert measure("as_told", "__import__('torch').tensor(0.5)", "gold") == 0.5
    for wrong in ("1.5", "-1", "float('nan')", "None", "'1'", "__import__('torch').ones(2)", "1j"):
        with pytest.raises(PluginError, match="metric 'as_told': expected a number from 0 to 1, found"):
            measure("as_told", wrong, "gold")


def test_a_metric_that_fails_is_named_with_the_answer(site: Path) -> None:
    (site / "plug_failing.py").write_text(
        "from logo import UsageError, register_metric\n@register_metric('failing')\n"
        "def failing(prediction, golds):\n"
        "    if not prediction:\n        raise UsageError('no answer')\n    return 1 / (len(prediction) - 4)\n"
    )
    plugins.load("plug_failing:failing")
    told = r"metric 'failing' failed for the answer 'cold' and the gold texts \['hot'\] \(ZeroDivisionError: "
    with pytest.raises(PluginError, match=told) as found:
        measure("failing", "cold", "hot")
    assert isinstance(found.value.__cause__, ZeroDivisionError)
    with pytest.raises(UsageError, match="no answer"):
        measure("failing", "", "hot")


def test_a_merge_is_given_all_that_is_merged(site: Path) -> None:
    parts = {name: {"m": LoraWeights(torch.rand(r, 4), torch.rand(3, r), 0.5)} for name, r in (("a", 1), ("b", 2))}
    assert merged(Merge("last"), {"a": 0.5, "b": 0.5}, parts)["m"] is parts["b"]["m"]  # of any ranks
    assert merged(Merge("last"), {"a": 0.5}, parts)["m"] is parts["a"]["m"]
    engine = LoGo.from_pretrained("demo", k=2, merge="last")
    names = engine.names[:2]
    mixed = engine.generate(PROMPT, adapters={names[0]: 0.5, names[1]: 0.5}, max_new_tokens=8)
    engine.merge = "mixture"
    assert mixed.token_ids == engine.generate(PROMPT, adapters={names[1]: 1.0}, max_new_tokens=8).token_ids


# -- what is recorded --------------------------------------------------------------------------------------------------


def test_a_changed_signal_reads_no_old_calibration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In processes, as users change their files: three calibrations, of which the last is the first one's again."""
    file, cache = tmp_path / "plug_changing.py", tmp_path / "cache"
    code = (
        "import sys; from logo import LoGo; from logo.evaluation.identity import engine_identity; import plug_changing;"
        f"engine = LoGo.from_pretrained('demo', signal='quiet', k=2, cache={str(cache)!r});"
        f"print(engine.select({PROMPT!r}).scores['antonym'], *engine_identity(engine, 'demo', {{}})['plugins'])"
    )
    said = []
    # The last process iterates over sets in an order of its own, which forks of one process do not.
    programs = (python(), python(), (sys.executable,))
    for text, program in zip((SIGNAL, SIGNAL.replace(".sqrt()", ".square()"), SIGNAL), programs, strict=True):
        file.write_text(text)
        done = subprocess.run(
            [*program, "-B", "-c", code],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert said[0] == said[2] != said[1]
    assert re.fullmatch(r"-?\d\S* plug_changing:quiet [0-9a-f]{64}\n", said[0])
    assert len(list((cache / "calibration").iterdir())) == 2


def test_the_identity_of_a_run_names_code_of_others_only(site: Path) -> None:
    engine = LoGo.from_pretrained("demo", k=2, signal="norm")
    assert "plugins" not in engine_identity(engine, "demo", {})
    assert not {"plugin", "merge_plugin"} & set(get_method("random").as_dict())
    engine.merge = "last"
    assert engine_identity(engine, "demo", {})["plugins"] == [str(MERGES.sources["last"])]
    said = get_method("third", merge="last").as_dict()
    assert said["plugin"].startswith("plug_others:Third ") and said["merge_plugin"].startswith("plug_others:last ")


# -- the command line --------------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with modules in it that are not installed."""
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "plug_here.py").write_text(SIGNAL)
    (folder / "plug_more.py").write_text(OTHERS)
    (folder / "src").symlink_to(ROOT / "src")
    sys.path[:] = [place for place in sys.path if place not in ("", ".")]
    monkeypatch.chdir(folder)
    return folder


def test_an_option_may_stand_anywhere() -> None:
    line = ["serve", "--plugin", "a:b", "-k", "3", "--plugin=c:d", "--", "--plugin", "vllm:s"]
    assert plugins_first(line) == ["--plugin", "a:b", "--plugin=c:d", "serve", "-k", "3", "--", "--plugin", "vllm:s"]
    assert plugins_first(["select", "--plugin"]) == ["--plugin", "select"]


@pytest.mark.parametrize("place", ["first", "last"])
def test_select_with_a_signal_of_this_folder(here: Path, place: str, capsys: pytest.CaptureFixture[str]) -> None:
    select = ["select", PROMPT, "--base-model", "demo", "--json", "-k", "2", "--signal", "quiet"]
    assert run(select) == 2
    assert "unknown signal 'quiet'" in one_line(capsys)
    named = ["--plugin", "plug_here:quiet"]
    assert run([*named, *select] if place == "first" else [*select, *named]) == 0
    found = json.loads(capsys.readouterr().out)
    scores = found[0]["scores"] if isinstance(found, list) else found["scores"]
    assert scores == same_scores(LoGo.from_pretrained("demo", signal="quiet", k=2).select(PROMPT).scores)


@pytest.mark.parametrize(
    ("plugin", "code", "message"),
    [
        ("plug_here", 2, "plugin 'plug_here': expected module:Object, such as my_signals:quiet"),
        ("plug_here.py:quiet:x", 2, "expected module:Object"),
        ("plug_none:quiet", 1, r"cannot be imported \(ModuleNotFoundError: No module named 'plug_none'\)"),
        ("plug_here:loud", 1, r"cannot be imported \(AttributeError: .*'loud'\)"),
        ("plug_here:register_signal", 1, "expected an object under one of @logo.register_signal, .*found <function"),
        ("json:dumps", 1, "expected an object under one of @logo.register_signal"),
        ("plug_exits:quiet", 1, r"cannot be imported \(SystemExit: bye\)"),
    ],
)
def test_a_plugin_that_cannot_be_used(
    here: Path, plugin: str, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "plug_exits.py").write_text("import sys\nsys.exit('bye')\n")
    assert run(["select", PROMPT, "--base-model", "demo", "--plugin", plugin]) == code
    assert re.search(message, one_line(capsys))


def test_a_run_with_an_installed_plugin_can_be_repeated_from_its_file(site: Path, tmp_path: Path) -> None:
    first, again = tmp_path / "first.json", tmp_path / "again.json"
    asked = ["generate", PROMPT, "--base-model", "demo", "-k", "2", "--signal", "quiet", "--max-new-tokens", "2"]
    assert run([*asked, "--save", str(first)]) == 0
    assert "plugins" not in json.loads(first.read_text())["command"]
    # In a process that has not looked the signal up.
    repeated = [*python(), "-m", "logo.cli", "generate", PROMPT, "--config", str(first), "--save", str(again)]
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(repeated, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    [one], [other] = (json.loads(file.read_text())["answers"] for file in (first, again))
    assert one["adapters"] == other["adapters"] and other["scores"] == same_scores(one["scores"])


@pytest.mark.slow
def test_study_and_sweep_compare_it(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plugin = ["--plugin", "plug_here:quiet"]
    rows = ["--base-model", "demo", "--rows", ROWS, "--limit", "1", "-k", "2", *plugin]
    assert run(["eval", "study", *rows, "--signals", "norm,quiet", "--save", "study.json"]) == 0
    signals = json.loads(Path("study.json").read_text())["settings"]["signals"]
    assert "plugins" not in signals["norm"] and signals["quiet"]["plugins"][0].startswith("plug_here:quiet ")
    grid = ["--grid", "signal=norm,quiet", "--dataset", "antonym", "--max-new-tokens", "2", "-o", "swept"]
    assert run(["eval", "sweep", *rows, *grid]) == 0
    assert {
        json.loads(file.read_text())["identity"]["settings"]["signal"] for file in Path("swept").rglob("run.json")
    } == {"norm", "quiet"}


@pytest.mark.slow
def test_evaluate_and_report_what_others_judge_choose_and_merge(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = ["--metric", "length", "--method", "third", "--merge", "last", "--plugin", "plug_more:Third"]
    asked = ["--rows", ROWS, "--dataset", "antonym", "--base_model", "demo", "--max_new_tokens", "4", "--limit", "4"]
    assert run(["evaluate", *asked, *own]) == 0
    [file] = Path("results").rglob("run.json")
    identity = json.loads(file.read_text())["identity"]
    assert identity["metric_plugin"].startswith("plug_more:length ") and identity["method"]["method"] == "third"
    values = json.loads((file.parent / "eval_results.json").read_text())
    predictions = json.loads((file.parent / "predictions.json").read_text())
    assert values == [min(1.0, len(text) / 100) for text in predictions]
    assert run(["evaluate", *asked, *own]) == 0  # the same run again
    code = (
        "import sys; from logo.cli.run import run; from logo.evaluation.metrics import METRICS;"
        "code = run(['eval', 'report', 'results', '-o', 'report.html']); sys.exit(code or 'length' in METRICS)"
    )
    done = subprocess.run([*python(), "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert "length" in Path("report.html").read_text()
    assert recorded_kind({"metric": "length"}, "bbh.x") == "length" and recorded_kind({}, "wmt14.x") == "bleu"
    Path("plug_more.py").write_text(OTHERS.replace("/ 100", "/ 50"))
    done = subprocess.run(
        [
            *python(),
            "-B",
            "-c",
            "from logo.cli import main; main()",
            "evaluate",
            *asked,
            *own,
        ],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode != 0 and "metric_plugin" in done.stderr + done.stdout, done.stderr


METRIC = """
from logo import register_metric

@register_metric("own")
def own(prediction, golds):
    return {value}
"""


def test_the_first_value_of_a_metric_is_checked_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it is first used, nothing says that a metric is a plugin's."""
    wild = METRIC.format(value="7").replace('"own"', '"wild"')
    entries = {"logo.metrics": {"wild": "plug_wild:own"}}
    monkeypatch.syspath_prepend(str(installed(tmp_path / "site", "plug-wild", entries, plug_wild=wild)))
    with pytest.raises(PluginError, match="metric 'wild': expected a number from 0 to 1, found 7"):
        measure("wild", "an answer", "gold")


@pytest.mark.slow
def test_answers_outlive_a_metric_that_fails(here: Path) -> None:
    """It fails for the last row. Once it is corrected, only that row is answered, and all rows are judged by it."""
    rows = Path(ROWS).resolve()
    last = json.loads((rows / "antonym.jsonl").read_text().splitlines()[3])["completion"]
    asked = ["eval", "run", "--rows", str(rows), "--dataset", "antonym", "--base-model", "demo", "--limit", "4"]
    asked += ["--max-new-tokens", "4", "--plugin", "plug_own:own", "--metric", "own"]

    def evaluated(value: str, results: str) -> subprocess.CompletedProcess[str]:
        Path("plug_own.py").write_text(METRIC.format(value=value))
        code = [*python(), "-B", "-c", "from logo.cli import main; main()", *asked, "--result-dir", results]
        return subprocess.run(code, capture_output=True, text=True, timeout=PATIENCE)

    wrong, right = f"1 / (golds[0] != {last!r})", "1 / (1 + len(prediction))"
    failed = evaluated(wrong, "results")
    assert failed.returncode == 1 and "metric 'own' failed for the answer" in failed.stderr, failed.stderr
    done = evaluated(right, "results")
    assert done.returncode == 0 and "3 finished rows were judged by another metric" in done.stderr, done.stderr
    assert evaluated(right, "whole").returncode == 0
    [one], [whole] = (list(Path(place).rglob("eval_results.json")) for place in ("results", "whole"))
    assert one.read_text() == whole.read_text()


# -- other processes ---------------------------------------------------------------------------------------------------


def test_a_process_that_is_started_knows_the_same(here: Path, site: Path, tmp_path: Path) -> None:
    assert plugins.environment() == {}
    plugins.load("plug_here:quiet", str(here))
    checked_kind("length", "here")
    told = plugins.environment()
    assert set(told) == {"LOGO_PLUGINS"} and f"plug_here:quiet@{here}" in told["LOGO_PLUGINS"]
    code = 'from logo import SelectionSettings as S, plugins; S(signal="quiet"); print(plugins.environment())'
    done = subprocess.run(
        [*python(), "-c", code], cwd=tmp_path, capture_output=True, text=True, env={**os.environ, **told}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(told)


def test_a_variable_that_names_something_broken_is_told_where_it_matters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGO_PLUGINS", "plug_missing:x")
    assert SelectionSettings(signal="norm")
    for _ in range(2):
        with pytest.raises(PluginError, match="plugin 'plug_missing:x' cannot be imported"):
            SelectionSettings(signal="quiet")


@pytest.mark.slow
def test_a_server_scores_by_it_and_requests_import_nothing(
    site: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")]))
    Path("plug_named.py").write_text(SIGNAL.replace("quiet", "named"))
    body = {"model": "logo", "prompt": PROMPT, "max_tokens": 1}
    usual = ("--base-model", "demo", "-k", "2")
    with served(*usual, "--signals", "named", "--plugin", "plug_named:named") as server:
        plugins.load("plug_named:named", str(here))
        expected = LoGo.from_pretrained("demo", signal="named", k=2).select(PROMPT)
        answer = server.post("/v1/completions", {**body, "logo": {"signal": "named"}})
        assert answer["logo"]["adapters"] == list(expected.adapters)
        assert answer["logo"]["weights"] == same_weights(list(expected.weights))
        for signal in ("quiet", "plug_signals:quiet", "plug_here:quiet"):
            with pytest.raises(urllib.error.HTTPError) as refused:
                server.post("/v1/completions", {**body, "logo": {"signal": signal}})
            assert refused.value.code == 400
            assert "expected one of calibrated, named" in json.load(refused.value)["error"]["message"]
        assert imported(site) == set()
    with served(*usual, "--signal", "quiet") as server:
        answer = server.post("/v1/completions", body)
        assert imported(site) == {"plug_signals"}
        expected = LoGo.from_pretrained("demo", signal="quiet", k=2).select(PROMPT)
        assert answer["logo"]["adapters"] == list(expected.adapters)
