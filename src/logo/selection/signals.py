"""Signals: how strongly each adapter responds, as pure functions from an index and hidden vectors to scores.

`norm` and `entropy` are those of the paper (arXiv 2511.07129, section 3) with the constants of the authors' code.
docs/how-selection-works.md explains all signals, docs/extend.md how others register theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, Protocol, TypeVar

import torch
from torch import Tensor

from logo.adapters.activation import Activation, earliest
from logo.core import Weighting
from logo.errors import PluginError, check_choice, check_type
from logo.plugins import Registry, running
from logo.selection.index import ScoringIndex
from logo.selection.texts import WHOLE, Window

ProbeInput = Literal["residual", "projection"]
ProbeToken = Literal["last", "each", "tail"]
Scale = Literal["raw", "zscore", "whitened"]
Layers = Literal["last", "early"]


class SignalFunction(Protocol):
    """What a signal computes: a pure function of tensors, without state."""

    def __call__(self, index: ScoringIndex, hidden: Tensor, /) -> Tensor:
        """One score for each hidden vector and each adapter; the adapters with the highest scores are selected.

        Args:
            index: the `len(index)` adapters that touch one point (a linear module of one layer), in pool order.
                `index.norms(hidden)` gives `‖ΔW_i h‖₂` (n, adapters), `index.responses(hidden)` the vectors `ΔW_i h`
                themselves, in chunks (n, adapters of the chunk, d_out). All are float32 on `index.device`.
            hidden: (n, d), vectors at this point, in the model's dtype: one per prompt, or one per token.

        Returns:
            (n, adapters), float32, finite. A row depends on its own hidden vector alone. There is no unit: with the
            scale `"raw"`, scores of adapters are compared as they are; with `"zscore"`, each with its own mean and
            standard deviation on neutral text; with `"whitened"`, likewise, the logarithms of positive scores.

        Raises:
            LoGoError: what the user can fix; anything else is taken for a bug of the signal.
        """


_S = TypeVar("_S", bound=SignalFunction)


@dataclass(frozen=True)
class Signal:
    """A score function and its usual reading.

    Attributes:
        score: one score per hidden vector and adapter.
        layers: `"last"`, the query projection of the last layer, or `"early"`, all adapted modules of the first half.
        input: see `logo.selection.probe.Probe`.
        token: `"last"`, the vector of the last prompt token; `"each"`, the vectors of all prompt tokens but the first;
            or `"tail"`, those of the tokens on which adapters act. With the last two, scores are averaged over the
            tokens.
        scale: what responses are compared with: `"raw"`, those of others; `"zscore"`, the adapter's own responses to
            neutral text; `"whitened"`, likewise, of whitened hidden vectors.
        chosen: use the points on which this pool's adapters differ most, instead of all.
        weighting: how scores become weights.
        late: responses are averaged with the last tokens counting most, too (`logo.selection.reference`).
        window: the part of a text that is read (`SelectionSettings.signal_for` sets it).
        activations: where the adapters of the pool act, if none of them acts everywhere (set there, too).
        plugin: what its scores depend on, if it is not ours (`logo.plugins.Registry.definition`).
    """

    score: SignalFunction
    layers: Layers = "last"
    input: ProbeInput = "residual"
    token: ProbeToken = "last"
    scale: Scale = "raw"
    chosen: bool = False
    weighting: Weighting = "linear"
    late: bool = False
    window: Window = WHOLE
    activations: tuple[Activation, ...] = ()
    plugin: str | None = None

    @cached_property
    def readings(self) -> int:
        """How often a point is read: once, or with two kinds of emphasis."""
        return 2 if self.late and self.token == "each" else 1

    @cached_property
    def endings(self) -> tuple[tuple[int, ...], ...]:
        """What the texts of a calibration end with: the distinct invocation tokens of the pool, or nothing."""
        invocations = dict.fromkeys(activation.tokens for activation in self.activations if activation.tokens)
        return tuple(invocations) or ((),)

    def windowed(self, ids: Sequence[int]) -> Sequence[int]:
        """The first and the last tokens of a text, as many as the window has of each; all of a text that is not
        longer."""
        if self.window == WHOLE or len(ids) <= sum(self.window):
            return ids
        head, tail = self.window
        return [*ids[:head], *ids[len(ids) - tail :]]

    def begin(self, ids: Sequence[int]) -> int:
        """The position of the first token of a text that is read; all from there on are.

        Where all tokens count, the first one of a longer text is not read: it is a sink of attention, whose hidden
        vectors are very long and, in the middle layers, hardly depend on the token (arXiv 2309.17453).
        """
        if self.token == "last":
            return len(ids) - 1
        begin = int(len(ids) > 1)
        return max(begin, earliest(self.activations, ids)) if self.token == "tail" else begin

    def begin_of_text(self, ids: Sequence[int]) -> int:
        """As `begin`, of a text that the base model reads for a calibration. With `"tail"`, the tokens before those on
        which adapters act are read, too: a whitening needs more vectors than these few tokens have."""
        return int(len(ids) > 1) if self.token == "tail" else self.begin(ids)

    def __call__(self, index: ScoringIndex, hidden: Tensor) -> Tensor:
        """(n, adapters) for hidden (n, d). Raises PluginError: a signal of others has returned something else, or a
        number that cannot be used; RuntimeError: it has failed."""
        if self.plugin is None:
            return self.score(index, hidden)
        plugin = f"signal {self.plugin.partition(' ')[0]}"
        with running(plugin):
            scores = self.score(index, hidden)
        shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        expected = (len(hidden), len(index))
        if shape != expected:
            raise PluginError(f"{plugin}: expected scores (vectors, adapters) {expected}, found {shape}")
        # A calibration would take NaN for an adapter that does not respond, and select as if nothing were wrong. A
        # hidden vector that overflows is not the signal's fault, and the selector says what to do about it.
        bad = ~scores.isfinite()
        if self.scale == "whitened":
            bad |= scores < 0
        bad &= hidden.isfinite().all(dim=1, keepdim=True).to(bad.device)
        if bad.any():
            signed = ", none below 0 (the scale 'whitened')" if self.scale == "whitened" else ""
            row, column = bad.nonzero()[0].tolist()
            found = f"{float(scores[row, column])} for adapter {column + 1} of {len(index)}"
            raise PluginError(f"{plugin}: expected finite scores{signed}, found {found}")
        return scores.float()


SIGNALS: Registry[Signal] = Registry("signal")


def register_signal(
    name: str,
    *,
    layers: Layers = "last",
    input: ProbeInput = "residual",
    token: ProbeToken = "last",
    scale: Scale = "raw",
    weighting: Weighting = "linear",
    chosen: bool = False,
    late: bool = False,
) -> Callable[[_S], _S]:
    """Registers a `SignalFunction` as the signal of this name; a decorator. The other arguments are those of `Signal`.
    Raises UsageError: the name is taken, or an argument is none of its choices."""
    check_choice(f"signal {name!r}: layers", layers, Layers)
    check_choice(f"signal {name!r}: input", input, ProbeInput)
    check_choice(f"signal {name!r}: token", token, ProbeToken)
    check_choice(f"signal {name!r}: scale", scale, Scale)
    check_choice(f"signal {name!r}: weighting", weighting, Weighting)

    def add(score: _S) -> _S:
        signal = Signal(score, layers, input, token, scale, chosen, weighting, late)
        SIGNALS.add(name, signal, score)
        SIGNALS[name] = replace(signal, plugin=SIGNALS.definition(name))
        return score

    return add


def get_signal(name: str) -> Signal:
    """The signal of this name, ours or a plugin's. Raises UsageError: there is none."""
    if type(name) is not str:
        check_type("signal", name, str, "the name of a signal")
    return SIGNALS[name]


@register_signal("norm")
def norm(index: ScoringIndex, hidden: Tensor) -> Tensor:
    """`‖ΔW_i h‖₂`: how large the adapter's response to this input is."""
    return index.norms(hidden)


@register_signal("entropy")
def entropy(index: ScoringIndex, hidden: Tensor) -> Tensor:
    """`1 / (H + 1e-6)`, `H = -Σ q log(q + 1e-8)`, `q = softmax(ΔW_i h)`: how concentrated the response is."""
    chunks = []
    for responses in index.responses(hidden):
        q = responses.softmax(dim=-1)
        chunks.append(1 / (-(q * (q + 1e-8).log()).sum(dim=-1) + 1e-6))
    return torch.cat(chunks, dim=1)


# At several early points and all tokens, compared with neutral text.
register_signal(
    "calibrated",
    layers="early",
    input="projection",
    token="each",
    scale="whitened",
    chosen=True,
    weighting="adaptive",
    late=True,
)(ScoringIndex.relative)
