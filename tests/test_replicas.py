"""Replicas through Ray Serve, with a Ray that only pretends: when the command ends, what a replica opens and refuses,
and how many processes there is room for."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Iterator
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from logo import AdapterPool
from logo.backends import replicas
from logo.backends.cluster import Layout, ProcessResources, process_resources
from logo.backends.replicas import APPLICATION, Fixed, Plan, Replica, serve_replicas
from logo.cli.run import run
from logo.demo import adapters_dir
from logo.errors import LoGoError


class Serving(ModuleType):
    """Ray Serve with one application, which is there for `lasts` looks after it was deleted."""

    lasts = 3

    def __init__(self, calls: list[str]) -> None:
        super().__init__("ray.serve")
        self.calls, self.running, self.deleted = calls, 0, False
        self.applications: dict[str, Any] = {}
        self.schema = SimpleNamespace(LoggingConfig=lambda **options: None)
        self.RunTarget = lambda *parts: None
        self.start = lambda **options: None
        self.looked: list[int] = []  # signals that come at the next looks

    def run_many(self, targets: Any, **options: Any) -> None:
        self.running = 1
        self.applications[APPLICATION] = SimpleNamespace(message="", status="RUNNING")

    def status(self) -> Any:
        if self.deleted:
            self.calls.append("look")
            self.lasts -= 1
        if self.lasts < 0:
            self.applications.pop(APPLICATION, None)
        for one in self.applications.values():
            one.deployments = {"LoGo": SimpleNamespace(replica_states={"RUNNING": self.running}, message="")}
        if self.applications and self.looked and (number := self.looked.pop(0)):
            signal.raise_signal(number)
        return SimpleNamespace(applications=self.applications, proxies={})

    def delete(self, name: str, _blocking: bool = True) -> None:
        if _blocking:
            raise TimeoutError("not deleted after 60s")
        self.deleted = True
        self.calls.append("delete")


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serving]:
    calls: list[str] = []
    ray: Any = ModuleType("ray")
    ray.serve = made = Serving(calls)
    ray.shutdown = lambda: calls.append("shutdown")
    for name, module in {"ray": ray, "ray.serve": made, "ray.serve.schema": made.schema}.items():
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("connect", "application"):
        monkeypatch.setattr(replicas, name, lambda *parts: None)
    monkeypatch.setattr(replicas, "imported", lambda: ray)
    monkeypatch.setattr(replicas, "process_resources", lambda *parts: ProcessResources(1, 1, 1, 0.0))
    monkeypatch.setattr(replicas, "_LOOK", 0.01)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield made
    for number, handler in before.items():
        signal.signal(number, handler)


def served() -> None:
    plan: Any = None
    serve_replicas(plan, Layout(1), None, ("h", 1), lambda url: None, lambda said: None)


def test_the_command_waits_until_what_was_accepted_has_ended(serving: Serving) -> None:
    serving.looked = [signal.SIGTERM]
    served()
    # As long as the replicas may take, not as long as Ray waits by itself.
    assert serving.calls == ["delete", *["look"] * 4, "shutdown"]


def test_ray_ends_though_replicas_do_not(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "_DRAIN", 0.05)
    serving.looked, serving.lasts = [signal.SIGINT], 10**6
    with pytest.raises(KeyboardInterrupt):
        served()
    assert serving.calls[-1] == "shutdown"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_does_not_wait(serving: Serving, number: signal.Signals) -> None:
    serving.looked, serving.lasts = [signal.SIGINT, number], 10**6
    with pytest.raises(SystemExit) as caught:
        served()
    assert caught.value.code == 128 + number
    assert serving.calls == ["delete", "look", "shutdown"]


# -- a replica --------------------------------------------------------------------------------------------------------


def test_a_replica_that_finds_another_pool_does_not_start() -> None:
    launch: Any = None
    found = partial(AdapterPool.open, adapters_dir())
    other = AdapterPool(adapter for adapter in found() if adapter.name != "french")
    with pytest.raises(LoGoError, match="finds other adapters or example prompts"):
        asyncio.run(Replica.__init__(Replica.__new__(Replica), Plan(launch, {}, found, replicas.digest(other), 1)))


def test_what_concerns_one_replica_alone_is_refused() -> None:
    async def there(request: Request) -> Response:
        return PlainTextResponse("there")

    paths = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/metrics", "/v1/models")
    app = Starlette(routes=[Route(path, there, methods=["GET", "POST"]) for path in paths])

    async def use() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(Fixed(app)), base_url="http://test") as client:
            return [await client.post(path, json={"lora_name": "french"}) for path in (*paths, "/ready")]

    answers = asyncio.run(use())
    assert [answer.status_code for answer in answers] == [409, 409, 404, 200, 200]
    for answer in answers[:2]:
        assert answer.json()["error"]["message"] == (
            "the pool of a server with replicas is the one that it was started with; change its adapters and restart it"
        )


def test_our_own_server_is_one_process(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", "--base-model", "demo", "--port", "0", "--replicas", "2"]) == 2
    assert "several replicas are only for --engine vllm" in " ".join(capsys.readouterr().err.split())


# -- their number -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gpus", "count"), [(0.1, 10), (0.2, 5), (0.3, 3), (0.5, 2), (1.0, 1), (1 / 3, 3), (1 / 7, 7)])
@pytest.mark.parametrize("address", ["local", "auto"])
def test_processes_that_share_a_gpu_fill_it(gpus: float, count: int, address: str) -> None:
    node = {"Alive": True, "Resources": {"GPU": 1.0, "CPU": 64.0}}
    ray: Any = SimpleNamespace(nodes=lambda: [node])
    found = process_resources(ray, Layout(address=address, gpus=gpus, cpus=1))
    assert (found.count, found.room) == (count, count)
