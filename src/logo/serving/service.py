"""`Service`: selects for waiting requests and generates with the selections, while the pool may change.

    ids -> (probed together with others) -> Selection -> tensors -> generated together with others -> tokens

The model belongs to the generation thread. Selecting and changing the pool happen in one other thread, which pauses
generation while it needs the model.
"""

from __future__ import annotations

import asyncio
import logging
import time
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from logo.adapters.adapter import Adapter
from logo.core import Options, Prompt, Selection
from logo.engine import LoGo
from logo.errors import LoGoError, PoolError, UsageError
from logo.protocol import Delta, Figures, MixtureRequest, NotReady, Overloaded, Sampling
from logo.selection.selector import forced, known
from logo.serving.batching import STOPPED, Batching
from logo.serving.memory import Memory
from logo.serving.mixtures import HeldMixture, mixed
from logo.serving.pool import Change, ServedPool

_log = logging.getLogger("logo.serving")

T = TypeVar("T")


@dataclass
class Waiting:
    """A request that waits for its mixture.

    Attributes:
        since: when it joined, in seconds of `time.perf_counter`.
        future: gets the mixture, or the error that the request fails with.
    """

    prompt: Prompt
    wanted: MixtureRequest
    since: float
    future: asyncio.Future[HeldMixture]


