"""`Selecting`: what one call asks of the selection, and a selection for each of its prompts.

    options -> CallSettings          prompts -> (probed in batches) -> scores -> Selection

Knows nothing about answers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

from torch import Tensor

from logo.adapters.pool import AdapterPool
from logo.decoding import Prompts, batches_by_length, input_device
from logo.errors import PoolError, UsageError, closest
from logo.mixing import EXACT, Mixer
from logo.prompts import Prompt
from logo.scoring import MAX_TOKENS
from logo.selection.beginnings import Beginnings
from logo.selection.confidence import EXAMPLES, RESPONSES, Evidence
from logo.selection.index import Tell
from logo.selection.scorer import NOT_SCORED, Best, Scorer
from logo.selection.scorers import Scorers
from logo.selection.selector import Forced, Selection, Selector, check_k, forced, known
from logo.selection.settings import SelectionSettings
from logo.selection.signals import Weighting

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class CallOptions(TypedDict, total=False):
    """What one call may ask for instead of what the engine's settings say. None is the same as leaving an option out.

    Attributes:
        k: adapters per prompt.
        signal: any registered signal; what it reads beyond the engine's own is read when it is first asked for.
        weighting: how scores become weights; default: as the engine's settings say, but where the call names another
            signal, that signal's own.
        keep_mass: of the k adapters, keep the best ones that together hold this share of the weight.
        candidates: choose among these adapters only; forced ones have to be among them, too.
    """

    k: int | None
    signal: str | None
    weighting: Weighting | None
    keep_mass: float | None
    candidates: Collection[str] | None


@dataclass(frozen=True)
class CallSettings:
    """What one call asks for, checked against the pool and ready to be used.

    Attributes:
        settings: the engine's, with what the call asks for.
        candidates: choose among these only; None: among all that are scored.
    """

    settings: SelectionSettings
    candidates: frozenset[str] | None = None


class Choosing:
    """What calls may ask of one pool, and what scores of its adapters give.

    Args:
        pool: fitted to the model.
        settings: how to select, where a call asks for nothing else.
        described: signals in whose scores example prompts count, too.
    """

    _described: frozenset[str] = frozenset()

    def __init__(self, pool: AdapterPool, settings: SelectionSettings, described: Collection[str] = ()) -> None:
        self.pool, self._settings, self._described = pool, settings, frozenset(described)

    def call_settings(self, options: CallOptions) -> CallSettings:
        """What one call asks for, checked against the pool.

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
            names = (candidates,) if isinstance(candidates, str) else candidates
            among = frozenset(known(name, self.pool) for name in names)
            if not among:
                raise UsageError("candidates: expected one adapter or more, found none; `adapters={}` uses none")
        if given.get("k") is not None:
            check_k(given["k"], len(self.pool if among is None else among))
        return CallSettings(settings, among)

    def wanted(self, call: CallSettings) -> Best:
        """What of the scores of one prompt decides what is chosen."""
        k = self.pool.default_k if call.settings.k is None else call.settings.k
        return Best(k, call.candidates)

    def choose(self, scores: Tensor, names: Sequence[str], call: CallSettings) -> Selection:
        """The selection that scores (adapters,) give. Adapters that are `NOT_SCORED` are left out, and listed nowhere.

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
        if settings.index == "two-stage":
            scored = (scores != NOT_SCORED).nonzero()[:, 0].tolist()
            scores, names = scores[scored], [names[i] for i in scored]
        k = min(self.pool.default_k if settings.k is None else settings.k, len(names))
        weighting, evidence = settings.reading.weighting, self.evidence(settings)
        temperature, mass = settings.weight_temperature, settings.keep_mass
        return Selector(k, weighting, temperature, mass, evidence, settings.when_unsure)(scores, names)

    def evidence(self, settings: SelectionSettings) -> Evidence | None:
        """What a lead of these settings' scores is worth; None where scores have no scale of their own."""
        if settings.reading.scale == "raw":
            return None
        return EXAMPLES if settings.signal in self._described else RESPONSES


