"""A browser in continuous integration: installed where that is allowed, and missed aloud where it is not there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tolerances import PATIENCE

TESTS = Path(__file__).parent

ASK = """
import browser, pathlib
print("skipped" if browser.needs_browser.args[0] else "run")
try:
    with browser.browser(pathlib.Path("profile")): print("opened")
except AssertionError as error: print(error)
"""


@pytest.mark.parametrize(("ci", "what"), [("", "skipped"), ("true", "run"), ("1", "run")])
def test_without_a_browser_its_tests_are_skipped_but_fail_where_ci_promises_one(
    ci: str, what: str, tmp_path: Path
) -> None:
    environment = {**os.environ, "PATH": str(tmp_path), "CI": ci, "PYTHONPATH": str(TESTS)}
    done = subprocess.run(
        [sys.executable, "-c", ASK], env=environment, capture_output=True, text=True, timeout=PATIENCE, check=True
    )
    assert done.stdout.splitlines() == [what, "needs chromium and chromedriver on the PATH"]


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("user", ["0", "1000"])
def test_ci_installs_a_browser_where_it_may(user: str, there: bool, tmp_path: Path) -> None:
    told = tmp_path / "told"
    programs = {
        "id": f"echo {user}",
        "apt-get": f'echo apt-get "$@" >> {told}',
        "make": f'echo CI=$CI make "$@" >> {told}',
    }
    for name, what in (programs | ({"chromium": "", "chromedriver": ""} if there else {})).items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{what}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "dirname").symlink_to(str(shutil.which("dirname")))
    bash = str(shutil.which("bash"))
    environment = {"PATH": str(tmp_path)}
    done = subprocess.run(
        [bash, str(TESTS.parent / ".ci" / "run")], env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    install = ["apt-get update -qq", "apt-get install -qq --no-install-recommends chromium chromium-driver"]
    assert told.read_text().splitlines() == [*(install if user == "0" and not there else []), "CI=true make test"]
    assert ("only root can install it" in done.stderr) == (user != "0" and not there)
