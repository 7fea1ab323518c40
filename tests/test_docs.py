"""The README and the pages: commands parse, links lead somewhere, the Python example runs."""

from __future__ import annotations

import re
import shlex
import warnings
from pathlib import Path

import pytest
import typer

from logo.cli.app import app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(page: Path) -> list[list[str]]:
    """Every command line in a code block that starts with `logo` or the official script."""
    found = []
    for line in page.read_text().splitlines():
        match = re.match(r"^(?:    |\$ )+(logo|python3 main\.py) (.*)$", line)
        if match:
            arguments = shlex.split(match[2], comments=True)
            found.append(["evaluate", "--preset", "official", *arguments] if "main" in match[1] else arguments)
    return found


ALL = [(page.name, command) for page in PAGES for command in commands(page)]


def test_there_are_commands_to_check() -> None:
    assert len(ALL) >= 10 and any("official" in command for _, command in ALL)


@pytest.mark.parametrize(
    ("page", "command"), ALL, ids=lambda value: " ".join(value) if isinstance(value, list) else value
)
def test_every_command_shown_is_one_that_parses(page: str, command: list[str]) -> None:
    node = typer.main.get_command(app)
    context = node.make_context("logo", command, resilient_parsing=False)
    while isinstance(node, typer.core.TyperGroup):
        rest = [*context._protected_args, *context.args]
        if not rest:
            assert node.invoke_without_command  # `logo bench` does something by itself
            break
        name, found, arguments = node.resolve_command(context, rest)
        assert found is not None
        node = found
        context = node.make_context(name, arguments, parent=context)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere_and_nothing_is_left_to_fill_in(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("https://") or (page.parent / target).exists(), target
    assert "<!-- transcript" not in text and "TODO" not in text


def test_the_make_targets_of_the_readme_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = {t for page in PAGES for t in re.findall(r"^    make ([a-z-]+)", page.read_text(), flags=re.MULTILINE)}
    assert named and named <= targets


def test_the_python_example_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    [example] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(compile(example, "README.md", "exec"), {})
    assert "add_numbers" in capsys.readouterr().out
