"""The request of each row of a step in vLLM's model runner V1 (`vllm/v1/worker/gpu_model_runner.py`, also on a CPU).

Relied on: `set_active_loras(input_batch, num_scheduled_tokens, num_sampled_tokens)` is called before every step of real
requests, with the batch in the order of its rows. `input_batch` has `req_ids`, `num_computed_tokens_cpu` and
`num_prompt_tokens`; the runner's `requests` have `sampling_params`, `prompt_token_ids` and `lora_request`, until they
have ended.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

from logo.backends.vllm.marks import Span, answer_of, span
from logo.backends.vllm.onsets import Onset, Rows, known


def spans(runner: Any, input_batch: Any, scheduled: Sequence[int]) -> Iterator[Span]:
    """The rows of probed prompts in the next step."""
    row = 0
    for i, (request_id, count) in enumerate(zip(input_batch.req_ids, scheduled, strict=False)):
        state, computed = runner.requests[request_id], int(input_batch.num_computed_tokens_cpu[i])
        found = span(state.sampling_params, state.prompt_token_ids, request_id, row, computed, int(count))
        if found is not None:
            yield found
        row += int(count)


def onsets(runner: Any, input_batch: Any, scheduled: Sequence[int], drawn: Sequence[int] | None) -> Iterator[Rows]:
    """The rows of requests in the next step that have tokens on which not all of their adapters act.

    Args:
        drawn: the number of tokens that are drawn for each request; None: one each.
    """
    row = place = 0
    for i, (request_id, count) in enumerate(zip(input_batch.req_ids, scheduled, strict=False)):
        state, draws = runner.requests[request_id], 1 if drawn is None else int(drawn[i])
        if state.lora_request is not None:
            onset = known(state, functools.partial(_onset, state, int(input_batch.num_prompt_tokens[i])))
            start = int(input_batch.num_computed_tokens_cpu[i])
            if onset is not None and not onset.settled(start):
                yield Rows(onset, row, int(count), start, place, draws)
        row, place = row + int(count), place + draws


def answers(runner: Any, input_batch: Any) -> Iterator[tuple[str, str]]:
    """The recipe of each answer in the next step, and the key for its failures."""
    for request_id in input_batch.req_ids:
        state = runner.requests[request_id]
        key = None if state.lora_request is None else answer_of(state.sampling_params)
        if key is not None:
            yield state.lora_request.lora_path, key


def _onset(state: Any, length: int) -> Onset | None:
    return Onset.of(state.lora_request, state.sampling_params, state.prompt_token_ids, length)
