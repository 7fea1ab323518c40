"""Replicas through Ray Serve: real Ray, and a small app in place of vLLM's, which says what pool it has."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from http_server import eventually, raw
from logo.api.guards import GuardSettings
from logo.cluster.processes import Expected, Layout
from logo.cluster.replicas import LOAD, UNLOAD, ReplicaPlan, serve_replicas
from logo.errors import LoGoError, PoolError
from tolerances import PATIENCE

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed"),
]

FOLDER = "LOGO_TEST_FOLDER"
KEY = "a-key-of-ours"
OF_KEY = {"Authorization": f"Bearer {KEY}"}


class State:
    """LoGo's part of the app; the adapter "here" can be added by a request only, as if other nodes lacked its files,
    and "moved" until there is a file of that name, as if its folder were gone then."""

    pool = SimpleNamespace(names=("start",))

    async def change(self, kind: str, name: str, folder: str | None) -> None:
        has_moved = name == "moved" and (Path(os.environ[FOLDER]) / "moved").exists()
        if (name == "here" or has_moved) and kind == "add":
            raise LoGoError("no such folder")
        self.put(kind, name)

    def put(self, kind: str, name: str) -> None:
        names = self.pool.names
        if (name in names) == (kind == "add") or (kind == "remove" and len(names) == 1):
            raise PoolError(f"{kind} {name}")
        left = tuple(own for own in names if own != name)
        self.pool = SimpleNamespace(names=left if kind == "remove" else (*left, name))


async def until(file: Path, exists: bool) -> None:
    while file.exists() != exists:
        await asyncio.sleep(0.05)


async def small_app() -> Starlette:
    folder = Path(os.environ[FOLDER])
    await until(folder / "closed", exists=False)
    state = State()

    async def pool(request: Request) -> Response:
        return JSONResponse([os.getpid(), sorted(state.pool.names)])

    async def slow(request: Request) -> Response:
        (folder / f"begun-{os.getpid()}-{request.query_params['number']}").touch()
        await until(folder / "go", exists=True)
        return JSONResponse(os.getpid())

    async def change(request: Request) -> Response:
        name = (await request.json())["lora_name"]
        left = asyncio.create_task(request.receive())  # whether the client has left, as vLLM looks for it
        await asyncio.sleep(0)
        try:
            state.put("add" if request.url.path == LOAD else "remove", name)
        except PoolError as error:
            return JSONResponse(str(error), 400)
        finally:
            left.cancel()
        return JSONResponse("done")

    changes = [Route(path, change, methods=["POST"]) for path in (LOAD, UNLOAD)]
    app = Starlette(routes=[Route("/pool", pool), Route("/slow", slow), *changes])
    app.state.logo, app.state.engine_client = state, SimpleNamespace(errored=False)
    return app


def serve(folder: str, port: str, replicas: str) -> None:
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # actors do not find this file by its name
    pool: Any = SimpleNamespace(digest="of the tests")  # so that replicas need not import PyTorch
    expected = Expected.of(lambda: pool)
    guards = GuardSettings(api_keys=(KEY,))
    layout = Layout(int(replicas))
    plan = functools.partial(ReplicaPlan, small_app, {FOLDER: folder}, expected, guards, layout.count)
    serve_replicas(layout, plan, "127.0.0.1", int(port), functools.partial(print, flush=True))


@dataclass(frozen=True)
class Server:
    """A server of replicas, as a process."""

    process: subprocess.Popen[str]
    port: int
    folder: Path

    def ask(self, path: str, name: str | None = None) -> tuple[int, Any]:
        """Status and answer: of a GET, or of a request about an adapter."""
        data = None if name is None else json.dumps({"lora_name": name, "lora_path": "anywhere"}).encode()
        url = f"http://127.0.0.1:{self.port}{path}"
        request = urllib.request.Request(url, data, {"Content-Type": "application/json", **OF_KEY})
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                status, text = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read()
        with contextlib.suppress(ValueError):
            return status, json.loads(text)
        return status, text.decode()

    def pools(self) -> dict[int, list[str]]:
        """Process -> adapters, of those that answer some requests."""
        return {process: names for _, (process, names) in (self.ask("/pool") for _ in range(30))}

    def hold_slow_answers(self) -> None:
        """Requests of `/slow` are not answered from now on, until there is a file "go"."""
        for file in (self.folder / "go", *self.folder.glob("begun-*")):
            file.unlink(missing_ok=True)

    def wait_for_slow_answers(self, count: int) -> list[int]:
        """Waits until so many requests of `/slow` have come, and returns the process that has each."""
        eventually(lambda: len(list(self.folder.glob("begun-*"))) == count)
        return [int(file.name.split("-")[1]) for file in self.folder.glob("begun-*")]

    def wait_for(self, beginning: str) -> None:
        """Waits until it says a line that begins so."""
        assert self.process.stdout is not None
        lines = [""]
        while not lines[-1].startswith(beginning):
            lines.append(self.process.stdout.readline().strip())
            assert lines[-1], lines


@contextlib.contextmanager
def running(folder: Path, replicas: int) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, __file__, str(folder), str(port), str(replicas)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            server = Server(process, port, folder)
            server.wait_for(f"Serving on http://127.0.0.1:{port}")
            server.wait_for(f"replicas ready: {replicas} of {replicas}")
            yield server
        finally:
            process.kill()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of two replicas, whose pools are as at the start; it is ended by SIGTERM, as operators do."""
    with running(tmp_path_factory.mktemp("two"), 2) as server:
        yield server
        with ThreadPoolExecutor(1) as client:
            server.hold_slow_answers()
            answer = client.submit(server.ask, "/slow?number=0")
            server.wait_for_slow_answers(1)
            server.process.send_signal(signal.SIGTERM)
            assert server.process.poll() is None  # it waits for what it has accepted
            (server.folder / "go").touch()
            assert answer.result()[0] == 200 and server.process.wait() == 0


