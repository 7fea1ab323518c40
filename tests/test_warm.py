"""A process of `warm.py` does what an interpreter of its own does, also where it is killed, or its client."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tolerances import PATIENCE
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


def test_signals_reach_it_and_it_dies_with_who_stands_for_it() -> None:
    code = (
        "import os, signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7));"
        "print(os.getpid(), 'torch' in sys.modules, flush=True); time.sleep(600)"
    )
    for ended, expected in ((signal.SIGTERM, 7), (signal.SIGKILL, -signal.SIGKILL)):
        with subprocess.Popen([*python(), "-c", code], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            pid, warm = process.stdout.readline().split()
            process.send_signal(ended)
            assert process.wait(PATIENCE) == expected and warm == "True"
        end = time.monotonic() + PATIENCE
        while Path(f"/proc/{pid}").exists():
            assert time.monotonic() < end
            time.sleep(0.01)
