"""`SelectionSettings`: how prompts are read, scored and selected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any, Literal, get_args

from logo.adapters.activation import OFF, Activation, check_forced, check_without
from logo.adapters.options import ExamplesUse
from logo.errors import UsageError, check_type, closest
from logo.prompts import ProbeText, check_probe_text
from logo.selection.selector import UNSURE
from logo.selection.signals import SIGNALS, ProbeInput, ProbeToken, Signal, Weighting, WhenUnsure, get_signal

# The depth of a probe, as a share of the layers, if the prompt is read again under its mixture.
DEPTH = 0.5
_WHOLE = ("k", "index_rank", "index_left")
_NUMBERS = ("weight_temperature", "keep_mass", "unsure_below", "probe_depth", "prefix_cache_gb")

ProbeContext = Literal["base", "pool", "carry"]
Unscorable = Literal["error", "skip"]
IndexKind = Literal["exact", "two-stage"]
BaselineKind = Literal["neutral", "running"]


@dataclass(frozen=True)
class SelectionSettings:
    """How prompts are read, scored and selected. None means the default of the signal (`logo.selection.signals`).

    Attributes:
        signal: `"calibrated"`, the official `"norm"` or `"entropy"`, or any other registered signal.
        k: adapters per prompt; None: `AdapterPool.default_k`, or all of a smaller pool.
        weighting: how scores become weights: `"linear"` (official), `"softmax"`, or `"adaptive"`, a softmax that is
            sharper and stronger the surer the selection is. See `logo.selection.selector`.
        weight_temperature: of `"softmax"`, in units of the score.
        keep_mass: of the k adapters, keep the best ones that together hold this share of the weight.
        when_unsure: what answers a prompt for which no adapter seems to be made (`logo.selection.confidence`): `"mix"`,
            the mixture of the weighting; `"base"`, the base model alone; `"best"`, the best adapter alone; `"refuse"`,
            an error.
        unsure_below: the confidence below which a selection counts as unsure, for `when_unsure` and in a server's log.
        examples: whether example prompts of adapters are used (`logo.selection.signature`): `"use"` or `"ignore"`.
        probe_context: the adapters that are active while probing: `"base"`, none; `"pool"`, all, unscaled; `"carry"`,
            as the official code runs: all for the first prompt, then those that the last prompt selected.
        probe_input: `"residual"` (entering the layer, before its norm) or `"projection"` (what the module receives).
        probe_token: the `"last"` prompt token; the `"mean"` over all; `"each"` but the first, with averaged scores; or
            `"tail"`: each token on which adapters act, which replaces `"each"` for a pool of activated adapters.
        probe_text: the part of a conversation that is probed: the `"last_user"` message, all messages of the user
            (`"conversation"`), or `"all"`; see `logo.prompts.chat`. None: `"all"` if no adapter of the pool acts
            everywhere and some have an invocation, else `"last_user"`.
        probe_layer: `"last"`, an index, or several, over which scores are averaged.
        probe_module: the module to read, by name; default: the query projection.
        probe_depth: the share of the layers that the probe may run, if the signal reads several points; None: all
            layers if the probe is the prefill, too (activated adapters), else half of them.
        probe_points: the most points that a signal may choose; or the points, as `"4.v_proj"` or full module paths.
        baseline: the reference of calibrated signals: `"neutral"` text; or `"running"`, which also subtracts how much
            more than others each adapter has responded to earlier prompts, by at most one standard deviation
            (`logo.selection.drift`). Scores then depend on earlier prompts.
        calibration_prompts: unlabelled prompts, like those to come, by which points are ranked; None: our own.
        cache: folder for calibrations and scoring indices; `""`: no cache; None: the user's cache.
        prefix_cache_gb: memory (10⁹ bytes) for prefixes of prompts, so that a common prefix is probed once.
        index: `"exact"` scores every adapter; `"two-stage"` finds those that can be among the best first, and scores
            only these, for very many adapters (docs/many-adapters.md).
        index_rank: rows that the first of two stages keeps of each adapter.
        index_left: adapters that the first stage leaves if it only estimates (calibrated signals); None: 16 for each
            selected one, and at least 256.
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
    weight_temperature: float = 0.5
    keep_mass: float | None = None
    when_unsure: WhenUnsure = "mix"
    unsure_below: float = UNSURE
    examples: ExamplesUse = "use"
    probe_context: ProbeContext = "base"
    probe_input: ProbeInput | None = None
    probe_token: ProbeToken | None = None
    probe_text: ProbeText | None = None
    probe_layer: int | str | Sequence[int | str] | None = None
    probe_module: str | None = None
    probe_depth: float | None = None
    probe_points: int | Sequence[str] | None = None
    baseline: BaselineKind = "neutral"
    calibration_prompts: Sequence[str] | None = None
    cache: str | None = None
    prefix_cache_gb: float = 0.25
    unscorable: Unscorable = "error"
    index: IndexKind = "exact"
    index_rank: int = 2
    index_left: int | None = None
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
            ("probe_input", ProbeInput),
            ("probe_token", ProbeToken),
            ("baseline", BaselineKind),
            ("unscorable", Unscorable),
            ("index", IndexKind),
        )
        for name, choice in choices:
            value, allowed = getattr(self, name), get_args(choice)
            if value is not None and value not in allowed:
                raise UsageError(f"{name}: expected one of {', '.join(allowed)}, found {value!r}")
        if not 0 < self.weight_temperature < float("inf"):
            raise UsageError(f"weight_temperature: expected a number above 0, found {self.weight_temperature}")
        if self.keep_mass is not None and not 0 < self.keep_mass <= 1:
            raise UsageError(f"keep_mass: expected a share above 0 and up to 1, found {self.keep_mass}")
        if not 0 <= self.unsure_below <= 1:
            raise UsageError(f"unsure_below: expected a confidence from 0 to 1, found {self.unsure_below}")
        if self.probe_depth is not None and not 0 < self.probe_depth <= 1:
            raise UsageError(
                f"probe_depth: expected a share of the layers above 0 and up to 1, found {self.probe_depth}"
            )
        if not 0 <= self.prefix_cache_gb < float("inf"):
            raise UsageError(f"prefix_cache_gb: expected 0 or more, found {self.prefix_cache_gb}")
        if isinstance(self.probe_points, int) and self.probe_points <= 0:
            raise UsageError(f"probe_points: expected 1 or more, or names of points, found {self.probe_points}")
        if not isinstance(self.probe_points, int | None) and (self.probe_layer, self.probe_module) != (None, None):
            raise UsageError("probe_points names layers and modules: leave out probe_layer and probe_module")
        if self.calibration_prompts is not None and len(self.calibration_prompts) < 8:
            raise UsageError(f"calibration_prompts: expected 8 or more, found {len(self.calibration_prompts)}")
        if self.weighting == "adaptive" and self.reading.scale == "raw":
            raise UsageError(f"weighting 'adaptive': the signal {self.signal!r} has no scale of its own; use 'softmax'")
        if self.when_unsure != "mix" and self.reading.scale == "raw":
            raise UsageError(
                f"when_unsure {self.when_unsure!r}: the signal {self.signal!r} does not say how sure it is"
            )
        if self.signal == "signature" and self.examples == "ignore":
            raise UsageError("examples 'ignore': the signal 'signature' uses nothing else; use 'calibrated'")
        if self.probe_context != "base" and self.reading.scale != "raw":
            raise UsageError(
                f"probe_context {self.probe_context!r}: the signal {self.signal!r} compares with neutral text that the "
                "base model read alone; use 'base'"
            )
        if self.baseline == "running" and self.reading.scale == "raw":
            raise UsageError(
                f"baseline 'running' (--reference): the signal {self.signal!r} is not compared with neutral text; use "
                "'neutral', or a calibrated signal"
            )
        self._check_index()

    def _check_types(self) -> None:
        for name in (*_WHOLE, *_NUMBERS):
            value = getattr(self, name)
            if value is not getattr(type(self), name):  # the default, which may be None
                whole = name in _WHOLE
                check_type(name, value, Integral if whole else Real, "a whole number" if whole else "a number")
        if isinstance(self.calibration_prompts, str):
            raise UsageError(f"calibration_prompts: expected a list of texts, found {self.calibration_prompts!r:.60}")

    def _check_index(self) -> None:
        for name, value in (("index_rank", self.index_rank), ("index_left", self.index_left)):
            if value is not None and value <= 0:
                raise UsageError(f"{name}: expected 1 or more, found {value}")
        if self.index != "two-stage":
            return
        if not self.reading.norms:
            known = ", ".join(name for name, signal in SIGNALS.items() if signal.norms)
            raise UsageError(
                f"index 'two-stage': the signal {self.signal!r} is no norm; use one of {known}, or 'exact'"
            )
        if self.baseline == "running":
            raise UsageError(
                "index 'two-stage': baseline 'running' (--reference) needs every adapter's score; use 'neutral'"
            )

    @property
    def depth(self) -> float:
        """How far the probe may go, as a share of the layers."""
        if self.probe_depth is not None:
            return self.probe_depth
        return 1.0 if self.activations else DEPTH

    @property
    def reading(self) -> Signal:
        """The signal with these settings applied."""
        signal = get_signal(self.signal)
        token: ProbeToken = "tail" if self.activations and signal.token == "each" else signal.token
        return replace(
            signal,
            input=self.probe_input or signal.input,
            token=self.probe_token or token,
            activations=self.activations,
            weighting=self.weighting or signal.weighting,
        )

    def for_call(
        self,
        *,
        k: int | None = None,
        signal: str | None = None,
        weighting: Weighting | None = None,
        keep_mass: float | None = None,
    ) -> SelectionSettings:
        """These settings with the options of one call; see `logo.selecting.CallOptions`.

        Raises:
            UsageError: an option that cannot be used, or not with these settings.
        """
        options: dict[str, Any] = {"k": k, "signal": signal, "weighting": weighting, "keep_mass": keep_mass}
        given = {name: value for name, value in options.items() if value is not None}
        if signal is not None and signal != self.signal:
            # Settings for the scores of one signal do not apply to those of another.
            raw = get_signal(signal).scale == "raw"
            unsure = "mix" if raw else self.when_unsure
            given = {"weighting": None, "baseline": "neutral" if raw else self.baseline, "when_unsure": unsure, **given}
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
