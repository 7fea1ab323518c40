"""How much scores vary by chance, from the number of tokens that were read.

A response is a mean over the tokens of a prompt, and a mean over few tokens varies more: without any adapter for them,
"Hi!" or "import os" would give one of the adapters a lead. The variance over the adapters, of calibration texts with
n tokens, is about

    v(n) = level + slope / n

and the scores of a prompt are scaled by √(v(usual) / v(n)), at most 1, where `usual` is the median n. The ranking of
adapters does not depend on it, but the confidence and the weights do (`logo.selection.confidence`).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Noise:
    """The variance of scores over the adapters of a pool; see the module's docstring.

    Attributes:
        level: of infinitely many tokens, positive.
        slope: with the reciprocal of the number of tokens, 0 or more.
        usual: the median number of tokens.
    """

    level: float
    slope: float
    usual: float

    @classmethod
    def of(cls, scores: Tensor, tokens: Tensor) -> Noise:
        """The noise that scores (texts, adapters) of texts with so many tokens (texts,) show, by least squares."""
        apart = scores - scores.mean(dim=1, keepdim=True)
        variance = apart.square().mean(dim=1)
        few = 1 / tokens.float()
        spread = few.var(correction=0)
        slope = 0.0
        if spread > 1e-9:  # else all texts are equally long
            slope = max(0.0, float(((few - few.mean()) * variance).mean() / spread))
        level = max(float(variance.mean() - slope * few.mean()), 1e-3)
        return cls(level, slope, float(tokens.float().median()))

    def factors(self, tokens: Tensor) -> Tensor:
        """What the scores of prompts with so many tokens (rows,) are scaled by, float32 (rows,), at most 1."""
        expected = self.level + self.slope / self.usual
        return (expected / (self.level + self.slope / tokens.clamp_min(1))).sqrt().clamp(max=1.0)


# Scores do not depend on the number of tokens.
NONE = Noise(1.0, 0.0, 1.0)
