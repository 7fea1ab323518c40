"""`Selecting`: checks the options of a call, and makes a selection for each of its prompts.

options -> CallSettings          prompts -> (probed in batches) -> scores -> Selection
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypedDict

from torch import Tensor

from logo.adapters.pool import AdapterPool
from logo.decoding import Prompts, batches_by_length, input_device
from logo.errors import LoGoError, PoolError, UsageError, check_type, closest
from logo.mixing import Mixer, Mixture
from logo.prompts import ProbeText, Prompt
from logo.scoring import MAX_TOKENS
from logo.selection.beginnings import Beginnings
from logo.selection.confidence import EXAMPLES, RESPONSES, Evidence
from logo.selection.index import Tell
from logo.selection.scorer import Scorer
from logo.selection.scorers import Scorers
from logo.selection.selector import Forced, Selection, Selector, check_k, forced, known
from logo.selection.settings import SelectionSettings
from logo.selection.signals import Weighting

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# A selection, or the error that the scores of its prompt gave.
Outcome = Selection | LoGoError


class CallOptions(TypedDict, total=False):
    """Options of one call, in place of the engine's settings. None is the same as leaving an option out.

    Attributes:
        k: adapters per prompt.
        signal: any registered signal; it is calibrated when it is first used.
        weighting: how scores become weights; default: as in the engine's settings, or, if the call names another
            signal, that signal's own.
        candidates: the adapters that may be selected; forced ones have to be among them, too.
    """

    k: int | None
    signal: str | None
    weighting: Weighting | None
    candidates: Collection[str] | None


@dataclass(frozen=True)
class CallSettings:
    """The checked options of one call.

    Attributes:
        settings: the engine's settings with the options of the call.
        candidates: the adapters that may be selected; None: all that are scored.
    """

    settings: SelectionSettings
    candidates: frozenset[str] | None = None


class Choosing:
    """Checks the options of calls, and makes selections from scores.

    Args:
        pool: fitted to the model.
        settings: the engine's.
        described: signals to whose scores example prompts contribute.
        sizes: signal -> adapter name -> relative size (`logo.selection.size`).
    """

    _described: frozenset[str] = frozenset()

    def __init__(
        self,
        pool: AdapterPool,
        settings: SelectionSettings,
        described: Collection[str] = (),
        sizes: Mapping[str, Mapping[str, float]] = MappingProxyType({}),
    ) -> None:
        self.pool, self._settings, self._described, self._sizes = pool, settings, frozenset(described), sizes

    def call_settings(self, options: CallOptions) -> CallSettings:
        """Checks the options of one call against the pool.

        Raises:
            UsageError: an option that does not exist or cannot be used, or no candidate at all.
            PoolError: a candidate that is not in the pool.
        """
        given: dict[str, Any] = {**options}
        candidates, among = given.pop("candidates", None), None
        allowed = tuple(CallOptions.__annotations__)
        for name in given:
            if name not in allowed:
                raise UsageError(f"unknown option {name!r}{closest(name, allowed)}; known: {', '.join(allowed)}")
        settings = self._settings.for_call(**given)
        if candidates is not None:
            check_type("candidates", candidates, (str, Collection), "names of adapters")
            names = (candidates,) if isinstance(candidates, str) else candidates
            among = frozenset(known(name, self.pool) for name in names)
            if not among:
                raise UsageError("candidates: expected one adapter or more, found none; `adapters={}` uses none")
        if given.get("k") is not None:
            check_k(given["k"], len(self.pool if among is None else among))
        return CallSettings(settings, among)

    @property
    def probe_text(self) -> ProbeText | None:
        """Which part of a conversation is probed, see `logo.prompts.chat`.

        If no adapter acts everywhere, some have an invocation, and the settings leave it open, it is everything: the
        invocation usually opens the assistant's turn, and the answer reuses what the probe has read.
        """
        invoked = self.pool.read_once and any(one.tokens for one in self.pool.activations)
        return "all" if invoked and self._settings.probe_text is None else self._settings.probe_text

    def choose(self, scores: Tensor, names: Sequence[str], call: CallSettings) -> Selection:
        """The selection that scores (adapters,) give.

        Raises:
            NotFinite: the score of a candidate is NaN or infinite.
            PoolError: no candidate has a score.
        """
        settings = call.settings
        if call.candidates is not None:
            left = [i for i, name in enumerate(names) if name in call.candidates]
            if not left:
                raise PoolError(
                    f"none of the {len(call.candidates)} candidates touches what the signal {settings.signal!r} "
                    "reads: name others, or force one (`adapters`)"
                )
            scores, names = scores[left], [names[i] for i in left]
        k = min(self.pool.default_k if settings.k is None else settings.k, len(names))
        weighting, evidence = settings.reading.weighting, self.evidence(settings)
        selector = Selector(k, weighting, evidence, settings.when_unsure, settings.unsure_below)
        found = selector(scores, names, self.sizes(settings))
        return replace(found, signal=settings.signal)

    def outcome(self, scores: Tensor, names: Sequence[str], call: CallSettings) -> Outcome:
        """What `choose` returns or raises."""
        try:
            return self.choose(scores, names, call)
        except LoGoError as error:
            return error.with_traceback(None)  # its frames hold the scores of the whole batch

    def evidence(self, settings: SelectionSettings) -> Evidence | None:
        """Turns a lead of these settings' scores into a confidence; None if scores have no scale of their own."""
        if settings.reading.scale == "raw":
            return None
        return EXAMPLES if settings.signal in self._described else RESPONSES

    def sizes(self, settings: SelectionSettings) -> Mapping[str, float]:
        """Adapter name -> relative size, as the scorer of these settings knows it."""
        return self._sizes.get(settings.signal, {})


