"""Scores gold completions: exact match and likelihood, teacher-forced in one forward pass.

Either one prompt and completion is scored under several mixtures, or many, each under its own. The caller activates the
mixtures.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from logo.errors import ModelError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The most tokens and the most logits (2 GB in float32) of one forward pass. A single row may have more.
MAX_TOKENS = 16_384
MAX_LOGITS = 2**29


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
        """The log likelihood of the whole completion, in nats."""
        return -self.nll * self.tokens


@dataclass(frozen=True)
class Read:
    """The first tokens of a prompt, on which no mixture acts.

    Attributes:
        tokens: their number.
        options: makes, for a number of rows, the arguments of the forward pass with their keys and values.
    """

    tokens: int
    options: Callable[[int], dict[str, Any]]


@dataclass
class Continued:
    """A row to compute: a prompt and all but the last token of its completion, under a mixture.

    Attributes:
        ids: its tokens.
        mixture: adapter name -> weight.
        golds: pair number -> (number of tokens of the prompt, tokens of the completion), which this row scores. Several
            completions of one token to one prompt share a row.
    """

    ids: tuple[int, ...]
    mixture: Mapping[str, float]
    golds: dict[int, tuple[int, Sequence[int]]] = field(default_factory=dict)

    @property
    def prompt(self) -> tuple[int, ...]:
        """The tokens of the prompt."""
        return self.ids[: next(start for start, _ in self.golds.values())]

    @property
    def places(self) -> set[int]:
        """The positions whose logits are needed: those before each token of a completion."""
        return {start - 1 + i for start, gold in self.golds.values() for i in range(len(gold))}


def joined(prompt: str, completion: str) -> str:
    """The completion with a space in front, unless prompt or completion have white space there already."""
    apart = prompt[-1:].isspace() or completion[:1].isspace() or not prompt
    return completion if apart else f" {completion}"


def completion_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str, context: int | None = None
) -> list[int]:
    """The tokens of a completion after its prompt: `joined`, encoded on its own and without special tokens.

    It is encoded on its own, so that the prompt has the same tokens as when it is answered.

    Args:
        context: the model's context length in tokens; None if unknown.

    Raises:
        UsageError: the completion has no tokens, or fills the context.
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
    """The most rows of `tokens` tokens, `gold` of them with logits, in one forward pass; at least 1."""
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
    read: Read | None = None,
) -> list[Scored]:
    """Scores one completion under each mixture, in batches of equal rows with different mixtures.

    Args:
        model: a Hugging Face causal LM.
        prompt: token ids, special tokens included.
        gold: the completion's token ids.
        mixtures: adapter name -> weight. Equal ones are computed once.
        active: activates one mixture per row of a batch on the model.
        vocabulary: its size, for the memory of logits.
        device: of the model's input.
        read: the part of the prompt that the base model has read; None: all is read under each mixture.

    Raises:
        CacheFull: the adapters of a batch do not fit into the memory for adapters.
    """
    # The last gold token is only predicted, never read.
    ids = torch.tensor([*prompt, *gold[:-1]], device=device)
    keys = [_key(mixture) for mixture in mixtures]
    distinct = list(dict.fromkeys(keys))
    scored: dict[frozenset[tuple[str, float]], Scored] = {}
    size = rows_per_pass(len(ids), len(gold), vocabulary)
    for part in (distinct[start : start + size] for start in range(0, len(distinct), size)):
        unread = ids.expand(len(part), -1)[:, 0 if read is None else read.tokens :]
        known = {} if read is None else read.options(len(part))  # before any mixture is active
        with active([dict(key) for key in part]):
            logits = logits_at(model, unread, range(unread.shape[1] - len(gold), unread.shape[1]), None, known)
        scored |= zip(part, score_logits(logits, torch.tensor(gold, device=logits.device)), strict=True)
    return [scored[key] for key in keys]


