"""The next token of every sequence of a step: greedy rows together, sampled ones each by its own generator.

A sequence's tokens depend on its own seed only, never on who shares its steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from logo.serving.steps import NO_TOKEN

# Below this a temperature is greedy decoding, as in vLLM: dividing by it would overflow.
_GREEDY = 1e-5


@dataclass(frozen=True)
class Sampling:
    """How one answer is decoded.

    Attributes:
        max_tokens: new tokens at most.
        temperature: 0 is greedy.
        top_p: of the probability mass, the share that is sampled from.
        seed: of this answer's draws; None: anything.
        logprobs: None, or how many alternatives are reported beside each token's own log probability.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature < _GREEDY

    @property
    def plain(self) -> bool:
        """Whether the most likely token is all that is asked for, so that nobody has to wait for the device."""
        return self.greedy and self.logprobs is None


@dataclass(frozen=True)
class TokenLogprob:
    """What the model thought of one token, before temperature and top-p.

    Attributes:
        token: its id.
        logprob: natural logarithm of its probability.
        top: the most likely tokens with theirs, best first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass
class Drawing:
    """One sequence's draws.

    Attributes:
        sampling: how.
        logprobs: one entry per token that was drawn, where asked for.
    """

    sampling: Sampling
    logprobs: list[TokenLogprob] = field(default_factory=list)
    _generator: torch.Generator | None = None

    def draw(self, scores: Tensor) -> Tensor:
        """A token () from logits (vocabulary,), none of them NaN or above all bounds."""
        if self._generator is None:
            self._generator = torch.Generator(scores.device)
            seed = self.sampling.seed
            self._generator.manual_seed(seed % 2**63) if seed is not None else self._generator.seed()
        row = TemperatureLogitsWarper(self.sampling.temperature)(None, scores[None])
        if self.sampling.top_p < 1:
            row = TopPLogitsWarper(self.sampling.top_p)(None, row)
        return torch.multinomial(row.softmax(dim=-1), 1, generator=self._generator)[0, 0]


def next_tokens(scores: Tensor, drawings: Sequence[Drawing]) -> tuple[Tensor, dict[int, Exception]]:
    """One token per row.

    Args:
        scores: (rows, vocabulary) float32 logits.
        drawings: one per row.

    Returns:
        (rows,) token ids, and what went wrong in rows for which none could be drawn. `NO_TOKEN` stands for a row that
        holds NaN or an infinite largest logit; then nothing has been drawn for any row.
    """
    best = scores.max(dim=-1)  # NaN is the largest of all
    tokens = torch.where(best.values.isfinite(), best.indices, NO_TOKEN)
    failed: dict[int, Exception] = {}
    if all(drawing.sampling.plain for drawing in drawings) or bool((tokens == NO_TOKEN).any()):
        return tokens, failed
    for row, drawing in enumerate(drawings):
        try:
            if not drawing.sampling.greedy:
                tokens[row] = drawing.draw(scores[row])
            if drawing.sampling.logprobs is not None:
                drawing.logprobs.append(_logprob(scores[row], int(tokens[row]), drawing.sampling.logprobs))
        except Exception as error:  # of this row alone: the others have drawn, and must not draw again
            failed[row] = error
    return tokens, failed


def _logprob(scores: Tensor, token: int, count: int) -> TokenLogprob:
    logprobs = scores.log_softmax(dim=-1)
    best = logprobs.topk(min(count, len(logprobs)))
    top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return TokenLogprob(token, float(logprobs[token]), top)
