"""Training of one adapter: a PEFT model around the frozen base model, AdamW, and a loop over its rows."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from logo.training.passes import Base, checkpointing, summed
from logo.training.recipe import Recipe

if TYPE_CHECKING:
    from logo.training.prepared import Prepared

RUNNING, DONE, EARLY, DIVERGED = "running", "done", "early", "diverged"

# A mean loss has exploded above both _EXPLODED times that of a uniform guess over the vocabulary and _WORSE times the
# task's first one. The second limit is there because a base model may do worse than guessing on a task.
_EXPLODED, _WORSE = 3.0, 2.0


@dataclass(frozen=True)
class Measurement:
    """The losses of an adapter at some step.

    Attributes:
        step: optimiser steps so far.
        train: mean loss per token of the steps since the last measurement, in nats.
        held_out: mean loss per token of the held-out rows; None if there are none.
    """

    step: int
    train: float
    held_out: float | None

    def better(self, other: Measurement) -> bool:
        """Whether it is better than an earlier one. Without held-out rows the later one counts as better, because
        losses of different batches cannot be compared.
        """
        return self.held_out is None or other.held_out is None or self.held_out < other.held_out


@dataclass
class Course:
    """The progress of one task.

    Attributes:
        step: optimiser steps so far.
        tokens: tokens of the rows trained on, repetitions included.
        status: `running`, or why it has ended: `done`, `early` (no improvement) or `diverged`.
        reason: why a task diverged, in words.
        measured: all measurements.
        best: the step of the best factors by the held-out rows, or the latest step without held-out rows; None if no
            factors are kept.
        first, last: loss of the first and of the last step; None before it.
        recent: loss and number of completion tokens of each step since the last measurement.
    """

    step: int = 0
    tokens: int = 0
    status: str = RUNNING
    reason: str | None = None
    measured: list[Measurement] = field(default_factory=list)
    best: int | None = None
    first: float | None = None
    last: float | None = None
    recent: list[tuple[float, int]] = field(default_factory=list)


class Learner:
    """One adapter in training. The base model is wrapped by PEFT until `close`.

    Args:
        base: the base model.
        task: the task.

    Attributes:
        config: PEFT's configuration of the adapter.
        factors: its parameters, by PEFT's names: all A, then all B.
        course: the progress.
        best: the best factors, by PEFT's names; empty if none are kept.
    """

    def __init__(self, base: Base, task: Prepared) -> None:
        from peft import get_peft_model
        from peft.tuners.lora import LoraLayer

        self._base, self._task, recipe = base, task, task.recipe
        self._peft = get_peft_model(base.model, recipe.lora(transposed=transposed(base.model)))
        self._peft.eval()  # no dropout
        self.config: Any = self._peft.peft_config["default"]
        self._layers = [module for module in base.model.modules() if isinstance(module, LoraLayer)]
        named = ((name, factor) for name, factor in self._peft.named_parameters() if factor.requires_grad)
        self.factors = dict(sorted(named, key=lambda one: (".lora_B." in one[0], one[0])))
        _initialise(self.factors, f"{recipe.seed} {task.name}")
        self.course = Course()
        self.best: dict[str, Tensor] = {}
        parameters = list(self.factors.values())
        self._optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)
        self._share = _schedule(recipe, task.steps, self._optimizer)
        count = min(recipe.evaluations, task.steps)
        self._measured_at = {round(task.steps * (number + 1) / count) for number in range(count)}

    def run(self, tell: Callable[[Course], None] = lambda _: None) -> None:
        """Trains until the adapter has converged, diverged or made all of its steps.

        Args:
            tell: called with the progress after each step.
        """
        with checkpointing(self._base.model, self._base.recompute):
            while self.course.status == RUNNING:
                reason = self.step()
                if reason is None and self.course.step in self._measured_at:
                    reason = self._measure()
                if reason is not None:
                    self.course.status, self.course.reason = DIVERGED, reason
                tell(self.course)

    def close(self) -> None:
        """Takes the adapter out of the base model."""
        self._peft.unload()
        self._optimizer.zero_grad()

    def step(self) -> str | None:
        """Makes an optimiser step, and returns why training diverged; None: it did not."""
        course, recipe = self.course, self._task.recipe
        batch = self._task.batch(course.step)
        tokens = sum(row.completion for row in batch)
        scale = self._base.scale(tokens)
        self._optimizer.zero_grad()
        loss = summed(self._base, self._layers, batch, scale / tokens) / tokens
        reason = self._wrong(loss)
        if reason is None:
            for factor in self.factors.values():
                if scale != 1 and factor.grad is not None:
                    factor.grad /= scale
            if not math.isfinite(float(nn.utils.clip_grad_norm_(self.factors.values(), recipe.clip))):
                reason = "its gradient is not finite"
        if reason is not None:
            return f"at step {course.step + 1} {reason}"
        course.last = loss
        if course.first is None:
            course.first = loss
        elif not course.measured:  # factors with a finite loss are kept until the first measurement
            self._keep()
        for group in self._optimizer.param_groups:
            group["lr"] = recipe.lr * self._share(course.step)
        self._optimizer.step()
        course.step += 1
        course.tokens += sum(map(len, batch))
        course.recent.append((loss, tokens))
        finite = all(bool(factor.isfinite().all()) for factor in self.factors.values())
        return None if finite else f"after step {course.step} its factors are not finite"

    def _measure(self) -> str | None:
        """Measures the losses, keeps the factors if they are the best so far, and ends training after the last step or
        without patience. Returns why training diverged; None: it did not.
        """
        course, rows = self.course, self._task.held_out
        held_out = None
        if rows:
            held_out = summed(self._base, self._layers, rows) / sum(row.completion for row in rows)
            wrong = self._wrong(held_out)
            if wrong is not None:
                return f"after step {course.step}, on held-out rows, {wrong}"
        train = sum(loss * tokens for loss, tokens in course.recent) / sum(tokens for _, tokens in course.recent)
        now = Measurement(course.step, train, held_out)
        best = next((one for one in course.measured if one.step == course.best), None)
        course.measured.append(now)
        course.recent.clear()
        if best is None or now.better(best):
            self._keep()
        patience = self._task.recipe.patience
        if course.step >= self._task.steps:
            course.status = DONE
        elif (
            patience is not None and rows and sum(one.step > (course.best or 0) for one in course.measured) >= patience
        ):
            course.status = EARLY
        return None

    def _keep(self) -> None:
        """Keeps the present factors as the best ones."""
        from peft import get_peft_model_state_dict

        found = get_peft_model_state_dict(self._peft, save_embedding_layers=False)
        self.best = {name: tensor.detach().clone() for name, tensor in found.items()}
        self.course.best = self.course.step

    def _wrong(self, loss: float) -> str | None:
        """Why a mean loss ends training, in words; None if it does not."""
        if not math.isfinite(loss):
            return f"its loss is {loss}"
        guessing, first = math.log(self._base.vocabulary), self.course.first
        if first is not None and loss > max(_EXPLODED * guessing, _WORSE * first):
            return f"its loss is {loss:.1f}; it began at {first:.1f}, and guessing among all words has {guessing:.1f}"
        return None


def transposed(model: nn.Module) -> bool:
    """Whether linear modules of a model store their weights transposed (Conv1D, as in GPT-2)."""
    return any(type(module).__name__ == "Conv1D" for module in model.modules())


def _initialise(factors: Mapping[str, nn.Parameter], seed: str) -> None:
    """Draws all A as PEFT does, from a seed of their own: adapters of the same seed and other names begin elsewhere."""
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "big"))
    with torch.no_grad():
        for name, factor in factors.items():
            if ".lora_A." in name:
                drawn = torch.empty(factor.shape)
                factor.copy_(nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator))


def _schedule(recipe: Recipe, steps: int, optimizer: torch.optim.Optimizer) -> Any:
    """Step -> factor of the learning rate, as in transformers' schedulers."""
    from transformers import get_scheduler

    name = "constant_with_warmup" if recipe.schedule == "constant" else recipe.schedule
    warmup = round(recipe.warmup * steps)
    return get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps).lr_lambdas[0]
