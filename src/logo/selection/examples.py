"""Example prompts: descriptions of them by the base model; the adapter's weights do not matter.

A prompt is described at some depths of the base model by two means of the vectors of the residual stream there: the
even one, and the late one, in which the last tokens count most (`logo.selection.reference`). With the whitenings `W` of
both (`logo.selection.whitening`, of ordinary texts described likewise) and a mean `m` of whitened descriptions of
examples,

    s_i(x) = max over the means m of adapter i of
             mean over depths of 1/2 (cos(W_even x_even, m_even) + cos(W_late x_late, m_late))

in units of how much the similarities of ordinary texts to each other vary. The examples of an adapter have one mean. If
they are worded in several ways, which their similarity to each other tells, there are the means of `WORDINGS` clusters
of them (k-means) beside it.

How similarities and responses become one score: `logo.selection.evidence`.
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

from logo.selection.calibration import Reading, TextRunner, portions, read_finite
from logo.selection.evidence import Similarities
from logo.selection.points import Point
from logo.selection.reference import both_means, emphasis
from logo.selection.texts import Texts
from logo.selection.whitening import Whitening

# Examples whose mean similarity to each other is below the first are worded in several ways, and make so many clusters.
_ONE_WORDING = 0.5
WORDINGS = 4
# Hidden vectors of examples that are held at once, in bytes, and texts that are read together.
_HELD_BYTES = 2**29
_TOGETHER = 1024


def whitened(spaces: Whitening, descriptions: Sequence[Tensor]) -> Tensor:
    """Descriptions (rows, 2, d) at each depth as unit vectors (2 depths, rows, d), each kind of mean at each depth in a
    whitened space of its own of those stacked."""
    device = spaces.mean.device
    kinds = torch.cat([description.to(device, torch.float32) for description in descriptions], dim=1).transpose(0, 1)
    return normalize(spaces.fold(kinds - spaces.mean), dim=2)


@dataclass(frozen=True)
class Examples:
    """The described example prompts of a pool.

    Attributes:
        spaces: the whitenings of both kinds of means at each depth, stacked.
        centres: (2 depths, d, means), the whitened means of examples.
        owners: (means,): of which of the adapters with examples each mean is.
        known: (adapters,) bool, in pool order: those that have examples.
        spread: the standard deviation of the similarities of ordinary texts to each other.
    """

    spaces: Whitening
    centres: Tensor
    owners: Tensor
    known: Tensor
    spread: float = 1.0

    def similarities(self, descriptions: Sequence[Tensor]) -> Similarities:
        """`s` of descriptions (rows, 2, d) at each depth."""
        units = whitened(self.spaces, descriptions)
        to_means = (units @ self.centres).mean(dim=0).cpu() / self.spread  # (rows, means)
        best = torch.full((len(to_means), int(self.known.sum())), -torch.inf, dtype=to_means.dtype)
        owners = self.owners.expand(len(to_means), -1)
        return Similarities(best.scatter_reduce(1, owners, to_means, "amax"), self.known)


def spread_of(units: Tensor) -> float:
    """The standard deviation of the similarities of texts to each other, of unit vectors (n, texts, d) that are
    averaged over n; 1 if there are too few texts."""
    similarities = (units @ units.mT).mean(dim=0)
    others = similarities[~torch.eye(len(similarities), dtype=torch.bool, device=similarities.device)]
    return max(float(others.std()), 1e-6) if len(others) > 1 else 1.0


def means_of(depths: Sequence[Tensor], spaces: Whitening) -> list[Tensor]:
    """The means (means, 2, d) at each depth of one adapter's examples: of all and, if needed, of clusters of them.

    Args:
        depths: descriptions (examples, 2, d) at each depth.
        spaces: the whitenings, stacked.
    """
    units = whitened(spaces, depths)
    groups = _wordings(torch.cat(list(units), dim=1).cpu() / math.sqrt(len(units)))
    return [torch.stack([depth[group].mean(dim=0) for group in groups]) for depth in depths]


def _wordings(units: Tensor) -> list[Tensor]:
    """Groups of examples (examples,) bool: all and, if they are worded in several ways, clusters of them. `units`
    (examples, d), whose products are similarities."""
    count = len(units)
    groups = [torch.ones(count, dtype=torch.bool)]
    if count < 2:
        return groups
    similarities = units @ units.mT
    to_others = (similarities.sum() - similarities.trace()) / (count * (count - 1))
    if to_others >= _ONE_WORDING:
        return groups
    seeds = [0]
    while len(seeds) < min(WORDINGS, count):
        likeness = similarities[seeds].amax(dim=0)  # (examples,), of each to the seed that is most like it
        seeds.append(int(likeness.argmin()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # equal examples may leave a cluster empty
        _, labels = kmeans2(units.numpy(), units[seeds].numpy(), minit="matrix")
    return groups + [torch.from_numpy(labels == label) for label in set(labels.tolist())]


@dataclass(frozen=True)
class _Describer:
    """Describes texts at some points of the base model: (rows, 2, d) on the CPU at each, or means of them likewise,
    which the store keeps."""

    reading: Reading
    points: Sequence[Point]
    run: TextRunner

    def described(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """The descriptions of texts, which are read now."""
        descriptions = []
        for vectors in read_finite(self.run, self.points, Texts(rows, []), self.reading.signal):
            hidden, owners = vectors.responding
            descriptions.append(both_means(hidden, owners, *emphasis(owners, len(rows))).cpu())
        return descriptions

    def ordinary(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """The descriptions of ordinary texts, from the store if it has them."""
        file = self._file(rows, "ordinary")
        if not self.reading.store.get(file):
            self._put(file, self.described(rows))
        return self._stored(file)

    def means(self, groups: Sequence[Sequence[Sequence[int]]], spaces: Whitening) -> list[list[Tensor]]:
        """The means of each adapter's examples, from the store if it has them. Examples are read together, as many as
        there is room for."""
        files = [self._file(rows, "means") for rows in groups]
        texts_of = dict(zip(files, groups, strict=True))
        tokens = _HELD_BYTES // (4 * len(self.points) * spaces.mean.shape[-1])
        # They do not depend on what is stored, so that processes side by side read the same texts together.
        shares = {file: max(sum(map(len, rows)) / tokens, len(rows) / _TOGETHER) for file, rows in texts_of.items()}
        for part in portions(texts_of, shares.__getitem__, 1.0):
            missing = [file for file in part if not self.reading.store.get(file)]
            if not missing:
                continue
            descriptions = self.described([row for file in missing for row in texts_of[file]])
            counts = [len(texts_of[file]) for file in missing]
            by_depth = [torch.split(description, counts) for description in descriptions]
            for file, *own in zip(missing, *by_depth, strict=True):
                self._put(file, means_of(own, spaces))
        return [self._stored(file) for file in files]

    def _file(self, rows: Sequence[Sequence[int]], kind: str) -> str:
        """The name under which the store has what belongs to texts."""
        modules = [point.module for point in self.points]
        content = json.dumps([kind, modules, [list(row) for row in rows]])
        return f"{self.reading.key}/described/{hashlib.sha256(content.encode()).hexdigest()[:24]}"

    def _put(self, file: str, depths: Sequence[Tensor]) -> None:
        self.reading.store.put(file, {str(number): depth for number, depth in enumerate(depths)})

    def _stored(self, file: str) -> list[Tensor]:
        tensors: Mapping[str, Tensor] = self.reading.store.get(file)
        return [tensors[str(number)] for number in range(len(self.points))]


def examples_of(
    reading: Reading,
    ordinary: Sequence[Sequence[int]],
    examples: Sequence[Sequence[Sequence[int]]],
    points: Sequence[Point],
    device: torch.device,
    run: TextRunner,
) -> Examples | None:
    """The described example prompts of a pool; None if no adapter has any.

    Args:
        reading: in its store, descriptions of ordinary texts are kept, and means of those of examples; no texts.
        ordinary: the token ids of ordinary texts.
        examples: the token ids of each adapter's example prompts, in pool order; cut to the window.
        points: where prompts are described.
        device: where descriptions are compared.
    """
    known = torch.tensor([bool(rows) for rows in examples])
    if not known.any():
        return None
    describer = _Describer(reading, points, run)
    usual = describer.ordinary(ordinary)
    spaces = Whitening.stacked([Whitening.of(depth[:, kind]) for depth in usual for kind in (0, 1)]).to(device)
    means = describer.means([rows for rows in examples if rows], spaces)
    # The mean of what is whitened is the whitened mean.
    centres = whitened(spaces, [torch.cat(depth) for depth in zip(*means, strict=True)]).mT.contiguous()
    owners = torch.repeat_interleave(torch.tensor([len(depths[0]) for depths in means]))
    return Examples(spaces, centres, owners, known, spread_of(whitened(spaces, usual)))
