"""The places in transformers' continuous batching where our gates and sampling are inserted.

This is the only file that uses transformers' internals. Five methods of objects that a manager owns are wrapped:

    ContinuousBatchingIOs.prepare_batch_tensors   tells which sequences make up the step, and how it may be taken back
    ContinuousBatchProcessor._generation_step     gates before the forward pass; a failure ends one sequence, not all
    ModelRunner._sample                           draws by sequence instead of one way for all
    ContinuousBatchingIOs.prepare_batch_update    hands on the tokens, which have come to the host by then
    Scheduler._infer_request_tokens               writes what the base model has read of a prompt into its cache

A sequence with non-finite logits may have affected others in the same step, because attention computes all of them in
one product and masks the other sequences only afterwards. Such a step fails as a whole and is repeated in halves, until
the non-finite sequence is alone. Whether a row is finite is encoded in its token, so that it reaches the host in the
one transfer of every step.

Written for transformers 5.24 (`VERSIONS`); `attach` refuses a version whose internals look different.
"""

from __future__ import annotations

import inspect
import logging
import traceback
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from logo.decoding import OVERFLOW
from logo.errors import ModelError, NotFinite

VERSIONS = ">=5.24,<5.25"

NO_TOKEN = -1
"""What `Steps.sample` returns for a row that is not finite."""

_log = logging.getLogger("logo.serving")

_EXPECTED = {
    ("inputs_and_outputs", "prepare_batch_tensors"): (
        "requests_in_batch",
        "logits_processors",
        "use_decode_fast_path",
        "num_q_tokens",
    ),
    ("inputs_and_outputs", "prepare_batch_update"): (),
    ("", "_generation_step"): ("model",),
    ("", "_handle_request_error"): ("error", "state"),
    ("", "update_batch"): (),
    ("model_runner", "_sample"): ("scores", "output_ids"),
    ("scheduler", "finish_request"): ("request_id",),
    ("scheduler", "_infer_request_tokens"): ("state", "request_ids_to_remove_from_waiting"),
    ("cache", "can_store_request_tokens"): ("state", "request_len"),
}


class Steps(ABC):
    """What decides about a step; called by the generation thread."""

    @abstractmethod
    def before(self, step: Sequence[tuple[str, int, bool, int]]) -> None:
        """What the next forward pass holds.

        Args:
            step: the sequences in order: id, number of tokens, whether its next token is drawn after them, and which
                token of the sequence is the first of them.
        """

    @abstractmethod
    def beginning(self, sequence: str) -> list[tuple[Tensor, Tensor]]:
        """What is known of how a sequence begins, which is about to be read: per layer, keys and values
        (heads, tokens, size). Empty: nothing. At least one token of the sequence is not among them."""

    @abstractmethod
    def sample(self, scores: Tensor, ids: Sequence[str]) -> Tensor:
        """(rows,) next tokens from (rows, vocabulary) float32 logits, one row per sequence.

        Where a row is not finite, `NO_TOKEN` stands in its place, and the step will be computed again.
        """

    @abstractmethod
    def accepted(self, tokens: Sequence[int]) -> None:
        """The step is valid: these are the tokens that `sample` returned last."""

    @abstractmethod
    def failed(self, sequence: str, error: Exception) -> None:
        """A step failed, and this sequence is ended so that the others can continue."""


