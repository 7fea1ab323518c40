"""The site builds without a warning, as of a page that is not in the navigation or a link that leads nowhere, and loads
nothing from elsewhere."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tolerances import PATIENCE

ROOT = Path(__file__).parent.parent
# In continuous integration the packages of the extra `docs` have to be there.
needs_docs = pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None and not os.environ.get("CI"), reason="needs the extra `docs`"
)


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
    elsewhere = r"<(?:script|img|iframe)[^>]*src=\"?https?:|<link[^>]*rel=\"?stylesheet[^>]*https?:"
    for path, text in pages.items():
        assert not re.findall(elsewhere, text), path
    [reference] = [text for path, text in pages.items() if path.name == "python.html"]
    assert "Selects and mixes adapters" in reference  # docstrings are there
