"""`logo serve` as a process: starts it on a free port, waits for it, ends it with SIGTERM."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tolerances import PATIENCE
from warm import logo

SERVING = re.compile(r"Serving on (http://[^\s\"]+)")
_SAID = 40  # number of its last printed lines that are shown


class LocalServer:
    """A server for the duration of a `with` block.

        with LocalServer(["--base-model", "demo"]) as server:
            ...  # server.url takes requests
        server.exit_code  # 0 after a clean end

    Args:
        options: options of `logo serve`, without `--port`.
        environment: additional environment variables (a key belongs here, not on the command line; else there is none).
        start: seconds that starting may take.
        log: a file for its output.
        program: the words that start `logo`; none: those of a warm process.
    """

    def __init__(
        self,
        options: Sequence[str],
        environment: Mapping[str, str] | None = None,
        *,
        start: float = PATIENCE,
        log: Path | None = None,
        program: Sequence[str] = (),
    ) -> None:
        self.url, self.exit_code, self._printed, self._ending = "", None, b"", False
        self._command = [*(program or logo()), "serve", "--port", "0", *options]
        inherited = {name: value for name, value in os.environ.items() if name != "LOGO_API_KEY"}
        self._environment = {**inherited, **(environment or {})}
        self._start, self._log = start, log

    @property
    def said(self) -> str:
        """The last lines that it printed."""
        if not self._output.closed:  # without moving the offset, which the process writes at
            self._printed = os.pread(self._output.fileno(), os.fstat(self._output.fileno()).st_size, 0)
        return "\n".join(self._printed.decode("utf-8", "replace").splitlines()[-_SAID:])

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def __enter__(self) -> LocalServer:
        self._output: Any = self._log.open("wb+") if self._log else tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            self._command,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
        )
        end = time.monotonic() + self._start
        while not self._ready():
            if self._process.poll() is not None or time.monotonic() > end:
                self.__exit__()
                raise AssertionError(f"logo serve did not start (code {self.exit_code}): {self.said}")
            time.sleep(0.05)
        return self

    def end(self) -> None:
        """Sends SIGTERM, once: a second one ends a server at once."""
        if not self._ending:
            self._process.terminate()
        self._ending = True

    def __exit__(self, *_: object) -> None:
        self.end()
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:  # shows as an exit code below 0
            self._process.kill()
        self.exit_code = self._process.wait()
        _ = self.said  # which can be asked for later, too
        self._output.close()

    def _ready(self) -> bool:
        found = SERVING.search(self.said)
        if found is None:
            return False
        self.url = found[1]
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with contextlib.suppress(OSError), direct.open(f"{self.url}/ready", timeout=30):  # also for a 503
            return True
        return False
