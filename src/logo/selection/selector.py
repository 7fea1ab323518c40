"""From scores to a `Selection`: the best adapters, and weights that follow from their scores.

linear     w_i = score_i / Σ score                                    the paper (equation 4) and the authors' code
adaptive   w_i ∝ exp(score_i / T), where T and the sum of the weights follow the confidence of the selection
           (`logo.selection.confidence`): the less sure, the broader and the weaker. Adapters with less than `LEAST` of
           the best one's weight are left out. The sum also follows the size of the adapters (`logo.selection.size`)
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from logo.adapters.pool import AdapterPool
from logo.errors import NotFinite, PoolError, Unsure, UsageError, check_type, closest
from logo.selection.confidence import RESPONSES, Evidence
from logo.selection.signals import Weighting, WhenUnsure
from logo.selection.size import USUAL

# Below this confidence a selection counts as unsure, unless the user says otherwise. Most prompts outside every task
# are below it, and some prompts whose own adapter is hardly trained are only a little above it.
UNSURE = 0.15
# Adapters with less than this share of the best one's weight are left out, since each costs as much as one with more.
LEAST = 0.01


@dataclass(frozen=True)
class Selection:
    """The adapters that answer one prompt, with their weights and scores.

    Attributes:
        adapters: names, best first. Empty: the base model alone.
        weights: parallel to `adapters`. They sum to 1; to less if an adaptive weighting has a low confidence, and
            to anything if the user forced them.
        scores: the score of every scored adapter, in pool order. Empty for a forced selection.
        confidence: the probability that the pool holds an adapter that was made for this prompt; None for a forced
            selection, and for signals whose scores have no scale of their own.
        signal: the signal whose scores these are; None for a selection that no signal made.
    """

    adapters: tuple[str, ...]
    weights: tuple[float, ...]
    scores: dict[str, float]
    confidence: float | None = None
    signal: str | None = None

    @classmethod
    def forced(cls, weights: Mapping[str, float]) -> Selection:
        """The selection that a user forces.

        Raises:
            UsageError: `weights` is no mapping, or a weight is no number.
        """
        try:
            return cls(tuple(weights), tuple(float(w) for w in weights.values()), {})
        except (AttributeError, TypeError, ValueError):
            raise UsageError(
                f"adapters: expected names with a number as the weight of each, found {weights!r:.60}"
            ) from None

    @property
    def mixture(self) -> dict[str, float]:
        """Adapter name -> weight."""
        return dict(zip(self.adapters, self.weights, strict=True))

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


def forced(entry: Forced, pool: AdapterPool, candidates: Collection[str] | None = None) -> Selection:
    """Checks what a user forces, and returns it as a selection.

    Raises:
        PoolError: an adapter is not in the pool, or not among the candidates.
        UsageError: neither weights by name nor a selection, or a weight that is not a number between -1e6 and 1e6.
    """
    check_type("adapters", entry, (Mapping, Selection), "{name: weight} or a Selection")
    selection = entry if isinstance(entry, Selection) else Selection.forced(entry)
    for name, weight in zip(selection.adapters, selection.weights, strict=True):
        known(name, pool, candidates)
        if not -1e6 < weight < 1e6:
            raise UsageError(f"weight of adapter {name!r}: expected a number between -1e6 and 1e6, found {weight:g}")
    return selection


def known(name: str, pool: AdapterPool, candidates: Collection[str] | None = None) -> str:
    """Returns the name if it is in the pool, and among the candidates if there are any.

    Raises:
        PoolError: it is not. If there are candidates, the message names no other adapters.
    """
    if candidates is not None and name not in candidates:
        raise PoolError(f"no adapter {name!r} among the {len(candidates)} candidates{closest(name, candidates)}")
    return pool[name].name


@dataclass(frozen=True)
class Selector:
    """How many adapters answer a prompt, and how scores become weights.

    Attributes:
        k: adapters at most.
        weighting: see the module's docstring.
        evidence: turns a lead of these scores into a confidence; None: they have no scale of their own, and the
            weighting is linear.
        when_unsure: what answers if the confidence is below `unsure_below`: the mixture (`"mix"`), the `"base"` model
            alone, or nothing (`"refuse"`).
    """

    k: int
    weighting: Weighting = "linear"
    evidence: Evidence | None = RESPONSES
    when_unsure: WhenUnsure = "mix"
    unsure_below: float = UNSURE

    def __call__(self, scores: Tensor, names: Sequence[str], sizes: Mapping[str, float] | None = None) -> Selection:
        """The selection of the highest of these scores (adapters,); of equal ones, the earlier name comes first.

        Args:
            sizes: relative sizes of adapters (`logo.selection.size`), for the weighting `"adaptive"`; those that are
                not known count as `USUAL`.

        Raises:
            NotFinite: a score is NaN or infinite.
            Unsure: the confidence is too low, and `when_unsure` is `"refuse"`.
        """
        scores = scores.detach().float().cpu()
        if not bool(scores.isfinite().all()):
            bad = names[int((~scores.isfinite()).nonzero()[0])]
            raise NotFinite(f"the score of adapter {bad!r} is not finite: the hidden state or the adapter overflows")
        top, order = torch.sort(scores, descending=True, stable=True)
        confidence = None if self.evidence is None else self.evidence.confidence(top)
        named = dict(zip(names, scores.tolist(), strict=True))
        if self.when_unsure == "refuse" and confidence is not None and confidence < self.unsure_below:
            raise Unsure(
                f"no adapter of the pool seems to be made for this prompt (confidence {confidence:.2f}, expected "
                f"{self.unsure_below:g} or more)",
                named,
                confidence,
            )
        if confidence is not None and confidence < self.unsure_below and self.when_unsure != "mix":
            weights = torch.zeros(0)
        elif self.weighting == "linear" or self.evidence is None or confidence is None:
            weights = linear(top[: self.k])
        else:
            weights = (top[: self.k] / self.evidence.temperature(confidence)).softmax(dim=0)
            weights = weights[weights >= LEAST * weights[0]]
            weights = weights / weights.sum()
            sized = [(sizes or {}).get(names[i], USUAL) for i in order[: len(weights)].tolist()]
            weights = weights * self.evidence.weight_sum(confidence, float(weights @ torch.tensor(sized)))
        chosen = tuple(names[i] for i in order[: len(weights)].tolist())
        return Selection(chosen, tuple(weights.tolist()), named, confidence)


def linear(top: Tensor) -> Tensor:
    """`score / Σ score` (k,); scores below zero, which the official signals do not have, get weight 0.

    All-zero scores give uniform weights (paper, equation 4; the authors' code divides by zero there).
    """
    top = top.clamp_min(0)
    total = top.sum()
    return top / total if total > 0 else torch.full_like(top, 1 / len(top))


def check_k(k: int, pool_size: int) -> int:
    """`k`, or the pool's size where `k` is larger (with one warning).

    Raises:
        UsageError: k is not positive.
    """
    if k <= 0:
        raise UsageError(f"number of selected adapters (k): expected 1 or more, found {k}")
    if k > pool_size:
        message = f"k is {k} but the pool has {pool_size} adapters: all of them are used"
        warnings.warn(message, UserWarning, stacklevel=3)
    return min(k, pool_size)
