"""What the server says of itself in its OpenAPI document, held against what it does."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from logo.demo import adapters_dir
from serving import served
from tolerances import PATIENCE

pytestmark = pytest.mark.slow

# What a JSON schema cannot say, such as which models there are and how long a context is, may still be refused.
LEFT_OUT = "positive_data_acceptance"
EXAMPLES = 10 if os.environ.get("CI") else 25


def test_answers_are_as_the_document_says_whatever_is_sent(tmp_path: Path) -> None:
    """Requests made from the document and against it: no 5xx, no undocumented status, type or shape."""
    shutil.copytree(adapters_dir() / "antonym", tmp_path / "pool" / "antonym")
    with served("--base-model", "demo", "--allow-adapter-changes", str(tmp_path / "pool")) as server:
        found = subprocess.run(
            [
                *(sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json"),
                *("--checks", "all", "--exclude-checks", LEFT_OUT, "--max-examples", f"{EXAMPLES}", "--seed", "1"),
                *("--generation-database", "none", "--no-color"),
            ],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            cwd=tmp_path,
        )
        assert found.returncode == 0, found.stdout[-6000:] + found.stderr[-2000:]
        count = re.search(r"(\d+) generated", found.stdout)
        assert count is not None and int(count[1]) > 12 * EXAMPLES
        assert server.text("/health") == "ok"
