"""A server whose HTTP is answered by two processes: `vllm serve --api-server-count 2`."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from vllm_server import ASSETS, KEY, Server, environment, free_port, serve_command, started

from logo import LoGo

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    port, log = free_port(), tmp_path_factory.mktemp("server") / "log"
    asked = serve_command(
        *("--api-server-count", "2", "--port", str(port), "--host", "127.0.0.1", "--api-key", KEY),
        *("--max-loras", "18", "--max-lora-rank", "8", "--max-model-len", "256"),
        *("--middleware", "logo.backends.vllm.Router"),
    )
    cache = tmp_path_factory.mktemp("cache")  # so that one of them has to calibrate, while the other one waits
    env = environment(k=4, adapter_changes=True, cache=str(cache))
    with started(asked, port, env, log) as running:
        yield running


@pytest.fixture(scope="module")
def rows() -> list[str]:
    files = sorted((ASSETS / "heldout").glob("*.jsonl"))
    return [json.loads(line)["context"] for file in files for line in file.read_text().splitlines()[:2]]


class Door:
    """A connection to one of the processes.

    Attributes:
        process: which.
    """

    def __init__(self, server: Server) -> None:
        self._connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=300)
        self._connection.connect()
        own, waited = self._connection.sock.getsockname(), time.monotonic()
        self.process: int | None = None
        while self.process is None:  # until it is accepted
            assert time.monotonic() - waited < 60
            for child in psutil.Process(server.process.pid).children(recursive=True):
                if any(one.raddr == own for one in child.net_connections("tcp")):
                    self.process = child.pid

    def ask(self, path: str, body: Any = None) -> tuple[int, str]:
        """Status and text of an answer."""
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
        data = None if body is None else json.dumps(body)
        self._connection.request("GET" if body is None else "POST", path, data, headers)
        answer = self._connection.getresponse()
        return answer.status, answer.read().decode()

    def completion(self, model: str, prompt: str) -> Any:
        """The text of an answer; its status where it is an error."""
        body = {"model": model, "prompt": prompt, "max_tokens": 8, "temperature": 0}
        status, said = self.ask("/v1/completions", body)
        return json.loads(said)["choices"][0]["text"].rstrip() if status == 200 else status

    def change(self, what: str, **body: Any) -> tuple[int, str]:
        return self.ask(f"/v1/{what}_lora_adapter", body)

    def close(self) -> None:
        self._connection.close()


@contextmanager
def both(server: Server) -> Iterator[list[Door]]:
    """A door of each process."""
    with ExitStack() as stack:
        found: dict[int | None, Door] = {}
        for _ in range(50):  # vLLM accepts where the fewest connections are open
            door = Door(server)
            stack.callback(door.close)
            found.setdefault(door.process, door)
            if len(found) == 2:
                break
        assert len(found) == 2
        yield [found[process] for process in sorted(found, key=str)]


def answers(server: Server, model: str, prompts: list[str]) -> list[list[Any]]:
    """What each process answers to these prompts, both at the same time."""
    with both(server) as doors, ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda door: [door.completion(model, prompt) for prompt in prompts], doors))


def weaker(folder: Path, task: str, scale: float) -> str:
    """An adapter of the demo with another scale: contents that its pool does not have."""
    shutil.copytree(ASSETS / "adapters" / task, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": scale * config["lora_alpha"]}))
    return str(folder)


def test_both_processes_answer_as_the_library(server: Server, logo: LoGo, rows: list[str]) -> None:
    expected = logo.generate(rows, k=4, max_new_tokens=8)
    assert answers(server, "logo", rows) == [[one.text.rstrip() for one in expected]] * 2
    names = [name for one in expected for name in one.selection.adapters]
    text = urllib.request.urlopen(f"{server.url}/metrics").read().decode()
    assert re.findall(r"^logo:probe_seconds_count (\S+)", text, re.M) == [str(2.0 * len(rows))]
    with both(server) as doors:
        for door in doors:  # each knows what the other has counted
            cards = json.loads(door.ask("/v1/logo/adapters")[1])
            assert {card["id"]: card["selected"] for card in cards["data"]} == {
                name: 2 * names.count(name) for name in logo.names
            }


def test_a_change_through_one_process_is_true_of_both(
    server: Server, logo: LoGo, rows: list[str], tmp_path: Path
) -> None:
    tasks, prompts = ("antonym", "capital"), rows[:4]
    folders = {task: weaker(tmp_path / task, task, 0.9) for task in tasks}
    expected = {
        task: [one.text.rstrip() for one in logo.generate(prompts, adapters={task: 0.9}, max_new_tokens=8)]
        for task in tasks
    }
    assert expected["antonym"] != expected["capital"]
    assert answers(server, "new", prompts) == [[404] * 4] * 2
    for turn in range(4):  # each time an adapter leaves a slot that a later one needs
        for task in tasks:
            with both(server) as doors:
                status, said = doors[turn % 2].change(
                    "load", lora_name="new", lora_path=folders[task], load_inplace=task == "capital"
                )
            assert status == 200, said
            assert answers(server, "new", prompts) == [expected[task]] * 2, (turn, task)
        with both(server) as doors:
            assert doors[turn // 2].change("unload", lora_name="new")[0] == 200
        assert answers(server, "new", prompts) == [[404] * 4] * 2
    plain = [one.text.rstrip() for one in logo.generate(prompts, k=4, max_new_tokens=8)]
    assert answers(server, "logo", prompts) == [plain] * 2


def test_changes_through_both_at_once_are_made_one_after_the_other(
    server: Server, logo: LoGo, rows: list[str], tmp_path: Path
) -> None:
    folders = {f"new{i}": weaker(tmp_path / task, task, 0.8) for i, task in enumerate(("antonym", "capital"))}

    def load(door: Door, name: str) -> tuple[int, str]:
        return door.change("load", lora_name=name, lora_path=folders[name])

    with both(server) as doors, ThreadPoolExecutor(2) as pool:
        assert {status for status, _ in pool.map(load, doors, folders)} == {200}
        for name in folders:
            assert 404 not in [door.completion(name, rows[0]) for door in doors]
        names = reversed(folders)  # each takes away what the other has brought
        assert {status for status, _ in pool.map(lambda d, n: d.change("unload", lora_name=n), doors, names)} == {200}
        for door in doors:
            cards = json.loads(door.ask("/v1/logo/adapters")[1])
            assert [card["id"] for card in cards["data"]] == list(logo.names)
