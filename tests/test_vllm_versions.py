"""The check of vLLM's versions, on sources that are made up: it finds what is there, and misses what is not."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
import vllm_versions as versions
from vllm_needs import HOOKS, KNOWN, RELIED, Attributes, Call, Flags, Function

BASE = """
from dataclasses import dataclass

class Upper:
    def inherited(self, a, *, b=1): ...

@dataclass
class Data:
    first: int
    second: str = ""
"""
MODULE = """
from vllm.base import Upper as Renamed, helper
from .base import Data

if True:
    class Manager(Renamed):
        field: int
        def __init__(self, model, config=None):
            self.assigned = helper(1, max_batches=2, device=config)
        async def answer(self, method, timeout=None, args=()): ...

def free(x, /, y): ...
"""
FILES = {"vllm/base.py": BASE, "vllm/part/__init__.py": "", "vllm/module.py": MODULE}
HERE = versions.Sources(FILES.get)


@pytest.mark.parametrize(
    ("need", "missing"),
    [
        (Function("vllm.module", "Manager", "__init__", ("self", "model")), None),
        (Function("vllm.module", "Manager", "__init__", ("self", "config")), "takes (self, model, config)"),
        (Function("vllm.module", "Manager", "inherited", ("self", "a")), None),
        (Function("vllm.module", "Manager", "nothing"), "does not exist"),
        (Function("vllm.module", "Nobody", "__init__"), "does not exist"),
        (Function("vllm.nowhere", "Manager", "__init__"), "no module vllm.nowhere"),
        (Function("vllm.module", "Manager", "answer", ("self", "args"), positional=False), None),
        (Function("vllm.module", "Manager", "answer", ("self", "kwargs"), positional=False), "takes (self, method"),
        (Function("vllm.module", "Manager", "inherited", ("b",), positional=False), None),
        (Function("vllm.module", "", "free", ("x", "y")), None),
        (Function("vllm.module", "", "helper"), None),
        (Function("vllm.module", "", "other"), "does not exist"),
        (Function("vllm.module", "Data", "__init__", ("self", "first", "second")), None),
        (Function("vllm.module", "Data", "__init__", ("self", "second")), "does not exist"),
        (Attributes(("vllm.module",), "Manager", ("field", "assigned", "inherited")), None),
        (Attributes(("vllm.module",), "Manager", ("field", "gone", "lost")), "no gone, lost"),
        (Attributes(("vllm.nowhere", "vllm.module"), "Manager", ("field",)), None),
        (Attributes(("vllm.nowhere",), "Manager", ("field",)), "no class Manager"),
        (Flags(("vllm.base",), "Data", ("first", "third")), "no third"),
        (Call("vllm.module", "helper", 1, ("max_batches", "device")), None),
        (Call("vllm.module", "helper", 2, ("max_batches",)), "is not called with"),
        (Call("vllm.module", "helper", 1, ("max_batches", "scale")), "is not called with"),
    ],
    ids=str,
)
def test_what_is_there_and_what_is_not(need: versions.Need, missing: str | None) -> None:
    found = HERE.missing(need)
    assert found is None if missing is None else found is not None and found.startswith(missing)


def test_the_table_says_where_something_is_different(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "vllm-1.0-py3-none-any.whl", "w") as archive:
        for name, text in FILES.items():
            archive.writestr(name, text)
    old = versions.Sources({"vllm/module.py": "class Manager: ..."}.get)
    wanted = [("wrapped", Function("vllm.module", "Manager", "answer", ("self",)))]
    lines, different = versions.table({"0.1": old, "1.0": versions.in_wheel(next(tmp_path.glob("*.whl")))}, wanted)
    assert lines[1].split() == ["wrapped", "-", "ok", "Manager.answer(self)"]
    assert different == ["0.1: Manager.answer(self): does not exist"]


def test_a_wheel_that_is_here_is_not_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "0.32").mkdir()
    (tmp_path / "0.32" / "vllm-0.32.0-py3-none-any.whl").touch()
    monkeypatch.setattr(versions.subprocess, "run", lambda *_, **__: pytest.fail("downloaded"))
    assert versions.wheel("0.32", tmp_path) == tmp_path / "0.32" / "vllm-0.32.0-py3-none-any.whl"


def test_every_hook_has_a_title_of_its_own() -> None:
    titles = [f"{kind} {versions.title(need)}" for kind, need in versions.needs()]
    assert len(titles) == len(HOOKS) + len(RELIED)
    assert len(set(titles)) == len(titles)
    assert list(KNOWN) == sorted(KNOWN, key=lambda version: tuple(map(int, version.split("."))))
