"""How reliable the confidence of selections is: prompts with their own adapter against prompts without one.

Prompts of tasks with an adapter count as having one; the same prompts with that adapter left out, and prompts of unseen
tasks, count as having none. *AUROC* is the share of pairs in which the prompt with an adapter has the higher
confidence. The *error* is the mean distance between confidence and the share of prompts with an adapter, over ten bins
of confidence weighted by their rows, in which both kinds of prompts count half (expected calibration error, Naeini et
al. 2015). The shares *below* a confidence say what each value of `unsure_below` would do to prompts of each kind.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from logo.evaluation.summary import Measured

BINS = 10
# Confidences for which the shares of prompts below them are reported.
BELOW = tuple(round(0.05 * step, 2) for step in range(1, 20))
_KINDS = ("own", "left_out", "unseen")


def reliability(rows: Iterable[Measured]) -> dict[str, dict[str, Any]]:
    """By signal: AUROC against `unseen` and `left_out` prompts (None if there are none), the `error`, the bins
    (`confidence`, `own`, `weight`), and the shares of prompts `below` each of some confidences (`confidence`, and a
    list for each kind of prompt). Signals without a confidence are left out.
    """
    groups: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        for part, answers in (("answers", row.answers), ("left_out", row.left_out or {})):
            for signal, metrics in answers.get("signals", {}).items():
                if "confidence" in metrics:
                    whole = "own" if "top1" in metrics else "unseen"  # only own tasks have a rank
                    group = whole if part == "answers" else part
                    groups.setdefault(signal, {}).setdefault(group, []).append(metrics["confidence"])
    return {signal: _of(found) for signal, found in groups.items() if "own" in found}


def _of(found: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    own, others = found["own"], [*found.get("unseen", ()), *found.get("left_out", ())]
    against = {name: auroc(own, found[name]) if name in found else None for name in ("unseen", "left_out")}
    below: dict[str, Sequence[float]] = {"confidence": BELOW}
    below |= {kind: [float(np.mean(np.array(found[kind]) < at)) for at in BELOW] for kind in _KINDS if kind in found}
    if not others:
        return {"auroc": against, "error": None, "bins": [], "below": below}
    values = np.array([*own, *others])
    truth = np.array([1.0] * len(own) + [0.0] * len(others))
    weights = np.array([0.5 / len(own)] * len(own) + [0.5 / len(others)] * len(others))
    places = np.minimum((values * BINS).astype(int), BINS - 1)
    bins = []
    for place in range(BINS):
        inside = places == place
        if inside.any():
            share = weights[inside] / weights[inside].sum()
            bins.append(
                {
                    "confidence": float(values[inside] @ share),
                    "own": float(truth[inside] @ share),
                    "weight": float(weights[inside].sum()),
                }
            )
    error = sum(one["weight"] * abs(one["confidence"] - one["own"]) for one in bins)
    return {"auroc": against, "error": error, "bins": bins, "below": below}


def auroc(own: Sequence[float], others: Sequence[float]) -> float:
    """The share of pairs in which the first has the higher value; ties count half."""
    from scipy.stats import mannwhitneyu

    return float(mannwhitneyu(own, others).statistic) / (len(own) * len(others))
