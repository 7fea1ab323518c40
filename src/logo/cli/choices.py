"""Options with fixed values. Those of the engine are written again here, so that `--help` need not import it; mypy
compares them."""

from __future__ import annotations

from typing import Literal

OnBad = Literal["error", "skip"]
Context = Literal["base", "pool", "carry"]
ProbeText = Literal["all", "last_user", "conversation"]
Weights = Literal["linear", "adaptive"]
WhenUnsure = Literal["mix", "base", "refuse"]
Examples = Literal["use", "ignore"]
Preset = Literal["official"]
Engine = Literal["local", "vllm"]
Variant = Literal["mixture", "selection"]
