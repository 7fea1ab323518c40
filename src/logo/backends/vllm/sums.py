"""Adapter responses summed over the tokens of probed prompts, while vLLM computes them chunk by chunk.

A `Span` from a runner says which rows of a step are tokens of a prompt. `Step` cuts these rows into blocks.
`PromptSums` adds up their responses, and keeps the sums over every prefix of whole blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from logo.adapters.activation import earliest
from logo.selection.emphasis import late_along, late_weights
from logo.selection.scorer import Scorer
from logo.selection.signals import Signal


@dataclass(frozen=True)
class Span:
    """The rows of one step that are tokens of a probed prompt.

    Attributes:
        key: of the prompt.
        signal: the signal that scores it; empty where its hidden vectors are kept for a calibration.
        row: the first row.
        start: the position of that token in the prompt.
        count: the number of rows.
        total: the number of tokens of the prompt.
        prompt: its token ids.
        pictures: whether the prompt has pictures, which its token ids do not identify.
    """

    key: str
    signal: str
    row: int
    start: int
    count: int
    total: int
    prompt: Sequence[int] = ()
    pictures: bool = False

    @property
    def end(self) -> int:
        """The position behind the last token."""
        return self.start + self.count

    def read(self, token: str, unread: int) -> range:
        """The positions that are read by a signal that reads this `token` (see `logo.selection.signals.Signal`).

        Args:
            unread: the result of `self.unread` for the prompt.
        """
        if token == "last" and self.signal:  # of texts for a calibration, the caller takes the last one
            return range(self.end - 1 if self.end == self.total else self.end, self.end)
        return range(max(self.start, unread), self.end)

    def unread(self, signal: Signal) -> int:
        """The number of tokens at the beginning of the prompt that a signal does not read. In texts of a calibration,
        tokens before adapters act are read, too."""
        begun = int(signal.token in ("each", "tail") and self.total > 1)
        if signal.token == "tail" and self.signal:
            return max(begun, earliest(signal.activations, self.prompt))
        return begun


@dataclass
class PromptSums:
    """The sums over the tokens of one prompt so far.

    Attributes:
        signal: the signal that scores the prompt.
        total: the number of tokens of the prompt.
        scorer: the scorer of the pool at the time when the first tokens were run.
        unread: the number of tokens at the beginning that are not read.
        seen: the number of tokens that have been run, for this prompt or for the one that filled the KV cache.
        read: the number of tokens that have been read.
        by_point: per reading of a point: the summed responses (adapters,), or hidden vectors (d,) if their mean is
            scored; after these, the summed hidden vectors at each place where prompts are described, even and late.
        failure: why there are no scores; None if nothing has failed.
        prefixes: digests of the prompt's prefixes that are whole blocks, the shortest first.
        ended: per reading: the sums up to the end of every block that the current step completes (blocks, n).
    """

    signal: str
    total: int
    scorer: Scorer | None = None
    unread: int = 0
    seen: int = 0
    read: int = 0
    by_point: dict[int, Tensor] = field(default_factory=dict)
    failure: str | None = None
    prefixes: tuple[bytes, ...] = ()
    ended: dict[int, Tensor] = field(default_factory=dict)

    def add(self, number: int, parts: Tensor, blocks: int, late: tuple[Tensor, Tensor] | None = None) -> None:
        """Adds the sums of a step.

        Args:
            number: the key in `by_point`.
            parts: (parts, n), the sums over the step's tokens in each block.
            blocks: the number of these blocks that the step completes.
            late: `PromptRows.late` of the parts, for sums with emphasis on the end; None: plain sums.
        """
        before = self.by_point.get(number)
        if late is None:
            along = parts.cumsum(0) if before is None else parts.cumsum(0) + before
        else:
            along = late[0] @ parts
            if before is not None:
                along = along + late[1][:, None] * before
        # A view would keep the sums of all blocks for as long as the prompt is known.
        self.by_point[number], self.ended[number] = along[-1].clone(), along[:blocks]


@dataclass(frozen=True)
class PromptRows:
    """The tokens of one prompt in a step.

    Attributes:
        key: of the prompt.
        first, end: the range of the step's sums that are the prompt's.
        ended: the digests of the prompt's prefixes that the step completes, in the order of its parts.
        blocks: the number of blocks that the step completes.
        unread: the number of these blocks of which no token is read.
        late: the result of `logo.selection.emphasis.late_along` for these parts, on the model's device.
    """

    key: str
    first: int
    end: int
    ended: tuple[bytes, ...]
    blocks: int
    unread: int
    late: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Step:
    """The rows of the current step that one signal reads.

    Attributes:
        parts: the prompts.
        rows: (n,) int64 on the model's device: the rows that are read.
        owners: (n,) the sum that each row belongs to; there is one for the tokens of one prompt in one block.
        weights: (n,) float32, the weight of each row in sums with emphasis on the end; None: there are no such sums.
        prompts: (n,) on the CPU: the index in `parts` of the prompt that each row belongs to.
    """

    parts: tuple[PromptRows, ...]
    rows: Tensor
    owners: Tensor
    weights: Tensor | None
    prompts: Tensor

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of the prompts."""
        return tuple(part.key for part in self.parts)

    @classmethod
    def of(
        cls,
        spans: Sequence[tuple[Span, PromptSums]],
        token: str,
        block: int,
        device: torch.device,
        late: bool = False,
    ) -> Step | None:
        """The step of these prompts; None if no row is read.

        Args:
            spans: the prompts.
            token: what the signal reads.
            block: tokens per block, for prompts whose prefixes are kept.
            device: where the model runs.
            late: whether sums with emphasis on the end are needed, too.
        """
        parts: list[PromptRows] = []
        rows, owners, prompts = [], [], []
        before = 0
        for i, (span, sums) in enumerate(spans):
            positions = torch.arange(span.start, span.end)[span.read(token, sums.unread).start - span.start :]
            cut = block if sums.prefixes else span.total
            first, last = span.start // cut, (span.end - 1) // cut
            ended = sums.prefixes[first : span.end // cut]
            unread = max(0, sums.unread // cut - first)
            end = before + last - first + 1
            parts.append(PromptRows(span.key, before, end, ended, span.end // cut - first, unread))
            rows.append(positions + (span.row - span.start))
            owners.append(positions // cut - first + before)
            prompts.append(torch.full((len(positions),), i))
            before = parts[-1].end
        if not rows or not (joined := torch.cat(rows)).numel():
            return None
        cells, weights = torch.cat(owners), None
        if late:
            counts, weights = torch.bincount(cells, minlength=before), late_weights(cells).to(device)
            for i, part in enumerate(parts):
                along, left = late_along(counts[part.first : part.end])
                parts[i] = replace(part, late=(along.to(device), left.to(device)))
        return cls(tuple(parts), joined.to(device), cells.to(device), weights, torch.cat(prompts))
