"""`Selecting`: selects for waiting prompts and changes their pool, in one thread, so that no prompt is scored in the
middle of a change.

    a prompt -> (probed together with others that wait) -> Selection -> Chosen -> what its caller makes of it
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from logo.adapters.adapter import open_adapter
from logo.adapters.pool import AdapterPool
from logo.api.errors import ApiError, model_not_found
from logo.api.names import MixtureRequest, Patterns, usable
from logo.api.replies import Chosen, adapter_card
from logo.core import Options, Prompt, Selection
from logo.engine import LoGo
from logo.errors import LoGoError, PoolError, UsageError
from logo.selection.encoder import Embedded
from logo.selection.selector import checked_name, forced
from logo.state import EngineState

_PROBED = 16  # the most prompts of a probe
_log = logging.getLogger("logo.serve")
_T = TypeVar("_T")


@dataclass(frozen=True, eq=False)
class _WaitingPrompt:
    """A prompt that waits for its mixture, since a moment of `time.perf_counter`; `then` is what its caller makes of
    the mixture before the pool may change, and `future` has that."""

    prompt: Prompt
    request: MixtureRequest
    since: float
    then: Callable[[Chosen, Prompt], Any]
    future: Future[Any]


class Selecting:
    """Selects from a pool that is calibrated for every signal that requests may use.

    Args:
        logo: the engine, which nobody else may use meanwhile; UsageError: its selections depend on the order of
            prompts.
        paused: a block in which nobody else uses the model; NotReady: the server has stopped.
        signals: further signals that requests may ask for while they can score the whole pool.

    Attributes:
        adapters: cards of the adapters by name, replaced as a whole.
        signals: those that requests may ask for, the engine's own first.
        selected: the number of selections that each adapter was in, which whoever asks for them counts.
    """

    def __init__(
        self, logo: LoGo, paused: Callable[[], AbstractContextManager[None]], signals: Sequence[str] = ()
    ) -> None:
        if logo.probe_context != "base":
            why = "a server probes prompts together and in any order"
            raise UsageError(f"probe_context {logo.probe_context!r}: {why}; use 'base'")
        self.logo = logo
        self.selected = Counter[str]()
        self.adapters = {adapter.name: adapter_card(adapter) for adapter in logo.fitted}
        self._paused = paused
        self._wanted_signals = tuple(dict.fromkeys((logo.settings.signal, *signals)))
        prepared, self.signals = self._scoring(logo.prepared())
        logo.take(prepared)
        self._thread = ThreadPoolExecutor(1, "logo-select")
        self._line: deque[_WaitingPrompt] = deque()  # two threads may use its two ends

    def close(self) -> None:
        """Ends the thread, when it has selected for all that wait."""
        self._thread.shutdown()

    @property
    def waiting(self) -> int:
        """The number of prompts that wait."""
        return len(self._line)

    def usable(self, patterns: Patterns | None) -> Collection[str]:
        """The names of the adapters that an API key may use which is bound to these patterns; None: all."""
        return self.adapters if patterns is None else usable(tuple(self.adapters), patterns)

    async def choose(
        self, prompts: Sequence[Prompt], request: MixtureRequest, then: Callable[[Chosen, Prompt], _T]
    ) -> list[_T | BaseException]:
        """For each prompt of a request what `then` makes of its mixture, in the thread that selects; or the error for
        it. Prompts of several requests are probed together.

        Errors are LoGoError or ApiError: an adapter or signal that does not exist, a weight or k that cannot be used, a
        prompt for which no adapter fits, a server that has stopped.
        """
        futures: list[asyncio.Future[_T]] = []
        for prompt in prompts:
            waiting = _WaitingPrompt(prompt, request, time.perf_counter(), then, Future())
            self._line.append(waiting)
            self._thread.submit(self._select_waiting)  # for all that wait by then: later calls may find none
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
                with self._paused():
                    if self.logo.settings.encoder is None:
                        # Prompts that came while the step before this pause was computed share its probe.
                        batch += self._taken(_PROBED - len(batch))
                    began = time.perf_counter()
                    selections = self._probed(batch, embedded)
            except Exception as error:  # generation cannot be paused, since it has ended; or the encoder fails
                selections = {waiting: error for waiting, _ in _to_probe(batch)}
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
                waiting.future.set_result(waiting.then(chosen, waiting.prompt))

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
        await asyncio.get_running_loop().run_in_executor(self._thread, self._add, folder, name, replace)

    async def remove(self, name: str) -> None:
        """Removes an adapter from the pool, but not the last one, which raises a LoGoError; requests that have selected
        it are still answered with it."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._remove, name)

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
        with self._paused():
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
        for signal in self._wanted_signals:
            try:
                prepared = self.logo.calibrated(prepared, signal)
            except LoGoError as error:
                if signal == self._wanted_signals[0]:
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
