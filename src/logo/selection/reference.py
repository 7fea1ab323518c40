"""`Reference`: what the responses of each adapter are compared with; and the points at which adapters differ most.

For adapter i, point p and text x with tokens t:

    a_ip(x) = log mean_t ‖ΔW_ip W_p (h_pt(x) - μ_p)‖ / √‖W_p (h_pt(x) - μ_p)‖        W, μ: `logo.selection.whitening`
    z_ip(x) = (a_ip(x) - mean over neutral texts) / spread over neutral texts
    score_i(x) = trust_i · (mean over points of z_ip(x) - excess_i)

The cache holds the `a_ip` of each adapter for the neutral texts and some unlabelled requests, from which everything
else follows, for any pool. Related prompts may differ in their last tokens alone ("German:", "French:"), so a signal
may have two *readings* of each point:

    even   mean_t x_t
    late   Σ_t f^(T - t) x_t / Σ_t f^(T - t)        f = `FADING`, T: the last token

The even ones of all points come first, and the late ones after them have a smaller weight in the mean.

Short prompts score further apart by chance: a mean over few tokens varies more. If n tokens of a text are read, the
standard deviation of its scores over the adapters is roughly in proportion to √(1 + FEW / n), so a prompt's scores are
multiplied by

    √((1 + FEW / USUAL) / (1 + FEW / n))        at most 1

Not so those to which example prompts contribute, and those of the tokens alone on which adapters act. Reasons:
docs/how-selection-works.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from logo.selection.points import LEAST_POINTS
from logo.selection.signals import Scale

# The least spread, as a share of the usual one: a small spread on a few neutral texts may be an accident.
_LEAST_SPREAD = 0.25
# Larger z are clipped, so that no point decides alone; excesses, since adapters may have been made for the requests.
_LARGEST_Z = 20.0
_LARGEST_EXCESS = 1.0
# How far an adapter that responds nowhere lies behind all others: too little for anything but the order.
_BEHIND = 0.001
# A token's weight divided by the next one's: the last three tokens have 58 % of the weight, the last ten 94 %.
FADING = 0.75
# The weight of the late reading of a point; the even one has weight 1.
LATE_WEIGHT = 0.5
# Fitted to the calibration texts of three pools of different base models, FEW was 4 to 11. With these tokenizers, the
# texts have 13 to 15 tokens in the median.
FEW = 5.0
USUAL = 13


def row_sums(values: Tensor, owners: Tensor, rows: int) -> Tensor:
    """Sums over the vectors of each row: `values` (vectors, ...), `owners` (vectors,) -> (rows, ...) float32."""
    sums = torch.zeros(rows, *values.shape[1:], device=values.device, dtype=torch.float32)
    return sums.index_add_(0, owners.to(values.device), values)


def row_means(values: Tensor, owners: Tensor, rows: int) -> Tensor:
    """Means over the vectors of each row, 0 without any; arguments as `row_sums`."""
    counts = torch.bincount(owners, minlength=rows).clamp_min(1)
    return row_sums(values, owners, rows) / counts.to(values.device)[:, None]


def emphasis(owners: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The weight of each vector in the even and in the late mean of its row (vectors, 2), 1 for the row's last vector;
    and the sums of weights (rows, 2). `owners` (vectors,) are their rows, each in the order of its tokens."""
    weights: list[list[float]] = []
    next_weights: dict[int, float] = {}  # of the late mean, by row
    for row in reversed(owners.tolist()):  # in Python, since rows are windows of few tokens
        late = next_weights[row] * FADING if row in next_weights else 1.0
        next_weights[row] = late
        weights.append([1.0, late])
    stacked = torch.tensor(weights[::-1], dtype=torch.float32).view(-1, 2)
    return stacked, row_sums(stacked, owners, rows)


def both_means(values: Tensor, owners: Tensor, weights: Tensor, sums: Tensor) -> Tensor:
    """The even and the late mean of each row's vectors, of `values` (vectors, n), with `emphasis`: (rows, 2, n)."""
    parts = values[:, None] * weights.to(values.device)[:, :, None]
    return row_sums(parts, owners, len(sums)) / sums.to(values.device)[:, :, None]


def factors(tokens: Tensor) -> Tensor:
    """What the scores of prompts with so many tokens (rows,) are multiplied by: float32 (rows,)."""
    few: Tensor = (1 + FEW / USUAL) / (1 + FEW / tokens.float())
    return few.sqrt().clamp(max=1.0)


def finished(means: Tensor, scale: Scale) -> Tensor:
    """`a` of mean responses: the logarithm if they are whitened (-inf if there is no response), else the mean."""
    return means.log() if scale == "whitened" else means