class Selecting(Choosing, ABC):
    """Selects for prompts that were read; a subclass probes them."""

    @abstractmethod
    def outcomes(
        self, rows: Sequence[Prompt], calls: Sequence[CallSettings], batch_size: int, *, answering: bool = False
    ) -> list[Outcome]:
        """One selection per row, or the error that the scores of the row gave.

        Args:
            rows: prompts that were read.
            calls: parallel to `rows`; rows of one signal are probed together.
            batch_size: the most prompts per probe.
            answering: whether the selections are used to answer right away.
        """

    def __call__(
        self, rows: Sequence[Prompt], calls: Sequence[CallSettings], batch_size: int, *, answering: bool = False
    ) -> list[Selection]:
        """As `outcomes`, but raises the first error."""
        selections = []
        for found in self.outcomes(rows, calls, batch_size, answering=answering):
            if isinstance(found, LoGoError):
                raise found
            selections.append(found)
        return selections

    @abstractmethod
    def restart(self) -> None:
        """Forgets earlier prompts on which the next selection would depend."""

    def attempt(self) -> AbstractContextManager[None]:
        """If the block fails, the next selection does not depend on the prompts in it, which may be tried again."""
        return nullcontext()

    def probed_ids(self, rows: Sequence[Prompt]) -> list[Sequence[int]]:
        """The token ids of each prompt that are probed."""
        return [row.ids if self.probe_text == "all" else row.probed for row in rows]

    def mixtures(
        self,
        rows: Sequence[Prompt],
        adapters: Forced | Sequence[Forced | None] | None,
        call: CallSettings,
        batch_size: int,
    ) -> list[Selection]:
        """The mixture of each row: the forced one, or a selection.

        Args:
            adapters: for all rows, or a list with an entry for each.

        Raises:
            UsageError: the list has another length.
            PoolError: a forced adapter that is not in the pool, or not among the candidates.
        """
        wanted = for_each(adapters, len(rows))
        done = {i: forced(entry, self.pool, call.candidates) for i, entry in enumerate(wanted) if entry is not None}
        open_rows = [i for i, entry in enumerate(wanted) if entry is None]
        each = [call] * len(open_rows)
        found = self([rows[i] for i in open_rows], each, batch_size, answering=True)
        done |= zip(open_rows, found, strict=True)
        return [done[i] for i in range(len(rows))]


