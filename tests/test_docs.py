"""The README and the pages: commands parse and print what is shown, links lead somewhere, the Python example runs."""

from __future__ import annotations

import ast
import contextlib
import io
import os
import re
import shlex
import subprocess
import tokenize
import warnings
from pathlib import Path

import pytest

from bare_environments import TRIED
from local_server import LocalServer
from logo.cli import output
from logo.cli.app import ANYWHERE, app, run
from make_adapters import write_drawer
from tolerances import PATIENCE
from transcripts import difference, files, transcripts
from warm import logo, python

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", *sorted((ROOT / "docs").rglob("*.md"))]
WRITTEN_LATER = {"../changelog.md", "reference/commands.md"}  # by tools/site_pages.py


def commands(page: Path) -> list[list[str]]:
    """Every command line in a code block that starts with `logo` or the official script."""
    found = []
    for line in page.read_text().splitlines():
        match = re.match(r"^(?:    |\$ )+(logo|python3 main\.py) (.*)$", line)
        if match:
            arguments = shlex.split(match[2].partition(" 2> ")[0], comments=True)
            found.append(["evaluate", "--preset", "official", *arguments] if "main" in match[1] else arguments)
    return found


ALL = [(page.name, command) for page in PAGES for command in commands(page)]


def test_every_command_shown_is_one_that_parses() -> None:
    assert len(ALL) >= 10 and any("official" in command for _, command in ALL)
    for page, command in ALL:
        try:
            parse(command)
        except Exception as error:
            raise AssertionError(f"{page}: {' '.join(command)}: {error}") from error


def test_the_commands_tried_in_bare_environments_parse() -> None:
    tried = [rest for commands in TRIED.values() for (program, *rest), _ in commands if program == "logo"]
    assert len(tried) >= 7
    for command in tried:
        parse(command)


def parse(command: list[str]) -> None:
    """Raises if these are no arguments of `logo`."""
    end = command.index("--") if "--" in command else len(command)
    own = [*ANYWHERE.parse_known_args(command[:end])[1], *command[end:]]
    app.parse_args(own, exit_on_error=False, print_error=False)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere_and_lists_are_lists_on_the_site_too(page: Path) -> None:
    text = page.read_text()
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", text):
        there = page.parent / target if target else page
        if target.startswith("https://") or target in WRITTEN_LATER:
            continue
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), f"{target}#{anchor}"
    assert "TODO" not in text
    # Markdown on GitHub takes two or three spaces for a list in a list; that of the site wants four.
    assert not re.findall(r"^ {1,3}[-*] ", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M), flags=re.M)


def anchors(page: Path) -> set[str]:
    """What a link may name in a page: its headings, as GitHub and the site call them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain}


def test_the_make_targets_of_the_readme_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = {t for page in PAGES for t in re.findall(r"^    make ([a-z-]+)", page.read_text(), flags=re.MULTILINE)}
    assert named and named <= targets


def test_the_python_example_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "README.md").read_text()
    [example] = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(compile(example, "README.md", "exec"), {})
    assert f"This prints `{capsys.readouterr().out.rstrip()}`." in text


def test_the_numbers_of_the_readme_stand_on_the_pages_that_it_links_to() -> None:
    parts = re.findall(r"^(?:- |\| ).*(?:\n  .*)*", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    found = 0
    for part in parts:
        pages = [(ROOT / target).read_text() for target in re.findall(r"\]\((docs/[\w-]+\.md)", part)]
        for number in re.findall(r"\b\d+\.\d+\b(?!\d* or newer)", part) if pages else ():
            assert any(number in page for page in pages), f"{number}: {part}"
            found += 1
    assert found >= 10


def code_lines(file: Path) -> int:
    """How many lines of a file hold code: no blank lines, comments or docstrings."""
    text = file.read_text()
    documented = {
        line
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    code = {line for token in tokens if token.type not in layout for line in range(token.start[0], token.end[0] + 1)}
    return len(code - documented)


def test_the_readme_says_how_many_lines_there_are() -> None:
    source = ROOT / "src" / "logo"
    counts = {file.relative_to(source).parts[0]: 0 for file in source.rglob("*.py")}
    for file in source.rglob("*.py"):
        counts[file.relative_to(source).parts[0]] += code_lines(file)
    said = re.search(r"take ([\d,]+) lines of Python;.*make it ([\d,]+)\.", (ROOT / "README.md").read_text())
    assert said is not None
    core, total = (int(number.replace(",", "")) for number in said.groups())
    assert core == pytest.approx(counts["selection"] + counts["mixing"], rel=0.1)
    assert total == pytest.approx(sum(counts.values()), rel=0.1)


# --- transcripts: the rules are in transcripts.py

RUN = {page: [found for found in transcripts(page) if found.why_not_run is None] for page in PAGES}

# Folders that a page speaks of without saying how to make them.
FOLDERS = {"my-adapters": lambda at: write_drawer(at, ("kasa", "nan", "pickled", "rank_mismatch", "weights_truncated"))}


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plugins_forgotten: None) -> Path:
    """A folder with the repository's own in it, and a shell in which `logo` and `python` are this environment's."""
    for name in ("src", "tests", "docs", "examples", "main.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    programs = tmp_path / ".programs"
    programs.mkdir()
    for name, words in {"logo": logo(), "python": python(), "python3": python()}.items():
        (programs / name).write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("COLUMNS", "118")  # as wide as the pages
    for console in (output.out, output.err):  # made when they were imported, perhaps under another width
        monkeypatch.setattr(console, "_width", 118)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / ".hf"))
    monkeypatch.setenv("no_proxy", "localhost,127.0.0.1")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said_by(command: str) -> str:
    """What a command prints on both streams; it has to succeed."""
    fails = command.startswith("! ")
    if command.startswith(("logo ", "! logo ")) and "lm-eval" not in command:
        said = io.StringIO()  # in this process: importing everything takes seconds
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = run(shlex.split(command.removeprefix("! "))[1:])
        code = int(code == 0) if fails else code
        text = said.getvalue()
    else:
        done = subprocess.run(
            ["bash", "-c", command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=PATIENCE
        )
        code, text = done.returncode, done.stdout
    assert code == 0, f"{command}\n{text}"
    return text


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page, found in RUN.items() if found], ids=lambda page: page.name)
def test_transcripts_are_what_the_commands_print(page: Path, world: Path) -> None:
    for name, content in files(page).items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(content)
    wrong, address, log = [], "", ""
    with contextlib.ExitStack() as servers:
        for transcript in RUN[page]:
            if log and log in shlex.split(transcript.command):
                servers.close()  # all that it says is in the file then
            for name in set(shlex.split(transcript.command)) & FOLDERS.keys():
                FOLDERS[name](world / name)
            if transcript.command.startswith("logo serve "):
                options, _, log = transcript.command.partition(" 2> ")
                server = servers.enter_context(
                    LocalServer(
                        shlex.split(options)[2:], start=PATIENCE, log=Path(log) if log else None, program=logo()
                    )
                )
                address, said = server.url.removeprefix("http://127.0.0.1"), "" if log else server.said
            else:
                said = said_by(transcript.command.replace(":8000", address) if address else transcript.command)
            found = difference(transcript.shown, said.replace(address, ":8000") if address else said)
            if found and transcript.shown:
                wrong.append(f"{transcript.page}:{transcript.line}: $ {transcript.command}\n{found}")
    assert not wrong, "\n\n".join(wrong)