class Selecting(Choosing, ABC):
    """Selects for prompts that were read. Where prompts are probed is a subclass's affair."""

    @abstractmethod
    def __call__(
        self,
        rows: Sequence[Prompt],
        calls: Sequence[CallSettings],
        batch_size: int,
        *,
        answering: bool = False,
    ) -> list[Selection]:
        """One selection per row.

        Args:
            rows: prompts that were read.
            calls: parallel to `rows`; those of one signal are probed together.
            batch_size: prompts per probe at most.
            answering: the selections are going to answer at once.
        """

    @abstractmethod
    def restart(self) -> None:
        """Forgets the prompts before, where the next one would depend on them."""

    def mixtures(
        self,
        rows: Sequence[Prompt],
        adapters: Forced | Sequence[Forced | None] | None,
        call: CallSettings,
        batch_size: int,
    ) -> list[Selection]:
        """What answers each row: what is forced, and a selection where nothing is.

        Args:
            adapters: for all rows, or a list with an entry for each.

        Raises:
            UsageError: a list of another length.
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
        prompts: pads them, and reads the texts of a calibration.
        mixer: makes adapters active while probing.
        settings: how to read, score and select, where a call asks for nothing else.
        beginnings: where what the base model reads is kept; see `Scorers`.

    Attributes:
        pool: fitted to the model; there is none before `take`.
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
        self._carried: tuple[str, ...] | None = None  # what the last prompt selected

    def prepared(self, pool: AdapterPool) -> Scorers:
        """Of another pool; where there was one before, what is new is calibrated now. Nothing that selects changes.

        Raises:
            LoGoError: it cannot be scored.
        """
        before, bos = getattr(self, "scorers", None), self._prompts.tokenizer.bos_token_id
        scorers = Scorers(
            self._model, pool, self._settings, self._prompts.texts, bos, before, beginnings=self._beginnings
        )
        if before is not None:
            scorers.get(self._settings)
        return scorers

    def take(self, pool: AdapterPool, scorers: Scorers) -> None:
        """Selects from this pool from now on, with what `prepared` has made of it."""
        self.pool, self.scorers = pool, scorers

    def scorer(self, signal: str | None = None, tell: Tell | None = None) -> Scorer:
        """The scorer of a signal; None: the engine's own. The pool is calibrated for it, if it was not yet."""
        return self.scorers.get(self._settings.for_call(signal=signal), tell)

    def __call__(
        self,
        rows: Sequence[Prompt],
        calls: Sequence[CallSettings],
        batch_size: int,
        *,
        answering: bool = False,
    ) -> list[Selection]:
        """One selection per row, see `Selecting`.

        Args:
            batch_size: prompts per probe, fewer where they are long (`MAX_TOKENS`); with the context `carry` they are
                taken one by one, in order.
            answering: start to read the tensors of what is selected.
        """
        # Where the probe is the prefill, it is the whole prompt that is read.
        once = self.scorers.read_once and self._settings.probe_text is None
        probed = [row.ids if once else row.probed for row in rows]
        if self._settings.probe_context == "carry":
            return [self._select_carried(row, one) for row, one in zip(probed, calls, strict=True)]
        selections: dict[int, Selection] = {}
        active = self.pool.names if self._settings.probe_context == "pool" else ()
        for signal in dict.fromkeys(one.settings.signal for one in calls):
            members = [i for i, one in enumerate(calls) if one.settings.signal == signal]
            for part in batches_by_length([len(probed[i]) for i in members], batch_size, tokens=MAX_TOKENS):
                batch = [members[i] for i in part]
                found = self._probe([probed[i] for i in batch], [calls[i] for i in batch], active)
                if answering:  # their tensors are read while the next batch is probed
                    self._mixer.prefetch(self.pool, [name for selection in found for name in selection.adapters])
                selections |= zip(batch, found, strict=True)
        return [selections[i] for i in range(len(rows))]

    def evidence(self, settings: SelectionSettings) -> Evidence | None:
        """See `Choosing`; example prompts are known here."""
        return super().evidence(settings) if self.scorers.get(settings).signatures is None else EXAMPLES

    def restart(self) -> None:
        """Forgets the prompts before, where the next one would depend on them: `carry`, and a running reference."""
        self._carried = None
        self.scorers.restart()

    def _select_carried(self, row: Sequence[int], call: CallSettings) -> Selection:
        """As the official code runs: what the last prompt selected is still active, at full scale, while probing."""
        pool, before = self.pool, self._carried
        active = pool.names if before is None else tuple(name for name in before if name in pool)
        [selection] = self._probe([row], [call], active)
        self._carried = selection.adapters
        return selection

    def _probe(
        self,
        rows: Sequence[Sequence[int]],
        calls: Sequence[CallSettings],
        active: tuple[str, ...],
    ) -> list[Selection]:
        scorer = self.scorers.get(calls[0].settings)  # a calibration that this brings about reads the base model alone
        ids, mask = self._prompts.pad(rows, "right", input_device(self._model))
        with self._mixer.active(self.pool, [dict.fromkeys(active, 1.0)], merge=EXACT):
            scores = scorer.best(ids, mask, [self.wanted(one) for one in calls])
        return [self.choose(row, scorer.names, one) for row, one in zip(scores, calls, strict=True)]


def for_each(adapters: Forced | Sequence[Forced | None] | None, count: int) -> list[Forced | None]:
    """What is forced on each of so many prompts.

    Raises:
        UsageError: a list of another length.
    """
    if adapters is None or isinstance(adapters, (Mapping, Selection)):
        return [adapters] * count
    if len(adapters) != count:
        raise UsageError(f"adapters: expected one entry for each of {count} prompts, found {len(adapters)}")
    return list(adapters)


def take_call_options(options: dict[str, Any], adapters: Forced | Sequence[Forced | None] | None) -> CallOptions:
    """Takes the options of the selection out of all those of a call.

    Raises:
        UsageError: one that selects, beside a mixture that is forced on every prompt.
    """
    taken: Any = {name: options.pop(name) for name in CallOptions.__annotations__ if name in options}
    for name, value in taken.items():
        if value is not None and name != "candidates" and isinstance(adapters, (Mapping, Selection)):
            raise UsageError(f"{name} says how to select, and `adapters` says what is mixed: leave out one of the two")
    return taken  # type: ignore[no-any-return]
