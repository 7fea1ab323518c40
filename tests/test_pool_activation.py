"""What says where adapters act goes with them, whatever is made of their pool."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from torch import nn

import tiny
from logo import AdapterPool
from logo.adapters.activation import EVERYWHERE, Activation
from logo.adapters.export import write_mixture
from logo.adapters.format import open_adapter
from logo.adapters.hub import adapter_patterns
from logo.adapters.upkeep.publishing import Upload
from logo.cli.run import run
from logo.errors import UsageError
from make_adapters import tensors, write

LAST = {"activation": "last:4"}
HOW = {
    "convert": ["--dtype", "bf16"],
    "convert to what they are": [],
    "prune": ["--rank", "2"],
    "prune nothing": ["--energy", "1.0"],
    "dedupe": [],
}


def note(folder: Path, **said: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pool.json").write_text(json.dumps(said))
    return folder


def made(command: str, folder: Path, out: Path) -> Path:
    """A pool that a command makes of a folder."""
    assert run(["pool", command.split()[0], str(folder), "-o", str(out), *HOW[command]]) == 0
    return out


def activations(folder: Path) -> dict[str, Activation]:
    pool = AdapterPool.from_directory(folder, cache="")
    return {adapter.name: adapter.activation for adapter in pool}


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    """Pools in a pool: of the last four tokens, of the last two, of all, and an adapter with an invocation."""
    root = note(tmp_path / "pool", **LAST)
    for number, name in enumerate(("a", "deep/b", "two/c", "two/deep/d", "plain/e", "broken/f")):
        write(root / name, tensors(seed=number))
    write(root / "two" / "g", tensors(seed=9), alora_invocation_tokens=[7, 8])
    note(root / "two", activation="last:2", adapters={"c": {"rows": 9}, "gone": {"rows": 1}}, recipe="r 4")
    note(root / "plain", recipe="of its own")  # the nearest one, which says nothing of it
    (root / "broken" / "pool.json").write_text("{")
    return root


EXPECTED = {
    "a": Activation(last=4),
    "deep/b": Activation(last=4),
    "two/c": Activation(last=2),
    "two/deep/d": Activation(last=2),
    "two/g": Activation((7, 8)),
    "plain/e": EVERYWHERE,
    "broken/f": EVERYWHERE,
}


@pytest.mark.filterwarnings("ignore:.*pool.json is ignored:UserWarning")
@pytest.mark.parametrize("command", HOW)
def test_adapters_act_where_they_did(command: str, pool: Path, tmp_path: Path) -> None:
    assert activations(pool) == EXPECTED
    out = made(command, pool, tmp_path / "out")
    assert activations(out) == EXPECTED
    notes = json.loads((out / "two" / "pool.json").read_text())
    assert notes["recipe"] == "r 4" and [one["command"] for one in notes["changes"]] == [command.split()[0]]
    does_the_same = command in ("convert to what they are", "prune nothing", "dedupe")
    assert notes["adapters"] == ({"c": {"rows": 9}} if does_the_same else {})
    assert does_the_same or notes["before"] == {"adapters": {"c": {"rows": 9}}}
    assert not (out / "deep" / "pool.json").exists()


@pytest.mark.parametrize("command", HOW)
def test_an_adapter_by_itself_acts_where_its_pool_says(command: str, pool: Path, tmp_path: Path) -> None:
    out = made(command, pool / "a", tmp_path / "out")
    assert activations(out) == {"out": Activation(last=4)}
    assert activations(made(command, pool / "plain" / "e", tmp_path / "plain")) == {"plain": EVERYWHERE}
    again = made(command, out, tmp_path / "again")
    notes = json.loads((again / "pool.json").read_text())
    assert notes["activation"] == "last:4" and len(notes["changes"]) == 2


def test_it_does_so_also_when_it_is_known_and_from_its_own_folder(
    pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):  # the second time from the cache
        [adapter] = AdapterPool.from_directory(pool / "a", cache=tmp_path / "cache")
        assert adapter.activation == Activation(last=4)
    monkeypatch.chdir(pool / "a")
    for place in (".", Path(os.curdir)):
        [adapter] = AdapterPool.from_directory(place, cache="")
        assert adapter.activation == open_adapter(place).activation == Activation(last=4)


@pytest.mark.filterwarnings("ignore:.*pool.json is ignored:UserWarning")
def test_inspect_shows_it(pool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["pool", "inspect", str(pool), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["adapters"]
    assert {one["name"]: one["activation"] for one in told} == {name: str(one) for name, one in EXPECTED.items()}
    assert run(["pool", "inspect", str(pool)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("activation")] == [
        "activation last:4: a, deep/b",
        "activation last:2: two/c, two/deep/d",
        "activation invocation: two/g",
    ]


def test_adapters_that_act_elsewhere_are_no_duplicates(tmp_path: Path) -> None:
    same = tensors(seed=0)
    for name in ("a", "b", "two/c"):
        write(tmp_path / "pool" / name, same)
    write(tmp_path / "pool" / "d", same, alora_invocation_tokens=[7])
    note(tmp_path / "pool", **LAST)
    note(tmp_path / "pool" / "two", activation="last:2")
    made("dedupe", tmp_path / "pool", tmp_path / "out")
    assert list(activations(tmp_path / "out")) == ["a", "d", "two/c"]


def test_what_is_sent_says_it(pool: Path) -> None:
    (pool / "broken" / "pool.json").unlink()
    sent = Upload.of(pool, list(AdapterPool.from_directory(pool, cache="")), "org/loras", "tasks").files
    assert [file for file in sent if file.endswith("pool.json")] == [
        "plain/pool.json",
        "pool.json",
        "two/pool.json",
    ]
    [alone] = AdapterPool.from_directory(pool / "a", cache="")
    with pytest.raises(UsageError, match=r"acts on last:4 because of a pool\.json in the folder above"):
        Upload.of(pool / "a", [alone], "org/loras", "a")
    [spoken] = AdapterPool.from_directory(pool / "two" / "g", cache="")  # says it itself
    assert "adapter_config.json" in Upload.of(pool / "two" / "g", [spoken], "org/loras", "g").files


def test_what_is_fetched_for_one_adapter_says_it_too() -> None:
    assert "tasks/pool.json" in adapter_patterns("tasks/a", False)
    assert "pool.json" in adapter_patterns("a", False)
    assert adapter_patterns("", False).count("pool.json") == 1


@pytest.mark.parametrize("around", [{}, LAST, {"activation": "everywhere"}], ids=str)
@pytest.mark.parametrize("own", [EVERYWHERE, Activation(last=3), Activation((5,))], ids=str)
def test_a_mixture_acts_where_its_adapters_do_whatever_lies_around_it(
    own: Activation, around: dict[str, str], tmp_path: Path
) -> None:
    linear = [path for path, module in tiny.model("llama").named_modules() if isinstance(module, nn.Linear)]
    write(tmp_path / "a", tensors(seed=0), **({"alora_invocation_tokens": [*own.tokens]} if own.tokens else {}))
    if own.last:
        note(tmp_path / "a", activation=str(own))
    adapter = open_adapter(tmp_path / "a")
    home = note(tmp_path / "home", **around) if around else tmp_path / "home"
    write_mixture([(adapter, 0.5)], home / "mix" / "half", linear)
    assert activations(home) == {"mix/half": own}
    assert open_adapter(home / "mix" / "half").activation == own
    if not around and own.everywhere:
        assert not list(home.rglob("pool.json"))
    assert activations(made("dedupe", home, tmp_path / "out")) == {"mix/half": own}
