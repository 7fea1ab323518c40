"""`Replica`: a service and its app, as one of several with the same pool.

Ray is not known here; see `logo.serving.replicas`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from logo.adapters.digests import key_of, pool_digest
from logo.adapters.pool import AdapterPool
from logo.api.names import check_pool
from logo.api.visits import choosing, chosen
from logo.engine import LoGo
from logo.errors import LoGoError
from logo.prompts import Prompt
from logo.protocol import MixtureRequest
from logo.serving.app import AppSettings, create_app
from logo.serving.coordinator import State
from logo.serving.gate import Gate, Gated
from logo.serving.guards import GuardSettings, guard
from logo.serving.membership import Link, Lost, Member, Own
from logo.serving.memory import Memory
from logo.serving.metrics import Metrics, labelled, selected
from logo.serving.mixtures import HeldMixture
from logo.serving.pool import Change, Staged
from logo.serving.service import Service

# Room for requests that are refused, pages and health checks.
_BESIDE = 64

POOL, REPLICA = "X-LoGo-Pool", "X-LoGo-Replica"
"""Headers of `/health`: the digest of the pool, and who answers."""

ADAPTERS = "/v1/logo/adapters"


@dataclass(frozen=True)
class ServerPlan:
    """The settings of each replica.

    Attributes:
        open: opens the engine.
        settings, guards: of the app.
        max_concurrent, kv_cache_gb, signals, max_queue: of the service.
    """

    open: Callable[[], LoGo]
    settings: AppSettings
    guards: GuardSettings = field(repr=False)
    max_concurrent: int = 64
    kv_cache_gb: float | None = None
    signals: tuple[str, ...] = ()
    max_queue: int = 256
    log_json: bool = False

    @property
    def room(self) -> int:
        """The most requests of a replica at one time, including those that it refuses."""
        return self.max_concurrent + self.max_queue + _BESIDE

    @property
    def concurrent(self) -> int:
        """The number of requests that keep one replica busy."""
        return self.max_concurrent

    async def replica(self, name: str, link: Link) -> Replica:
        """Opens the engine in this process."""
        return await asyncio.to_thread(Replica, name, self, link)


def keys_of(pool: AdapterPool) -> dict[str, str]:
    """Name -> key of every adapter. Reads each file once."""
    return {adapter.name: key_of(adapter) for adapter in pool}


def digest(pool: AdapterPool) -> str:
    """The digest of names and contents of all adapters. Reads each file once."""
    return pool_digest(keys_of(pool))


class ReplicaService(Service):
    """A service whose pool changes together with those of other replicas.

    Args:
        link: to the coordinator.
    """

    def __init__(self, logo: LoGo, memory: Memory, link: Link, **options: Any) -> None:
        super().__init__(logo, memory, **options)
        self._link = link
        self._staged: Staged | None = None

    async def choose(self, prompt: Prompt | Sequence[int], wanted: MixtureRequest) -> HeldMixture:
        """As `Service.choose`; afterwards the request does not depend on the pool any more."""
        choosing()
        try:
            return await super().choose(prompt, wanted)
        finally:
            chosen()

    async def add(self, folder: Path, name: str, *, replace: bool = False) -> Any:
        """As `Service.add`, in all replicas or in none."""
        there = name in self.logo.pool  # without one to replace, it is an addition, which can be undone
        await self._everywhere(Change(name, folder, replace and there))

    async def remove(self, name: str) -> None:
        """As `Service.remove`, in all replicas or in none."""
        await self._everywhere(Change(name))

    async def _everywhere(self, change: Change) -> None:
        error = await self._link.change(change)
        if error is not None:
            raise error

    # -- commands of the coordinator -------------------------------------------------------------------------------

    async def stage(self, change: Change) -> str:
        """Prepares the pool after a change, and returns its digest."""
        staged, found = await self._in_thread(self._stage, change)
        self._staged = staged
        return found

    def _stage(self, change: Change) -> tuple[Staged, str]:
        staged = self.pool.staged(change)
        return staged, digest(staged.prepared.pool)

    async def take(self) -> None:
        """Replaces the pool by the staged one."""
        if self._staged is None:
            raise LoGoError("nothing was staged")
        staged, self._staged = self._staged, None
        await self._in_thread(self.pool.take, staged)

    async def forget(self) -> None:
        """Drops the staged pool."""
        self._staged = None

    def drain(self) -> None:
        """Refuses new requests."""
        self.draining = True


class Replica:
    """A service and its app as a member of the group.

    Args:
        name: of the replica.
        plan: its settings.
        link: to the coordinator.

    Raises:
        LoGoError: the engine cannot be opened.
    """

    def __init__(self, name: str, plan: ServerPlan, link: Link) -> None:
        self._name, self._link = name, link
        logo = plan.open()
        check_pool(plan.settings.base_model, logo.names)
        self.service = ReplicaService(
            logo,
            Memory(plan.max_concurrent, plan.kv_cache_gb),
            link,
            signals=plan.signals,
            max_queue=plan.max_queue,
        )
        self.service.prepare()
        self.gate = Gate()
        app = create_app(self.service, plan.settings)
        self._metrics: Metrics = app.state.answers.metrics
        gated = Together(Gated(app, self.gate, self._headers), name, link)
        self.app: ASGIApp = Nameless(guard(gated, plan.guards))
        own = Own(self.service.stage, self.service.take, self.service.forget, self._text, self.service.drain)
        self.member = Member(link, own, self.gate, State(digest(logo.pool)))

    def check(self) -> None:
        """Raises an error if the replica has to be replaced."""
        self.member.check()
        if not self.service.alive:
            raise LoGoError("generation has stopped")

    def _headers(self) -> Mapping[str, str]:
        return {POOL: self.member.state.digest, REPLICA: self._name}

    def _text(self) -> str:
        return self._metrics.text().decode()


class Together:
    """Adds the numbers of all replicas to answers: `/metrics`, and how often adapters were selected.

    Args:
        app: answers with its own numbers.
        name: of this replica.
        link: to the others.
    """

    def __init__(self, app: ASGIApp, name: str, link: Link) -> None:
        self.app, self._name, self._link = app, name, link

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        of_all = {"/metrics": self._metrics, ADAPTERS: self._adapters}.get(scope.get("path", "").rstrip("/"))
        if scope["type"] != "http" or of_all is None:
            return await self.app(scope, receive, send)
        start: Message = {}
        body = bytearray()

        async def kept(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                start = message
            elif message["type"] == "http.response.body":
                body.extend(message.get("body", b""))

        await self.app(scope, receive, kept)
        whole = bytes(body)
        if start.get("status") == 200 and scope["method"] == "GET":
            whole = await of_all(whole)
        MutableHeaders(scope=start)["Content-Length"] = str(len(whole))
        await send(start)
        await send({"type": "http.response.body", "body": whole})

    async def _metrics(self, own: bytes) -> bytes:
        texts = await self._of_all()
        answered = {name: text for name, text in texts.items() if text is not None}
        missing = "".join(f"# replica {name} does not answer\n" for name in texts if name not in answered)
        return labelled({self._name: own.decode(), **answered}) + missing.encode()

    async def _adapters(self, own: bytes) -> bytes:
        texts = await self._of_all()
        answered = {name: text for name, text in texts.items() if text is not None}
        if self._name not in answered:  # the coordinator does not answer
            return own
        counts = selected(answered.values())
        found = json.loads(own)
        for card in found["data"]:
            card["selected"] = counts.get(card["id"], 0)
        if missing := [name for name in texts if name not in answered]:
            found["missing_replicas"] = missing  # replicas whose selections are not counted
        return json.dumps(found, ensure_ascii=False).encode()

    async def _of_all(self) -> dict[str, str | None]:
        try:
            return await self._link.metrics()
        except Lost:
            return {}


class Nameless:
    """Removes the request id from answers, since Ray's proxy sets the same one."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def without(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [pair for pair in message["headers"] if pair[0].lower() != b"x-request-id"]
            await send(message)

        await self.app(scope, receive, without)
