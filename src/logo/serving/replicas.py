"""Replicas through Ray Serve: one address, several processes with one model each, and a coordinator beside them.

Ray Serve starts replicas, replaces those that fail `check_health`, and gives each request to one that has few. Our part
is the common pool of all (`logo.serving.coordinator`), which runs in an actor of the deployment.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.types import ASGIApp

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
    """A replica that is ready to join others."""

    member: Member

    @property
    def app(self) -> ASGIApp:
        """What answers requests."""

    def check(self) -> None:
        """Raises where it has to be replaced."""


class Plan(Protocol):
    """What each replica is."""

    @property
    def log_json(self) -> bool:
        """Whether its log is JSON."""

    @property
    def room(self) -> int:
        """Requests that it may have at one time."""

    @property
    def concurrent(self) -> int:
        """Requests that keep it busy: for scaling."""

    async def replica(self, name: str, link: Link) -> Opened:
        """Opens it in this process."""


@dataclass(frozen=True)
class Scale:
    """The number of replicas.

    Attributes:
        layout: the initial number, the place, and the resources of each.
        most: with `layout.count` the bounds of autoscaling; None: a fixed number.
        rise, fall: seconds for which the load has to ask for more, or for fewer, before the number changes.
        drain: seconds in which a replica that is to end may finish accepted requests.
    """

    layout: Layout
    most: int | None = None
    rise: float = 30.0
    fall: float = 600.0
    drain: float = 600.0

    @property
    def window(self) -> float:
        """Seconds whose requests are averaged; Ray counts every ten seconds, so no fewer can be."""
        return max(11.0, min(self.rise, self.fall, 30.0))


# -- in a process -----------------------------------------------------------------------------------------------------


class Deployed:
    """What Ray Serve starts: opens an engine, and makes the pool's changes before it gets requests."""

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
        """Raises where this replica has to be replaced."""
        self._replica.check()

    async def drain(self) -> None:
        """No replica takes requests any more."""
        await self._link.drain()


class ActorLink:
    """The connection to the coordinator that runs as an actor; if another one replaces it, to that one."""

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
        except RayTaskError as error:  # its own fault, of which its traceback says more than any answer
            _log.error("the replicas' coordinator failed at %r: %s", method, error)
            raise Lost("the replicas' coordinator failed; its log says why") from None
        except (RayActorError, ValueError) as error:
            self._actor = None
            raise Lost(f"the replicas' coordinator does not answer ({type(error).__name__}); try again") from None


class ActorPeers:
    """Replicas as Ray's actors."""

    async def answering(self) -> bool:
        """Whether Ray Serve gives requests to any replica of the coordinator's application."""
        from ray import serve

        name = serve.get_deployment_actor_context().app_name
        count, _, _ = await asyncio.to_thread(running, serve, name)
        return count > 0

    async def gone(self, handle: Any) -> bool:
        """Whether Ray says that it has ended; one that only does not answer may come back."""
        from ray.exceptions import RayActorError

        try:
            await asyncio.wait_for(handle.__ray_ready__.remote(), 5.0)
        except RayActorError:
            return True
        except asyncio.TimeoutError:
            return False
        return False

    def end(self, handle: Any) -> None:
        """Ends it; Ray Serve starts another one."""
        import ray

        ray.kill(handle)


class ActorCoordinator(Coordinator):
    """The coordinator as an actor."""

    def __init__(self, digest: str | None) -> None:
        super().__init__(ActorPeers(), digest)


# -- the application ---------------------------------------------------------------------------------------------------


def application(plan: Plan, scale: Scale, cpus: int, gpus: float, digest: str | None = None) -> Any:
    """What Ray Serve runs.

    Args:
        cpus, gpus: of each replica.
        digest: of the pool that replicas have to open; None: of the first one's.
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
        logging_config={"enable_access_log": False},  # ours says more, and nothing twice
        ray_actor_options={
            "num_cpus": cpus,
            "num_gpus": gpus,
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(cpus)}},
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
    """The number of replicas that accept requests, the application's status, and its message."""
    found = serve.status().applications.get(name)
    if found is None:
        return 0, "NOT_STARTED", ""
    count = sum(one.replica_states.get("RUNNING", 0) for one in found.deployments.values())
    said = " ".join([found.message, *(one.message for one in found.deployments.values())])
    return count, str(getattr(found.status, "value", found.status)), said
