"""Replicas through Ray Serve: real Ray, and a small app in place of vLLM's, which says what pool it has."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from http_server import eventually
from logo import AdapterPool
from logo.cli.app import run
from logo.cluster.processes import Expected, Layout
from logo.cluster.replicas import LOAD, UNLOAD, ReplicaPlan, serve_replicas
from logo.demo import adapters_dir
from logo.errors import LoGoError, PoolError

PORT, FOLDER = 18730, "LOGO_TEST_FOLDER"


class State:
    """LoGo's part of the app; the adapter "here" can be added by a request only, as if other nodes lacked its files."""

    pool = SimpleNamespace(names=("start",))

    async def change(self, kind: str, name: str, folder: str | None) -> None:
        if name == "here" and kind == "add":
            raise LoGoError("no such folder")
        self.put(kind, name)

    def put(self, kind: str, name: str) -> None:
        names = self.pool.names
        if (name in names) == (kind == "add"):
            raise PoolError(f"{kind} {name}")
        left = tuple(one for one in names if one != name)
        self.pool = SimpleNamespace(names=left if kind == "remove" else (*left, name))


async def client_left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def small_app() -> Starlette:
    state = State()

    async def pool(request: Request) -> Response:
        return JSONResponse([os.getpid(), sorted(state.pool.names)])

    async def slow(request: Request) -> Response:
        folder = Path(os.environ[FOLDER])
        (folder / "begun").touch()
        while not (folder / "go").exists():
            await asyncio.sleep(0.05)
        return JSONResponse("done")

    async def change(request: Request) -> Response:
        name = (await request.json())["lora_name"]
        left = asyncio.create_task(client_left(request))  # as vLLM looks for it
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


def serve() -> None:
    expected = Expected.of(functools.partial(AdapterPool.open, adapters_dir()))
    plan = functools.partial(ReplicaPlan, small_app, {FOLDER: sys.argv[1]}, expected, 2)
    serve_replicas(Layout(2), plan, "127.0.0.1", PORT, functools.partial(print, flush=True))


def ask(path: str, name: str | None = None) -> tuple[int, Any]:
    data = None if name is None else json.dumps({"lora_name": name, "lora_path": "anywhere"}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{PORT}{path}", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def pools() -> dict[int, list[str]]:
    """Process -> adapters, of those that answer some requests."""
    return {process: names for _, (process, names) in (ask("/pool") for _ in range(30))}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen([sys.executable, __file__, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def wait_for(server: subprocess.Popen[str], line: str) -> None:
    assert server.stdout is not None
    said = []
    while not said or said[-1] != line:
        said.append(server.stdout.readline().strip())
        assert said[-1], said


@pytest.mark.slow
def test_a_change_reaches_every_replica_and_those_that_start_later(
    server: subprocess.Popen[str], tmp_path: Path
) -> None:
    both = "2 of 2 replicas take requests"
    wait_for(server, f"Serving on http://127.0.0.1:{PORT}")
    wait_for(server, both)
    processes = set(pools())
    assert len(processes) == 2
    assert ask(LOAD, "new") == (200, "done")
    assert ask(LOAD, "other") == (200, "done") and ask(UNLOAD, "other") == (200, "done")
    assert pools() == {process: ["new", "start"] for process in processes}  # none was started again
    assert ask(UNLOAD, "start") == (200, "done")
    assert [ask(LOAD, "new") for _ in range(4)] == [(400, "add new")] * 4  # as its app says

    os.kill(min(processes), signal.SIGKILL)
    wait_for(server, both)
    eventually(lambda: list(pools().values()) == [["new"]] * 2)

    status, said = ask(LOAD, "here")
    assert status == 500 and said["error"]["message"] == (
        "adapter 'here': changed here, but not in every replica: no such folder; unload it, or try again"
    )
    assert list(pools().values()) == [["here", "new"]]  # the other one does not answer with another pool
    assert ask(UNLOAD, "here") == (200, "done")
    wait_for(server, both)
    eventually(lambda: list(pools().values()) == [["new"]] * 2)

    answers: list[tuple[int, Any]] = []
    client = threading.Thread(target=lambda: answers.append(ask("/slow")))
    client.start()
    eventually((tmp_path / "begun").exists)
    server.send_signal(signal.SIGTERM)
    assert server.poll() is None  # it waits for what it has accepted
    (tmp_path / "go").touch()
    client.join()
    assert answers == [(200, "done")] and server.wait() == 0


def test_our_own_server_is_one_process(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", "--base-model", "demo", "--port", "0", "--replicas", "2"]) == 2
    assert "--replicas is only for --engine vllm" in " ".join(capsys.readouterr().err.split())


if __name__ == "__main__":
    serve()
