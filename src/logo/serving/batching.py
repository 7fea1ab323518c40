"""`Batching`: a loop over the model's forward pass that generates for many callers at once, each with its own mixture.

    waiting -> prefill, together or in parts, between steps -> `BatchedCache` -> a token per row and step -> Delta, ...

Rows join and leave between steps. Prefilling stops before the output head and leaves the last token of a prompt to the
first step of its row. Keys and values are in one tensor per layer, in which every row ends in the same column, so that
a step is a plain batch of the model. If adapters act only from a position on, what is before it comes from the prefix
cache.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
import traceback
from collections import deque
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from logo.core import FinishReason
from logo.decoding import OVERFLOW
from logo.endings import end_tokens
from logo.errors import ModelError, NotFinite, UsageError
from logo.mixing.cache import AdapterCache
from logo.models import input_device, padded, text_config
from logo.prefix_cache import PrefixCache, cache_argument, laid_out, reusable
from logo.protocol import Delta, GenerationFailed, GenerationTimeout, Sampling
from logo.serving.batched_cache import BatchedCache
from logo.serving.memory import Memory, Plan
from logo.serving.packed import Packed, PackedMixture
from logo.serving.sampling import NO_TOKEN, Drawing, next_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The most tokens of a prompt that are read between two steps of the rows, which wait meanwhile.
_STEP_TOKENS = 512
STOPPED = "generation has stopped; restart the server"
_ALIKE = 0.7  # the length of a prompt divided by that of a longer one that is read beside it, at least
_log = logging.getLogger("logo.serving")


@dataclass(eq=False)
class _Job:
    """One answer: what is asked, and how far it is."""

    prompt: Sequence[int]
    mixture: PackedMixture
    drawing: Drawing
    loop: asyncio.AbstractEventLoop
    outputs: asyncio.Queue[Delta | Exception] = field(default_factory=asyncio.Queue)
    left: bool = False  # the caller does not listen any more
    ended: bool = False  # its row, if it has one, is not needed any more
    begun: bool = False  # it has a row
    tokens: list[int] = field(default_factory=list)  # of the answer
    cache: DynamicCache | None = None  # of the part of the prompt that is read

    @property
    def most(self) -> int:
        """The most tokens of prompt and answer."""
        return len(self.prompt) + self.drawing.sampling.max_tokens


class Batching:
    """Generates for many callers at once, in a thread of its own.

    Args:
        model: a causal LM that keeps only keys and values of earlier tokens.
        adapters: the cache of its adapters.
        memory: see `Memory`.
        context: the most tokens of a prompt and its answer; None if the model has no limit.
        prefix_cache: of what the base model reads, for adapters that act from a position on only.

    Attributes:
        context: the same, within the memory for keys and values.
        plan: of the memory.
        steps: the number of forward passes with and without a mixture: `{"gate", "base"}`.
        found, missed: tokens of prompts whose cached keys and values were there when an answer began, and of those
            that had been dropped.

    Raises:
        ModelError: the model keeps something else of earlier tokens.
        UsageError: the requested memory is more than there is.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        adapters: AdapterCache,
        memory: Memory,
        context: int | None,
        prefix_cache: PrefixCache | None = None,
    ) -> None:
        if not reusable(model, longer=False):
            kept = "it keeps more of earlier tokens than keys and values"
            raise ModelError(f"{type(model).__name__} cannot be served: {kept}; use LoGo.generate")
        if not reusable(model):  # a long row would turn the keys of the others in its batch
            parts = text_config(model)
            first = (parts.rope_parameters or {}).get("original_max_position_embeddings")
            context = min(context or first, first or parts.max_position_embeddings)
        self._model, self._adapters, self._prefix_cache = model, adapters, prefix_cache
        self._concurrent, self._device = memory.concurrent, input_device(model)
        self._packed, self._rows = Packed(adapters), BatchedCache()
        self._reader = prefix_cache or PrefixCache(model, 0)
        self._ends = end_tokens(model.generation_config)
        self._arguments = inspect.signature(model.forward).parameters
        self._waiting: deque[_Job] = deque()
        self._active: list[_Job] = []  # the job of each row
        self._change = threading.Condition()
        self._pausing, self._stepping, self._stopped = 0, False, False
        self._thread: threading.Thread | None = None
        self._said: list[tuple[_Job, Delta | Exception]] = []  # what callers have not heard yet
        self._gated: Sequence[_Job] | None = None  # the rows whose gates are set
        self.steps, self.found, self.missed = {"base": 0, "gate": 0}, 0, 0
        self.plan = Plan.of(model, adapters.budget, memory)
        self._tokens = self._room()
        self.context = self._tokens if context is None else min(context, self._tokens)

    def _room(self) -> int:
        """How many tokens' keys and values have room, padding included."""
        config = self._model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shared = 0 if self._prefix_cache is None else self._prefix_cache.budget
        if shared >= self.plan.kv:
            raise UsageError(
                f"{shared / 1e9:.2f} GB for prompt prefixes (--prefix-cache-gb) leave nothing of the "
                f"{self.plan.kv / 1e9:.2f} GB for keys and values (--kv-cache-gb)"
            )
        each: int = 2 * config.num_hidden_layers * heads * size * self._adapters.dtype.itemsize
        return max(1, (self.plan.kv - shared) // each)

    # -- what the service asks -------------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts the thread that generates, unless it runs already."""
        if self._thread is None:
            with torch.inference_mode():
                cache, one = DynamicCache(), torch.ones(1, 1, dtype=torch.int64, device=self._device)
                self._reader.forward(one, one, cache, {})
                self._rows.shape(cache)
            self._stopped = False
            self._thread = threading.Thread(target=self._run, name="logo-generate", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Ends all generation, and the thread."""
        with self._change:
            self._stopped = True
            self._change.notify_all()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    @property
    def alive(self) -> bool:
        """Whether the thread that generates is running."""
        return self._thread is not None and self._thread.is_alive() and not self._stopped

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside the block the caller may use the model: sequences wait, and no mixture is active."""
        with self._change:
            self._pausing += 1
            self._change.wait_for(lambda: not self._stepping)
        try:
            if self._stopped:
                raise ModelError(STOPPED)
            self._packed.clear()
            self._gated = None
            yield
        finally:
            with self._change:
                self._pausing -= 1
                self._change.notify_all()

    @property
    def running(self) -> int:
        """The number of sequences that are being generated."""
        return sum(not job.ended for job in list(self._active))

    @property
    def waiting(self) -> int:
        """The number of sequences that wait."""
        return len(self._waiting)

    @property
    def kv_tokens(self) -> tuple[int, int]:
        """How many tokens' keys and values are in use, padding included, and how many have room."""
        return self.running * self._rows.columns, self._tokens

    async def generate(
        self, prompt: Sequence[int], mixture: PackedMixture, sampling: Sampling, deadline: float | None = None
    ) -> AsyncGenerator[Delta, None]:
        """Yields the tokens of an answer as they come. Leaving the loop ends the sequence.

        Args:
            deadline: on the event loop's clock; None: no deadline.

        Raises:
            GenerationFailed, GenerationTimeout: see there.
        """
        loop = asyncio.get_running_loop()
        job = _Job(prompt, mixture, Drawing(sampling), loop)
        late = GenerationTimeout("the answer exceeded the time limit of a request")
        timer = None if deadline is None else loop.call_at(deadline, job.outputs.put_nowait, late)
        with self._change:
            if not self.alive:
                raise GenerationFailed(STOPPED)
            self._waiting.append(job)
            self._change.notify_all()
        try:
            reason: FinishReason | None = None
            while reason is None:
                said, tokens = await job.outputs.get(), list[int]()
                while isinstance(said, Delta):  # what came meanwhile is sent together
                    tokens += said.tokens
                    reason = said.finish_reason
                    if reason is not None or job.outputs.empty():
                        break
                    said = job.outputs.get_nowait()
                if tokens or reason is not None:
                    yield Delta(tuple(tokens), reason)
                if isinstance(said, GenerationTimeout):
                    raise said
                if isinstance(said, Exception):
                    raise GenerationFailed(str(said)) from said
        finally:
            if timer is not None:
                timer.cancel()
            with self._change:
                job.left = True
                self._change.notify_all()

    # -- the thread that generates ---------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with self._packed.hooks(), torch.inference_mode():
                while self._begun():
                    self._step()
        finally:
            with self._change:
                self._stopped, self._stepping = True, False
                self._change.notify_all()
            self._said += [(job, ModelError(STOPPED)) for job in (*self._active, *self._waiting)]
            self._hand_out()

    def _begun(self) -> bool:
        """Waits until there is something to do, and nobody else uses the model; false once generation has stopped."""
        with self._change:
            self._stepping = False
            self._change.notify_all()
            self._change.wait_for(lambda: self._stopped or (not self._pausing and bool(self._waiting or self._active)))
            self._stepping = not self._stopped
            return self._stepping

    def _step(self) -> None:
        """Reads some of the prompts that wait, and gives every row one token."""
        for job in self._active:
            job.ended = job.ended or job.left
        with self._change:  # callers add jobs
            for job in [one for one in self._waiting if one.left]:
                self._waiting.remove(job)
        left = _STEP_TOKENS
        while left > 0 and (jobs := self._next(left)):
            left -= self._read(jobs, left)
            with self._change:
                for job in jobs:
                    if job.begun or job.left:
                        self._waiting.remove(job)
            self._hand_out()
        self._compact()
        if jobs := list(self._active):
            try:
                self._rows.make_room()
                tokens = self._decode(0, len(jobs))
                self._rows.columns += 1
            except Exception as error:
                tokens = [error] * len(jobs)
            for job, token in zip(jobs, tokens, strict=True):
                if isinstance(token, Exception):
                    self._fail(job, token)
                else:
                    self._add(job, token)
        if not self._waiting:
            self._compact()
        self._hand_out()

    def _next(self, most: int) -> list[_Job]:
        """The prompts that are read next: the first, and if it is short, others that are about as long, so that they
        need little padding; as many as there is room for, as long as they may become."""
        running = [one for one in self._active if not one.ended]
        jobs, longest = list[_Job](), max((one.most for one in running), default=0)
        with self._change:
            waiting = list(self._waiting)
        for job in waiting:
            length, longest_now = len(job.prompt), max(longest, job.most)
            rows = len(running) + len(jobs) + 1
            if rows > self._concurrent or rows * longest_now > self._tokens:
                break
            if jobs:
                widest = max(length, *(len(one.prompt) for one in jobs))
                if job.mixture.end or (len(jobs) + 1) * widest > most or length < _ALIKE * widest:
                    continue
                if min(len(one.prompt) for one in jobs) < _ALIKE * widest:
                    continue
            jobs.append(job)
            longest = longest_now
            if job.cache is not None or job.mixture.end or length > most:
                break
        return jobs

    def _read(self, jobs: Sequence[_Job], most: int) -> int:
        """Reads prompts to the end, where they become rows, or so many tokens of one; returns the number of tokens.
        After an error, they are read in halves."""
        try:
            return self._prefill(jobs, most)
        except Exception as error:  # the server has to go on after any error
            if len(jobs) == 1:
                self._fail(jobs[0], error)
                return 0
            traceback.clear_frames(error.__traceback__)
        half = len(jobs) // 2
        return self._read(jobs[:half], most) + self._read(jobs[half:], most)

    def _prefill(self, jobs: Sequence[_Job], most: int) -> int:
        cache = jobs[0].cache or self._beginning(jobs[0])
        start = cache.get_seq_length()
        parts = [job.prompt[start : len(job.prompt) - 1][:most] for job in jobs]
        width = max(map(len, parts))
        if width:
            pads = torch.tensor([width - len(part) for part in parts])[:, None]
            mask = (torch.arange(start + width) >= pads).long().to(self._device)
            ids, positions = padded(parts, self._device, left=True)[0], start + torch.arange(width) - pads
            self._gated = None
            with self._packed.opening(self._model, [job.mixture for job in jobs], pads):
                self._count()
                self._reader.forward(ids, mask, cache, self._placed(positions.clamp_min(0)))
        if start + width < len(jobs[0].prompt) - 1:
            jobs[0].cache = cache
            return width
        places = [i for i, job in enumerate(self._active) if job.ended][: len(jobs)]
        places += range(len(self._active), len(self._active) + len(jobs) - len(places))
        self._rows.join(cache, [len(job.prompt) - 1 for job in jobs], places)
        for place, job in zip(places, jobs, strict=True):
            self._active[place : place + 1] = [job]
            job.cache, job.begun = None, True
        return len(jobs) * width

    def _beginning(self, job: _Job) -> DynamicCache:
        """What is cached of a prompt, up to where adapters begin to act."""
        pages = [] if self._prefix_cache is None else self._prefix_cache.find(job.prompt, job.mixture.end)
        count = sum(page.tokens for page in pages)
        self.found, self.missed = self.found + count, self.missed + job.mixture.end - count
        return laid_out([pages], [count]) if count else DynamicCache()

    def _decode(self, begin: int, end: int) -> list[int | Exception]:
        """The next token of each of these rows. After an error they are computed in halves, so that only a row that
        fails alone ends."""
        jobs = self._active[begin:end]
        try:
            if self._gated != jobs:
                self._gated = None
                self._packed.gate([job.mixture for job in jobs])
                self._gated = jobs
            ids = torch.tensor([[(job.tokens or job.prompt)[-1]] for job in jobs], device=self._device)
            mask, positions, cache = self._rows.seen(begin, end)
            options = {**self._placed(positions), cache_argument(self._model) or "": cache, "use_cache": True}
            self._count()
            found = self._model(input_ids=ids, attention_mask=mask.to(self._device), **options)
            return self._drawn(found.logits[:, -1].float(), jobs)
        except Exception as error:
            if len(jobs) == 1:
                return [error]
            traceback.clear_frames(error.__traceback__)  # they hold memory that the next attempt may need
        half = (begin + end) // 2
        return self._decode(begin, half) + self._decode(half, end)

    def _placed(self, positions: Tensor) -> dict[str, Any]:
        return {"position_ids": positions.to(self._device)} if "position_ids" in self._arguments else {}

    def _count(self) -> None:
        self.steps["gate" if self._packed.mixed else "base"] += 1

    def _drawn(self, logits: Tensor, jobs: Sequence[_Job]) -> list[int | Exception]:
        """The next token of each job, or an error if its logits are not finite."""
        tokens = next_tokens(logits, [job.drawing for job in jobs]).tolist()
        for job in jobs:
            job.drawing.count += 1
        return [NotFinite(OVERFLOW) if token == NO_TOKEN else token for token in tokens]

    def _add(self, job: _Job, token: int) -> None:
        """Adds a token to an answer."""
        job.tokens.append(token)
        ended = token in self._ends
        full = len(job.tokens) == job.drawing.sampling.max_tokens
        reason: FinishReason | None = "stop" if ended else "length" if full else None
        job.ended = reason is not None
        self._said.append((job, Delta((token,), reason)))

    def _compact(self) -> None:
        """Drops rows that are not needed any more; the last ones take their places."""
        for at in reversed(range(len(self._active))):
            if self._active[at].ended:
                self._rows.drop(at)
                self._active[at] = self._active[-1]
                self._active.pop()

    def _hand_out(self) -> None:
        """Tells callers what has happened to their answers, all of an event loop at once."""
        loops: dict[asyncio.AbstractEventLoop, list[tuple[_Job, Delta | Exception]]] = {}
        for job, said in self._said:
            loops.setdefault(job.loop, []).append((job, said))
        self._said = []
        for loop, some in loops.items():
            with suppress(RuntimeError):  # it has ended, and nobody listens
                loop.call_soon_threadsafe(_put, some)

    def _fail(self, job: _Job, error: Exception) -> None:
        _log.warning("an answer cannot be generated: %s", type(error).__name__, exc_info=error)
        traceback.clear_frames(error.__traceback__)
        job.left, job.ended, job.cache = True, True, None
        self._said.append((job, error))
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _put(said: Sequence[tuple[_Job, Delta | Exception]]) -> None:
    for job, one in said:
        job.outputs.put_nowait(one)
