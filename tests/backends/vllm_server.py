"""vLLM's own server for tests: the command that starts it, and asking it with the standard library."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ASSETS = Path(__file__).parent.parent.parent / "src" / "logo" / "demo" / "assets"
KEY = "a-key-of-ours"
# A server needs some 30 s on two idle cores.
START = 300.0


@dataclass(frozen=True)
class Server:
    """A running vLLM.

    Attributes:
        url: where it listens.
        process: of the API server.
        log: what it has said so far.
    """

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def ask(self, path: str, body: Any = None, key: str | None = KEY) -> tuple[int, Any]:
        """Status and JSON of an answer, or its text if it is something else."""
        headers = {"Content-Type": "application/json"} | ({} if key is None else {"Authorization": f"Bearer {key}"})
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}{path}", data, headers)
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                said = answer.read().decode()
                return answer.status, json.loads(said) if said[:1] in ("{", "[") else said
        except urllib.error.HTTPError as error:
            text = error.read()
            return error.code, json.loads(text) if text else None


def command(*flags: str, model: Path = ASSETS / "model") -> list[str]:
    """The API server of vLLM's wheel for CPUs, which has no `vllm` command, with forks for its processes."""
    usual = ["--served-model-name", "base", "--enable-lora", "--dtype", "float32", "--enforce-eager"]
    usual += ["--worker-extension-cls", "logo.vllm.worker.Extension"]
    return [sys.executable, str(Path(__file__).parent / "pretend.py"), "--model", str(model), *usual, *flags]


def environment(pool: Path | None = ASSETS / "adapters", **options: Any) -> dict[str, str]:
    """Of a server; `options` are LoGo's."""
    own = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    own["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # a server's worker is in its engine's process, which starts sooner
    if pool is not None:
        own |= {"LOGO_POOL": str(pool), "VLLM_PLUGINS": "logo"}
    return own | ({"LOGO_OPTIONS": json.dumps(options)} if options else {})


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def started(asked: list[str], port: int, env: dict[str, str], log: Path) -> Iterator[Server]:
    """A server that answers, until the block ends.

    Args:
        asked: what starts it.
        port: where it will listen.
    """
    with log.open("wb") as out:
        process = subprocess.Popen(asked, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        server, waited = Server(f"http://127.0.0.1:{port}", process, log), time.monotonic()
        while not _answers(server):
            if process.poll() is not None or time.monotonic() - waited > START:
                raise RuntimeError(f"vLLM did not start ({process.poll()}):\n{log.read_text()[-4000:]}")
            time.sleep(0.5)
        yield server
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def _answers(server: Server) -> bool:
    try:
        urllib.request.urlopen(f"{server.url}/health", timeout=5).close()
    except OSError:
        return False
    return True
