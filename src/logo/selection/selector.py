"""Scores to a `Selection`: the top k adapters, with weights in proportion to their scores."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from logo.errors import ModelError, UsageError


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


def select(scores: Tensor, names: Sequence[str], k: int) -> Selection:
    """The `k` highest scores (adapters,), ties to the earlier name; weights are `score / Σ score` over them.

    All-zero scores give uniform weights (paper, equation 4; the authors' code divides by zero there).

    Raises:
        ModelError: a score is NaN or infinite.
    """
    scores = scores.detach().float().cpu()
    if not bool(scores.isfinite().all()):
        bad = names[int((~scores.isfinite()).nonzero()[0])]
        raise ModelError(f"the score of adapter {bad!r} is not finite: the hidden state or the adapter overflows")
    top, order = torch.sort(scores, descending=True, stable=True)
    top, order = top[:k], order[:k]
    total = top.sum()
    weights = top / total if total > 0 else torch.full_like(top, 1 / len(top))
    return Selection(
        tuple(names[i] for i in order.tolist()),
        tuple(weights.tolist()),
        dict(zip(names, scores.tolist(), strict=True)),
    )
