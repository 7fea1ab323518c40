"""`Member`: a replica's side of `Coordinator`: fetches commands, executes them, and reports results."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from logo.errors import LoGoError, PoolError
from logo.protocol import NotReady
from logo.serving.coordinator import LEASE, Command, Joined, State
from logo.serving.gate import Gate
from logo.serving.pool import Change

_log = logging.getLogger("logo.serving")

# Seconds between two attempts to reach a coordinator that does not answer.
_AGAIN = 0.5

# A replica that is closed for more seconds than this is replaced.
_CLOSED = 300.0


class Lost(NotReady):
    """The coordinator has ended, and will be replaced."""


class Link(Protocol):
    """The coordinator's methods without the replica's own name and handle. Each raises `Lost`."""

    async def join(self, state: State, *, fresh: bool) -> Joined: ...
    async def next(self) -> Command | bool: ...
    async def reply(self, number: int, result: Any) -> None: ...
    async def change(self, change: Change) -> LoGoError | None: ...
    async def metrics(self) -> dict[str, str | None]: ...
    async def drain(self) -> None: ...


@dataclass(frozen=True)
class Own:
    """The commands that a replica executes.

    Attributes:
        stage: prepares the pool after a change, and returns its digest.
        take: replaces the pool by the staged one.
        forget: drops the staged pool.
        metrics: returns metrics in Prometheus' text format.
        drain: refuses new requests.
    """

    stage: Callable[[Change], Awaitable[str]]
    take: Callable[[], Awaitable[None]]
    forget: Callable[[], Awaitable[None]]
    metrics: Callable[[], str]
    drain: Callable[[], None]


class Member:
    """A replica as a member of the group.

    Args:
        link: to the coordinator.
        own: its commands.
        gate: of its requests.
        state: the pool that it has opened.

    Attributes:
        trouble: why it has to be replaced; None if it has not.
    """

    def __init__(self, link: Link, own: Own, gate: Gate, state: State) -> None:
        self._link, self._own, self._gate = link, own, gate
        self.state = state
        self.trouble: str | None = None
        self._paused = True  # closed by the coordinator, or not joined yet
        self._until = 0.0  # the time until which it answers without contact to a coordinator
        self._following: asyncio.Task[None] | None = None
        self._lapsing: asyncio.Task[None] | None = None
        self._doing: set[asyncio.Task[None]] = set()

    async def join(self) -> None:
        """Joins the group: changes the pool to that of the others, and executes commands from now on.

        Raises:
            PoolError: this replica cannot change to that pool.
        """
        await self._joined(fresh=True)
        self._following = asyncio.create_task(self._follow())
        self._lapsing = asyncio.create_task(self._lapse())

    async def leave(self) -> None:
        """Stops executing commands."""
        tasks = [*self._doing, *(task for task in (self._following, self._lapsing) if task is not None)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def check(self) -> None:
        """Raises an error if the replica has to be replaced."""
        if self.trouble is None and self._gate.closed_for > _CLOSED:
            self.trouble = f"its requests have waited for {_CLOSED:.0f} s"
        if self.trouble is not None:
            raise PoolError(self.trouble)

    def _open(self) -> None:
        self._paused = False
        if time.monotonic() < self._until:
            self._gate.open()

    async def _close(self) -> None:
        self._paused = True
        await self._gate.close()

    def _heard(self, asked: float) -> None:
        """Notes contact: the coordinator has answered a question of this time."""
        self._until = asked + LEASE
        if not self._paused:
            self._open()

    async def _lapse(self) -> None:
        """Closes the replica after too long without contact, since others may have another pool by then."""
        while True:
            left = self._until - time.monotonic()
            if left <= 0 and not self._gate.closed_for:
                _log.warning("requests wait: the replicas' coordinator has not answered for %.0f s", LEASE)
                self._gate.shut()
            await asyncio.sleep(max(left, _AGAIN))

    async def _joined(self, *, fresh: bool) -> None:
        while True:
            asked = time.monotonic()
            try:
                found = await self._link.join(self.state, fresh=fresh)
            except Lost:
                await asyncio.sleep(_AGAIN)
                continue
            if found.refused is not None:
                raise PoolError(f"this replica gets no requests: {found.refused}")
            if not found.behind:
                self.state = found.state
                self._heard(asked)
                return self._open()
            await self._close()
            digest = await self._caught_up(found.behind)
            self.state = replace(found.state, digest=digest)

    async def _caught_up(self, behind: Sequence[Change]) -> str:
        """Makes changes, and returns the digest of the pool.

        The order matters: a pool may not be empty, and an adapter may need the room of another one.
        """
        digest = self.state.digest
        while behind:
            later, error = [], None
            for change in behind:
                try:
                    digest = await self._own.stage(change)
                except LoGoError as found:
                    await self._own.forget()
                    later.append(change)
                    error = found
                else:
                    await self._own.take()
            if error is not None and len(later) == len(behind):
                raise error
            behind = later
        return digest

    async def _follow(self) -> None:
        try:
            while True:
                asked = time.monotonic()
                try:
                    command = await self._link.next()
                except Lost:
                    command = False
                if command:
                    self._heard(asked)
                if isinstance(command, Command):
                    task = asyncio.create_task(self._do(command))
                    self._doing.add(task)
                    task.add_done_callback(self._doing.discard)
                elif not command:
                    await self._own.forget()
                    await self._joined(fresh=False)
        except Exception as error:
            _log.exception("this replica no longer follows the others")
            self.trouble = str(error)
            await self._close()

    async def _do(self, command: Command) -> None:
        try:
            result = await self._result(command)
        except LoGoError as error:
            result = error.with_traceback(None)
        except Exception as error:
            _log.exception("a replica could not %s", command.kind)
            result = LoGoError(f"{type(error).__name__}: {error}")
        try:
            await self._link.reply(command.number, result)
        except Lost:
            _log.warning("the coordinator has ended before it learnt the outcome of %r", command.kind)

    async def _result(self, command: Command) -> Any:
        if command.kind == "stage" and command.change is not None:
            return await self._own.stage(command.change)
        if command.kind == "take" and command.state is not None:
            await self._own.take()
            self.state = command.state
        elif command.kind == "close":
            await self._close()
        elif command.kind == "open":
            self._open()
        elif command.kind == "forget":
            await self._own.forget()
        elif command.kind == "drain":
            self._own.drain()
        elif command.kind == "metrics":
            return self._own.metrics()
        return None
