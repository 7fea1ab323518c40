"""Helpers for tests of several replicas: a client's view of them, and their processes."""

from __future__ import annotations

import contextlib
import json
import threading
import time
import urllib.error
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

from local_server import LocalServer
from serving import Served
from tolerances import PATIENCE


@dataclass(frozen=True)
class Cluster(Served):
    """A server with replicas.

    Attributes:
        client: OpenAI's, for as long as the server is there.
        process: of the command.
        pool, changes: folders: of the pool, and from which adapters may be added.
        model: the base model's.
    """

    client: Any = None
    process: LocalServer | None = None
    pool: Path = Path()
    changes: Path = Path()
    model: Path = Path()

    def health(self) -> tuple[str, str]:
        """Who answered, and its pool's digest."""
        with self.open("/health") as answer:
            assert answer.status == 200
            return answer.headers["X-LoGo-Replica"], answer.headers["X-LoGo-Pool"]

    def names(self) -> set[str]:
        """The replicas that take part in `/metrics`."""
        text = self.text("/metrics")
        return {line.partition('replica="')[2].partition('"')[0] for line in text.splitlines() if "_blocks{" in line}

    def answered(self) -> set[str]:
        """Replicas that are given requests now."""
        return {self.health()[0] for _ in range(20)}

    def change(self, verb: str, **body: Any) -> None:
        with self.open(f"/v1/{verb}_lora_adapter", body) as answer:
            answer.read()

    def pids(self, title: str = "ServeReplica:logo") -> list[int]:
        """Of the replicas' processes, or of others of the command's that have something in their title."""
        assert self.process is not None
        return [pid for pid, found in processes() if title in found and descends(pid, self.process.pid)]

    @contextlib.contextmanager
    def clients(self, model: str, count: int, prompt: str) -> Iterator[list[Asked]]:
        """Clients that ask for a model all the time, until the block ends, and what they have seen."""
        seen: list[Asked] = []
        failed: list[openai.APIError] = []
        stop = threading.Event()

        def client() -> None:
            while not stop.is_set():
                asked = time.monotonic()
                try:
                    self.client.completions.create(model=model, prompt=prompt, max_tokens=2, temperature=0)
                    knows = True
                except openai.NotFoundError:
                    knows = False
                except openai.APIError as error:
                    failed.append(error)
                    return
                seen.append(Asked(asked, time.monotonic(), knows))

        running = [threading.Thread(target=client) for _ in range(count)]
        for one in running:
            one.start()
        try:
            yield seen
        finally:
            stop.set()
            for one in running:
                one.join(PATIENCE)
        assert not failed


def processes() -> Iterator[tuple[int, str]]:
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdigit():
                yield int(folder.name), (folder / "cmdline").read_bytes().decode(errors="replace")


def descends(pid: int, ancestor: int) -> bool:
    while pid > 1:
        if pid == ancestor:
            return True
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return False
    return False


def until(check: Callable[[], object], every: float = 0.5) -> None:
    end = time.monotonic() + PATIENCE
    while not check():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(every)


def refused(ask: Callable[[], object]) -> tuple[int, dict[str, Any]]:
    with pytest.raises(urllib.error.HTTPError) as caught:
        ask()
    with caught.value as answer:
        return answer.code, json.loads(answer.read())["error"]


def asking(url: str, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=PATIENCE)


@dataclass(frozen=True)
class Asked:
    """One request for a model.

    Attributes:
        since, until: when it was sent, and when it was answered.
        knows: there is such a model.
    """

    since: float
    until: float
    knows: bool


def check_one_pool(seen: list[Asked], added: float, removing: float, removed: float) -> None:
    """Nobody who has seen a new pool sees the one before it.

    Args:
        added: when the model's adapter had been added; `removing`: when it began to be removed; `removed`: it was.
    """
    first = min(one.until for one in seen if one.knows)
    assert any(not one.knows for one in seen if one.until < added)
    assert all(one.knows for one in seen if one.since > min(first, added) and one.until < removing)
    lacking = min(one.until for one in seen if not one.knows and one.until > removing)
    assert not any(one.knows for one in seen if one.since > min(lacking, removed))
