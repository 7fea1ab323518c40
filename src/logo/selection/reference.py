"""`Reference`: what the responses of each adapter are compared with; and the points at which adapters differ most.

For adapter i, point p and text x with tokens t:

    a_ip(x) = log mean_t ‖ΔW_ip W_p (h_pt(x) - μ_p)‖ / √‖W_p (h_pt(x) - μ_p)‖        W, μ: `logo.selection.whitening`
    z_ip(x) = (a_ip(x) - mean over neutral texts) / spread over neutral texts
    score_i(x) = trust_i · (mean over points of z_ip(x) - excess_i)        scaled in `logo.selection.chance`

A signal may read the end of a prompt with more emphasis, too (`logo.selection.emphasis`). Each point then has two
*readings*: the even ones of all points come first, and the late ones after them have a smaller weight in the mean.

A raw norm says how large an adapter is, and z how much more than usual it responds. Some adapters respond to almost any
request. Their excess, by how much their typical z is above that of the other adapters, is subtracted; and the trust in
an adapter is below 1 if its mean z varies more than that of others. The cache holds the `a_ip` of each adapter for the
neutral texts and some unlabelled requests, from which everything else follows, for any pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from logo.selection.chance import UNIT, deviation
from logo.selection.signals import Scale

# The least spread, as a share of the usual one: a small spread on a few neutral texts may be an accident.
_LEAST_SPREAD = 0.25
# Points that are read of every adapter, if it touches so many.
LEAST_POINTS = 4
# To be raised when the same settings give other scores: results depend on it, so it is a part of their identity.
SCORES = 5
# Larger z are clipped, so that no point decides alone.
_LARGEST_Z = 20.0
# The excess is clipped, since the requests may be those that an adapter was made for.
_LARGEST_EXCESS = 1.0


def prompt_means(values: Tensor, owners: Tensor, rows: int, weights: Tensor | None = None) -> Tensor:
    """Means over the vectors of each prompt: `values` (vectors, n), `owners` (vectors,) -> (rows, n); 0 without any.

    Args:
        weights: (vectors,), 1 for the last one of a prompt; None: equal weights.
    """
    owners = owners.to(values.device)
    if weights is not None:
        weights = weights.to(values.device)
        values = values * weights[:, None]
    sums = torch.zeros(rows, values.shape[1], device=values.device).index_add_(0, owners, values)
    return sums / torch.bincount(owners, weights, minlength=rows).clamp_min(1)[:, None]


def finished(means: Tensor, scale: Scale) -> Tensor:
    """`a` of mean responses: the logarithm if they are whitened (-inf if there is no response), else the mean."""
    return means.log() if scale == "whitened" else means


@dataclass(frozen=True)
class Reference:
    """The usual responses of each adapter, per point.

    Attributes:
        mean: (adapters, points).
        spread: (adapters, points), positive.
        responds: (adapters, points), bool: the adapter touches the point, and its response there is not zero.
        excess: (adapters,): how much higher the mean z of a typical request is than for other adapters; see `scores`.
        trust: (adapters,): below 1 if the mean z varies more from text to text than that of others; see `scores`.
        weights: (points,) of the mean.
        apart: how far apart scores lie by chance (`logo.selection.chance`).
    """

    mean: Tensor
    spread: Tensor
    responds: Tensor
    excess: Tensor
    trust: Tensor
    weights: Tensor
    apart: float = UNIT

    @classmethod
    def of(cls, neutral: Tensor, requests: Tensor | None = None, weights: Tensor | None = None) -> Reference:
        """The reference that `a` (adapters, points, texts) gives; -inf or NaN means that there is no response.

        Args:
            neutral: `a` of neutral texts, which gives mean and spread.
            requests: `a` of other texts, which give the excess, and count for trust, too.
            weights: (points,) of the mean; None: equal weights.
        """
        every = neutral if requests is None else torch.cat([neutral, requests], dim=2)
        responds = every.isfinite().all(dim=2)
        known = torch.where(responds[:, :, None], neutral, torch.zeros(()))
        spread = known.std(dim=2)
        usual = torch.where(responds, spread, torch.nan).nanmedian(dim=0).values.nan_to_num(1.0)
        spread = spread.maximum((_LEAST_SPREAD * usual).clamp_min(1e-6))
        weights = torch.ones(responds.shape[1]) if weights is None else weights
        zeros, ones = torch.zeros(len(known)), torch.ones(len(known))
        reference = cls(known.mean(dim=2), spread, responds, zeros, ones, weights)
        mean_z, somewhere = reference._mean_z(every), responds.any(dim=1)
        if not somewhere.any():
            return reference
        excess = _excess(mean_z[:, neutral.shape[2] :], somewhere)
        reference = replace(reference, excess=excess, trust=_trust(mean_z, somewhere))
        # Not of the requests: adapters may have been made for them, so that their leads are no chance.
        strangers = reference._compared(mean_z[:, : neutral.shape[2]])
        return replace(reference, apart=deviation(strangers[:, somewhere]))

    def part(self, which: Tensor) -> Reference:
        """The reference of the adapters at some positions (n,)."""
        mean, spread, responds = self.mean[which], self.spread[which], self.responds[which]
        return replace(
            self, mean=mean, spread=spread, responds=responds, excess=self.excess[which], trust=self.trust[which]
        )

    def z(self, responses: Tensor) -> Tensor:
        """`z` of `a` (adapters, points, rows); 0 where the adapter does not respond."""
        z = ((responses - self.mean[:, :, None]) / self.spread[:, :, None]).clamp(-_LARGEST_Z, _LARGEST_Z)
        return torch.where(self.responds[:, :, None], z, torch.zeros(()))

    def scores(self, responses: Tensor) -> Tensor:
        """Scores (rows, adapters) of `a` (adapters, points, rows): trust times the difference of mean z and excess.

        The mean runs over the points where the adapter responds. A mean over fewer points varies more, and some
        adapters respond to many kinds of requests: the score of an adapter whose mean z varies more than usual is
        scaled down accordingly. An adapter that responds nowhere gets the lowest score of the others.
        """
        scores = self._compared(self._mean_z(responses))
        silent = ~self.responds.any(dim=1)
        if silent.any() and not silent.all():
            scores[:, silent] = scores[:, ~silent].min(dim=1, keepdim=True).values
        return scores

    def _compared(self, mean_z: Tensor) -> Tensor:
        """Scores (rows, adapters) of mean z (adapters, rows)."""
        return ((mean_z - self.excess[:, None]) * self.trust[:, None]).T

    def _mean_z(self, responses: Tensor) -> Tensor:
        """The mean z, (adapters, rows)."""
        counted = (self.responds * self.weights).sum(dim=1)  # (adapters,)
        return (self.z(responses) * self.weights[:, None]).sum(dim=1) / counted.clamp_min(1e-6)[:, None]


def _excess(mean_z: Tensor, responds: Tensor) -> Tensor:
    """The median over requests of each adapter's mean z, less that of the adapters that respond: (adapters,)."""
    if not mean_z.shape[1]:
        return torch.zeros(len(mean_z))
    typical = mean_z.median(dim=1).values
    return (typical - typical[responds].median()).clamp(-_LARGEST_EXCESS, _LARGEST_EXCESS)


