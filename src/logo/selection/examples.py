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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
GAIN = 12.0
REPLACED = 0.65
_SLOPE = 0.23
# The usual similarity to the prompts of unrelated adapters; in s̄ it counts like so many adapters.
_USUAL = 0.23
_USUAL_WEIGHT = 4
# Examples whose mean similarity to each other is below the first are worded in several ways, and make so many clusters.
_ONE_WORDING = 0.5
WORDINGS = 4
_CONSTANT = 1e-5  # descriptions that vary by less than this share do not vary
# Hidden vectors of examples that are held at once, in bytes, and texts that are read together.
_HELD_BYTES = 2**29
_TOGETHER = 1024

# Both whitenings of a place: of the even and of the late means of its hidden vectors.
Spaces = Sequence[Whitening]


def whitened(spaces: Whitening, descriptions: Sequence[Tensor]) -> Tensor:
    """Descriptions (rows, 2, d) of places, each in a whitened space of its own of those stacked, as unit vectors
    (2 places, rows, d)."""
    device = spaces.mean.device
    kinds = torch.cat([description.to(device, torch.float32) for description in descriptions], dim=1).transpose(0, 1)
    return normalize(spaces.fold(kinds - spaces.mean), dim=2)


@dataclass(frozen=True)
class Alike:
    """Places of one width on one device, at which prompts are compared together.

    Attributes:
        places: their numbers.
        spaces: the whitenings of both kinds of their means, stacked.
        centres: (2 places, d, means), the whitened means of examples.
    """

    places: Sequence[int]
    spaces: Whitening
    centres: Tensor


@dataclass(frozen=True)
class Examples:
    """The described example prompts of a pool.

    Attributes:
        alike: the places, in groups.
        has_examples: (adapters,) bool, in pool order.
        owners: (means,): of which of the adapters with examples each mean is.
        points: per place, the number of the first point that is read there.
    """

    alike: tuple[Alike, ...]
    has_examples: Tensor
    owners: Tensor
    points: tuple[int, ...]

    @classmethod
    def of(
        cls,
        spaces: Sequence[Spaces],
        means: Sequence[Tensor],
        has_examples: Tensor,
        owners: Tensor,
        points: Sequence[int],
    ) -> Examples:
        """From both whitenings of each place, and the mean descriptions there (means, 2, d), on the device on which
        descriptions are compared."""
        groups: dict[tuple[torch.device, torch.Size], list[int]] = {}
        for place, mean in enumerate(means):
            groups.setdefault((mean.device, mean.shape), []).append(place)
        alike = []
        for places in groups.values():
            stacked = Whitening.stacked([space for place in places for space in spaces[place]])
            # The mean of what is whitened is the whitened mean.
            centres = whitened(stacked, [means[place] for place in places]).mT.contiguous()
            alike.append(Alike(places, stacked, centres))
        return cls(tuple(alike), has_examples, owners, tuple(points))

    def similarities(self, descriptions: Sequence[Tensor]) -> Tensor:
        """`s`: (rows, adapters with examples) on the CPU, of descriptions (rows, 2, d) per place."""
        total = torch.zeros(())
        for group in self.alike:
            units = whitened(group.spaces, [descriptions[place] for place in group.places])
            total = total + (units @ group.centres).sum(dim=0).cpu()
        to_means = total / (2 * len(descriptions))  # (rows, means)
        best = torch.full((len(to_means), int(self.has_examples.sum())), -torch.inf, dtype=to_means.dtype)
        return best.scatter_reduce(1, self.owners.expand(len(to_means), -1), to_means, "amax")

    def add_to(self, scores: Tensor, descriptions: Sequence[Tensor], selectable: Tensor | None = None) -> Tensor:
        """Scores (rows, adapters) of responses and similarities together, from the scores of responses alone.
        `selectable` (rows, adapters) bool says which adapters may be selected (None: all); others get -inf."""
        similarities = self.similarities(descriptions)
        if selectable is None:
            return with_similarities(scores, similarities, self.has_examples)
        all_scores = torch.full_like(scores, -torch.inf)
        for row, columns in enumerate(selectable):
            own_scores = scores[row : row + 1, columns]
            own_similarities = similarities[row : row + 1, columns[self.has_examples]]
            all_scores[row, columns] = with_similarities(own_scores, own_similarities, self.has_examples[columns])[0]
        return all_scores


def with_similarities(scores: Tensor, similarities: Tensor, has_examples: Tensor) -> Tensor:
    """Scores (rows, adapters) from the scores of responses (rows, adapters) and the similarities (rows, adapters with
    examples); `has_examples` is (adapters,)."""
    similar = similarities
    if not has_examples.any():
        similar = _USUAL + _SLOPE * (scores - scores.mean(dim=1, keepdim=True))
    elif not has_examples.all():
        others = similarities.shape[1] - 1
        best = similarities.argmax(dim=1, keepdim=True)
        unrelated = similarities.sum(1) - similarities.gather(1, best)[:, 0]
        usual = (unrelated + _USUAL_WEIGHT * _USUAL) / (others + _USUAL_WEIGHT)
        own = scores[:, has_examples]
        level = (own.sum(1) - own.gather(1, best)[:, 0]) / others if others else scores.mean(dim=1)
        similar = usual[:, None] + _SLOPE * (scores - level[:, None])
        similar[:, has_examples] = similarities
    return (1 - REPLACED * has_examples.float().mean()) * scores + GAIN * similar


