"""Replicas through Ray Serve: one address, several processes with one model each, and a coordinator beside them.

Ray Serve starts replicas, replaces those that fail `check_health`, and gives each request to one that has few. Ours is
what all of them have in common, their pool (`logo.serving.coordinator`), which lives in an actor of the deployment.
"""

from __future__ import annotations

import asyncio
import logging
import re
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any, Protocol

from starlette.types import ASGIApp

from logo.backends.cluster import LOCAL, Layout, WorkersError, connect, imported, share
from logo.errors import LoGoError
from logo.serving.coordinator import Command, Coordinator, Joined, State
from logo.serving.logs import configure
from logo.serving.membership import Link, Lost, Member
from logo.serving.pool import Change

_log = logging.getLogger("logo.serving")

APPLICATION, _COORDINATOR = "logo", "coordinator"

# A replica that cannot be opened: the next attempts would fail, too.
_ATTEMPTS = 3

# Seconds between two looks at how the application stands; and that replicas have after the first one.
_LOOK, _GRACE = 0.5, 120.0

# Seconds between the signal and the end of the address: a connection that is kept hears 503 first.
_FAREWELL = 1.0


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
    """How many replicas.

    Attributes:
        layout: how many at first, where, and what each of them gets.
        most: with `layout.count` the bounds between which there are as many as requests ask for; None: always as many.
        rise, fall: seconds for which requests have to ask for more, or for fewer, before there are.
        drain: seconds in which a replica that is to end may finish what it has accepted.
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
    """What Ray Serve starts: opens an engine, and has the pool of the others before it is given requests."""

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
    """To the coordinator that runs as an actor; when another one takes its place, to that one."""

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
        running, _, _ = await asyncio.to_thread(_running, serve, name)
        return running > 0

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


# -- in the driver ----------------------------------------------------------------------------------------------------


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


def serve_replicas(
    plan: Plan,
    scale: Scale,
    address: tuple[str, int],
    digest: str | None,
    started: Callable[[str], None],
    told: Callable[[str], None],
) -> None:
    """Serves until a signal comes, and then until what was accepted has ended.

    Args:
        address: host and port.
        started: called with the address when requests are taken.
        told: called with a line when the number of replicas changes.

    Raises:
        UsageError: Ray is not installed, or the cluster's address is none.
        WorkersError: no cluster answers, it has no room, or an application of this name runs there already.
        LoGoError: no replica can be opened.
        KeyboardInterrupt: the signal was SIGINT.
    """
    ray = imported()
    from ray import serve
    from ray.serve.schema import LoggingConfig

    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # of this process: what it waits for is said below
    widest = scale.layout if scale.most is None else replace(scale.layout, count=scale.most)
    connect(ray, widest)
    stop = _stopped()  # Ray has handlers of its own, which do not wait
    local = scale.layout.address == LOCAL
    mine = False
    try:
        room = share(ray, widest)  # so that there is a share for those, too, that start later
        first = scale.layout.count if scale.most is not None and scale.layout.count else room.count
        if APPLICATION in serve.status().applications:
            raise WorkersError(f"the cluster serves an application {APPLICATION!r} already; end that one first")
        host, port = address if local else _there(serve, address)
        serve.start(
            proxy_location="HeadOnly" if local else "EveryNode",
            http_options={"host": host, "port": port, "request_timeout_s": None, "keep_alive_timeout_s": 30},
            logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
        )
        mine = True
        asked = replace(scale, layout=replace(scale.layout, count=first))
        target = application(plan, asked, room.cpus, room.gpus, digest)
        serve.run_many(
            [serve.RunTarget(target, APPLICATION, "/")],
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )
        if _until_running(serve, min(first, room.room), stop):
            started(f"http://{f'[{host}]' if ':' in host else host}:{port}")
            _watch(serve, told, stop)
            _drain(ray, serve)
    finally:
        try:
            if mine:
                _remove(serve, scale.drain, stop)
        finally:
            ray.shutdown()  # with everything that was started for this alone
    if stop.by == signal.SIGINT:
        raise KeyboardInterrupt  # as a server of one process ends


def _there(serve: Any, address: tuple[str, int]) -> tuple[str, int]:
    """Where a cluster listens that serves something already: its address is one for all, and stays as it is."""
    if not serve.status().proxies:
        return address
    from ray.serve.context import _get_global_client

    found: Any = _get_global_client()
    return str(found.http_config.host), int(found.http_config.port)


def _running(serve: Any, name: str = APPLICATION) -> tuple[int, str, str]:
    """How many replicas take requests, the application's status, and what there is to say about it."""
    found = serve.status().applications.get(name)
    if found is None:
        return 0, "NOT_STARTED", ""
    count = sum(one.replica_states.get("RUNNING", 0) for one in found.deployments.values())
    said = " ".join([found.message, *(one.message for one in found.deployments.values())])
    return count, str(getattr(found.status, "value", found.status)), said


def _until_running(serve: Any, expected: int, stop: threading.Event) -> bool:
    """Waits for as many replicas as there is room for; False: it was told to stop meanwhile."""
    limit = float("inf")
    while not stop.wait(_LOOK):
        count, status, said = _running(serve)
        if status in ("DEPLOY_FAILED", "UNHEALTHY") and not count:
            raise LoGoError(f"no replica could be opened: {_reason(said)}")
        if count:
            limit = min(limit, time.monotonic() + _GRACE)
        if count >= expected or time.monotonic() > limit:
            return True
    return False


def _reason(said: str) -> str:
    """The error in what Ray Serve says, which has a traceback in it."""
    found = re.findall(r"logo\.[\w.]*Error: ([^\n]+)", said) or re.findall(r"\w+Error: ([^\n]+)", said)
    return str(found[-1]).strip() if found else " ".join(said.split())[-300:]


def _watch(serve: Any, told: Callable[[str], None], stop: threading.Event) -> None:
    """Until told to stop, says when there are more replicas or fewer."""
    before, _, _ = _running(serve)
    while not stop.wait(2.0):
        count, status, _ = _running(serve)
        if status == "NOT_STARTED":
            raise WorkersError("the application was removed from the cluster")
        if count != before:
            told(f"{count} replica{' takes' if count == 1 else 's take'} requests, {before} did")
            before = count


def _drain(ray: Any, serve: Any) -> None:
    """Every replica refuses what is new; what was accepted goes on."""
    try:
        serve.get_app_handle(APPLICATION).drain.remote().result(timeout_s=30)
    except (ray.exceptions.RayError, serve.exceptions.RayServeException, TimeoutError) as error:
        _log.warning("replicas end without having been told before (%s)", type(error).__name__)
    time.sleep(_FAREWELL)


def _remove(serve: Any, limit: float, stop: _Stop) -> None:
    """Takes the application from the cluster, when what was accepted has ended or after `limit` seconds."""
    serve.delete(APPLICATION, _blocking=False)  # else it waits for a minute, whatever the replicas may take
    end = time.monotonic() + limit
    while APPLICATION in serve.status().applications and not stop.hurry:  # an answer: the controller has heard of it
        if time.monotonic() > end:
            _log.warning("replicas have not ended within %.0f s", limit)
            break
        time.sleep(_LOOK)


class _Stop(threading.Event):
    """Set by a signal. `by`: which. `hurry`: there was another one."""

    by: int | None = None
    hurry = False


def _stopped() -> _Stop:
    """Set by the first SIGTERM or Ctrl-C; the second one does not wait."""
    stop = _Stop()

    def leave(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            stop.hurry = True
            raise SystemExit(128 + number)
        stop.by = number
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)
    return stop
