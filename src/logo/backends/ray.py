"""Work on several processes, on one machine or on many, through Ray: each process opens something that is dear to open
(an engine) once, and is then given one item of work after another.

    open -> describe, compared with what the driver expects -> items out, results in as they are done

Ray starts the processes, finds them a place with the CPUs and GPUs they need, and says when one has died. What is ours
is what Ray leaves to its users: an item whose process has died, or that takes too long, goes to another process, three
times at most; a process that has gone is replaced; one that is started later (because a node has joined) gets work.
Knows nothing of evaluation or training. Ray is imported when a `Workers` is made.
"""

from __future__ import annotations

import os
import socket
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Generic, TypeVar

from logo.errors import LoGoError, UsageError

H = TypeVar("H")  # what a process has opened
I = TypeVar("I", bound="Item")  # noqa: E741 - an item of work

AUTO, LOCAL = "auto", "local"

# An item that has taken so many processes with it is given up.
TRIES = 3

# So many processes in a row that ended before they were open: the next would end, too.
_FAILED_STARTS = 3

# Seconds between two looks at deadlines and at what has been opened.
_LOOK = 0.5

# Bytes of Ray's store of objects on this machine: what goes through it are rows and answers.
_STORE = 256_000_000

# Seconds in which a node that is named has to accept a connection.
_CONNECT = 5.0


class WorkersError(LoGoError, RuntimeError):
    """Processes that cannot be started, that have gone, or that are not alike."""


@dataclass(frozen=True)
class Layout:
    """How many processes there are, where, and what each of them gets.

    Attributes:
        count: processes; None: as many as there is room for.
        address: `"local"`: this machine alone; `"auto"`: the cluster that this machine is part of; else a cluster's
            address.
        gpus: of each process; None: one where there are GPUs, else none.
        cpus: of each process; None: on this machine its share of the cores, in a cluster one.
        deadline: seconds that an item may take.
        grace: seconds that processes for which there is room are waited for, once the first one is ready.
    """

    count: int | None = None
    address: str = LOCAL
    gpus: float | None = None
    cpus: int | None = None
    deadline: float = 3600.0
    grace: float = 120.0

    def __post_init__(self) -> None:
        for name, value in (("workers", self.count), ("cpus", self.cpus)):
            if value is not None and value < 1:
                raise UsageError(f"{name}: expected 1 or more, found {value}")
        if self.gpus is not None and self.gpus < 0:
            raise UsageError(f"gpus of a worker: expected 0 or more, found {self.gpus}")
        if self.deadline <= 0:
            raise UsageError(f"deadline: expected more than 0 seconds, found {self.deadline}")


@dataclass(frozen=True)
class Item:
    """One piece of work.

    Attributes:
        args: of the call; what `Workers.shared` returned stands for what it was given.
        size: how much it is, for the speeds that are shown.
    """

    args: tuple[Any, ...]
    size: int


@dataclass(frozen=True)
class Lost:
    """An item without a result: every process that was given it has gone. `reason` says how, in words."""

    reason: str


@dataclass(frozen=True)
class Elsewhere:
    """A result that another process might do better, as where memory did not suffice; the third one is taken."""

    result: Any


@dataclass(frozen=True)
class Refused:
    """An error that a user can mend, as a result: it is no reason to try again elsewhere."""

    error: LoGoError


class _Host:
    """What runs in a process."""

    def __init__(self, open_: Callable[[], Any]) -> None:
        self._open = open_
        self._held: Any = None

    def call(self, what: Callable[..., Any], *args: Any) -> Any:
        """`what(held, *args)`."""
        try:
            if self._held is None:
                self._held = self._open()
            return what(self._held, *args)
        except LoGoError as error:
            return Refused(error.with_traceback(None))


@dataclass(eq=False)
class _Worker:
    """A process, as the driver sees it.

    Attributes:
        name: for people.
        actor: Ray's handle.
        opening: the reference of its description, until it is open.
        item, tries, running: what it is doing, how many processes that item has had before, and the reference of its
            result.
        since: when it began that.
        done: size of the items it has finished; `busy`: seconds they took.
    """

    name: str
    actor: Any
    opening: Any = None
    item: Any = None
    tries: int = 0
    running: Any = None
    since: float = 0.0
    done: int = 0
    busy: float = 0.0


