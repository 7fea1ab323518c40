"""Scores to a `Selection`: the best adapters, with weights that follow their scores.

linear     w_i = score_i / Σ score                                    the paper (equation 4) and the authors' code
softmax    w_i ∝ exp(score_i / T)
adaptive   softmax whose temperature follows how clearly the best score stands out, see `adaptive_temperature`
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from logo.adapters.pool import AdapterPool
from logo.errors import NotFinite, PoolError, UsageError, closest
from logo.selection.signals import Weighting

# Temperatures: one adapter nearly alone, and several.
_SHARPEST, _BROADEST = 0.3, 0.8
# Leads up to which a mixture is broad, and from which it is sharp, in standard deviations of neutral text. On the few
# tokens on which activated adapters act, adapters are less far apart.
LEADS, ACTIVATED_LEADS = (0.7, 0.9), (0.4, 0.6)


@dataclass(frozen=True)
class Selection:
    """Which adapters answer one input, and how strongly.

    Attributes:
        adapters: names, best first. Empty: the base model alone.
        weights: parallel to `adapters`. They sum to 1 unless the user forced others.
        scores: the score of every scored adapter, in pool order. Empty for a forced selection.
    """

    adapters: tuple[str, ...]
    weights: tuple[float, ...]
    scores: dict[str, float]

    @classmethod
    def forced(cls, weights: Mapping[str, float]) -> Selection:
        """What the user asked for instead of what the model would choose."""
        return cls(tuple(weights), tuple(float(w) for w in weights.values()), {})

    @property
    def mixture(self) -> dict[str, float]:
        """Adapter name -> weight."""
        return dict(zip(self.adapters, self.weights, strict=True))

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {"adapters": list(self.adapters), "weights": list(self.weights), "scores": dict(self.scores)}


# What the user may ask for instead of what the model would choose.
Forced = Mapping[str, float] | Selection


def forced(entry: Forced, pool: AdapterPool, candidates: Collection[str] | None = None) -> Selection:
    """The selection that a user names: adapter -> weight, or a selection from before.

    Raises:
        PoolError: an adapter is not in the pool, or not among the candidates.
        UsageError: a weight that is not a finite number.
    """
    selection = entry if isinstance(entry, Selection) else Selection.forced(entry)
    for name, weight in zip(selection.adapters, selection.weights, strict=True):
        known(name, pool, candidates)
        if not -1e6 < weight < 1e6:
            raise UsageError(f"weight of adapter {name!r}: expected a finite number, found {weight}")
    return selection


def known(name: str, pool: AdapterPool, candidates: Collection[str] | None = None) -> str:
    """The name, if it is one of the pool's, and of the candidates where there are any.

    Raises:
        PoolError: it is not. Where there are candidates, the message names no others.
    """
    if candidates is not None and name not in candidates:
        raise PoolError(f"no adapter {name!r} among the {len(candidates)} candidates{closest(name, candidates)}")
    return pool[name].name


@dataclass(frozen=True)
class Selector:
    """How many adapters answer, and how scores become weights.

    Attributes:
        k: adapters at most.
        weighting: see the module's docstring.
        temperature: of `"softmax"`.
        keep_mass: keep the best adapters that together hold this share of the weight; None: all k.
        leads: of `"adaptive"`, see `adaptive_temperature`.
    """

    k: int
    weighting: Weighting = "linear"
    temperature: float = 0.5
    keep_mass: float | None = None
    leads: tuple[float, float] = LEADS

    def __call__(self, scores: Tensor, names: Sequence[str]) -> Selection:
        """The highest of these scores (adapters,), ties to the earlier name.

        Raises:
            NotFinite: a score is NaN or infinite.
        """
        scores = scores.detach().float().cpu()
        if not bool(scores.isfinite().all()):
            bad = names[int((~scores.isfinite()).nonzero()[0])]
            raise NotFinite(f"the score of adapter {bad!r} is not finite: the hidden state or the adapter overflows")
        top, order = torch.sort(scores, descending=True, stable=True)
        weights = self._weights(top)
        if self.keep_mass is not None:
            # The first adapter always stays; one is dropped when those before it already hold the mass.
            kept = int((weights.cumsum(0) - weights < self.keep_mass * (1 - 1e-6)).sum())
            weights = weights[:kept] / weights[:kept].sum()
        order = order[: len(weights)]
        return Selection(
            tuple(names[i] for i in order.tolist()),
            tuple(weights.tolist()),
            dict(zip(names, scores.tolist(), strict=True)),
        )

    def _weights(self, ranked: Tensor) -> Tensor:
        """(k,) of all scores, best first: (adapters,)."""
        top = ranked[: self.k]
        if self.weighting == "linear":
            return linear(top)
        temperature = self.temperature if self.weighting == "softmax" else adaptive_temperature(ranked, self.leads)
        return (top / temperature).softmax(dim=0)


def linear(top: Tensor) -> Tensor:
    """`score / Σ score` (k,); scores below zero, which only signals beside the official ones have, weigh nothing.

    All-zero scores give uniform weights (paper, equation 4; the authors' code divides by zero there).
    """
    top = top.clamp_min(0)
    total = top.sum()
    return top / total if total > 0 else torch.full_like(top, 1 / len(top))


def adaptive_temperature(ranked: Tensor, leads: tuple[float, float] = LEADS) -> float:
    """The temperature that suits these z-scores (adapters,), best first: sharp when something stands out, else broad.

    `lead` is how far the best score is above the mean of the next five. Not above the second alone: a near relative of
    the right adapter is no reason to doubt it, a whole field close behind is. Up to the first of `leads` the mixture is
    broad (T = 0.8), from the second on it is sharp (T = 0.3), and between them log T is in proportion. Where nothing is
    above its own baseline, the mixture is broad. The constants were chosen on rows of one pool that no study uses
    (docs/how-selection-works.md), those of activated adapters on half of the tasks of one pool (docs/read-once.md).
    """
    if len(ranked) == 1 or ranked[0] <= 0:
        return _BROADEST
    lead = float(ranked[0] - ranked[1:6].mean())
    sureness = min(max((lead - leads[0]) / (leads[1] - leads[0]), 0.0), 1.0)
    return float(_BROADEST * (_SHARPEST / _BROADEST) ** sureness)


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
