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


class EngineActor:
    """The actor. It opens in its first call and not when it is made, so that Ray counts a death while opening, too."""

    def __init__(self, expected: Expected, open_: Callable[[], Any], facts: Callable[[Any], Any]) -> None:
        self._expected = expected
        self._open = open_
        self._facts = facts
        self._engine: Any = None

    def call(self, function: Callable[..., Any], *args: Any) -> tuple[Any, Any, list[str]]:
        """The value of `function(engine, *args)`; the facts of the engine, if this call has opened it, else None; and
        what was warned of."""
        facts = None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            if self._engine is None:
                plugins.load_installed()
                self._expected.check()
                self._engine = self._open()
                facts = self._facts(self._engine)
            value = function(self._engine, *args)
        texts = [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
        return value, facts, texts


class EngineActors(Generic[H]):
    """Actors that have each opened the same thing, the first of them now; `facts`: those of what they have opened."""

    def __init__(self, actors: Iterable[Any]) -> None:
        import ray

        self._ray = ray
        self.facts: Any = None
        self._opening = {actor.call.remote(_nothing): actor for actor in actors}
        self._open: list[Any] = []
        self._warned: set[str] = set()
        [first], _ = ray.wait(list(self._opening), num_returns=1)
        self._opened(first)

    def map(self, work: Iterable[tuple[K, tuple[Any, ...]]], function: Callable[..., Any]) -> Iterator[tuple[K, Any]]:
        """Each key with `function(engine, *args)`, in the order in which they are done; the next arguments are taken
        when an actor is free.

        Raises:
            ClusterError: a call was repeated in vain, or what an actor has opened differs from the first one.
            Exception: what `function` raised, or an actor that opened.
        """
        calls = iter(work)
        running: dict[Any, tuple[Any, K]] = {}
        idle = list(self._open)
        while True:
            while idle:
                call = next(calls, None)
                if call is None:
                    break
                key, args = call
                actor = idle.pop()
                running[actor.call.remote(function, *args)] = (actor, key)
            if not running:
                return
            [done], _ = self._ray.wait([*running, *self._opening], num_returns=1)
            if done in self._opening:
                idle.append(self._opened(done))
            else:
                actor, key = running.pop(done)
                value = self._value(done)
                idle.append(actor)
                yield key, value

    def _opened(self, reference: Any) -> Any:
        """The actor whose first call is done."""
        self._value(reference)
        actor = self._opening.pop(reference)
        self._open.append(actor)
        return actor

    def _value(self, reference: Any) -> Any:
        """The value of a call. A warning that several actors report is given once."""
        try:
            value, facts, warned = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except self._ray.exceptions.RayError as error:
            reason = " ".join(str(error).split())[:300]
            raise ClusterError(
                f"a worker died {_RETRIES + 1} times over the same work ({reason}). What is done is kept: repeat the "
                "command to continue, with less for each process if memory was short"
            ) from error
        for text in warned:
            if text not in self._warned:
                self._warned.add(text)
                warnings.warn(text, UserWarning, stacklevel=3)
        if facts is not None:
            self.facts = self.facts or facts
            different = differences(_compared(self.facts), _compared(facts))
            if different:
                raise ClusterError(f"a worker differs from the first one: {described(different)}")
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

        actor_class: Any = ray.remote(EngineActor).options(max_restarts=-1, max_task_retries=_RETRIES, **options)
        actors = [actor_class.remote(expected, open_, _facts_of) for _ in range(layout.count)]
        workers: EngineActors[H] = EngineActors(actors)

        def work(blocks: Iterable[Any]) -> Iterator[Any]:
            return workers.map(_calls(ray.put, blocks), answer)

        yield workers.facts, work


def _calls(put: Callable[[Any], Any], blocks: Iterable[Any]) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Each block with the arguments of its call; `put` is Ray's, so that a dataset is sent to each machine once."""
    sent: dict[str, Any] = {}
    for dataset, rows in blocks:
        if dataset.name not in sent:
            sent[dataset.name] = put(dataset)
        yield (dataset, rows), (sent[dataset.name], rows)


def _facts_of(engine: Any) -> Any:
    return engine.facts


def _nothing(engine: object) -> None:
    """What an actor is asked first, to open."""


def _compared(facts: Any) -> dict[str, Any]:
    return {name: value for name, value in asdict(facts).items() if name not in _OWN}
