"""`Batching`: transformers' continuous batching with a mixture and a sampling for each sequence.

Sequences join and leave at any step. Cached blocks are never shared between sequences, since their content depends on
the mixture. If adapters act only from a position on, keys and values before it are copied from the probe's cache into
the blocks of a sequence.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from logo.core import FinishReason
from logo.decoding import greedy_config
from logo.endings import end_tokens
from logo.errors import ModelError, UsageError
from logo.mixing.cache import AdapterCache
from logo.prefix_cache import Page, PrefixCache
from logo.protocol import Delta, GenerationFailed, GenerationTimeout, Sampling
from logo.serving.memory import Memory, Plan
from logo.serving.packed import Packed, PackedMixture
from logo.serving.sampling import Drawing, next_tokens
from logo.serving.steps import Steps, attach

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PAGE = 32
# Assumed tokens of a sequence, if memory for the whole context of each would be too much.
_USUAL_LENGTH = 512
# The most tokens of one step. Long prompts are read in such parts, so that other sequences need not wait.
_STEP_TOKENS = 512


# How far logits may be from the model's own, in units of the dtype's precision. Two kinds of attention in one half
# precision were up to 2.2 units apart (nine models of 3 to 48 layers). In float32 they were up to 10 units of 2^-20
# apart (Gemma 3 270M, on some processors more than on others); a GPU may compute float32 in TF32, whose unit is 2^-10.
# No unit is therefore taken to be smaller than 2^-17, or 2^-10 on a GPU. A position that is one off, or a token that is
# lost, was more than 0.08 in all of them; in bfloat16 this allows 0.06, in float32 on a CPU 0.00006.
_ROUNDINGS = 8
_FLOAT32, _TF32 = 2.0**-17, 2.0**-10


@dataclass
class _Job:
    prompt: Sequence[int]
    mixture: PackedMixture
    drawing: Drawing
    outputs: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)
    error: Exception | None = None
    begun: bool = False  # its first tokens have been computed


class Batching(Steps):
    """Generates for many callers at once.

    Args:
        model: a causal LM whose attention transformers can batch (sdpa or flash).
        adapters: the cache of its adapters.
        memory: see `Memory`.
        prefix_cache: of what the base model reads, for adapters that act from a position on only.
        context: the most tokens of a prompt and its answer; None if the model has no limit.

    Attributes:
        context: the same, within the memory for keys and values.
        plan: of the memory.
        steps: the number of forward passes with and without a mixture: `{"gate", "base"}`.
        found, missed: tokens of prompts whose cached keys and values were there when an answer began, and of those
            that had been dropped.

    Raises:
        ModelError: the model, or this version of transformers, cannot be batched.
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
        from transformers.generation.continuous_batching.model_runner import infer_max_single_request_tokens

        self._model = model
        self._adapters = adapters
        self._prefix_cache = prefix_cache
        self.found = self.missed = 0
        self._packed = Packed(adapters, _head(model))
        self._ends = sorted(end_tokens(model.generation_config)) or [-1]
        self._jobs: dict[str, _Job] = {}
        self._numbers = itertools.count()
        self._standing: tuple[Any, ...] | None = None
        self._mixed = False
        self._drawn: list[Drawing] = []  # of the sequences of the step
        self.steps = {"base": 0, "gate": 0}
        self._hooked: ExitStack | None = None
        self.plan = Plan.of(model, adapters.budget, memory)
        self._manager = self._make(memory, context)
        attach(self._manager, self)
        reach = infer_max_single_request_tokens(self._cache)
        self.context = reach if context is None else min(context, reach)

    def start(self) -> None:
        """Starts the thread that generates, unless it runs already.

        Raises:
            ModelError: the logits of a sequence differ from those of the model alone.
        """
        if self._hooked is not None:
            return
        self._hooked = ExitStack()
        self._hooked.enter_context(self._packed.hooks())
        self._manager.start()
        try:
            self._check()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Ends all generation, and the thread."""
        if self._hooked is None:
            return
        if self._manager.is_running():
            self._manager.stop(block=True, hard_stop=True)
        self._hooked.close()
        self._hooked = None

    @property
    def alive(self) -> bool:
        """Whether the thread that generates is running."""
        return bool(self._manager.is_running()) and self._manager.background_thread_status.fatal_error is None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside the block the caller may use the model: sequences wait, and no mixture is active."""
        with self._manager.pause():
            self._packed.gate([])
            self._standing = None
            yield

    @property
    def running(self) -> int:
        """The number of sequences that are being generated."""
        return len(self._manager.batch_processor.scheduler.active_requests)

    @property
    def waiting(self) -> int:
        """The number of sequences that wait."""
        active = self._manager.batch_processor.scheduler.active_requests  # also those cancelled in this step
        return sum(name not in active for name in tuple(self._jobs))

    @property
    def kv_blocks(self) -> tuple[int, int]:
        """The numbers of used and of all blocks of keys and values."""
        total = self._cache.num_blocks
        return round(total * (1 - self._cache.compute_free_capacity())), total

    async def generate(
        self, prompt: Sequence[int], mixture: PackedMixture, sampling: Sampling, deadline: float | None = None
    ) -> AsyncGenerator[Delta, None]:
        """Yields the tokens of an answer as they come. Leaving the loop ends the sequence.

        Args:
            deadline: on the event loop's clock; None: no deadline.

        Raises:
            GenerationFailed, GenerationTimeout: see there.
        """
        job = _Job(prompt, mixture, Drawing(sampling))
        timer = None
        if deadline is not None:
            timer = asyncio.get_running_loop().call_at(deadline, job.outputs.put_nowait, None)
        sequence = str(next(self._numbers))
        self._jobs[sequence] = job
        manager, ended, sent = self._manager, False, 0
        try:
            manager.register_result_handler(sequence, job.outputs.put_nowait)
            # Always streaming, since a cancelled sequence reports nothing otherwise.
            added = manager.add_request(
                list(prompt), sequence, sampling.max_tokens, streaming=True, eos_token_id=self._ends
            )
            if added is None:
                raise GenerationFailed("generation has stopped; restart the server")
            while not ended:
                output = await job.outputs.get()
                # The last output holds all earlier ones. None says that the deadline has passed, which does not matter
                # to an answer that is finished.
                while not (output is None or output.is_finished() or job.outputs.empty()):
                    output = job.outputs.get_nowait()
                if output is None:
                    raise GenerationTimeout("the answer exceeded the time limit of a request")
                ended = output.is_finished()
                if output.error is not None or job.error is not None:
                    ended = True
                    raise GenerationFailed(output.error or str(job.error)) from job.error
                tokens = output.generated_tokens
                reason: FinishReason | None = None
                if ended:
                    reason = "stop" if tokens and tokens[-1] in self._ends else "length"
                yield Delta(tuple(tokens[sent:]), reason)
                sent = len(tokens)
        finally:
            if timer is not None:
                timer.cancel()
            if not ended:
                manager.cancel_request(sequence)
            with manager.output_router._lock:
                manager.output_router.result_handlers.pop(sequence, None)
            del self._jobs[sequence]

    # -- called by the thread that generates ------------------------------------------------------------------------

    def beginning(self, sequence: str) -> Sequence[Page]:
        """The cached pages of a prompt, up to where adapters begin to act."""
        job = self._jobs.get(sequence)
        if job is None or not job.mixture.end or self._prefix_cache is None:
            return []
        return self._prefix_cache.find(job.prompt, job.mixture.end)

    def before(self, step: Sequence[tuple[str, int, bool, int]]) -> None:
        """Sets the gates of the next forward pass."""
        unheard = self._manager.output_router.output_queue  # outputs for callers that have left
        while not unheard.empty():
            unheard.get_nowait()
        self._count(step)
        sequences = [(self._mixture(name), tokens, drawn, first) for name, tokens, drawn, first in step]
        # Gates that are all open do not depend on the position any more.
        standing = tuple(
            (name, tokens, drawn, first if mixture is not None and first < mixture.last else None)
            for (name, *_), (mixture, tokens, drawn, first) in zip(step, sequences, strict=True)
        )
        if standing != self._standing:
            self._standing = None
            self._mixed = self._packed.gate(sequences)
            self._standing = standing
            if self._model.device.type == "cuda":  # the forward pass runs in its own stream
                torch.cuda.current_stream(self._model.device).synchronize()
        self.steps["gate" if self._mixed else "base"] += 1

    def _count(self, step: Sequence[tuple[str, int, bool, int]]) -> None:
        """Counts the cached and the missing tokens of each prompt whose first tokens are computed in this step."""
        for name, _, _, first in step:
            job = self._jobs.get(name)
            if job is None or job.begun or self._prefix_cache is None:
                continue
            job.begun = True
            found = min(first, job.mixture.end)
            self.found, self.missed = self.found + found, self.missed + job.mixture.end - found

    def sample(self, scores: Tensor, ids: Sequence[str]) -> Tensor:
        """Draws the next token of each sequence by its own sampling."""
        jobs = [self._jobs.get(sequence) for sequence in ids]
        self._drawn = [_GREEDY if job is None else job.drawing for job in jobs]
        return next_tokens(scores, self._drawn)

    def accepted(self) -> None:
        """Counts the draws."""
        for drawing in self._drawn:
            drawing.count += 1

    def failed(self, sequence: str, error: Exception) -> None:
        """Records why a sequence was ended."""
        self._standing = None
        job = self._jobs.get(sequence)
        if job is not None:
            job.error = error

    def _mixture(self, sequence: str) -> PackedMixture | None:
        job = self._jobs.get(sequence)
        return None if job is None else job.mixture  # None: the caller has left, and this is the sequence's last step

    @torch.no_grad()
    def _check(self) -> None:
        """Reads a prompt and one more token, batched and by the model alone, and compares the logits.

        Logits differ by rounding only, while tokens may differ if two are nearly equally likely. The distance is the
        root mean square over the vocabulary, divided by the standard deviation of the logits.
        """
        model, name = self._model, type(self._model).__name__
        prompt = [1 + i % (model.config.get_text_config().vocab_size - 1) for i in range(2, 10)]
        seen: list[Tensor] = []
        looking = model.register_forward_hook(lambda module, inputs, output: seen.append(output.logits[0, -1].float()))
        try:
            self._manager.add_request(prompt, "check", 2, eos_token_id=-1)
            answer = self._manager.get_result("check", timeout=600)
        finally:
            looking.remove()
        if answer is None or answer.error:
            reason = "nothing came" if answer is None else answer.error
            raise ModelError(f"{name} cannot be served by transformers' continuous batching: {reason}")
        with self.paused():
            ids = torch.tensor([[*prompt, answer.generated_tokens[0]]], device=model.device)
            want = model(input_ids=ids, use_cache=False).logits[0, -2:].float()
        found = torch.stack(seen).to(want.device)
        apart = float(((found - want).square().mean(dim=1).sqrt() / want.std(dim=1)).max())
        smallest = _TF32 if model.device.type == "cuda" else _FLOAT32
        allowed = _ROUNDINGS * max(torch.finfo(self._adapters.dtype).eps, smallest)
        if not apart <= allowed:
            raise ModelError(
                f"{name} cannot be served: transformers' continuous batching does not compute what the model does; its "
                f"logits are {apart:.2g} standard deviations away from the model's own, and rounding in "
                f"{str(self._adapters.dtype).removeprefix('torch.')} explains {allowed:.2g}"
            )

    # -- memory -----------------------------------------------------------------------------------------------------

    @property
    def _cache(self) -> Any:
        return self._manager.batch_processor.cache

    def _make(self, memory: Memory, context: int | None) -> Any:
        from transformers import ContinuousBatchingConfig

        model = self._model
        attention = model.config._attn_implementation
        if attention != "sdpa" and "flash" not in attention:
            # Transformers would replace it by an attention without features that some models need (Gemma 2's soft
            # cap), and answers would be silently wrong.
            raise ModelError(
                f"{type(model).__name__} cannot be served: expected attention of kind sdpa or flash, found "
                f"{attention!r}, which transformers' continuous batching does not compute exactly"
            )
        config = ContinuousBatchingConfig(
            page_size=_PAGE,
            num_blocks=self._blocks(memory, context),
            max_batch_tokens=_STEP_TOKENS,
            max_requests_per_batch=min(memory.concurrent, _STEP_TOKENS),
            allow_block_sharing=False,
            use_async_batching=False,
            use_cuda_graph=False,
            max_memory_percent=0.9,
            auto_switch_to_flash=self._adapters.dtype.itemsize == 2,
        )
        generation = greedy_config(eos_token_id=self._ends, max_new_tokens=1)
        try:
            return model.init_continuous_batching(generation, config)
        except (AttributeError, ValueError) as error:
            raise ModelError(f"this base model cannot be served in batches: {error}") from error

    def _blocks(self, memory: Memory, context: int | None) -> int:
        """The number of blocks: room for the usual length of every sequence and one full context, within the memory."""
        config = self._model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        per_token: int = 2 * config.num_hidden_layers * heads * size * self._adapters.dtype.itemsize
        longest = context or _USUAL_LENGTH
        tokens = max(longest, memory.concurrent * min(longest, _USUAL_LENGTH))
        shared = 0 if self._prefix_cache is None else self._prefix_cache.budget
        if shared >= self.plan.kv:
            raise UsageError(
                f"{shared / 1e9:.2f} GB for prompt prefixes (--prefix-cache-gb) leave nothing of the "
                f"{self.plan.kv / 1e9:.2f} GB for keys and values (--kv-cache-gb)"
            )
        tokens = min(tokens, (self.plan.kv - shared) // per_token)
        return max(1, math.ceil(tokens / _PAGE))


def _head(model: PreTrainedModel) -> str | None:
    """The path of the output head, if continuous batching gives it one token per sequence only."""
    if not model._supports_logits_to_keep():
        return None
    head = model.get_output_embeddings()
    return next((path for path, module in model.named_modules() if module is head), None)


_GREEDY = Drawing(Sampling(1))
