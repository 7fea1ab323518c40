"""The unit of scores: how far apart the scores of a pool's adapters lie by chance, on texts that none was made for.

It depends on the pool, since a score is a mean over points, and a mean over many points varies less. And it depends on
the prompt, since a response is a mean over tokens, and a mean over few tokens varies more: on "Hi!" or "import os",
some adapter would always have a lead. Neither needs labels. If n tokens of a text are read, the standard deviation of
its scores over the adapters is roughly

    apart · √((1 + FEW / n) / (1 + FEW / USUAL))        apart: of the neutral texts

and a prompt's scores are divided by it (if n is above `USUAL`, by `apart`), times `UNIT`. So a lead means the same in
every pool (`logo.selection.confidence`). The ranking of a pool's adapters does not change. Scores to which example
prompts contribute are not scaled: the similarities to examples have one unit in every pool.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Fitted to the calibration texts of three pools of different base models, FEW was 4 to 11. With these tokenizers, the
# texts have 13 to 15 tokens in the median. Scores depend on these numbers, so `logo.selection.reference.SCORES` has to
# be raised when one changes.
FEW, USUAL = 5.0, 13
# What `apart` becomes by scaling. It is the `apart` of 43 adapters of one recipe for Gemma 3 270M, whose scores stay as
# they are.
UNIT = 0.33
# Leads are at most doubled, however similar the adapters are.
_LEAST = UNIT / 2


def deviation(scores: Tensor) -> float:
    """`apart`: the usual standard deviation over adapters, of scores (texts, adapters); `UNIT` for one adapter."""
    if scores.shape[1] < 2:
        return UNIT
    return max(float(scores.var(dim=1).mean().sqrt()), _LEAST)


def factors(tokens: Tensor, apart: float) -> Tensor:
    """What the scores of prompts with so many tokens (rows,) are multiplied by: float32 (rows,)."""
    few = ((1 + FEW / USUAL) / (1 + FEW / tokens)).sqrt().clamp(max=1.0)
    return few * torch.tensor(UNIT / apart)
