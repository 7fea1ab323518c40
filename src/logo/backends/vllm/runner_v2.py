"""The request of each row of a step in vLLM's model runner V2 (`vllm/v1/worker/gpu/model_runner.py`, default on GPUs).

Relied on: `add_requests(scheduler_output)` sees every new request with its `sampling_params`, `prompt_token_ids` (or
`prompt_embeds`), `mm_features` and `lora_request` before its first step, and `prepare_inputs` returns an `InputBatch`
whose `req_ids` are in the order of the rows, with `num_scheduled_tokens` and `num_computed_tokens_np`. Sampling
parameters are not available later, so the facts about a request are kept by its id until `_remove_request`.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any

from logo.backends.vllm.marks import mark, span
from logo.backends.vllm.onsets import Onset, Rows
from logo.backends.vllm.sums import Span

# Request id -> its sampling parameters, its prompt, and whether that has pictures.
Probed = MutableMapping[str, tuple[Any, Any, bool]]
Onsets = MutableMapping[str, Onset]


def remember(probed: Probed, onsets: Onsets, scheduler_output: Any) -> None:
    """Notes which new requests are probes, and where adapters begin to act."""
    for request in scheduler_output.scheduled_new_reqs:
        prompt = request.prompt_token_ids
        length = len(request.prompt_embeds) if prompt is None else len(prompt)
        onset = Onset.of(request.lora_request, request.sampling_params, prompt, length)
        if onset is not None:
            onsets[request.req_id] = onset
        if mark(request.sampling_params) is not None:
            pictures = bool(request.mm_features)
            probed[request.req_id] = request.sampling_params, request.prompt_token_ids, pictures


def forget(probed: Probed, onsets: Onsets, request_id: str) -> None:
    """Drops what was noted about a request that has ended, or that starts again."""
    probed.pop(request_id, None)
    onsets.pop(request_id, None)


def spans(probed: Probed, input_batch: Any) -> Iterator[Span]:
    """The rows of probed prompts in the next step."""
    row = 0
    for i, request_id in enumerate(input_batch.req_ids):
        count = int(input_batch.num_scheduled_tokens[i])
        if request_id in probed:
            parameters, prompt, pictures = probed[request_id]
            computed = int(input_batch.num_computed_tokens_np[i])
            found = span(parameters, prompt, row, computed, count, pictures=pictures)
            if found is not None:
                yield found
        row += count


def late(onsets: Onsets, input_batch: Any) -> Iterator[Rows]:
    """The rows of requests in the next step that have tokens on which not all of their adapters act."""
    row = 0
    for i, request_id in enumerate(input_batch.req_ids):
        count, onset = int(input_batch.num_scheduled_tokens[i]), onsets.get(request_id)
        start = int(input_batch.num_computed_tokens_np[i])
        if onset is not None and not onset.settled(start):
            yield Rows(onset, row, count, start, i, 1)
        row += count
