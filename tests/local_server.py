"""`logo serve` as a process: starts it on a free port, waits for it, ends it with SIGTERM."""

from __future__ import annotations

import collections
import contextlib
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

from logo.errors import LoGoError

SERVING = re.compile(r"Serving on (http://[^\s\"]+)")

LOGO = (sys.executable, "-c", "from logo.cli import main; main()")
_SAID = 40  # number of its last printed lines that are kept


class LocalServer:
    """A server for the duration of a `with` block.

        with LocalServer(["--base-model", "demo"]) as server:
            ...  # server.url takes requests
        server.exit_code  # 0 after a clean end

    Args:
        options: options of `logo serve`, without `--port`.
        environment: additional environment variables (a key belongs here, not on the command line).
        start, stop: seconds that starting and ending may take.
        log: a file for its output, complete after the block.
        program: the words that start `logo`.

    Raises:
        LoGoError: it ended, or took too long, before it was ready; with the last line that it printed.
    """

    def __init__(
        self,
        options: Sequence[str],
        environment: Mapping[str, str] | None = None,
        *,
        start: float = 900.0,
        stop: float = 300.0,
        log: Path | None = None,
        program: Sequence[str] = LOGO,
    ) -> None:
        self.url = ""
        self.exit_code: int | None = None
        self._command = [*program, "serve", "--port", "0", *options]
        self._environment = {**os.environ, **(environment or {})}
        self._start = start
        self._stop = stop
        self._log = log
        self._said: collections.deque[str] = collections.deque(maxlen=_SAID)

    @property
    def said(self) -> str:
        """The last lines that it printed."""
        return "\n".join(self._said)

    @property
    def gone(self) -> bool:
        """Whether it has ended by itself."""
        return self._process.poll() is not None

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def __enter__(self) -> LocalServer:
        self._process = subprocess.Popen(
            self._command,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        assert self._process.stdout is not None
        urls: queue.Queue[str | None] = queue.Queue()
        # Read to the end, so that a full pipe never stops the server.
        self._reader = threading.Thread(target=self._read, args=(self._process.stdout, urls), daemon=True)
        self._reader.start()
        end = time.monotonic() + self._start
        try:
            self.url = self._wait_for_url(urls, end)
            self._wait_until_ready(end)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _read(self, lines: IO[str], urls: queue.Queue[str | None]) -> None:
        with contextlib.nullcontext() if self._log is None else self._log.open("w", encoding="utf-8") as log:
            for line in lines:
                self._said.append(line.rstrip())
                if log is not None:
                    log.write(line)
                found = SERVING.search(line)
                if found:
                    urls.put(found[1])
        urls.put(None)

    def _wait_for_url(self, urls: queue.Queue[str | None], end: float) -> str:
        try:
            url = urls.get(timeout=max(0.0, end - time.monotonic()))
        except queue.Empty:
            raise self._not_ready("said no address") from None
        if url is None:
            raise self._not_ready(f"ended with code {self._process.wait()}")
        return url

    def _wait_until_ready(self, end: float) -> None:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        while time.monotonic() < end:
            if self._process.poll() is not None:
                raise self._not_ready(f"ended with code {self._process.returncode}")
            with contextlib.suppress(OSError), direct.open(f"{self.url}/ready", timeout=30):  # also for a 503
                return
            time.sleep(0.05)
        raise self._not_ready("was not ready")

    def _not_ready(self, what: str) -> LoGoError:
        last = next((line for line in reversed(self._said) if line.strip()), "nothing")
        return LoGoError(f"logo serve {what} (waited up to {self._start:g} s); its last output: {last}")

    def _end(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(self._stop)
        except subprocess.TimeoutExpired:  # shows as an exit code below 0
            self._process.kill()
        except BaseException:
            self._process.kill()
            raise
        finally:
            self.exit_code = self._process.wait()
            self._reader.join(10)
            if self._process.stdout is not None:
                self._process.stdout.close()
