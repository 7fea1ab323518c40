"""From scores to a `Selection`: the best adapters, and weights that follow from their scores.

linear     w_i = score_i / Σ score                                    the paper (equation 4) and the authors' code
adaptive   w_i ∝ exp(score_i / T), where T and the sum of the weights follow the confidence of the selection and the
           sizes of the adapters (`logo.selection.confidence`)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from logo.adapters.pool import AdapterPool
from logo.core import Forced, Options, Selection
from logo.errors import LoGoError, NotFinite, PoolError, Unsure, UsageError, check_type, closest
from logo.selection.confidence import USUAL_SIZE, Evidence

# Below this confidence a selection counts as unsure, unless the user says otherwise: most prompts outside every task.
UNSURE = 0.15
# Adapters with less than this share of the best one's weight are left out, since each costs as much as one with more.
LEAST = 0.01


@dataclass(frozen=True)
class Selector:
    """Makes selections from the scores of one signal, for the adapters of these names.

    Attributes:
        default_k: adapters per prompt where a call and the settings give no number.
        evidence: turns a margin of these scores into a confidence; None: they have no scale of their own, and the
            weighting is linear.
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
        scores, names, evidence = scores.detach().float().cpu(), self.names, self.evidence
        if options.candidates is not None:
            left = [i for i, name in enumerate(names) if name in options.candidates]
            if not left:
                raise PoolError(
                    f"none of the {len(options.candidates)} candidates touches what the signal {options.signal!r} "
                    "reads: name others, or force one (`adapters`)"
                )
            scores, names = scores[left], tuple(names[i] for i in left)
        if not bool(scores.isfinite().all()):
            bad = names[int((~scores.isfinite()).nonzero()[0])]
            raise NotFinite(f"the score of adapter {bad!r} is not finite: the hidden state or the adapter overflows")
        top, order = torch.sort(scores, descending=True, stable=True)
        confidence = None if evidence is None else evidence.confidence(top)
        unsure = confidence is not None and confidence < options.unsure_below
        named = dict(zip(names, scores.tolist(), strict=True))
        if unsure and options.when_unsure == "refuse":
            raise Unsure(
                f"no adapter of the pool seems to be made for this prompt (confidence {confidence:.2f}, expected "
                f"{options.unsure_below:g} or more)",
                named,
                float(confidence or 0),
            )
        k = min(options.k or self.default_k, len(names))
        if unsure and options.when_unsure == "base":
            weights = torch.zeros(0)
        elif options.weighting == "linear" or evidence is None or confidence is None:
            # Scores below zero, which the official signals do not have, get weight 0. All-zero scores give uniform
            # weights (the authors' code divides by zero there).
            weights = top[:k].clamp_min(0)
            weights = weights / weights.sum() if weights.sum() > 0 else torch.full_like(weights, 1 / k)
        else:
            weights = (top[:k] / evidence.temperature(confidence)).softmax(dim=0)
            weights = weights[weights >= LEAST * weights[0]]
            weights = weights / weights.sum()
            sized = [self.sizes.get(names[i], USUAL_SIZE) for i in order[: len(weights)].tolist()]
            weights = weights * evidence.weight_sum(confidence, float(weights @ torch.tensor(sized)))
        chosen = tuple(names[i] for i in order[: len(weights)].tolist())
        return Selection(chosen, tuple(weights.tolist()), named, confidence, options.signal)

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


def known(name: str, pool: AdapterPool, candidates: Collection[str] | None = None) -> str:
    """The name, if it is in the pool and among the candidates, else a PoolError, which names candidates only."""
    if candidates is not None and name not in candidates:
        raise PoolError(f"no adapter {name!r} among the {len(candidates)} candidates{closest(name, candidates)}")
    return pool[name].name
