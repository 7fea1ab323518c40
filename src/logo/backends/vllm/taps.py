"""`Taps`: reads hidden vectors while vLLM's model runs a prompt, and sums up how strongly each adapter responds.

    spans of the step -> (the model calls `tap` at every place that is read) -> sums per prompt -> scores

A place is a linear module of vLLM's model, or a decoder layer where the residual stream is read. Nothing here knows how
requests are scheduled: a runner says which rows of the next step belong to which prompt. Nothing here may raise while
the model runs, since that would end the engine: what fails is kept as the answer to the prompt.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from logo.errors import NotFinite
from logo.selection.baseline import finished
from logo.selection.points import Point
from logo.selection.scorer import Scorer
from logo.selection.settings import SelectionSettings
from logo.selection.signals import Signal

# Prompts whose scores wait to be taken: those of clients that have left are dropped at last.
_MOST_WAITING = 4096

# Why a prompt has to be probed once more.
CHANGED = "the pool changed while the prompt was probed"

# Joins the parts of hidden vectors (rows, d / ranks) that the ranks of a tensor parallel group hold to (rows, d).
Gather = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Span:
    """The rows of one step that are tokens of a probed prompt.

    Attributes:
        key: of the prompt.
        signal: the signal that scores it; empty where its hidden vectors are kept for a calibration.
        row: the first row.
        start: the position of that token in the prompt.
        count: how many rows.
        total: tokens of the prompt.
        bos: whether the prompt begins with the token that begins every text, which is not read where every token is.
    """

    key: str
    signal: str
    row: int
    start: int
    count: int
    total: int
    bos: bool


@dataclass
class Heard:
    """What has been heard of one prompt.

    Attributes:
        signal: the signal that scores it.
        total: tokens of the prompt.
        scorer: of the pool as it was when the prompt began to be read.
        seen: how many of them have been run.
        read: how many of them have been read.
        sums: per point: the summed responses (adapters,), or hidden vectors (d,) where their mean is scored.
        failure: why there are no scores.
    """

    signal: str
    total: int
    scorer: Scorer | None = None
    seen: int = 0
    read: int = 0
    sums: dict[int, Tensor] = field(default_factory=dict)
    failure: str | None = None


@dataclass(frozen=True)
class _Step:
    """The rows of the step at hand that one signal reads.

    Attributes:
        keys: of the prompts.
        rows: (n,) int64 on the model's device.
        owners: (n,) which of the prompts each row belongs to.
    """

    keys: tuple[str, ...]
    rows: Tensor
    owners: Tensor


class Taps:
    """Listens at the places that some signal reads.

    Args:
        place_of: the place in vLLM's model at which a point of the base model is read, by the way it is read.
        device: where the model runs.
    """

    def __init__(self, place_of: Callable[[Point, str], str], device: torch.device) -> None:
        self._place_of = place_of
        self._device = device
        self._scorers: dict[str, tuple[Scorer, Signal]] = {}
        self._listening: tuple[tuple[Point, ...], Signal, dict[str, str]] | None = None
        self._kept: dict[str, dict[str, list[Tensor]]] = {}  # text -> place -> hidden vectors of each chunk
        self._wanted: dict[str, list[tuple[str, tuple[int, ...]]]] = {}  # place -> signals and the points read there
        self._heard: OrderedDict[str, Heard] = OrderedDict()
        self._steps: dict[str, _Step] = {}

    @property
    def places(self) -> frozenset[str]:
        """Where the model has to call `tap`."""
        listened = () if self._listening is None else self._listening[2].values()
        return frozenset(self._wanted) | frozenset(listened)

    def score(self, name: str, scorer: Scorer, settings: SelectionSettings) -> None:
        """Scores prompts by this signal from now on."""
        reading = settings.reading
        self._scorers[name] = scorer, reading
        self._wanted = {}
        for signal, (known, how) in self._scorers.items():
            places: dict[str, list[int]] = {}
            for i, point in enumerate(known.points):
                places.setdefault(self._place_of(point, how.input), []).append(i)
            for place, points in places.items():
                self._wanted.setdefault(place, []).append((signal, tuple(points)))

    # -- calibrating ---------------------------------------------------------------------------------------------

    def listen(self, points: Sequence[Point], signal: Signal) -> None:
        """Keeps the hidden vectors of prompts without a signal at these points, until `kept_vectors` is called."""
        places = {point.module: self._place_of(point, signal.input) for point in points}
        self._listening, self._kept = (tuple(points), signal, places), {}

    def kept_vectors(self, keys: Sequence[str]) -> Callable[[Sequence[Point]], Iterable[tuple[Tensor, Tensor]]]:
        """Ends `listen`. Returns the hidden vectors of these prompts, in the form of
        `logo.selection.calibration.Listening`."""
        assert self._listening is not None
        _, signal, places = self._listening
        kept, self._kept, self._listening = self._kept, {}, None

        def read(points: Sequence[Point]) -> Iterable[tuple[Tensor, Tensor]]:
            joined: dict[str, tuple[Tensor, Tensor]] = {}
            for point in points:
                place = places[point.module]
                if place not in joined:
                    parts = [torch.cat(kept[key][place]) for key in keys]
                    parts = [_read_of(part, signal) for part in parts]
                    counts = torch.tensor([len(part) for part in parts])
                    joined[place] = torch.cat(parts), torch.arange(len(parts)).repeat_interleave(counts)
                yield joined[place]

        return read

    # -- while the model runs ------------------------------------------------------------------------------------

    def begin(self, spans: Sequence[Span]) -> None:
        """Says which rows of the next step belong to probed prompts; none of the step before do any more."""
        self._steps = {}
        for span in spans:
            heard = self._heard.get(span.key)
            if heard is None or span.start == 0:  # a prompt that was put back is read again from its beginning
                scorer = self._scorers[span.signal][0] if span.signal in self._scorers else None
                heard = self._heard[span.key] = Heard(span.signal, span.total, scorer)
                self._kept.pop(span.key, None)
            if span.signal and span.signal not in self._scorers:
                heard.failure = f"nothing is scored by the signal {span.signal!r} here"
            elif span.signal and heard.scorer is not self._scorers[span.signal][0]:
                heard.failure = CHANGED
            if heard.seen != span.start:
                heard.failure = f"tokens {heard.seen} to {span.start} were not run, but taken from the prefix cache"
            heard.seen = span.start + span.count
        for signal in dict.fromkeys(span.signal for span in spans):
            own = [
                span
                for span in spans
                if span.signal == signal
                and self._heard[span.key].failure is None
                and (not signal or signal in self._scorers)
            ]
            rows, owners = [], []
            for owner, span in enumerate(own):
                first, end = self._rows(span)
                rows.append(torch.arange(first, end))
                owners.append(torch.full((end - first,), owner))
                self._heard[span.key].read += end - first
            if rows and (found := torch.cat(rows)).numel():
                keys = tuple(span.key for span in own)
                self._steps[signal] = _Step(keys, found.to(self._device), torch.cat(owners).to(self._device))
        while len(self._heard) > _MOST_WAITING:
            self._heard.popitem(last=False)

    def active(self, place: str) -> bool:
        """Whether anything is read there in this step."""
        if not self._steps:
            return False
        return any(signal in self._steps for signal, _ in self._wanted.get(place, ())) or (
            "" in self._steps and self._listening is not None and place in self._listening[2].values()
        )

    def tap(self, place: str, entering: Tensor, gather: Gather | None = None) -> None:
        """Called with what enters a place: (rows, d), or a part of it for each rank."""
        try:
            if "" in self._steps and self._listening is not None and place in self._listening[2].values():
                self._keep(place, self._steps[""], entering, gather)
            for signal, points in self._wanted.get(place, ()):
                if signal in self._steps:
                    self._add(signal, points, self._steps[signal], entering, gather)
        except Exception as error:  # raising here would end the engine and every answer with it
            reason = f"{type(error).__name__}: {error}"
            for step in self._steps.values():
                for key in step.keys:
                    self._heard[key].failure = self._heard[key].failure or reason

    # -- afterwards ----------------------------------------------------------------------------------------------

    def take(self, keys: Sequence[str]) -> dict[str, list[float] | str]:
        """Scores per adapter of these prompts, or why there are none. What is taken is forgotten."""
        taken: dict[str, list[float] | str] = {}
        for key in keys:
            heard = self._heard.pop(key, None)
            if heard is None:
                taken[key] = "the prompt was not run as a probe"
            elif heard.failure is None and heard.seen < heard.total:
                taken[key] = f"only {heard.seen} of {heard.total} tokens were run"
            elif heard.failure is not None:
                taken[key] = heard.failure
            else:
                try:
                    taken[key] = self._scores(heard)
                except Exception as error:  # one prompt's failure is its own
                    taken[key] = str(error) if isinstance(error, NotFinite) else f"{type(error).__name__}: {error}"
        return taken

    def _scores(self, heard: Heard) -> list[float] | str:
        scorer, signal = self._scorers[heard.signal]
        if heard.scorer is not scorer:
            return CHANGED
        per_point = []
        for i, index in enumerate(scorer.indices):
            mean = heard.sums[i] / heard.read
            value = signal(index, mean[None]) if signal.token == "mean" else mean[None]
            per_point.append(finished(value, signal.scale))
        scores: list[float] = scorer.scores(per_point)[0].tolist()
        return scores

    def _rows(self, span: Span) -> tuple[int, int]:
        """First row of the step that is read, and the one behind the last."""
        end = span.row + span.count
        if not span.signal and self._listening is None:
            return end, end
        token = self._scorers[span.signal][1].token if span.signal else self._listening[1].token  # type: ignore[index]
        if token == "last" and span.signal:
            return (end - 1, end) if span.start + span.count == span.total else (end, end)
        return span.row + int(token == "each" and span.bos and span.start == 0 and span.total > 1), end

    def _add(self, signal: str, points: Sequence[int], step: _Step, entering: Tensor, gather: Gather | None) -> None:
        scorer, how = self._scorers[signal]
        hidden = _picked(entering, step.rows, gather)
        for i in points:
            values = hidden if how.token == "mean" else how(scorer.indices[i], hidden)  # (n, adapters) or (n, d)
            sums = torch.zeros(len(step.keys), values.shape[1], device=values.device)
            sums.index_add_(0, step.owners.to(values.device), values)
            for key, part in zip(step.keys, sums, strict=True):
                heard = self._heard[key]
                heard.sums[i] = heard.sums[i] + part if i in heard.sums else part

    def _keep(self, place: str, step: _Step, entering: Tensor, gather: Gather | None) -> None:
        hidden, owners = _picked(entering, step.rows, gather).cpu(), step.owners.cpu()
        for owner, key in enumerate(step.keys):
            self._kept.setdefault(key, {}).setdefault(place, []).append(hidden[owners == owner])

    def failed(self, keys: Sequence[str]) -> Mapping[str, str]:
        """Which of these prompts cannot be used for a calibration, and why."""
        return {key: heard.failure for key in keys if (heard := self._heard.pop(key, None)) and heard.failure}


def _picked(entering: Tensor, rows: Tensor, gather: Gather | None) -> Tensor:
    """(n, d) float32."""
    picked = entering.reshape(-1, entering.shape[-1]).index_select(0, rows)
    return (picked if gather is None else gather(picked)).float()


def _read_of(hidden: Tensor, signal: Signal) -> Tensor:
    """The hidden vectors of one text (tokens, d) that a signal reads."""
    if signal.token == "last":
        return hidden[-1:]
    return hidden.mean(dim=0, keepdim=True) if signal.token == "mean" else hidden
