"""From scores to a `Selection`: the best adapters, how sure that is, and weights that follow from their scores.

linear     w_i = score_i / Σ score                                    the paper (equation 4) and the authors' code
adaptive   w = q · sharp + (1 - q) · broad

    others      = all adapters but the best two
    spread      = 1                                                          for responses
                = √((n variance of the others' scores + 2 · APART²) / (n + 2) · (1 + 1/n))      n others
                                                                             if example prompts contribute
    evidence    = (best score - mean score of the others) / spread
    p           = 1 / (1 + exp(-steepness · (evidence - even) - logit(prior) + logit(0.8)))       the confidence
    q           = boldness · p / (boldness · p + 1 - p)
    sharp_i     ∝ exp(score_i / (sharpness · spread)), and its sum is 1
    broad_i     ∝ exp(score_i / (breadth · spread)), and its sum is 1 / (1 + size / HALVED)
    size        = mean over broad of the adapters' sizes: mean over points of ‖ΔW_i‖_F / ‖W‖_F      ΔW_i = s_i B_i A_i

If p is the probability that the pool holds the right adapter, boldness 1 gives the expected weights: the sharp mixture
answers if the pool holds it, and the broad one if not. More boldness pays where answers suffer more from diluting the
right adapter than from using a wrong one.

The second adapter does not count among the others, because it may be a relative of the best one, or another version of
it; of two adapters, it is the only other one.

Scores grow with the training, the rank and the modules of a pool's adapters, on their own prompts and on all others.
So the unit of responses is about as much as the best score of this pool leads by on a text of its calibration
(`logo.selection.scorer`), and their margin is taken as it is. Scores to which example prompts contribute fall when a
prompt is worded unlike the adapter's own, and a margin in that unit would take this for doubt. So their margin counts
in units of how far apart the others lie on this prompt, as the predictive distribution of a normal sample has it: a few
scores that happen to lie close together say little about the next one, so two more count that lie `APART`.

`steepness`, `even`, `boldness`, `sharpness` and `breadth` belong to a kind of score; docs/how-selection-works.md says
on which rows they were chosen, and how well they hold elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from logo.adapters.pool import AdapterPool
from logo.core import Forced, Options, Selection
from logo.errors import LoGoError, NotFinite, PoolError, Unsure, UsageError, check_type, closest

# How far apart scores of adapters that were not made for a prompt usually lie.
APART = 1.2
# As how many adapters' scores this counts.
USUAL_COUNT = 2
# If the adapters of a broad mixture have this relative size, its weights sum to one half: adapters that were not made
# for a prompt disturb the base model.
HALVED = 0.08
# An adapter whose size is not known, such as one of a quantised base model, counts as one of this size.
USUAL_SIZE = 0.03
# How likely it is that a prompt belongs to some adapter of the pool, unless the user says otherwise.
PRIOR = 0.8
_USUAL_LOGIT = math.log(PRIOR / (1 - PRIOR))
# Below this confidence a selection counts as unsure, unless the user says otherwise: more probably than not, the pool
# has no adapter for the prompt.
UNSURE = 0.5
# Adapters with less than this share of the best one's weight, which gets theirs, are left out: each costs as much as
# one with more.
LEAST = 0.01


@dataclass(frozen=True)
class Evidence:
    """What scores of one kind say about whether the best adapter was made for the prompt; see the formulas above.

    Attributes:
        steepness: how fast the confidence grows with the evidence.
        even: the evidence at which it is one half, for the usual prior.
        spreads: whether the margin counts in units of how far apart the others lie.
        boldness: by how much the odds of the confidence are multiplied for the weights.
        sharpness: softmax temperature of the sharp mixture, in units of the spread: nearly equal adapters share the
            weight.
        breadth: that of the broad mixture.
    """

    steepness: float
    even: float
    spreads: bool
    boldness: float
    sharpness: float
    breadth: float

    def spread(self, ranked: Sequence[float]) -> float:
        """The unit of a margin, from scores (adapters,), sorted with the best first."""
        others = ranked[2:] or ranked[1:]
        if not self.spreads or not others:
            return 1.0
        count = len(others)
        variance = (count * np.var(others) + USUAL_COUNT * APART**2) / (count + USUAL_COUNT)
        return math.sqrt(variance * (1 + 1 / count))

    def confidence(self, ranked: Sequence[float], prior: float = PRIOR) -> float:
        """The confidence that scores (adapters,), sorted with the best first, give; the prior for a single adapter."""
        others = ranked[2:] or ranked[1:]
        if not others:
            return prior
        margin = ranked[0] - sum(others) / len(others)
        evidence = margin / self.spread(ranked)
        odds = self.steepness * (evidence - self.even) + math.log(prior / (1 - prior)) - _USUAL_LOGIT
        return float(1 / (1 + math.exp(-max(-60.0, min(60.0, odds)))))


# For scores of responses, and for those to which example prompts contribute, whose order is more reliable.
RESPONSES = Evidence(steepness=3.0, even=3.0, spreads=False, boldness=1.0, sharpness=0.22, breadth=2.25)
EXAMPLES = Evidence(steepness=0.9, even=3.8, spreads=True, boldness=4.0, sharpness=0.5, breadth=1.0)


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

    def __call__(self, scores: Tensor, options: Options, silent: Collection[str] = ()) -> Selection:
        """The selection of the highest of these scores (adapters,); of equal ones, the earlier name comes first.

        Adapters that are `silent`, since the prompt lacks their invocation tokens, are selected only if all candidates
        are. The confidence compares the best one that acts with all others, silent ones included.

        Raises:
            NotFinite: the score of a candidate is NaN or infinite.
            PoolError: no candidate has a score.
            Unsure: the confidence is too low, and `when_unsure` is `"refuse"`.
        """
        named = self._candidates(scores, options)
        order = sorted(named, key=named.__getitem__, reverse=True)  # equal ones stay in the order of the pool
        ranked = [named[name] for name in order]
        heard = [name for name in order if name not in silent]
        if silent and heard:  # the best that acts, before all others
            ranked = [named[heard[0]], *(named[name] for name in order if name != heard[0])]
            order = heard
        confidence = None if self.evidence is None else self.evidence.confidence(ranked, options.prior)
        unsure = confidence is not None and confidence < options.unsure_below
        if unsure and options.when_unsure == "refuse":
            found = f"confidence {confidence:.2f}, expected {options.unsure_below:g} or more"
            message = f"no adapter of the pool seems to be made for this prompt ({found})"
            raise Unsure(message, named, float(confidence or 0))
        best = order[: options.k or self.default_k]
        if unsure and options.when_unsure == "base":
            weights: list[float] = []
        elif options.weighting == "linear" or self.evidence is None or confidence is None:
            weights = linear_weights([named[name] for name in best])
        else:
            margins = (np.array([named[name] for name in best]) - named[best[0]]) / self.evidence.spread(ranked)
            sizes = np.array([self.sizes.get(name, USUAL_SIZE) for name in best])
            weights = adaptive_weights(margins, sizes, confidence, self.evidence)
        adapters = tuple(best[: len(weights)])
        unit = None if self.evidence is None else self.evidence.sharpness * self.evidence.spread(ranked)
        return Selection(adapters, tuple(weights), named, confidence, options.signal, tuple(silent), unit)

    def _candidates(self, scores: Tensor, options: Options) -> dict[str, float]:
        """The scores of the candidates by name, in the order of the pool; raises PoolError or NotFinite."""
        named = dict[str, float](zip(self.names, scores.tolist(), strict=True))
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
        return named

    def outcome(self, scores: Tensor, options: Options, silent: Collection[str] = ()) -> Selection | LoGoError:
        """The selection of these scores (adapters,), or the error that they give."""
        try:
            return self(scores, options, silent)
        except LoGoError as error:
            return error.with_traceback(None)  # its frames hold the scores of the whole batch


def linear_weights(scores: Sequence[float]) -> list[float]:
    """The shares of scores in their sum. Those below zero, which the official signals do not have, get weight 0; if no
    score is above, weights are uniform (the authors' code divides by zero there)."""
    positive = [max(0.0, score) for score in scores]
    total = sum(positive)
    return [score / total for score in positive] if total > 0 else [1 / len(scores)] * len(scores)


def adaptive_weights(
    margins: NDArray[np.float64], sizes: NDArray[np.float64], confidence: float, evidence: Evidence
) -> list[float]:
    """The weights of the best adapters, fewer than are given if some would have hardly any: see above.

    Args:
        margins: (adapters,), the scores less the best one, in units of the spread, the best one first.
        sizes: (adapters,), their relative sizes.
    """
    sharp = np.exp(margins / evidence.sharpness)
    sharp = sharp / sharp.sum()
    broad = np.exp(margins / evidence.breadth)
    broad = broad / broad.sum()
    for_sharp = evidence.boldness * confidence
    share = for_sharp / (for_sharp + 1 - confidence)
    weights = share * sharp + (1 - share) * broad / (1 + broad @ sizes / HALVED)
    enough = weights >= LEAST * weights[0]
    weights[0] += weights[~enough].sum()
    return list(weights[enough].tolist())  # the best ones', since they fall with the score


def forced(entry: Forced, pool: AdapterPool, candidates: Collection[str] | None = None) -> Selection:
    """What a user forces, as a selection. Raises PoolError: an adapter is not in the pool, or not among the candidates;
    UsageError: neither weights by name nor a selection, or a weight that is not between -1e6 and 1e6."""
    check_type("adapters", entry, (Mapping, Selection), "{name: weight} or a Selection")
    selection = entry if isinstance(entry, Selection) else Selection.forced(entry)
    for name, weight in zip(selection.adapters, selection.weights, strict=True):
        checked_name(name, pool, candidates)
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


def checked_name(name: str, pool: AdapterPool, candidates: Collection[str] | None = None) -> str:
    """The name, if it is in the pool and among the candidates, else a PoolError, which names candidates only."""
    if candidates is not None and name not in candidates:
        raise PoolError(f"no adapter {name!r} among the {len(candidates)} candidates{closest(name, candidates)}")
    return pool[name].name


def relative_sizes(updates: Sequence[Tensor], weight_norms: Sequence[float], touched: Tensor) -> Tensor:
    """The relative size of each adapter, (adapters,); `USUAL_SIZE` where it is not known. Per point, `updates` has
    `‖ΔW_i‖_F` of the adapters that touch it by `touched` (adapters, points), `weight_norms` `‖W‖_F` or NaN."""
    ratios = torch.full(touched.shape, torch.nan, dtype=torch.float32)
    for at, (update, norm) in enumerate(zip(updates, weight_norms, strict=True)):
        ratios[touched[:, at], at] = update.cpu() / norm
    return ratios.nanmean(dim=1).nan_to_num(nan=USUAL_SIZE)
