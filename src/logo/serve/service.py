"""`Service`: selects for waiting requests and generates with the selections, while the pool may change.

    ids -> (probed together with others) -> Selection -> held adapters -> generated together with others -> tokens

The model belongs to the generation thread. Selecting and changing the pool happen in one other thread, which pauses
generation while it needs the model, so that no prompt is scored in the middle of a change.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from logo.adapters.activation import earliest, warn_of_silent
from logo.adapters.adapter import open_adapter
from logo.adapters.pool import AdapterPool
from logo.core import Options, Prompt, Selection
from logo.endings import at_stop_strings
from logo.engine import Fitted, LoGo
from logo.errors import CacheFull, LoGoError, PoolError, UsageError
from logo.mixing.mixer import Mixture
from logo.selection.selector import forced, known
from logo.serve.batching import STOPPED, Batching, Job, Memory, News
from logo.api.bodies import adapter_card
from logo.api.errors import ApiError, NotReady, model_not_found
from logo.api.names import MixtureRequest, Patterns, usable
from logo.serve.packed import Chosen

_PROBED = 16  # the most prompts of a probe
_AGAIN = 0.02  # seconds until a request whose adapters have no room looks for it again
_PASSES = 32  # how many requests may pass one that waits for room
_log = logging.getLogger("logo.serve")


@dataclass(frozen=True, eq=False)
class _Waiting:
    """A request that waits for its mixture, since a moment of `time.perf_counter`."""

    prompt: Prompt
    wanted: MixtureRequest
    since: float
    future: Future[Chosen]


class Service:
    """One base model and its pool, calibrated for every signal that requests may use.

    Args:
        logo: the engine, which nobody else may use while the service runs; UsageError: its selections depend on the
            order of prompts.
        signals: further signals that requests may ask for while they can score the whole pool.
        max_queue: answers that may wait beside the running ones.
    """

    def __init__(self, logo: LoGo, memory: Memory, *, signals: Sequence[str] = (), max_queue: int = 256) -> None:
        if logo.probe_context != "base":
            why = "a server probes prompts together and in any order"
            raise UsageError(f"probe_context {logo.probe_context!r}: {why}; use 'base'")
        shared = logo.prefix_cache if logo.fitted.read_once else None
        self.logo = logo
        stops = at_stop_strings(logo.model.generation_config, logo.tokenizer)
        self.batching = Batching(logo.model, logo.adapter_cache, memory, logo.prompts.context, shared, stops)
        self._room, self._open = memory.concurrent + max_queue, 0
        self._signals = tuple(dict.fromkeys((logo.settings.signal, *signals)))  # the engine's own first
        self.signals = self._scoring()
        self._worker, self._full, self._passes = ThreadPoolExecutor(1, "logo-select"), asyncio.Lock(), 0
        self._line: deque[_Waiting] = deque()  # two threads may use its two ends
        self.draining = False  # new requests are refused
        self._told = set[str]()  # the adapters of which a warning says that they do not act
        self.selected = Counter[str]()  # answers in which each adapter took part
        self.adapters = {one.name: adapter_card(one) for one in logo.fitted}  # replaced as a whole

    async def close(self) -> None:
        """Ends everything; requests in flight fail."""
        self.draining = True
        await asyncio.get_running_loop().run_in_executor(None, self.batching.stop)
        self._worker.shutdown()

    @property
    def ready(self) -> bool:
        """Whether requests are accepted."""
        return self.batching.alive and not self.draining

    @property
    def waiting(self) -> int:
        """The number of requests that wait to be probed or generated."""
        return len(self._line) + self.batching.waiting

    def usable(self, patterns: Patterns | None) -> Collection[str]:
        """The names of the adapters that an API key may use which is bound to these patterns; None: all."""
        return self.adapters if patterns is None else usable(tuple(self.adapters), patterns)

    @contextmanager
    def admitted(self, count: int = 1) -> Iterator[None]:
        """Within the block, room for this many answers is reserved; ApiError: the queue is full; NotReady: no requests
        are accepted; UsageError: there can never be room."""
        if not self.ready:
            raise NotReady("the server is shutting down" if self.draining else STOPPED)
        if count > self._room:
            said = f"this request asks for {count} answers, and this server takes at most {self._room} at a time"
            raise UsageError(f"{said}; send fewer prompts, or a smaller n")
        if self._open + count > self._room:
            said = "too many requests are waiting; try again in 1 s"
            raise ApiError(429, said, "rate_limit_error", None, "queue_full", {"Retry-After": "1"})
        self._open += count
        try:
            yield
        finally:
            self._open -= count

    async def choose(self, prompt: Prompt, wanted: MixtureRequest, *, waits: bool = True) -> Chosen:
        """The mixture for a prompt, with its adapters loaded.

        Args:
            waits: whether to wait until other requests give back the memory that the adapters need. Prompts of one
                request must not, since they would wait for each other.

        Raises:
            LoGoError: an adapter or signal that does not exist, a weight or k that cannot be used, an adapter that
                cannot be read.
            CacheFull: the memory for adapters is too small for them, or, unless it `waits`, in use.
        """
        self._passes += self._full.locked()
        if waits and self._passes > _PASSES:  # else one that waits for room might wait for ever
            async with self._full:
                pass
        future = Future[Chosen]()
        self._line.append(_Waiting(prompt, wanted, time.perf_counter(), future))
        self._worker.submit(self._choose)  # for all that wait by then, so that later calls may find none
        chosen = await asyncio.wrap_future(future)
        cache, adapters = self.logo.adapter_cache, [resident.adapter for resident in chosen.hold]
        try:
            await chosen.loaded()  # here, so that nobody else waits for adapters that are not loaded yet
            return chosen
        except CacheFull:
            if not waits or not cache.has_room(adapters, alone=True):
                raise
        async with self._full:  # in turn, since several would take what becomes free from each other
            self._passes = 0
            while True:
                if cache.has_room(adapters):
                    chosen = replace(chosen, hold=cache.reserve(adapters))
                    with suppress(CacheFull):
                        await chosen.loaded()
                        return chosen
                await asyncio.sleep(_AGAIN)

    def generate(self, jobs: Sequence[Job], deadline: float | None = None) -> AsyncGenerator[News, None]:
        """See `Batching.generate`."""
        self.selected.update(name for job in jobs for name in job.chosen.selection.adapters)
        return self.batching.generate(jobs, deadline)

    def _choose(self) -> None:
        """Takes requests that wait and selects for all of them together; runs in the thread that selects."""
        batch, found = self._taken(_PROBED), dict[_Waiting, Selection | Exception]()
        began = time.perf_counter()
        if any(one.wanted.adapters is None for one, _ in batch):
            try:
                with self.batching.paused():
                    # Requests that came while the step before this pause was computed share its probe.
                    batch += self._taken(_PROBED - len(batch))
                    began = time.perf_counter()
                    rows = [(one, call) for one, call in batch if one.wanted.adapters is None]
                    made = self._probed([one.prompt for one, _ in rows], [call for _, call in rows])
                    found = {one: selection for (one, _), selection in zip(rows, made, strict=True)}
            except Exception as error:  # generation cannot be paused: it has ended
                found = {one: error for one, _ in batch}
        took = 1e3 * (time.perf_counter() - began)
        for one, call in batch:
            with _told(one.future):
                if gone := [name for name in one.wanted.adapters or () if name not in self.logo.fitted]:
                    raise model_not_found(gone[0])  # since the request came
                chosen = found.get(one) or forced(one.wanted.adapters or {}, self.logo.fitted, call.candidates)
                if isinstance(chosen, Exception):
                    raise chosen
                times = 1e3 * (began - one.since), took if one in found else 0.0
                one.future.set_result(self._held(chosen, one.prompt.ids, *times))

    def _held(self, selection: Selection, ids: Sequence[int], queue_ms: float, probe_ms: float) -> Chosen:
        """The mixture of a selection, whose adapters begin to load; UsageError: see `Mixture.of`."""
        pool, cache = self.logo.fitted, self.logo.adapter_cache
        asked = {name: weight for name, weight in selection.mixture.items() if weight}
        mixture = Mixture.of(pool, asked, ids)
        warn_of_silent((name for name in asked if name not in mixture.weights), self._told)
        hold = cache.reserve([pool[name] for name in mixture.weights])
        return Chosen(selection, mixture, earliest(pool.activations, ids), queue_ms, probe_ms, hold, cache)

    def _taken(self, count: int) -> list[tuple[_Waiting, Options]]:
        """At most `count` requests of the line, with their options; those whose options are wrong are told so."""
        taken: list[tuple[_Waiting, Options]] = []
        while self._line and len(taken) < count:
            waiting = self._line.popleft()
            if waiting.future.set_running_or_notify_cancel():
                with _told(waiting.future):
                    taken.append((waiting, self._options(waiting.wanted)))
        return taken

    def _options(self, wanted: MixtureRequest) -> Options:
        """A request's options, checked against the pool as it is now."""
        options, pool = wanted.options.copy(), self.logo.fitted
        if wanted.usable is not None and wanted.adapters != {}:
            names = self.usable(wanted.usable)
            if not names:
                raise PoolError("none of the adapters that this API key may use is in the pool")
            options["candidates"] = [known(name, pool, names) for name in options.get("candidates") or names]
        if k := options.get("k"):  # a larger k means all adapters; a client's k gives no warning in the server
            options["k"] = min(k, len(options.get("candidates") or pool))
        return self.logo.options(**options)

    def _probed(self, rows: list[Prompt], asked: list[Options]) -> list[Selection | Exception]:
        """The selection of each prompt, or the error that it failed with. Generation is paused meanwhile."""
        try:
            return [*self.logo.outcomes(rows, asked, _PROBED)]
        except Exception as error:
            if len(rows) == 1:
                return [error]
        # One prompt that cannot be scored must not make the others fail, so each is scored alone.
        return [found for row, one in zip(rows, asked, strict=True) for found in self._probed([row], [one])]

    async def add(self, folder: Path, name: str, *, replace: bool = False) -> None:
        """Opens an adapter folder and adds it to the pool, or replaces the adapter of this name; after a LoGoError, as
        when it cannot be used or scored, or is there already, nothing has changed."""
        await asyncio.get_running_loop().run_in_executor(self._worker, self._add, folder, name, replace)

    async def remove(self, name: str) -> None:
        """Removes an adapter from the pool, but not the last one, which raises a LoGoError; requests that have selected
        it are still answered with it."""
        await asyncio.get_running_loop().run_in_executor(self._worker, self._remove, name)

    def _add(self, folder: Path, name: str, replace: bool) -> None:
        pool, adapter = self.logo.pool.value, open_adapter(folder, name)
        adapter.verify()  # finds what is not finite
        self._change((pool.remove(name) if replace and name in pool else pool).add(adapter), name)

    def _remove(self, name: str) -> None:
        pool = self.logo.pool.value
        pool[name]  # raises with a did-you-mean
        if len(pool) == 1:
            raise UsageError(f"adapter {name!r} is the last one of the pool and cannot be removed")
        self._change(pool.remove(name))

    def _change(self, later: AdapterPool, new: str | None = None) -> None:
        """Puts a pool in the place of the present one once it is checked and indexed."""
        with self.batching.paused():
            prepared = self.logo.prepared(later)
            signals = self._scoring(prepared)
            if new is not None and new not in prepared.fitted:  # an engine that skips adapters that do not fit
                raise next(error for error in prepared.fitted.refused if error.name == new)
            # Cards are kept, since files may be removed later, and made before the change, since reading one may fail.
            kept = {name: card for name, card in self.adapters.items() if name != new}
            cards = {one.name: kept.get(one.name) or adapter_card(one) for one in prepared.fitted}
            self.logo.take(prepared)
        self.adapters, self.signals = cards, signals

    def _scoring(self, prepared: Fitted | None = None) -> tuple[str, ...]:
        """Calibrates a pool (None: the present one) for every signal, and returns those that can score it; LoGoError:
        the engine's own cannot."""
        found = []
        for signal in self._signals:
            try:
                self.logo.calibrate(signal, prepared=prepared)
            except LoGoError as error:
                if signal == self._signals[0]:
                    raise
                _log.info("requests cannot ask for the signal %r: %s", signal, error)
            else:
                found.append(signal)
        return tuple(found)


@contextmanager
def _told(future: Future[Any]) -> Iterator[None]:
    """Whoever waits is told what the block raises."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, (LoGoError, ApiError)):
            _log.exception("a request cannot be given its mixture")
        # The traceback's frames refer to mixtures of the batch's other requests, which would stay held.
        future.set_exception(error.with_traceback(None))
