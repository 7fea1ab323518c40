"""`OnceReader`: one pass of the base model over whole prompts is the probe and the prefill in one.

rows -> cached pages of their beginnings -> one pass over the rest -> responses, and pages up to where adapters act
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from logo.adapters.activation import earliest
from logo.selection.beginnings import Beginnings, Page
from logo.selection.index import ScoringIndex
from logo.selection.probe import Probe
from logo.selection.reference import finished
from logo.selection.responses import Responses
from logo.selection.signals import Signal
from logo.selection.signature import described


class OnceReader:
    """Responses of a pool whose adapters act only from a position on; called like `ResponseReader`.

    Args:
        probe: where hidden vectors are read; it runs the whole model.
        indices: one per point of the probe.
        signal: scores hidden vectors.
        beginnings: the cache of keys and values.
        describing: numbers of the points at which prompts are described, too. Descriptions are of the tokens on which
            adapters act, and these are never cached.
    """

    def __init__(
        self,
        probe: Probe,
        indices: Sequence[ScoringIndex],
        signal: Signal,
        beginnings: Beginnings,
        describing: Sequence[int] = (),
    ) -> None:
        self._probe, self._indices, self._signal, self._beginnings = probe, indices, signal, beginnings
        self._describing = describing

    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> Responses:
        """The responses to right-padded prompts (rows, length)."""
        lengths = attention_mask.sum(dim=1).tolist()
        rows = [row[:length] for row, length in zip(input_ids.tolist(), lengths, strict=True)]
        ends = [earliest(self._signal.activations, row) for row in rows]
        known = self._known(rows, ends)
        shared = self._beginnings.shared(rows, ends)
        if len(rows) > 1 and shared > min(sum(page.tokens for page in pages) for pages in known):
            with self._beginnings.held():  # the beginning that all rows share is read once
                beginning, pages = rows[0][:shared], self._known([rows[0][:shared]], [shared])
                self._beginnings.extend([beginning], [shared], pages, self._beginnings.prefill)
                return self._read(rows, ends, self._known(rows, ends))
        return self._read(rows, ends, known)

    def _known(self, rows: Sequence[Sequence[int]], ends: Sequence[int]) -> list[list[Page]]:
        if self._probe.token == "mean":  # of all tokens, so that all are read
            return [[] for _ in rows]
        return [self._beginnings.find(row, end) for row, end in zip(rows, ends, strict=True)]

    def _read(self, rows: Sequence[Sequence[int]], ends: Sequence[int], known: Sequence[Sequence[Page]]) -> Responses:
        """Reads what is not cached; tokens on which adapters act never are."""
        hidden, owners = self._beginnings.extend(rows, ends, known, self._probe)
        counts = torch.bincount(owners, minlength=len(rows))
        responses = []
        for index, vectors in zip(self._indices, hidden, strict=True):
            values = self._signal(index, vectors)
            sums = torch.zeros(len(rows), values.shape[1], device=values.device, dtype=values.dtype)
            sums.index_add_(0, owners.to(values.device), values)
            responses.append(finished(sums / counts.clamp_min(1)[:, None].to(values.device), self._signal.scale))
        return Responses(responses, [described(hidden[at], owners, len(rows)) for at in self._describing], counts)
