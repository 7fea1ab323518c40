"""Signals: how strongly each adapter responds, as pure functions from an index and hidden vectors to scores.

A signal is registered by name, together with what it reads where the user asks for nothing else. `norm` and `entropy`
are those of the paper (arXiv 2511.07129, section 3) with the constants of the authors' code. All of them are explained
in docs/how-selection-works.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from logo.adapters.activation import Activation
from logo.errors import UsageError, closest
from logo.selection.index import ScoringIndex

Score = Callable[[ScoringIndex, Tensor], Tensor]  # (index, hidden (n, d)) -> scores (n, adapters)
ProbeInput = Literal["residual", "projection"]
ProbeToken = Literal["last", "mean", "each", "tail"]
Weighting = Literal["linear", "softmax", "adaptive"]
WhenUnsure = Literal["mix", "base", "best", "refuse"]
# raw: the response itself · zscore: against the adapter's own responses to neutral text · whitened: likewise, of hidden
# vectors from which is taken what all text has in common
Scale = Literal["raw", "zscore", "whitened"]


@dataclass(frozen=True)
class Signal:
    """A score function and its usual reading.

    Attributes:
        score: one score per hidden vector and adapter.
        layers: `"last"`, the query projection of the last layer, or `"early"`, every adapted module of the layers
            within `probe_depth`.
        input: see `logo.selection.probe.Probe`.
        token: likewise; with `"each"` and `"tail"`, scores are averaged over the tokens.
        activations: where the adapters of the pool act, if none of them acts everywhere; for the token `"tail"`.
        scale: what the responses are compared with.
        chosen: use the points on which this pool's adapters differ most, instead of all.
        weighting: how scores become weights.
        norms: the scores are `ScoringIndex.norms`, which the first stage of a two-stage index knows about.
        relative: they are `ScoringIndex.relative` instead, each norm divided by the root of the vector's length.
        late: responses are averaged with the last tokens counting most, too (`logo.selection.emphasis`).
    """

    score: Score
    layers: Literal["last", "early"] = "last"
    input: ProbeInput = "residual"
    token: ProbeToken = "last"
    scale: Scale = "raw"
    chosen: bool = False
    weighting: Weighting = "linear"
    norms: bool = False
    relative: bool = False
    late: bool = False
    activations: tuple[Activation, ...] = ()

    @property
    def readings(self) -> int:
        """How often a point is read: once, or with two kinds of emphasis."""
        return 2 if self.late and self.token == "each" and not self.activations else 1

    def __call__(self, index: ScoringIndex, hidden: Tensor) -> Tensor:
        """(n, adapters) for hidden (n, d)."""
        return self.score(index, hidden)


SIGNALS: dict[str, Signal] = {}


def register(name: str, **reading: Any) -> Callable[[Score], Score]:
    """Adds a signal under a name that `get_signal` and the command line know; `reading` are fields of `Signal`."""

    def add(score: Score) -> Score:
        SIGNALS[name] = Signal(score, **reading)
        return score

    return add


def get_signal(name: str) -> Signal:
    """The signal of this name.

    Raises:
        UsageError: there is none.
    """
    try:
        return SIGNALS[name]
    except KeyError:
        raise UsageError(f"unknown signal {name!r}{closest(name, SIGNALS)}; known: {', '.join(SIGNALS)}") from None


@register("norm", norms=True)
def norm(index: ScoringIndex, hidden: Tensor) -> Tensor:
    """`‖ΔW_i h‖₂`: how large the adapter's response to this input is."""
    return index.norms(hidden)


@register("entropy")
def entropy(index: ScoringIndex, hidden: Tensor) -> Tensor:
    """`1 / (H + 1e-6)`, `H = -Σ q log(q + 1e-8)`, `q = softmax(ΔW_i h)`: how concentrated the response is."""
    chunks = []
    for response in index.responses(hidden):
        q = response.softmax(dim=-1)
        chunks.append(1 / (-(q * (q + 1e-8).log()).sum(dim=-1) + 1e-6))
    return torch.cat(chunks, dim=1)


# What `calibrated` reads; signatures are compared at the same points, and share its calibration.
_EARLY: dict[str, Any] = {
    "layers": "early",
    "input": "projection",
    "token": "each",
    "scale": "whitened",
    "chosen": True,
    "weighting": "adaptive",
    "norms": True,
    "relative": True,
    "late": True,
}


@register("signature", **_EARLY)
@register("calibrated", **_EARLY)
def calibrated(index: ScoringIndex, hidden: Tensor) -> Tensor:
    """`‖ΔW_i W (h - μ)‖₂ / √‖W (h - μ)‖₂` at several early points and all tokens, compared with neutral text.

    `signature` reads the same, and scores by how much a prompt looks like an adapter's examples
    (`logo.selection.signature`).
    """
    return index.relative(hidden)


@register("norm_z", scale="zscore", weighting="softmax", norms=True)
def norm_z(index: ScoringIndex, hidden: Tensor) -> Tensor:
    """The official norm, as a z-score over neutral prompts (SEQR, arXiv 2509.18093, calibrates norms like this)."""
    return index.norms(hidden)


@register("arrow", layers="early", input="projection", token="each")
def arrow(index: ScoringIndex, hidden: Tensor) -> Tensor:
    """`|v_iᵀ h|` with `v_i` the first right singular vector of `ΔW_i` (Arrow, arXiv 2405.11157)."""
    return index.alignments(hidden)


@register("spectr", layers="early", input="projection", token="each", norms=True)
def spectr(index: ScoringIndex, hidden: Tensor) -> Tensor:
    """`‖Σ_i V_iᵀ h‖`, the whole spectrum, which is `‖ΔW_i h‖` per token and layer (SpectR, COLM 2025)."""
    return index.norms(hidden)
