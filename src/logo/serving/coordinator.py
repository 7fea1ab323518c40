"""`Coordinator`: one pool in many replicas, changed in all of them or in none.

    stage (each makes the new pool ready) -> close (newcomers wait) -> take (each answers from it) -> open

A replica that is closed gives no answer that depends on its pool, and none is opened before all have taken the new one:
whoever has seen an answer from the new pool gets none from the old one afterwards. What fails before `take` changes
nothing anywhere. A replica that does not do what comes after is ended, since it may neither answer nor stay behind; one
that starts later is told what has changed before it may answer.

Knows neither Ray nor engines: replicas fetch commands (`next`) and report what came of them (`reply`).
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from logo.errors import LoGoError, PoolError
from logo.protocol import NotReady
from logo.serving.pool import Change

Kind = Literal["stage", "forget", "close", "take", "open", "metrics", "drain"]

# Seconds: that a new pool may take to be made ready, and that anything else may take.
STAGING, PATIENCE = 900.0, 60.0

# Seconds between two looks at whether a replica that does not answer is there.
_LOOK = 1.0

# Seconds for which a replica's question stays open.
_POLL = 10.0


@dataclass(frozen=True)
class State:
    """The pool that all replicas have.

    Attributes:
        digest: of names and contents, see `pool_digest`.
        changes: what has been done to the pool that the replicas open.
    """

    digest: str
    changes: tuple[Change, ...] = ()


@dataclass(frozen=True)
class Command:
    """What one replica is told.

    Attributes:
        number: for its reply.
        change: to be staged.
        state: after `take`.
    """

    number: int
    kind: Kind
    change: Change | None = None
    state: State | None = None


@dataclass(frozen=True)
class Joined:
    """The answer to a replica that wants to take requests. Where neither field is set, it may.

    Attributes:
        behind: changes of the pool that it has to make first.
        refused: why it must not.
    """

    behind: tuple[Change, ...] = ()
    refused: str | None = None


class Peers(Protocol):
    """What is known of replicas from outside, by their handles."""

    async def gone(self, handle: Any) -> bool:
        """Whether a replica has certainly ended."""

    def end(self, handle: Any) -> None:
        """Ends a replica."""


@dataclass
class _Member:
    handle: Any
    commands: asyncio.Queue[Command] = field(default_factory=asyncio.Queue)
    asked: dict[int, asyncio.Future[Any]] = field(default_factory=dict)


class Coordinator:
    """Knows the replicas and the pool they have.

    Args:
        peers: tells whether replicas are there.
        digest: of the pool that replicas have to open; None: of the first one's.
        settle: seconds in which a replica that has just started waits for others that may have been there before. They
            know what has changed: a coordinator that is started again learns it from them.
    """

    def __init__(self, peers: Peers, digest: str | None = None, settle: float = 5.0) -> None:
        self._peers, self._digest = peers, digest
        self._settled = time.monotonic() + settle
        self._state: State | None = None
        self._members: dict[str, _Member] = {}
        self._lock = asyncio.Lock()
        self._numbers = itertools.count(1)

    # -- asked by replicas -----------------------------------------------------------------------------------------

    async def join(self, name: str, handle: Any, state: State, *, fresh: bool) -> Joined:
        """Makes a replica one of those that answer, if its pool is theirs.

        Args:
            fresh: it has not answered yet.
        """
        while fresh and self._state is None and (left := self._settled - time.monotonic()) > 0:
            await asyncio.sleep(min(left, 0.1))
        async with self._lock:  # not in the middle of a change
            known = self._state
            if known is None:
                if fresh and self._digest not in (None, state.digest):
                    return Joined(refused=f"expected the pool {self._digest}, opened {state.digest}")
                known = self._state = state
            done = len(state.changes)
            if known.changes[:done] == state.changes and done < len(known.changes):
                return Joined(behind=known.changes[done:])
            if state != known:
                return Joined(refused=f"the others have the pool {known.digest}, this one has {state.digest}")
            self._members[name] = _Member(handle)
            return Joined()

    async def next(self, name: str) -> Command | bool:
        """The next command for a replica; True: there is none for now; False: it is none of those that answer."""
        member = self._members.get(name)
        if member is None:
            return False
        try:
            return await asyncio.wait_for(member.commands.get(), _POLL)
        except asyncio.TimeoutError:
            return True

    async def reply(self, name: str, number: int, result: Any) -> None:
        """What came of a command."""
        member = self._members.get(name)
        future = None if member is None else member.asked.pop(number, None)
        if future is not None and not future.done():
            future.set_result(result)

    async def change(self, change: Change) -> LoGoError | None:
        """Changes the pool everywhere; what is returned says why it is as it was."""
        async with self._lock:
            if self._state is None or not self._members:
                return NotReady("no replica is ready")
            staged = await self._ask("stage", STAGING, change=change)
            error = _disagreement(staged) or await self._close()
            if error is not None:
                await self._insist("forget")
                await self._insist("open")
                return error
            self._state = State(next(iter(staged.values())), (*self._state.changes, change))
            await self._insist("take", state=self._state)
            await self._insist("open")
            return None

    async def metrics(self) -> dict[str, str]:
        """Those of each replica."""
        found = await self._ask("metrics", _POLL)
        return {name: text for name, text in found.items() if isinstance(text, str)}

    async def drain(self) -> None:
        """No replica takes requests any more."""
        await self._ask("drain", _POLL)

    # -- asking them -----------------------------------------------------------------------------------------------

    async def _close(self) -> LoGoError | None:
        """Makes newcomers wait, and returns when nobody is choosing from the old pool."""
        for name, result in (await self._ask("close", PATIENCE)).items():
            if result is not None:
                return NotReady(f"replica {name} did not pause within {PATIENCE:.0f} s; nothing was changed")
        return None if self._members else NotReady("no replica is left; nothing was changed")

    async def _insist(self, kind: Kind, **more: Any) -> None:
        """All do it, or are ended."""
        for name, result in (await self._ask(kind, PATIENCE, **more)).items():
            if result is not None and name in self._members:
                self._peers.end(self._members.pop(name).handle)

    async def _ask(self, kind: Kind, limit: float, **more: Any) -> dict[str, Any]:
        """What each replica replies, or an error where it does not. Those that have ended are forgotten."""
        asked: dict[str, asyncio.Future[Any]] = {}
        for name, member in self._members.items():
            command = replace(Command(next(self._numbers), kind), **more)
            asked[name] = member.asked[command.number] = asyncio.get_running_loop().create_future()
            member.commands.put_nowait(command)
        end = time.monotonic() + limit
        while waiting := {name: future for name, future in asked.items() if not future.done()}:
            left = end - time.monotonic()
            if left <= 0:
                break
            await asyncio.wait(waiting.values(), timeout=min(left, _LOOK))
            for name, future in waiting.items():
                if not future.done() and await self._peers.gone(self._members[name].handle):
                    del asked[name], self._members[name]
        late = LoGoError(f"no answer within {limit:.0f} s")
        return {name: future.result() if future.done() else late for name, future in asked.items()}


def _disagreement(staged: Mapping[str, Any]) -> LoGoError | None:
    """Why replicas cannot all have a new pool; None if they can."""
    errors = {name: result for name, result in staged.items() if isinstance(result, LoGoError)}
    if errors:
        name, error = next(iter(errors.items()))
        return error if len(errors) == len(staged) else PoolError(f"replica {name}: {error}; nothing was changed")
    if len(set(staged.values())) > 1:
        return PoolError("the replicas find different files in this folder; nothing was changed")
    return None if staged else NotReady("no replica is left; nothing was changed")
