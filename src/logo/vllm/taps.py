"""`Taps`: reads hidden vectors while vLLM's model runs a prompt, and averages how strongly each adapter responds.

    spans of the step -> (the model calls `tap` at every place that is read) -> means per prompt -> scores

A place is a linear module of vLLM's model, or a decoder layer whose residual stream is read. Nothing here knows how
requests are scheduled: the worker says which rows of the next step belong to which prompt. The tokens of a prompt are
weighted by their positions, so what the steps of a prompt give just adds up. Nothing here may raise while the model
runs, since that would end the engine; an error becomes the answer to its prompt.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from logo.errors import ModelError
from logo.selection.points import Point
from logo.selection.reference import FADING, finished
from logo.selection.scorer import Scorer
from logo.selection.signals import Signal
from logo.vllm.requests import Probe

# The most prompts whose outcome is kept until it is taken; nobody takes those of clients that have left.
_MOST_WAITING = 4096

# How the failure of a prompt begins that ran in a captured graph without taps; another run may read it.
UNREAD = "the model was run without reading"

# Joins the parts of hidden vectors (rows, d / ranks) that the ranks of a tensor parallel group hold to (rows, d).
Gather = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Span:
    """The rows of one step that are tokens of a probed prompt.

    Attributes:
        probe: what is asked of it.
        prompt: its token ids, all of them.
        row: the first row.
        start: the position of that token in the prompt.
        count: the number of rows.
    """

    probe: Probe
    prompt: Sequence[int]
    row: int
    start: int
    count: int

    @property
    def end(self) -> int:
        """The position behind the last token."""
        return self.start + self.count


@dataclass
class _Reading:
    """What is known of a prompt while it is probed.

    Attributes:
        span: its rows in the latest step.
        scorer: of the pool and the signal; None: a text of a calibration.
        first: the position of the first token that is read.
        seen: the number of tokens that have been run.
        means: number -> (2, n): the mean over its tokens so far, weighted evenly and with emphasis on the end. The
            numbers of the scorer's points have responses (n: adapters), or hidden vectors if their mean is scored;
            those after them the hidden vectors where prompts are described.
        kept: place -> hidden vectors (tokens, d) of each step, of a text of a calibration.
        added: the numbers to which the current step has added.
        failure: why there are no scores; None if nothing has failed.
    """

    span: Span
    scorer: Scorer | None
    first: int
    seen: int
    means: dict[int, Tensor] = field(default_factory=dict)
    kept: dict[str, list[Tensor]] = field(default_factory=dict)
    added: set[int] = field(default_factory=set)
    failure: str | None = None


@dataclass(frozen=True)
class _Step:
    """The rows of the current step that one scorer reads.

    Attributes:
        readings: that they belong to.
        rows: (n,) int64 on the model's device.
        owners: (n,) int64: the index in `readings` of each row.
        weights: (2, n) float32: of each row in the two means of its prompt.
    """

    readings: tuple[_Reading, ...]
    rows: Tensor
    owners: Tensor
    weights: Tensor

    @classmethod
    def of(cls, readings: Sequence[_Reading], device: torch.device) -> _Step:
        """The step of these prompts, some token of which is read in it."""
        rows, owners, weights = [], [], []
        for number, one in enumerate(readings):
            span, total = one.span, len(one.span.prompt)
            positions = torch.arange(max(span.start, one.first), span.end)
            rows.append(positions + (span.row - span.start))
            owners.append(torch.full_like(positions, number))
            read = total - one.first
            late = torch.full((), FADING) ** (total - 1 - positions) * (1 - FADING) / (1 - FADING**read)
            weights.append(torch.stack([torch.full_like(late, 1 / read), late]))
        parts = (torch.cat(rows), torch.cat(owners), torch.cat(weights, dim=1))
        return cls(tuple(readings), *(part.to(device) for part in parts))

    def add(self, number: int, values: Tensor) -> None:
        """Adds the values (n, m) of the rows to the means of this number."""
        owners, weights = self.owners.to(values.device), self.weights.to(values.device)
        sums = torch.zeros(2, len(self.readings), values.shape[1], device=values.device)
        for kind in (0, 1):
            sums[kind].index_add_(0, owners, values * weights[kind][:, None])
        for i, one in enumerate(self.readings):
            before = one.means.get(number)
            # A view would keep the sums of all prompts of the step.
            one.means[number] = sums[:, i].clone() if before is None else before + sums[:, i]
            one.added.add(number)


class Taps:
    """Reads hidden vectors at the places that some scorer needs.

    Args:
        place_of: maps a point of the base model and `Signal.input` to the place in vLLM's model where it is read.
        device: where the model runs.
    """

    def __init__(self, place_of: Callable[[Point, str], str], device: torch.device) -> None:
        self.place_of = place_of
        self._device = device
        self._scorers: dict[tuple[str, str], Scorer] = {}  # by digest of the pool, and signal
        # place -> for each scorer that reads there, the numbers of its points and of its descriptions
        self._wanted: dict[str, list[tuple[Scorer, tuple[int, ...], tuple[int, ...]]]] = {}
        # While texts of a calibration run: how they are read, and where.
        self._calibrating: tuple[Signal, frozenset[str]] | None = None
        self._texts: dict[str, dict[str, Tensor]] = {}  # of those that were read: place -> hidden vectors
        self._readings: dict[str, _Reading] = {}  # of prompts that run
        self._found: OrderedDict[str, list[float] | str] = OrderedDict()  # outcomes of those that were run whole
        self._steps: dict[int, _Step] = {}  # by the identity of the scorer, 0: of a calibration

    def score(self, scorers: Mapping[tuple[str, str], Scorer]) -> None:
        """Replaces the scorers, by which prompts are scored from now on."""
        self._scorers, self._wanted = dict(scorers), {}
        for known in self._scorers.values():
            places: dict[str, list[int]] = {}
            for i, point in enumerate(known.points):
                places.setdefault(self.place_of(point, known.signal.input), []).append(i)
            for place, points in places.items():
                numbers = tuple(number for number, point in enumerate(known.described) if point in points)
                self._wanted.setdefault(place, []).append((known, tuple(points), numbers))

    # -- calibrating ---------------------------------------------------------------------------------------------

    def start_calibration(self, points: Sequence[Point], signal: Signal) -> None:
        """Keeps the hidden vectors of probes without a signal at these points, until `end_calibration` is called."""
        self._texts = {}
        self._calibrating = signal, frozenset(self.place_of(point, signal.input) for point in points)

    def end_calibration(self, keys: Sequence[str]) -> list[Mapping[str, Tensor]]:
        """Ends `start_calibration`, and drops these texts. Returns for each of them, by place, the hidden vectors of
        the tokens that the signal reads (tokens, d) on the CPU; nothing without `start_calibration`.

        Raises:
            ModelError: a text was not read whole, or not everywhere.
        """
        for key, found in self.take(keys).items():
            if isinstance(found, str):
                raise ModelError(f"calibration text {key}: {found}")
        places = frozenset() if self._calibrating is None else self._calibrating[1]
        texts, self._texts, self._calibrating = self._texts, {}, None
        for key in keys:
            if silent := places - texts.get(key, {}).keys():
                raise ModelError(f"calibration text {key}: {UNREAD} {', '.join(silent)}")
        return [texts.get(key, {}) for key in keys]

    # -- while the model runs ------------------------------------------------------------------------------------

    def begin(self, spans: Sequence[Span]) -> None:
        """Sets the rows of the next step that belong to probed prompts, after completing the step before."""
        self._end_step()
        reading: dict[int, list[_Reading]] = {}
        for span in spans:
            found = self._readings.get(span.probe.key)
            if found is None or found.seen != span.start:  # a new prompt, or a preempted one
                found = self._readings[span.probe.key] = self._begun(span)
            found.span = span
            if found.failure is None and span.end > found.first:
                reading.setdefault(0 if found.scorer is None else id(found.scorer), []).append(found)
        for which, some in reading.items():
            self._steps[which] = _Step.of(some, self._device)
        for span in spans:  # last, so that after an error above, no prompt counts as read
            self._readings[span.probe.key].seen = span.end

    def drop(self, key: str) -> None:
        """Forgets a prompt whose request has ended before it was read whole."""
        found = self._readings.get(key)
        if found is not None and found.seen < len(found.span.prompt):
            del self._readings[key]

    def _begun(self, span: Span) -> _Reading:
        """A prompt whose first tokens are run now."""
        asked, total, calibrating = span.probe, len(span.prompt), self._calibrating
        scorer = self._scorers.get((asked.pool, asked.signal)) if asked.signal else None
        if scorer is not None:
            found = _Reading(span, scorer, scorer.signal.begin(span.prompt), span.start)
        elif not asked.signal and calibrating is not None:
            how = calibrating[0]  # of texts whose tail is scored, what stands before that is read, too
            found = _Reading(span, None, int(total > 1) if how.token == "tail" else how.begin(span.prompt), span.start)
        else:
            found = _Reading(span, None, 0, span.start)
            what = f"the signal {asked.signal!r} of this pool" if asked.signal else "a calibration"
            found.failure = f"nothing is read for {what} here"
        if span.start:
            found.failure = f"the model was run without the first {span.start} tokens of the prompt"
        return found

    def _end_step(self) -> None:
        """Scores the prompts that the last step has completed, and drops them. Prompts fail here if a compiler or a
        captured graph has left a tap out, since their scores would be wrong without any sign of it."""
        steps, self._steps = self._steps, {}
        for one in (one for step in steps.values() for one in step.readings):
            added, one.added = one.added, set()
            points = () if one.scorer is None else one.scorer.points  # without a scorer, of a calibration
            if silent := [point.name for i, point in enumerate(points) if i not in added]:
                one.failure = one.failure or f"{UNREAD} {', '.join(silent)}"
        for key, one in [(key, one) for key, one in self._readings.items() if one.seen == len(one.span.prompt)]:
            del self._readings[key]
            self._found[key] = self._outcome(one)
            if one.kept:
                self._texts[key] = {place: torch.cat(parts) for place, parts in one.kept.items()}
        while len(self._found) > _MOST_WAITING:
            self._found.popitem(last=False)

    def _outcome(self, one: _Reading) -> list[float] | str:
        if one.failure is not None or one.scorer is None:
            return one.failure or []
        try:
            return _scores(one, one.scorer)
        except Exception as error:  # one prompt's failure is its own
            return f"{type(error).__name__}: {error}"

    def active(self, place: str) -> bool:
        """Whether anything is read at this place in the current step."""
        if not self._steps:
            return False
        return any(id(scorer) in self._steps for scorer, *_ in self._wanted.get(place, ())) or (
            0 in self._steps and self._calibrating is not None and place in self._calibrating[1]
        )

    def tap(self, place: str, entering: Tensor, gather: Gather | None = None) -> None:
        """Called by the model with the hidden vectors that enter a place: (rows, d), or this rank's part of them."""
        try:
            if 0 in self._steps and self._calibrating is not None and place in self._calibrating[1]:
                step = self._steps[0]
                hidden, owners = _picked(entering, step.rows, gather).cpu(), step.owners.cpu()
                for number, one in enumerate(step.readings):
                    one.kept.setdefault(place, []).append(hidden[owners == number])
            for scorer, points, described in self._wanted.get(place, ()):
                found = self._steps.get(id(scorer))
                if found is None:
                    continue
                hidden, means = _picked(entering, found.rows, gather), scorer.signal.token == "mean"
                for i in points:
                    found.add(i, hidden if means else scorer.signal(scorer.indices[i], hidden))
                for number in described:
                    found.add(len(scorer.points) + number, hidden)
        except Exception as error:  # raising here would end the engine and every answer with it
            for one in (one for step in self._steps.values() for one in step.readings):
                one.failure = one.failure or f"{type(error).__name__}: {error}"

    # -- afterwards ----------------------------------------------------------------------------------------------

    def take(self, keys: Sequence[str]) -> dict[str, list[float] | str]:
        """The scores of these prompts per adapter (-inf for adapters that were not to be selected), or why there are
        none. Prompts that were taken are dropped."""
        self._end_step()
        taken: dict[str, list[float] | str] = {}
        for key in keys:
            one = self._readings.pop(key, None)
            missing = "the prompt was not run as a probe"
            if one is not None:
                missing = one.failure or f"only {one.seen} of {len(one.span.prompt)} tokens were run"
            taken[key] = self._found.pop(key, missing)
        return taken


