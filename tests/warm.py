"""Python processes that find PyTorch imported: importing it takes most of a short command's time.

Such a process is a fork of a parent that has imported PyTorch (`warm_parent.py`; all processes of pytest share it).
A test starts and waits for a small process in its place (`warm_client.py`), which passes on streams, folder,
environment, signals and exit code. If a fork could behave differently from a new interpreter, that small process
becomes an interpreter itself: for options of Python other than `-c`, `-m` and `-B`, and for other values of variables
that Python and PyTorch read when they start. All forks have the same hash seed, so a test of the order of sets has to
start an interpreter.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

_HERE = Path(__file__).parent
_FOLDER = "LOGO_WARM"  # the variable with the folder of the parents' sockets


def start() -> None:
    """Starts the parents, which import when they are first asked."""
    if not hasattr(os, "pidfd_open"):
        return
    folder = os.environ[_FOLDER] = tempfile.mkdtemp(prefix="warm-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with contextlib.ExitStack() as sockets:
        listening = [sockets.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) for _ in range(2)]
        for one, address in zip(listening, _addresses(), strict=True):  # clients wait while the parents import
            one.bind(address)
            one.listen()
        parents = subprocess.Popen(
            [sys.executable, str(_HERE / "warm_parent.py"), *(str(one.fileno()) for one in listening)],
            stdin=subprocess.PIPE,
            pass_fds=[one.fileno() for one in listening],
            start_new_session=True,  # Ctrl-C is for pytest
        )
    atexit.register(_end, parents)


def _addresses() -> list[str]:
    return [os.path.join(os.environ[_FOLDER], name) for name in ("torch", "transformers")]


def python() -> tuple[str, ...]:
    """The words that begin such a command line, in place of `sys.executable`."""
    if _FOLDER not in os.environ:
        return (sys.executable,)
    return sys.executable, "-IS", str(_HERE / "warm_client.py"), *reversed(_addresses())


def logo() -> tuple[str, ...]:
    """The words that begin a command line of `logo`."""
    return (*python(), "-c", "from logo.cli import main; main()")


def _end(parents: subprocess.Popen[bytes]) -> None:
    """Ends the parents and what they have forked. Where pytest dies before it comes here, their input ends."""
    os.killpg(parents.pid, signal.SIGKILL)
    parents.wait()
