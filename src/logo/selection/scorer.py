"""`Scorer`: from token ids to a score of every adapter, by one signal. `logo.selection.scorers` makes it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from logo.adapters.format import Adapter
from logo.selection.cache import CalibrationCache
from logo.selection.calibration import Calibration
from logo.selection.chance import factors
from logo.selection.drift import Drift
from logo.selection.emphasis import column_weights
from logo.selection.index import ScoringIndex
from logo.selection.once import OnceReader
from logo.selection.reference import Reference
from logo.selection.responses import ResponseReader
from logo.selection.signature import GAIN, Signatures
from logo.selection.size import relative_sizes

# Stands for a score that was not computed; it is below every score that a signal gives.
NOT_SCORED = -torch.inf


@dataclass(frozen=True)
class Best:
    """Which scores of one prompt are needed.

    Attributes:
        k: those of the k best adapters.
        among: the adapters that may be selected; None: all.
    """

    k: int
    among: Collection[str] | None = None


class Scorer:
    """Scores the adapters of a pool for batches of prompts, by one signal.

    Args:
        adapters: those that are scored, in pool order.
        indices: one per point that is read, of the adapters that touch it.
        reader: responses to prompts at these points.
        calibration: the responses to compare with; None for signals without one.
        cache: of the calibration.
        drift: the levels that a running reference has learnt and continues to learn; None: prompts change nothing.
        signatures: of the adapters that have example prompts; None: no adapter has, or they are not used.
        alone: the scores are those of the signatures, without the responses.
        scaled: whether the scores of responses are brought to the unit of `logo.selection.chance`.

    Attributes:
        points: where prompts are read.
        adapters, names: those that are scored.
        sizes: adapter name -> relative size (`logo.selection.size`); empty for signals without a calibration.
        drift, signatures: the same.
    """

    def __init__(
        self,
        adapters: Sequence[Adapter],
        indices: Sequence[ScoringIndex],
        reader: ResponseReader | OnceReader,
        calibration: Calibration | None = None,
        cache: CalibrationCache | None = None,
        drift: Drift | None = None,
        signatures: Signatures | None = None,
        alone: bool = False,
        scaled: bool = False,
    ) -> None:
        self.signatures, self._alone, self._scaled = signatures, alone, scaled
        self.indices = tuple(indices)
        self.points = tuple(index.point for index in indices)
        self.adapters = tuple(adapters)
        self.names = tuple(adapter.name for adapter in adapters)
        self.calibration = calibration
        self.cache = cache
        self.drift = drift
        self._reader = reader
        self._reference = None if calibration is None else self._reference_of(calibration.neutral, calibration.requests)
        # (adapters, points)
        self._touched = torch.tensor([[point.module in a.modules for point in self.points] for a in adapters])
        self.sizes: dict[str, float] = {}
        if calibration is not None:
            updates = [index.updates for index in indices]
            sizes = relative_sizes(updates, calibration.weight_norms, self._touched).tolist()
            self.sizes = dict(zip(self.names, sizes, strict=True))

    def _reference_of(self, neutral: Tensor, requests: Tensor) -> Reference:
        return Reference.of(neutral, requests, column_weights(neutral.shape[1], len(self.points)))

    def restart(self) -> None:
        """Forgets what a running reference has learnt."""
        if self.drift is not None:
            self.drift.keep(())

    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Scores (rows, adapters), float32 on the CPU, of right-padded prompts (rows, length)."""
        probed = self._reader(input_ids, attention_mask)
        return self.scores(probed.responses, probed.descriptions, probed.tokens)

    def best(self, input_ids: Tensor, attention_mask: Tensor, asked: Sequence[Best]) -> Tensor:
        """Scores (rows, adapters) that are right for the adapters `asked` of each row; others may be `NOT_SCORED`."""
        probed = self._reader(input_ids, attention_mask)
        among = self.among([one.among for one in asked])
        return self.scores(probed.responses, probed.descriptions, probed.tokens, among)

    def among(self, names: Sequence[Collection[str] | None]) -> Tensor | None:
        """(rows, adapters) bool: those that may be selected, from their names in each row (None: all of them). None if
        these are all in every row, or if it does not matter."""
        if self._reference is None or all(some is None for some in names):
            return None
        return torch.tensor([[some is None or name in some for name in self.names] for some in names])

    def scores(
        self,
        per_point: Sequence[Tensor],
        descriptions: Sequence[Tensor],
        tokens: Tensor,
        among: Tensor | None = None,
    ) -> Tensor:
        """Scores (rows, adapters), float32 on the CPU, from responses `a` per point: (rows, adapters that touch it).

        Args:
            per_point: the even readings of all points, then the late ones if the signal has them.
            descriptions: of the prompts, for a pool with signatures (`logo.selection.signature`); without them, the
                scores are those of the responses.
            tokens: (rows,), how many were read of each prompt.
            among: (rows, adapters) bool: those that may be selected. What is estimated or corrected in their scores
                depends on them alone; others may be `NOT_SCORED`. None: all.
        """
        scores = self._of_responses(per_point, among)
        return self.with_examples(self.in_unit(scores, tokens), descriptions, among)

    def in_unit(self, scores: Tensor, tokens: Tensor) -> Tensor:
        """Scores of responses (rows, adapters), multiplied by `logo.selection.chance.factors` for prompts of which so
        many tokens (rows,) were read. Unchanged unless the scorer is `scaled`."""
        if not self._scaled or self._reference is None:
            return scores
        return scores * factors(tokens, self._reference.apart)[:, None]

    def with_examples(self, scores: Tensor, descriptions: Sequence[Tensor], among: Tensor | None = None) -> Tensor:
        """The scores of responses (rows, adapters), with the similarity to example prompts; see `scores`."""
        if self.signatures is None or not descriptions:
            return scores
        similar = GAIN * self.signatures.similarities(descriptions, scores, among)
        return similar if self._alone else self.signatures.weight_of_responses(among) * scores + similar

    def _of_responses(self, per_point: Sequence[Tensor], among: Tensor | None) -> Tensor:
        # (adapters, readings, rows)
        responses = torch.full((len(self.names), len(per_point), len(per_point[0])), torch.nan)
        for at, response in enumerate(per_point):
            responses[self._touched[:, at % len(self.points)], at] = response.T.cpu()
        if self._reference is None:
            return self._mean_over_points(responses, self._touched)
        scores = self._reference.scores(responses)
        if self.drift is not None or among is not None:
            self._by_row(scores, self._reference.responds.any(dim=1), among)
        return scores

    def _by_row(self, scores: Tensor, responds: Tensor, among: Tensor | None) -> None:
        """Changes what depends on the other adapters in scores (rows, adapters) to depend on those `among` which the
        row selects. A running reference learns from each row before the next is scored."""
        for i, row in enumerate(scores):
            asked = torch.ones_like(responds) if among is None else among[i]
            which = responds & asked
            if not which.any():
                continue
            if self.drift is not None:
                names = [self.names[at] for at in which.nonzero()[:, 0].tolist()]
                before, taken = row[which], self.drift.corrections(names)
                row[which] = before - torch.tensor([taken.get(name, 0.0) for name in names])
                # A prompt that overflowed becomes an error, and must not move the levels for later prompts.
                if bool(before.isfinite().all()):
                    self.drift.see(dict(zip(names, before.tolist(), strict=True)))
            row[asked & ~responds] = row[which].min()  # as for `Reference.scores`, the lowest score of the others

    @property
    def index_bytes(self) -> int:
        """Memory of the scoring indices."""
        return sum(index.bytes for index in self.indices)

    @staticmethod
    def _mean_over_points(responses: Tensor, touched: Tensor) -> Tensor:
        """(rows, adapters) of (adapters, points, rows): over the points that it touches, (adapters, points)."""
        # Not nanmean: a response that is not a number has to be seen.
        sums = torch.where(touched[:, :, None], responses, torch.zeros(())).sum(dim=1)
        return (sums / touched.sum(dim=1, keepdim=True)).T