def _scores(one: _Reading, scorer: Scorer) -> list[float]:
    """The scores of a prompt that was read whole."""
    signal, responses = scorer.signal, [one.means[i] for i in range(len(scorer.points))]  # (2, adapters)
    if signal.token == "mean":
        responses = [signal(index, mean[:1]) for index, mean in zip(scorer.indices, responses, strict=True)]
    # The readings of all points: the even ones, then the late ones.
    per_point = [finished(mean[kind : kind + 1], signal.scale) for kind in range(signal.readings) for mean in responses]
    described = 0 if one.span.probe.plain else len(scorer.described)
    descriptions = [one.means[len(scorer.points) + i][None] for i in range(described)]
    if signal.token == "mean":  # where one vector of a prompt is scored, it is both means of the description
        descriptions = [mean[:, :1].expand(-1, 2, -1) for mean in descriptions]
    read = torch.tensor([len(one.span.prompt) - one.first])
    scores: list[float] = scorer.scores(per_point, descriptions, read, [one.span.probe.among])[0].tolist()
    return scores


def _picked(entering: Tensor, rows: Tensor, gather: Gather | None) -> Tensor:
    """The hidden vectors of these rows, joined over all ranks: (n, d) float32."""
    picked = entering.reshape(-1, entering.shape[-1]).index_select(0, rows)
    return (picked if gather is None else gather(picked)).float()
