"""Signatures: what an adapter's example prompts look like to the base model, whatever the adapter's weights are.

A prompt is described at some places of the base model by two hidden vectors: the mean over the tokens that are read,
and the last of them. With the whitenings `W` of both (`logo.selection.whitening`, of ordinary texts described likewise)
and the mean `m_i` of the whitened descriptions of adapter i's examples,

    s_i(x) = mean over places of cos(W_mean x_mean, m_i,mean) + 1/2 cos(W_last x_last, m_i,last)

Recipes of training do not matter to it, and one example is enough. Adapters without examples are compared by their
responses alone (`logo.selection.reference`); what their similarity would be is estimated, so that all are on one scale:

    s_j = s̄ + β (r_j - r̄)        r: scores of the responses; s̄, r̄: means over adapters with examples, the best left out

and the score of every adapter is `r_i + GAIN s_i`. The constants were chosen on half of the tasks of one pool
(docs/how-selection-works.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from logo.selection.whitening import Whitening

# How much of the last token's similarity is added to that of the mean.
_LAST = 0.5
# A unit of similarity, in units of the responses' scores.
GAIN = 8.0
# How much more similar an adapter's own prompts are, per unit by which its response to them stands out.
_SLOPE = 0.35
# What the similarity of prompts of unrelated adapters is taken for, with the weight of so many adapters.
_USUAL, _USUAL_WEIGHT = 0.35, 4

MEAN, LAST = 0, 1


def described(hidden: Tensor, owners: Tensor, rows: int) -> Tensor:
    """(rows, 2, d): mean and last of each row's vectors; `hidden` (vectors, d), by row and position, `owners`."""
    counts = torch.bincount(owners, minlength=rows)
    sums = hidden.new_zeros(rows, hidden.shape[1]).index_add_(0, owners.to(hidden.device), hidden)
    return torch.stack([sums / counts.clamp_min(1)[:, None].to(hidden.device), hidden[last(counts)]], dim=1)


def last(counts: Tensor) -> Tensor:
    """The place of each row's last vector: (rows,), of how many each row has, all in order."""
    return counts.cumsum(0) - 1


@dataclass(frozen=True)
class Space:
    """Where descriptions are compared at one place.

    Attributes:
        whitenings: of means, and of last tokens.
    """

    whitenings: tuple[Whitening, Whitening]

    @classmethod
    def of(cls, descriptions: Tensor) -> Space:
        """That of ordinary texts: (texts, 2, d)."""
        return cls((Whitening.of(descriptions[:, MEAN]), Whitening.of(descriptions[:, LAST])))

    def __call__(self, descriptions: Tensor) -> Tensor:
        """Whitened: (rows, 2, d) float32, where the whitenings are."""
        given = descriptions.to(self.whitenings[MEAN].mean.device, torch.float32)
        return torch.stack([w.fold(given[:, i] - w.mean) for i, w in enumerate(self.whitenings)], dim=1)

    def to(self, device: torch.device) -> Space:
        """The same on another device."""
        return Space((self.whitenings[MEAN].to(device), self.whitenings[LAST].to(device)))


class Signatures:
    """The signatures of some adapters of a pool.

    Args:
        spaces: one per place.
        centres: per place, the mean whitened description of each adapter's examples: (adapters with examples, 2, d),
            where the place's space is.
        known: (adapters,) bool: those that have examples, in pool order.
        points: per place, the number of the first point that is read there; None: every point is a place.

    Attributes:
        known, points: the same.
    """

    def __init__(
        self,
        spaces: Sequence[Space],
        centres: Sequence[Tensor],
        known: Tensor,
        points: Sequence[int] | None = None,
    ) -> None:
        self._spaces, self.known = tuple(spaces), known
        self.points = tuple(range(len(spaces)) if points is None else points)
        self._centres = [normalize(centre, dim=2) for centre in centres]

    def __call__(self, descriptions: Sequence[Tensor]) -> Tensor:
        """`s`: (rows, adapters with examples) on the CPU, of descriptions (rows, 2, d) per place."""
        total = self._centres[0].new_zeros(len(descriptions[0]), int(self.known.sum()))
        for space, centres, one in zip(self._spaces, self._centres, descriptions, strict=True):
            cosines = torch.einsum("rkd,akd->kra", normalize(space(one), dim=2), centres)
            total += (cosines[MEAN] + _LAST * cosines[LAST]).to(total.device)
        return total.cpu() / len(self._spaces)

    def similarities(self, descriptions: Sequence[Tensor], responses: Tensor) -> Tensor:
        """(rows, adapters): `s` of all, of which those without examples are estimated from the responses' scores.

        Args:
            responses: (rows, adapters).
        """
        found = self(descriptions)
        if bool(self.known.all()):
            return found
        own, best = responses[:, self.known], found.argmax(dim=1, keepdim=True)
        others = found.shape[1] - 1
        usual = (found.sum(1) - found.gather(1, best)[:, 0] + _USUAL_WEIGHT * _USUAL) / (others + _USUAL_WEIGHT)
        level = (own.sum(1) - own.gather(1, best)[:, 0]) / others if others else responses.mean(dim=1)
        every = usual[:, None] + _SLOPE * (responses - level[:, None])
        every[:, self.known] = found
        return every
