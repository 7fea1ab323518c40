"""`OnceReader`: one pass of the base model over whole prompts is the probe and the prefill in one.

rows -> cached pages of their beginnings -> one pass over the rest -> responses, and pages up to where adapters act
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from logo.adapters.activation import earliest
from logo.selection.beginnings import PAGE, Beginnings, Page, Reading
from logo.selection.index import ScoringIndex
from logo.selection.probe import Probe
from logo.selection.reference import finished
from logo.selection.responses import Responses
from logo.selection.signals import Signal
from logo.selection.signature import described

_numbers = itertools.count()


class OnceReader:
    """Responses of a pool whose adapters act only from a position on; called like `ResponseReader`.

    Args:
        probe: where hidden vectors are read; it runs the whole model.
        indices: one per point of the probe.
        signal: scores hidden vectors.
        beginnings: the cache of keys, values and summed responses.
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
        self._name = f"{next(_numbers)}"  # of this pool's sums

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
                if self._probe.token == "each":
                    self._read([beginning], [shared], pages)
                else:
                    self._beginnings.extend([beginning], [shared], pages, self._beginnings.prefill)
                return self._means(rows, ends, self._known(rows, ends))
        return self._means(rows, ends, known)

    def _known(self, rows: Sequence[Sequence[int]], ends: Sequence[int]) -> list[list[Page]]:
        if self._probe.token == "mean":  # the response to a mean of vectors does not follow from responses
            return [[] for _ in rows]
        reading = self._name if self._probe.token == "each" else None
        return [self._beginnings.find(row, end, reading) for row, end in zip(rows, ends, strict=True)]

    def _means(self, rows: Sequence[Sequence[int]], ends: Sequence[int], known: Sequence[Sequence[Page]]) -> Responses:
        sums, counts, descriptions = self._read(rows, ends, known)
        if self._probe.token == "each":
            for i, pages in enumerate(known):
                for page in pages:
                    parts, count = page.sums[self._name]
                    counts[i] += count
                    for total, part in zip(sums, parts, strict=True):
                        total[i] += part.to(total.device)
        means = [total / counts.clamp_min(1)[:, None].to(total.device) for total in sums]
        return Responses([finished(mean, self._signal.scale) for mean in means], descriptions, counts)

    def _read(
        self, rows: Sequence[Sequence[int]], ends: Sequence[int], known: Sequence[Sequence[Page]]
    ) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        """Reads what is not cached: per point summed responses (rows, adapters), their number (rows,), descriptions."""
        reading = self._beginnings.extend(rows, ends, known, self._probe)
        values = [self._signal(index, hidden) for index, hidden in zip(self._indices, reading.hidden, strict=True)]
        counts = torch.bincount(reading.owners, minlength=len(rows))
        sums = [_added(value, reading.owners, len(rows)) for value in values]
        if self._probe.token == "each":
            self._note(rows, ends, known, reading, values)
        hidden = [reading.hidden[point] for point in self._describing]
        return sums, counts, [described(vectors, reading.owners, len(rows)) for vectors in hidden]

    def _note(
        self,
        rows: Sequence[Sequence[int]],
        ends: Sequence[int],
        known: Sequence[Sequence[Page]],
        reading: Reading,
        values: Sequence[Tensor],
    ) -> None:
        """Stores the summed responses of each new page."""
        most = -(-max(ends) // PAGE) + 1  # cells of a row: one per page, and one for what comes behind them
        limit = torch.tensor(ends)[reading.owners]
        pages = torch.where(reading.positions < limit, reading.positions // PAGE, most - 1)
        cells = reading.owners * most + pages
        counts = torch.bincount(cells, minlength=len(rows) * most).view(len(rows), most)
        parts = [_added(value, cells, len(rows) * most).view(len(rows), most, -1) for value in values]
        for i, (row, end) in enumerate(zip(rows, ends, strict=True)):
            first, last = len(known[i]), -(-end // PAGE)
            new = [([part[i, page].clone() for part in parts], int(counts[i, page])) for page in range(first, last)]
            self._beginnings.note(row, end, new, self._name)


def _added(values: Tensor, cells: Tensor, count: int) -> Tensor:
    """(count, n): the sum of the vectors of each cell; `values` (vectors, n), `cells` (vectors,)."""
    made = torch.zeros(count, values.shape[1], device=values.device, dtype=values.dtype)
    return made.index_add_(0, cells.to(values.device), values)
