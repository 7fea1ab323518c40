"""Engines of vLLM in processes of their own, each of which does some steps and ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, TextIO

from vllm_server import ASSETS


class Engines:
    """Has `run_steps.py` fork a process for each engine, which need not import vLLM again."""

    def __init__(self) -> None:
        self._parent: tuple[subprocess.Popen[str], TextIO] | None = None
        self._environment: dict[str, str] = {}

    def run(
        self, folder: Path, flags: dict[str, Any], logo: dict[str, Any], *steps: dict[str, Any], **environment: str
    ) -> list[Any]:
        """What each step gave. `environment`: as `pretend` reads it, and variables of vLLM's."""
        if self._parent is None or environment != self._environment:
            self.close()
            self._parent, self._environment = _started(environment), environment
        parent, answers = self._parent
        job, result, said = (folder / name for name in ("job.json", "result.json", "said.txt"))
        flags = dict(flags)
        model = flags.pop("model", str(ASSETS / "model"))
        own = {"model": model, "flags": flags, "logo": {"pool": str(ASSETS / "adapters"), **logo}}
        job.write_text(json.dumps({**own, "steps": steps}))
        print(json.dumps([str(job), str(result), str(said)]), file=parent.stdin, flush=True)
        code = answers.readline().strip()
        assert code == "0", said.read_text()[-4000:] if code else "run_steps.py itself has ended"
        found: list[Any] = json.loads(result.read_text())
        return found

    def close(self) -> None:
        """Ends the process that forks."""
        if self._parent is not None:
            parent, answers = self._parent
            with answers, parent:  # which ends where its input does
                self._parent = None


def _started(environment: dict[str, str]) -> tuple[subprocess.Popen[str], TextIO]:
    """A process that forks, and its answers."""
    reading, writing = os.pipe()
    parent = subprocess.Popen(
        [sys.executable, str(Path(__file__).parent / "run_steps.py"), str(writing)],
        stdin=subprocess.PIPE,
        text=True,
        pass_fds=[writing],
        env={**os.environ, **environment},
    )
    os.close(writing)
    return parent, os.fdopen(reading)