class Line:
    """Requests that wait for a mixture, the longest waiting first; added in the event loop, taken by a thread."""

    def __init__(self) -> None:
        self._waiting: deque[Waiting] = deque()  # two threads may use its two ends
        self._joined = asyncio.Event()

    def __len__(self) -> int:
        return len(self._waiting)

    async def join(self, prompt: Prompt, wanted: MixtureRequest) -> HeldMixture:
        """Waits for the mixture of a prompt; raises what selecting for it raised."""
        waiting = Waiting(prompt, wanted, time.perf_counter(), asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._joined.set()
        return await waiting.future

    async def filled(self) -> None:
        """Returns when a request waits."""
        while not self._waiting:
            self._joined.clear()
            await self._joined.wait()

    def take(self, count: int) -> list[Waiting]:
        """Takes at most `count` requests out of the line. Those that were cancelled are dropped."""
        taken: list[Waiting] = []
        while self._waiting and len(taken) < count:
            waiting = self._waiting.popleft()
            if not waiting.future.done():
                taken.append(waiting)
        return taken


def hand_out(batch: Sequence[Waiting], results: Sequence[HeldMixture | Exception]) -> None:
    """Gives each result to the request that still waits for it."""
    for waiting, result in zip(batch, results, strict=True):
        if waiting.future.done():
            continue
        if isinstance(result, Exception):
            waiting.future.set_exception(result)
        else:
            waiting.future.set_result(result)


class Service:
    """One base model and its pool, for many requests.

    Args:
        logo: the engine; its own `generate` must not be used while the service runs.
        memory: for running sequences.
        signals: further signals that requests may ask for; the pool is calibrated for each now.
        max_queue: requests that may wait beside the running ones.
        probe_batch: prompts per probe.

    Attributes:
        pool: what requests may use now.
        selected: number of answers in which each adapter took part.
        not_invoked: number of prompts that lacked the invocation tokens of a selected adapter.
        draining: whether new requests are refused.
        signals: those that requests may ask for, the engine's own first.
        tokenizer, vocabulary, context: the base model's; token ids are below `vocabulary`, and a prompt and its answer
            have at most `context` tokens.
        signal, probe_text, unsure_below: defaults of the selection.

    Raises:
        UsageError: the engine's selections depend on the order of prompts.
        PoolError: adapters that one of the signals cannot score.
    """

    def __init__(
        self,
        logo: LoGo,
        memory: Memory,
        *,
        signals: Sequence[str] = (),
        max_queue: int = 256,
        probe_batch: int = 16,
    ) -> None:
        if logo.probe_context != "base":
            raise UsageError(
                f"probe_context {logo.probe_context!r}: a server probes prompts together and in any order; use 'base'"
            )
        self.logo = logo
        self.memory = memory
        self.max_queue = max_queue
        self.batching = Batching(
            logo.model,
            logo.adapter_cache,
            memory,
            logo.prompts.context,
            logo.prefix_cache if logo.fitted.read_once else None,
        )
        self._probe_batch = probe_batch
        self.signals = tuple(dict.fromkeys((logo.settings.signal, *signals)))
        self.pool = ServedPool(logo, self.signals, self.batching.paused)
        self._worker = ThreadPoolExecutor(1, "logo-select")
        self._line = Line()
        self._open = 0
        self.draining = False
        self.selected: dict[str, int] = {}
        self.tokenizer = logo.tokenizer
        self.vocabulary = int(logo.model.get_input_embeddings().weight.shape[0])
        self.context: int = self.batching.context
        self.signal, self.probe_text = logo.settings.signal, logo.settings.probe_text
        self.unsure_below = logo.settings.unsure_below
        self.not_invoked = 0

    # -- life ------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begins to serve; inside a running event loop."""
        self.batching.start()
        self._selecting = asyncio.create_task(self._select_forever())

    async def close(self) -> None:
        """Ends everything; requests in flight fail."""
        self.draining = True
        self._selecting.cancel()
        await asyncio.gather(self._selecting, return_exceptions=True)
        await asyncio.get_running_loop().run_in_executor(self._worker, self.batching.stop)
        self._worker.shutdown()

    @property
    def ready(self) -> bool:
        """Whether requests are accepted."""
        return self.batching.alive and not self._selecting.done() and not self.draining

    @property
    def figures(self) -> Figures:
        """The present state in numbers."""
        batching, adapters = self.batching, self.logo.adapter_cache
        used, total = batching.kv_tokens
        waiting = len(self._line) + batching.waiting
        return Figures(
            batching.running,
            waiting,
            used,
            total,
            len(adapters.names),
            adapters.bytes,
            adapters.budget,
            batching.steps,
            {"found": batching.found, "missed": batching.missed},
            0 if self.logo.prefix_cache is None else self.logo.prefix_cache.bytes,
            self.not_invoked,
        )

    @property
    def k(self) -> int:
        """Default number of adapters per prompt."""
        return self.logo.k

    @contextmanager
    def admitted(self, count: int = 1) -> Iterator[None]:
        """Within the block, room for this many answers is reserved.

        Raises:
            Overloaded, NotReady: there is none.
            UsageError: there can never be.
        """
        if self.draining:
            raise NotReady("the server is shutting down")
        if not self.ready:
            raise NotReady(STOPPED)
        room = self.memory.concurrent + self.max_queue
        if count > room:
            raise UsageError(
                f"this request asks for {count} answers, and this server takes at most {room} at a time; send fewer "
                "prompts, or a smaller n"
            )
        if self._open + count > room:
            raise Overloaded(f"{self._open} answers are running or waiting, of {room} at most; try again later")
        self._open += count
        try:
            yield
        finally:
            self._open -= count

    # -- selecting and generating ----------------------------------------------------------------------------------

    async def choose(self, prompt: Prompt, wanted: MixtureRequest) -> HeldMixture:
        """The mixture for a prompt.

        Raises:
            LoGoError: an adapter or signal that does not exist, a weight or k that cannot be used, an adapter that
                cannot be read, no room for it.
        """
        chosen = await self._line.join(prompt, wanted)
        await chosen.loaded()  # here, so that nobody else waits for adapters that are not loaded yet
        return chosen

    def generate(
        self, ids: Sequence[int], chosen: HeldMixture, sampling: Sampling, deadline: float | None = None
    ) -> AsyncGenerator[Delta, None]:
        """See `Batching.generate`."""
        for name in chosen.selection.adapters:
            self.selected[name] = self.selected.get(name, 0) + 1
        return self.batching.generate(ids, chosen.mixture, sampling, deadline)

    async def _select_forever(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._line.filled()
            # No local variable keeps the results until the next batch, since they hold adapters.
            hand_out(*await loop.run_in_executor(self._worker, self._choose))

    def _choose(self) -> tuple[list[Waiting], list[HeldMixture | Exception]]:
        """Takes requests that wait and selects for all of them together; runs in the thread that selects."""
        batch = self._line.take(self._probe_batch)
        asked = [self._asked(waiting.wanted) for waiting in batch]
        probed: dict[int, Selection | Exception] = {}
        began = time.perf_counter()
        if _to_probe(batch, asked):
            try:
                with self.batching.paused():
                    # Requests that came while the step before this pause was computed share its probe.
                    late = self._line.take(self._probe_batch - len(batch))
                    batch += late
                    asked += [self._asked(waiting.wanted) for waiting in late]
                    began = time.perf_counter()
                    rows = _to_probe(batch, asked)
                    found = self._probed([batch[i].prompt for i in rows], list(rows.values()))
                    probed = dict(zip(rows, found, strict=True))
            except Exception:  # the thread that generates has ended
                _log.exception("generation cannot be paused")
                probed = {i: NotReady(STOPPED) for i in _to_probe(batch, asked)}
        took = 1e3 * (time.perf_counter() - began)
        return batch, [
            self._finished(waiting, asked[i], probed.get(i), 1e3 * (began - waiting.since), took if i in probed else 0)
            for i, waiting in enumerate(batch)
        ]

    def _asked(self, wanted: MixtureRequest) -> Options | Exception:
        """A request's options, checked against the pool as it is now."""
        try:
            options, pool = wanted.options.copy(), self.logo.fitted
            signal = options.get("signal") or self.logo.settings.signal
            if signal in self.pool.refused:
                if wanted.usable is not None:  # the reason may name adapters that this key must not see
                    raise PoolError(f"signal {signal!r}: it cannot score the pool as it is now")
                return copy(self.pool.refused[signal])  # one object raised often would collect all tracebacks
            if signal not in self.signals:
                raise UsageError(f"signal: expected one of {', '.join(self.signals)}, found {signal!r}")
            if wanted.usable is not None and wanted.adapters != {}:
                names = self.pool.usable(wanted.usable)
                if not names:
                    raise PoolError("none of the adapters that this API key may use is in the pool")
                options["candidates"] = [known(name, pool, names) for name in options.get("candidates") or names]
            if k := options.get("k"):  # a larger k means all adapters; a client's k gives no warning in the server
                options["k"] = min(k, len(options.get("candidates") or pool))
            return self.logo.options(**options)
        except Exception as error:  # raised for the request that waits
            return error

    def _probed(self, rows: list[Prompt], asked: list[Options]) -> list[Selection | Exception]:
        """The selection of each prompt, or the error that it failed with. Generation is paused meanwhile."""
        try:
            return [*self.logo.outcomes(rows, asked, self._probe_batch)]
        except Exception as error:
            if len(rows) == 1:
                return [error]
        # One prompt that cannot be scored must not make the others fail, so each is scored alone.
        return [found for row, one in zip(rows, asked, strict=True) for found in self._probed([row], [one])]

    def _finished(
        self,
        waiting: Waiting,
        asked: Options | Exception,
        found: Selection | Exception | None,
        queued: float,
        took: float,
    ) -> HeldMixture | Exception:
        try:
            if isinstance(asked, Exception):
                return asked
            if isinstance(found, Exception):
                return found
            pool = self.logo.fitted
            selection = forced(waiting.wanted.adapters or {}, pool, asked.candidates) if found is None else found
            mixture, silent = mixed(self.logo.adapter_cache, pool, selection, waiting.prompt.ids)
            self.not_invoked += silent
            # From here on the request holds its adapters, so that it is answered with them even if the pool changes.
            release = weakref.finalize(mixture, self.logo.adapter_cache.release, mixture.hold)
            return HeldMixture(selection, mixture, queued, took, release)
        except Exception as error:
            if not isinstance(error, LoGoError):
                _log.exception("a request cannot be given its mixture")
            # The traceback's frames refer to mixtures of the batch's other requests, which would stay held meanwhile.
            return error.with_traceback(None)

    # -- the pool --------------------------------------------------------------------------------------------------

    async def add(self, folder: Path, name: str, *, replace: bool = False) -> Adapter:
        """Opens an adapter folder and adds it to the pool; after an error nothing has changed.

        Args:
            replace: whether it may replace an adapter of this name.

        Raises:
            LoGoError: the adapter cannot be used, or the pool has one of that name.
        """
        adapter = await self._in_thread(self.pool.change, Change(name, folder, replace))
        assert adapter is not None
        return adapter

    async def remove(self, name: str) -> None:
        """Removes an adapter from the pool; requests that have selected it are still answered with it.

        Raises:
            LoGoError: there is none of that name, or it is the last one.
        """
        await self._in_thread(self.pool.change, Change(name))

    async def _in_thread(self, call: Callable[..., T], *args: Any) -> T:
        """Runs a call in the thread that selects, so that no prompt is scored meanwhile."""
        return await asyncio.get_running_loop().run_in_executor(self._worker, call, *args)


def _to_probe(batch: Sequence[Waiting], asked: Sequence[Options | Exception]) -> dict[int, Options]:
    """The settings of those requests of a batch whose adapters have to be selected, by their place in the batch."""
    return {i: one for i, one in enumerate(asked) if isinstance(one, Options) and batch[i].wanted.adapters is None}
