"""`Taps`: reads hidden vectors while vLLM's model runs a prompt, and averages how strongly each adapter responds.

    spans of the step -> (the model calls `tap` at every place that is read) -> means per prompt -> scores

A place is a linear module of vLLM's model, or a decoder layer whose residual stream is read. Nothing here knows how
requests are scheduled: a runner says which rows of the next step belong to which prompt. The tokens of a prompt are
weighted by their positions, so what the steps of a prompt give just adds up. Nothing here may raise while the model
runs, since that would end the engine; an error becomes the answer to its prompt.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from logo.backends.vllm.marks import Span
from logo.errors import ModelError, NotFinite
from logo.selection.points import Point
from logo.selection.reference import FADING, finished
from logo.selection.scorer import Scorer
from logo.selection.signals import Signal

# The most prompts whose outcome is kept until it is taken; nobody takes those of clients that have left.
_MOST_WAITING = 4096

# A failure after which a prompt has to be probed again.
CHANGED = "the pool changed while the prompt was probed"

# Joins the parts of hidden vectors (rows, d / ranks) that the ranks of a tensor parallel group hold to (rows, d).
Gather = Callable[[Tensor], Tensor]


@dataclass
class _Probe:
    """What is known of a prompt while it is probed.

    Attributes:
        span: its rows in the latest step.
        first: the position of the first token that is read.
        scorer: that of the pool at the time when the first tokens were run; None: a text of a calibration.
        seen: the number of tokens that have been run.
        means: number -> (2, n): the mean over its tokens so far, weighted evenly and with emphasis on the end. The
            numbers of the scorer's points have responses (n: adapters), or hidden vectors if their mean is scored;
            those after them the hidden vectors where prompts are described.
        kept: place -> hidden vectors (tokens, d) of each step, of a text of a calibration.
        added: the numbers to which the current step has added.
        failure: why there are no scores; None if nothing has failed.
    """

    span: Span
    first: int
    scorer: Scorer | None
    seen: int
    means: dict[int, Tensor] = field(default_factory=dict)
    kept: dict[str, list[Tensor]] = field(default_factory=dict)
    added: set[int] = field(default_factory=set)
    failure: str | None = None


@dataclass(frozen=True)
class _Step:
    """The rows of the current step that one signal reads.

    Attributes:
        probes: that they belong to.
        rows: (n,) int64 on the model's device.
        owners: (n,) int64: the index in `probes` of each row.
        weights: (2, n) float32: of each row in the two means of its prompt.
    """

    probes: tuple[_Probe, ...]
    rows: Tensor
    owners: Tensor
    weights: Tensor

    @classmethod
    def of(cls, probes: Sequence[_Probe], device: torch.device) -> _Step:
        """The step of these prompts, some token of which is read in it."""
        rows, owners, weights = [], [], []
        for number, one in enumerate(probes):
            span, read = one.span, one.span.total - one.first
            positions = torch.arange(max(span.start, one.first), span.end)
            rows.append(positions + (span.row - span.start))
            owners.append(torch.full_like(positions, number))
            late = torch.full((), FADING) ** (span.total - 1 - positions)
            late = late * (1 - FADING) / (1 - FADING**read)
            weights.append(torch.stack([torch.full_like(late, 1 / read), late]))
        return cls(
            tuple(probes),
            torch.cat(rows).to(device),
            torch.cat(owners).to(device),
            torch.cat(weights, dim=1).to(device),
        )

    def add(self, number: int, values: Tensor) -> None:
        """Adds the values (n, m) of the rows to the means of this number."""
        owners, weights = self.owners.to(values.device), self.weights.to(values.device)
        sums = torch.zeros(2, len(self.probes), values.shape[1], device=values.device)
        for kind in (0, 1):
            sums[kind].index_add_(0, owners, values * weights[kind][:, None])
        for i, one in enumerate(self.probes):
            before = one.means.get(number)
            # A view would keep the sums of all prompts of the step.
            one.means[number] = sums[:, i].clone() if before is None else before + sums[:, i]
            one.added.add(number)


class Taps:
    """Reads hidden vectors at the places that some signal needs.

    Args:
        place_of: maps a point of the base model and `Signal.input` to the place in vLLM's model where it is read.
        device: where the model runs.
    """

    def __init__(self, place_of: Callable[[Point, str], str], device: torch.device) -> None:
        self.place_of = place_of
        self._device = device
        self._scorers: dict[str, Scorer] = {}  # by signal
        # While texts of a calibration run: how they are read, and where.
        self._calibrating: tuple[Signal, frozenset[str]] | None = None
        self._texts: dict[str, dict[str, Tensor]] = {}  # of those that were read: place -> hidden vectors
        # place -> for each signal, the numbers of the points and of the descriptions that are read there
        self._wanted: dict[str, list[tuple[str, tuple[int, ...], tuple[int, ...]]]] = {}
        self._probes: dict[str, _Probe] = {}  # that run
        self._found: OrderedDict[str, list[float] | str] = OrderedDict()  # outcomes of those that were run whole
        self._steps: dict[str, _Step] = {}

    @property
    def places(self) -> frozenset[str]:
        """The places at which the model has to call `tap`."""
        return frozenset(self._wanted) | (frozenset() if self._calibrating is None else self._calibrating[1])

    def score(self, name: str, scorer: Scorer) -> None:
        """Installs the scorer of a signal, by which prompts are scored from now on."""
        if name in self._scorers and self._scorers[name] is not scorer:  # nobody may select by scores of before
            self._found.update([(key, CHANGED) for key, found in self._found.items() if not isinstance(found, str)])
        self._scorers[name] = scorer
        self._wanted = {}
        for signal, known in self._scorers.items():
            places: dict[str, list[int]] = {}
            for i, point in enumerate(known.points):
                places.setdefault(self.place_of(point, known.signal.input), []).append(i)
            for place, points in places.items():
                numbers = tuple(number for number, point in enumerate(known.described) if point in points)
                self._wanted.setdefault(place, []).append((signal, tuple(points), numbers))

    # -- calibrating ---------------------------------------------------------------------------------------------

    def start_calibration(self, points: Sequence[Point], signal: Signal) -> None:
        """Keeps the hidden vectors of prompts without a signal at these points, until `end_calibration` is called."""
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
                raise ModelError(f"calibration text {key}: the model was run without reading {', '.join(silent)}")
        return [texts.get(key, {}) for key in keys]

    # -- while the model runs ------------------------------------------------------------------------------------

    def begin(self, spans: Sequence[Span], running: Container[str]) -> None:
        """Sets the rows of the next step that belong to probed prompts, after completing the step before.

        Args:
            running: vLLM's ids of the requests that have not ended. What is known of probes that were aborted is freed.
        """
        self._end_step()
        for key in [key for key, one in self._probes.items() if one.span.request not in running]:
            del self._probes[key]
        reading: dict[str, list[_Probe]] = {}
        for span in spans:
            probe = self._probes.get(span.key)
            if probe is None or probe.seen != span.start:  # a new prompt, or a preempted one
                probe = self._probes[span.key] = self._begun(span)
            probe.span = span
            if span.signal and span.signal not in self._scorers:
                probe.failure = f"nothing is scored by the signal {span.signal!r} here"
            elif span.signal and probe.scorer is not self._scorers[span.signal]:
                probe.failure = CHANGED
            if probe.failure is None and self._how(span.signal) is not None and span.end > probe.first:
                reading.setdefault(span.signal, []).append(probe)
        for signal, probes in reading.items():
            self._steps[signal] = _Step.of(probes, self._device)
        for span in spans:  # last, so that after an error above, no prompt counts as read
            self._probes[span.key].seen = span.end

    def _how(self, signal: str) -> Signal | None:
        """How a signal reads; without a name, how the texts of a calibration are read."""
        if not signal and self._calibrating is not None:
            return self._calibrating[0]
        return self._scorers[signal].signal if signal in self._scorers else None

    def _begun(self, span: Span) -> _Probe:
        """A prompt whose first tokens are run now."""
        how = self._how(span.signal)
        first = 0 if how is None else how.begin(span.prompt)
        if how is not None and how.token == "tail" and not span.signal:  # of texts, what stands before that, too
            first = int(span.total > 1)
        probe = _Probe(span, first, self._scorers.get(span.signal), span.start)
        if span.start:
            probe.failure = f"the model was run without the first {span.start} tokens of the prompt"
        return probe

    def _end_step(self) -> None:
        """Scores the prompts that the last step has completed, and drops them. Prompts fail here if a compiler or a
        captured graph has left a tap out, since their scores would be wrong without any sign of it."""
        steps, self._steps = self._steps, {}
        for probe in (one for step in steps.values() for one in step.probes):
            added, probe.added = probe.added, set()
            points = () if probe.scorer is None else probe.scorer.points  # without a scorer, of a calibration
            silent = [point.name for i, point in enumerate(points) if i not in added]
            if silent:
                probe.failure = probe.failure or f"the model was run without reading {', '.join(silent)}"
        for key, probe in [(key, one) for key, one in self._probes.items() if one.seen == one.span.total]:
            del self._probes[key]
            self._found[key] = self._outcome(probe)
            if probe.kept:
                self._texts[key] = {place: torch.cat(parts) for place, parts in probe.kept.items()}
        while len(self._found) > _MOST_WAITING:
            self._found.popitem(last=False)

    def _outcome(self, probe: _Probe) -> list[float] | str:
        if probe.failure is not None or not probe.span.signal:
            return probe.failure or []
        try:
            return self._scores(probe)
        except Exception as error:  # one prompt's failure is its own
            return str(error) if isinstance(error, NotFinite) else f"{type(error).__name__}: {error}"

    def active(self, place: str) -> bool:
        """Whether anything is read at this place in the current step."""
        if not self._steps:
            return False
        return any(signal in self._steps for signal, *_ in self._wanted.get(place, ())) or (
            "" in self._steps and self._calibrating is not None and place in self._calibrating[1]
        )

    def tap(self, place: str, entering: Tensor, gather: Gather | None = None) -> None:
        """Called by the model with the hidden vectors that enter a place: (rows, d), or this rank's part of them."""
        try:
            if "" in self._steps and self._calibrating is not None and place in self._calibrating[1]:
                step = self._steps[""]
                hidden, owners = _picked(entering, step.rows, gather).cpu(), step.owners.cpu()
                for number, probe in enumerate(step.probes):
                    probe.kept.setdefault(place, []).append(hidden[owners == number])
            for signal, points, described in self._wanted.get(place, ()):
                if signal in self._steps:
                    self._add(signal, points, described, self._steps[signal], entering, gather)
        except Exception as error:  # raising here would end the engine and every answer with it
            reason = f"{type(error).__name__}: {error}"
            for probe in (one for step in self._steps.values() for one in step.probes):
                probe.failure = probe.failure or reason

    def _add(
        self,
        signal: str,
        points: Sequence[int],
        described: Sequence[int],
        step: _Step,
        entering: Tensor,
        gather: Gather | None,
    ) -> None:
        scorer = self._scorers[signal]
        hidden = _picked(entering, step.rows, gather)
        for i in points:
            step.add(i, hidden if scorer.signal.token == "mean" else scorer.signal(scorer.indices[i], hidden))
        for number in described:
            step.add(len(scorer.points) + number, hidden)

    # -- afterwards ----------------------------------------------------------------------------------------------

    def take(self, keys: Sequence[str]) -> dict[str, list[float] | str]:
        """The scores of these prompts per adapter (-inf for adapters that were not to be selected), or why there are
        none. Prompts that were taken are dropped."""
        self._end_step()
        taken: dict[str, list[float] | str] = {}
        for key in keys:
            probe = self._probes.pop(key, None)
            missing = "the prompt was not run as a probe"
            if probe is not None:
                missing = probe.failure or f"only {probe.seen} of {probe.span.total} tokens were run"
            taken[key] = self._found.pop(key, missing)
        return taken

    def _scores(self, probe: _Probe) -> list[float] | str:
        scorer = self._scorers[probe.span.signal]
        signal = scorer.signal
        if probe.scorer is not scorer:
            return CHANGED
        responses = [probe.means[i] for i in range(len(scorer.points))]  # (2, adapters)
        if signal.token == "mean":
            responses = [signal(index, mean[:1]) for index, mean in zip(scorer.indices, responses, strict=True)]
        # The readings of all points: the even ones, then the late ones.
        per_point = [
            finished(one[kind : kind + 1], signal.scale) for kind in range(signal.readings) for one in responses
        ]
        descriptions = [probe.means[len(scorer.points) + i][None] for i in range(len(scorer.described))]
        if signal.token == "mean":  # where one vector of a prompt is scored, it is both means of the description
            descriptions = [one[:, :1].expand(-1, 2, -1) for one in descriptions]
        read = torch.tensor([probe.span.total - probe.first])
        found = scorer.scores(per_point, descriptions, read, [probe.span.among])
        scores: list[float] = found[0].tolist()
        return scores


def _picked(entering: Tensor, rows: Tensor, gather: Gather | None) -> Tensor:
    """The hidden vectors of these rows, joined over all ranks: (n, d) float32."""
    picked = entering.reshape(-1, entering.shape[-1]).index_select(0, rows)
    return (picked if gather is None else gather(picked)).float()
