"""A process of `warm.py` does what an interpreter of its own does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from warm import python

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="Linux forks warm processes")]

READS = "import sys; print(sys.argv[1:], sys.stdin.read()); print('é', file=sys.stderr); sys.exit(3)"
LOOKS = "import os, sys; print(os.getcwd(), os.environ['MINE'], 'HOME' in os.environ, sys.path[:2], __name__)"


@pytest.mark.parametrize(
    "words", [("-c", READS, "a b"), ("-c", "def f(x: nope): ..."), ("-c", LOOKS), ("main.py", "x"), ()]
)
def test_the_same_words_do_the_same(words: tuple[str, ...], tmp_path: Path) -> None:
    environment = {"MINE": "x", "PYTHONPATH": str(tmp_path / "more"), "PATH": os.environ["PATH"]}
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "main.py").write_text(f"{LOOKS}; print(__file__, sys.argv)")
    (tmp_path / "main.py").symlink_to(tmp_path / "real" / "main.py")
    found = []
    for program in (python(), (sys.executable,)):
        done = subprocess.run(
            [*program, *words], input="[1,\n2]", cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        found.append((done.returncode, done.stdout, done.stderr.splitlines()[-1:]))
    assert found[0] == found[1]


def test_what_tests_start_has_been_imported() -> None:
    done = subprocess.run([*python(), "-c", "import sys; print('transformers' in sys.modules)"], capture_output=True)
    assert done.stdout == b"True\n"
