"""`SelectionSettings`: how an engine reads, scores and selects; and the checked `Options` of one call."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from os import PathLike
from typing import Any, Literal

from logo.adapters.activation import check_forced
from logo.adapters.pool import AdapterPool
from logo.adapters.sources import ExamplesUse
from logo.core import CallOptions, Options, ProbeText, Weighting, WhenUnsure
from logo.errors import UsageError, check_choice, check_type, closest
from logo.selection.selector import PRIOR, UNSURE, checked_name
from logo.selection.signals import Signal, get_signal
from logo.selection.texts import USUAL_WINDOW, WHOLE, Window

Unscorable = Literal["error", "skip"]
# Which adapters are active while probing: none; all, unscaled; or, as the official code runs, all for the first prompt,
# then those that the last prompt selected.
ProbeContext = Literal["base", "pool", "carry"]

OPTIONS = tuple(CallOptions.__annotations__)  # of one call


@dataclass(frozen=True)
class SelectionSettings:
    """How prompts are read, scored and selected.

    Attributes:
        signal: `"calibrated"`, the official `"norm"` or `"entropy"`, or any other registered signal.
        k: adapters per prompt; None: `AdapterPool.default_k`, or all of a smaller pool.
        weighting: `"linear"` (official) or `"adaptive"`, see `logo.selection.selector`; None: the signal's own.
        when_unsure: what answers a prompt for which no adapter seems to be made (`logo.selection.selector`): `"mix"`,
            the mixture of the weighting; `"base"`, the base model alone; `"refuse"`, an error.
        unsure_below: the confidence below which a selection counts as unsure, for `when_unsure` and in a server's log.
        prior: how likely it is that a prompt belongs to some adapter of the pool, in (0, 1): the confidence before any
            prompt is seen. A lower one makes selections less sure, and their mixtures broader.
        examples: whether example prompts of adapters are used (`logo.selection.examples`): `"use"` or `"ignore"`.
        encoder: a text encoder that reads prompts and example prompts, too (`logo.selection.encoder`): a folder or a
            Hub id of sentence-transformers, such as `"all-MiniLM-L6-v2"`; None: none.
        window: how many of the first and of the last tokens of a text are read, `(32, 32)`; or `"whole"`. None:
            `"whole"` for signals of the paper's kind (scale `"raw"`), `(32, 32)` for all others.
        probe_text: the part of a conversation that is probed: the `"last-user"` message, all messages of the user
            (`"conversation"`), or `"all"`; see `logo.prompts.chat`. None: `"all"` if no adapter of the pool acts
            everywhere and some have an invocation, else `"last-user"`.
        calibration_prompts: unlabelled prompts, like those to come, by which points are ranked; None: our own.
        cache: folder for calibrations; `""`: no cache; None: the user's cache.
        unscorable: `"error"` refuses a pool with adapters that do not touch what is probed; `"skip"` never selects
            such adapters, which can still be forced.
        activation: where all adapters act: `"everywhere"`, `"last:N"`, or `"invocation"`; None: each where it was
            trained to act. See `logo.adapters.activation`.

    Raises:
        UsageError: a value that cannot be used, or not with this signal.
    """

    signal: str = "calibrated"
    k: int | None = None
    weighting: Weighting | None = None
    when_unsure: WhenUnsure = "mix"
    unsure_below: float = UNSURE
    prior: float = PRIOR
    examples: ExamplesUse = "use"
    encoder: str | None = None
    window: Window | None = None
    probe_text: ProbeText | None = None
    calibration_prompts: Sequence[str] | None = None
    cache: str | None = None
    unscorable: Unscorable = "error"
    activation: str | None = None

    def __post_init__(self) -> None:
        check_forced(self.activation)
        _check_k(self.k)
        check_type("unsure_below", self.unsure_below, Real, "a number")
        if not 0 <= self.unsure_below <= 1:
            raise UsageError(f"unsure_below: expected a confidence from 0 to 1, found {self.unsure_below}")
        _check_prior(self.prior)
        check_choice("when_unsure", self.when_unsure, WhenUnsure)
        check_choice("examples", self.examples, ExamplesUse)
        if self.encoder is not None:
            check_type("encoder", self.encoder, (str, PathLike), "a folder, or a Hub id of sentence-transformers")
            object.__setattr__(self, "encoder", str(self.encoder))
        if self.probe_text is not None:
            check_choice("probe_text", self.probe_text, ProbeText)
        check_choice("unscorable", self.unscorable, Unscorable)
        if self.cache is not None:
            check_type("cache", self.cache, (str, PathLike), "a folder")
        object.__setattr__(self, "window", _checked_window(self.window))
        if self.calibration_prompts is not None:
            _check_calibration_prompts(self.calibration_prompts)
        raw = get_signal(self.signal).scale == "raw"
        _check_weighting(self.weighting, self.signal, raw)
        _check_unsure(self.when_unsure, self.signal, raw)

    def signal_for(self, pool: AdapterPool, signal: str | None = None) -> Signal:
        """A registered signal (None: the engine's own) as it reads a pool: with the window, and the tokens on which
        adapters act."""
        registered = get_signal(self.signal if signal is None else signal)
        if not pool.read_once:
            usual = WHOLE if registered.scale == "raw" else USUAL_WINDOW
            return replace(registered, window=self.window or usual)
        # Such a pool reads the prompt as its answer does, and only the tokens on which adapters act.
        token = "tail" if registered.token == "each" else registered.token
        return replace(registered, token=token, window=WHOLE, activations=pool.activations)

    def k_of(self, pool: AdapterPool) -> int:
        """How many adapters of a pool a mixture has."""
        return min(self.k or pool.default_k, len(pool))

    def options(self, pool: AdapterPool, given: Mapping[str, Any]) -> Options:
        """Checks the options of one call (`OPTIONS`) against the pool. What is not given, or None, is as in these
        settings; but the weighting of another signal is its own.

        Raises:
            UsageError: an option that does not exist or cannot be used, or no candidate at all.
            PoolError: a candidate that is not in the pool.
        """
        for option in given:
            if option not in OPTIONS:
                raise UsageError(f"unknown option {option!r}{closest(option, OPTIONS)}; known: {', '.join(OPTIONS)}")
        names = given.get("candidates")
        candidates = None if names is None else _candidates(names, pool)
        k = given.get("k")
        _check_k(k)
        if k is not None:
            size = len(pool if candidates is None else candidates)
            if k > size:
                warnings.warn(f"k is {k} but the pool has {size} adapters: all of them are used", stacklevel=3)
                k = size
        name: str = self.signal if given.get("signal") is None else given["signal"]
        signal = get_signal(name)
        raw = signal.scale == "raw"
        weighting = given.get("weighting")
        if weighting is not None:
            _check_weighting(weighting, name, raw)
        elif name == self.signal:  # a setting for the scores of one signal does not apply to those of another
            weighting = self.weighting
        prior = given.get("prior")
        if prior is not None:
            _check_prior(prior)
        when_unsure = given.get("when_unsure")
        if when_unsure is not None:
            check_choice("when_unsure", when_unsure, WhenUnsure)
            _check_unsure(when_unsure, name, raw)
        return Options(
            signal=name,
            k=self.k if k is None else k,
            weighting=weighting or signal.weighting,
            when_unsure=when_unsure or ("mix" if raw else self.when_unsure),
            unsure_below=self.unsure_below,
            prior=self.prior if prior is None else prior,
            candidates=candidates,
        )

    @property
    def changed(self) -> dict[str, Any]:
        """The settings that differ from the defaults, for another process: `SelectionSettings.of(**changed)`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {field.name: values[field.name] for field in fields(self) if values[field.name] != field.default}

    @classmethod
    def of(cls, **settings: Any) -> SelectionSettings:
        """Settings by keyword, with a did-you-mean for unknown ones."""
        names = [field.name for field in fields(cls)]
        for name in settings:
            if name not in names:
                raise UsageError(f"unknown setting {name!r}{closest(name, names)}; known: {', '.join(names)}")
        return cls(**settings)


def check_context(context: ProbeContext, signal: str) -> None:
    """UsageError for a context that does not exist, or that the signal cannot be read in."""
    check_choice("probe_context", context, ProbeContext)
    if context != "base" and get_signal(signal).scale != "raw":
        why = f"the signal {signal!r} compares with neutral text that the base model read alone"
        raise UsageError(f"probe_context {context!r}: {why}; use 'base'")


def _checked_window(window: Any) -> Window | None:
    """The window, where JSON's list is a pair; None: the usual one. Raises UsageError if it is none."""
    if window is None:
        return None
    if window == WHOLE:
        return WHOLE
    pair = isinstance(window, (list, tuple)) and len(window) == 2 and all(type(count) is int for count in window)
    if not pair or min(window) < 0 or sum(window) == 0:
        found = tuple(window) if isinstance(window, list) else window
        raise UsageError(f"window: expected {WHOLE} or (first tokens, last tokens), found {found!r:.60}")
    head, tail = window
    return head, tail


def _check_calibration_prompts(prompts: Any) -> None:
    check_type("calibration_prompts", prompts, (list, tuple), "a list of texts")
    for text in prompts:
        check_type("calibration_prompts", text, str, "texts")
    texts = [text for text in prompts if text.strip()]
    if len(texts) < 8:
        raise UsageError(f"calibration_prompts: expected 8 or more, found {len(texts)} that are not blank")


def _candidates(names: Any, pool: AdapterPool) -> frozenset[str]:
    """The names that a call gives as candidates, which are all in the pool."""
    check_type("candidates", names, (str, Collection), "names of adapters")
    listed = [names] if isinstance(names, str) else list(names)
    for name in listed:
        check_type("candidates", name, str, "names of adapters, the same for all prompts")
    if not listed:
        raise UsageError("candidates: expected one adapter or more, found none; `adapters={}` uses none")
    return frozenset(checked_name(name, pool) for name in listed)


def _check_k(k: Any) -> None:
    if k is not None:
        check_type("k", k, Integral, "a whole number")
        if k <= 0:
            raise UsageError(f"number of selected adapters (k): expected 1 or more, found {k}")


def _check_prior(prior: Any) -> None:
    check_type("prior", prior, Real, "a number")
    if not 0 < prior < 1:
        raise UsageError(f"prior: expected a probability between 0 and 1, found {prior}")


def _check_unsure(when_unsure: WhenUnsure, signal: str, raw: bool) -> None:
    if when_unsure != "mix" and raw:
        raise UsageError(f"when_unsure {when_unsure!r}: the signal {signal!r} does not say how sure it is")


def _check_weighting(weighting: Any, signal: str, raw: bool) -> None:
    if weighting is not None:
        check_choice("weighting", weighting, Weighting)
    if weighting == "adaptive" and raw:
        raise UsageError(f"weighting 'adaptive': the signal {signal!r} has no scale of its own; use 'linear'")
