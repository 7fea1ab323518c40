"""`Taps`: reads hidden vectors while vLLM's model runs a prompt, and averages how strongly each adapter responds.

    spans of the step -> (the model calls `tap` at every place that is read) -> means per prompt -> scores

A place is a linear module of vLLM's model, or a decoder layer whose residual stream is read. The worker says which rows
of the next step belong to which prompt. The tokens of a prompt are weighted by their positions, so what the steps of a
prompt give just adds up. Nothing here may raise while the model runs, since that would end the engine; an error becomes
the answer to its prompt.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from logo.selection.evidence import Similarities
from logo.selection.points import Point
from logo.selection.reference import FADING, finished
from logo.selection.scorer import Scorer
from logo.selection.signals import Signal
from logo.vllm.requests import ProbeRequest

# The most prompts whose outcome is kept until it is taken; nobody takes those of clients that have left.
_MOST_WAITING = 4096

# How the failure of a prompt begins that ran in a captured graph without taps; another run may read it.
NOT_RUN = "the prompt was not run as a probe"
UNREAD = "the model was run without reading"

# The scores of a prompt per adapter (-inf for adapters that were not to be selected), the hidden vectors of a text of a
# calibration (tokens, d) on the CPU by place, or why there is neither.
Outcome = list[float] | dict[str, Tensor] | str
# Joins the parts of hidden vectors (rows, d / ranks) that the ranks of a tensor parallel group hold to (rows, d).
Gather = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Span:
    """The rows of one step that are tokens of a probed prompt."""

    probe: ProbeRequest  # what is asked of it
    prompt: Sequence[int]  # its token ids, all of them
    row: int  # the first row
    start: int  # the position of that token in the prompt
    count: int  # the number of rows

    @property
    def end(self) -> int:
        """The position behind the last token."""
        return self.start + self.count


@dataclass(frozen=True)
class TextReader:
    """Reads probes without a signal, which are texts of a calibration: their hidden vectors at these points are kept,
    of the tokens that the signal reads."""

    points: tuple[Point, ...]
    signal: Signal


Reader = Scorer | TextReader


@dataclass(frozen=True)
class _Use:
    """What a reader reads at a place: the numbers of its points there."""

    reader: Reader
    points: tuple[int, ...]


@dataclass
class _PromptReading:
    """What is known of a prompt while it is probed.

    Attributes:
        means: number -> (2, n): the mean over its tokens so far, weighted evenly and with emphasis on the end. The
            numbers of points where adapters are scored have responses (n: adapters), those where prompts are described
            hidden vectors.
    """

    span: Span  # its rows in the latest step
    reader: Reader | None  # of the pool and the signal; None: there is none
    first: int  # the position of the first token that is read
    seen: int  # the number of tokens that have been run
    failure: str | None = None  # why there are no scores; None: nothing has failed
    means: dict[int, Tensor] = field(default_factory=dict)
    kept: dict[str, list[Tensor]] = field(default_factory=dict)  # of a text: place -> (tokens, d) of each step
    added: set[int] = field(default_factory=set)  # the numbers of points that the current step has read


@dataclass(frozen=True)
class _Step:
    """The rows of the current step that one reader reads."""

    readings: tuple[_PromptReading, ...]  # that they belong to
    rows: Tensor  # (n,) int64 on the model's device
    owners: Tensor  # (n,) int64: the index in `readings` of each row
    weights: Tensor  # (2, n) float32: of each row in the two means of its prompt

    @classmethod
    def of(cls, readings: Sequence[_PromptReading], device: torch.device) -> _Step:
        """The step of these prompts, some token of which is read in it."""
        rows = []
        owners = []
        weights = []
        for number, reading in enumerate(readings):
            span = reading.span
            total = len(span.prompt)
            positions = torch.arange(max(span.start, reading.first), span.end)
            rows.append(positions + (span.row - span.start))
            owners.append(torch.full_like(positions, number))
            read = total - reading.first
            late = torch.full((), FADING) ** (total - 1 - positions) * (1 - FADING) / (1 - FADING**read)
            weights.append(torch.stack([torch.full_like(late, 1 / read), late]))
        return cls(
            tuple(readings),
            torch.cat(rows).to(device),
            torch.cat(owners).to(device),
            torch.cat(weights, dim=1).to(device),
        )

    def add(self, number: int, values: Tensor) -> None:
        """Adds the values (n, m) of the rows to the means of this number."""
        owners = self.owners.to(values.device)
        weights = self.weights.to(values.device)
        sums = torch.zeros(2, len(self.readings), values.shape[1], device=values.device)
        for kind in (0, 1):
            sums[kind].index_add_(0, owners, values * weights[kind][:, None])
        for i, reading in enumerate(self.readings):
            before = reading.means.get(number)
            # A view would keep the sums of all prompts of the step.
            reading.means[number] = sums[:, i].clone() if before is None else before + sums[:, i]

    def keep(self, place: str, values: Tensor) -> None:
        """Keeps the values (n, d) of the rows, which entered this place."""
        values = values.cpu()
        owners = self.owners.cpu()
        for number, reading in enumerate(self.readings):
            reading.kept.setdefault(place, []).append(values[owners == number])


class Taps:
    """Reads hidden vectors at the places that some reader needs.

    Args:
        place_of: maps a point of the base model and `Signal.input` to the place in vLLM's model where it is read.
        device: where the model runs.
    """

    def __init__(self, place_of: Callable[[Point, str], str], device: torch.device) -> None:
        self.place_of = place_of
        self._device = device
        self.readers: Mapping[tuple[str, str], Reader] = {}  # by digest of the pool, and signal
        self._uses: dict[str, list[_Use]] = {}  # by place
        self._readings: dict[str, _PromptReading] = {}  # of prompts that run
        self._outcomes: OrderedDict[str, Outcome] = OrderedDict()  # of those that were run whole
        self._steps: dict[int, _Step] = {}  # by the identity of the reader

    def read_by(self, readers: Mapping[tuple[str, str], Reader]) -> None:
        """Replaces the readers (by digest of the pool, and signal), by which prompts are read from now on."""
        self.readers = dict(readers)
        self._uses = {}
        for reader in self.readers.values():
            places: dict[str, list[int]] = {}
            for i, point in enumerate(reader.points):
                places.setdefault(self.place_of(point, reader.signal.input), []).append(i)
            for place, points in places.items():
                self._uses.setdefault(place, []).append(_Use(reader, tuple(points)))

    # -- while the model runs ------------------------------------------------------------------------------------

    def begin(self, spans: Sequence[Span]) -> None:
        """Sets the rows of the next step that belong to probed prompts, after completing the step before."""
        self._end_step()
        by_reader: dict[int, list[_PromptReading]] = {}
        for span in spans:
            reading = self._readings.get(span.probe.key)
            if reading is None or reading.seen != span.start:  # a new prompt, or a preempted one
                reading = self._begun(span)
                self._readings[span.probe.key] = reading
            reading.span = span
            if reading.failure is None and span.end > reading.first:
                by_reader.setdefault(id(reading.reader), []).append(reading)
        for reader_id, readings in by_reader.items():
            self._steps[reader_id] = _Step.of(readings, self._device)
        for span in spans:  # last, so that after an error above, no prompt counts as read
            self._readings[span.probe.key].seen = span.end

    def drop(self, key: str) -> None:
        """Forgets a prompt whose request has ended before it was read whole."""
        reading = self._readings.get(key)
        if reading is not None and reading.seen < len(reading.span.prompt):
            del self._readings[key]

    def _begun(self, span: Span) -> _PromptReading:
        """A prompt whose first tokens are run now."""
        probe = span.probe
        reader = self.readers.get((probe.pool, probe.signal))
        if reader is None:
            purpose = f"the signal {probe.signal!r} of this pool" if probe.signal else "a calibration"
            return _PromptReading(span, None, 0, span.start, f"nothing is read for {purpose} here")
        begin = reader.signal.begin_of_text if isinstance(reader, TextReader) else reader.signal.begin
        missing = f"the model was run without the first {span.start} tokens of the prompt" if span.start else None
        return _PromptReading(span, reader, begin(span.prompt), span.start, missing)

    def _end_step(self) -> None:
        """Scores the prompts that the last step has completed, and drops them. Prompts fail here if a compiler or a
        captured graph has left a tap out, since their scores would be wrong without any sign of it."""
        for reading in self._stepping():
            points = () if reading.reader is None else reading.reader.points
            silent = [point.name for i, point in enumerate(points) if i not in reading.added]
            if silent and reading.failure is None:
                reading.failure = f"{UNREAD} {', '.join(silent)}"
            reading.added.clear()
        self._steps = {}
        whole = [key for key, reading in self._readings.items() if reading.seen == len(reading.span.prompt)]
        for key in whole:
            self._outcomes[key] = self._outcome(self._readings.pop(key))
        while len(self._outcomes) > _MOST_WAITING:
            self._outcomes.popitem(last=False)

    def _stepping(self) -> list[_PromptReading]:
        """The prompts that are read in the current step."""
        return [reading for step in self._steps.values() for reading in step.readings]

    def _outcome(self, reading: _PromptReading) -> Outcome:
        if reading.failure is not None or reading.reader is None:
            return reading.failure or ""
        try:
            if isinstance(reading.reader, TextReader):
                return {place: torch.cat(parts) for place, parts in reading.kept.items()}
            return _scores(reading, reading.reader)
        except Exception as error:  # one prompt's failure is its own
            return f"{type(error).__name__}: {error}"

    def active(self, place: str) -> bool:
        """Whether anything is read at this place in the current step."""
        return bool(self._steps) and any(id(use.reader) in self._steps for use in self._uses.get(place, ()))

    def tap(self, place: str, entering: Tensor, gather: Gather | None = None) -> None:
        """Called by the model with the hidden vectors that enter a place: (rows, d), or this rank's part of them."""
        try:
            for use in self._uses.get(place, ()):
                step = self._steps.get(id(use.reader))
                if step is not None:
                    _read(use, step, place, _picked(entering, step.rows, gather))
        except Exception as error:  # raising here would end the engine and every answer with it
            for reading in self._stepping():
                reading.failure = reading.failure or f"{type(error).__name__}: {error}"

    def take(self, keys: Sequence[str]) -> dict[str, Outcome]:
        """The outcomes of these prompts, which are dropped."""
        self._end_step()
        taken: dict[str, Outcome] = {}
        for key in keys:
            reading = self._readings.pop(key, None)
            missing = NOT_RUN
            if reading is not None:
                missing = reading.failure or f"only {reading.seen} of {len(reading.span.prompt)} tokens were run"
            taken[key] = self._outcomes.pop(key, missing)
        return taken


