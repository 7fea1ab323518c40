"""`Coordinator`: one pool in many replicas, changed in all of them or in none.

    stage (each prepares the new pool) -> close (new requests wait) -> take (each answers from it) -> open

A closed replica gives no answer that depends on its pool, and no replica opens before all have taken the new pool, so a
client that has seen an answer from the new pool never gets one from the old pool later. A failure before `take` changes
nothing. A replica that fails later is ended, since its pool is outdated. A replica that starts later gets all changes
before it may answer. A replica without contact to a coordinator stops answering after a while, so that a restarted
coordinator knows when only its own members answer.

Neither Ray nor engines are known here: replicas fetch commands (`next`) and report results (`reply`).
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

# The most seconds for preparing a new pool, and for any other command.
STAGING, PATIENCE = 900.0, 60.0

# Seconds for which a replica answers without contact to a coordinator. A restarted coordinator changes nothing for so
# long, after which only replicas that it knows answer.
LEASE = 120.0
REFUSED = LEASE + 10.0

# Seconds between two checks whether a silent replica still exists.
_LOOK = 1.0

# Seconds for which a replica waits for a command.
_POLL = 10.0

# Seconds that metrics wait for a replica, less than the timeout of scrapers.
_SCRAPE = 2.0
_CHANGED = ": if files of adapters or their example prompts have changed since the server started, restart all replicas"


@dataclass(frozen=True)
class State:
    """The pool that all replicas have.

    Attributes:
        digest: of names and contents, see `pool_digest`.
        changes: the changes since replicas opened it; at most one per name, so that the folder of a removed adapter
            may be deleted.
        version: the number of changes.
    """

    digest: str
    changes: tuple[Change, ...] = ()
    version: int = 0

    def after(self, change: Change, digest: str) -> State:
        """The state after a change."""
        net = {one.name: one for one in self.changes}
        before = net.pop(change.name, None)
        if before is None:
            net[change.name] = change
        elif change.folder is not None:  # the opened pool has an adapter of that name, unless it was added later
            net[change.name] = Change(change.name, change.folder, before.folder is None or before.replace)
        elif before.folder is None or before.replace:
            net[change.name] = change
        return State(digest, tuple(net.values()), self.version + 1)

    def towards(self, later: State) -> tuple[Change, ...]:
        """The changes from this state to a later one."""
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
    """A command for one replica.

    Attributes:
        number: of the command, for its reply.
        change: the change to stage.
        state: the state after `take`.
    """

    number: int
    kind: Kind
    change: Change | None = None
    state: State | None = None


@dataclass(frozen=True)
class Joined:
    """The answer to a replica that wants to serve; it may, unless `behind` or `refused` is set.

    Attributes:
        state: the state of the others.
        behind: changes that it has to make first.
        refused: why it may not serve.
    """

    state: State
    behind: tuple[Change, ...] = ()
    refused: str | None = None


class Peers(Protocol):
    """Checks and ends replicas from outside, by their handles."""

    async def answering(self) -> bool:
        """Whether any replica accepts requests."""

    async def gone(self, handle: Any) -> bool:
        """Whether a replica has certainly ended."""

    def end(self, handle: Any) -> None:
        """Ends a replica."""


@dataclass
class _Member:
    """A replica that serves.

    Attributes:
        waiting: commands that it has not fetched, by number.
        asked: futures of the results that are still awaited.
        more: set when there may be a command.
    """

    handle: Any
    waiting: dict[int, Command] = field(default_factory=dict)
    asked: dict[int, asyncio.Future[Any]] = field(default_factory=dict)
    more: asyncio.Event = field(default_factory=asyncio.Event)

    def ask(self, command: Command) -> asyncio.Future[Any]:
        """Queues a command, and returns the future of its result."""
        found = self.asked[command.number] = asyncio.get_running_loop().create_future()
        self.waiting[command.number] = command
        self.more.set()
        return found

    def drop(self, number: int) -> None:
        """Drops a command whose result is not awaited any more, unless it was fetched."""
        self.waiting.pop(number, None)
        self.asked.pop(number, None)

    async def fetched(self) -> Command:
        """The next command."""
        while not self.waiting:
            self.more.clear()
            await self.more.wait()
        return self.waiting.pop(next(iter(self.waiting)))


class Coordinator:
    """Keeps the pools of all replicas equal.

    Args:
        peers: checks and ends replicas.
        digest: of the pool that replicas have to open; None: that of the first one.
        settle: seconds for which a new replica waits for older ones, from which a restarted coordinator learns the
            changes.
    """

    def __init__(self, peers: Peers, digest: str | None = None, settle: float = 5.0) -> None:
        self._peers, self._digest = peers, digest
        self._began = time.monotonic()
        self._settled = self._began + settle
        self._again = False  # this coordinator was restarted
        self._state: State | None = None
        self._members: dict[str, _Member] = {}
        self._lock = asyncio.Lock()
        self._changing: set[asyncio.Task[LoGoError | None]] = set()
        self._numbers = itertools.count(1)

    # -- called by replicas ----------------------------------------------------------------------------------------

    async def join(self, name: str, handle: Any, state: State, *, fresh: bool) -> Joined:
        """Lets a replica serve if its pool equals that of the others.

        Args:
            fresh: whether it has not served yet.
        """
        while fresh and self._state is None and (left := self._settled - time.monotonic()) > 0:
            await asyncio.sleep(min(left, 0.1))
        async with self._lock:  # not during a change
            known = self._state
            if known is None:
                if fresh and self._digest not in (None, state.digest):
                    return Joined(state, refused=f"expected the pool {self._digest}, opened {state.digest}{_CHANGED}")
                # A replica that serves already has joined an earlier coordinator.
                self._again = not fresh or await self._peers.answering()
                known = self._state = state
            if state.digest != known.digest:
                if state.version < known.version and (behind := state.towards(known)):
                    return Joined(known, behind)
                said = f"the others have the pool {known.digest}, this one has {state.digest}{_CHANGED}"
                return Joined(known, refused=said)
            self._members[name] = _Member(handle)
            return Joined(known)

    async def next(self, name: str) -> Command | bool:
        """The next command for a replica; True: there is none now; False: the replica is not a member."""
        member = self._members.get(name)
        if member is None:
            return False
        try:
            return await asyncio.wait_for(member.fetched(), _POLL)
        except asyncio.TimeoutError:
            return True

    async def reply(self, name: str, number: int, result: Any) -> None:
        """Takes the result of a command."""
        member = self._members.get(name)
        future = None if member is None else member.asked.pop(number, None)
        if future is not None and not future.done():
            future.set_result(result)

    async def change(self, change: Change) -> LoGoError | None:
        """Changes the pool of all replicas; returns the reason if nothing was changed.

        A change that has begun is completed even if the client has left.
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
                said = "the replicas' coordinator has restarted and does not know all replicas yet"
                return NotReady(f"{said}; try again in {left:.0f} s")
            try:
                staged = await self._ask("stage", STAGING, change=change)
                error = _disagreement(staged) or await self._close()
            except Exception:  # after an error no replica may stay closed
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
        """The metrics of each replica; None if it does not answer."""
        found = await self._ask("metrics", _SCRAPE)
        return {name: text if isinstance(text, str) else None for name, text in found.items()}

    async def drain(self) -> None:
        """Makes all replicas refuse new requests."""
        await self._ask("drain", _POLL)

    # -- commands --------------------------------------------------------------------------------------------------

    async def _close(self) -> LoGoError | None:
        """Makes new requests wait, and returns when no request selects from the old pool."""
        for name, result in (await self._ask("close", PATIENCE)).items():
            if result is not None:
                return NotReady(f"replica {name} did not pause within {PATIENCE:.0f} s; nothing was changed")
        return None if self._members else NotReady("no replica is left; nothing was changed")

    async def _undo(self) -> None:
        await self._insist("forget")
        await self._insist("open")

    async def _insist(self, kind: Kind, **more: Any) -> None:
        """Gives all replicas a command; those that fail are ended."""
        for name, result in (await self._ask(kind, PATIENCE, **more)).items():
            if result is not None and name in self._members:
                self._peers.end(self._members.pop(name).handle)

    async def _ask(self, kind: Kind, limit: float, **more: Any) -> dict[str, Any]:
        """The reply of each replica, or an error if there is none. Replicas that have ended are removed."""
        members = dict(self._members)  # another command may find that one of them has ended
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
        """The members that have certainly ended, as far as that is known soon."""
        looks = {name: asyncio.ensure_future(self._peers.gone(member.handle)) for name, member in members.items()}
        left = end - time.monotonic()
        if looks and left > 0:
            await asyncio.wait(looks.values(), timeout=min(left, _LOOK))
        found = []
        for name, look in looks.items():
            if not look.done():
                look.cancel()
            elif (error := look.exception()) is not None:  # says nothing about the replica
                _log.warning("cannot tell whether the replica %s is there: %r", name, error)
            elif look.result():
                found.append(name)
        return found


def _disagreement(staged: Mapping[str, Any]) -> LoGoError | None:
    """Why replicas do not all have the same new pool; None if they do."""
    errors = {name: result for name, result in staged.items() if isinstance(result, LoGoError)}
    if errors:
        name, error = next(iter(errors.items()))
        return error if len(errors) == len(staged) else PoolError(f"replica {name}: {error}; nothing was changed")
    if len(set(staged.values())) > 1:
        return PoolError("the replicas find different files in this folder; nothing was changed")
    return None if staged else NotReady("no replica is left; nothing was changed")
