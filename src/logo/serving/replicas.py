"""Replicas through Ray Serve: one address, several processes with one model each, and a coordinator.

Ray Serve starts replicas, replaces those that fail `check_health`, and balances requests. The coordinator, which keeps
their pools equal (`logo.serving.coordinator`), is an actor of the deployment.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.types import ASGIApp

from logo import plugins
from logo.backends.cluster import Layout, imported
from logo.errors import LoGoError
from logo.serving.coordinator import Command, Coordinator, Joined, State
from logo.serving.logs import configure
from logo.serving.membership import Link, Lost, Member
from logo.serving.pool import Change

_log = logging.getLogger("logo.serving")

APPLICATION, _COORDINATOR = "logo", "coordinator"

# A replica that cannot be opened: the next attempts would fail, too.
_ATTEMPTS = 3


class Opened(Protocol):
    """A replica that is ready to join the group."""

    member: Member

    @property
    def app(self) -> ASGIApp:
        """The app of the replica."""

    def check(self) -> None:
        """Raises an error if it has to be replaced."""


class Plan(Protocol):
    """The settings of each replica."""

    @property
    def log_json(self) -> bool:
        """Whether its log is JSON."""

    @property
    def room(self) -> int:
        """The most requests of a replica at one time."""

    @property
    def concurrent(self) -> int:
        """The number of requests that keep a replica busy, for scaling."""

    async def replica(self, name: str, link: Link) -> Opened:
        """Opens the replica in this process."""


@dataclass(frozen=True)
class Scale:
    """The number of replicas.

    Attributes:
        layout: their number at first, their place, and their resources.
        most: the number grows with requests from `layout.count` up to this; None: it is constant.
        rise, fall: seconds of higher, or lower, load before the number changes.
        drain: seconds in which a replica that is to end may finish accepted requests.
    """

    layout: Layout
    most: int | None = None
    rise: float = 30.0
    fall: float = 600.0
    drain: float = 600.0

    @property
    def window(self) -> float:
        """Seconds over which load is averaged; at least ten, since Ray counts every ten seconds."""
        return max(11.0, min(self.rise, self.fall, 30.0))


# -- in a process -----------------------------------------------------------------------------------------------------


class Deployed:
    """The class that Ray Serve starts: opens an engine, and joins the group before it gets requests."""

    async def __init__(self, plan: Plan) -> None:  # type: ignore[misc]
        from ray import serve

        configure(log_json=plan.log_json)
        name = serve.get_replica_context().replica_tag
        self._link = ActorLink(name)
        self._replica = await plan.replica(name, self._link)
        await self._replica.member.join()

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return self._replica.app

    async def check_health(self) -> None:
        """Raises an error if this replica has to be replaced."""
        self._replica.check()

    async def drain(self) -> None:
        """Makes all replicas refuse new requests."""
        await self._link.drain()


class ActorLink:
    """A link to the coordinator's actor, or to the one that replaces it."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._actor: Any = None

    async def join(self, state: State, *, fresh: bool) -> Joined:
        """See `Coordinator.join`."""
        import ray

        found: Joined = await self._call(
            "join", self._name, ray.get_runtime_context().current_actor, state, fresh=fresh
        )
        return found

    async def next(self) -> Command | bool:
        """See `Coordinator.next`."""
        found: Command | bool = await self._call("next", self._name)
        return found

    async def reply(self, number: int, result: Any) -> None:
        """See `Coordinator.reply`."""
        await self._call("reply", self._name, number, result)

    async def change(self, change: Change) -> LoGoError | None:
        """See `Coordinator.change`."""
        found: LoGoError | None = await self._call("change", change)
        return found

    async def metrics(self) -> dict[str, str | None]:
        """See `Coordinator.metrics`."""
        found: dict[str, str | None] = await self._call("metrics")
        return found

    async def drain(self) -> None:
        """See `Coordinator.drain`."""
        await self._call("drain")

    async def _call(self, method: str, *args: Any, **options: Any) -> Any:
        from ray import serve
        from ray.exceptions import RayActorError, RayTaskError

        try:
            if self._actor is None:
                self._actor = serve.get_deployment_actor(_COORDINATOR)
            return await getattr(self._actor, method).remote(*args, **options)
        except RayTaskError as error:  # an error of the coordinator itself, with its traceback
            _log.error("the replicas' coordinator failed at %r: %s", method, error)
            raise Lost("the replicas' coordinator failed; its log says why") from None
        except (RayActorError, ValueError) as error:
            self._actor = None
            raise Lost(f"the replicas' coordinator does not answer ({type(error).__name__}); try again") from None


