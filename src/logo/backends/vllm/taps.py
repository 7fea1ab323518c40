"""`Taps`: reads hidden vectors while vLLM's model runs a prompt, and sums up how strongly each adapter responds.

    spans of the step -> (the model calls `tap` at every place that is read) -> sums per prompt -> scores

A place is a linear module of vLLM's model, or a decoder layer whose residual stream is read. Nothing here knows how
requests are scheduled: a runner says which rows of the next step belong to which prompt. Nothing here may raise while
the model runs, since that would end the engine; an error becomes the answer to its prompt.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Container, Mapping, Sequence

import torch
from torch import Tensor

from logo.backends.vllm.kept_vectors import KeptVectors
from logo.backends.vllm.sums import PromptSums, Span, Step
from logo.errors import NotFinite
from logo.selection.emphasis import late_count
from logo.selection.points import Point
from logo.selection.reference import finished
from logo.selection.scorer import Scorer
from logo.selection.settings import SelectionSettings
from logo.selection.signals import Signal

# The most prompts whose outcome is kept until it is taken; nobody takes those of clients that have left.
_MOST_WAITING = 4096

# A failure after which a prompt has to be probed again.
CHANGED = "the pool changed while the prompt was probed"

# Joins the parts of hidden vectors (rows, d / ranks) that the ranks of a tensor parallel group hold to (rows, d).
Gather = Callable[[Tensor], Tensor]


class Taps:
    """Reads hidden vectors at the places that some signal needs.

    Args:
        place_of: maps a point of the base model and `Signal.input` to the place in vLLM's model where it is read.
        device: where the model runs.
    """

    def __init__(self, place_of: Callable[[Point, str], str], device: torch.device) -> None:
        self._place_of = place_of
        self._device = device
        self._scorers: dict[str, tuple[Scorer, Signal]] = {}
        self._calibrating: KeptVectors | None = None
        # place -> for each signal, the numbers of the points and of the descriptions that are read there
        self._wanted: dict[str, list[tuple[str, tuple[int, ...], tuple[int, ...]]]] = {}
        self._prompts: dict[str, PromptSums] = {}  # of probes that run
        self._found: OrderedDict[str, list[float] | str] = OrderedDict()  # outcomes of those that were run whole
        self._steps: dict[str, Step] = {}

    @property
    def places(self) -> frozenset[str]:
        """The places at which the model has to call `tap`."""
        return frozenset(self._wanted) | (frozenset() if self._calibrating is None else self._calibrating.places)

    def score(self, name: str, scorer: Scorer, settings: SelectionSettings) -> None:
        """Installs the scorer of a signal, by which prompts are scored from now on."""
        if name in self._scorers and self._scorers[name][0] is not scorer:  # nobody may select by scores of before
            self._found.update([(key, CHANGED) for key, found in self._found.items() if not isinstance(found, str)])
        self._scorers[name] = scorer, settings.reading
        self._wanted = {}
        for signal, (known, how) in self._scorers.items():
            places: dict[str, list[int]] = {}
            for i, point in enumerate(known.points):
                places.setdefault(self._place_of(point, how.input), []).append(i)
            described = _described_at(known)
            for place, points in places.items():
                numbers = tuple(number for number, point in enumerate(described) if point in points)
                self._wanted.setdefault(place, []).append((signal, tuple(points), numbers))

    # -- calibrating ---------------------------------------------------------------------------------------------

    def start_calibration(self, points: Sequence[Point], signal: Signal) -> None:
        """Records the hidden vectors of prompts without a signal at these points, until `end_calibration` is called."""
        self._calibrating = KeptVectors(signal, {point.module: self._place_of(point, signal.input) for point in points})

    def end_calibration(self) -> KeptVectors | None:
        """Ends `start_calibration` and returns the recorded vectors; None without `start_calibration`."""
        kept, self._calibrating = self._calibrating, None
        return kept

    # -- while the model runs ------------------------------------------------------------------------------------

    def begin(self, spans: Sequence[Span], running: Container[str]) -> None:
        """Sets the rows of the next step that belong to probed prompts, after completing the step before.

        Args:
            running: vLLM's ids of the requests that have not ended. The sums of probes that were aborted are freed.
        """
        self._end_step()
        for key in [key for key, sums in self._prompts.items() if sums.request not in running]:
            del self._prompts[key]
        for span in spans:
            sums = self._prompts.get(span.key)
            if sums is None or sums.seen != span.start:  # a new prompt, or a preempted one
                sums = self._prompts[span.key] = self._begun(span)
                if self._calibrating is not None:
                    self._calibrating.forget(span.key)
            if span.signal and span.signal not in self._scorers:
                sums.failure = f"nothing is scored by the signal {span.signal!r} here"
            elif span.signal and sums.scorer is not self._scorers[span.signal][0]:
                sums.failure = CHANGED
        for signal in dict.fromkeys(span.signal for span in spans):
            how = self._how(signal)
            if how is None:
                continue
            sums_of = ((span, self._prompts[span.key]) for span in spans if span.signal == signal)
            own = [(span, sums) for span, sums in sums_of if sums.failure is None]
            step = Step.of(own, how.token, self._device, self._late(signal, how))
            for span, sums in own:
                sums.read += len(span.read(how.token, sums.unread))
            if step is not None:
                self._steps[signal] = step
        for span in spans:  # last, so that after an error above, no prompt counts as read
            self._prompts[span.key].seen = span.end

    def _how(self, signal: str) -> Signal | None:
        """How a signal reads; without a name, how the texts of a calibration are read."""
        if not signal and self._calibrating is not None:
            return self._calibrating.signal
        return self._scorers[signal][1] if signal in self._scorers else None

    def _late(self, signal: str, how: Signal) -> bool:
        """Whether sums with emphasis on the end are needed, for scores or for descriptions."""
        described = bool(signal and _described_at(self._scorers[signal][0]))
        return how.readings > 1 or (described and how.token != "mean")

    def _begun(self, span: Span) -> PromptSums:
        """The sums of a prompt whose first tokens are run now."""
        scorer, _ = self._scorers.get(span.signal, (None, None))
        sums, how = PromptSums(span.signal, span.total, scorer, span.request, span.among), self._how(span.signal)
        sums.unread, sums.seen = 0 if how is None else span.unread(how), span.start
        if span.start:
            sums.failure = f"the model was run without the first {span.start} tokens of the prompt"
        return sums

    def _end_step(self) -> None:
        """Scores the prompts that the last step has completed, and frees their sums. Prompts fail here if a compiler or
        a captured graph has left a tap out, since their scores would be wrong without any sign of it."""
        steps, self._steps = self._steps, {}
        for step in steps.values():
            for key in step.keys:
                sums = self._prompts.get(key)
                if sums is None or sums.scorer is None:  # without a scorer, of a calibration
                    continue
                added, sums.added = sums.added, set()
                silent = [point.name for i, point in enumerate(sums.scorer.points) if i not in added]
                if silent:
                    sums.failure = sums.failure or f"the model was run without reading {', '.join(silent)}"
        for key, sums in [(key, sums) for key, sums in self._prompts.items() if sums.seen == sums.total]:
            del self._prompts[key]
            self._found[key] = self._outcome(sums)
        while len(self._found) > _MOST_WAITING:
            self._found.popitem(last=False)

    def _outcome(self, sums: PromptSums) -> list[float] | str:
        if sums.failure is not None or not sums.signal:
            return sums.failure or []
        try:
            return self._scores(sums)
        except Exception as error:  # one prompt's failure is its own
            return str(error) if isinstance(error, NotFinite) else f"{type(error).__name__}: {error}"

    def active(self, place: str) -> bool:
        """Whether anything is read at this place in the current step."""
        if not self._steps:
            return False
        return any(signal in self._steps for signal, *_ in self._wanted.get(place, ())) or (
            "" in self._steps and self._calibrating is not None and place in self._calibrating.places
        )

    def tap(self, place: str, entering: Tensor, gather: Gather | None = None) -> None:
        """Called by the model with the hidden vectors that enter a place: (rows, d), or this rank's part of them."""
        try:
            if "" in self._steps and self._calibrating is not None and place in self._calibrating.places:
                self._keep(self._calibrating, place, self._steps[""], entering, gather)
            for signal, points, described in self._wanted.get(place, ()):
                if signal in self._steps:
                    self._add(signal, points, described, self._steps[signal], entering, gather)
        except Exception as error:  # raising here would end the engine and every answer with it
            reason = f"{type(error).__name__}: {error}"
            for step in self._steps.values():
                for key in step.keys:
                    self._prompts[key].failure = self._prompts[key].failure or reason

    # -- afterwards ----------------------------------------------------------------------------------------------

    def take(self, keys: Sequence[str]) -> dict[str, list[float] | str]:
        """The scores of these prompts per adapter (-inf for adapters that were not to be selected), or why there are
        none. Prompts that were taken are dropped."""
        self._end_step()
        taken: dict[str, list[float] | str] = {}
        for key in keys:
            sums = self._prompts.pop(key, None)
            missing = "the prompt was not run as a probe"
            if sums is not None:
                missing = sums.failure or f"only {sums.seen} of {sums.total} tokens were run"
            taken[key] = self._found.pop(key, missing)
        return taken

    def _scores(self, sums: PromptSums) -> list[float] | str:
        scorer, signal = self._scorers[sums.signal]
        if sums.scorer is not scorer:
            return CHANGED
        per_point = []
        for i, index in enumerate(scorer.indices):
            mean = sums.by_point[i] / sums.read
            value = signal(index, mean[None]) if signal.token == "mean" else mean[None]
            per_point.append(finished(value, signal.scale))
        count, weight = len(scorer.points), float(late_count(torch.tensor(sums.read)))
        for i in range(count, count * signal.readings):
            per_point.append(finished((sums.by_point[i] / weight)[None], signal.scale))
        descriptions, places = [], len(_described_at(scorer))
        for number in range(count * signal.readings, count * signal.readings + places):
            even = sums.by_point[number] / sums.read
            late = even if signal.token == "mean" else sums.by_point[number + places] / weight
            descriptions.append(torch.stack([even, late])[None])
        found = scorer.scores(per_point, descriptions, torch.tensor([sums.read]), scorer.among([sums.among]))
        scores: list[float] = found[0].tolist()
        return scores

    def _add(
        self,
        signal: str,
        points: Sequence[int],
        described: Sequence[int],
        step: Step,
        entering: Tensor,
        gather: Gather | None,
    ) -> None:
        scorer, how = self._scorers[signal]
        hidden = _picked(entering, step.rows, gather)
        count, places = len(scorer.points), len(_described_at(scorer))
        for i in points:
            values = hidden if how.token == "mean" else how(scorer.indices[i], hidden)  # (n, adapters) or (n, d)
            self._add_up(step, i, values)
            if how.readings > 1:
                self._add_up(step, count + i, values, late=True)
        for number in described:
            self._add_up(step, count * how.readings + number, hidden)
            if how.token != "mean":
                self._add_up(step, count * how.readings + places + number, hidden, late=True)

    def _add_up(self, step: Step, number: int, values: Tensor, late: bool = False) -> None:
        """Adds values (n, m) of the step's rows to the sums of this number; `late`: with emphasis on the end."""
        if late:
            assert step.weights is not None
            values = values * step.weights.to(values.device)[:, None]
        sums = torch.zeros(len(step.keys), values.shape[1], device=values.device)
        sums.index_add_(0, step.prompts.to(values.device), values)
        for i, key in enumerate(step.keys):
            fade = step.fades[i].to(values.device) if late and step.fades is not None else None
            self._prompts[key].add(number, sums[i], fade)

    def _keep(self, kept: KeptVectors, place: str, step: Step, entering: Tensor, gather: Gather | None) -> None:
        hidden = _picked(entering, step.rows, gather).cpu()
        for prompt, key in enumerate(step.keys):
            kept.add(key, place, hidden[step.prompts.cpu() == prompt])

    def failed(self, keys: Sequence[str]) -> Mapping[str, str]:
        """Drops these texts of a calibration, and returns why some of them cannot be used: key -> reason."""
        return {key: found for key, found in self.take(keys).items() if isinstance(found, str)}


def _described_at(scorer: Scorer) -> tuple[int, ...]:
    """The numbers of the points at which prompts are described. In `PromptSums.by_point`, the sums of hidden vectors
    there follow those of all readings."""
    return () if scorer.signatures is None else scorer.signatures.points


def _picked(entering: Tensor, rows: Tensor, gather: Gather | None) -> Tensor:
    """The hidden vectors of these rows, joined over all ranks: (n, d) float32."""
    picked = entering.reshape(-1, entering.shape[-1]).index_select(0, rows)
    return (picked if gather is None else gather(picked)).float()
