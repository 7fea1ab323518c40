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
from torch import nn

from logo import LoGo, PluginError, UsageError, plugins
from logo.baselines import get_method
from logo.baselines.method import METHODS
from logo.cli.app import run
from logo.evaluation.answer import engine_identity
from logo.evaluation.metrics import METRICS, checked_kind, measure, measures, scale_of
from logo.plugins import Definition, Registry
from logo.recorded import without_secrets
from logo.selection.signals import SIGNALS, get_signal, register_signal
from serving import served
from test_engine import engine
from test_evaluate import one_line
from tolerances import PATIENCE, same_scores, same_weights
from warm import python

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("plugins_forgotten")]

ROWS = "src/logo/demo/assets/heldout"
ROOT = Path(__file__).parent.parent
REGISTRIES: tuple[Registry[Any], ...] = (SIGNALS, METHODS, METRICS)
PROMPT = "What is the opposite of hot?"

SIGNAL = """
from logo import register_signal

@register_signal("quiet", layers="early", input="projection", token="each", scale="zscore", weighting="adaptive")
def quiet(index, hidden):
    return index.norms(hidden).sqrt()
"""
# What a signal computes may need gradients.
LOUD = """
import torch
from logo import register_signal

@register_signal("loud")
def loud(index, hidden):
    with torch.enable_grad():
        vectors = hidden.clone().requires_grad_()
        torch.autograd.grad((index.stacked @ vectors.T).square().sum(), vectors)
    return index.norms(hidden).square()
"""
OTHERS = """
from logo import Prepared, Selection, register_method, register_metric

@register_metric("length")
def length(prediction, golds):
    return min(1.0, len(prediction) / 100)

@register_method()
def third(logo, task, *, k: int = 1, api_key: str = ""):
    "The third adapter."
    name = task.candidates(logo)[2]
    return Prepared(lambda prompts, size: [Selection.forced({name: 1.0}) for _ in prompts])
"""


def installed(site: Path, distribution: str, *entries: str, **modules: str) -> Path:
    """An installed distribution: its modules, and the folder in which importlib.metadata finds its entry points."""
    info = site / f"{distribution.replace('-', '_')}-1.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
    listed = (f"{number} = {entry}" for number, entry in enumerate(entries))
    (info / "entry_points.txt").write_text("\n".join(["[logo.plugins]", *listed]))
    for name, text in modules.items():
        (site / f"{name}.py").write_text(text)
    return site


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A distribution with a signal, a metric and a method, in Python's path."""
    entries = ("plug_signals:quiet", "plug_others:third")
    found = installed(tmp_path / "site", "plug-good", *entries, plug_signals=SIGNAL, plug_others=OTHERS)
    monkeypatch.syspath_prepend(str(found))
    return found


def load(site: Path, name: str, text: str, definition: str = "quiet") -> None:
    """Loads a plugin of the module `plug_NAME`, which is this text."""
    (site / f"plug_{name}.py").write_text(text)
    plugins.load(f"plug_{name}:{definition}")


def test_what_is_installed_is_imported_once_and_by_no_look_up(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"unknown signal 'quiet'.*; known: norm, .*--plugin"):
        get_signal("quiet")
    assert not {"plug_signals", "plug_others"} & set(sys.modules)
    plugins.load_installed()
    plugins.load_installed()
    with pytest.raises(UsageError, match=r"unknown signal 'quite' \(did you mean 'quiet'\?\); known: norm, .*, quiet;"):
        get_signal("quite")
    assert get_signal("quiet").scale == "zscore"
    third = get_method("third", k=4)
    assert checked_kind("length", "here") == "length" and third.picks == 4 and measures("length") == ("length",)
    bad = installed(site.parent / "bad", "plug-bad", "plug_broken:signal", plug_broken="import nothing_of_this_name")
    monkeypatch.syspath_prepend(str(bad))
    with pytest.raises(PluginError, match=r"'plug_broken:signal': expected an importable .* \(ModuleNotFound"):
        plugins.load_installed()


