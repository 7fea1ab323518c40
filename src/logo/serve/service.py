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
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logo.adapters.activation import earliest, warn_of_silent
from logo.adapters.adapter import open_adapter
from logo.adapters.pool import AdapterPool
from logo.api.errors import ApiError, NotReady, model_not_found
from logo.api.names import MixtureRequest, Patterns, usable
from logo.api.replies import Chosen, adapter_card
from logo.core import Options, Prompt, Selection
from logo.endings import at_stop_strings
from logo.engine import LoGo
from logo.errors import LoGoError, PoolError, UsageError
from logo.mixing.mixer import Mixture
from logo.selection.encoder import Embedded
from logo.selection.selector import checked_name, forced
from logo.serve.batching import Batching
from logo.serve.loading import Loading
from logo.serve.memory import Memory
from logo.serve.packed import HeldMixture
from logo.serve.turns import STOPPED
from logo.state import EngineState

_PROBED = 16  # the most prompts of a probe
_log = logging.getLogger("logo.serve")


@dataclass(frozen=True, eq=False)
class _WaitingPrompt:
    """A prompt that waits for its mixture, since a moment of `time.perf_counter`."""

    prompt: Prompt
    request: MixtureRequest
    since: float
    future: Future[HeldMixture]


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
        prefix_cache = logo.prefix_cache if logo.fitted.read_once else None
        end_rules = at_stop_strings(logo.model.generation_config, logo.tokenizer)
        self.logo = logo
        self.batching = Batching(logo.model, logo.adapter_cache, memory, logo.prompts.context, prefix_cache, end_rules)
        self.draining = False  # new requests are refused
        self.selected = Counter[str]()  # the selections that each adapter was in
        self.adapters = {adapter.name: adapter_card(adapter) for adapter in logo.fitted}  # replaced as a whole
        self._most_answers = memory.concurrent + max_queue
        self._admitted_answers = 0
        self._signals = tuple(dict.fromkeys((logo.settings.signal, *signals)))  # the engine's own first
        prepared, self.signals = self._scoring(logo.prepared())
        logo.take(prepared)
        self._selecting = ThreadPoolExecutor(1, "logo-select")
        self._line: deque[_WaitingPrompt] = deque()  # two threads may use its two ends
        self.loading = Loading(logo.adapter_cache, self.batching.schedule)
        self._silent = set[str]()  # the adapters of which a warning says that they do not act

    async def close(self) -> None:
        """Ends everything; requests in flight fail."""
        self.draining = True
        await asyncio.get_running_loop().run_in_executor(None, self.batching.stop)
        self._selecting.shutdown()

    @property
    def ready(self) -> bool:
        """Whether requests are accepted."""
        return self.batching.alive and not self.draining

    @property
    def waiting(self) -> int:
        """The number of prompts, requests and answers that wait to be probed, for memory, or to be generated."""
        return len(self._line) + self.loading.waiting + self.batching.waiting

    def usable(self, patterns: Patterns | None) -> Collection[str]:
        """The names of the adapters that an API key may use which is bound to these patterns; None: all."""
        return self.adapters if patterns is None else usable(tuple(self.adapters), patterns)

    @contextmanager
    def admitted(self, count: int = 1) -> Iterator[None]:
        """Within the block, room for this many answers is reserved; ApiError: the queue is full; NotReady: no requests
        are accepted; UsageError: there can never be room."""
        if not self.ready:
            raise NotReady("the server is shutting down" if self.draining else STOPPED)
        if count > self._most_answers:
            most = (
                f"this request asks for {count} answers, and this server takes at most {self._most_answers} at a time"
            )
            raise UsageError(f"{most}; send fewer prompts, or a smaller n")
        if self._admitted_answers + count > self._most_answers:
            advice = "too many requests are waiting; try again in 1 s"
            raise ApiError(429, advice, "rate_limit_error", None, "queue_full", {"Retry-After": "1"})
        self._admitted_answers += count
        try:
            yield
        finally:
            self._admitted_answers -= count

    async def select(self, prompts: Sequence[Prompt], request: MixtureRequest) -> list[HeldMixture | BaseException]:
        """For each prompt of a request the mixture that answers it, whose adapters begin to load (`loading` waits for
        them), or the error for it. Prompts of several requests are probed together.

        Errors are LoGoError or ApiError: an adapter or signal that does not exist, a weight or k that cannot be used, a
        prompt for which no adapter fits, generation that has stopped.
        """
        await self.loading.let_pass(request)
        futures = []
        for prompt in prompts:
            waiting = _WaitingPrompt(prompt, request, time.perf_counter(), Future())
            self._line.append(waiting)
            self._selecting.submit(self._select_waiting)  # for all that wait by then: later calls may find none
            futures.append(asyncio.wrap_future(waiting.future))
        return await asyncio.gather(*futures, return_exceptions=True)

    # -- in the thread that selects ------------------------------------------------------------------------------------

    def _select_waiting(self) -> None:
        """Takes prompts that wait, and selects for all of them together."""
        batch = self._taken(_PROBED)
        selections: dict[_WaitingPrompt, Selection | Exception] = {}
        began = time.perf_counter()
        if any(waiting.request.adapters is None for waiting, _ in batch):
            try:
                embedded = self._embedded(batch)  # generation goes on while a text encoder reads
                with self.batching.paused():
                    if self.logo.settings.encoder is None:
                        # Prompts that came while the step before this pause was computed share its probe.
                        batch += self._taken(_PROBED - len(batch))
                    began = time.perf_counter()
                    selections = self._probed(batch, embedded)
            except Exception as error:  # generation cannot be paused, since it has ended; or the encoder fails
                selections = {waiting: error for waiting, _ in batch}
        probe_ms = 1e3 * (time.perf_counter() - began)
        for waiting, options in batch:
            with _errors_to(waiting.future):
                queue_ms = 1e3 * (began - waiting.since)
                selection = selections.get(waiting)
                if isinstance(selection, Exception):
                    raise selection
                if selection is None:
                    chosen = Chosen(self._named(waiting.request, options), 0.0, queue_ms)
                else:
                    chosen = Chosen(selection, probe_ms, queue_ms)
                    self.selected.update(selection.adapters)
                waiting.future.set_result(self._held(chosen, waiting.prompt.ids))

    def _named(self, request: MixtureRequest, options: Options) -> Selection:
        """The mixture that a request names; ApiError: an adapter has gone since it came."""
        weights = request.adapters or {}
        for name in weights:
            if name not in self.logo.fitted:
                raise model_not_found(name)
        return forced(weights, self.logo.fitted, options.candidates)

    def _embedded(self, batch: Sequence[tuple[_WaitingPrompt, Options]]) -> Embedded:
        """What a text encoder reads of the prompts that are to be probed."""
        probed = _to_probe(batch)
        return self.logo.embedded([waiting.prompt for waiting, _ in probed], [options for _, options in probed])

    def _probed(
        self, batch: Sequence[tuple[_WaitingPrompt, Options]], embedded: Embedded
    ) -> dict[_WaitingPrompt, Selection | Exception]:
        """The selection of each prompt that is to be probed, or its error. Generation is paused meanwhile."""
        probed = _to_probe(batch)
        prompts = [waiting.prompt for waiting, _ in probed]
        outcomes = self._outcomes(prompts, [options for _, options in probed], embedded)
        return {waiting: outcome for (waiting, _), outcome in zip(probed, outcomes, strict=True)}

    def _outcomes(
        self, prompts: Sequence[Prompt], options: Sequence[Options], embedded: Embedded
    ) -> list[Selection | Exception]:
        try:
            return [*self.logo.outcomes(prompts, options, _PROBED, embedded)]
        except Exception as error:
            if len(prompts) == 1:
                return [error]
        # One prompt that cannot be scored must not make the others fail, so each is scored alone.
        outcomes: list[Selection | Exception] = []
        for prompt, options_of_prompt in zip(prompts, options, strict=True):
            outcomes += self._outcomes([prompt], [options_of_prompt], embedded)
        return outcomes

    def _held(self, chosen: Chosen, ids: Sequence[int]) -> HeldMixture:
        """The mixture of a selection, whose adapters begin to load; UsageError: see `Mixture.of`."""
        pool = self.logo.fitted
        weights = {name: weight for name, weight in chosen.selection.mixture.items() if weight}
        mixture = Mixture.of(pool, weights, ids)
        warn_of_silent((name for name in weights if name not in mixture.weights), self._silent)
        cache = self.logo.adapter_cache
        hold = cache.reserve([pool[name] for name in mixture.weights])
        return HeldMixture(chosen, mixture, earliest(pool.activations, ids), hold, cache)

    def _taken(self, count: int) -> list[tuple[_WaitingPrompt, Options]]:
        """At most `count` prompts of the line, with their options; those whose options are wrong are told so."""
        taken: list[tuple[_WaitingPrompt, Options]] = []
        while self._line and len(taken) < count:
            waiting = self._line.popleft()
            if waiting.future.set_running_or_notify_cancel():
                with _errors_to(waiting.future):
                    taken.append((waiting, self._options(waiting.request)))
        return taken

    def _options(self, request: MixtureRequest) -> Options:
        """A request's options, checked against the pool as it is now."""
        options = request.options.copy()
        pool = self.logo.fitted
        if request.usable is not None and request.adapters != {}:
            names = self.usable(request.usable)
            if not names:
                raise PoolError("none of the adapters that this API key may use is in the pool")
            options["candidates"] = [checked_name(name, pool, names) for name in options.get("candidates") or names]
        if options.get("k"):  # a larger k means all adapters; a client's k gives no warning in the server
            options["k"] = min(options["k"], len(options.get("candidates") or pool))
        return self.logo.options(**options)

    async def add(self, folder: Path, name: str, *, replace: bool = False) -> None:
        """Opens an adapter folder and adds it to the pool, or replaces the adapter of this name; after a LoGoError, as
        when it cannot be used or scored, or is there already, nothing has changed."""
        await asyncio.get_running_loop().run_in_executor(self._selecting, self._add, folder, name, replace)

    async def remove(self, name: str) -> None:
        """Removes an adapter from the pool, but not the last one, which raises a LoGoError; requests that have selected
        it are still answered with it."""
        await asyncio.get_running_loop().run_in_executor(self._selecting, self._remove, name)

    def _add(self, folder: Path, name: str, replace: bool) -> None:
        pool = self.logo.pool.value
        adapter = open_adapter(folder, name)
        adapter.verify()  # finds what is not finite
        if replace and name in pool:
            pool = pool.remove(name)
        self._change(pool.add(adapter), name)

    def _remove(self, name: str) -> None:
        pool = self.logo.pool.value
        pool[name]  # raises with a did-you-mean
        if len(pool) == 1:
            raise UsageError(f"adapter {name!r} is the last one of the pool and cannot be removed")
        self._change(pool.remove(name))

    def _change(self, later: AdapterPool, new: str | None = None) -> None:
        """Puts a pool in the place of the present one once it is checked and indexed."""
        with self.batching.paused():
            prepared, signals = self._scoring(self.logo.prepared(later))
            if new is not None and new not in prepared.fitted:  # an engine that skips adapters that do not fit
                raise next(error for error in prepared.fitted.refused if error.name == new)
            # Cards are kept, since files may be removed later, and made before the change, since reading one may fail.
            old_cards = {name: card for name, card in self.adapters.items() if name != new}
            cards = {adapter.name: old_cards.get(adapter.name) or adapter_card(adapter) for adapter in prepared.fitted}
            self.logo.take(prepared)
        self.adapters = cards
        self.signals = signals

    def _scoring(self, prepared: EngineState) -> tuple[EngineState, tuple[str, ...]]:
        """A pool that is calibrated for every signal, and the signals that can score it; LoGoError: the engine's own
        cannot."""
        scoring = []
        for signal in self._signals:
            try:
                prepared = self.logo.calibrated(prepared, signal)
            except LoGoError as error:
                if signal == self._signals[0]:
                    raise
                _log.info("requests cannot ask for the signal %r: %s", signal, error)
            else:
                scoring.append(signal)
        return prepared, tuple(scoring)


def _to_probe(batch: Sequence[tuple[_WaitingPrompt, Options]]) -> list[tuple[_WaitingPrompt, Options]]:
    """The prompts whose mixtures no request names."""
    return [(waiting, options) for waiting, options in batch if waiting.request.adapters is None]


@contextmanager
def _errors_to(future: Future[Any]) -> Iterator[None]:
    """Whoever waits is told what the block raises."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, (LoGoError, ApiError)):
            _log.exception("a request cannot be given its mixture")
        # The traceback's frames refer to mixtures of the batch's other requests, which would stay held.
        future.set_exception(error.with_traceback(None))
