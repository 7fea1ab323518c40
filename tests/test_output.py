"""What the command line prints, and what it reads: texts stay as they are."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from logo import UsageError
from logo.cli import generate as generate_module
from logo.cli.app import run
from logo.cli.output import BASE_ALONE, selection_line
from logo.cli.prompts import PromptOptions, forced
from logo.core import Selection

CODE = "def f(x):\n\treturn x[':key:'] + '[bold]' + ':100:'"


def test_an_answer_is_printed_as_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Tabs, names of emoji and markup would all mean something to the library that draws tables."""
    chosen = Selection(("[a]",), (1.0,), {"[a]": 1.0})
    answer = SimpleNamespace(text=f"{CODE}\n", selection=chosen, token_ids=[1], finish_reason="stop", seconds={})
    engine = SimpleNamespace(generate=lambda *_, **__: [answer], close=lambda: None, k=1)
    monkeypatch.setattr(generate_module, "open_engine", lambda *_, **__: engine)
    assert run(["generate", "Hello", "--base-model", "demo"]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{CODE}\n" and "[a] 1.00" in shown.err


def test_a_line_of_a_file_of_prompts_ends_where_a_line_ends(tmp_path: Path) -> None:
    """Not at a form feed or one of Unicode's separators; and a byte order mark belongs to no prompt."""
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffone\u2028still one\x0c\x85\r\ntwo\n".encode())
    assert PromptOptions(prompts=file).read([])[0] == ["one\u2028still one\x0c\x85", "two"]
    file.write_text("one\n \ntwo\n\n")
    assert PromptOptions(prompts=file).read([])[0] == ["one", "two"]
    file.write_text("\n\n")
    with pytest.raises(UsageError, match="no prompt"):
        PromptOptions(prompts=file).read([])


def test_an_adapter_has_one_weight() -> None:
    assert forced(["a=1", "b", "c=d=0.5"], []) == {"a": 1.0, "b": 1.0, "c=d": 0.5}
    assert forced(["lr=0.1", "lr=0.2"], names=["lr=0.1", "lr=0.2"]) == {"lr=0.1": 1.0, "lr=0.2": 1.0}
    with pytest.raises(UsageError, match=r"--adapter 'a': given with the weights 1 and 0\.5; give it once"):
        forced(["a=1", "a=0.5"], names=["a"])


def test_the_name_of_an_adapter_may_look_like_a_weight() -> None:
    assert forced(["eq=1", "a=0.5"], names=("eq=1", "a")) == {"eq=1": 1.0, "a": 0.5}
    assert forced(["eq=1=0.5"], names=("eq=1",)) == forced(["eq=1=0.5"], ()) == {"eq=1": 0.5}
    with pytest.raises(UsageError, match="an adapter of this name is 'eq=x=1'"):
        forced(["eq=x"], ())


@pytest.mark.parametrize(
    ("mixture", "line"),
    [
        ({}, BASE_ALONE),
        ({"a": 0.004}, "1 adapter with weights below 0.005"),
        ({"a": 0.0, "b": 0.0, "c": 0.0, "d": 1.0}, "4 more"),
        ({"a": 0.5, "b": 0.004}, "a 0.50"),
        ({"a": 0.5, "b": 0.2, "c": 0.1, "d": 0.1}, "a 0.50 · b 0.20 · c 0.10 · 1 more"),
    ],
)
def test_a_mixture_in_a_line(mixture: dict[str, Any], line: str) -> None:
    assert selection_line(Selection.forced(mixture)) == line
