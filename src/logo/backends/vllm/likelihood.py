"""Likelihoods of completions, from vLLM's log probabilities of a prompt's tokens and of the token after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from logo.scoring import Scored, checked_nll


def scoring(gold: Sequence[int]) -> Any:
    """vLLM's `SamplingParams` that score a completion, all but the last token of which is part of the prompt."""
    from vllm import SamplingParams

    read = 1 if len(gold) > 1 else None  # of each token, and of one of the most likely ones in its place
    return SamplingParams(
        max_tokens=1,
        temperature=0.0,
        ignore_eos=True,
        detokenize=False,
        prompt_logprobs=read,
        logprob_token_ids=[gold[-1]],
    )


def scored(output: Any, gold: Sequence[int]) -> Scored:
    """The score of a completion from vLLM's log probabilities of its tokens.

    Raises:
        ModelError: a likelihood is NaN or infinite.
    """
    [made] = output.outputs
    read = output.prompt_logprobs[-(len(gold) - 1) :] if len(gold) > 1 else []
    places = list(zip(read, gold, strict=False))
    nll = checked_nll(
        -(sum(place[token].logprob for place, token in places) + made.logprobs[0][gold[-1]].logprob) / len(gold)
    )
    exact = all(_first(place) == token for place, token in places) and made.token_ids[0] == gold[-1]
    return Scored(exact, nll, len(gold))


def _first(place: Mapping[int, Any]) -> int:
    """The most likely of these tokens; of those that are as likely, the one of the lowest id, as greedy decoding."""
    return min(place, key=lambda token: (-place[token].logprob, token))
