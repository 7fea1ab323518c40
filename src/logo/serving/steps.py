"""The seams in transformers' continuous batching where gates and sampling of our own go in.

The only file that knows transformers' internals. Three methods of objects that a manager owns are wrapped:

    ContinuousBatchingIOs.prepare_batch_tensors   tells which sequences make up the step, and how it may be taken back
    ContinuousBatchProcessor._generation_step     gates before the forward pass; a failure ends one sequence, not all
    ModelRunner._sample                           draws by sequence instead of one way for all

Written for transformers 5.24 (`VERSIONS`); `attach` refuses a version whose internals look different.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from logo.errors import ModelError

VERSIONS = ">=5.24,<5.25"

_log = logging.getLogger("logo.serving")

_EXPECTED = {
    ("inputs_and_outputs", "prepare_batch_tensors"): ("requests_in_batch",),
    ("", "_generation_step"): ("model",),
    ("", "_handle_request_error"): ("error", "state"),
    ("", "update_batch"): (),
    ("model_runner", "_sample"): ("scores", "output_ids"),
    ("scheduler", "finish_request"): ("request_id",),
}


class Steps(Protocol):
    """Who decides what a step computes; called by the thread that generates."""

    def before(self, step: Sequence[tuple[str, int]]) -> None:
        """The next forward pass holds these sequences: their ids and numbers of tokens, in order."""
        raise NotImplementedError

    def sample(self, scores: Tensor, ids: Sequence[str]) -> Tensor:
        """(rows,) next tokens from (rows, vocabulary) float32 logits, one row per sequence."""
        raise NotImplementedError

    def failed(self, sequence: str, error: Exception) -> None:
        """A step failed, and this sequence is ended so that the others can go on."""
        raise NotImplementedError


@dataclass(frozen=True)
class _Before:
    """A sequence as it was before a step was prepared."""

    state: Any
    position: int
    tokens: list[int]
    left: list[int]

    @classmethod
    def of(cls, state: Any) -> _Before:
        return cls(state, state.position_offset, list(state.tokens_to_process), list(state.remaining_prefill_tokens))

    def restore(self) -> None:
        from transformers.generation.continuous_batching.requests import RequestStatus

        self.state.position_offset = self.position
        if len(self.tokens) > 1 or not self.state.generated_len():  # of its prompt: to be scheduled again as such
            self.state.remaining_prefill_tokens = self.tokens + self.left
            self.state.tokens_to_process = []
            self.state.status = RequestStatus.PREFILLING
        else:
            self.state.tokens_to_process = self.tokens


def attach(manager: Any, steps: Steps) -> None:
    """Lets `steps` decide what every step of a manager computes; before the manager is started.

    Raises:
        ModelError: another version of transformers, whose internals are different.
    """
    manager.warmup()  # makes the processor
    processor = manager.batch_processor
    _check(processor)
    io, runner = processor.inputs_and_outputs, processor.model_runner
    prepare, compute = io.prepare_batch_tensors, processor._generation_step
    before: list[_Before] = []

    def prepare_batch_tensors(requests_in_batch: Any, *args: Any, **options: Any) -> None:
        before[:] = [_Before.of(request.state) for request in requests_in_batch]
        prepare(requests_in_batch, *args, **options)

    def generation_step(model: Any) -> None:
        try:
            steps.before([(r.state.request_id, r.query_length) for r in io.requests_in_batch])
            compute(model)
        except Exception as error:  # whatever it is, the server has to go on
            _take_back(processor, before, steps, error)

    def sample(scores: Tensor, output_ids: Tensor) -> None:
        ids = [request.state.request_id for request in io.requests_in_batch if request.has_new_token]
        tokens = steps.sample(scores[0, : len(ids)], ids)
        output_ids[0, : len(ids)].copy_(tokens)

    io.prepare_batch_tensors = prepare_batch_tensors
    processor._generation_step = generation_step
    runner._sample = sample


def _take_back(processor: Any, before: Sequence[_Before], steps: Steps, error: Exception) -> None:
    """Ends the sequence that asked most of the step (the newest of those) and takes the step back for the others."""
    io = processor.inputs_and_outputs
    blamed = max(enumerate(io.requests_in_batch), key=lambda entry: (entry[1].query_length, entry[0]))[1].state
    _log.warning("a step failed (%s); ending request %s", type(error).__name__, blamed.request_id, exc_info=error)
    for entry in before:
        entry.restore()
    io.requests_in_batch = []
    steps.failed(blamed.request_id, error)
    processor._handle_request_error(error, blamed)
    processor.scheduler.finish_request(blamed.request_id)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _check(processor: Any) -> None:
    """Raises ModelError unless the internals are those this file was written for."""
    import transformers

    for (owner, name), parameters in _EXPECTED.items():
        target = getattr(getattr(processor, owner) if owner else processor, name, None)
        found = tuple(inspect.signature(target).parameters) if callable(target) else None
        if found is None or found[: len(parameters)] != parameters:
            raise ModelError(
                f"serving needs transformers {VERSIONS}, found {transformers.__version__}: "
                f"{owner or 'the processor'}.{name} of its continuous batching has changed"
            )