@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda one: one.kind)
def test_our_names_are_taken(registry: Registry[Any], site: Path) -> None:
    """And those of plugins; and a signal says of itself what there is."""

    def mine() -> None: ...

    for name in registry:
        with pytest.raises(UsageError, match=rf"{registry.kind} '{name}' \(test_plugins:.*mine\): .* taken by logo"):
            registry.add(name, mine, mine)
    for name in ("", "two words", "a,b", "a=b", "1st", "a.b", "ä"):
        with pytest.raises(UsageError, match="expected a name of letters, digits"):
            registry.add(name, mine, mine)
    assert not registry.definitions
    load(site, "signals", SIGNAL)
    with pytest.raises(PluginError, match=r"plug_second:quiet.*the name is taken by plug_signals:quiet"):
        load(site, "second", SIGNAL)
    with pytest.raises(UsageError, match=r"signal 'x': token: expected one of last, each, tail, found 'all'"):
        register_signal("x", token="all")  # type: ignore[arg-type]


def test_a_digest_is_of_the_whole_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    package = tmp_path / "plug_whole" / "inner"
    package.mkdir(parents=True)
    for file in ("__init__.py", "helps.py", "../__init__.py"):
        (package / file).touch()
    (package / "mine.py").write_text("def f(): ...")
    definition = importlib.import_module("plug_whole.inner.mine").f
    first = Definition.of(definition)
    assert (first.place, first.folder) == ("plug_whole.inner.mine:f", str(tmp_path))
    assert Definition.of(definition) == first
    (package / "helps.py").write_text("x = 2")
    assert Definition.of(definition).digest != first.digest
    space: dict[str, Any] = {"__name__": "plug_nowhere"}
    exec("def f(): ...", space)  # as in a prompt: nobody knows its text
    nowhere = Definition.of(space["f"])
    assert nowhere.folder is None and nowhere.digest != Definition.of(space["f"]).digest


# -- what they compute -------------------------------------------------------------------------------------------------


def test_a_signal_scores_as_it_says(site: Path, tmp_path: Path) -> None:
    engine = LoGo.from_pretrained("demo", signal="quiet", k=3, cache=str(tmp_path / "cache"))
    found = engine.select([PROMPT, "Spell the word: tree"])
    assert all(1 <= len(one.adapters) <= 3 and one.confidence is not None for one in found)
    assert engine.select(PROMPT).scores == same_scores(found[0].scores)
    load(site, "raw", LOUD, "loud")
    raw, norm = engine.select(PROMPT, signal="loud"), engine.select(PROMPT, signal="norm")
    assert raw.scores == same_scores({name: score**2 for name, score in norm.scores.items()})


@pytest.mark.parametrize(
    ("scale", "returns", "error", "message"),
    [
        ("raw", "hidden", PluginError, r"expected scores \(vectors, adapters\) \(1, 16\)"),
        ("raw", "index.norms(hidden)[:, 99]", RuntimeError, "failed: IndexError: index 99"),
        ("raw", "index.norms(hidden) / 0", PluginError, "finite scores.*inf for adapter 1 of 16"),
        ("zscore", "index.norms(hidden) * float('nan')", PluginError, "finite scores.*nan for adapter 1 of 16"),
        ("whitened", "-1 - 0 * index.norms(hidden)", PluginError, r"none below 0 \(.*\), found -1.0 for adapter 1"),
    ],
)
def test_a_signal_that_fails_is_named(site: Path, scale: str, returns: str, error: Any, message: str) -> None:
    """A calibration took NaN for an adapter without a response, and the selection looked like any other."""
    layers = "" if scale == "raw" else ", layers='early'"
    wrong = f"@register_signal('wrong', scale={scale!r}{layers})\ndef wrong(index, hidden): return {returns}\n"
    load(site, "wrong", f"from logo import register_signal\n{wrong}", "wrong")
    with pytest.raises(error, match=f"signal plug_wrong:wrong.*{message}"):
        LoGo.from_pretrained("demo", signal="wrong", k=2).select(PROMPT)


def test_a_metric_says_a_number_from_0_to_1(site: Path) -> None:
    told = "def as_told(prediction, golds):\n    assert not isinstance(golds, str)\n    return eval(prediction)\n"
    load(site, "metric", f"from logo import register_metric\n@register_metric('as_told')\n{told}", "as_told")
    assert measure("as_told", "1", "gold") == measure("as_told", "True", ("gold",)) == 1.0
    assert measure("as_told", "__import__('numpy').float32(0.5)", "gold") == 0.5
    assert measure("as_told", "__import__('torch').tensor(0.5)", "gold") == 0.5
    for wrong in ("1.5", "-1", "float('nan')", "None", "'1'", "__import__('torch').ones(2)", "1j"):
        with pytest.raises(PluginError, match="metric 'as_told': expected a number from 0 to 1, found"):
            measure("as_told", wrong, "gold")
    message = r"metric 'as_told' failed for the answer '1 / 0' and the gold texts \['hot'\] \(ZeroDivisionError: "
    with pytest.raises(PluginError, match=message):
        measure("as_told", "1 / 0", "hot")


