"""How sure a selection is: the probability that the pool holds an adapter that was made for the prompt.

    margin      = best score - mean of the next five
    confidence  = 1 / (1 + exp(-steepness · (margin + BEST · best score - even)))

Some prompts make every adapter respond, so the best score alone says little; and a near relative of the right adapter
may come second, so a mean is taken. A margin is worth more if the best score is high: on prompts that are like neutral
text, all scores are near zero. `steepness` and `even` belong to a kind of score, and were chosen on four pools of two
base models; docs/how-selection-works.md shows how well that holds for other pools.

How much of a prompt an unsure mixture leaves to the base model depends on the relative size of its adapters:

    size_i = mean over the points that adapter i touches of ‖ΔW_i‖_F / ‖W‖_F        ΔW_i = s_i B_i A_i
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# How many adapters behind the best one the mean is taken over.
FIELD = 5
# What the best score counts beside its margin, which counts 1.
BEST = 0.1
# Softmax temperatures, times the steepness: of a broad mixture, of one in which the best adapter has most of the weight
# but related ones still help it, and of one in which it answers nearly alone.
_BROAD, _HELPED, _ALONE = 7.0, 1.57, 0.31
# If the adapters of the broadest mixture have this relative size, its weights sum to one half.
HALVED = 0.08
# An adapter whose size is not known, such as one of a quantised base model, counts as one of this size.
USUAL_SIZE = 0.03


@dataclass(frozen=True)
class Evidence:
    """What a margin of one kind of score is worth.

    Attributes:
        steepness: how fast confidence grows with the evidence, the margin and `BEST` times the best score.
        even: the evidence at which it is one half.
        temperatures: pairs of a confidence and the softmax temperature there, times the steepness. Up to the first
            confidence, a broad mixture is the better guess.
    """

    steepness: float
    even: float
    temperatures: tuple[tuple[float, float], ...]

    def confidence(self, ranked: Tensor) -> float:
        """The confidence that scores (adapters,), sorted with the best first, give; 1/2 for a single adapter."""
        if len(ranked) == 1:
            return 0.5
        if ranked[0] <= 0:  # nothing responds more than is usual
            return 0.0
        margin = float(ranked[0] - ranked[1 : 1 + FIELD].mean())
        evidence = margin + BEST * float(ranked[0])
        return 1 / (1 + math.exp(-max(-60.0, min(60.0, self.steepness * (evidence - self.even)))))

    def temperature(self, confidence: float) -> float:
        """The softmax temperature for a confidence, in units of the score; log T is linear between `temperatures`."""
        confidences, known = zip(*self.temperatures, strict=True)
        return math.exp(np.interp(confidence, confidences, np.log(known))) / self.steepness

    def weight_sum(self, confidence: float, size: float) -> float:
        """The sum of a mixture's weights, since adapters that were not made for a prompt disturb the base model.

        Up to the first of `temperatures`, it is `1 / (1 + size / HALVED)`; from there to 1 at the second, its logarithm
        is linear in the confidence. `size` is the mean relative size of the adapters, weighted as the mixture is.
        """
        (doubt, _), (trust, _), *_ = self.temperatures
        return float((1 + size / HALVED) ** (np.interp(confidence, (doubt, trust), (0, 1)) - 1))


# For scores of responses, which are sometimes sure of the adapter of a related task: the best never answers alone.
RESPONSES = Evidence(3.5, 1.1, ((0.25, _BROAD), (0.4, _HELPED)))
# For scores to which example prompts contribute. A prompt that is worded unlike the examples has a low confidence, but
# usually the right adapter comes first, so the mixture gets narrow at a lower confidence than above.
EXAMPLES = Evidence(1.2, 4.2, ((0.05, _BROAD), (0.15, _HELPED), (0.75, _HELPED), (0.8, _ALONE)))


def relative_sizes(updates: Sequence[Tensor], weight_norms: Sequence[float], touched: Tensor) -> Tensor:
    """The relative size of each adapter, (adapters,); `USUAL_SIZE` where it is not known. Per point, `updates` has
    `‖ΔW_i‖_F` of the adapters that touch it by `touched` (adapters, points), `weight_norms` `‖W‖_F` or NaN."""
    ratios = torch.full(touched.shape, torch.nan)
    for at, (update, norm) in enumerate(zip(updates, weight_norms, strict=True)):
        ratios[touched[:, at], at] = update.cpu() / norm
    return ratios.nanmean(dim=1).nan_to_num(nan=USUAL_SIZE)
