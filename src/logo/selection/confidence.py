"""How sure a selection is: the probability that the pool holds an adapter that was made for the prompt.

    lead        = best score - mean of the next five
    confidence  = 1 / (1 + exp(-steepness · (lead + BEST · best score - even)))

The best score alone is weak evidence, since some prompts make every adapter respond. Nor is its distance to the second
enough, since a near relative of the right adapter may come second; several adapters close behind are a reason for
doubt. But a lead is worth more if the best score is high, because on prompts that are like neutral text all scores are
near zero, and the lead of one is an accident.
`steepness` and `even` belong to a kind of score. They were chosen on four pools of two base models, to tell prompts
whose own adapter is in the pool from prompts without one; a pool at hand needs no labels.
docs/how-selection-works.md shows how well that holds for other pools.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

# How many adapters behind the best one the mean is taken over.
FIELD = 5
# What the best score counts beside its lead, which counts 1.
BEST = 0.1
# Softmax temperatures, times the steepness: of a broad mixture, of one in which the best adapter has most of the weight
# but related ones still help it, and of one in which it answers nearly alone.
_BROAD, _HELPED, _ALONE = 7.0, 1.57, 0.31
# If the adapters of the broadest mixture have this relative size (`logo.selection.size`), its weights sum to one half.
# Results depend on it, so it is a part of their identity.
HALVED = 0.08


@dataclass(frozen=True)
class Evidence:
    """What a lead of one kind of score is worth.

    Attributes:
        steepness: how fast confidence grows with the evidence, the lead and `BEST` times the best score.
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
        evidence = lead(ranked) + BEST * float(ranked[0])
        return 1 / (1 + math.exp(-max(-60.0, min(60.0, self.steepness * (evidence - self.even)))))

    def temperature(self, confidence: float) -> float:
        """The softmax temperature for a confidence, in units of the score: the surer the selection, the sharper.

        Between two of `temperatures`, log T is linear in the confidence.
        """
        confidences, known = zip(*self.temperatures, strict=True)
        return math.exp(np.interp(confidence, confidences, np.log(known))) / self.steepness

    def weight_sum(self, confidence: float, size: float) -> float:
        """The sum of a mixture's weights: 1 for a sure selection, less for an unsure one, the larger its adapters are.

        Adapters that were not made for a prompt also disturb the base model, so an unsure mixture leaves a part to it.
        Up to the first of `temperatures`, the sum is `1 / (1 + size / HALVED)`; up to the second, its logarithm is
        linear in the confidence.

        Args:
            confidence: of the selection.
            size: the mean relative size of the mixture's adapters (`logo.selection.size`), weighted as the mixture is.
        """
        (doubt, _), (trust, _), *_ = self.temperatures
        return float((1 + size / HALVED) ** (np.interp(confidence, (doubt, trust), (0, 1)) - 1))


# For scores of responses. They are sometimes sure of the adapter of a related task, so the best adapter never answers
# nearly alone.
RESPONSES = Evidence(3.5, 1.1, ((0.25, _BROAD), (0.4, _HELPED)))
# For scores to which example prompts contribute. A prompt that is worded unlike the examples has a low confidence, but
# usually the right adapter comes first, so the mixture gets narrow at a lower confidence than above.
EXAMPLES = Evidence(1.2, 4.2, ((0.05, _BROAD), (0.15, _HELPED), (0.75, _HELPED), (0.8, _ALONE)))


def lead(ranked: Tensor) -> float:
    """How far the best of sorted scores (adapters,) is above the mean of the next `FIELD`."""
    return float(ranked[0] - ranked[1 : 1 + FIELD].mean())
