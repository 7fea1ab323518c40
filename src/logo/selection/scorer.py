"""`Scorer`: from token ids to a score of every adapter, by one signal. `logo.selection.scorers` makes it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from logo.adapters.adapter import Adapter
from logo.selection.cache import CalibrationCache
from logo.selection.calibration import Calibration
from logo.selection.chance import factors
from logo.selection.emphasis import column_weights
from logo.selection.index import ScoringIndex
from logo.selection.once import OnceReader
from logo.selection.reference import Reference
from logo.selection.responses import ResponseReader
from logo.selection.signature import GAIN, Signatures
from logo.selection.size import relative_sizes


class Scorer:
    """Scores the adapters of a pool for batches of prompts, by one signal.

    Args:
        adapters: those that are scored, in pool order.
        indices: one per point that is read, of the adapters that touch it.
        reader: responses to prompts at these points.
        calibration: the responses to compare with; None for signals without one.
        cache: of the calibration.
        signatures: of the adapters that have example prompts; None: no adapter has, or they are not used.
        scaled: whether the scores of responses are brought to the unit of `logo.selection.chance`.

    Attributes:
        points: where prompts are read.
        adapters, names: those that are scored.
        sizes: adapter name -> relative size (`logo.selection.size`); empty for signals without a calibration.
        signatures: the same.
    """

    def __init__(
        self,
        adapters: Sequence[Adapter],
        indices: Sequence[ScoringIndex],
        reader: ResponseReader | OnceReader,
        calibration: Calibration | None = None,
        cache: CalibrationCache | None = None,
        signatures: Signatures | None = None,
        scaled: bool = False,
    ) -> None:
        self.signatures, self._scaled = signatures, scaled
        self.indices = tuple(indices)
        self.points = tuple(index.point for index in indices)
        self.adapters = tuple(adapters)
        self.names = tuple(adapter.name for adapter in adapters)
        self.calibration = calibration
        self.cache = cache
        self._reader = reader
        self._reference: Reference | None = None
        if calibration is not None:
            weights = column_weights(calibration.neutral.shape[1], len(self.points))
            self._reference = Reference.of(calibration.neutral, calibration.requests, weights)
        # (adapters, points)
        self._touched = torch.tensor([[point.module in a.modules for point in self.points] for a in adapters])
        self.sizes: dict[str, float] = {}
        if calibration is not None:
            updates = [index.updates for index in indices]
            sizes = relative_sizes(updates, calibration.weight_norms, self._touched).tolist()
            self.sizes = dict(zip(self.names, sizes, strict=True))

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor, candidates: Sequence[Collection[str] | None] = ()
    ) -> Tensor:
        """Scores (rows, adapters), float32 on the CPU, of right-padded prompts (rows, length).

        Args:
            candidates: the names of the adapters that may be selected in each row (None: all of them), whose scores
                are right; those of others may not be. Empty: all in every row.
        """
        probed = self._reader(input_ids, attention_mask)
        return self.scores(probed.responses, probed.descriptions, probed.tokens, self.among(candidates))

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
            among: (rows, adapters) bool: those that may be selected. What is estimated in their scores depends on them
                alone; the scores of others are not right. None: all.
        """
        scores = self._of_responses(per_point, among)
        if self._scaled and self._reference is not None:
            scores = scores * factors(tokens, self._reference.apart)[:, None]
        if self.signatures is None or not descriptions:
            return scores
        similar = GAIN * self.signatures.similarities(descriptions, scores, among)
        return self.signatures.weight_of_responses(among) * scores + similar

    def _of_responses(self, per_point: Sequence[Tensor], among: Tensor | None) -> Tensor:
        # (adapters, readings, rows)
        responses = torch.full((len(self.names), len(per_point), len(per_point[0])), torch.nan)
        for at, response in enumerate(per_point):
            responses[self._touched[:, at % len(self.points)], at] = response.T.cpu()
        if self._reference is None:
            # Not nanmean: a response that is not a number has to be seen.
            sums = torch.where(self._touched[:, :, None], responses, torch.zeros(())).sum(dim=1)
            return (sums / self._touched.sum(dim=1, keepdim=True)).T
        scores = self._reference.scores(responses)
        if among is not None:
            responds = self._reference.responds.any(dim=1)
            for row, asked in zip(scores, among, strict=True):
                if (responds & asked).any():  # as for `Reference.scores`, the lowest score of the others
                    row[asked & ~responds] = row[responds & asked].min()
        return scores