def continued_rows(
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    mixtures: Sequence[Mapping[str, float]],
    context: int | None = None,
    apart: bool = False,
) -> list[Continued]:
    """The rows to compute in order to score each (prompt, completion) under its own mixture.

    Args:
        pairs: token ids; the prompt's with special tokens.
        mixtures: one for each pair.
        context: the model's context length in tokens; None if unknown.
        apart: whether pairs whose prompts end at different tokens need rows of their own, since adapters may act only
            from there on.

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
            raise UsageError(
                f"pair {number + 1} has {len(ids) + 1} tokens, but the model reads {context} and predicts one more: "
                "shorten the prompt"
            )
        row = rows.setdefault((ids, apart and len(prompt), _key(mixture)), Continued(ids, mixture))
        row.golds[number] = (len(prompt), gold)
    return list(rows.values())


@torch.no_grad()
def score_continued(
    model: Any,
    rows: Sequence[Continued],
    active: Callable[[Sequence[Continued]], AbstractContextManager[Any]],
    pad: Callable[[Sequence[Sequence[int]]], tuple[Tensor, Tensor]],
    vocabulary: int,
) -> dict[int, Scored]:
    """Scores a batch of rows, each under its own mixture: pair number -> score of its completion.

    Args:
        model: a Hugging Face causal LM.
        rows: of `continued_rows`.
        active: activates the mixtures of the rows of a batch on the model.
        pad: pads rows on the right; returns ids and mask (rows, length).
        vocabulary: its size; a batch with too many logits is halved.

    Raises:
        CacheFull: the adapters of the batch do not fit into the memory for adapters.
    """
    needed = sorted({place for row in rows for place in row.places})
    if len(rows) > 1 and len(rows) * len(needed) * vocabulary > MAX_LOGITS:
        half = len(rows) // 2
        parts = (rows[:half], rows[half:])
        return {n: s for part in parts for n, s in score_continued(model, part, active, pad, vocabulary).items()}
    ids, mask = pad([row.ids for row in rows])
    with active(rows):
        logits = logits_at(model, ids, needed, mask)
    scored = {}
    for row, found in zip(rows, logits, strict=True):
        for number, (start, gold) in row.golds.items():
            own = found[None, needed.index(start - 1) :][:, : len(gold)]
            scored[number] = score_logits(own, torch.tensor(list(gold), device=found.device))[0]
    return scored


def _key(mixture: Mapping[str, float]) -> frozenset[tuple[str, float]]:
    return frozenset((name, weight) for name, weight in mixture.items() if weight)


def logits_at(
    model: Any, ids: Tensor, places: Sequence[int], mask: Tensor | None = None, known: Mapping[str, Any] | None = None
) -> Tensor:
    """Logits (rows, places, vocabulary) at these ascending positions of rows (rows, length).

    If the model can, it computes no others: with 262,000 tokens in a vocabulary, the logits of a whole prompt would be
    the largest tensor by far.

    Args:
        mask: (rows, length), 0 on padding; None: there is none.
        known: arguments with the keys and values of all earlier tokens; then rows are not padded.
    """
    length, tail = ids.shape[1], ids.shape[1] - places[0]
    parameter = inspect.signature(model.forward).parameters.get("logits_to_keep")
    options: dict[str, Any] = {}
    if parameter is not None:
        scattered = tail > len(places) and "Tensor" in str(parameter.annotation)
        options["logits_to_keep"] = torch.tensor(places, device=ids.device) if scattered else tail
    if known:
        output = model(input_ids=ids, use_cache=True, **known, **options)
    else:
        mask = torch.ones_like(ids) if mask is None else mask
        output = model(input_ids=ids, attention_mask=mask, use_cache=False, **options)
    logits: Tensor = output.logits
    before = length - logits.shape[1]  # if the model returns the last positions only, so many stand before them
    return logits if logits.shape[1] == len(places) else logits[:, [place - before for place in places]]


def score_logits(logits: Tensor, gold: Tensor) -> list[Scored]:
    """One `Scored` per row of logits (rows, n, vocabulary) for the gold tokens (n,).

    Raises:
        ModelError: a likelihood is NaN or infinite.
    """
    scored = []
    for row in logits:  # one at a time, since float32 copies of half precision take twice the memory
        row = row.float()
        nll = checked_nll(float(torch.nn.functional.cross_entropy(row, gold)))
        scored.append(Scored(bool((row.argmax(dim=-1) == gold).all()), nll, len(gold)))
    return scored


def checked_nll(nll: float) -> float:
    """Returns the likelihood; raises ModelError if it is NaN or infinite."""
    if not -float("inf") < nll < float("inf"):
        raise ModelError(f"the likelihood of the completion is {nll}: the model or a mixture overflows; try float32")
    return nll
