"""`TrainingConfig`: how adapters are trained. Its fields are the command's options, and `logo.yaml` records them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from logo.adapters.activation import Activation
from logo.errors import UsageError

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn

ALL_LINEAR = "all-linear"
ASSISTANT = "assistant"  # a value of `activation`

# A task with fewer rows has none held out: they would be too few to measure on, and it needs them for training.
FEWEST_TO_HOLD_OUT = 10
MOST_HELD_OUT = 64

_LIMITS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("r", "batch_size"), ("1 or more", lambda value: value >= 1)),
    **dict.fromkeys(("patience", "examples"), ("0 or more", lambda value: value >= 0)),
    **dict.fromkeys(("alpha", "lr", "epochs"), ("a number above 0", lambda value: 0 < value < math.inf)),
    "steps": ("1 or more", lambda value: value is None or value >= 1),
    "max_length": ("2 or more", lambda value: value >= 2),
    "held_out": ("a share from 0 to below 1", lambda value: 0 <= value < 1),
    "targets": (f"names of modules or {ALL_LINEAR}", lambda value: bool(value.replace(",", " ").split())),
}


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How every adapter of a run is trained.

    Raises:
        UsageError: a value that cannot be used.
    """

    r: int = 8
    """Rank."""
    alpha: float = 16.0
    """The update is scaled by alpha / r."""
    rslora: bool = False
    """Scale by alpha / sqrt(r) instead."""
    targets: str = "q_proj,v_proj"
    """Names of the linear modules that are adapted, or `all-linear`."""
    lr: float = 2e-4
    """Peak learning rate; it rises over the first 3 % of the steps, and falls like a cosine."""
    epochs: float = 3.0
    """Passes over the rows."""
    steps: int | None = None
    """Optimiser steps, instead of epochs."""
    batch_size: int = 8
    """Rows of a step."""
    max_length: int = 1024
    """Tokens of a row; longer prompts lose their beginning."""
    seed: int = 0
    """Seed of initial factors, order of rows and choice of held-out rows."""
    held_out: float = 0.1
    """Share of the rows to measure the loss on instead, at most 64 rows."""
    patience: int = 3
    """Stop after so many of 10 measurements without a lower held-out loss; 0: never."""
    activation: str = "everywhere"
    """Adapters act `everywhere`, on the prompt's `last:N` tokens, or from the `assistant`'s turn on."""
    examples: int = 4
    """Store the first N prompts beside an adapter: prompts like them select it."""

    def __post_init__(self) -> None:
        for name, (expected, right) in _LIMITS.items():
            if not right(getattr(self, name)):
                raise UsageError(f"{name}: expected {expected}, found {getattr(self, name)!r}")
        if self.activation != ASSISTANT:
            try:
                Activation.parse(self.activation)
            except UsageError:
                expected = f"everywhere, last:N (N is 1 or more) or {ASSISTANT}"
                raise UsageError(f"activation: expected {expected}, found {self.activation!r}") from None

    def length(self, rows: int) -> int:
        """The number of optimiser steps for this number of rows."""
        return self.steps or max(1, math.ceil(self.epochs * math.ceil(rows / self.batch_size)))

    def held_out_rows(self, rows: int) -> int:
        """How many of `rows` rows are held out."""
        if not self.held_out or rows < FEWEST_TO_HOLD_OUT:
            return 0
        return min(MOST_HELD_OUT, max(1, round(self.held_out * rows)))

    @property
    def names(self) -> list[str]:
        """The names of modules in `targets`, or `all-linear` alone."""
        return self.targets.replace(",", " ").split()

    def lora(self, model: nn.Module) -> LoraConfig:
        """PEFT's configuration of an adapter of this base model."""
        from peft import LoraConfig

        return LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,  # PEFT takes fractions, too
            use_rslora=self.rslora,
            target_modules=ALL_LINEAR if self.names == [ALL_LINEAR] else self.names,
            # GPT-2's Conv1D stores its weight transposed.
            fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in model.modules()),
            task_type="CAUSAL_LM",
        )
