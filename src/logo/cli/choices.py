"""Options with fixed values."""

from __future__ import annotations

from enum import Enum


class Choice(str, Enum):
    """A string option with fixed values."""

    def __str__(self) -> str:
        return str(self.value)


class OnBad(Choice):
    ERROR = "error"
    SKIP = "skip"


class Context(Choice):
    BASE = "base"
    POOL = "pool"
    CARRY = "carry"


class Read(Choice):
    RESIDUAL = "residual"
    PROJECTION = "projection"


class Token(Choice):
    LAST = "last"
    MEAN = "mean"
    EACH = "each"
    TAIL = "tail"


class ProbeText(Choice):
    ALL = "all"
    LAST_USER = "last_user"
    CONVERSATION = "conversation"


class Weights(Choice):
    LINEAR = "linear"
    SOFTMAX = "softmax"
    ADAPTIVE = "adaptive"


class WhenUnsure(Choice):
    MIX = "mix"
    BASE = "base"
    BEST = "best"
    REFUSE = "refuse"


class Examples(Choice):
    USE = "use"
    IGNORE = "ignore"


class Reference(Choice):
    NEUTRAL = "neutral"
    RUNNING = "running"


class IndexKind(Choice):
    EXACT = "exact"
    TWO_STAGE = "two-stage"


class Preset(Choice):
    OFFICIAL = "official"


class Engine(Choice):
    LOCAL = "local"
    VLLM = "vllm"