@pytest.mark.filterwarnings("default")
def test_what_a_metric_warns_of_is_told_once_and_not_for_every_row(
    site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "def noisy(prediction, golds):\n    warnings.warn('all are alike')\n    return 1.0\n"
    heading = "import warnings\nfrom logo import register_metric\n@register_metric('noisy')\n"
    load(site, "noisy", heading + code, "noisy")
    asked = ["eval", "run", "--base-model", "demo", "--method", "base", "--metric", "noisy", "--max-new-tokens", "1"]
    assert run([*asked, "--rows", ROWS, "--dataset", "antonym", "--limit", "3", "--result-dir", str(tmp_path)]) == 0
    assert capsys.readouterr().err.count("all are alike") == 1


def test_a_metric_declares_its_scale(site: Path) -> None:
    heading = "from logo import register_metric\n@register_metric('right', scale={!r})\n"
    code = "def right(prediction, golds):\n    return float(prediction)\n"
    load(site, "right", heading.format("binary") + code, "right")
    assert measure("right", "1", "gold") == 1.0
    assert [scale_of(kind) for kind in ("right", "em_multi", "rouge", "of_nobody")] == ["binary"] * 2 + ["graded"] * 2
    with pytest.raises(PluginError, match=r"metric 'right': expected 0 or 1, since its scale is 'binary', found 0\.5"):
        measure("right", "0.5", "gold")
    with pytest.raises(PluginError, match="metric 'right': scale: expected one of binary, graded, found 'ordinal'"):
        load(site, "ordinal", heading.format("ordinal") + code, "right")


def test_a_changed_signal_reads_no_old_calibration(tmp_path: Path) -> None:
    """In processes, as users change their files: three calibrations, of which the last is the first one's again."""
    file, cache = tmp_path / "plug_changing.py", tmp_path / "cache"
    code = (
        "import sys; from logo import LoGo; from logo.evaluation.answer import engine_identity; import plug_changing;"
        f"engine = LoGo.from_pretrained('demo', signal='quiet', k=2, cache={str(cache)!r});"
        f"print(engine.select({PROMPT!r}).scores['antonym'], engine_identity(engine, 'demo', {{}})['plugin'])"
    )
    said = []
    # The last process iterates over sets in an order of its own, which forks of one process do not.
    programs = (python(), python(), (sys.executable,))
    for text, program in zip((SIGNAL, SIGNAL.replace(".sqrt()", ".square()"), SIGNAL), programs, strict=True):
        file.write_text(text)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        ask = [*program, "-B", "-c", code]
        done = subprocess.run(ask, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE, env=environment)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert said[0] == said[2] != said[1]
    assert re.fullmatch(r"-?\d\S* plug_changing:quiet [0-9a-f]{64} quiet\n", said[0])
    assert len(list((cache / "calibration").iterdir())) == 2


def test_a_signal_that_takes_the_name_of_another_is_computed_anew(llama: nn.Module, adapters: Path) -> None:
    """In an engine that is open, as where a cell of a notebook is run again."""

    def define(power: int) -> None:
        @register_signal("again")
        def again(index: Any, hidden: Any) -> Any:
            return index.norms(hidden) ** power

    define(1)
    logo = engine(llama, adapters, signal="again")
    before = logo.select("w3 w4")
    define(2)
    after = logo.select("w3 w4")
    assert after.scores == pytest.approx({name: score**2 for name, score in before.scores.items()})
    assert logo.select("w3 w4") == after


def test_the_identity_of_a_run_names_code_of_others_only(site: Path) -> None:
    assert "plugin" not in engine_identity(LoGo.from_pretrained("demo", k=2, signal="norm"), "demo", {})
    assert "plugin" not in get_method("random").as_dict()
    engine = LoGo.from_pretrained("demo", k=2, signal="quiet")
    assert engine_identity(engine, "demo", {})["plugin"] == SIGNALS.definition("quiet")
    third = get_method("third", api_key="hidden").as_dict()
    assert third["plugin"].startswith("plug_others:third ") and "hidden" not in str(third)
    assert third != get_method("third", api_key="other").as_dict()
    for name in ("method_args", "engine_args"):
        assert without_secrets({name: "k=2, api-key =hidden,top=a=b"}) == {name: "k=2,top=a=b"}


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


def test_a_plugin_that_cannot_be_used_is_one_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "plug_exits.py").write_text("import sys\nsys.exit('bye')\n")
    importable = r"expected an importable module:Object"
    for plugin, message in (
        ("plug_here", rf"plugin 'plug_here': {importable} \(AttributeError"),
        ("plug_none:quiet", rf"{importable} \(ModuleNotFoundError: No module named 'plug_none'"),
        ("plug_here:register_signal", "expected an object under @logo.register_..., found <function"),
        ("plug_exits:quiet", rf"{importable} \(SystemExit: bye\)"),
    ):
        assert run(["select", PROMPT, "--base-model", "demo", "--plugin", plugin]) == 1
        assert re.search(message, one_line(capsys))


