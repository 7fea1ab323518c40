"""`logo serve` for tests: the real command as a process, asked with the standard library."""

from __future__ import annotations

import contextlib
import json
import shutil
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from local_server import LocalServer
from logo.demo import model_dir
from tolerances import PATIENCE


@dataclass(frozen=True)
class Served:
    """A server that takes requests."""

    url: str
    key: str = ""

    def get(self, path: str) -> Any:
        """The JSON at a path."""
        return json.loads(self.text(path))

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The JSON that a body is answered with."""
        return json.loads(self.text(path, body))

    def text(self, path: str, body: dict[str, Any] | None = None) -> str:
        """What is answered, as text."""
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {self.key}"} if self.key else {})}
        data = None if body is None else json.dumps(body).encode()
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(urllib.request.Request(self.url + path, data, headers), timeout=PATIENCE) as answer:
            return str(answer.read(), "utf-8")


@contextlib.contextmanager
def served(*options: str, key: str = "") -> Iterator[Served]:
    """A server with these options of `logo serve`, until the block ends."""
    with LocalServer(options, {"LOGO_API_KEY": key} if key else {}) as server:
        yield Served(server.url, key)


def endless(folder: Path) -> Path:
    """The demo's base model without an end-of-sequence token: its answers are always as long as they may be."""
    shutil.copytree(model_dir(), folder)
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((folder / name).read_text("utf-8"))
        del settings["eos_token_id"]
        (folder / name).write_text(json.dumps(settings), "utf-8")
    return folder
