"""`ResponseReader`: from prompts to the response of every adapter at every point: probe, indices and known prefixes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from logo.selection.emphasis import fading, late_count, late_weights
from logo.selection.index import ScoringIndex
from logo.selection.prefixes import BLOCK, Block, Prefixes, block_bytes, cache_of, cut
from logo.selection.probe import Probe
from logo.selection.reference import finished
from logo.selection.signals import Signal
from logo.selection.signature import KINDS


@dataclass(frozen=True)
class Responses:
    """What one probe yields for a batch of prompts.

    Attributes:
        responses: `a` (rows, adapters that touch the point) of each point (`logo.selection.reference`); first the even
            readings of all points, then the late ones if the signal has them.
        descriptions: (rows, 2, d) of each place (`logo.selection.signature`); empty if none are needed.
        tokens: (rows,) int64 on the CPU, how many were read of each prompt.
    """

    responses: list[Tensor]
    descriptions: list[Tensor]
    tokens: Tensor


class ResponseReader:
    """Computes the responses of a pool's adapters to prompts.

    Args:
        probe: where hidden vectors are read.
        indices: one per point of the probe.
        signal: scores hidden vectors.
        name: of the signal.
        prefixes: the cache of prompt prefixes; None: every prompt is read whole.
        describing: numbers of the points at which prompts are described, too.
    """

    def __init__(
        self,
        probe: Probe,
        indices: Sequence[ScoringIndex],
        signal: Signal,
        name: str,
        prefixes: Prefixes | None,
        describing: Sequence[int] = (),
    ) -> None:
        self._probe = probe
        self._indices = indices
        self._signal = signal
        self._describing = describing
        self._name = f"{name}, described" if describing else name
        # The response to a mean of hidden vectors does not follow from responses to blocks, and known blocks may hold
        # tokens on which adapters act.
        self._prefixes = None if probe.token in ("mean", "tail") else prefixes

    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> Responses:
        """The responses to right-padded prompts (rows, length)."""
        lengths: list[int] = attention_mask.sum(dim=1).tolist()
        if self._prefixes is None or max(lengths) <= BLOCK:
            return self._read(input_ids, attention_mask, [], None)
        rows = [row[:length] for row, length in zip(input_ids.tolist(), lengths, strict=True)]
        shared = self._prefixes.common(rows)
        known = self._prefixes.find(rows[0], shared, self._name)
        if len(rows) > 1 and len(known) < shared:  # the beginning that all rows share is read once
            beginning = input_ids[:1, : shared * BLOCK]
            self._read(beginning, torch.ones_like(beginning), known, [rows[0][: shared * BLOCK]])
            known = self._prefixes.find(rows[0], shared, self._name)
        return self._read(input_ids, attention_mask, known, rows)

    def _read(
        self, input_ids: Tensor, attention_mask: Tensor, known: list[Block], rows: list[list[int]] | None
    ) -> Responses:
        """Reads what follows the known blocks, and caches the new blocks of `rows` (None: no blocks)."""
        cache = None if rows is None else cache_of(known, len(input_ids))
        start = len(known) * BLOCK
        hidden = self._probe(input_ids[:, start:], attention_mask, cache)
        values = [self._signal(index, vectors) for index, vectors in zip(self._indices, hidden, strict=True)]
        described = [hidden[point] for point in self._describing]
        sums: list[Tensor] = []
        counts = torch.zeros(len(input_ids), 0, dtype=torch.int64)
        owners = self._probe.owners(input_ids[:, start:], attention_mask)
        if self._probe.token in ("each", "tail"):
            # Descriptions need means over blocks, too.
            sums, counts = self._block_sums(values, described, input_ids[:, start:], attention_mask)
            values = self._means(sums, counts, known)
        else:
            values += described * len(KINDS)  # one vector of each row is read, and it is all of its means
        if rows is not None and cache is not None and cache.layers:  # a probe before the first layer caches nothing
            self._keep(cache, rows, len(known), sums, counts)
        count = len(self._indices) * self._signal.readings
        even, late = values[count : count + len(described)], values[count + len(described) :]
        return Responses(
            [finished(value, self._signal.scale) for value in values[:count]],
            [torch.stack(means, dim=1) for means in zip(even, late, strict=True)],
            torch.bincount(owners, minlength=len(input_ids)) + sum(block.tokens for block in known),
        )

    def _late(self, i: int) -> bool:
        """Whether the tokens of the i-th sums are weighted late (`logo.selection.emphasis`). First come the even and
        the late sums of responses at all points, then the even and the late sums of all descriptions."""
        points, readings = len(self._indices), len(self._indices) * self._signal.readings
        return points <= i < readings or i >= readings + len(self._describing)

    def _means(self, sums: list[Tensor], counts: Tensor, known: list[Block]) -> list[Tensor]:
        """Means (rows, n), from sums (rows, blocks, n) and the known blocks before them.

        Args:
            counts: (rows, blocks), the number of vectors in each block.
        """
        later = counts.flip(1).cumsum(1).flip(1) - counts  # (rows, blocks): vectors behind each
        every = counts.sum(dim=1)
        number = every + sum(block.tokens for block in known)
        means = []
        for i, part in enumerate(sums):
            device, late = part.device, self._late(i)
            total = (part * fading(later).to(device)[:, :, None] if late else part).sum(dim=1)
            behind = every
            for block in reversed(known):
                one = block.sums[i].to(device)
                total = total + (one * fading(behind).to(device)[:, None] if late else one)
                behind = behind + block.tokens
            means.append(total / (late_count(number) if late else number)[:, None].to(device))
        return means

    def _block_sums(
        self, values: list[Tensor], described: list[Tensor], input_ids: Tensor, mask: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """The sums over each block, (rows, blocks, n) each, in the order of `_late`; counts (rows, blocks).

        Args:
            values: per point, (vectors, adapters).
            described: per place where prompts are described, (vectors, d).
        """
        owners, positions = self._probe.places(input_ids, mask)
        rows, blocks = len(input_ids), -(-input_ids.shape[1] // BLOCK)
        cells = owners * blocks + positions // BLOCK
        weights = late_weights(cells)[:, None]

        def late(some: list[Tensor]) -> list[Tensor]:
            return [value * weights.to(value.device) for value in some]

        responses = values + late(values) if self._signal.readings > 1 else values
        sums = []
        for value in (*responses, *described, *late(described)):
            part = torch.zeros(rows * blocks, value.shape[1], device=value.device)
            sums.append(part.index_add_(0, cells.to(value.device), value).view(rows, blocks, -1))
        return sums, torch.bincount(cells, minlength=rows * blocks).view(rows, blocks)

    def _keep(self, cache: DynamicCache, rows: list[list[int]], first: int, sums: list[Tensor], counts: Tensor) -> None:
        assert self._prefixes is not None

        def block(row: int, number: int) -> Block:
            at = number - first
            tokens = int(counts[row, at]) if sums else 0
            return Block(cut(cache, row, number), [part[row, at].clone() for part in sums], tokens)

        self._prefixes.keep(rows, first, block_bytes(cache, sums), block, self._name)
