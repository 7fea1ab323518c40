"""`Coordinator`: one pool in many replicas, changed in all of them or in none.

    stage (each prepares the new pool) -> close (new requests wait) -> take (each uses it) -> open

A closed replica gives no answer that depends on its pool, and no replica is opened before all have taken the new pool.
A client that has seen an answer from the new pool therefore gets none from the old one afterwards. A failure before
`take` changes nothing anywhere. A replica that fails after it is ended, since it may neither answer nor keep the old
pool. A replica that starts later gets the changes before it may answer. A replica without contact to a coordinator
stops answering after a while, so that a restarted coordinator knows all replicas that answer.

This module knows neither Ray nor engines: replicas fetch commands (`next`) and report results (`reply`).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from logo.errors import LoGoError, PoolError
from logo.protocol import NotReady
from logo.serving.pool import Change

_log = logging.getLogger("logo.serving")

Kind = Literal["stage", "forget", "close", "take", "open", "metrics", "drain"]

# Seconds: that a new pool may take to be made ready, and that anything else may take.
STAGING, PATIENCE = 900.0, 60.0

# Seconds for which a replica answers that hears nothing of a coordinator; and for which a coordinator that is started
# again changes nothing, so that by then no replica answers that it does not know.
LEASE = 120.0
REFUSED = LEASE + 10.0

# Seconds between two looks at whether a replica that does not answer is there.
_LOOK = 1.0

# Seconds for which a replica's question stays open.
_POLL = 10.0

# Seconds that metrics wait for a replica: less than whoever scrapes them has patience for.
_SCRAPE = 2.0


@dataclass(frozen=True)
class State:
    """The pool that all replicas have.

    Attributes:
        digest: of names and contents, see `pool_digest`.
        changes: the changes since the replicas opened the pool, at most one for each name, so that the folder of a
            removed adapter is no longer needed.
        version: number of changes.
    """

    digest: str
    changes: tuple[Change, ...] = ()
    version: int = 0

    def after(self, change: Change, digest: str) -> State:
        """The state that a change leads to."""
        net = {one.name: one for one in self.changes}
        before = net.pop(change.name, None)
        if before is None:
            net[change.name] = change
        elif change.folder is not None:  # the pool that is opened has one of that name, unless it was added
            net[change.name] = Change(change.name, change.folder, before.folder is None or before.replace)
        elif before.folder is None or before.replace:
            net[change.name] = change
        return State(digest, tuple(net.values()), self.version + 1)

    def towards(self, later: State) -> tuple[Change, ...]:
        """The changes that lead from this state's pool to a later state's."""
        own = {one.name: one for one in self.changes}
        wanted = {one.name: one for one in later.changes}
        gone = tuple(Change(name) for name in own if name not in wanted)
        return gone + tuple(
            one if one.folder is None or one.name not in own else replace(one, replace=True)
            for name, one in wanted.items()
            if own.get(name) != one
        )


@dataclass(frozen=True)
class Command:
    """A command to one replica.

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
    """The answer to a replica that wants to take requests. It may, if `behind` and `refused` are empty.

    Attributes:
        state: the state of the others.
        behind: changes of the pool that it has to make first.
        refused: why it must not join.
    """

    state: State
    behind: tuple[Change, ...] = ()
    refused: str | None = None


class Peers(Protocol):
    """Access to replicas by their handles."""

    async def answering(self) -> bool:
        """Whether any replica takes requests."""

    async def gone(self, handle: Any) -> bool:
        """Whether a replica has certainly ended."""

    def end(self, handle: Any) -> None:
        """Ends a replica."""


@dataclass
class _Member:
    """A replica that answers.

    Attributes:
        waiting: commands that it has not fetched, by number.
        asked: replies that somebody still waits for.
        more: set when there may be a command.
    """

    handle: Any
    waiting: dict[int, Command] = field(default_factory=dict)
    asked: dict[int, asyncio.Future[Any]] = field(default_factory=dict)
    more: asyncio.Event = field(default_factory=asyncio.Event)

    def ask(self, command: Command) -> asyncio.Future[Any]:
        """The future reply to a command."""
        found = self.asked[command.number] = asyncio.get_running_loop().create_future()
        self.waiting[command.number] = command
        self.more.set()
        return found

    def drop(self, number: int) -> None:
        """Cancels a command that nobody waits for, if it has not been fetched."""
        self.waiting.pop(number, None)
        self.asked.pop(number, None)

    async def fetched(self) -> Command:
        """The next command."""
        while not self.waiting:
            self.more.clear()
            await self.more.wait()
        return self.waiting.pop(next(iter(self.waiting)))


