"""Scores gold completions, teacher-forced: exact match and likelihood, each under its own mixture, in batches."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from logo.adapters.activation import EVERYWHERE
from logo.adapters.pool import AdapterPool
from logo.core import Prompt
from logo.decoding import batches_by_length
from logo.errors import ModelError, UsageError, check_type
from logo.mixing.mixer import Mixer, Mixture
from logo.models import device_of, padded
from logo.prefix_cache import reusable
from logo.prompts import Prompts, answer_ids, given_answer

if TYPE_CHECKING:
    from logo.prompts import OnePrompt

# The most tokens and the most logits (2 GB in float32) of one forward pass. A single row may have more.
MAX_TOKENS = 16_384
MAX_LOGITS = 2**29

# Token ids of a prompt and of its completion.
Pair = tuple[Sequence[int], Sequence[int]]


@dataclass(frozen=True)
class Scored:
    """The score of one completion under one mixture.

    Attributes:
        exact_match: whether every token is the most likely one, so that greedy decoding would give the completion.
        nll: mean negative log likelihood per token, in nats.
        tokens: the number of tokens that were scored, without an end token.
    """

    exact_match: bool
    nll: float
    tokens: int

    @property
    def log_likelihood(self) -> float:
        """Of the whole completion, in nats."""
        return -self.nll * self.tokens


@dataclass
class Continued:
    """A row to compute: the tokens of a prompt and of all but the last of its completion, under a mixture."""

    ids: tuple[int, ...]
    prompt: tuple[int, ...]
    mixture: Mapping[str, float]
    # Pair number -> (number of tokens of the prompt, tokens of the completion). Several completions of one token to one
    # prompt share a row.
    golds: dict[int, tuple[int, Sequence[int]]] = field(default_factory=dict)


def spaced(prompt: str, completion: str) -> str:
    """The completion with a space in front, unless prompt or completion have white space there already."""
    apart = prompt[-1:].isspace() or completion[:1].isspace() or not prompt
    return completion if apart else f" {completion}"


def encoded(prompts: Prompts, prompt: OnePrompt, completion: str) -> tuple[Prompt, list[int]]:
    """A prompt and the tokens of a completion as they are scored. If they exceed the context, the prompt is cut.

    The completion is `spaced` and encoded on its own, so that the prompt has the same tokens as when it is answered. In
    a conversation it is what the chat template writes for it, which adapters are trained to say.

    Raises:
        UsageError: an empty prompt, or a completion without tokens or too long.
    """
    check_type("completion", completion, str, "a string")
    tokenizer = prompts.tokenizer
    [whole] = prompts.read([prompt], room=None)
    text = tokenizer.decode(whole.ids) if whole.text is None else whole.text
    written = given_answer(tokenizer, prompt, text, completion) if completion.strip() else None
    if written is None:
        written = spaced(text, completion)
    gold = answer_ids(tokenizer, written)
    if not completion or not gold:
        raise UsageError(f"completion {completion!r} has no tokens: expected some text to score")
    prompts.check_known("the completion", gold)
    if prompts.context is not None and len(gold) >= prompts.context:
        length = f"the completion has {len(gold)} tokens, but the model's context holds {prompts.context}"
        raise UsageError(f"{length}, the prompt's included: shorten it")
    [row] = prompts.read([whole], room=len(gold))
    return row, gold


def continued_rows(
    pairs: Sequence[Pair],
    mixtures: Sequence[Mapping[str, float]],
    context: int | None = None,
    apart: bool = False,
) -> list[Continued]:
    """The rows to compute in order to score each (prompt, completion) under its own mixture; equal ones are one row.

    Args:
        context: the model's context length in tokens; None if unknown.
        apart: whether pairs whose prompts end at different tokens need rows of their own, as adapters may act there.

    Raises:
        UsageError: unequal numbers of pairs and mixtures, or a pair with an empty side or too long for the context.
    """
    if len(pairs) != len(mixtures):
        raise UsageError(f"adapters: expected one entry for each of {len(pairs)} pairs, found {len(mixtures)}")
    rows: dict[tuple[tuple[int, ...], int, frozenset[tuple[str, float]]], Continued] = {}
    for number, ((prompt, gold), mixture) in enumerate(zip(pairs, mixtures, strict=True)):
        if not prompt or not gold:
            side = "completion" if prompt else "prompt"
            raise UsageError(f"pair {number + 1}: the {side} has no tokens; expected at least one on either side")
        ids = (*prompt, *gold[:-1])  # the last gold token is only predicted, never read
        if context is not None and len(ids) > context:
            length = f"pair {number + 1} has {len(ids) + 1} tokens, but the model reads {context} and predicts one more"
            raise UsageError(f"{length}: shorten the prompt")
        key = (ids, apart and len(prompt), frozenset((name, weight) for name, weight in mixture.items() if weight))
        rows.setdefault(key, Continued(ids, tuple(prompt), mixture)).golds[number] = (len(prompt), gold)
    return list(rows.values())


@torch.no_grad()
def score_pairs(
    model: Any,
    prompts: Prompts,
    mixer: Mixer,
    pool: AdapterPool,
    pairs: Sequence[Pair],
    mixtures: Sequence[Mapping[str, float]],
    batch_size: int,
) -> list[Scored]:
    """Scores completions, each after its own prompt and under its own mixture.

    Args:
        model: a Hugging Face causal LM; prompts, mixer, pool: of it.
        batch_size: rows of one forward pass; fewer if they are long (`MAX_TOKENS`, `MAX_LOGITS`).

    Raises:
        UsageError: see `continued_rows`; or a token that the model does not know.
        CacheFull: the adapters of a batch do not fit into the memory for adapters.
    """
    _check_pairs(prompts, pairs)
    rows = continued_rows(pairs, mixtures, prompts.context, apart=pool.activations != (EVERYWHERE,))
    lengths = [len(row.ids) for row in rows]
    batches = list(batches_by_length(lengths, batch_size, padded=reusable(model), tokens=MAX_TOKENS))
    scored: dict[int, Scored] = {}
    while batches:
        numbers = batches.pop(0)
        batch = [rows[i] for i in numbers]
        needed = _needed(batch)
        half = len(batch) // 2
        if half and len(batch) * len(needed) * len(prompts.tokenizer) > MAX_LOGITS:
            batches[:0] = [numbers[:half], numbers[half:]]
            continue
        ids, mask = padded([row.ids for row in batch], device_of(model.get_input_embeddings()))
        with mixer.active(pool, [Mixture.of(pool, row.mixture, row.prompt) for row in batch], ids.shape[1]):
            logits = logits_at(model, ids, needed, mask)
        for row, row_logits in zip(batch, logits, strict=True):
            for number, (start, gold) in row.golds.items():
                first = needed.index(start - 1)
                scored[number] = _scored(row_logits[first : first + len(gold)], gold)
    return [scored[number] for number in range(len(pairs))]


def _check_pairs(prompts: Prompts, pairs: Sequence[Pair]) -> None:
    """Raises UsageError unless pairs consist of tokens that the model knows."""
    for number, (prompt, completion) in enumerate(pairs, start=1):
        tokens: list[Any] = [*prompt, *completion]
        if not all(isinstance(token, Integral) and int(token) >= 0 for token in tokens):
            raise UsageError(f"pair {number}: expected token ids, 0 or more, found {tokens!r:.60}")
        prompts.check_known(f"pair {number}", tokens)


def _needed(batch: Sequence[Continued]) -> list[int]:
    """The positions whose logits predict the completions of a batch, ascending."""
    golds = [gold for row in batch for gold in row.golds.values()]
    return sorted({start - 1 + i for start, gold in golds for i in range(len(gold))})


def _scored(logits: Tensor, gold: Sequence[int]) -> Scored:
    """The score of a completion from the logits (tokens, vocabulary) that predict it; ModelError: they overflow."""
    exact = logits.float()
    expected = torch.tensor(list(gold), device=exact.device)
    nll = checked_nll(float(torch.nn.functional.cross_entropy(exact, expected)))
    return Scored(bool((exact.argmax(dim=-1) == expected).all()), nll, len(gold))


def logits_at(model: Any, ids: Tensor, needed: Sequence[int], mask: Tensor) -> Tensor:
    """Logits (rows, needed, vocabulary) at these ascending positions of ids and mask (rows, length).

    If the model can, it computes no others, since those of a whole prompt would be the largest tensor by far.
    """
    length = ids.shape[1]
    tail = length - needed[0]
    parameter = inspect.signature(model.forward).parameters.get("logits_to_keep")
    options: dict[str, Any] = {}
    if parameter is not None:
        scattered = tail > len(needed) and "Tensor" in str(parameter.annotation)
        options["logits_to_keep"] = torch.tensor(needed, device=ids.device) if scattered else tail
    logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False, **options).logits
    before = length - logits.shape[1]  # if the model returns the last positions only, so many stand before them
    return logits if logits.shape[1] == len(needed) else logits[:, [at - before for at in needed]]


def checked_nll(nll: float) -> float:
    """Returns the likelihood; raises ModelError if it is NaN or infinite."""
    if not -float("inf") < nll < float("inf"):
        raise ModelError(f"the likelihood of the completion is {nll}: the model or a mixture overflows; try float32")
    return nll
