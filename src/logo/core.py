"""The values that the parts of LoGo hand to each other: a prompt, the options of a call, a selection, an answer."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypedDict

from logo.errors import UsageError

if TYPE_CHECKING:
    from transformers import GenerationConfig

ProbeText = Literal["all", "last-user", "conversation"]
Weighting = Literal["linear", "adaptive"]
WhenUnsure = Literal["mix", "base", "refuse"]
FinishReason = Literal["stop", "length"]
# How the mixtures of a batch act: not at all, merged into the weights, or beside them with a gate for each row.
Form = Literal["none", "merged", "gated"]


@dataclass(frozen=True)
class Prompt:
    """One prompt as token ids.

    Attributes:
        ids: what the model reads, special tokens included.
        probed: what is probed, special tokens included: the user's text, not the template around it.
        text: the text of `ids`; None if token ids were given, or if the prompt was cut.
        cut: tokens that were left out of `ids`, since the prompt was too long.
    """

    ids: tuple[int, ...]
    probed: tuple[int, ...]
    text: str | None = None
    cut: int = 0

    @classmethod
    def of_ids(cls, ids: tuple[int, ...] | list[int]) -> Prompt:
        """A prompt of token ids, which are all probed."""
        return cls(tuple(ids), tuple(ids))

    def __len__(self) -> int:
        return len(self.ids)


class CallOptions(TypedDict, total=False):
    """What a caller may say about the selection of one call. What is left out, or None, is as in the engine's settings.

    Attributes:
        k: adapters per prompt at most.
        signal: the name of a registered signal.
        weighting: how scores become weights, `"linear"` or `"adaptive"`; of another signal than the engine's: its own.
        candidates: the names of the adapters that may be selected.
        prior: how likely it is that a prompt belongs to some adapter of the pool, in (0, 1).
        when_unsure: what answers a prompt for which no adapter seems to be made: `"mix"`, `"base"` or `"refuse"`.
    """

    k: int | None
    signal: str | None
    weighting: Weighting | None
    candidates: str | Collection[str] | None
    prior: float | None
    when_unsure: WhenUnsure | None


class AnswerOptions(CallOptions, total=False):
    """What a caller may say about one answer: how it is selected, and how it is decoded.

    Attributes:
        max_new_tokens: default: that of the generation config, else the smaller of 256 and half of the context.
        generation_config: of transformers; default: the engine's own, which is greedy unless it was given another.
            What it leaves open is greedy, too, but for the checkpoint's end tokens and stop texts.
        stop: end the answer before the first of these texts.
        stop_at_newline: end the answer after its first line; `"official"`: by the rule of the official code.
        do_sample, temperature, ...: options of `GenerationConfig`. Its others may be given, too, though type checkers
            do not know them here.
    """

    max_new_tokens: int | None
    generation_config: GenerationConfig | None
    stop: str | Collection[str]
    stop_at_newline: bool | Literal["official"]
    do_sample: bool | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    num_beams: int | None
    length_penalty: float | None
    repetition_penalty: float | None
    no_repeat_ngram_size: int | None
    min_new_tokens: int | None
    eos_token_id: int | list[int] | None
    stop_strings: str | list[str] | None
    max_time: float | None


@dataclass(frozen=True)
class Options:
    """The options of one call (`CallOptions`), checked; `SelectionSettings.options` makes them.

    Attributes:
        signal: the name of a registered signal.
        k: adapters per prompt at most; None: the default of the pool.
        weighting: how scores become weights (`logo.selection.selector`).
        when_unsure: what answers a prompt for which no adapter seems to be made: mixture, base model or nothing.
        unsure_below: the confidence below which a selection counts as unsure.
        prior: how likely it is that a prompt belongs to some adapter of the pool, in (0, 1).
        candidates: the adapters that may be selected; None: all that are scored.
    """

    signal: str
    k: int | None
    weighting: Weighting
    when_unsure: WhenUnsure
    unsure_below: float
    prior: float
    candidates: frozenset[str] | None = None


@dataclass(frozen=True)
class Selection:
    """The adapters that answer one prompt, with their weights and scores.

    Attributes:
        adapters: names, best first; none: the base model alone.
        weights: parallel to `adapters`. They sum to 1; to less under a low confidence, to anything if they are forced.
        scores: the score of every scored adapter, in pool order. Empty for a forced selection.
        confidence: the probability that the pool holds an adapter that was made for this prompt; None for a forced
            selection, and for signals whose scores have no scale of their own.
        signal: the signal whose scores these are; None for a selection that no signal made.
        silent: adapters of the pool that cannot act on the prompt, since it lacks their invocation tokens.
        unit: how far apart scores lie of which one is e times as probable as the other; None: they have no scale.
    """

    adapters: tuple[str, ...]
    weights: tuple[float, ...]
    scores: dict[str, float]
    confidence: float | None = None
    signal: str | None = None
    silent: tuple[str, ...] = ()
    unit: float | None = None

    @classmethod
    def forced(cls, weights: Mapping[str, float]) -> Selection:
        """The selection that a user forces; UsageError unless it is a mapping to numbers."""
        try:
            return cls(tuple(weights), tuple(float(w) for w in weights.values()), {})
        except (AttributeError, TypeError, ValueError):
            expected = "names with a number as the weight of each"
            raise UsageError(f"adapters: expected {expected}, found {weights!r:.60}") from None

    @property
    def mixture(self) -> dict[str, float]:
        """Adapter name -> weight."""
        return dict(zip(self.adapters, self.weights, strict=True))

    @property
    def probabilities(self) -> dict[str, float]:
        """Of each adapter with a score, that it is the one that was made for the prompt: 0 for those that cannot act.
        They sum to the confidence; where scores have no scale, to 1, as shares of the scores above 0."""
        heard = [name for name in self.scores if name not in self.silent] or list(self.scores)
        if self.unit is None or self.confidence is None:
            shares = {name: max(0.0, self.scores[name]) for name in heard}
            total = 1.0
        else:
            best = max(self.scores[name] for name in heard)
            shares = {name: math.exp((self.scores[name] - best) / self.unit) for name in heard}
            total = self.confidence
        whole = sum(shares.values()) or 1.0
        return {name: total * shares.get(name, 0.0) / whole for name in self.scores}

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "adapters": list(self.adapters),
            "weights": list(self.weights),
            "scores": dict(self.scores),
            "confidence": self.confidence,
        }


# What a user may force: weights by name, or a selection from before.
Forced = Mapping[str, float] | Selection


@dataclass(frozen=True)
class Generation:
    """One answer.

    Attributes:
        text: the decoded continuation, special tokens removed, cut before a `stop` text.
        selection: the adapters that gave it.
        token_ids: the tokens of the continuation, with the end token.
        finish_reason: `"stop"` (by the model or a stop rule) or `"length"` (cut at the most new tokens or `max_time`).
        seconds: this prompt's share of the wall time: `{"probe", "generate"}`.
        form: how the mixtures of its batch acted.
    """

    text: str
    selection: Selection
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    seconds: dict[str, float]
    form: Form
