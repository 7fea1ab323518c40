"""Puts our gates and sampling into transformers' continuous batching.

This is the only file that depends on transformers' internals. It wraps five methods of objects of a manager:

    ContinuousBatchingIOs.prepare_batch_tensors   says which sequences are in the step, and how to undo it
    ContinuousBatchProcessor._generation_step     gates before the forward pass; a failure ends one sequence, not all
    ModelRunner._sample                           draws for each sequence by its own sampling
    ContinuousBatchingIOs.prepare_batch_update    passes on the tokens, which are on the host by then
    Scheduler._infer_request_tokens               writes cached keys and values of a prompt into its blocks

A sequence whose logits are not finite may spoil those of others in the same step, because attention computes all of
them in one product before it masks. Such a step is computed again in halves, until the sequence is alone. A marker in
place of its token reports it, so that no further transfer to the host is needed.

Written for transformers 5.24 (`VERSIONS`); `attach` refuses a version with other internals.
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
from logo.prefix_cache import Page, joined

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
    """Decides what a step computes; called by the thread that generates."""

    @abstractmethod
    def before(self, step: Sequence[tuple[str, int, bool, int]]) -> None:
        """Called before each forward pass.

        Args:
            step: the sequences in order: id, number of tokens, whether the next token is drawn, and the position of
                the first token in the sequence.
        """

    @abstractmethod
    def beginning(self, sequence: str) -> Sequence[Page]:
        """The cached pages of keys and values with which a new sequence begins; empty if there are none.

        They never cover all tokens of the sequence. For a sequence that waits, this is called in every step.
        """

    @abstractmethod
    def sample(self, scores: Tensor, ids: Sequence[str]) -> Tensor:
        """Next tokens (rows,) from float32 logits (rows, vocabulary), one row per sequence.

        The token of a row that is not finite is `NO_TOKEN`, and the step will be computed again.
        """

    @abstractmethod
    def accepted(self) -> None:
        """The step is done, with the tokens that `sample` has returned last."""

    @abstractmethod
    def failed(self, sequence: str, error: Exception) -> None:
        """A step has failed, and this sequence is ended so that the others can continue."""


def attach(manager: Any, steps: Steps) -> None:
    """Attaches `steps` to a manager that was not started yet.

    Raises:
        ModelError: this version of transformers has other internals.
    """
    manager.warmup()  # creates the processor
    processor = manager.batch_processor
    _check(processor)
    io, runner = processor.inputs_and_outputs, processor.model_runner
    prepare, compute = io.prepare_batch_tensors, processor._generation_step
    prepared: dict[str, Any] = {}
    tokens: list[list[int]] = []
    drawn: list[int] = []
    sampled: list[str] = []  # without sequences whose prompts are not read to the end

    def prepare_batch_tensors(**options: Any) -> None:
        prepared.update(options)
        tokens[:] = [list(request.state.tokens_to_process) for request in options["requests_in_batch"]]
        prepare(**options)

    def take_back() -> list[Any]:
        """Undoes the preparation of the step."""
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
            steps.accepted()
        except Exception as error:  # the server has to go on after any error
            failure = error
        if failure is not None:
            traceback.clear_frames(failure.__traceback__)  # they hold memory that the next attempt may need
            requests = take_back()
            if len(requests) == 1:
                _end(processor, steps, requests[0].state, failure)
                return
            del failure
            half = len(requests) // 2  # the failing sequence fails again, and in the end alone
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


def _write(scheduler: Any, cache: Any, state: Any, removed: set[str], pages: Sequence[Page]) -> None:
    """Writes keys and values of a beginning into the blocks of a request, which then counts as partly read."""
    count = sum(page.tokens for page in pages)
    if not count or not cache.can_store_request_tokens(state, count):
        return
    for layer, (keys, values) in enumerate(joined(pages)):
        allocator = cache.layer_to_allocator[layer]
        places = allocator.get_write_indices(state.request_id, 0, count)
        written = torch.tensor(places, device=cache.cache_tensor.device)
        nothing = written[:0]
        rows = (part.transpose(0, 1).to(allocator.cache_dtype) for part in (keys, values))  # (tokens, heads, size)
        allocator.update(*rows, layer, nothing, written)
    # As the scheduler does for a beginning in its own blocks.
    scheduler.active_requests[state.request_id] = state
    scheduler.waiting_requests.pop(state.request_id, None)
    removed.add(state.request_id)
    state.status = type(state.status).PREFILLING
    state.remaining_prefill_tokens = state.remaining_prefill_tokens[count:]
    state.position_offset += count


def _end(processor: Any, steps: Steps, state: Any, error: Exception) -> None:
    """Ends a sequence for which a step cannot be computed."""
    _log.warning("request %s cannot be generated: %s", state.request_id, type(error).__name__, exc_info=error)
    steps.failed(state.request_id, error)
    processor._handle_request_error(error, state)
    processor.scheduler.finish_request(state.request_id)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _check(processor: Any) -> None:
    """Raises ModelError unless the internals are those for which this file was written."""
    import transformers

    for (owner, name), parameters in _EXPECTED.items():
        target = getattr(getattr(processor, owner) if owner else processor, name, None)
        found = tuple(inspect.signature(target).parameters) if callable(target) else None
        if found is None or found[: len(parameters)] != parameters or (not parameters and found):
            raise ModelError(
                f"serving needs transformers {VERSIONS}, found {transformers.__version__}: "
                f"{owner or 'the processor'}.{name} of its continuous batching has changed"
            )