def means_of(places: Sequence[Tensor], spaces: Sequence[Spaces]) -> list[Tensor]:
    """The means (means, 2, d) at each place of one adapter's examples: of all and, if needed, of clusters of them.

    Args:
        places: descriptions (examples, 2, d) at each place.
        spaces: both whitenings of each place.
    """
    units = []
    for place, kinds in zip(places, spaces, strict=True):
        units += [normalize(space.fold(place[:, kind] - space.mean), dim=1) for kind, space in enumerate(kinds)]
    groups = _wordings(torch.cat(units, dim=1) / math.sqrt(len(units)))
    return [torch.stack([place[group].mean(dim=0) for group in groups]) for place in places]


def _wordings(units: Tensor) -> list[Tensor]:
    """Groups of examples (examples,) bool: all and, if they are worded in several ways, clusters of them. `units`
    (examples, d), whose products are similarities."""
    count = len(units)
    similarities = units @ units.mT
    groups = [torch.ones(count, dtype=torch.bool)]
    alike = count < 2 or not (similarities.sum() - similarities.trace()) / (count * (count - 1)) < _ONE_WORDING
    if alike:
        return groups
    seeds = [0]  # then the example that is least like all before
    while len(seeds) < min(WORDINGS, count):
        seeds.append(int(similarities[seeds].amax(dim=0).argmin()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # equal examples may leave a cluster empty
        _, labels = kmeans2(units.numpy(), units[seeds].numpy(), minit="matrix")
    return groups + [torch.from_numpy(labels == label) for label in set(labels.tolist())]


@dataclass(frozen=True)
class _Describer:
    """Describes texts at some points of the base model. Descriptions are by the number of the first point of a place:
    (rows, 2, d) on the CPU, under its text, as the store has it."""

    reading: Reading
    points: Sequence[Point]
    run: TextRunner

    def file(self, rows: Sequence[Sequence[int]], kind: str = "means") -> str:
        """The name under which the store has what belongs to texts."""
        modules = [point.module for point in self.points]
        content = json.dumps([kind, modules, [list(row) for row in rows]])
        return f"{self.reading.key}/described/{hashlib.sha256(content.encode()).hexdigest()[:24]}"

    def described(self, texts: Texts) -> dict[str, Tensor]:
        """The descriptions of texts, which are read now."""
        first: dict[int, tuple[int, HiddenVectors]] = {}  # by tensor, since points of a layer may read the same one
        for number, vectors in enumerate(read_finite(self.run, self.points, texts, self.reading.signal)):
            first.setdefault(id(vectors.hidden), (number, vectors))
        descriptions = {}
        for number, vectors in first.values():
            hidden, owners = vectors.responding
            descriptions[str(number)] = both_means(hidden, owners, *emphasis(owners, len(texts.rows))).cpu()
        return descriptions

    def ordinary(self) -> Mapping[str, Tensor]:
        """The descriptions of ordinary texts, from the store if it has them."""
        store = self.reading.store
        texts = self.reading.texts
        file = self.file(texts.rows, "ordinary")
        if not store.get(file):
            store.put(file, self.described(texts))
        return store.get(file)

    def store_means(
        self, texts_of: Mapping[str, Sequence[Sequence[int]]], spaces: Mapping[str, Spaces], width: int
    ) -> None:
        """Stores the means of the examples of each file of the store, if it has none. Examples are read together, as
        many as there is room for with so many floats per token."""
        store = self.reading.store
        tokens = _HELD_BYTES // (4 * width)
        # They do not depend on what is stored, so that processes side by side read the same texts together.
        shares = {file: max(sum(map(len, rows)) / tokens, len(rows) / _TOGETHER) for file, rows in texts_of.items()}
        for files in portions(texts_of, shares.__getitem__, 1.0):
            missing = {file: texts_of[file] for file in files if not store.get(file)}
            if not missing:
                continue
            descriptions = self.described(Texts([row for rows in missing.values() for row in rows], []))
            counts = [len(rows) for rows in missing.values()]
            by_place = [torch.split(descriptions[place], counts) for place in spaces]
            for file, *own in zip(missing, *by_place, strict=True):
                store.put(file, dict(zip(spaces, means_of(own, list(spaces.values())), strict=True)))


def _places(ordinary: Mapping[str, Tensor]) -> list[int]:
    """The points at which prompts are described, by the descriptions of ordinary texts. Points that read the same
    vectors are one place, whether the runner gives them one tensor or not. What never changes, as the embedding of an
    invocation, is none: its deviation from the mean is rounding."""
    places: list[int] = []
    for number in sorted(map(int, ordinary)):
        descriptions = ordinary[str(number)]
        varies = (descriptions - descriptions.mean(dim=0)).norm() > _CONSTANT * descriptions.norm()
        if varies and not any(descriptions.equal(ordinary[str(place)]) for place in places):
            places.append(number)
    return places


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
    has_examples = torch.tensor([bool(rows) for rows in examples])
    if not has_examples.any():
        return None
    describer = _Describer(reading, points, run)
    ordinary = describer.ordinary()
    places = _places(ordinary)
    if not places:
        return None
    spaces = {str(place): [Whitening.of(ordinary[str(place)][:, kind]) for kind in (0, 1)] for place in places}
    files = [describer.file(rows) for rows in examples if rows]
    texts_of = dict(zip(files, filter(None, examples), strict=True))
    describer.store_means(texts_of, spaces, sum(descriptions.shape[-1] for descriptions in ordinary.values()))
    stored = [reading.store.get(file) for file in files]
    counts = torch.tensor([len(means[str(places[0])]) for means in stored])
    return Examples.of(
        spaces=[[space.to(devices[place]) for space in spaces[str(place)]] for place in places],
        means=[torch.cat([means[str(place)] for means in stored]).to(devices[place]) for place in places],
        has_examples=has_examples,
        owners=torch.repeat_interleave(counts),
        points=places,
    )
