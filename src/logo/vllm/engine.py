"""`Engine`: one vLLM engine with a pool, as seen from the process that talks to it; the server and the offline engine.

token ids -> probes in vLLM -> scores from the workers -> Selection -> slots -> LoRARequest
"""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from logo import errors
from logo.adapters.pool import AdapterPool
from logo.core import Options, ProbeText, Prompt, Selection
from logo.errors import LoGoError, ModelError, NotFinite, PoolError, UsageError
from logo.files import Store, cache_folder
from logo.selection.base_reader import BaseReader
from logo.selection.encoder import load_encoder
from logo.selection.selector import EXAMPLES, Evidence, Selector
from logo.selection.signals import Signal
from logo.vllm import plugin
from logo.vllm.batched import Batched
from logo.vllm.launch import EXTENSION
from logo.vllm.options import log
from logo.vllm.patches import options_of
from logo.vllm.pool import pool_of, rank_of, scoring_signals
from logo.vllm.recent import Recent
from logo.vllm.requests import Mix, ProbeRequest, lora_request
from logo.vllm.skeleton import fitting, prompts_of, skeleton
from logo.vllm.slots import Slots
from logo.vllm.taps import NOT_RUN, UNREAD

# The largest weight of an adapter in a request, in absolute value: far above any that makes sense, and far below those
# with which sound adapters overflow.
MOST_WEIGHT = 16.0
Rows = Sequence[Sequence[int]]
Among = Sequence[Collection[str] | None]
Call = Callable[..., Awaitable[list[dict[str, Any]]]]
Run = Callable[..., Awaitable[list[Any]]]
# What a text encoder says of a prompt's token ids, cut to the window, for the adapters in pool order.
Encoding = Batched[Sequence[int], tuple[float | None, ...]]
# How often a prompt is probed that ran in a captured graph, which reads nothing.
_TRIES = 3
_RECENT = 4096  # prompts whose scores are kept


class WorkerError(LoGoError, RuntimeError):
    """An error in one of vLLM's workers."""


@dataclass(frozen=True)
class OpenSignal:
    """What is known outside of vLLM's workers of the scorer of a signal there."""

    name: str  # of the signal
    signal: Signal
    points: tuple[str, ...]
    selector: Selector
    encoding: Encoding | None = None  # None: there is no text encoder
    calibration: None = None  # the workers have it


@dataclass(frozen=True)
class Served:
    """A pool that prompts are selected from, and the scorers that vLLM's workers have of it, by signal."""

    pool: AdapterPool
    opened: Mapping[str, OpenSignal]