def _read(use: _Use, step: _Step, place: str, hidden: Tensor) -> None:
    """Adds what a reader reads of these hidden vectors (rows, d), which enter a place, to its prompts."""
    reader = use.reader
    if isinstance(reader, TextReader):
        step.keep(place, hidden)
    else:
        for i in use.points:
            step.add(i, hidden if i in reader.described else reader.signal(reader.indices[i], hidden))
    for reading in step.readings:
        reading.added.update(use.points)


def _scores(reading: _PromptReading, scorer: Scorer) -> list[float]:
    """The scores of a prompt that was read whole."""
    signal = scorer.signal
    responses = [reading.means[i] for i in range(len(scorer.indices))]  # (2, adapters)
    # The readings of all points: the even ones, then the late ones.
    per_point = [finished(mean[kind : kind + 1], signal.scale) for kind in range(signal.readings) for mean in responses]
    probe = reading.span.probe
    descriptions = [] if probe.without_examples else [reading.means[i][None] for i in scorer.described]
    read = torch.tensor([len(reading.span.prompt) - reading.first])
    encoded = None if probe.encoded is None else Similarities.of_row(probe.encoded)
    scores: list[float] = scorer.score_responses(per_point, descriptions, read, [probe.among], encoded)[0].tolist()
    return scores


def _picked(entering: Tensor, rows: Tensor, gather: Gather | None) -> Tensor:
    """The hidden vectors of these rows, joined over all ranks: (n, d) float32."""
    picked = entering.reshape(-1, entering.shape[-1]).index_select(0, rows)
    return (picked if gather is None else gather(picked)).float()