@dataclass(frozen=True)
class Reference:
    """The usual responses of each adapter, per point.

    Attributes:
        mean, spread: (adapters, points); spreads are positive.
        responds: (adapters, points), bool: the adapter touches the point, and its response there is not zero.
        excess: (adapters,): the median over requests of the mean z, less that of the adapters that respond; clipped.
        trust: (adapters,): the usual deviation of the mean z over texts, divided by the adapter's own, at most 1.
        weights: (points,) of the mean.
    """

    mean: Tensor
    spread: Tensor
    responds: Tensor
    excess: Tensor
    trust: Tensor
    weights: Tensor

    @classmethod
    def of(cls, neutral: Tensor, requests: Tensor | None = None, weights: Tensor | None = None) -> Reference:
        """The reference that `a` (adapters, points, texts) gives; -inf or NaN means that there is no response. Neutral
        texts give mean and spread, requests the excess, and both the trust."""
        texts = neutral if requests is None else torch.cat([neutral, requests], dim=2)
        responds = texts.isfinite().all(dim=2)
        known = torch.where(responds[:, :, None], neutral, torch.zeros(()))
        spread = known.std(dim=2)
        usual_spread = torch.where(responds, spread, torch.nan).nanmedian(dim=0).values.nan_to_num(1.0)
        reference = cls(
            mean=known.mean(dim=2),
            spread=spread.maximum((_LEAST_SPREAD * usual_spread).clamp_min(1e-6)),
            responds=responds,
            excess=known.new_zeros(len(known)),
            trust=known.new_ones(len(known)),
            weights=neutral.new_ones(responds.shape[1]) if weights is None else weights,
        )
        if not responds.any():
            return reference
        return reference._between_adapters(reference._mean_z(texts), neutral.shape[2])

    def _between_adapters(self, mean_z: Tensor, neutral: int) -> Reference:
        """With what follows from the mean z (adapters, texts) of all adapters, of which so many texts are neutral."""
        somewhere = self.responds.any(dim=1)
        excess = self.excess
        if mean_z.shape[1] > neutral:
            typical = mean_z[:, neutral:].median(dim=1).values
            excess = (typical - typical[somewhere].median()).clamp(-_LARGEST_EXCESS, _LARGEST_EXCESS)
        swing = mean_z.std(dim=1)
        trust = (swing[somewhere].median().clamp_min(_LEAST_SPREAD) / swing.clamp_min(1e-6)).clamp(max=1.0)
        return replace(self, excess=excess, trust=trust)

    def z(self, responses: Tensor) -> Tensor:
        """`z` of `a` (adapters, points, rows); 0 where the adapter does not respond."""
        z = ((responses - self.mean[:, :, None]) / self.spread[:, :, None]).clamp(-_LARGEST_Z, _LARGEST_Z)
        return torch.where(self.responds[:, :, None], z, torch.zeros(()))

    def compare(self, responses: Tensor, selectable: Tensor | None = None) -> Tensor:
        """Scores (rows, adapters) of `a` (adapters, points, rows). An adapter that responds nowhere comes last: it gets
        hardly less than the lowest score of the others, of those that are `selectable` (rows, adapters) bool (None:
        all)."""
        scores = ((self._mean_z(responses) - self.excess[:, None]) * self.trust[:, None]).T
        if self._some_silent:
            heard = self.responds.any(dim=1)
            if selectable is None:
                selectable = torch.ones_like(scores, dtype=torch.bool)
            for row, allowed in zip(scores, selectable, strict=True):
                compared = heard & allowed
                row[~heard] = row[compared if compared.any() else heard].min() - _BEHIND
        return scores

    @cached_property
    def _some_silent(self) -> bool:
        heard = self.responds.any(dim=1)
        return bool(heard.any()) and not bool(heard.all())

    @cached_property
    def _shares(self) -> Tensor:
        """What each point counts in the mean of each adapter: (adapters, points), 0 where it does not respond."""
        counted = self.responds * self.weights
        return counted / counted.sum(dim=1, keepdim=True).clamp_min(1e-6)

    def _mean_z(self, responses: Tensor) -> Tensor:
        """The mean z, (adapters, rows)."""
        return (self.z(responses) * self._shares[:, :, None]).sum(dim=1)


def contrast(neutral: Tensor, requests: Tensor) -> Tensor:
    """How differently adapters respond to different requests: (points,), 0 where fewer than two adapters respond.

    It is the standard deviation of z over requests and adapters, after the mean of each of both is subtracted.
    Arguments as `choose`; 1 means that adapters differ on requests no more than on neutral texts.
    """
    reference = Reference.of(neutral)
    z = reference.z(requests)
    contrasts = requests.new_zeros(requests.shape[1])
    for point, responds in enumerate(reference.responds.T):
        own_z = z[responds, point]  # (adapters that respond, texts)
        if len(own_z) > 1:
            centred = own_z - own_z.mean(dim=1, keepdim=True)
            contrasts[point] = (centred - centred.mean(dim=0)).std()
    return contrasts


def choose(neutral: Tensor, requests: Tensor, most: int, enough: float, each: int = LEAST_POINTS) -> list[int]:
    """The points to read, best first: as few of those with the most contrast as agree with the `most` best ones.

    Args:
        neutral, requests: `a` (adapters, points, texts).
        enough: the agreement that suffices.
        each: at least so many points of every adapter are read, if it touches so many and `most` are not fewer.
    """
    order = torch.sort(contrast(neutral, requests), descending=True, stable=True).indices.tolist()
    best = order[:most]
    # The correlation of scores by the first n points with scores by all of them, for n = 1, 2, ...
    z = Reference.of(neutral).z(requests)[:, best]  # (adapters, points, texts)
    running = z.cumsum(dim=1).transpose(0, 1).flatten(1)  # (points, adapters * texts)
    agreement = torch.corrcoef(running)[-1] if len(best) > 1 else torch.ones(1)
    reached = (agreement >= enough).nonzero()
    chosen = best[: int(reached[0]) + 1] if len(reached) else best
    responds = neutral.isfinite().all(dim=2)  # (adapters, points)
    counts = responds[:, chosen].sum(dim=1)
    for point in order:
        if point not in chosen and (responds[:, point] & (counts < min(each, most))).any():
            chosen.append(point)
            counts += responds[:, point]
    return chosen
