"""What the driver and a replica's link do with Ray, with a Ray that only pretends."""

from __future__ import annotations

import asyncio
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from logo.serving.membership import Lost
from logo.serving.pool import Change
from logo.serving.replicas import ActorLink
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