class Coordinator:
    """Knows the replicas and their pool.

    Args:
        peers: tells whether replicas exist.
        digest: of the pool that replicas have to open; None: of the first one's.
        settle: seconds for which a new replica waits for others that may have existed before. They know the changes of
            the pool, from which a restarted coordinator learns.
    """

    def __init__(self, peers: Peers, digest: str | None = None, settle: float = 5.0) -> None:
        self._peers, self._digest = peers, digest
        self._began = time.monotonic()
        self._settled = self._began + settle
        self._again = False  # others have had a coordinator before this one
        self._state: State | None = None
        self._members: dict[str, _Member] = {}
        self._lock = asyncio.Lock()
        self._changing: set[asyncio.Task[LoGoError | None]] = set()
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
                    return Joined(state, refused=f"expected the pool {self._digest}, opened {state.digest}")
                # A replica that joins first takes no requests yet: who does, has joined another coordinator.
                self._again = not fresh or await self._peers.answering()
                known = self._state = state
            if state.digest != known.digest:
                if state.version < known.version and (behind := state.towards(known)):
                    return Joined(known, behind)
                said = f"the others have the pool {known.digest}, this one has {state.digest}"
                return Joined(known, refused=said)
            self._members[name] = _Member(handle)
            return Joined(known)

    async def next(self, name: str) -> Command | bool:
        """The next command for a replica; True: there is none for now; False: it is none of those that answer."""
        member = self._members.get(name)
        if member is None:
            return False
        try:
            return await asyncio.wait_for(member.fetched(), _POLL)
        except asyncio.TimeoutError:
            return True

    async def reply(self, name: str, number: int, result: Any) -> None:
        """What came of a command."""
        member = self._members.get(name)
        future = None if member is None else member.asked.pop(number, None)
        if future is not None and not future.done():
            future.set_result(result)

    async def change(self, change: Change) -> LoGoError | None:
        """Changes the pool everywhere; what is returned says why it is as it was.

        What has been begun is ended, though whoever has asked for it may be gone.
        """
        task = asyncio.create_task(self._change(change))
        self._changing.add(task)
        task.add_done_callback(self._changing.discard)
        return await asyncio.shield(task)

    async def _change(self, change: Change) -> LoGoError | None:
        async with self._lock:
            if self._state is None or not self._members:
                return NotReady("no replica is ready")
            if self._again and (left := self._began + REFUSED - time.monotonic()) > 0:
                said = "the replicas' coordinator has started again, and does not know all of them yet"
                return NotReady(f"{said}; try again in {left:.0f} s")
            try:
                staged = await self._ask("stage", STAGING, change=change)
                error = _disagreement(staged) or await self._close()
            except Exception:  # what went wrong here leaves nobody closed
                await self._undo()
                raise
            if error is not None:
                await self._undo()
                return error
            self._state = self._state.after(change, next(iter(staged.values())))
            await self._insist("take", state=self._state)
            await self._insist("open")
            return None

    async def metrics(self) -> dict[str, str | None]:
        """Those of each replica; None: it does not answer."""
        found = await self._ask("metrics", _SCRAPE)
        return {name: text if isinstance(text, str) else None for name, text in found.items()}

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

    async def _undo(self) -> None:
        await self._insist("forget")
        await self._insist("open")

    async def _insist(self, kind: Kind, **more: Any) -> None:
        """All do it, or are ended."""
        for name, result in (await self._ask(kind, PATIENCE, **more)).items():
            if result is not None and name in self._members:
                self._peers.end(self._members.pop(name).handle)

    async def _ask(self, kind: Kind, limit: float, **more: Any) -> dict[str, Any]:
        """What each replica replies, or an error where it does not. Those that have ended are forgotten."""
        members = dict(self._members)  # another question may find out meanwhile that one of them has ended
        commands = {name: replace(Command(next(self._numbers), kind), **more) for name in members}
        asked = {name: member.ask(commands[name]) for name, member in members.items()}
        end = time.monotonic() + limit
        try:
            while waiting := [name for name, future in asked.items() if not future.done()]:
                left = end - time.monotonic()
                if left <= 0:
                    break
                await asyncio.wait([asked[name] for name in waiting], timeout=min(left, _LOOK, limit / 2))
                silent = [name for name in waiting if not asked[name].done()]
                for name in await self._ended({name: members[name] for name in silent}, end):
                    del asked[name]
                    if self._members.get(name) is members[name]:
                        del self._members[name]
        finally:
            for name, member in members.items():
                member.drop(commands[name].number)
        late = LoGoError(f"no answer within {limit:.0f} s")
        return {name: future.result() if future.done() else late for name, future in asked.items()}

    async def _ended(self, members: Mapping[str, _Member], end: float) -> list[str]:
        """Those that have certainly ended, as far as that can be known soon."""
        looks = {name: asyncio.ensure_future(self._peers.gone(member.handle)) for name, member in members.items()}
        left = end - time.monotonic()
        if looks and left > 0:
            await asyncio.wait(looks.values(), timeout=min(left, _LOOK))
        found = []
        for name, look in looks.items():
            if not look.done():
                look.cancel()
            elif (error := look.exception()) is not None:  # which says nothing of the replica
                _log.warning("cannot tell whether the replica %s is there: %r", name, error)
            elif look.result():
                found.append(name)
        return found


def _disagreement(staged: Mapping[str, Any]) -> LoGoError | None:
    """Why the replicas cannot all have a new pool; None if they can."""
    errors = {name: result for name, result in staged.items() if isinstance(result, LoGoError)}
    if errors:
        name, error = next(iter(errors.items()))
        return error if len(errors) == len(staged) else PoolError(f"replica {name}: {error}; nothing was changed")
    if len(set(staged.values())) > 1:
        return PoolError("the replicas find different files in this folder; nothing was changed")
    return None if staged else NotReady("no replica is left; nothing was changed")
