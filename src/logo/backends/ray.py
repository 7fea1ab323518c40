"""Work divided among several processes, on one machine or on many, through Ray: each process opens an engine (or
anything that takes long to open) once, and then gets one item of work after another.

    open -> describe, compared with the driver's expectation -> items out, results in as they are done

Ray starts the processes, places them on CPUs and GPUs, and reports dead ones. This module adds the rest: an item whose
process has died, or that takes too long, goes to another process, at most three times; a dead process is replaced; a
process that starts later (because a node has joined) gets work. It knows nothing of evaluation or training. Ray is
imported when a `Workers` is made.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Generic, TypeVar

from logo import plugins
from logo.backends.cluster import Layout, WorkersError, connect, imported, process_resources
from logo.backends.host import Answer, Host, Refused, Shared
from logo.backends.items import I, Lost, Queue
from logo.backends.process import Process, how_ended

H = TypeVar("H")  # what a process has opened

# The most processes that get one item, or one call of `ask`, before it is given up.
TRIES = 3

# After so many processes in a row that ended before they were open, no more are started.
_FAILED_STARTS = 3

# Seconds between two checks of deadlines and of processes that are still opening.
_LOOK = 0.5


class Workers(Generic[H]):
    """Processes that have each opened the same thing, such as an engine.

    Args:
        layout: number, place and resources of the processes.
        open_: called once in each process; its result is the `held` of `ask` and `map`.
        describe: describes what a process has opened.
        differs: compares the description of a process with that of the first one (second argument), before the process
            gets work; returns why it is not the expected one, in words, or None.

    Attributes:
        description: what `describe` returned in the first process.

    Raises:
        MissingLibrary: Ray is not installed.
        WorkersError: the cluster does not answer, has no room, or its processes differ.
        LoGoError: an error of `open_` in a process.
    """

    def __init__(
        self,
        layout: Layout,
        open_: Callable[[], H],
        describe: Callable[[H], Any],
        differs: Callable[[Any, Any], str | None],
    ) -> None:
        self._ray = imported()
        self._layout, self._open, self._describe, self._differs = layout, open_, describe, differs
        self._workers: list[Process] = []
        self._started = self._failed_starts = 0
        self._queue: Queue[Any] | None = None  # of the `map` that runs
        self._next: list[tuple[Any, Any]] = []  # results that it yields next
        self._warned: set[str] = set()
        connect(self._ray, layout)
        try:
            self._share = process_resources(self._ray, layout)
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

    def shared(self, value: object) -> Shared:
        """A value that is an argument of many items."""
        return Shared(self._ray.put(value))

    @property
    def count(self) -> int:
        """The requested number of processes."""
        return self._share.count

    @property
    def speeds(self) -> dict[str, float]:
        """Size of items per second, by name of the processes that have finished something."""
        return {worker.name: worker.done / worker.busy for worker in self._workers if worker.busy}

    def ask(self, what: Callable[..., Any], *args: Any) -> Any:
        """Runs `what(held, *args)` in one process, without a deadline, and returns the result. An idle process is taken
        if there is one; a busy one finishes its item first. The deadlines of a running `map` are enforced meanwhile.

        Raises:
            WorkersError: three processes in turn died while they ran it.
            LoGoError: an error of `what`.
        """
        reason, tries = "", 0
        while tries < TRIES:
            worker = self._ready()
            running = worker.actor.call.remote(what, *args)
            try:
                while not self._ray.wait([running], timeout=_LOOK)[0]:
                    self._end_late()
                result = self._got(running)
            except self._gone as error:
                reason = f"the last one {how_ended(error)}"
                if worker in self._workers:  # else it was ended for its late item, not for this call
                    tries += 1
                    self._next += self._finished(worker) if self._is_done(worker) else []
                    if worker in self._workers:
                        self._over(worker, how_ended(error))
                continue
            if isinstance(result, Refused):
                raise result.error
            return result
        raise WorkersError(f"no worker could finish a step on which all workers depend: {reason}")

    def map(self, items: Iterable[I], what: Callable[..., Any]) -> Iterator[tuple[I, Any]]:
        """Yields each item with the result of `what(held, *item.args)`, or with `Lost`, in the order of completion.

        Items are taken from `items` when a process is free. One `map` runs at a time; `ask` may be called meanwhile.

        Raises:
            WorkersError: no process is left, and none can be started.
            LoGoError: an error of `what`; its other errors are raised unchanged, too.
        """
        queue: Queue[I] = Queue(iter(items))
        self._queue, self._next = queue, []
        idle_since = time.monotonic()
        try:
            while True:
                self._look_at_openings()
                for worker in self._free():
                    self._give(worker, queue, what)
                found, self._next = self._next, []
                yield from found
                if not queue.back and queue.dry and all(worker.item is None for worker in self._workers):
                    return
                if any(worker.opening is None for worker in self._workers):
                    idle_since = time.monotonic()
                else:
                    self._check_wait(idle_since)
                done = self._wait()
                for worker in [one for one in self._workers if one.running in done]:
                    if worker.running in done:  # an `ask` by the consumer may have collected this result
                        yield from self._finished(worker)
                self._end_late()
        finally:
            self._queue = None
            for worker in self._workers:
                worker.item = None  # nobody waits for its result any more

    def _give(self, worker: Process, queue: Queue[I], what: Callable[..., Any]) -> None:
        """Gives a free process the next item, if the queue has one that this process may get."""
        if worker not in self._workers:
            return
        opened = sum(one.opening is None for one in self._workers)
        found = queue.next(worker, alone=opened == 1)
        if found is None:
            return
        if worker not in self._workers:  # an `ask` by the source of items has ended it meanwhile
            queue.back.append((*found, worker))
            return
        worker.item, worker.tries = found
        worker.running = worker.actor.call.remote(what, *worker.item.args)
        worker.since = time.monotonic()

    def _ready(self) -> Process:
        """An open process, an idle one if possible; waits until there is one."""
        idle_since = time.monotonic()
        self._look_at_openings()
        while not (ready := [worker for worker in self._workers if worker.opening is None]):
            self._check_wait(idle_since)
            self._wait()
            self._look_at_openings()
        return min(ready, key=lambda one: one.running is not None)

    def _check_wait(self, since: float) -> None:
        if time.monotonic() - since > self._layout.start:
            raise WorkersError(
                f"no worker could start within {self._layout.start:g} s: the cluster has no room for one, or opening "
                "takes longer; give each worker fewer CPUs or GPUs, or see Ray's logs for what it waits for"
            )

    # -- processes -----------------------------------------------------------------------------------------------

    def _start(self) -> None:
        self._started += 1
        made = self._ray.remote(Host).options(
            num_cpus=self._share.cpus,
            num_gpus=self._share.gpus,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(self._share.cpus), **plugins.environment()}},
            max_restarts=0,
        )
        actor = made.remote(self._open)
        self._workers.append(Process(f"worker {self._started}", actor, actor.call.remote(self._describe)))

    def _first(self, expected: int) -> Any:
        """The description of the first process, once `expected` processes are open or the grace period is over."""
        opened: list[Any] = []
        limit, began = float("inf"), time.monotonic()
        while len(opened) < expected and time.monotonic() < limit:
            opening = [worker for worker in self._workers if worker.opening is not None]
            if not opening:  # no more are started in place of those that have ended
                break
            done, _ = self._ray.wait([worker.opening for worker in opening], num_returns=1, timeout=_LOOK)
            if not opened:
                self._check_wait(began)
            for worker in [one for one in opening if one.opening in done]:
                try:
                    found = self._got(worker.opening)
                except self._ray.exceptions.RayTaskError as error:
                    raise error.cause from None
                except self._gone as error:
                    self._again(worker, how_ended(error))
                    continue
                if isinstance(found, Refused):
                    raise found.error
                worker.opening = None
                opened.append(found)
                limit = min(limit, time.monotonic() + self._layout.grace)
                reason = self._differs(found, opened[0])
                if reason is not None:
                    raise WorkersError(f"{worker.name} differs from the driver: {reason}")
        return opened[0]

    def _look_at_openings(self) -> None:
        """Marks processes that have opened by now as free for work, and ends those that differ from the others."""
        opening = {worker.opening: worker for worker in self._workers if worker.opening is not None}
        if not opening:
            return
        done, _ = self._ray.wait(list(opening), num_returns=len(opening), timeout=0)
        for reference in done:
            worker = opening[reference]
            reason: str | None
            try:
                found = self._got(reference)
            except self._ray.exceptions.RayTaskError as error:  # the others continue without it
                reason = " ".join(f"{type(error.cause).__name__}: {error.cause}".split())[:200]
            except self._gone as error:
                self._again(worker, how_ended(error))
                continue
            else:
                reason = str(found.error) if isinstance(found, Refused) else self._differs(found, self.description)
            if reason is None:
                worker.opening, self._failed_starts = None, 0
            else:
                self._give_up(worker, reason)

    def _give_up(self, worker: Process, reason: str) -> None:
        """Ends a process without replacing it, since a new one would fail alike; its item goes to another process."""
        warnings.warn(f"{worker.name} gets no work: {reason}", UserWarning, stacklevel=4)
        self._end(worker)
        self._again_elsewhere(worker, f"differs from the others: {reason}")

    def _again(self, worker: Process, how: str) -> None:
        """Replaces a process that ended before it was open. After `_FAILED_STARTS` in a row no more are started, and
        the open processes continue alone."""
        self._failed_starts += 1
        self._end(worker)
        if self._failed_starts < _FAILED_STARTS:
            self._start()
            return
        said = f"{self._failed_starts} workers ended before they were ready; the last one {how}"
        if not self._workers:
            raise WorkersError(said)
        if any(one.opening is None for one in self._workers):
            warnings.warn(f"{said}; no more are started", UserWarning, stacklevel=3)

    def _end(self, worker: Process) -> None:
        self._workers.remove(worker)
        self._ray.kill(worker.actor, no_restart=True)

    def _got(self, reference: Any) -> Any:
        """The value of a finished answer. A warning that several processes report is issued once."""
        answer: Answer = self._ray.get(reference)
        for text in answer.warnings:
            if text not in self._warned:
                self._warned.add(text)
                warnings.warn(text, UserWarning, stacklevel=3)
        return answer.value

    def _free(self) -> list[Process]:
        return [worker for worker in self._workers if worker.opening is None and worker.running is None]

    def _wait(self) -> list[Any]:
        """Waits for the first process to finish its work or its opening: its reference; empty after `_LOOK` seconds."""
        if not self._workers:
            raise WorkersError("no worker is left")
        found = [worker.running or worker.opening for worker in self._workers]
        references = [reference for reference in found if reference is not None]
        done: list[Any] = self._ray.wait(references, num_returns=1, timeout=_LOOK)[0] if references else []
        return done

    def _is_done(self, worker: Process) -> bool:
        return worker.running is not None and bool(self._ray.wait([worker.running], timeout=0)[0])

    def _end_late(self) -> None:
        """Replaces processes that have exceeded the deadline of their item."""
        limit = time.monotonic() - self._layout.deadline
        for worker in [one for one in self._workers if one.running is not None and one.since < limit]:
            if not self._is_done(worker):
                self._over(worker, f"gave no answer within {self._layout.deadline:.0f} s")

    # -- results -------------------------------------------------------------------------------------------------

    def _over(self, worker: Process, how: str) -> None:
        """Replaces a process that has died or is late; its item goes back into the queue, or becomes `Lost`."""
        self._end(worker)
        self._start()
        self._again_elsewhere(worker, how)
        warnings.warn(f"{worker.name} {how}: another one takes its place", UserWarning, stacklevel=4)

    def _again_elsewhere(self, worker: Process, how: str) -> None:
        item, worker.item, worker.running = worker.item, None, None
        if item is None or self._queue is None:
            return
        if worker.tries + 1 < TRIES:
            self._queue.back.append((item, worker.tries + 1, worker))
        else:
            self._next.append((item, Lost(f"{TRIES} workers in a row did not finish it; the last one {how}")))

    def _finished(self, worker: Process) -> list[tuple[Any, Any]]:
        """The item of a process with its result; empty if the item's `map` has ended, or if the item goes back into the
        queue, since the process has died."""
        try:
            result = self._got(worker.running)
        except self._ray.exceptions.RayTaskError as error:
            item, worker.item, worker.running = worker.item, None, None
            if item is None:
                return []
            raise error.cause from None
        except self._gone as error:
            self._over(worker, how_ended(error))
            return []
        item, worker.item, worker.running = worker.item, None, None
        if item is None or self._queue is None:
            return []
        if isinstance(result, Refused):
            raise result.error
        worker.done, worker.busy = worker.done + item.size, worker.busy + time.monotonic() - worker.since
        return [(item, result)]

    @property
    def _gone(self) -> tuple[type[Exception], ...]:
        """The exceptions by which Ray reports a dead process or node, unlike errors of the code that it ran."""
        errors = self._ray.exceptions
        return (errors.RayActorError, errors.WorkerCrashedError, errors.OutOfMemoryError, errors.ObjectLostError) + (
            errors.NodeDiedError,
            TimeoutError,
        )
