"""Servers that are measured: started, waited for, asked and ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

HOST = "127.0.0.1"
_STARTS = 1200  # seconds that a server may take
_ENDS = 60  # seconds that it may take to end


def asked(port: int, path: str, body: Any = None) -> bytes | None:
    """What a server replies, to a POST if there is a body; None: it refuses, or is not there."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://{HOST}:{port}/{path}", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=600) as reply:
            content: bytes = reply.read()
            return content
    except OSError:
        return None


def answered(port: int, path: str, body: Any) -> bytes:
    """The same; SystemExit: it has not replied."""
    reply = asked(port, path, body)
    if reply is None:
        raise SystemExit(f"/{path} was not answered")
    return reply


@contextlib.contextmanager
def serving(
    command: Sequence[str], is_up: Callable[[], bool], log: Path, environment: Mapping[str, str] = os.environ
) -> Iterator[psutil.Process]:
    """Inside the block, a server is up. It writes to the end of the log, and all of its processes end with it."""
    with log.open("a") as file:
        server = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True, env=environment)
    try:
        until = time.monotonic() + _STARTS
        while not is_up():
            if server.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"the server did not start; see {log}")
            time.sleep(0.5)
        yield psutil.Process(server.pid)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(_ENDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