def test_a_change_reaches_all_replicas_and_those_that_start_later(two: Server) -> None:
    processes = set(two.pools())
    assert len(processes) == 2
    # In this order, so that one that starts later must not remove "start" before it has added "new".
    assert two.ask(LOAD, "other") == (200, "done") and two.ask(UNLOAD, "start") == (200, "done")
    assert two.ask(LOAD, "new") == (200, "done")
    assert two.pools() == {process: ["new", "other"] for process in processes}  # none was started again
    assert two.ask(UNLOAD, "other") == (200, "done")
    assert [two.ask(LOAD, "new") for _ in range(4)] == [(400, "add new")] * 4  # as its app says

    status, answer = two.ask(LOAD, "here")
    assert status == 500 and answer["error"]["message"] == (
        "adapter 'here': changed here, but not in every replica: no such folder; unload it, or try again"
    )
    assert list(two.pools().values()) == [["here", "new"]]  # the other one does not answer with another pool
    assert two.ask(UNLOAD, "here") == (200, "done")
    two.wait_for("replicas ready: 2 of 2")
    eventually(lambda: list(two.pools().values()) == [["new"]] * 2)
    assert set(two.pools()) - processes  # one that differed was replaced

    assert two.ask(LOAD, "start") == (200, "done") and two.ask(UNLOAD, "new") == (200, "done")


def test_where_a_replica_is_killed_under_load_only_its_own_answers_are_lost(two: Server) -> None:
    """Requests that come while it is gone are answered by the other one, and the next one joins it."""
    pools = two.pools()
    two.hold_slow_answers()
    with ThreadPoolExecutor(8) as clients:
        answers = [clients.submit(two.ask, f"/slow?number={number}") for number in range(8)]
        begun = Counter(two.wait_for_slow_answers(8))
        assert set(begun) == set(pools)  # both have some
        killed, other = begun
        os.kill(killed, signal.SIGKILL)
        assert [two.ask("/pool") for _ in range(30)] == [(200, [other, pools[other]])] * 30
        (two.folder / "go").touch()
        statuses = [answer.result() for answer in answers]
    assert [answer for answer in statuses if answer[0] == 200] == [(200, other)] * begun[other]
    two.wait_for("replicas ready: 2 of 2")
    eventually(lambda: list(two.pools().values()) == [pools[other]] * 2)
    assert killed not in two.pools()


def test_changes_are_admitted_by_their_headers(two: Server) -> None:
    """Who may change the pool is decided before the body of a request is there."""
    head = f"POST {LOAD} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Type: application/json\r\n"
    url = f"http://127.0.0.1:{two.port}"
    stranger = raw(url, f"{head}Content-Length: 400000000\r\n\r\n{{".encode())
    assert stranger.startswith(b"HTTP/1.1 401 ")
    own = f"{head}Authorization: Bearer {KEY}\r\nContent-Length: 400000000\r\n\r\n{{"
    assert raw(url, own.encode()).startswith(b"HTTP/1.1 413 ")


def test_replicas_come_back_without_an_adapter_whose_folder_is_gone(two: Server) -> None:
    assert two.ask(LOAD, "kept") == (200, "done") and two.ask(LOAD, "moved") == (200, "done")
    pools = two.pools()
    assert list(pools.values()) == [["kept", "moved", "start"]] * 2 and two.ask("/health")[0] == 200
    (two.folder / "moved").touch()
    (two.folder / "closed").touch()
    for process in pools:
        os.kill(process, signal.SIGKILL)
    eventually(lambda: two.ask("/health") == (503, "no replica takes requests"))
    (two.folder / "closed").unlink()
    two.wait_for("adapter 'moved': its change was withdrawn")
    eventually(lambda: list(two.pools().values()) == [["kept", "start"]] * 2)
    assert two.ask("/health")[0] == 200
    (two.folder / "moved").unlink()
    assert two.ask(UNLOAD, "kept") == (200, "done")


if __name__ == "__main__":
    serve(*sys.argv[1:])