def test_a_run_with_a_plugin_can_be_repeated_from_its_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["eval", "run", "--base-model", "demo", "-k", "2", "--signal", "quiet", "--max-new-tokens", "2"]
    asked += ["--rows", ROWS, "--tasks", "antonym", "--limit", "2", "--metric", "length"]
    named = ["--plugin", "plug_here:quiet", "--plugin=plug_more:length"]
    assert run([*asked, *named, "--result-dir", "first"]) == 0
    [file] = here.glob("first/*/*/run.json")
    about = json.loads(file.read_text())
    assert about["command"]["plugins"] == ["plug_here:quiet", "plug_more:length"] and set(about["scores"]) >= {"length"}
    repeated = [*python(), "-m", "logo.cli", "eval", "run", *named, "--config", str(file), "--save", "again"]
    done = subprocess.run(repeated, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    [again] = here.glob("again/*/*/run.json")
    assert again.with_name("predictions.json").read_bytes() == file.with_name("predictions.json").read_bytes()
    unnamed = ["eval", "run", "--config", str(file), "--result-dir", "third"]
    assert subprocess.run([*python(), "-m", "logo.cli", *unnamed], capture_output=True).returncode == 2


# -- other processes ---------------------------------------------------------------------------------------------------


def test_a_process_that_is_started_knows_the_same(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert plugins.environment() == {}
    plugins.load_installed()
    own = tmp_path / "own"
    own.mkdir()
    (own / "plug_own.py").write_text(SIGNAL.replace('"quiet"', '"own"'))
    plugins.load("plug_own:quiet", str(own))
    told = plugins.environment()
    assert set(told) == {"LOGO_PLUGINS"} and f"plug_own:quiet@{own}" in told["LOGO_PLUGINS"]
    code = "from logo import SelectionSettings as S, plugins; plugins.load_installed(); S(signal='own'); "
    code += "print(plugins.environment())"
    environment = {**os.environ, **told}
    done = subprocess.run([*python(), "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and f"plug_own:quiet@{own}" in done.stdout, done.stderr
    monkeypatch.setenv("LOGO_PLUGINS", "plug_missing:x")
    with pytest.raises(PluginError, match="plugin 'plug_missing:x': expected an importable module:Object"):
        plugins.load_installed()
    told = plugins.environment()["LOGO_PLUGINS"].split()
    assert told[0] == "plug_missing:x" and f"plug_own:quiet@{own}" in told  # what is not loaded yet stays named
    monkeypatch.setenv("LOGO_PLUGINS", "'plug:x")
    with pytest.raises(UsageError, match=r"LOGO_PLUGINS .*: expected module:Object"):
        plugins.load_installed()


def test_a_server_scores_by_it_and_takes_no_other_from_a_request(here: Path) -> None:
    plugins.load("plug_here:quiet", str(here))
    expected = LoGo.from_pretrained("demo", signal="quiet", k=2).select(PROMPT)
    body = {"model": "logo", "prompt": PROMPT, "max_tokens": 1}
    with served("--base-model", "demo", "-k", "2", "--signal", "quiet", "--plugin", "plug_here:quiet") as server:
        answer = server.post("/v1/completions", {**body, "logo": {"signal": "quiet"}})
        assert answer["logo"]["adapters"] == list(expected.adapters)
        assert answer["logo"]["weights"] == same_weights(list(expected.weights))
        with pytest.raises(urllib.error.HTTPError) as refused:
            server.post("/v1/completions", {**body, "logo": {"signal": "plug_more:length"}})
        assert refused.value.code == 400
        assert "expected one of quiet, norm" in json.load(refused.value)["error"]["message"]
