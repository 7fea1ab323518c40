"""Example prompts: descriptions of them by the base model; the adapter's weights do not matter.

A prompt is described at some places of the base model by two means of the hidden vectors that are read: the even one,
and the late one, in which the last tokens count most (`logo.selection.reference`). With the whitenings `W` of both
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

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from logo.selection.calibration import Store, TextRunner
from logo.selection.points import Point
from logo.selection.reference import emphasised
from logo.selection.signals import Signal
from logo.selection.texts import Texts
from logo.selection.whitening import Whitening

Rows = Sequence[Sequence[int]]

# The weight of a similarity beside the score of a response.
GAIN = 12.0
# The part of the weight of responses that similarities take over if all adapters have examples.
REPLACED = 0.65
# β: similarity per unit of a response's score.
_SLOPE = 0.23
# The usual similarity to the prompts of unrelated adapters; in s̄ it counts like so many adapters.
_USUAL, _USUAL_WEIGHT = 0.23, 4
# The means that describe a prompt, as `emphasised` takes them: the even one and the late one.
_KINDS = (0, 1)
# Hidden vectors of examples that are held at once, in bytes, and texts that are read together.
_HELD_BYTES = 2**29
_TOGETHER = 1024


def described(hidden: Tensor, owners: Tensor, rows: int) -> Tensor:
    """(rows, 2, d): the even and the late mean of each row's vectors.

    Args:
        hidden: (vectors, d); a row's vectors are in the order of its tokens.
        owners: (vectors,): the row that each vector belongs to.
    """
    return torch.stack([emphasised(hidden, owners, rows, late) for late in _KINDS], dim=1)


@dataclass(frozen=True)
class Space:
    """The whitened space in which descriptions of one place are compared: a whitening for each kind of mean."""

    whitenings: tuple[Whitening, ...]

    @classmethod
    def of(cls, descriptions: Tensor) -> Space:
        """The space that descriptions (texts, 2, d) of ordinary texts give."""
        return cls(tuple(Whitening.of(descriptions[:, kind]) for kind in _KINDS))

    def __call__(self, descriptions: Tensor) -> Tensor:
        """The whitened descriptions, (rows, 2, d) float32, on the device of the whitenings."""
        given = descriptions.to(self.whitenings[0].mean.device, torch.float32)
        return torch.stack([w.fold(given[:, i] - w.mean) for i, w in enumerate(self.whitenings)], dim=1)

    def to(self, device: torch.device) -> Space:
        """The same on another device."""
        return Space(tuple(whitening.to(device) for whitening in self.whitenings))


@dataclass(frozen=True)
class Examples:
    """The described example prompts of a pool.

    Attributes:
        spaces: one per place.
        centres: per place, the mean whitened description of each adapter's examples, as unit vectors: (adapters with
            examples, 2, d), where the place's space is.
        known: (adapters,) bool: which adapters have examples, in pool order.
        points: per place, the number of the first point that is read there.
    """

    spaces: tuple[Space, ...]
    centres: tuple[Tensor, ...]
    known: Tensor
    points: tuple[int, ...]

    def similarities(self, descriptions: Sequence[Tensor]) -> Tensor:
        """`s`: (rows, adapters with examples) on the CPU, of descriptions (rows, 2, d) per place."""
        total = self.centres[0].new_zeros(len(descriptions[0]), len(self.centres[0]))
        for space, centres, one in zip(self.spaces, self.centres, descriptions, strict=True):
            cosines = torch.einsum("rkd,akd->kra", normalize(space(one), dim=2), centres)
            total += cosines.mean(dim=0).to(total.device)
        return total.cpu() / len(self.spaces)

    def scores(self, descriptions: Sequence[Tensor], responses: Tensor, among: Tensor | None = None) -> Tensor:
        """Scores (rows, adapters) of responses and similarities together.

        Args:
            responses: (rows, adapters), the scores of responses.
            among: (rows, adapters) bool: the adapters that may be selected, from which estimates are made and shares
                are taken; others may have no score (-inf). None: all.
        """
        found = self.similarities(descriptions)
        if among is None:
            return combined(found, responses, self.known)
        every = torch.full_like(responses, -torch.inf)
        for row, asked in enumerate(among):
            own = found[row : row + 1, asked[self.known]]
            every[row, asked] = combined(own, responses[row : row + 1, asked], self.known[asked])[0]
        return every


def combined(found: Tensor, responses: Tensor, known: Tensor) -> Tensor:
    """Scores (rows, adapters) from similarities `found` (rows, adapters with examples) and the scores of responses.

    Args:
        responses: (rows, adapters).
        known: (adapters,) bool: which have examples.
    """
    similar = found if known.all() else _filled(found, responses, known)
    return (1 - REPLACED * known.float().mean()) * responses + GAIN * similar


def _filled(found: Tensor, responses: Tensor, known: Tensor) -> Tensor:
    """`s` of all adapters, (rows, adapters); of those without examples it is estimated from their responses."""
    if not known.any():
        return _USUAL + _SLOPE * (responses - responses.mean(dim=1, keepdim=True))
    own, best = responses[:, known], found.argmax(dim=1, keepdim=True)
    others = found.shape[1] - 1
    usual = (found.sum(1) - found.gather(1, best)[:, 0] + _USUAL_WEIGHT * _USUAL) / (others + _USUAL_WEIGHT)
    level = (own.sum(1) - own.gather(1, best)[:, 0]) / others if others else responses.mean(dim=1)
    every = usual[:, None] + _SLOPE * (responses - level[:, None])
    every[:, known] = found
    return every


def examples_of(
    examples: Sequence[Rows],
    points: Sequence[Point],
    signal: Signal,
    texts: Texts,
    store: Store,
    key: str,
    run: TextRunner,
    devices: Sequence[torch.device],
) -> Examples | None:
    """The described examples of a pool; None if no adapter has any.

    Args:
        examples: the token ids of each adapter's example prompts, in pool order; cut to the window.
        points: where prompts are read.
        signal: how they are read.
        texts: those of the calibration, as ordinary texts.
        store, key: where descriptions are kept, or their mean; the texts themselves never are.
        run: runs the base model. If it raises, what was read before stays in the store.
        devices: of each point, where descriptions are compared.
    """
    known = torch.tensor([bool(rows) for rows in examples])
    if not known.any():
        return None
    modules = [point.module for point in points]

    def name(rows: Rows) -> str:
        stated = json.dumps(["even and late", modules, [list(row) for row in rows]])
        return f"{key}/described/{hashlib.sha256(stated.encode()).hexdigest()[:24]}"

    ordinary = store.get(name(texts.rows))
    if not ordinary:
        ordinary = _read(points, signal, texts, run)
        store.put(name(texts.rows), ordinary)
    every = {name(rows): rows for rows in examples if rows}
    width = sum(place.shape[-1] for place in ordinary.values())
    for part in _portions(every, _HELD_BYTES // (4 * width)):
        missing = {one: rows for one, rows in part.items() if not store.get(one)}
        if missing:
            found = _read(points, signal, Texts([row for rows in missing.values() for row in rows], []), run)
            first = 0
            for one, rows in missing.items():
                own = slice(first, first := first + len(rows))
                store.put(one, {at: place[own].mean(dim=0, keepdim=True) for at, place in found.items()})
    means = [store.get(name(rows)) for rows in examples if rows]
    spaces, centres, numbers = [], [], sorted(map(int, ordinary))
    for at in numbers:
        space = Space.of(ordinary[str(at)])
        # The mean of what is whitened is the whitened mean.
        centre = normalize(space(torch.cat([one[str(at)] for one in means])), dim=2)
        spaces.append(space.to(devices[at]))
        centres.append(centre.to(devices[at]))
    return Examples(tuple(spaces), tuple(centres), known, tuple(numbers))


def _read(points: Sequence[Point], signal: Signal, texts: Texts, run: TextRunner) -> dict[str, Tensor]:
    """The descriptions of texts by the number of the first point of each place: (rows, 2, d), float32 on the CPU."""
    found: dict[str, Tensor] = {}
    seen: list[Tensor] = []  # points of a layer may read the same tensor, which is one place
    for at, vectors in enumerate(run(points, texts, signal)):
        if not any(vectors.hidden is other for other in seen):
            seen.append(vectors.hidden)
            found[str(at)] = described(*vectors.responding, len(texts.rows)).cpu()
    return found


def _portions(every: Mapping[str, Rows], tokens: int) -> Iterator[dict[str, Rows]]:
    """Examples in portions of so many tokens at most, or of one adapter.

    Portions do not depend on what is cached, so that processes side by side read the same texts together.
    """
    part: dict[str, Rows] = {}
    held = count = 0
    for key, rows in every.items():
        size = sum(map(len, rows))
        if part and (held + size > tokens or count + len(rows) > _TOGETHER):
            yield part
            part, held, count = {}, 0, 0
        part[key] = rows
        held, count = held + size, count + len(rows)
    if part:
        yield part
