"""`TwoStageScorer`: a first stage finds the adapters that can be among the best, and only these are scored exactly.

If a score is a norm, or a mean of norms, the first stage bounds it: no adapter is left out that could be one of the k
best, so the selection is that of one stage. If scores are compared with neutral text, such bounds are too wide. Then
the first stage estimates every score, compares it with a reference of such estimates, and keeps a fixed number of the
best. These are scored exactly, so that weights equal those of one stage wherever the same adapters are selected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from logo.adapters.format import Adapter
from logo.selection.cache import CalibrationCache
from logo.selection.calibration import Calibration
from logo.selection.emphasis import emphasised
from logo.selection.first_stage import FirstStage
from logo.selection.index import ScoringIndex
from logo.selection.probe import Probe
from logo.selection.reference import Reference, finished
from logo.selection.responses import ResponseReader
from logo.selection.scorer import NOT_SCORED, Best, Scorer
from logo.selection.signals import Signal
from logo.selection.signature import Signatures, described

# Scores that the confidence needs, however small k is: the best one and the `FIELD` behind it.
_LOOKED_AT = 6
# The most tokens of a prompt that an estimate reads; they are spread evenly over it.
_TOKENS = 64
# Last tokens of a prompt, which have nearly all the weight of a late reading.
_LAST_TOKENS = 16
# Adapters that estimates leave for the second stage if the user gives no number: at least the first, and the second for
# each adapter that is selected (docs/many-adapters.md has the recall).
_FEWEST_LEFT, _LEFT_EACH = 256, 16


@dataclass(frozen=True)
class FirstStages:
    """The first stage of several points.

    Attributes:
        parts: one per point.
        estimated: their estimates of `a` (adapters, readings, texts) for the texts of the calibration, neutral ones
            first; None for signals without a reference.
    """

    parts: tuple[FirstStage, ...]
    estimated: Tensor | None = None

    @classmethod
    def of(
        cls,
        indices: Sequence[ScoringIndex],
        touched: Tensor,
        read: Sequence[tuple[Tensor, Tensor]],
        texts: int,
        means: Sequence[Tensor | None],
        signal: Signal,
        rank: int,
    ) -> FirstStages:
        """Makes the first stages of a signal's indices.

        Args:
            touched: (adapters, points), bool.
            read: hidden vectors (vectors, d) of ordinary texts at each point, and the text that each vector belongs to.
            texts: the number of texts.
            means: μ of the whitening of each point, where there is one.
            rank: rows that are kept of each adapter.
        """
        parts = []
        responses = torch.full((len(touched), len(indices) * signal.readings, texts), torch.nan)
        for at, (index, mean, (hidden, owners)) in enumerate(zip(indices, means, read, strict=True)):
            parts.append(first := FirstStage.of(index, mean, hidden, rank))
            for late in range(signal.readings if signal.scale != "raw" else 0):
                estimates = first.estimates(hidden, owners, texts, _units(index, signal, hidden), late)
                responses[touched[:, at], at + late * len(indices)] = finished(estimates, signal.scale).T
        return cls(tuple(parts), None if signal.scale == "raw" else responses)

    @property
    def bytes(self) -> int:
        """Memory they take."""
        return sum(part.bytes for part in self.parts)


class TwoStageScorer(Scorer):
    """Scores only the best adapters of a pool, exactly; calling it scores all of them, as `Scorer` does.

    Args:
        adapters, indices, reader, calibration, cache: as those of `Scorer`.
        probe: the reader's.
        signal: of norms.
        first: parallel to `indices`.
        left: adapters that estimates leave for the second stage; None: as many as suit k.
        signatures, alone, scaled: as those of `Scorer`. Similarities to examples are added to estimates as they are to
            scores, so that no adapter is left out whose examples resemble the prompt.
    """

    def __init__(
        self,
        adapters: Sequence[Adapter],
        indices: Sequence[ScoringIndex],
        reader: ResponseReader,
        probe: Probe,
        signal: Signal,
        first: FirstStages,
        calibration: Calibration | None = None,
        cache: CalibrationCache | None = None,
        left: int | None = None,
        signatures: Signatures | None = None,
        alone: bool = False,
        scaled: bool = False,
    ) -> None:
        super().__init__(adapters, indices, reader, calibration, cache, None, signatures, alone, scaled)
        self.first = first
        self._probe, self._signal, self._left = probe, signal, left
        self._estimated: Reference | None = None
        if first.estimated is not None and calibration is not None:
            neutral = calibration.neutral.shape[2]
            self._estimated = self._reference_of(first.estimated[:, :, :neutral], first.estimated[:, :, neutral:])
        # (adapters, points): the place of each adapter in the index of the point
        self._places = self._touched.cumsum(dim=0) - 1
        self._position = {name: i for i, name in enumerate(self.names)}

    def best(self, input_ids: Tensor, attention_mask: Tensor, asked: Sequence[Best]) -> Tensor:
        """(rows, adapters) on the CPU: the scores of the best adapters, `NOT_SCORED` for others; see `Scorer.best`."""
        hidden = self._probe(input_ids, attention_mask)
        owners = self._probe.owners(input_ids, attention_mask)
        per_row = [[vectors[owners.to(vectors.device) == row] for vectors in hidden] for row in range(len(asked))]
        return torch.stack([self.of_vectors(vectors, one) for vectors, one in zip(per_row, asked, strict=True)])

    def of_vectors(self, hidden: Sequence[Tensor], asked: Best) -> Tensor:
        """Scores (adapters,) of one prompt, from its hidden vectors (vectors, d) at each point; see `best`."""
        eligible = torch.ones(len(self.names), dtype=torch.bool)
        if asked.among is not None:
            eligible = torch.zeros(len(self.names), dtype=torch.bool)
            eligible[[self._position[name] for name in asked.among if name in self._position]] = True
        k = min(max(asked.k, _LOOKED_AT), int(eligible.sum()))
        scores = torch.full((len(self.names),), NOT_SCORED)
        if not k:
            return scores
        if self._estimated is not None:
            left = max(_FEWEST_LEFT, _LEFT_EACH * k) if self._left is None else max(self._left, k)
            estimates = self._estimate(hidden)
            descriptions = self._descriptions(hidden)
            among = None if asked.among is None else eligible[None]
            chosen = _highest(self.with_examples(estimates[None], descriptions, among)[0], eligible, left)
            estimates[chosen] = self.exact(hidden, chosen)
            scores[chosen] = self.with_examples(estimates[None], descriptions, among)[0, chosen]
            return scores
        low, high = self._bounds(hidden)
        # Those with the highest upper bounds are scored first. The k-th best score among them is a threshold, and only
        # adapters whose upper bound reaches it can still be among the k best.
        chosen = _highest(high, eligible, 2 * k)
        scores[chosen] = self.exact(hidden, chosen)
        threshold = scores[chosen].nan_to_num(torch.inf).topk(k).values[-1]
        threshold = threshold.maximum(low.masked_fill(~eligible, NOT_SCORED).topk(k).values[-1].nan_to_num(NOT_SCORED))
        more = ~(high < threshold) & eligible  # NaN does not leave an adapter out
        more[chosen] = False
        rest = more.nonzero()[:, 0]
        scores[rest] = self.exact(hidden, rest)
        return scores

    def exact(self, hidden: Sequence[Tensor], which: Tensor) -> Tensor:
        """The scores that one stage gives adapters at these ascending positions in the pool, (n,), without examples."""
        responses = torch.full((len(which), len(self.points) * self._signal.readings, 1), torch.nan)
        for at, (index, vectors) in enumerate(zip(self.indices, hidden, strict=True)):
            touched = self._touched[which, at]
            part = index.part(self._places[which[touched], at].tolist())
            values = self._signal(part, vectors) if len(part) else torch.zeros(len(vectors), 0)
            for late in range(self._signal.readings):
                means = emphasised(values, torch.zeros(len(vectors), dtype=torch.int64), 1, late)
                responses[touched, at + late * len(self.points)] = finished(means, self._signal.scale).T.cpu()
        if self._reference is None:
            return self._mean_over_points(responses, self._touched[which])[0]
        scores = self._reference.part(which).scores(responses)
        return self.in_unit(scores, torch.tensor([len(hidden[0])]))[0]

    def _estimate(self, hidden: Sequence[Tensor]) -> Tensor:
        """(adapters,): estimated scores, without examples; not in the unit of scores, which changes no order."""
        assert self._estimated is not None
        responses = torch.full((len(self.names), len(self.points) * self._signal.readings, 1), torch.nan)
        for at, (index, first, vectors) in enumerate(zip(self.indices, self.first.parts, hidden, strict=True)):
            for late in range(self._signal.readings):
                some = vectors[-_LAST_TOKENS:] if late else vectors[:: -(-len(vectors) // _TOKENS)]
                units = _units(index, self._signal, some)
                means = first.estimates(some, torch.zeros(len(some), dtype=torch.int64), 1, units, late)
                responses[self._touched[:, at], at + late * len(self.points)] = finished(means, self._signal.scale).T
        return self._estimated.scores(responses)[0]

    def _descriptions(self, hidden: Sequence[Tensor]) -> list[Tensor]:
        """The prompt's description at each place; empty if the pool has no signatures."""
        if self.signatures is None:
            return []
        read = [hidden[point] for point in self.signatures.points]
        return [described(vectors, torch.zeros(len(vectors), dtype=torch.int64), 1) for vectors in read]

    def _bounds(self, hidden: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Lower and upper bounds of the scores, (adapters,) each."""
        ends = torch.full((2, *self._touched.shape, 1), torch.nan)
        for at, (first, vectors) in enumerate(zip(self.first.parts, hidden, strict=True)):
            pair = first.bounds(vectors, torch.zeros(len(vectors), dtype=torch.int64), 1)
            for end, values in zip(ends, pair, strict=True):
                end[self._touched[:, at], at] = values.T
        low, high = (self._mean_over_points(end, self._touched)[0] for end in ends)
        return low, high * (1 + 1e-5)  # a mean may be rounded down


def _units(index: ScoringIndex, signal: Signal, hidden: Tensor) -> Tensor | None:
    """What a signal divides norms by; None if it does not."""
    return index.units(hidden) if signal.relative else None


def _highest(values: Tensor, eligible: Tensor, count: int) -> Tensor:
    """Ascending positions of the highest eligible values; NaN counts as the highest."""
    values = values.nan_to_num(torch.inf).masked_fill(~eligible, NOT_SCORED)
    return values.topk(min(count, int(eligible.sum()))).indices.sort().values
