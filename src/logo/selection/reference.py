"""What every adapter's responses are compared with, and where a pool is best told apart.

For adapter i, point p and text x with tokens t:

    a_ip(x) = log mean_t ‖ΔW_ip W_p (h_pt(x) - μ_p)‖ / √‖W_p (h_pt(x) - μ_p)‖        W, μ: `logo.selection.whitening`
    z_ip(x) = (a_ip(x) - mean over neutral texts) / spread over neutral texts
    score_i(x) = trust_i · mean over points of z_ip(x)

Where the end of a prompt is read with more emphasis, too (`logo.selection.emphasis`), each point counts twice: there
are as many *readings* more, behind those of all points, which weigh less in the mean.

Raw norms say how large an adapter is; z says how much more than usual it responds; trust says how much that means, for
an adapter that every kind of request excites. What is kept per adapter are the `a_ip` of the neutral texts and of some
unlabelled requests: everything else follows from them, for any pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from logo.selection.signals import Scale

# Spreads below this share of the usual one are taken for accidents: nobody wins by having been lucky on neutral text.
_LEAST_SPREAD = 0.25
# Points that are read of every adapter, if it touches so many.
LEAST_POINTS = 4
# No single point may decide alone, however far out a response is.
_LARGEST_Z = 20.0


def prompt_means(values: Tensor, owners: Tensor, rows: int, weights: Tensor | None = None) -> Tensor:
    """Means over the vectors of each prompt: `values` (vectors, n), `owners` (vectors,) -> (rows, n); 0 without any.

    Args:
        weights: (vectors,): what each counts, 1 for the last one of a prompt; None: all alike.
    """
    owners = owners.to(values.device)
    if weights is not None:
        weights = weights.to(values.device)
        values = values * weights[:, None]
    sums = torch.zeros(rows, values.shape[1], device=values.device).index_add_(0, owners, values)
    return sums / torch.bincount(owners, weights, minlength=rows).clamp_min(1)[:, None]


def finished(means: Tensor, scale: Scale) -> Tensor:
    """`a` of mean responses; whitened ones are compared by their logarithm, -inf where there is no response at all."""
    return means.log() if scale == "whitened" else means


@dataclass(frozen=True)
class Reference:
    """What each adapter's responses are compared with, per point.

    Attributes:
        mean: (adapters, points).
        spread: (adapters, points), positive.
        responds: (adapters, points), bool: the adapter touches the point and responds there at all.
        trust: (adapters,): below 1 for adapters whose mean z swings more than others' from text to text, see `scores`.
        weights: (points,): what each counts in the mean.
    """

    mean: Tensor
    spread: Tensor
    responds: Tensor
    trust: Tensor
    weights: Tensor

    @classmethod
    def of(cls, neutral: Tensor, requests: Tensor | None = None, weights: Tensor | None = None) -> Reference:
        """The reference that these texts give: `a` (adapters, points, texts); -inf or NaN where there is no response.

        Args:
            neutral: gives mean and spread.
            requests: other texts on which swings are measured too.
            weights: (points,): what each counts in the mean; None: all alike.
        """
        every = neutral if requests is None else torch.cat([neutral, requests], dim=2)
        responds = every.isfinite().all(dim=2)
        known = torch.where(responds[:, :, None], neutral, torch.zeros(()))
        spread = known.std(dim=2)
        usual = torch.where(responds, spread, torch.nan).nanmedian(dim=0).values.nan_to_num(1.0)
        spread = spread.maximum((_LEAST_SPREAD * usual).clamp_min(1e-6))
        weights = torch.ones(responds.shape[1]) if weights is None else weights
        reference = cls(known.mean(dim=2), spread, responds, torch.ones(len(known)), weights)
        return replace(reference, trust=_trust(reference._mean_z(every), responds))

    def part(self, which: Tensor) -> Reference:
        """That of some adapters: `which` (n,) positions."""
        return Reference(self.mean[which], self.spread[which], self.responds[which], self.trust[which], self.weights)

    def z(self, responses: Tensor) -> Tensor:
        """`z` of `a` (adapters, points, rows); 0 where the adapter does not respond."""
        z = ((responses - self.mean[:, :, None]) / self.spread[:, :, None]).clamp(-_LARGEST_Z, _LARGEST_Z)
        return torch.where(self.responds[:, :, None], z, torch.zeros(()))

    def scores(self, responses: Tensor) -> Tensor:
        """(rows, adapters) of `a` (adapters, points, rows): the mean of z over the points where an adapter responds.

        Some adapters respond to everything that is not neutral text, and a mean over fewer points swings more. An
        adapter whose mean swings more than others' over all texts is scaled down by that, so that
        it must stand out as clearly as they. One that responds nowhere scores as the least of the others.
        """
        scores = (self._mean_z(responses) * self.trust[:, None]).T  # (rows, adapters)
        silent = ~self.responds.any(dim=1)
        if silent.any() and not silent.all():
            scores[:, silent] = scores[:, ~silent].min(dim=1, keepdim=True).values
        return scores

    def _mean_z(self, responses: Tensor) -> Tensor:
        """(adapters, rows)."""
        counted = (self.responds * self.weights).sum(dim=1)  # (adapters,)
        return (self.z(responses) * self.weights[:, None]).sum(dim=1) / counted.clamp_min(1e-6)[:, None]


def _trust(mean_z: Tensor, responds: Tensor) -> Tensor:
    """(adapters,): of `mean_z` (adapters, texts), how steady an adapter is beside the usual one."""
    swing = mean_z.std(dim=1)
    points = responds.sum(dim=1)
    usual = swing[points == points.max()].median().clamp_min(_LEAST_SPREAD)
    return (usual / swing.clamp_min(1e-6)).clamp(max=1.0)


def contrast(neutral: Tensor, requests: Tensor) -> Tensor:
    """How differently the adapters of a pool respond to different requests, per point; no labels are needed.

    The standard deviation of z over requests and adapters, after what an adapter does on every request and what a
    request does to every adapter are taken out: 1 means requests tell adapters apart no better than neutral texts do.

    Args:
        neutral, requests: `a` (adapters, points, texts).

    Returns:
        (points,), 0 at points where fewer than two adapters respond.
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
    """How well the first n points of `order` agree with all of them, for n = 1, 2, ...: a correlation over requests.

    Args:
        neutral, requests: `a` (adapters, points, texts).
        order: points, best first.
    """
    z = Reference.of(neutral).z(requests)[:, list(order)]  # (adapters, points, texts)
    running = z.cumsum(dim=1).transpose(0, 1).flatten(1)  # (points, adapters * texts)
    return torch.corrcoef(running)[-1] if len(order) > 1 else torch.ones(1)


def choose(neutral: Tensor, requests: Tensor, most: int, enough: float, each: int = LEAST_POINTS) -> list[int]:
    """The points to read, best first: those of most contrast, as few as agree with the `most` best ones.

    Args:
        neutral, requests: `a` (adapters, points, texts).
        most: never more than these, unless too few of them would touch an adapter.
        enough: the agreement that is enough.
        each: so many points of every adapter are read, if it touches so many.
    """
    order = torch.sort(contrast(neutral, requests), descending=True, stable=True).indices.tolist()
    best = order[:most]
    reached = (agreement(neutral, requests, best) >= enough).nonzero()
    chosen = best[: int(reached[0]) + 1] if len(reached) else best
    for responds in neutral.isfinite().all(dim=2):  # (points,) of one adapter
        missing = min(each, len(chosen)) - int(responds[chosen].sum())
        chosen += [point for point in order if responds[point] and point not in chosen][: max(0, missing)]
    return chosen
