"""What the driver and a replica's link do with Ray, with a Ray that only pretends."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from logo.backends.cluster import Layout, ProcessResources
from logo.serving import driver
from logo.serving.driver import serve_replicas
from logo.serving.membership import Lost
from logo.serving.pool import Change
from logo.serving.replicas import APPLICATION, ActorLink, Scale
from tolerances import PATIENCE


class RayError(Exception):
    """As in Ray."""


class RayActorError(RayError):
    """As in Ray."""


class RayTaskError(RayError):
    """As in Ray."""


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Modules that the code under test imports."""
    exceptions = SimpleNamespace(RayError=RayError, RayActorError=RayActorError, RayTaskError=RayTaskError)
    made: Any = ModuleType("ray")
    made.exceptions, made.serve = exceptions, ModuleType("ray.serve")
    for name, module in {"ray": made, "ray.serve": made.serve, "ray.exceptions": exceptions}.items():
        monkeypatch.setitem(sys.modules, name, module)
    return made


@pytest.mark.parametrize("error", [RayTaskError("KeyError"), RayActorError("ended"), ValueError("there is none")])
def test_a_coordinator_that_fails_is_one_that_does_not_answer(ray: Any, error: Exception) -> None:
    async def fails(change: Change) -> None:
        raise error

    ray.serve.get_deployment_actor = lambda name: SimpleNamespace(change=SimpleNamespace(remote=fails))
    with pytest.raises(Lost, match="the replicas' coordinator"):
        asyncio.run(asyncio.wait_for(ActorLink("x").change(Change("a")), PATIENCE))


# -- the driver -------------------------------------------------------------------------------------------------------


class Serving(ModuleType):
    """Ray Serve with one application, which is there for `lasts` looks after it was deleted."""

    lasts = 3

    def __init__(self, calls: list[str]) -> None:
        super().__init__("ray.serve")
        self.calls, self.running, self.deleted = calls, 0, False
        self.applications: dict[str, Any] = {}
        self.exceptions = SimpleNamespace(RayServeException=RayError)
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

    def get_app_handle(self, name: str) -> Any:
        answer = SimpleNamespace(result=lambda timeout_s: self.calls.append("drain"))
        return SimpleNamespace(drain=SimpleNamespace(remote=lambda: answer))


@pytest.fixture
def serving(ray: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serving]:
    calls: list[str] = []
    ray.serve = made = Serving(calls)
    ray.shutdown = lambda: calls.append("shutdown")
    monkeypatch.setitem(sys.modules, "ray.serve", made)
    monkeypatch.setitem(sys.modules, "ray.serve.schema", made.schema)
    for name in ("connect", "application"):
        monkeypatch.setattr(driver, name, lambda *parts: None)
    monkeypatch.setattr(driver, "imported", lambda: ray)
    monkeypatch.setattr(driver, "process_resources", lambda *parts: ProcessResources(1, 1, 1, 0.0))
    for name in ("_LOOK", "_FAREWELL"):
        monkeypatch.setattr(driver, name, 0.01)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield made
    for number, handler in before.items():
        signal.signal(number, handler)


def served(drain: float = 600.0) -> None:
    plan: Any = None
    serve_replicas(plan, Scale(Layout(1), drain=drain), ("h", 1), None, lambda url: None, lambda said: None)


def test_the_command_waits_until_what_was_accepted_has_ended(serving: Serving) -> None:
    serving.looked = [signal.SIGTERM]
    served()
    # As long as the replicas may take, not as long as Ray waits by itself.
    assert serving.calls == ["drain", "delete", *["look"] * 4, "shutdown"]


def test_ray_ends_though_replicas_do_not(serving: Serving) -> None:
    serving.looked, serving.lasts = [signal.SIGINT], 10**6
    with pytest.raises(KeyboardInterrupt):
        served(drain=0.05)
    assert serving.calls[-1] == "shutdown"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_does_not_wait(serving: Serving, number: signal.Signals) -> None:
    serving.looked, serving.lasts = [signal.SIGINT, number], 10**6
    with pytest.raises(SystemExit) as caught:
        served()
    assert caught.value.code == 128 + number
    assert serving.calls == ["delete", "look", "shutdown"]


def test_a_second_signal_while_replicas_are_told_does_not_wait(serving: Serving) -> None:
    def again(timeout_s: float) -> None:
        signal.raise_signal(signal.SIGINT)

    handle = SimpleNamespace(drain=SimpleNamespace(remote=lambda: SimpleNamespace(result=again)))
    serving.get_app_handle = lambda name: handle  # type: ignore[method-assign]
    serving.lasts = 10**6
    serving.looked = [0, signal.SIGINT]  # the first one when it has started
    with pytest.raises(SystemExit) as caught:
        served()
    assert caught.value.code == 130 and serving.calls == ["delete", "look", "shutdown"]
