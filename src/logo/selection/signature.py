"""Signatures: descriptions of an adapter's example prompts by the base model; the adapter's weights do not matter.

A prompt is described at some places of the base model by two means of the hidden vectors that are read: the even one,
and the late one, in which the last tokens count most (`logo.selection.emphasis`). With the whitenings `W` of both
(`logo.selection.whitening`, of ordinary texts described likewise) and the mean `m_i` of the whitened descriptions of
adapter i's examples,

    s_i(x) = mean over places of 1/2 (cos(W_even x_even, m_i,even) + cos(W_late x_late, m_i,late))

It does not depend on how adapters were trained, and one example is enough. For an adapter j without examples, the
similarity is estimated from its response (`logo.selection.reference`), so that all scores are on one scale:

    s_j = s̄ + β (r_j - r̄)        r: scores of the responses; s̄, r̄: means over adapters with examples, the best left out

The score of every adapter is `(1 - REPLACED share) r_i + GAIN s_i`, where `share` is the share of the adapters that
have examples. If a call names candidates, the means and the share are those of the candidates alone.
docs/how-selection-works.md says how the constants were chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from logo.selection.emphasis import emphasised
from logo.selection.whitening import Whitening

# The weight of a similarity beside the score of a response.
GAIN = 12.0
# The part of the weight of responses that similarities take over if all adapters have examples.
REPLACED = 0.65
# β: similarity per unit of a response's score.
_SLOPE = 0.23
# The usual similarity to the prompts of unrelated adapters; in s̄ it counts like so many adapters.
_USUAL, _USUAL_WEIGHT = 0.23, 4

# The means that describe a prompt, as `emphasised` takes them: the even one and the late one.
KINDS = (0, 1)


def described(hidden: Tensor, owners: Tensor, rows: int) -> Tensor:
    """(rows, 2, d): the even and the late mean of each row's vectors.

    Args:
        hidden: (vectors, d); a row's vectors are in the order of its tokens.
        owners: (vectors,): the row that each vector belongs to.
    """
    return torch.stack([emphasised(hidden, owners, rows, late) for late in KINDS], dim=1)


@dataclass(frozen=True)
class Space:
    """The whitened space in which descriptions of one place are compared.

    Attributes:
        whitenings: one for each of `KINDS`.
    """

    whitenings: tuple[Whitening, ...]

    @classmethod
    def of(cls, descriptions: Tensor) -> Space:
        """The space that descriptions (texts, 2, d) of ordinary texts give."""
        return cls(tuple(Whitening.of(descriptions[:, kind]) for kind in KINDS))

    def __call__(self, descriptions: Tensor) -> Tensor:
        """The whitened descriptions, (rows, 2, d) float32, on the device of the whitenings."""
        given = descriptions.to(self.whitenings[0].mean.device, torch.float32)
        return torch.stack([w.fold(given[:, i] - w.mean) for i, w in enumerate(self.whitenings)], dim=1)

    def to(self, device: torch.device) -> Space:
        """The same on another device."""
        return Space(tuple(whitening.to(device) for whitening in self.whitenings))


class Signatures:
    """The signatures of some adapters of a pool.

    Args:
        spaces: one per place.
        centres: per place, the mean whitened description of each adapter's examples: (adapters with examples, 2, d),
            where the place's space is.
        known: (adapters,) bool: which adapters have examples, in pool order.
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
            total += cosines.mean(dim=0).to(total.device)
        return total.cpu() / len(self._spaces)

    def weight_of_responses(self, among: Tensor | None = None) -> Tensor:
        """What the score of a response counts beside a similarity, () or (rows, 1): 1 if no adapter has examples, and
        `1 - REPLACED` if all have some.

        Args:
            among: (rows, adapters) bool: the adapters that may be selected; None: all.
        """
        known = self.known.float()
        share = known.mean() if among is None else (among * known).sum(1, keepdim=True) / among.sum(1, keepdim=True)
        return 1 - REPLACED * share

    def similarities(self, descriptions: Sequence[Tensor], responses: Tensor, among: Tensor | None = None) -> Tensor:
        """`s` of all adapters, (rows, adapters); of those without examples it is estimated from their responses.

        Args:
            responses: (rows, adapters), their scores.
            among: (rows, adapters) bool: the adapters that may be selected, from which estimates are made; others may
                have no similarity (-inf). None: all.
        """
        found = self(descriptions)
        if bool(self.known.all()):
            return found
        if among is None:
            return _filled(found, responses, self.known)
        every = torch.full_like(responses, -torch.inf)
        for row, which in enumerate(among):
            own, known = found[row : row + 1, which[self.known]], self.known[which]
            every[row, which] = _filled(own, responses[row : row + 1, which], known)[0]
        return every


def _filled(found: Tensor, responses: Tensor, known: Tensor) -> Tensor:
    """`s` (rows, adapters) of adapters, from `found` (rows, adapters with examples) and `responses` (rows, adapters).

    Args:
        known: (adapters,) bool: which have examples.
    """
    if not known.any():
        return _USUAL + _SLOPE * (responses - responses.mean(dim=1, keepdim=True))
    own, best = responses[:, known], found.argmax(dim=1, keepdim=True)
    others = found.shape[1] - 1
    usual = (found.sum(1) - found.gather(1, best)[:, 0] + _USUAL_WEIGHT * _USUAL) / (others + _USUAL_WEIGHT)
    level = (own.sum(1) - own.gather(1, best)[:, 0]) / others if others else responses.mean(dim=1)
    every = usual[:, None] + _SLOPE * (responses - level[:, None])
    every[:, known] = found
    return every
