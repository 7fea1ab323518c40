"""`Batching`: a loop over the model's forward pass that generates for many callers at once, each with its own mixture.

    waiting -> prefill, together or in parts, between steps -> `BatchedCache` -> a token per row and step -> Delta, ...

Rows join and leave between steps. Prefilling stops before the output head and leaves the last token of a prompt to the
first step of its row. If adapters act only from a position on, what is before it comes from the prefix cache.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
import traceback
import warnings
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from logo.api.errors import NotReady
from logo.core import FinishReason
from logo.decoding import OVERFLOW
from logo.endings import EndRule, end_tokens
from logo.errors import ModelError, NotFinite
from logo.mixing.cache import AdapterCache
from logo.models import device_of, padded, text_config, without_autocast
from logo.prefix_cache import PrefixCache, cache_argument, laid_out, reusable
from logo.serve.batched_cache import BatchedCache
from logo.serve.memory import Memory, MemoryPlan
from logo.serve.packed import HeldMixture, Packed
from logo.serve.sampling import NO_TOKEN, Draw, Sampling, next_tokens
from logo.serve.scheduling import Schedule
from logo.serve.turns import STOPPED, Turns

_log = logging.getLogger("logo.serve")


# An answer, its new token ids, and why it ended; None until it does.
News = tuple["AnswerJob", tuple[int, ...], FinishReason | None]


@dataclass(eq=False)
class AnswerJob:
    """One answer: token ids of its prompt, its mixture and sampling; how far it is, which the loop alone changes; and
    what its caller says."""

    prompt: Sequence[int]
    held: HeldMixture
    sampling: Sampling
    tokens: list[int] = field(default_factory=list)  # of the answer
    reason: FinishReason | None = None  # why it ended ...
    error: Exception | None = None  # ... or failed
    begun: bool = False  # it has a row
    ended: bool = False  # its row, if it has one, is not needed any more
    cache: DynamicCache | None = None  # of the part of the prompt that is read
    news: asyncio.Event = field(default_factory=asyncio.Event)  # set in the caller's thread
    left: bool = False  # the caller, who may set this, does not listen any more

    @property
    def unread(self) -> int:
        """Tokens of the prompt that are not read yet."""
        return len(self.prompt) - (0 if self.cache is None else self.cache.get_seq_length())

    @property
    def most(self) -> int:
        """The most tokens of prompt and answer."""
        return len(self.prompt) + self.sampling.max_tokens

    @property
    def apart(self) -> bool:
        """Whether the prompt cannot be read beside others: a part of it is read or cached."""
        return self.cache is not None or self.held.end > 0

    @property
    def answering(self) -> bool:
        """Whether its answer has begun."""
        return bool(self.tokens)


class Batching:
    """Generates for many callers at once, in a thread of its own. ModelError: the model keeps anything but keys and
    values of earlier tokens; UsageError: there is less memory.

    `context` is the most tokens of a prompt and its answer (None: the model has no limit), as an attribute within the
    memory for keys and values, too. `prefix_cache`: for adapters that act from a position on only. `rules`: what ends
    an answer beside the checkpoint's end tokens.
    """

    def __init__(
        self,
        model: Any,
        adapters: AdapterCache,
        memory: Memory,
        context: int | None,
        prefix_cache: PrefixCache | None,
        rules: Sequence[EndRule] = (),
    ) -> None:
        context = _servable_context(model, context)
        self.plan = MemoryPlan.of(model, adapters.budget, memory)
        # The model, and what is known of it.
        self._model = model
        self._device = device_of(model.get_input_embeddings())
        self._cache_name = str(cache_argument(model))
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self._ends = end_tokens(model.generation_config)
        self._rules = rules
        # Prompts are read by the prefix cache, where there is one: it keeps what it reads.
        self._prefix_cache = prefix_cache
        self._reader = prefix_cache or PrefixCache(model, 0)
        one_token = self._read_one_token()
        token_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in one_token.layers)
        kv_tokens = self.plan.tokens(token_bytes, 0 if prefix_cache is None else prefix_cache.budget)
        self.context = kv_tokens if context is None else min(context, kv_tokens)
        self.schedule = Schedule(memory.concurrent, kv_tokens, memory.step_tokens)
        # The rows of a step, and the gates of the model.
        self._active: list[AnswerJob] = []  # the job of each row
        self._rows = BatchedCache(one_token, kv_tokens)
        self._packed = Packed(adapters)
        self._gated: Sequence[AnswerJob] | None = None  # the rows whose gates are set
        # What other threads tell the one that generates.
        self._waiting: list[AnswerJob] = []  # replaced or extended under the lock of the turns
        self._turns = Turns(lambda: bool(self._waiting or self._active))
        self._thread: threading.Thread | None = None
        # What it tells callers.
        self._news: list[AnswerJob] = []  # whose callers have not heard yet ...
        self._loop: asyncio.AbstractEventLoop | None = None  # ... and where they are

    def _read_one_token(self) -> DynamicCache:
        """The keys and values of some token, which tell their shapes."""
        cache = DynamicCache()
        token = torch.ones(1, 1, dtype=torch.int64, device=self._device)
        with torch.inference_mode(), without_autocast(self._model)():
            self._reader.forward(token, token, cache, {})
        return cache

    def start(self) -> None:
        """Starts the thread that generates, unless it runs already."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="logo-generate", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Ends all generation, and the thread."""
        self._turns.stop()
        if self._thread is not None:
            self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether answers can be generated."""
        return self._thread is not None and self._thread.is_alive() and not self._turns.stopped

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside the block the caller may use the model: sequences wait, and no mixture is active. Between two blocks
        there is a step, if there are sequences. NotReady: generation has stopped."""
        with self._turns.pause():
            self._packed.clear()
            self._gated = None
            yield

    @property
    def running(self) -> int:
        """The number of answers that are being generated."""
        return sum(not job.ended for job in list(self._active))

    @property
    def waiting(self) -> int:
        """The number of sequences that wait."""
        return len(self._waiting)

    @property
    def kv_tokens(self) -> tuple[int, int]:
        """How many tokens' keys and values are in use, padding included, and how many have room."""
        return self.running * self._rows.columns, self.schedule.kv_tokens

    async def generate(self, jobs: Sequence[AnswerJob], deadline: float | None = None) -> AsyncGenerator[News, None]:
        """Yields the tokens of answers as they come. A job that is set `left` ends; leaving the loop ends all of them.

        Raises TimeoutError after the deadline, on the event loop's clock; NotReady; what a step of an answer raised.
        """
        self._loop = asyncio.get_running_loop()
        news = jobs[0].news  # one event for all of them
        for job in jobs:
            job.news = news
        with self._turns.lock:
            if not self.alive:
                raise NotReady(STOPPED)
            self._waiting += jobs
            self._turns.lock.notify_all()
        late = asyncio.Event()
        timers = [] if deadline is None else [self._loop.call_at(deadline, event.set) for event in (late, news)]
        heard = dict.fromkeys(jobs, 0)  # how many tokens of each the caller has
        try:
            while not all(job.left for job in jobs):
                await news.wait()
                news.clear()
                for job in jobs:
                    if job.left:
                        continue
                    reason = job.reason  # before the tokens: it is set after the last one
                    tokens = tuple(job.tokens[heard[job] :])
                    if tokens or reason is not None:
                        heard[job] += len(tokens)
                        yield job, tokens, reason
                        job.left = job.left or reason is not None
                for job in jobs:
                    if job.error is not None and not job.left:
                        raise job.error
                if late.is_set() and not all(job.left for job in jobs):
                    raise TimeoutError
        finally:
            for timer in timers:
                timer.cancel()
            with self._turns.lock:
                for job in jobs:
                    job.left = True
                self._turns.lock.notify_all()

    def _run(self) -> None:
        try:
            with self._packed.hooks(), torch.inference_mode():
                while self._turns.next_step():
                    self._step()
        finally:
            self._turns.ended()
            for job in (*self._active, *self._waiting):
                job.error = job.error or NotReady(STOPPED)
                self._news.append(job)
            self._hand_out()

    def _step(self) -> None:
        """Reads some of the prompts that wait, and gives every row one token."""
        for job in self._active:
            job.ended = job.ended or job.left
        self._drop_waiting()
        self._read_prompts()
        self._compact()
        if self._active:
            self._in_halves(list(self._active), self._decode)
            self._rows.columns += 1
        if not self._waiting:
            self._compact()
        self._hand_out()

    def _read_prompts(self) -> None:
        """Reads prompts, as many as the schedule allows before the next step of the rows."""
        read = 0
        while not (self._turns.pause_is_wished and read >= self.schedule.step_tokens):
            running = [job for job in self._active if not job.ended]
            room = self.schedule.room_to_read(read, self._waiting, running)
            jobs = self.schedule.next_prompts(room, self._waiting, running) if room else []
            if not jobs:
                return
            read += self._in_halves(jobs, partial(self._prefill, room))
            self._drop_waiting()
            self._hand_out()

    def _drop_waiting(self) -> None:
        """Those that do not wait any more leave the line."""
        with self._turns.lock:  # callers add jobs
            self._waiting = [job for job in self._waiting if not (job.begun or job.ended or job.left)]

    def _in_halves(self, jobs: Sequence[AnswerJob], work: Callable[[Sequence[AnswerJob]], int]) -> int:
        """The number of tokens that `work` reads of these jobs. After an error they are taken in halves, so that only a
        job that fails alone ends: the server has to go on after any error."""
        try:
            return work(jobs)
        except Exception as error:
            if len(jobs) == 1:
                self._fail(jobs[0], error)
                return 0
            traceback.clear_frames(error.__traceback__)  # they hold memory that the next attempt may need
        half = len(jobs) // 2
        return self._in_halves(jobs[:half], work) + self._in_halves(jobs[half:], work)

    def _prefill(self, most: int, jobs: Sequence[AnswerJob]) -> int:
        """Reads prompts to the end, where they become rows, or so many tokens of one."""
        cache = jobs[0].cache or self._cached_prefix(jobs[0])
        start = cache.get_seq_length()
        parts = [job.prompt[start : len(job.prompt) - 1][:most] for job in jobs]
        width = max(map(len, parts))
        if width:
            pads = torch.tensor([width - len(part) for part in parts])[:, None]
            mask = (torch.arange(start + width) >= pads).long().to(self._device)
            ids, _ = padded(parts, self._device, left=True)
            positions = start + torch.arange(width) - pads
            self._gated = None
            with self._packed.opening(self._model, [job.held for job in jobs], pads):
                self._reader.forward(ids, mask, cache, self._placed(positions.clamp_min(0)))
        if start + width < len(jobs[0].prompt) - 1:
            jobs[0].cache = cache
            return width
        self._give_rows(jobs, cache)
        return width * len(jobs)

    def _cached_prefix(self, job: AnswerJob) -> DynamicCache:
        """What is cached of a prompt, up to where adapters begin to act."""
        pages = [] if self._prefix_cache is None else self._prefix_cache.find(job.prompt, job.held.end)
        count = sum(page.tokens for page in pages)
        return laid_out([pages], [count]) if count else DynamicCache()

    def _give_rows(self, jobs: Sequence[AnswerJob], cache: DynamicCache) -> None:
        """Puts prompts that are read into rows: first those of ended answers, then new ones."""
        ended = [row for row, job in enumerate(self._active) if job.ended]
        rows = ended[: len(jobs)]
        new = len(jobs) - len(rows)
        rows += range(len(self._active), len(self._active) + new)
        self._rows.join(cache, [len(job.prompt) - 1 for job in jobs], rows)
        for row, job in zip(rows, jobs, strict=True):
            self._active[row : row + 1] = [job]
            job.cache = None
            job.begun = True

    def _decode(self, jobs: Sequence[AnswerJob]) -> int:
        """Gives each of these rows, which follow one another, its next token."""
        self._rows.make_room()
        if self._gated != jobs:
            self._gated = None
            self._packed.gate([job.held for job in jobs])
            self._gated = jobs
        begin = self._active.index(jobs[0])
        mask, positions, cache = self._rows.seen(begin, begin + len(jobs))
        last_tokens = [[job.tokens[-1] if job.tokens else job.prompt[-1]] for job in jobs]
        output = self._model(
            input_ids=torch.tensor(last_tokens, device=self._device),
            attention_mask=mask.to(self._device),
            use_cache=True,
            **{self._cache_name: cache},
            **self._placed(positions),
        )
        draws = [Draw(job.sampling, len(job.tokens)) for job in jobs]
        tokens = next_tokens(output.logits[:, -1].float(), draws).tolist()
        for job, token in zip(jobs, tokens, strict=True):
            if token == NO_TOKEN:
                self._fail(job, NotFinite(OVERFLOW))
                continue
            try:
                self._take(job, token)
            except Exception as error:  # were it raised, rows that have their tokens would be run again
                self._fail(job, error)
        return len(jobs)

    def _take(self, job: AnswerJob, token: int) -> None:
        """Adds a token to an answer, which may end with it."""
        job.tokens.append(token)  # a reason comes later, so that no caller sees it without its token
        if not job.sampling.ignore_eos and (token in self._ends or any(rule(job.tokens) for rule in self._rules)):
            job.reason = "stop"
        elif len(job.tokens) == job.sampling.max_tokens:
            job.reason = "length"
        job.ended = job.reason is not None
        self._news.append(job)

    def _placed(self, positions: Tensor) -> dict[str, Any]:
        """The positions of tokens, as an argument of the model."""
        return {"position_ids": positions.to(self._device)} if self._takes_positions else {}

    def _compact(self) -> None:
        """Drops rows that are not needed any more; the last ones take their places."""
        for row in reversed(range(len(self._active))):
            if self._active[row].ended:
                self._rows.drop(row)
                self._active[row] = self._active[-1]
                self._active.pop()

    def _hand_out(self) -> None:
        """Wakes the callers of answers that have got on."""
        events = {job.news for job in self._news}
        self._news = []
        if events and self._loop is not None:
            with suppress(RuntimeError):  # it has ended, and nobody listens
                self._loop.call_soon_threadsafe(lambda: list(map(asyncio.Event.set, events)))

    def _fail(self, job: AnswerJob, error: Exception) -> None:
        """Ends an answer that cannot be generated."""
        _log.warning("an answer cannot be generated: %s", type(error).__name__, exc_info=error)
        traceback.clear_frames(error.__traceback__)
        job.error = error
        job.ended = True
        job.cache = None
        self._news.append(job)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _servable_context(model: Any, context: int | None) -> int | None:
    """The most tokens of a prompt and its answer, of which rows of any length may share steps; ModelError: they may not
    share any."""
    if not reusable(model, longer=False):
        kept = "it keeps more of earlier tokens than keys and values"
        raise ModelError(f"{type(model).__name__} cannot be served: {kept}; use LoGo.generate")
    if reusable(model):
        return context
    # A row that is longer than the original context would turn the keys of the others in its batch.
    config = text_config(model)
    original = (config.rope_parameters or {}).get("original_max_position_embeddings") or config.max_position_embeddings
    if context is not None and context <= original:
        return context
    most = f"a prompt and its answer may have {original} tokens together, the model's original context"
    warnings.warn(f"long-rope: {most}", UserWarning, stacklevel=4)
    return int(original)
