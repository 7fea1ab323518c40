"""A process of `warm.py` does what an interpreter of its own does."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tolerances import PATIENCE
from warm import python

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="Linux forks warm processes")]

READS = "import sys; print(sys.argv[1:], sys.stdin.read()); print('é', file=sys.stderr)"
LOOKS = "import os, sys; print(os.getcwd(), os.environ['MINE'], 'HOME' in os.environ, sys.path[:2], __name__)"


def both(*words: str, **options: object) -> list[tuple[int, str, str]]:
    found = []
    for program in (python(), (sys.executable,)):
        done = subprocess.run([*program, *words], capture_output=True, text=True, timeout=PATIENCE, **options)  # type: ignore[call-overload]
        found.append((done.returncode, done.stdout, done.stderr))
    return found


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(("-c", READS, "a b", "-c"), id="streams and arguments"),
        pytest.param(("-c", "import atexit, sys; atexit.register(print, 'end'); sys.exit(3)"), id="exit code"),
        pytest.param(("-c", "import os; os.kill(os.getpid(), 9)"), id="killed"),
        pytest.param(("-m", "json.tool", "--compact"), id="a module"),
        pytest.param(("-c", "def f(x: nope): ..."), id="no future of the parent's"),
        pytest.param((), id="a program from stdin"),
    ],
)
def test_the_same_words(words: tuple[str, ...]) -> None:
    one, other = both(*words, input="[1,\n2]")
    assert one[:2] == other[:2] and one[2].splitlines()[-1:] == other[2].splitlines()[-1:]


def test_the_same_surroundings(tmp_path: Path) -> None:
    environment = {"MINE": "x", "PYTHONPATH": str(tmp_path / "more"), "PATH": os.environ["PATH"]}
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "main.py").write_text(f"{LOOKS}; print(__file__, sys.argv)")
    (tmp_path / "main.py").symlink_to(tmp_path / "real" / "main.py")
    for words in (("-c", LOOKS), ("main.py", "x")):
        one, other = both(*words, cwd=tmp_path, env=environment)
        assert one == other and str(tmp_path) in one[1]


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


def test_who_is_killed_before_it_has_asked_does_not_matter() -> None:
    for said in (b"", b"\0", b"\0\0\0\x09{"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.connect(python()[-1])
            client.sendall(said)
    one, other = both("-c", "print(1)", env={**os.environ, "HF_HOME": "/nowhere"})  # as the parent there forks
    assert one == other == (0, "1\n", "")