@dataclass
class _Queue(Generic[I]):
    """Items that wait: those that come back go first."""

    source: Iterator[I]
    back: deque[tuple[I, int, _Worker]] = field(default_factory=deque)
    dry: bool = False

    def next(self, worker: _Worker, *, alone: bool) -> tuple[I, int] | None:
        """An item for a process and how many have had it before; None where there is none for this one.

        Args:
            alone: there is no other process, so that it gets what it has brought back, too.
        """
        for at, (item, tries, before) in enumerate(self.back):
            if alone or before is not worker:
                del self.back[at]
                return item, tries
        for item in () if self.dry else self.source:
            return item, 0
        self.dry = True
        return None


class Workers(Generic[H]):
    """Processes that have the same thing open.

    Args:
        layout: how many, where.
        open_: opens it, in each process once.
        describe: what a process says of what it has opened.
        differs: why a description is not what is expected, in words; None if it is. It is given those of processes
            before any work is, and the first one as the second argument.

    Attributes:
        description: of the first process.

    Raises:
        UsageError: Ray is not installed.
        WorkersError: the cluster does not answer, has no room, or its processes are not alike.
        LoGoError: what opening raised in a process.
    """

    def __init__(
        self,
        layout: Layout,
        open_: Callable[[], H],
        describe: Callable[[H], Any],
        differs: Callable[[Any, Any], str | None],
    ) -> None:
        self._ray = _imported()
        self._layout, self._open, self._describe, self._differs = layout, open_, describe, differs
        self._workers: list[_Worker] = []
        self._started = self._failed_starts = 0
        _connect(self._ray, layout)
        try:
            self._share = _share(self._ray, layout)
            for _ in range(self._share.count):
                self._start()
            self.description = self._first(min(self._share.count, self._share.room))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Workers[H]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the processes."""
        for worker in self._workers:
            self._ray.kill(worker.actor, no_restart=True)
        self._workers.clear()
        self._ray.shutdown()

    def shared(self, value: object) -> Any:
        """A reference to a value that many items have as an argument, so that it is sent to each node once."""
        return self._ray.put(value)

    @property
    def speeds(self) -> dict[str, float]:
        """By name of the processes that have finished something: size of items per second."""
        return {worker.name: worker.done / worker.busy for worker in self._workers if worker.busy}

    def ask(self, what: Callable[..., Any], *args: Any) -> Any:
        """What one process answers to `what(held, *args)`, after what it is doing; however long it takes.

        Raises:
            WorkersError: three processes have gone over it.
            LoGoError: as `what` does.
        """
        reason = "none was open"
        for _ in range(TRIES):
            self._look_at_openings()
            ready = [worker for worker in self._workers if worker.opening is None]
            if not ready:
                break
            worker = min(ready, key=lambda one: one.running is not None)
            try:
                result = self._ray.get(worker.actor.call.remote(what, *args))
            except self._gone as error:
                reason = f"the last one {_how(error)}"
                if worker.running is None:  # what it is doing is seen to by `map`
                    self._end(worker)
                    self._start()
                continue
            if isinstance(result, Refused):
                raise result.error
            return result
        raise WorkersError(f"no worker could do what one of them has to do for all: {reason}")

    def map(self, items: Iterable[I], what: Callable[..., Any]) -> Iterator[tuple[I, Any]]:
        """Each item with `what(held, *item.args)`, or `Lost`, in the order in which they are done.

        Items are taken from `items` when a process is free. One `map` runs at a time; `ask` may be called meanwhile.

        Raises:
            WorkersError: no process is left, and none can be started.
            LoGoError: as `what` does; other errors of it are raised as they are.
        """
        queue: _Queue[I] = _Queue(iter(items))
        mine: set[_Worker] = set()
        idle_since = time.monotonic()
        while True:
            self._look_at_openings()
            for worker in self._free():
                found = queue.next(worker, alone=len(self._workers) == 1)
                if found is None:
                    continue
                worker.item, worker.tries = found
                worker.running = worker.actor.call.remote(what, *worker.item.args)
                worker.since = time.monotonic()
                mine.add(worker)
            if not mine and not queue.back and queue.dry:
                return
            if any(worker.opening is None for worker in self._workers):
                idle_since = time.monotonic()
            elif time.monotonic() - idle_since > self._layout.deadline:
                raise WorkersError(f"no worker for {self._layout.deadline:.0f} s: the cluster has no room for any")
            done, _ = self._ray.wait(self._references(), num_returns=1, timeout=_LOOK)
            for worker in [one for one in mine if one.running in done or self._late(one)]:
                mine.discard(worker)
                yield from self._finished(worker, queue)

    # -- processes -----------------------------------------------------------------------------------------------

    def _start(self) -> None:
        self._started += 1
        made = self._ray.remote(_Host).options(
            num_cpus=self._share.cpus,
            num_gpus=self._share.gpus,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(self._share.cpus)}},
            max_restarts=0,
        )
        actor = made.remote(self._open)
        self._workers.append(_Worker(f"worker {self._started}", actor, actor.call.remote(self._describe)))

    def _first(self, expected: int) -> Any:
        """The description of the first process, when all have said theirs that there is room for."""
        opened: list[Any] = []
        limit = float("inf")
        while len(opened) < expected and time.monotonic() < limit:
            opening = [worker for worker in self._workers if worker.opening is not None]
            done, _ = self._ray.wait([worker.opening for worker in opening], num_returns=1, timeout=_LOOK)
            for worker in [one for one in opening if one.opening in done]:
                try:
                    found = self._ray.get(worker.opening)
                except self._gone as error:
                    self._again(worker, _how(error))
                    continue
                if isinstance(found, Refused):
                    raise found.error
                worker.opening = None
                opened.append(found)
                limit = min(limit, time.monotonic() + self._layout.grace)
                reason = self._differs(found, opened[0])
                if reason is not None:
                    raise WorkersError(f"{worker.name} is not like the driver: {reason}")
        return opened[0]

    def _look_at_openings(self) -> None:
        """Takes up processes that have opened by now. One that is not like the others gets no work."""
        opening = {worker.opening: worker for worker in self._workers if worker.opening is not None}
        if not opening:
            return
        done, _ = self._ray.wait(list(opening), num_returns=len(opening), timeout=0)
        for reference in done:
            worker = opening[reference]
            try:
                found = self._ray.get(reference)
            except self._gone as error:
                self._again(worker, _how(error))
                continue
            reason = str(found.error) if isinstance(found, Refused) else self._differs(found, self.description)
            if reason is None:
                worker.opening, self._failed_starts = None, 0
            else:
                warnings.warn(f"{worker.name} gets no work: {reason}", UserWarning, stacklevel=3)
                self._end(worker)

    def _again(self, worker: _Worker, how: str) -> None:
        """Replaces a process that ended before it was open."""
        self._failed_starts += 1
        self._end(worker)
        if self._failed_starts >= _FAILED_STARTS and not any(one.opening is None for one in self._workers):
            raise WorkersError(f"{self._failed_starts} workers ended before they were ready; the last one {how}")
        self._start()

    def _end(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        self._ray.kill(worker.actor, no_restart=True)

    def _free(self) -> list[_Worker]:
        return [worker for worker in self._workers if worker.opening is None and worker.running is None]

    def _references(self) -> list[Any]:
        found = [worker.running or worker.opening for worker in self._workers]
        references = [reference for reference in found if reference is not None]
        if not references:
            raise WorkersError("no worker is left")
        return references

    def _late(self, worker: _Worker) -> bool:
        return time.monotonic() - worker.since > self._layout.deadline

    # -- results -------------------------------------------------------------------------------------------------

    def _finished(self, worker: _Worker, queue: _Queue[I]) -> Iterator[tuple[I, Any]]:
        """The item of a process with its result; or nothing, and the item goes back into the queue."""
        item, running, worker.item, worker.running = worker.item, worker.running, None, None
        done, _ = self._ray.wait([running], timeout=0)
        try:
            if not done:
                raise TimeoutError(f"gave no answer within {self._layout.deadline:.0f} s")
            result = self._ray.get(running)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except self._gone as error:
            self._end(worker)
            self._start()
            if worker.tries + 1 < TRIES:
                queue.back.append((item, worker.tries + 1, worker))
            else:
                yield item, Lost(f"{TRIES} workers in a row did not finish it; the last one {_how(error)}")
            return
        if isinstance(result, Refused):
            raise result.error
        worker.done, worker.busy = worker.done + item.size, worker.busy + time.monotonic() - worker.since
        if isinstance(result, Elsewhere):
            if worker.tries + 1 < TRIES:
                queue.back.append((item, worker.tries + 1, worker))
                return
            result = result.result
        yield item, result

    @property
    def _gone(self) -> tuple[type[Exception], ...]:
        """What Ray raises where a process or a node has gone, as against an error of what it ran."""
        errors = self._ray.exceptions
        return (errors.RayActorError, errors.WorkerCrashedError, errors.OutOfMemoryError, errors.ObjectLostError) + (
            errors.NodeDiedError,
            TimeoutError,
        )


def _how(error: Exception) -> str:
    """How a process has gone, in a few words."""
    if isinstance(error, TimeoutError):
        return str(error)
    if type(error).__name__ == "OutOfMemoryError":
        return "was ended because its node had no memory left"
    last = str(error).strip().splitlines()[-1].strip()  # where something was raised: what
    return f"ended ({type(error).__name__}: {last[:200]})"


def _imported() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody asked to have anything reported
    try:
        import ray
    except ImportError:
        raise UsageError("workers need Ray: pip install 'lora-on-the-go[ray]'") from None
    return ray


@dataclass(frozen=True)
class _Share:
    """What there is for each process.

    Attributes:
        count: of processes; `room`: for so many there is room now.
        cpus, gpus: of each.
    """

    count: int
    room: int
    cpus: int
    gpus: float


def _connect(ray: Any, layout: Layout) -> None:
    """Makes this process a driver."""
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if ray.is_initialized():
        raise WorkersError("this process uses Ray already")
    if layout.address == LOCAL:
        cores = os.cpu_count() or 1
        cpus = max(cores, (layout.count or 1) * (layout.cpus or 1))  # more processes than cores share them
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, object_store_memory=_STORE, **quiet)
        return
    _check_answers(layout.address)
    try:
        ray.init(address=layout.address, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = "no cluster was found" if layout.address == AUTO else f"{layout.address} does not answer"
        said = " ".join(str(error).split())[:200]
        raise WorkersError(f"Ray: {where} ({said}); `ray start --head` starts one") from None


def _check_answers(address: str) -> None:
    """Ray itself tries for minutes."""
    if address == AUTO:
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise UsageError(f"--ray {address}: expected auto, local or HOST:PORT")
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT).close()
    except OSError as error:
        said = error.strerror or error
        raise WorkersError(f"Ray: {address} does not answer ({said}); `ray start --head` starts one") from None


def _share(ray: Any, layout: Layout) -> _Share:
    """What there is for each process.

    Raises:
        WorkersError: there is room for none; or on this machine, for fewer than are asked for.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus_there, cpus_there = (sum(node.get(kind, 0.0) for node in nodes) for kind in ("GPU", "CPU"))
    gpus = float(gpus_there > 0) if layout.gpus is None else layout.gpus
    local = layout.address == LOCAL
    alone = max(1, int(gpus_there // gpus)) if gpus else 1
    cpus = layout.cpus or (max(1, (os.cpu_count() or 1) // (layout.count or alone)) if local else 1)
    room = sum(_fit(node, cpus, gpus) for node in nodes)
    count = layout.count or (min(alone, room) if local else room)
    if not room or (local and room < count):
        what = f"{max(count, 1)} workers of {cpus} CPUs and {gpus:g} GPUs each"
        where = "this machine" if local else "the cluster"
        raise WorkersError(f"no room for {what}: {where} has {cpus_there:g} CPUs and {gpus_there:g} GPUs")
    return _Share(count, room, cpus, gpus)


def _fit(node: dict[str, float], cpus: int, gpus: float) -> int:
    fit = node.get("CPU", 0.0) // cpus
    return int(min(fit, node.get("GPU", 0.0) // gpus) if gpus else fit)
