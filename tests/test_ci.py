"""The browser in continuous integration: installed where that is allowed; where it is missing, its tests fail."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from order import FIRST
from tolerances import PATIENCE

TESTS = Path(__file__).parent

ASK = """
import browser, pathlib
print("skipped" if browser.needs_browser.args[0] else "run")
try:
    with browser.browser(pathlib.Path("profile")): print("opened")
except AssertionError as error: print(error)
"""


def test_without_a_browser_its_tests_are_skipped_but_fail_where_ci_promises_one(tmp_path: Path) -> None:
    for promised, what in (("", "skipped"), ("true", "run")):
        environment = {**os.environ, "PATH": str(tmp_path), "CI": promised, "PYTHONPATH": str(TESTS)}
        done = subprocess.run(
            [sys.executable, "-c", ASK], env=environment, capture_output=True, text=True, timeout=PATIENCE, check=True
        )
        assert done.stdout.splitlines() == [what, "needs chromium and chromedriver on the PATH"]


def ci(folder: Path, user: str, *there: str, make: str = "", code: int = 0) -> tuple[list[str], str]:
    """What `.ci/run` asks of other programs, and what it says. `make`: what that does besides; `code`: how it ends."""
    told = folder / "told"
    programs = {
        "id": f"echo {user}",
        "apt-get": f'echo apt-get "$@" >> {told}',
        "make": f'echo CI=$CI make "$@" >> {told}\n{make}',
        **dict.fromkeys(there, ""),
    }
    for name, what in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{what}\n")
        (folder / name).chmod(0o755)
    (folder / "dirname").symlink_to(str(shutil.which("dirname")))
    bash, script = str(shutil.which("bash")), str(TESTS.parent / ".ci" / "run")
    done = subprocess.run([bash, script], env={"PATH": str(folder)}, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == code, done.stderr
    return told.read_text().splitlines(), done.stderr


BOTH = ["CI=true make .venv-vllm/.installed", "CI=true make test"]  # beside each other
LAST = ["CI=true make test-vllm"]


@pytest.mark.parametrize(("user", "there"), [("0", False), ("0", True), ("1000", False)])
def test_ci_installs_a_browser_where_it_may(user: str, there: bool, tmp_path: Path) -> None:
    asked, said = ci(tmp_path, user, *(("chromium", "chromedriver") if there else ()))
    install = ["apt-get update -qq", "apt-get install -qq --no-install-recommends chromium chromium-driver"]
    before = install if user == "0" and not there else []
    assert asked[: len(before)] == before and sorted(asked[len(before) : -1]) == BOTH and asked[-1:] == LAST
    assert ("only root can install it" in said) == (user != "0")


def test_ci_says_so_where_vllm_cannot_be_installed(tmp_path: Path) -> None:
    there = ("chromium", "chromedriver")
    asked, said = ci(tmp_path, "0", *there, make='case "$1" in .venv-vllm/*) exit 2;; esac')
    assert sorted(asked) == BOTH
    assert "vLLM for CPUs cannot be installed here: the tests that start it are skipped" in said


@pytest.mark.parametrize("target", ["test", "test-vllm"])
def test_ci_fails_where_tests_fail(target: str, tmp_path: Path) -> None:
    asked, _ = ci(tmp_path, "0", "chromium", "chromedriver", make=f'[ "$1" != {target} ] || exit 2', code=2)
    assert set(asked) <= {*BOTH, *(LAST if target == "test-vllm" else [])}
    assert asked[-1] == f"CI=true make {target}" or target == "test"


def test_the_files_that_come_first_are_there() -> None:
    assert set(FIRST) <= {path.name for path in TESTS.rglob("test_*.py")}