class Engine:
    """One vLLM engine with a pool.

    Args:
        call: calls `logo.vllm.worker.Extension.logo` on every worker.
        run: runs `(token ids, SamplingParams, LoRARequest or None), ...`, and returns vLLM's last output of each; in
            the engine of data parallelism that a second argument numbers, else in any.
        vllm_config: of the engine.
        engines: how many engines there are, each with workers of its own (data parallelism).

    Attributes:
        options: LoGo's.
        served: what prompts are selected from now; a request keeps the one that it began with.
        answers: how many prompts are being answered.

    Raises:
        LoGoError: there is no pool, or it does not fit; or vLLM was started without what LoGo needs.
    """

    def __init__(self, call: Call, run: Run, vllm_config: Any, engines: int = 1) -> None:
        model = vllm_config.model_config
        lora = vllm_config.lora_config
        parallel = vllm_config.parallel_config
        options = options_of(vllm_config)
        if options is None:
            raise UsageError("LoGo needs a pool: set LOGO_POOL to a folder of adapters or a Hub repository")
        if lora is None:
            raise UsageError("LoGo needs vLLM's support for adapters: start vLLM with --enable-lora")
        if plugin.refused is not None:
            raise ModelError(plugin.refused)
        if not parallel.worker_extension_cls:
            raise UsageError("LoGo needs its part of vLLM's workers: pass --worker-extension-cls " + EXTENSION)
        if parallel._api_process_count > 1:
            raise UsageError("LoGo fills vLLM's slots from one process: pass --api-server-count 1, or leave it out")
        self._call = call
        self.run = run
        self._engines = engines
        self.options = options
        self._rank = lora.max_lora_rank
        self.skeleton = skeleton(model.model, model.dtype, model.revision)
        self._prompts = prompts_of(model, self.skeleton)
        self._max_model_len = model.max_model_len
        self._store = Store(cache_folder(options.settings.cache))  # of what a text encoder has read
        self.served = Served(pool_of(options, self.skeleton), {})
        if options.settings.k is None:  # then as many as there are slots, also when the pool grows
            if options.settings.k_of(self.served.pool) > lora.max_loras:
                log.info("LoGo: at most %d adapters answer a prompt, as many as --max-loras", lora.max_loras)
            k = min(self.served.pool.default_k, lora.max_loras)
            self.options = replace(options, settings=replace(options.settings, k=k))
        self.slots = Slots(lora.max_loras, lambda into: self.call("load", into))
        self.answers = 0
        self._changing = asyncio.Lock()
        self._users: Counter[str] = Counter()  # requests in progress, by the digest of their pool
        self._coming = ""  # digest of the pool that is being opened
        self._outcome = Batched(self._outcomes)  # of a probe, by its key
        self._recent: Recent[list[float]] = Recent(_RECENT)

    async def open(self, signals: Sequence[str] | None = None) -> None:
        """Calibrates the pool in all workers, for these signals (None: all that the options name and that can score
        it); afterwards prompts can be selected for. LoGoError: it cannot be scored, or the text encoder cannot be
        loaded."""
        encoder = self.options.settings.encoder
        if encoder is not None:
            await asyncio.to_thread(load_encoder, encoder)  # one that cannot be loaded is refused first
        self._check(self.served.pool)
        self.served = await self._opened(self.served.pool, signals)

    async def change(self, kind: str, name: str, folder: str = "") -> None:
        """Changes the pool (see `pool_of`) in all workers or in none; answers continue meanwhile. LoGoError: it cannot
        be changed so."""
        async with self._changing:
            before = self.served.pool
            change = (kind, name, folder)
            pool = await asyncio.to_thread(pool_of, self.options, self.skeleton, before, change)
            self._check(pool)
            self._coming = pool.digest
            try:
                if any(digest != pool.digest for digest in await self.call("pool", before.digest, list(change))):
                    raise PoolError(
                        "vLLM's workers have another pool than this process: put the same files on every machine and "
                        "try again"
                    )
                self.served = await self._opened(pool, None)
            finally:
                self._coming = ""
                await self._drop(pool.digest)  # after an error
            await self._drop(before.digest)

    def _check(self, pool: AdapterPool) -> None:
        """Raises UsageError for a pool that vLLM's slots are too small or too few for."""
        rank_of(pool, self._rank)
        k = self.options.settings.k_of(pool)
        if k > self.slots.count:
            most = f"--max-loras is {self.slots.count}, but up to {k} adapters answer a prompt"
            raise UsageError(f"{most}: pass --max-loras {k} or more, or a smaller k")

    async def _opened(self, pool: AdapterPool, signals: Sequence[str] | None) -> Served:
        if signals is None:
            signals = scoring_signals(self.options, self.skeleton, pool)
        opened = {signal: await self._open_signal(pool, signal) for signal in signals}
        return Served(pool, opened)

    async def _open_signal(self, pool: AdapterPool, signal: str) -> OpenSignal:
        """Opens the scorer of a signal in all workers."""
        scorer = await self._opened_by_workers(pool, signal)
        facts = scorer["selector"]
        evidence = facts["evidence"] and Evidence(**facts["evidence"])
        pool_signal = self.options.settings.signal_for(pool, signal)
        encoding = await asyncio.to_thread(self._encoding, pool, facts["names"], pool_signal)
        if encoding is not None:  # workers do not know of it
            evidence = EXAMPLES
        selector = Selector(tuple(facts["names"]), facts["default_k"], evidence, facts["sizes"])
        return OpenSignal(signal, pool_signal, tuple(scorer["points"]), selector, encoding)

    async def _opened_by_workers(self, pool: AdapterPool, signal: str) -> dict[str, Any]:
        """What `logo.vllm.worker.Worker.signal` says in the end: workers say again and again which texts have to be run
        before they can open the scorer of a signal."""
        texts: list[list[int]] = []
        keys: list[str] = []
        fresh = False
        while True:
            replies = await self.call("signal", pool.digest, signal, texts, keys, fresh)
            first: dict[str, Any] = replies[0]
            # Caches of ranks may differ, and all have to run the same texts together.
            if any((reply["texts"], reply["points"]) != (first["texts"], first["points"]) for reply in replies):
                if fresh:
                    raise ModelError("vLLM's workers want to read different texts: give all of them the same files")
                fresh = True
                texts = []
                keys = []
                continue
            if not first["texts"]:
                return first
            fresh = False
            texts = first["texts"]
            keys = [uuid.uuid4().hex for _ in texts]
            probes = [ProbeRequest(key, pool.digest, "") for key in keys]
            numbers: list[int | None] = [None] if self._engines == 1 else [*range(self._engines)]
            await asyncio.gather(*(self._probe(texts, probes, number) for number in numbers))

    def _encoding(self, pool: AdapterPool, names: Sequence[str], signal: Signal) -> Encoding | None:
        """What reads prompts by the text encoder for the adapters that a signal scores, beside the event loop; None:
        nothing does."""
        settings = self.options.settings
        if settings.encoder is None:
            return None
        prompts = fitting(self._prompts, signal.window, self._max_model_len)
        base = BaseReader(self.skeleton, prompts.texts, text_of=prompts.text_of)
        adapters = [pool[name] for name in names]
        examples = base.encoded_examples(signal, settings, adapters, self._store)
        if examples is None:
            return None

        def similarities(rows: Sequence[Sequence[int]]) -> list[tuple[float | None, ...]]:
            return examples.similarities(rows).rows()

        return Batched(lambda rows: asyncio.to_thread(similarities, rows))

    async def signal(self, served: Served, signal: str) -> Served:
        """The pool with one more signal, which is opened in the workers first."""
        more = await self._opened(served.pool, [signal])
        return replace(served, opened={**served.opened, **more.opened})

    @asynccontextmanager
    async def using(self) -> AsyncIterator[Served]:
        """Yields the pool as it is now. Inside the block, vLLM's workers keep it, even if it changes meanwhile."""
        served = self.served
        digest = served.pool.digest
        self._users[digest] += 1
        try:
            yield served
        finally:
            self._users[digest] -= 1
            await self._drop(digest)

    async def _drop(self, digest: str) -> None:
        """Has the workers forget a pool, if nobody selects from it any more."""
        if digest not in (self.served.pool.digest, self._coming) and not self._users[digest]:
            del self._users[digest]
            await asyncio.shield(self.call("drop", digest))

    async def call(self, name: str, *args: Any) -> list[Any]:
        """Calls a method of `logo.vllm.worker.Worker` on every worker, and returns their values; raises the LoGoError
        that one has met, or WorkerError."""
        answers = await self._call(name, *args)
        for answer in answers:
            if "error" in answer:
                raise getattr(errors, answer.get("kind", ""), WorkerError)(*answer.get("args", [answer["error"]]))
        return [answer["value"] for answer in answers]

    # -- selecting -----------------------------------------------------------------------------------------------

    @property
    def probe_text(self) -> ProbeText | None:
        """The part of a conversation that is probed, see `SelectionSettings.probe_text`."""
        pool = self.served.pool
        chosen = self.options.settings.probe_text
        return "all" if chosen is None and pool.read_once and pool.invoked else chosen

    def text_of(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return self._prompts.text_of(ids)

    async def select(self, served: Served, prompt: Prompt, call: Options, alone: bool = False) -> Selection:
        """The selection for a prompt from a pool, with checked options of a call; errors as `LoGo.select`."""
        [scores] = await self.scores(served, call.signal, [prompt.probed], [call.candidates], alone=alone)
        return served.opened[call.signal].selector(torch.tensor(scores), call, served.pool.silent(prompt.ids))

    async def scores(
        self,
        served: Served,
        signal: str,
        rows: Rows,
        among: Among,
        *,
        without_examples: bool = False,
        alone: bool = False,
    ) -> list[list[float]]:
        """Scores of the adapters of a pool for prompts, which run as probes unless their windows were probed lately
        (never for prompts that are probed `alone`); arguments as `Scorer` and `ProbeRequest`.
        NotFinite: a score overflowed; ModelError: a prompt could not be scored."""
        opened = served.opened[signal]
        windows = [tuple(opened.signal.windowed(row)) for row in rows]
        names = [None if candidates is None else tuple(sorted(candidates)) for candidates in among]
        digest = served.pool.digest
        keys = [(digest, signal, without_examples, *key) for key in zip(windows, names, strict=True)]
        # What is probed alone tells nobody that it was here. Answers of adapters that act from a position on use what
        # the probe has read, so such a pool is probed anew.
        shared = not (alone or served.pool.read_once)
        known = [self._recent.get(key) if shared else None for key in keys]
        unknown = [i for i, scores in enumerate(known) if scores is None]
        encoded: Sequence[tuple[float | None, ...] | None] = [None] * len(unknown)
        if opened.encoding is not None and not without_examples:
            encoded = await asyncio.gather(*(opened.encoding(windows[i]) for i in unknown))
        probes = [
            ProbeRequest("", digest, signal, names[i], without_examples, alone, similarities)
            for i, similarities in zip(unknown, encoded, strict=True)
        ]
        for i, scores in zip(unknown, await self._probed([windows[i] for i in unknown], probes), strict=True):
            known[i] = scores
            if shared:
                self._recent.put(keys[i], scores)
        return [scores for scores in known if scores is not None]

    async def _probed(self, windows: Rows, probes: Sequence[ProbeRequest]) -> list[list[float]]:
        """The scores that probes of these windows give. Errors as `scores`."""
        outcomes: list[Any] = [UNREAD] * len(windows)
        for _ in range(_TRIES):
            unread = [
                i for i, outcome in enumerate(outcomes) if isinstance(outcome, str) and outcome.startswith(UNREAD)
            ]
            if not unread:
                break
            tried = [replace(probes[i], key=uuid.uuid4().hex) for i in unread]
            await self._probe([windows[i] for i in unread], tried)
            again = await asyncio.gather(*(self._outcome(probe.key) for probe in tried))
            for i, outcome in zip(unread, again, strict=True):
                outcomes[i] = outcome
        for outcome in outcomes:
            if isinstance(outcome, str):
                raise (NotFinite if "finite" in outcome else ModelError)(f"a prompt could not be scored: {outcome}")
        return outcomes

    async def _probe(self, rows: Rows, probes: Sequence[ProbeRequest], engine: int | None = None) -> None:
        """Runs prompts as these probes, whose outcomes the workers keep, in the engine of this number, or in any."""
        from vllm import SamplingParams

        # Hidden vectors of tokens whose keys and values come from the cache would not be computed.
        once = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, skip_reading_prefix_cache=True)
        asked = [(row, once, lora_request(probe)) for row, probe in zip(rows, probes, strict=True)]
        await (self.run(asked) if engine is None else self.run(asked, engine))

    async def _outcomes(self, keys: Sequence[str]) -> list[Any]:
        """The outcomes of these probes, which the workers that ran them have kept until now: the first failure, else
        the scores of the first worker."""
        replies = await self.call("scores", list(keys))
        outcomes = []
        for key in keys:
            of_all = [reply[key] for reply in replies]
            of_workers = [outcome for outcome in of_all if outcome != NOT_RUN] or of_all
            outcomes.append(next((outcome for outcome in of_workers if isinstance(outcome, str)), of_workers[0]))
        return outcomes

    def mix(self, served: Served, selection: Selection, prompt: int | None = None) -> Mix:
        """The mixture of a selection, with the adapters of the pool that it was made from; `prompt`: the number of
        tokens of the prompt, if a completion that is scored follows it. UsageError: a weight is too large."""
        weights = []
        for name, weight in selection.mixture.items():
            if not abs(weight) <= MOST_WEIGHT:
                most = f"expected a weight from {-MOST_WEIGHT:g} to {MOST_WEIGHT:g}"
                raise UsageError(f"adapter {name!r}: {most}, found {weight:g}")
            adapter = served.pool[name]
            weights.append((adapter.key, weight, adapter.activation))
        return Mix.of(weights, prompt)

    @asynccontextmanager
    async def held(self, mixes: Sequence[Mix]) -> AsyncIterator[list[Any]]:
        """Yields vLLM's `LoRARequest` of each mixture (None: the base model alone), whose adapters are in slots."""
        async with self.slots.held({key for mix in mixes for key in mix.keys}):
            self.answers += len(mixes)
            try:
                yield [lora_request(mix) if mix.parts else None for mix in mixes]
            finally:
                self.answers -= len(mixes)
