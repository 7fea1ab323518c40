"""vLLM's model runner V2 (`vllm/v1/worker/gpu/model_runner.py`, the default on GPUs): which rows of a step are whose.

Relied on: `add_requests(scheduler_output)` sees every new request with its `sampling_params`, `prompt_token_ids` and
`mm_features` before its first step, and `prepare_inputs` returns an `InputBatch` whose `req_ids` are in the order of
the rows, with `num_scheduled_tokens` and `num_computed_tokens_np`. Sampling parameters are nowhere to be found later,
so probed requests are remembered by id until `_remove_request`.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any

from logo.backends.vllm.marks import mark, span
from logo.backends.vllm.sums import Span

# Request id -> its sampling parameters, its prompt, and whether that has pictures.
Probed = MutableMapping[str, tuple[Any, Any, bool]]


def remember(probed: Probed, scheduler_output: Any) -> None:
    """Notes which new requests are probes."""
    for request in scheduler_output.scheduled_new_reqs:
        if mark(request.sampling_params) is not None:
            pictures = bool(request.mm_features)
            probed[request.req_id] = request.sampling_params, request.prompt_token_ids, pictures


def forget(probed: Probed, request_id: str) -> None:
    """A request has ended, or begins anew."""
    probed.pop(request_id, None)


def spans(probed: Probed, bos: int | None, input_batch: Any) -> Iterator[Span]:
    """The rows of probed prompts in the step that comes."""
    row = 0
    for i, request_id in enumerate(input_batch.req_ids):
        count = int(input_batch.num_scheduled_tokens[i])
        if request_id in probed:
            parameters, prompt, pictures = probed[request_id]
            computed = int(input_batch.num_computed_tokens_np[i])
            found = span(parameters, prompt, row, computed, count, bos, pictures=pictures)
            if found is not None:
                yield found
        row += count