class ActorPeers:
    """Replicas as Ray's actors."""

    async def answering(self) -> bool:
        """Whether Ray Serve sends requests to any replica of the coordinator's application."""
        from ray import serve

        name = serve.get_deployment_actor_context().app_name
        count, _, _ = await asyncio.to_thread(running, serve, name)
        return count > 0

    async def gone(self, handle: Any) -> bool:
        """Whether Ray knows that the replica has ended; a silent one may come back."""
        from ray.exceptions import RayActorError

        try:
            await asyncio.wait_for(handle.__ray_ready__.remote(), 5.0)
        except RayActorError:
            return True
        except asyncio.TimeoutError:
            return False
        return False

    def end(self, handle: Any) -> None:
        """Ends a replica; Ray Serve starts another one."""
        import ray

        ray.kill(handle)


class ActorCoordinator(Coordinator):
    """The coordinator as an actor."""

    def __init__(self, digest: str | None) -> None:
        super().__init__(ActorPeers(), digest)


# -- the application ---------------------------------------------------------------------------------------------------


def application(plan: Plan, scale: Scale, cpus: int, gpus: float, digest: str | None = None) -> Any:
    """The application for Ray Serve.

    Args:
        cpus, gpus: of each replica.
        digest: of the pool that replicas have to open; None: that of the first one.
    """
    ray = imported()
    from ray import serve
    from ray.serve.config import DeploymentActorConfig

    first, most = scale.layout.count or 1, scale.most
    count: dict[str, Any] = {"num_replicas": first}
    if most is not None:
        bounds = {"min_replicas": first, "initial_replicas": first, "max_replicas": most}
        delays = {"upscale_delay_s": scale.rise, "downscale_delay_s": scale.fall, "look_back_period_s": scale.window}
        count = {"autoscaling_config": {**bounds, **delays, "target_ongoing_requests": plan.concurrent}}
    made: Any = serve.deployment(serve.ingress()(Deployed))
    deployment = made.options(
        name="LoGo",
        **count,
        max_ongoing_requests=plan.room,
        graceful_shutdown_timeout_s=scale.drain,
        health_check_period_s=5,
        max_constructor_retry_count=_ATTEMPTS,
        logging_config={"enable_access_log": False},  # our own log has a line per request
        ray_actor_options={
            "num_cpus": cpus,
            "num_gpus": gpus,
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(cpus), **plugins.environment()}},
        },
        deployment_actors=[
            DeploymentActorConfig(
                name=_COORDINATOR,
                actor_class=ray.remote(ActorCoordinator),
                init_kwargs={"digest": digest},
                actor_options={"num_cpus": 0},
            )
        ],
    )
    return deployment.bind(plan)


def running(serve: Any, name: str = APPLICATION) -> tuple[int, str, str]:
    """The number of replicas that accept requests, the application's status, and a message."""
    found = serve.status().applications.get(name)
    if found is None:
        return 0, "NOT_STARTED", ""
    count = sum(one.replica_states.get("RUNNING", 0) for one in found.deployments.values())
    said = " ".join([found.message, *(one.message for one in found.deployments.values())])
    return count, str(getattr(found.status, "value", found.status)), said