class Probing(Selecting):
    """Selects by probing a model in this process, from a pool that may change.

    Args:
        model: the base model.
        prompts: pads prompts, and encodes the texts of a calibration.
        mixer: activates adapters while probing.
        settings: how to read, score and select.
        beginnings: the cache of prompt beginnings; see `Scorers`.

    Attributes:
        pool: fitted to the model; set by `take`.
        scorers: of that pool.
    """

    scorers: Scorers

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Prompts,
        mixer: Mixer,
        settings: SelectionSettings,
        beginnings: Beginnings | None = None,
    ) -> None:
        self._model, self._prompts, self._mixer, self._settings = model, prompts, mixer, settings
        self._beginnings = beginnings
        self._carried: tuple[str, ...] | None = None  # the adapters that the last prompt selected

    def prepared(self, pool: AdapterPool) -> Scorers:
        """The scorers of another pool. If there was a pool before, new adapters are calibrated now.

        Raises:
            LoGoError: the pool cannot be scored.
        """
        before = getattr(self, "scorers", None)
        scorers = Scorers(self._model, pool, self._settings, self._prompts.texts, before, beginnings=self._beginnings)
        if before is not None:
            scorers.get(self._settings)
        return scorers

    def take(self, pool: AdapterPool, scorers: Scorers) -> None:
        """Replaces the pool, by one for which `prepared` made the scorers."""
        self.pool, self.scorers = pool, scorers

    def scorer(self, signal: str | None = None, tell: Tell | None = None) -> Scorer:
        """The scorer of a signal (None: the engine's own), which is calibrated first if necessary."""
        return self.scorers.get(self._settings.for_call(signal=signal), tell)

    def outcomes(
        self, rows: Sequence[Prompt], calls: Sequence[CallSettings], batch_size: int, *, answering: bool = False
    ) -> list[Outcome]:
        """One selection or error per row; see `Selecting`.

        Args:
            batch_size: prompts per probe; fewer if they are long (`MAX_TOKENS`), and one with the context `carry`.
            answering: start to load the adapters that are selected.
        """
        probed = self.probed_ids(rows)
        if self._settings.probe_context == "carry":
            return [self._select_carried(row, one) for row, one in zip(probed, calls, strict=True)]
        outcomes: dict[int, Outcome] = {}
        active = self.pool.names if self._settings.probe_context == "pool" else ()
        for signal in dict.fromkeys(one.settings.signal for one in calls):
            members = [i for i, one in enumerate(calls) if one.settings.signal == signal]
            lengths = [len(probed[i]) for i in members]
            for part in self.batches(lengths, batch_size):
                batch = [members[i] for i in part]
                found = self._probe([probed[i] for i in batch], [calls[i] for i in batch], active)
                if answering:  # loaded while the next batch is probed
                    selected = [name for one in found if isinstance(one, Selection) for name in one.adapters]
                    self._mixer.cache.prefetch(self.pool[name] for name in selected)
                outcomes |= zip(batch, found, strict=True)
        return [outcomes[i] for i in range(len(rows))]

    def batches(self, lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
        """Indices of prompts in batches that are probed together."""
        return batches_by_length(lengths, batch_size, tokens=MAX_TOKENS)

    def evidence(self, settings: SelectionSettings) -> Evidence | None:
        """See `Choosing`; the scorers say whether there are example prompts."""
        return super().evidence(settings) if self.scorers.get(settings).signatures is None else EXAMPLES

    def sizes(self, settings: SelectionSettings) -> Mapping[str, float]:
        """See `Choosing`."""
        return self.scorers.get(settings).sizes

    def restart(self) -> None:
        """Forgets earlier prompts, on which `probe_context="carry"` depends."""
        self._carried = None

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """See `Selecting`."""
        before = self._carried
        try:
            yield
        except BaseException:
            self._carried = before
            raise

    def _select_carried(self, row: Sequence[int], call: CallSettings) -> Outcome:
        """Selects as the official code: adapters of the last selection are active at full scale while probing."""
        pool, before = self.pool, self._carried
        active = pool.names if before is None else tuple(name for name in before if name in pool)
        [found] = self._probe([row], [call], active)
        if isinstance(found, Selection):
            self._carried = found.adapters
        return found

    def _probe(
        self,
        rows: Sequence[Sequence[int]],
        calls: Sequence[CallSettings],
        active: tuple[str, ...],
    ) -> list[Outcome]:
        scorer = self.scorers.get(calls[0].settings)  # if it calibrates, no adapter may be active yet
        ids, mask = self._prompts.pad(rows, "right", input_device(self._model))
        with self._mixer.active(self.pool, [Mixture(dict.fromkeys(active, 1.0))]):
            scores = scorer(ids, mask, [one.candidates for one in calls])
        return [self.outcome(row, scorer.names, one) for row, one in zip(scores, calls, strict=True)]


def for_each(adapters: Forced | Sequence[Forced | None] | None, count: int) -> list[Forced | None]:
    """The mixtures that are forced on so many prompts.

    Raises:
        UsageError: it is no list, or has another length.
    """
    if adapters is None or isinstance(adapters, (Mapping, Selection)):
        return [adapters] * count
    check_type("adapters", adapters, (list, tuple), "{name: weight}, a Selection, or a list of these")
    if len(adapters) != count:
        raise UsageError(f"adapters: expected one entry for each of {count} prompts, found {len(adapters)}")
    return list(adapters)


def take_call_options(options: dict[str, Any], adapters: Forced | Sequence[Forced | None] | None) -> CallOptions:
    """Removes the options of the selection from those of a call, and returns them.

    Raises:
        UsageError: an option of the selection, although a mixture is forced on every prompt.
    """
    taken: Any = {name: options.pop(name) for name in CallOptions.__annotations__ if name in options}
    for name, value in taken.items():
        if value is not None and name != "candidates" and isinstance(adapters, (Mapping, Selection)):
            raise UsageError(f"{name} selects adapters, but `adapters` fixes the mixture: leave out one of the two")
    return taken  # type: ignore[no-any-return]
