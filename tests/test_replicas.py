"""Replicas through Ray Serve: real Ray, and a small app in place of vLLM's, which says what pool it has."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from http_server import eventually
from logo.cluster.processes import Expected, Layout
from logo.cluster.replicas import LOAD, UNLOAD, ReplicaPlan, serve_replicas
from logo.errors import LoGoError, PoolError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed"),
]

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
        if (name in names) == (kind == "add") or (kind == "remove" and len(names) == 1):
            raise PoolError(f"{kind} {name}")
        left = tuple(one for one in names if one != name)
        self.pool = SimpleNamespace(names=left if kind == "remove" else (*left, name))


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


def serve() -> None:
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # actors do not find this file by its name
    pool: Any = SimpleNamespace(digest="of the tests")  # so that replicas need not import PyTorch
    plan = functools.partial(ReplicaPlan, small_app, {FOLDER: sys.argv[1]}, Expected.of(lambda: pool), 2)
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


def wait_for(server: subprocess.Popen[str], line: str) -> None:
    assert server.stdout is not None
    said = []
    while not said or said[-1] != line:
        said.append(server.stdout.readline().strip())
        assert said[-1], said


def test_a_change_reaches_all_replicas_and_those_that_start_later(tmp_path: Path) -> None:
    command, both = [sys.executable, __file__, str(tmp_path)], "2 of 2 replicas take requests"
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server, contextlib.ExitStack() as end:
        end.callback(server.kill)
        wait_for(server, f"Serving on http://127.0.0.1:{PORT}")
        wait_for(server, both)
        processes = set(pools())
        assert len(processes) == 2
        # In this order, so that one that starts later must not remove "start" before it has added "new".
        assert ask(LOAD, "other") == (200, "done") and ask(UNLOAD, "start") == (200, "done")
        assert ask(LOAD, "new") == (200, "done")
        assert pools() == {process: ["new", "other"] for process in processes}  # none was started again
        assert ask(UNLOAD, "other") == (200, "done")
        assert [ask(LOAD, "new") for _ in range(4)] == [(400, "add new")] * 4  # as its app says

        status, said = ask(LOAD, "here")
        assert status == 500 and said["error"]["message"] == (
            "adapter 'here': changed here, but not in every replica: no such folder; unload it, or try again"
        )
        assert list(pools().values()) == [["here", "new"]]  # the other one does not answer with another pool
        assert ask(UNLOAD, "here") == (200, "done")
        wait_for(server, both)
        eventually(lambda: list(pools().values()) == [["new"]] * 2)
        assert set(pools()) - processes  # one that differed was replaced; `backends/test_replicas_vllm.py` kills one

        answers: list[tuple[int, Any]] = []
        client = threading.Thread(target=lambda: answers.append(ask("/slow")))
        client.start()
        eventually((tmp_path / "begun").exists)
        server.send_signal(signal.SIGTERM)
        assert server.poll() is None  # it waits for what it has accepted
        (tmp_path / "go").touch()
        client.join()
        assert answers == [(200, "done")] and server.wait() == 0


if __name__ == "__main__":
    serve()
