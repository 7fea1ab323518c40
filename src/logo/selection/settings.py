"""`SelectionSettings`: how prompts are read, scored and selected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from os import PathLike
from typing import Any, Literal, get_args

from logo.adapters.activation import OFF, Activation, check_forced, check_without
from logo.adapters.sources import ExamplesUse
from logo.errors import UsageError, check_type, closest
from logo.prompts import ProbeText, check_probe_text
from logo.selection.selector import UNSURE
from logo.selection.signals import ProbeToken, Signal, Weighting, WhenUnsure, get_signal

# The depth of a probe, as a share of the layers, if the prompt is read again under its mixture.
DEPTH = 0.5

ProbeContext = Literal["base", "pool", "carry"]
Unscorable = Literal["error", "skip"]


@dataclass(frozen=True)
class SelectionSettings:
    """How prompts are read, scored and selected. None means the default of the signal (`logo.selection.signals`).

    Attributes:
        signal: `"calibrated"`, the official `"norm"` or `"entropy"`, or any other registered signal.
        k: adapters per prompt; None: `AdapterPool.default_k`, or all of a smaller pool.
        weighting: how scores become weights: `"linear"` (official), or `"adaptive"`, a softmax that is sharper and
            stronger the surer the selection is. See `logo.selection.selector`.
        when_unsure: what answers a prompt for which no adapter seems to be made (`logo.selection.confidence`): `"mix"`,
            the mixture of the weighting; `"base"`, the base model alone; `"refuse"`, an error.
        unsure_below: the confidence below which a selection counts as unsure, for `when_unsure` and in a server's log.
        examples: whether example prompts of adapters are used (`logo.selection.signature`): `"use"` or `"ignore"`.
        probe_context: the adapters that are active while probing: `"base"`, none; `"pool"`, all, unscaled; `"carry"`,
            as the official code runs: all for the first prompt, then those that the last prompt selected.
        probe_text: the part of a conversation that is probed: the `"last_user"` message, all messages of the user
            (`"conversation"`), or `"all"`; see `logo.prompts.chat`. None: `"all"` if no adapter of the pool acts
            everywhere and some have an invocation, else `"last_user"`.
        calibration_prompts: unlabelled prompts, like those to come, by which points are ranked; None: our own.
        cache: folder for calibrations; `""`: no cache; None: the user's cache.
        prefix_cache_gb: memory (10⁹ bytes) for prefixes of prompts, so that a common prefix is probed once.
        activation: where all adapters act: `"everywhere"`, `"last:N"`, or `"invocation"`; None: each where it was
            trained to act. See `logo.adapters.activation`.
        when_not_invoked: what an adapter does in a prompt without its invocation tokens: `"off"`, nothing, as in PEFT;
            `"last:N"`; or `"error"`.
        activations: the activations of the pool, if no adapter acts everywhere. The engine sets it, not the user.
        unscorable: `"error"` refuses a pool with adapters that do not touch what is probed; `"skip"` never selects
            such adapters, which can still be forced.
    """

    signal: str = "calibrated"
    k: int | None = None
    weighting: Weighting | None = None
    when_unsure: WhenUnsure = "mix"
    unsure_below: float = UNSURE
    examples: ExamplesUse = "use"
    probe_context: ProbeContext = "base"
    probe_text: ProbeText | None = None
    calibration_prompts: Sequence[str] | None = None
    cache: str | None = None
    prefix_cache_gb: float = 0.25
    unscorable: Unscorable = "error"
    activation: str | None = None
    when_not_invoked: str = OFF
    activations: tuple[Activation, ...] = ()

    def __post_init__(self) -> None:
        self._check_types()
        get_signal(self.signal)
        check_probe_text(self.probe_text)
        check_forced(self.activation)
        check_without(self.when_not_invoked)
        if self.k is not None and self.k <= 0:
            raise UsageError(f"number of selected adapters (k): expected 1 or more, found {self.k}")
        choices: tuple[tuple[str, Any], ...] = (
            ("weighting", Weighting),
            ("when_unsure", WhenUnsure),
            ("examples", ExamplesUse),
            ("probe_context", ProbeContext),
            ("unscorable", Unscorable),
        )
        for name, choice in choices:
            value, allowed = getattr(self, name), get_args(choice)
            if value is not None and value not in allowed:
                raise UsageError(f"{name}: expected one of {', '.join(allowed)}, found {value!r}")
        if not 0 <= self.unsure_below <= 1:
            raise UsageError(f"unsure_below: expected a confidence from 0 to 1, found {self.unsure_below}")
        if not 0 <= self.prefix_cache_gb < float("inf"):
            raise UsageError(f"prefix_cache_gb: expected 0 or more, found {self.prefix_cache_gb}")
        if self.calibration_prompts is not None and len(self.calibration_prompts) < 8:
            raise UsageError(f"calibration_prompts: expected 8 or more, found {len(self.calibration_prompts)}")
        if self.weighting == "adaptive" and self.reading.scale == "raw":
            raise UsageError(f"weighting 'adaptive': the signal {self.signal!r} has no scale of its own; use 'linear'")
        if self.when_unsure != "mix" and self.reading.scale == "raw":
            raise UsageError(
                f"when_unsure {self.when_unsure!r}: the signal {self.signal!r} does not say how sure it is"
            )
        if self.probe_context != "base" and self.reading.scale != "raw":
            raise UsageError(
                f"probe_context {self.probe_context!r}: the signal {self.signal!r} compares with neutral text that the "
                "base model read alone; use 'base'"
            )

    def _check_types(self) -> None:
        if self.k is not None:
            check_type("k", self.k, Integral, "a whole number")
        for name in ("unsure_below", "prefix_cache_gb"):
            check_type(name, getattr(self, name), Real, "a number")
        check_type("when_not_invoked", self.when_not_invoked, str, "off, error or last:N")
        if self.cache is not None:
            check_type("cache", self.cache, (str, PathLike), "a folder")
        if self.calibration_prompts is not None:
            check_type("calibration_prompts", self.calibration_prompts, (list, tuple), "a list of texts")
            for text in self.calibration_prompts:
                check_type("calibration_prompts", text, str, "texts")

    @property
    def depth(self) -> float:
        """How far the probe may go, as a share of the layers."""
        return 1.0 if self.activations else DEPTH

    @property
    def reading(self) -> Signal:
        """The signal with these settings applied."""
        signal = get_signal(self.signal)
        token: ProbeToken = "tail" if self.activations and signal.token == "each" else signal.token
        weighting = self.weighting or signal.weighting
        return replace(signal, token=token, activations=self.activations, weighting=weighting)

    def for_call(
        self, *, k: int | None = None, signal: str | None = None, weighting: Weighting | None = None
    ) -> SelectionSettings:
        """These settings with the options of one call; see `logo.selecting.CallOptions`.

        Raises:
            UsageError: an option that cannot be used, or not with these settings.
        """
        options: dict[str, Any] = {"k": k, "signal": signal, "weighting": weighting}
        given = {name: value for name, value in options.items() if value is not None}
        if signal is not None and signal != self.signal:
            # Settings for the scores of one signal do not apply to those of another.
            unsure = "mix" if get_signal(signal).scale == "raw" else self.when_unsure
            given = {"weighting": None, "when_unsure": unsure, **given}
        return replace(self, **given) if given else self

    @property
    def changed(self) -> dict[str, Any]:
        """The settings that differ from the defaults, for another process: `SelectionSettings.of(**changed)`."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}

    @classmethod
    def of(cls, **settings: Any) -> SelectionSettings:
        """Settings by keyword, with a did-you-mean for unknown ones."""
        known = [field.name for field in fields(cls)]
        for name in settings:
            if name not in known:
                raise UsageError(f"unknown setting {name!r}{closest(name, known)}; known: {', '.join(known)}")
        return cls(**settings)
