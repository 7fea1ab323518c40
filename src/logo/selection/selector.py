"""From scores to a `Selection`: the best adapters, how sure that is, and weights that follow from their scores.

linear     w_i = score_i / Σ score                                    the paper (equation 4) and the authors' code
adaptive   w_i ∝ exp(score_i / T), where T and the sum of the weights follow the confidence of the selection, the
           probability that the pool holds an adapter that was made for the prompt, and the sizes of the adapters:

    margin      = best score - mean of the next five
    confidence  = 1 / (1 + exp(-steepness · (margin + BEST · best score - even)))
    size_i      = mean over the points that adapter i touches of ‖ΔW_i‖_F / ‖W‖_F        ΔW_i = s_i B_i A_i

Some prompts make every adapter respond, so the best score alone says little; on prompts that are like neutral text, all
scores are near zero, and margins mean less. `steepness` and `even` belong to a kind of score, and were chosen on four
pools of two base models; docs/how-selection-works.md shows how well that holds for other pools.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from logo.adapters.pool import AdapterPool
from logo.core import Forced, Options, Selection
from logo.errors import LoGoError, NotFinite, PoolError, Unsure, UsageError, check_type, closest

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
# Below this confidence a selection counts as unsure, unless the user says otherwise: most prompts outside every task.
UNSURE = 0.15
# Adapters with less than this share of the best one's weight are left out, since each costs as much as one with more.
LEAST = 0.01


@dataclass(frozen=True)
class Evidence:
    """What a margin of one kind of score is worth.

    Attributes:
        steepness: how fast confidence grows with the margin and `BEST` times the best score.
        even: the evidence at which it is one half.
        temperatures: pairs of a confidence and the softmax temperature there, times the steepness. Up to the first
            confidence, a broad mixture is the better guess.
    """

    steepness: float
    even: float
    temperatures: tuple[tuple[float, float], ...]

    def confidence(self, ranked: Sequence[float]) -> float:
        """The confidence that scores (adapters,), sorted with the best first, give; 1/2 for a single adapter."""
        if len(ranked) == 1:
            return 0.5
        if ranked[0] <= 0:  # nothing responds more than is usual
            return 0.0
        field = ranked[1 : 1 + FIELD]
        evidence = float((1 + BEST) * ranked[0] - sum(field) / len(field))
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


@dataclass(frozen=True)
class Selector:
    """Makes selections from the scores of one signal, for the adapters of these names.

    Attributes:
        default_k: adapters per prompt where a call and the settings give no number.
        evidence: turns a margin of these scores into a confidence; None: they have no scale, the weighting is linear.
        sizes: relative sizes of adapters, for the weighting `"adaptive"`; others count as `USUAL_SIZE`.
    """

    names: tuple[str, ...]
    default_k: int
    evidence: Evidence | None
    sizes: Mapping[str, float] = field(default_factory=dict)

    def __call__(self, scores: Tensor, options: Options) -> Selection:
        """The selection of the highest of these scores (adapters,); of equal ones, the earlier name comes first.

        Raises:
            NotFinite: the score of a candidate is NaN or infinite.
            PoolError: no candidate has a score.
            Unsure: the confidence is too low, and `when_unsure` is `"refuse"`.
        """
        evidence, named = self.evidence, dict[str, float](zip(self.names, scores.tolist(), strict=True))
        if options.candidates is not None:
            named = {name: named[name] for name in named if name in options.candidates}
            if not named:
                raise PoolError(
                    f"none of the {len(options.candidates)} candidates touches what the signal {options.signal!r} "
                    "reads: name others, or force one (`adapters`)"
                )
        bad = next((name for name, score in named.items() if not math.isfinite(score)), None)
        if bad is not None:
            raise NotFinite(f"the score of adapter {bad!r} is not finite: the hidden state or the adapter overflows")
        order = sorted(named, key=named.__getitem__, reverse=True)  # equal ones stay in the order of the pool
        top = [named[name] for name in order]
        confidence = None if evidence is None else evidence.confidence(top)
        unsure = confidence is not None and confidence < options.unsure_below
        if unsure and options.when_unsure == "refuse":
            found = f"confidence {confidence:.2f}, expected {options.unsure_below:g} or more"
            message = f"no adapter of the pool seems to be made for this prompt ({found})"
            raise Unsure(message, named, float(confidence or 0))
        k = min(options.k or self.default_k, len(order))
        if unsure and options.when_unsure == "base":
            weights = []
        elif options.weighting == "linear" or evidence is None or confidence is None:
            # Scores below zero, which the official signals do not have, get weight 0. All-zero scores give uniform
            # weights (the authors' code divides by zero there).
            weights = [max(0.0, score) for score in top[:k]]
            total = sum(weights)
            weights = [one / total for one in weights] if total > 0 else [1 / k] * k
        else:
            temperature = evidence.temperature(confidence)
            weights = [math.exp((score - top[0]) / temperature) for score in top[:k]]
            weights = [one for one in weights if one >= LEAST]  # the best one's is 1 here
            total, sizes = sum(weights), [self.sizes.get(name, USUAL_SIZE) for name in order]
            size = sum(weight * size for weight, size in zip(weights, sizes, strict=False)) / total
            total /= evidence.weight_sum(confidence, size)
            weights = [one / total for one in weights]
        return Selection(tuple(order[: len(weights)]), tuple(weights), named, confidence, options.signal)

    def outcome(self, scores: Tensor, options: Options) -> Selection | LoGoError:
        """The selection of these scores (adapters,), or the error that they give."""
        try:
            return self(scores, options)
        except LoGoError as error:
            return error.with_traceback(None)  # its frames hold the scores of the whole batch


def forced(entry: Forced, pool: AdapterPool, candidates: Collection[str] | None = None) -> Selection:
    """What a user forces, as a selection. Raises PoolError: an adapter is not in the pool, or not among the candidates;
    UsageError: neither weights by name nor a selection, or a weight that is not between -1e6 and 1e6."""
    check_type("adapters", entry, (Mapping, Selection), "{name: weight} or a Selection")
    selection = entry if isinstance(entry, Selection) else Selection.forced(entry)
    for name, weight in zip(selection.adapters, selection.weights, strict=True):
        known(name, pool, candidates)
        if not -1e6 < weight < 1e6:
            raise UsageError(f"weight of adapter {name!r}: expected a number between -1e6 and 1e6, found {weight:g}")
    return selection


def for_each(
    adapters: Forced | Sequence[Forced | None] | None,
    count: int,
    pool: AdapterPool,
    candidates: Collection[str] | None,
) -> list[Selection | None]:
    """What a user forces on each of so many prompts. Errors as `forced`; UsageError for a list of another length."""
    if adapters is None or isinstance(adapters, (Mapping, Selection)):
        return [None if adapters is None else forced(adapters, pool, candidates)] * count
    check_type("adapters", adapters, (list, tuple), "{name: weight}, a Selection, or a list of these")
    if len(adapters) != count:
        raise UsageError(f"adapters: expected one entry for each of {count} prompts, found {len(adapters)}")
    return [None if entry is None else forced(entry, pool, candidates) for entry in adapters]


def known(name: str, pool: AdapterPool, candidates: Collection[str] | None = None) -> str:
    """The name, if it is in the pool and among the candidates, else a PoolError, which names candidates only."""
    if candidates is not None and name not in candidates:
        raise PoolError(f"no adapter {name!r} among the {len(candidates)} candidates{closest(name, candidates)}")
    return pool[name].name


def relative_sizes(updates: Sequence[Tensor], weight_norms: Sequence[float], touched: Tensor) -> Tensor:
    """The relative size of each adapter, (adapters,); `USUAL_SIZE` where it is not known. Per point, `updates` has
    `‖ΔW_i‖_F` of the adapters that touch it by `touched` (adapters, points), `weight_norms` `‖W‖_F` or NaN."""
    ratios = torch.full(touched.shape, torch.nan)
    for at, (update, norm) in enumerate(zip(updates, weight_norms, strict=True)):
        ratios[touched[:, at], at] = update.cpu() / norm
    return ratios.nanmean(dim=1).nan_to_num(nan=USUAL_SIZE)