def _trust(mean_z: Tensor, responds: Tensor) -> Tensor:
    """The usual deviation of the mean z over texts, divided by that of each adapter, at most 1: (adapters,)."""
    swing = mean_z.std(dim=1)
    usual = swing[responds].median().clamp_min(_LEAST_SPREAD)
    return (usual / swing.clamp_min(1e-6)).clamp(max=1.0)


def contrast(neutral: Tensor, requests: Tensor) -> Tensor:
    """How differently adapters respond to different requests, per point; no labels are needed.

    It is the standard deviation of z over requests and adapters, after the mean of each adapter and of each request is
    subtracted; 1 means that adapters differ on requests no more than on neutral texts.

    Args:
        neutral, requests: `a` (adapters, points, texts).

    Returns:
        (points,); 0 at points where fewer than two adapters respond.
    """
    reference = Reference.of(neutral)
    z = reference.z(requests)
    result = torch.zeros(z.shape[1])
    for point in range(z.shape[1]):
        part = z[reference.responds[:, point], point]  # (adapters that respond, texts)
        if len(part) > 1:
            part = part - part.mean(dim=1, keepdim=True)
            result[point] = (part - part.mean(dim=0)).std()
    return result


def agreement(neutral: Tensor, requests: Tensor, order: Sequence[int]) -> Tensor:
    """The correlation of scores by the first n points of `order` with scores by all of them, for n = 1, 2, ...

    Args:
        neutral, requests: `a` (adapters, points, texts).
        order: points, best first.
    """
    z = Reference.of(neutral).z(requests)[:, list(order)]  # (adapters, points, texts)
    running = z.cumsum(dim=1).transpose(0, 1).flatten(1)  # (points, adapters * texts)
    return torch.corrcoef(running)[-1] if len(order) > 1 else torch.ones(1)


def choose(neutral: Tensor, requests: Tensor, most: int, enough: float, each: int = LEAST_POINTS) -> list[int]:
    """The points to read, best first: as few of those with the most contrast as agree with the `most` best ones.

    Args:
        neutral, requests: `a` (adapters, points, texts).
        most: never more than these, unless too few of them would touch an adapter.
        enough: the agreement that suffices.
        each: at least so many points of every adapter are read, if it touches so many and `most` are not fewer.
    """
    order = torch.sort(contrast(neutral, requests), descending=True, stable=True).indices.tolist()
    best = order[:most]
    reached = (agreement(neutral, requests, best) >= enough).nonzero()
    chosen = best[: int(reached[0]) + 1] if len(reached) else best
    responds = neutral.isfinite().all(dim=2)  # (adapters, points)
    counts = responds[:, chosen].sum(dim=1)
    for point in order:
        if point not in chosen and (responds[:, point] & (counts < min(each, most))).any():
            chosen.append(point)
            counts += responds[:, point]
    return chosen
