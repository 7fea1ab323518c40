"""What a gold completion is worth to a model: exact match and likelihood, teacher-forced in one forward pass.

Pure functions on texts, tokens and tensors. Knows mixtures only as something that the caller can make active.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from logo.errors import ModelError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What one forward pass may hold: hidden states of this many tokens, and this many logits (2 GB in float32). A single
# row is always taken whole.
MAX_TOKENS = 16_384
MAX_LOGITS = 2**29


@dataclass(frozen=True)
class Scored:
    """What one completion is worth under one mixture.

    Attributes:
        exact_match: every token is the most likely one, so greedy decoding would write exactly this.
        nll: mean negative log likelihood per token, in nats.
        tokens: how many tokens were scored; an end token is not among them.
    """

    exact_match: bool
    nll: float
    tokens: int


def joined(prompt: str, completion: str) -> str:
    """The completion as it continues the prompt: after a space, unless there is white space at the seam already."""
    apart = prompt[-1:].isspace() or completion[:1].isspace() or not prompt
    return completion if apart else f" {completion}"


def completion_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str, context: int | None = None
) -> list[int]:
    """The tokens of a completion after its prompt: `joined`, encoded on its own and without special tokens.

    Encoded on its own, because the prompt keeps the tokens it has when it is answered: no token spans the seam.

    Args:
        context: the model's context length in tokens, or None if unknown.

    Raises:
        UsageError: the completion has no tokens, or more than the context holds besides a prompt.
    """
    if not isinstance(completion, str):
        raise UsageError(f"completion: expected a string, found {type(completion).__name__}")
    ids: list[int] = tokenizer(joined(prompt, completion), add_special_tokens=False)["input_ids"]
    if not completion or not ids:
        raise UsageError(f"completion {completion!r} has no tokens: expected some text to score")
    if context is not None and len(ids) >= context:
        raise UsageError(
            f"the completion has {len(ids)} tokens, but the model's context holds {context}, the prompt's included: "
            "shorten it"
        )
    return ids


def rows_per_pass(tokens: int, gold: int, vocabulary: int) -> int:
    """How many rows of `tokens` tokens, `gold` of them with logits, one forward pass may take; at least 1."""
    return max(1, min(MAX_TOKENS // tokens, MAX_LOGITS // (gold * vocabulary)))


@torch.no_grad()
def score_mixtures(
    model: Any,
    prompt: Sequence[int],
    gold: Sequence[int],
    mixtures: Sequence[Mapping[str, float]],
    active: Callable[[Sequence[Mapping[str, float]]], AbstractContextManager[Any]],
    vocabulary: int,
    device: torch.device | str,
) -> list[Scored]:
    """Scores one completion under each mixture: equal rows of one batch (or a few), with another mixture in each.

    Args:
        model: a Hugging Face causal LM.
        prompt: token ids, special tokens included.
        gold: the completion's token ids.
        mixtures: adapter name -> weight. Equal ones are computed once.
        active: activates one mixture per row of a batch on the model.
        vocabulary: its size, to know how much logits take.
        device: where the model takes its input.
    """
    # The last gold token is only predicted, never read.
    ids = torch.tensor([*prompt, *gold[:-1]], device=device)
    keys = [frozenset((name, weight) for name, weight in mixture.items() if weight) for mixture in mixtures]
    distinct = list(dict.fromkeys(keys))
    scored: dict[frozenset[tuple[str, float]], Scored] = {}
    size = rows_per_pass(len(ids), len(gold), vocabulary)
    for part in (distinct[start : start + size] for start in range(0, len(distinct), size)):
        with active([dict(key) for key in part]):
            logits = tail_logits(model, ids.expand(len(part), -1), len(gold))
        scored |= zip(part, score_logits(logits, torch.tensor(gold, device=logits.device)), strict=True)
    return [scored[key] for key in keys]


def tail_logits(model: Any, ids: Tensor, count: int) -> Tensor:
    """Logits (rows, count, vocabulary) at the last `count` positions of unpadded rows (rows, length).

    Where the model can, it computes no others: with 262,000 words in the vocabulary those of a whole prompt would be
    the largest tensor by far.
    """
    able = "logits_to_keep" in inspect.signature(model.forward).parameters
    options = {"logits_to_keep": count} if able else {}
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **options)
    logits: Tensor = output.logits[:, -count:]
    return logits


def score_logits(logits: Tensor, gold: Tensor) -> list[Scored]:
    """One `Scored` per row of logits (rows, n, vocabulary) for the gold tokens (n,).

    Raises:
        ModelError: a likelihood is NaN or infinite.
    """
    scored = []
    for row in logits:  # one at a time: the float32 copy of a row of half precision is twice its size
        row = row.float()
        nll = float(torch.nn.functional.cross_entropy(row, gold))
        if not -float("inf") < nll < float("inf"):
            raise ModelError(
                f"the likelihood of the completion is {nll}: the model or a mixture overflows; try float32"
            )
        scored.append(Scored(bool((row.argmax(dim=-1) == gold).all()), nll, len(gold)))
    return scored
