"""The site builds without a warning and loads nothing from elsewhere, and its notebooks print what they show."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import site_pages
from tolerances import PATIENCE
from transcripts import difference
from warm import logo

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "docs").rglob("*.ipynb"))
# In continuous integration the packages of the extra `docs` have to be there.
needs_docs = pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None and not os.environ.get("CI"), reason="needs the extra `docs`"
)


def test_links_that_leave_the_docs_lead_to_places_in_the_site() -> None:
    added: list[str] = []
    text = "[a](../README.md#limits) [b](../examples/chats.py) [c](b.md) [d](https://x.org/y.md) [e](#f) ![g](i/h.png)"
    assert site_pages.with_links_of_the_site(text, "page.md", added.append) == (
        "[a](index.md#limits) [b](examples/chats.py) [c](b.md) [d](https://x.org/y.md) [e](#f) ![g](i/h.png)"
    )
    assert added == ["examples/chats.py"]
    assert site_pages.with_links_of_the_site("[a](../page.md)", "concepts/b.md", added.append) == "[a](../page.md)"
    text = "![a](docs/images/b.svg) [c](docs/concepts/d.md#e) [f](CITATION.cff) [g](CONTRIBUTING.md)"
    assert site_pages.with_links_of_the_site(text, "index.md", added.append) == (
        "![a](images/b.svg) [c](concepts/d.md#e) [f](CITATION.cff) [g](contributing.md)"
    )
    assert added == ["examples/chats.py", "CITATION.cff"]


def test_every_page_is_in_the_navigation() -> None:
    navigation = set(re.findall(r"[\w./-]+\.(?:md|ipynb)\b", (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]))
    docs = ROOT / "docs"
    pages = {str(path.relative_to(docs)) for path in docs.rglob("*") if path.suffix in (".md", ".ipynb")}
    assert navigation == pages | set(site_pages.PAGES.values()) | {site_pages.COMMANDS}


@needs_docs
@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    pages = {path: path.read_text() for path in (tmp_path / "site").rglob("*.html")}
    assert len(pages) > 20
    for path, text in pages.items():
        assert not re.findall(
            r"<(?:script|img|iframe)[^>]*src=\"?https?:|<link[^>]*rel=\"?stylesheet[^>]*https?:", text
        ), path
    [reference] = [text for path, text in pages.items() if path.name == "python.html"]
    assert "Selects and mixes adapters" in reference  # docstrings are there


@needs_docs
@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_print_what_they_show(notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`jupyter execute --inplace` in a folder of its own makes the outputs anew, where they have to change."""
    program = tmp_path / "logo"
    program.write_text(f'#!/bin/sh\nexec {shlex.join(logo())} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("COLUMNS", "118")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "run").mkdir()
    run = Path(shutil.copy(notebook, tmp_path / "run"))
    execute = [sys.executable, "-c", "from nbclient.cli import main; main()", "--inplace", str(run)]
    done = subprocess.run(execute, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    for shown, said in zip(outputs(notebook), outputs(run), strict=True):
        assert not difference(shown, said), difference(shown, said)


def outputs(notebook: Path) -> list[str]:
    """What every code cell printed, and `<picture>` for each picture."""
    cells: list[dict[str, Any]] = json.loads(notebook.read_text())["cells"]
    return [
        "".join(
            "<picture>\n" if "image/png" in output.get("data", {}) else "".join(output.get("text", ()))
            for output in cell["outputs"]
            if output.get("name") != "stderr"  # warnings and progress
        )
        for cell in cells
        if cell["cell_type"] == "code"
    ]
