"""Adapter responses summed over the tokens of probed prompts, while vLLM computes them chunk by chunk.

A `Span` from a runner says which rows of a step are tokens of a prompt. `Step` has the rows of one step that one signal
reads, and `PromptSums` adds up their responses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from logo.adapters.activation import earliest
from logo.selection.emphasis import fading, late_weights
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
        request: vLLM's id of the request.
        among: names of the adapters that may be selected; None: all.
    """

    key: str
    signal: str
    row: int
    start: int
    count: int
    total: int
    prompt: Sequence[int] = ()
    request: str = ""
    among: tuple[str, ...] | None = None

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
        request: vLLM's id of the request.
        among: names of the adapters that may be selected; None: all.
        unread: the number of tokens at the beginning that are not read.
        seen: the number of tokens that have been run.
        read: the number of tokens that have been read.
        by_point: per reading of a point: the summed responses (adapters,), or hidden vectors (d,) if their mean is
            scored; after these, the summed hidden vectors at each place where prompts are described, even and late.
        added: the keys in `by_point` to which the current step has added.
        failure: why there are no scores; None if nothing has failed.
    """

    signal: str
    total: int
    scorer: Scorer | None = None
    request: str = ""
    among: tuple[str, ...] | None = None
    unread: int = 0
    seen: int = 0
    read: int = 0
    by_point: dict[int, Tensor] = field(default_factory=dict)
    added: set[int] = field(default_factory=set)
    failure: str | None = None

    def add(self, number: int, part: Tensor, fade: Tensor | None = None) -> None:
        """Adds the sum of a step.

        Args:
            number: the key in `by_point`.
            part: (n,), the sum over the step's tokens; a row of the sums of all prompts.
            fade: of sums with emphasis on the end: the factor of the tokens before; None: plain sums.
        """
        before = self.by_point.get(number)
        if before is None:
            self.by_point[number] = part.clone()  # a view would keep the sums of all prompts of the step
        else:
            self.by_point[number] = part + (before if fade is None else fade * before)
        self.added.add(number)


@dataclass(frozen=True)
class Step:
    """The rows of the current step that one signal reads.

    Attributes:
        keys: of the prompts.
        rows: (n,) int64 on the model's device: the rows that are read.
        prompts: (n,) likewise: the index in `keys` of the prompt that each row belongs to.
        weights: (n,) float32, the weight of each row in sums with emphasis on the end; None: there are no such sums.
        fades: (prompts,) float32, for such sums: the factor of the tokens before this step.
    """

    keys: tuple[str, ...]
    rows: Tensor
    prompts: Tensor
    weights: Tensor | None = None
    fades: Tensor | None = None

    @classmethod
    def of(
        cls, spans: Sequence[tuple[Span, PromptSums]], token: str, device: torch.device, late: bool = False
    ) -> Step | None:
        """The step of these prompts; None if no row is read.

        Args:
            spans: the prompts.
            token: what the signal reads.
            device: where the model runs.
            late: whether sums with emphasis on the end are needed, too.
        """
        rows, prompts = [], []
        for i, (span, sums) in enumerate(spans):
            positions = torch.arange(span.start, span.end)[span.read(token, sums.unread).start - span.start :]
            rows.append(positions + (span.row - span.start))
            prompts.append(torch.full((len(positions),), i))
        if not rows or not (joined := torch.cat(rows)).numel():
            return None
        keys, owners = tuple(span.key for span, _ in spans), torch.cat(prompts)
        if not late:
            return cls(keys, joined.to(device), owners.to(device))
        fades = fading(torch.bincount(owners, minlength=len(keys)))
        return cls(keys, joined.to(device), owners.to(device), late_weights(owners).to(device), fades.to(device))
