"""Example prompts: descriptions of them by the base model; the adapter's weights do not matter.

A prompt is described at some places of the base model by two means of the hidden vectors that are read: the even one,
and the late one, in which the last tokens count most (`logo.selection.reference`). With the whitenings `W` of both
(`logo.selection.whitening`, of ordinary texts described likewise) and a mean `m` of whitened descriptions of examples,

    s_i(x) = max over the means m of adapter i of
             mean over places of 1/2 (cos(W_even x_even, m_even) + cos(W_late x_late, m_late))

The examples of an adapter have one mean. If they are worded in several ways, which their similarity to each other
tells, there are the means of `WORDINGS` clusters of them (k-means) beside it.

For an adapter j without examples, the similarity is estimated from its response, so that all scores are on one scale:

    s_j = s̄ + β (r_j - r̄)        r: scores of the responses; s̄, r̄: means over adapters with examples, the best left out

The score of every adapter is `(1 - REPLACED share) r_i + GAIN s_i`, where `share` is the share of the adapters that
have examples. If a call names candidates, the means and the share are those of the candidates alone.
docs/how-selection-works.md says how the constants were chosen.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor
from torch.nn.functional import normalize

from logo.selection.calibration import HiddenVectors, Reading, TextRunner, portions, read_finite
from logo.selection.points import Point
from logo.selection.reference import both_means, emphasis
from logo.selection.texts import Texts
from logo.selection.whitening import Whitening

# In the formula above; β is the similarity per unit of a response's score.
GAIN, REPLACED, _SLOPE = 12.0, 0.65, 0.23
# The usual similarity to the prompts of unrelated adapters; in s̄ it counts like so many adapters.
_USUAL, _USUAL_WEIGHT = 0.23, 4
# Examples whose mean similarity to each other is below the first are worded in several ways, and make so many clusters.
_ONE_WORDING, WORDINGS = 0.5, 4
_CONSTANT = 1e-5  # descriptions that vary by less than this share do not vary
# Hidden vectors of examples that are held at once, in bytes, and texts that are read together.
_HELD_BYTES = 2**29
_TOGETHER = 1024


def whitened(spaces: Whitening, descriptions: Sequence[Tensor]) -> Tensor:
    """Descriptions (rows, 2, d) of places, each in a whitened space of its own of those stacked, as unit vectors
    (2 places, rows, d)."""
    given = torch.cat([one.to(spaces.mean.device, torch.float32) for one in descriptions], dim=1).transpose(0, 1)
    return normalize(spaces.fold(given - spaces.mean), dim=2)


@dataclass(frozen=True)
class Examples:
    """The described example prompts of a pool.

    Attributes:
        alike: places of one width on one device: their numbers, the whitenings of both kinds of their means, stacked,
            and the whitened means of examples (2 places, d, means).
        known: (adapters,) bool: which adapters have examples, in pool order.
        owners: (means,): of which of these adapters each mean is.
        points: per place, the number of the first point that is read there.
    """

    alike: tuple[tuple[list[int], Whitening, Tensor], ...]
    known: Tensor
    owners: Tensor
    points: tuple[int, ...]

    @classmethod
    def of(
        cls,
        spaces: Sequence[Sequence[Whitening]],
        means: Sequence[Tensor],
        known: Tensor,
        owners: Tensor,
        points: Sequence[int],
    ) -> Examples:
        """From both whitenings of each place, and the mean descriptions there (means, 2, d), on the device on which
        descriptions are compared."""
        groups: dict[Any, list[int]] = {}
        for i, mean in enumerate(means):
            groups.setdefault((mean.device, mean.shape), []).append(i)
        alike = []
        for places in groups.values():
            stacked = Whitening.stacked([one for i in places for one in spaces[i]])
            # The mean of what is whitened is the whitened mean.
            alike.append((places, stacked, whitened(stacked, [means[i] for i in places]).mT.contiguous()))
        return cls(tuple(alike), known, owners, tuple(points))

    def similarities(self, descriptions: Sequence[Tensor]) -> Tensor:
        """`s`: (rows, adapters with examples) on the CPU, of descriptions (rows, 2, d) per place."""
        total = torch.zeros(())
        for places, spaces, centres in self.alike:
            total = total + (whitened(spaces, [descriptions[i] for i in places]) @ centres).sum(dim=0).cpu()
        found, owners = total / (2 * len(descriptions)), self.owners.expand(len(total), -1)
        best = torch.full((len(found), int(self.known.sum())), -torch.inf, dtype=found.dtype)
        return best.scatter_reduce(1, owners, found, "amax")

    def scores(self, descriptions: Sequence[Tensor], responses: Tensor, among: Tensor | None = None) -> Tensor:
        """Scores (rows, adapters) of similarities and the scores of responses (rows, adapters) together. `among` (rows,
        adapters) bool says which adapters may be selected (None: all); others have no score (-inf)."""
        found = self.similarities(descriptions)
        if among is None:
            return combined(found, responses, self.known)
        every = torch.full_like(responses, -torch.inf)
        for row, asked in enumerate(among):
            own = found[row : row + 1, asked[self.known]]
            every[row, asked] = combined(own, responses[row : row + 1, asked], self.known[asked])[0]
        return every


def combined(found: Tensor, responses: Tensor, known: Tensor) -> Tensor:
    """Scores (rows, adapters) from similarities `found` (rows, adapters with examples) and the scores of responses
    (rows, adapters); `known` (adapters,) says which have examples."""
    similar, others = found, found.shape[1] - 1
    if not known.any():
        similar = _USUAL + _SLOPE * (responses - responses.mean(dim=1, keepdim=True))
    elif not known.all():
        own, best = responses[:, known], found.argmax(dim=1, keepdim=True)
        usual = (found.sum(1) - found.gather(1, best)[:, 0] + _USUAL_WEIGHT * _USUAL) / (others + _USUAL_WEIGHT)
        level = (own.sum(1) - own.gather(1, best)[:, 0]) / others if others else responses.mean(dim=1)
        similar = usual[:, None] + _SLOPE * (responses - level[:, None])
        similar[:, known] = found
    return (1 - REPLACED * known.float().mean()) * responses + GAIN * similar


def means_of(places: Sequence[Tensor], spaces: Sequence[Sequence[Whitening]]) -> list[Tensor]:
    """The means (means, 2, d) at each place of one adapter's examples: of all and, if needed, of clusters of them.

    Args:
        places: descriptions (examples, 2, d) at each place.
        spaces: both whitenings of each place.
    """
    units = []
    for place, kinds in zip(places, spaces, strict=True):
        units += [normalize(space.fold(place[:, i] - space.mean), dim=1) for i, space in enumerate(kinds)]
    points = torch.cat(units, dim=1) / math.sqrt(len(units))  # whose products are similarities
    count, alike = len(points), points @ points.mT
    groups = [torch.ones(count, dtype=torch.bool)]
    if count > 1 and (alike.sum() - alike.trace()) / (count * (count - 1)) < _ONE_WORDING:
        seeds = [0]  # then the example that is least like all before
        while len(seeds) < min(WORDINGS, count):
            seeds.append(int(alike[seeds].amax(dim=0).argmin()))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # equal examples may leave a cluster empty
            _, labels = kmeans2(points.numpy(), points[seeds].numpy(), minit="matrix")
        groups += [torch.from_numpy(labels == one) for one in set(labels.tolist())]
    return [torch.stack([place[group].mean(dim=0) for group in groups]) for place in places]


def examples_of(
    reading: Reading,
    examples: Sequence[Sequence[Sequence[int]]],
    points: Sequence[Point],
    devices: Sequence[torch.device],
    run: TextRunner,
) -> Examples | None:
    """The described example prompts of a pool; None if no adapter has any.

    Args:
        reading: its texts are the ordinary ones. Descriptions are kept in its store, or their means; the texts never.
        examples: the token ids of each adapter's example prompts, in pool order; cut to the window.
        devices: of each point, where descriptions are compared.
    """
    known = torch.tensor([bool(rows) for rows in examples])
    if not known.any():
        return None
    store, modules = reading.store, [point.module for point in points]

    def name(rows: Sequence[Sequence[int]], kind: str = "means") -> str:
        stated = json.dumps([kind, modules, [list(row) for row in rows]])
        return f"{reading.key}/described/{hashlib.sha256(stated.encode()).hexdigest()[:24]}"

    def read(texts: Texts) -> dict[str, Tensor]:
        """The descriptions of texts by the number of the first point of each place: (rows, 2, d) on the CPU."""
        first = dict[int, tuple[int, HiddenVectors]]()  # by tensor, since points of a layer may read the same one
        for at, vectors in enumerate(read_finite(run, points, texts, reading.signal)):
            first.setdefault(id(vectors.hidden), (at, vectors))
        found = {}
        for at, vectors in first.values():
            hidden, owners = vectors.responding
            found[str(at)] = both_means(hidden, owners, *emphasis(owners, len(texts.rows))).cpu()
        return found

    own = name(reading.texts.rows, "ordinary")
    if not store.get(own):
        store.put(own, read(reading.texts))
    ordinary = store.get(own)
    # Points that read the same vectors are one place, whether the runner gives them one tensor or not. What never
    # changes, as the embedding of an invocation, is none: its deviation from the mean is rounding.
    numbers = list[int]()
    for at in sorted(map(int, ordinary)):
        place = ordinary[str(at)]
        varies = (place - place.mean(dim=0)).norm() > _CONSTANT * place.norm()
        if varies and not any(place.equal(ordinary[str(other)]) for other in numbers):
            numbers.append(at)
    if not numbers:
        return None
    spaces = {str(at): [Whitening.of(ordinary[str(at)][:, kind]) for kind in (0, 1)] for at in numbers}
    every = {name(rows): rows for rows in examples if rows}
    tokens = _HELD_BYTES // (4 * sum(place.shape[-1] for place in ordinary.values()))
    # They do not depend on what is stored, so that processes side by side read the same texts together.
    shares = {key: max(sum(map(len, rows)) / tokens, len(rows) / _TOGETHER) for key, rows in every.items()}
    for part in portions(every, lambda key: shares[key], 1.0):
        missing = {key: every[key] for key in part if not store.get(key)}
        if missing:
            found = read(Texts([row for rows in missing.values() for row in rows], []))
            places = [torch.split(found[at], [len(rows) for rows in missing.values()]) for at in spaces]
            for key, *described in zip(missing, *places, strict=True):
                store.put(key, dict(zip(spaces, means_of(described, list(spaces.values())), strict=True)))
    means = [store.get(name(rows)) for rows in examples if rows]
    owners = torch.tensor([i for i, one in enumerate(means) for _ in next(iter(one.values()))])
    placed = [[one.to(devices[at]) for one in spaces[str(at)]] for at in numbers]
    centres = [torch.cat([one[str(at)] for one in means]).to(devices[at]) for at in numbers]
    return Examples.of(placed, centres, known, owners, numbers)
