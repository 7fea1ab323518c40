"""Options with fixed values. Those of the engine are written again here, so that `--help` need not import it; mypy
compares them."""

from __future__ import annotations

from typing import Literal

OnBad = Literal["error", "skip"]
Context = Literal["base", "pool", "carry"]
Read = Literal["residual", "projection"]
Token = Literal["last", "mean", "each", "tail"]
ProbeText = Literal["all", "last_user", "conversation"]
Weights = Literal["linear", "softmax", "adaptive"]
WhenUnsure = Literal["mix", "base", "best", "refuse"]
Examples = Literal["use", "ignore"]
Reference = Literal["neutral", "running"]
IndexKind = Literal["exact", "two-stage"]
Preset = Literal["official"]
Engine = Literal["local", "vllm"]
Variant = Literal["mixture", "selection"]
