"""What says where adapters act goes with them, whatever is made of their pool."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from torch import nn

import tiny
from logo import AdapterPool
from logo.adapters.activation import EVERYWHERE, Activation, read_notes
from logo.adapters.adapter import open_adapter
from logo.adapters.sources import adapter_patterns
from logo.adapters.write import write_mixture
from logo.cli.app import run
from logo.cli.pool.publish import contents_of
from logo.errors import StorageError, UsageError
from make_adapters import tensors, write

LAST = {"activation": "last:4"}


def note(folder: Path, **said: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pool.json").write_text(json.dumps(said))
    return folder


def activations(folder: Path) -> dict[str, Activation]:
    pool = AdapterPool.open(folder)
    return {adapter.name: adapter.activation for adapter in pool}


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    """Pools in a pool: of the last four tokens, of the last two, of all, and an adapter with an invocation."""
    root = note(tmp_path / "pool", **LAST)
    for number, name in enumerate(("a", "deep/b", "two/c", "two/deep/d", "plain/e", "broken/f")):
        write(root / name, tensors(seed=number))
    write(root / "two" / "g", tensors(seed=9), alora_invocation_tokens=[7, 8])
    note(root / "two", activation="last:2", recipe="r 4")
    note(root / "plain", recipe="of its own")  # the nearest one, which says nothing of it
    (root / "broken" / "pool.json").write_text("{")
    return root


def test_notes_that_cannot_be_read_now_are_no_missing_ones(pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without them, adapters would act on other tokens: now, and by the cache later."""

    def failing(*_: object, **__: object) -> str:
        raise OSError(24, "Too many open files")

    note(pool, **LAST)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", failing)
        with pytest.raises(StorageError, match=r"pool\.json: cannot be read: Too many open files"):
            read_notes(pool)
    assert read_notes(pool) == LAST


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
def test_adapters_act_where_the_nearest_notes_say(pool: Path) -> None:
    assert activations(pool) == EXPECTED
    assert activations(pool / "a") == {"a": Activation(last=4)}
    assert activations(pool / "plain" / "e") == {"e": EVERYWHERE}


def test_it_does_so_also_from_its_own_folder(pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(pool / "a")
    for place in (".", Path(os.curdir)):
        [adapter] = AdapterPool.open(place)
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


def test_what_is_sent_says_it(pool: Path) -> None:
    (pool / "broken" / "pool.json").unlink()
    sent = contents_of(pool, list(AdapterPool.open(pool)), "org/loras", "tasks")
    assert [file for file in sent if file.endswith("pool.json")] == [
        "tasks/plain/pool.json",
        "tasks/pool.json",
        "tasks/two/pool.json",
    ]
    [alone] = AdapterPool.open(pool / "a")
    with pytest.raises(UsageError, match=r"acts on last:4 because of a pool\.json in the folder above"):
        contents_of(pool / "a", [alone], "org/loras", "a")
    [spoken] = AdapterPool.open(pool / "two" / "g")  # says it itself
    assert "g/adapter_config.json" in contents_of(pool / "two" / "g", [spoken], "org/loras", "g")


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
