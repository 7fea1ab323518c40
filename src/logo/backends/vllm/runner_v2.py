"""The request of each row of a step in vLLM's model runner V2 (`vllm/v1/worker/gpu/model_runner.py`, default on GPUs).

Relied on: `add_requests(scheduler_output)` sees every new request with its `sampling_params`, `prompt_token_ids` (or
`prompt_embeds`) and `lora_request` before its first step, and `prepare_inputs` returns an `InputBatch` whose `req_ids`
are in the order of the rows, with `num_scheduled_tokens` and `num_computed_tokens_np`. Sampling parameters are not
available later, so the facts about a request are kept by its id until `_remove_request`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from logo.backends.vllm.marks import Span, answer_of, is_probe, span
from logo.backends.vllm.onsets import Onset, Rows


@dataclass(frozen=True)
class Remembered:
    """The facts about a request.

    Attributes:
        parameters: its sampling parameters.
        prompt: its token ids, of a probe.
        onset: where its adapters begin to act; None: everywhere.
        answer: its recipe, and the key for its failures; None: it has no mixture of ours.
    """

    parameters: Any
    prompt: Sequence[int] | None
    onset: Onset | None
    answer: tuple[str, str] | None


def remembered(scheduler_output: Any) -> Iterator[tuple[str, Remembered]]:
    """The new requests that are probes or have adapters, by id."""
    for request in scheduler_output.scheduled_new_reqs:
        prompt, parameters, lora = request.prompt_token_ids, request.sampling_params, request.lora_request
        length = len(request.prompt_embeds) if prompt is None else len(prompt)
        key = answer_of(parameters)
        answer = None if lora is None or key is None else (lora.lora_path, key)
        if is_probe(parameters) or lora is not None:
            yield request.req_id, Remembered(parameters, prompt, Onset.of(lora, parameters, prompt, length), answer)


def spans(known: Mapping[str, Remembered], input_batch: Any) -> Iterator[Span]:
    """The rows of probed prompts in the next step."""
    for one, place, row, computed, count in _rows(known, input_batch):
        found = span(one.parameters, one.prompt, input_batch.req_ids[place], row, computed, count)
        if found is not None:
            yield found


def late(known: Mapping[str, Remembered], input_batch: Any) -> Iterator[Rows]:
    """The rows of requests in the next step that have tokens on which not all of their adapters act."""
    for one, place, row, computed, count in _rows(known, input_batch):
        if one.onset is not None and not one.onset.settled(computed):
            yield Rows(one.onset, row, count, computed, place, 1)


def answers(known: Mapping[str, Remembered], input_batch: Any) -> Iterator[tuple[str, str]]:
    """The recipe of each answer in the next step, and the key for its failures."""
    for one, *_ in _rows(known, input_batch):
        if one.answer is not None:
            yield one.answer


def _rows(known: Mapping[str, Remembered], input_batch: Any) -> Iterator[tuple[Remembered, int, int, int, int]]:
    """What is remembered of each request, its place, its first row, how many tokens were run before, and its rows."""
    row = 0
    for i, request_id in enumerate(input_batch.req_ids):
        count = int(input_batch.num_scheduled_tokens[i])
        if request_id in known:
            yield known[request_id], i, row, int(input_batch.num_computed_tokens_np[i]), count
        row += count
