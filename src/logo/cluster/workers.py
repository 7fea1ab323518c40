"""Work divided among Ray actors: each opens an engine (or anything that takes long to open) once, and then gets one
item of work after another.

Ray starts the actors and places them. If one is killed or its machine is lost, Ray starts it again, there or elsewhere,
and repeats what it was doing. An actor that starts later, because a machine has joined, gets work from then on.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Generic, TypeVar

from logo import plugins
from logo.cluster.processes import ClusterError, Expected, Layout, connected
from logo.evaluation.results import described, differences

H = TypeVar("H")  # what an actor has opened
K = TypeVar("K")

_RETRIES = 2  # how often Ray repeats a call whose actor has died
_OWN = ("device",)  # fields of an engine's facts in which equal engines may differ


class Worker:
    """The actor. It opens in its first call and not when it is made, so that Ray counts a death while opening, too."""

    def __init__(self, expected: Expected, open_: Callable[[], Any], facts: Callable[[Any], Any]) -> None:
        self._expected, self._open, self._facts, self._held = expected, open_, facts, None

    def call(self, what: Callable[..., Any], *args: Any) -> tuple[Any, Any, list[str]]:
        """The value of `what(held, *args)`; the facts of `held`, if this call has opened it, else None; and what was
        warned of."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            found = None
            if self._held is None:
                plugins.load_installed()
                self._expected.check()
                self._held = self._open()
                found = self._facts(self._held)
            value = what(self._held, *args)
        return value, found, [str(one.message) for one in caught if issubclass(one.category, UserWarning)]


class Workers(Generic[H]):
    """Actors that have each opened the same thing, the first of them now; `facts`: those of what they have opened."""

    def __init__(self, actors: Iterable[Any]) -> None:
        import ray

        self._ray = ray
        self.facts: Any = None
        self._opening = {actor.call.remote(_nothing): actor for actor in actors}
        self._open, self._warned = list[Any](), set[str]()
        [first], _ = ray.wait(list(self._opening), num_returns=1)
        self._got(first)
        self._open.append(self._opening.pop(first))

    def shared(self, value: object) -> Any:
        """A large argument of many items, which is sent to each machine once."""
        return self._ray.put(value)

    def map(self, work: Iterable[tuple[K, tuple[Any, ...]]], what: Callable[..., Any]) -> Iterator[tuple[K, Any]]:
        """Each key with `what(held, *args)`, in the order in which they are done; the next item is taken when an actor
        is free.

        Raises:
            ClusterError: an item was repeated in vain, or what an actor has opened differs from the first one.
            Exception: what `what` raised, or an actor that opened.
        """
        source, running, idle = iter(work), dict[Any, tuple[Any, K]](), list(self._open)
        while True:
            while idle and (item := next(source, None)) is not None:
                actor = idle.pop()
                running[actor.call.remote(what, *item[1])] = (actor, item[0])
            if not running:
                return
            [done], _ = self._ray.wait([*running, *self._opening], num_returns=1)
            if done in running:
                actor, key = running.pop(done)
                value = self._got(done)
                idle.append(actor)
                yield key, value
            else:
                self._got(done)
                self._open.append(self._opening.pop(done))
                idle.append(self._open[-1])

    def _got(self, reference: Any) -> Any:
        """The value of a call. A warning that several actors report is given once."""
        try:
            value, facts, said = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except self._ray.exceptions.RayError as error:
            reason = " ".join(str(error).split())[:300]
            raise ClusterError(
                f"a worker died {_RETRIES + 1} times over the same work ({reason}). What is done is kept: repeat the "
                "command to continue, with less for each process if memory was short"
            ) from error
        for text in said:
            if text not in self._warned:
                self._warned.add(text)
                warnings.warn(text, UserWarning, stacklevel=3)
        if facts is not None:
            self.facts = self.facts or facts
            if found := differences(_compared(self.facts), _compared(facts)):
                raise ClusterError(f"a worker differs from the first one: {described(found)}")
        return value


@contextmanager
def in_workers(
    layout: Layout, expected: Expected, open_: Callable[[], H], answer: Callable[[H, Any, range], Any]
) -> Iterator[tuple[Any, Callable[[Iterable[Any]], Iterator[Any]]]]:
    """Starts workers, each of which has to find what is `expected` and calls `open_` once. Gives, when the first one is
    open, the `facts` of what it has opened, and a function that divides blocks (dataset, rows) among them and yields
    each with what `answer` makes of it, in the order in which they are done.

    Raises:
        MissingLibrary, ClusterError: as `connected`; or a worker finds something else.
        LoGoError: what the first worker raised that opened.
    """
    with connected(layout) as options:
        import ray

        made: Any = ray.remote(Worker).options(max_restarts=-1, max_task_retries=_RETRIES, **options)
        workers: Workers[H] = Workers([made.remote(expected, open_, _facts_of) for _ in range(layout.count)])

        def work(blocks: Iterable[Any]) -> Iterator[Any]:
            shared: dict[str, Any] = {}  # a dataset is sent to each machine once

            def sent() -> Iterator[tuple[Any, tuple[Any, ...]]]:
                for dataset, rows in blocks:
                    if dataset.name not in shared:
                        shared[dataset.name] = workers.shared(dataset)
                    yield (dataset, rows), (shared[dataset.name], rows)

            return workers.map(sent(), answer)

        yield workers.facts, work


def _facts_of(held: Any) -> Any:
    return held.facts


def _nothing(held: object) -> None:
    """What an actor is asked first, to open."""


def _compared(facts: Any) -> dict[str, Any]:
    return {name: value for name, value in asdict(facts).items() if name not in _OWN}
