"""How far apart the scores of a pool's adapters lie by chance, for prompts that none of them was made for.

That depends on the pool: the more points its adapters touch, and the stronger they are, the more of the chance
averages out. And it depends on the prompt: a response is a mean over tokens, and a mean over few tokens varies more, so
that "Hi!" or "import os" would give some adapter a lead. Both can be measured without labels. The standard deviation
over the adapters, of a text of which n tokens are read, is roughly

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
# The standard deviation by chance of the scores that are given: that of a pool whose scores are not scaled (43 adapters
# of one recipe for Gemma 3 270M).
UNIT = 0.33
# Leads are at most doubled, however similar the adapters are.
_LEAST = UNIT / 2


def deviation(scores: Tensor) -> float:
    """`apart`: the standard deviation over adapters, of scores (texts, adapters); `UNIT` for fewer than two."""
    if scores.shape[1] < 2:
        return UNIT
    return max(float(scores.var(dim=1).mean().sqrt()), _LEAST)


def factors(tokens: Tensor, apart: float) -> Tensor:
    """What the scores of prompts with so many tokens (rows,) are multiplied by: float32 (rows,)."""
    few = ((1 + FEW / USUAL) / (1 + FEW / tokens)).sqrt().clamp(max=1.0)
    return few * torch.tensor(UNIT / apart)