def attach(manager: Any, steps: Steps) -> None:
    """Lets `steps` decide about every step of a manager; called before the manager is started.

    Raises:
        ModelError: another version of transformers, whose internals are different.
    """
    manager.warmup()  # makes the processor
    processor = manager.batch_processor
    _check(processor)
    io, runner = processor.inputs_and_outputs, processor.model_runner
    prepare, compute = io.prepare_batch_tensors, processor._generation_step
    prepared: dict[str, Any] = {}
    tokens: list[list[int]] = []
    drawn: list[int] = []
    sampled: list[str] = []  # not the sequences whose prompts are read in part only

    def prepare_batch_tensors(**options: Any) -> None:
        prepared.update(options)
        tokens[:] = [list(request.state.tokens_to_process) for request in options["requests_in_batch"]]
        prepare(**options)

    def take_back() -> list[Any]:
        """The sequences of the step, as they were before it was prepared."""
        requests = list(prepared["requests_in_batch"])
        for request, own in zip(requests, tokens, strict=True):
            request.state.position_offset -= request.query_length
            request.state.tokens_to_process = own
        io.requests_in_batch = []
        return requests

    def generation_step(model: Any) -> None:
        failure: Exception | None = None
        try:
            sampled.clear()
            steps.before(
                [
                    (r.state.request_id, r.query_length, r.has_new_token, r.state.position_offset - r.query_length)
                    for r in io.requests_in_batch
                ]
            )
            compute(model)
            drawn[:] = io.output_ids[0, : len(sampled)].tolist()
            if NO_TOKEN in drawn:
                raise NotFinite(OVERFLOW)
            steps.accepted(drawn)
        except Exception as error:  # whatever it is, the server has to go on
            failure = error
        if failure is not None:
            traceback.clear_frames(failure.__traceback__)  # what they hold is memory that the next attempt may need
            requests = take_back()
            if len(requests) == 1:
                _end(processor, steps, requests[0].state, failure)
                return
            del failure
            half = len(requests) // 2  # whichever it was, it fails again, and in the end alone
            for part in (requests[:half], requests[half:]):
                size = sum(request.query_length for request in part)
                prepare_batch_tensors(**{**prepared, "requests_in_batch": part, "num_q_tokens": size})
                generation_step(model)
                processor.update_batch()
                io.requests_in_batch = []  # the loop updates once more

    def sample(scores: Tensor, output_ids: Tensor) -> None:
        sampled[:] = [request.state.request_id for request in io.requests_in_batch if request.has_new_token]
        output_ids[0, : len(sampled)].copy_(steps.sample(scores[0, : len(sampled)], sampled))

    def prepare_batch_update() -> tuple[list[Any], list[int], None]:
        return io.requests_in_batch, drawn, None

    scheduler, cache = processor.scheduler, processor.cache
    infer = scheduler._infer_request_tokens

    def infer_request_tokens(state: Any, removed: set[str]) -> Any:
        if state.status.name == "PENDING" and not state.is_cpu_offloaded and not state.position_offset:
            _write(scheduler, cache, state, removed, steps.beginning(state.request_id))
        return infer(state, removed)

    scheduler._infer_request_tokens = infer_request_tokens
    io.prepare_batch_tensors = prepare_batch_tensors
    io.prepare_batch_update = prepare_batch_update
    processor._generation_step = generation_step
    runner._sample = sample


def _write(scheduler: Any, cache: Any, state: Any, removed: set[str], known: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Writes keys and values of a beginning into the blocks of a request, which then is one that was read in part."""
    count = known[0][0].shape[1] if known else 0
    if not count or not cache.can_store_request_tokens(state, count):
        return
    for layer, (keys, values) in enumerate(known):
        allocator = cache.layer_to_allocator[layer]
        places = allocator.get_write_indices(state.request_id, 0, count)
        written = torch.tensor(places, device=cache.cache_tensor.device)
        nothing = written[:0]
        rows = (part.transpose(0, 1).to(allocator.cache_dtype) for part in (keys, values))  # (tokens, heads, size)
        allocator.update(*rows, layer, nothing, written)
    # As the scheduler does where it finds a beginning among its own blocks.
    scheduler.active_requests[state.request_id] = state
    scheduler.waiting_requests.pop(state.request_id, None)
    removed.add(state.request_id)
    state.status = type(state.status).PREFILLING
    state.remaining_prefill_tokens = state.remaining_prefill_tokens[count:]
    state.position_offset += count


def _end(processor: Any, steps: Steps, state: Any, error: Exception) -> None:
    """Ends the sequence that a step cannot be computed for."""
    _log.warning("request %s cannot be generated: %s", state.request_id, type(error).__name__, exc_info=error)
    steps.failed(state.request_id, error)
    processor._handle_request_error(error, state)
    processor.scheduler.finish_request(state.request_id)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _check(processor: Any) -> None:
    """Raises ModelError unless the internals are those this file was written for."""
    import transformers

    for (owner, name), parameters in _EXPECTED.items():
        target = getattr(getattr(processor, owner) if owner else processor, name, None)
        found = tuple(inspect.signature(target).parameters) if callable(target) else None
        if found is None or found[: len(parameters)] != parameters or (not parameters and found):
            raise ModelError(
                f"serving needs transformers {VERSIONS}, found {transformers.__version__}: "
                f"{owner or 'the processor'}.{name} of its continuous batching has changed"
            )
