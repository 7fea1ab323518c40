"""Training of one adapter: its rows and their order, its optimiser, its progress, and its best factors.

Nothing here depends on other adapters. The progress (`Course`) and the tensors are all that a learner needs to continue
bit for bit after an interruption, because the order of rows and the learning rate are functions of the step.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from logo.training.examples import Example
from logo.training.factors import Factors
from logo.training.recipe import Recipe

RUNNING, DONE, EARLY, DIVERGED = "running", "done", "early", "diverged"


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
    """The progress of one task, as plain values that a checkpoint stores as JSON.

    Attributes:
        step: optimiser steps so far.
        tokens: tokens of the rows trained on, repetitions included.
        status: `running`, or why it has ended: `done`, `early` (no improvement) or `diverged`.
        reason: why a task diverged, in words.
        measured: all measurements.
        best: the step of the best factors by the held-out rows, or the latest step without held-out rows; None if no
            factors are kept.
        first: loss of the first step; None before it.
        recent: loss and number of completion tokens of each step since the last measurement.
    """

    step: int = 0
    tokens: int = 0
    status: str = RUNNING
    reason: str | None = None
    measured: list[Measurement] = field(default_factory=list)
    best: int | None = None
    first: float | None = None
    recent: list[tuple[float, int]] = field(default_factory=list)

    @property
    def last_loss(self) -> float | None:
        """The loss of the last step, or the mean before the last measurement."""
        if self.recent:
            return self.recent[-1][0]
        return self.measured[-1].train if self.measured else None

    def as_dict(self) -> dict[str, Any]:
        """The progress as JSON."""
        return asdict(self)

    @classmethod
    def of(cls, value: Mapping[str, Any]) -> Course:
        """The inverse of `as_dict`."""
        measured = [Measurement(**one) for one in value["measured"]]
        return cls(**{**value, "measured": measured, "recent": [tuple(one) for one in value["recent"]]})


class Learner:
    """One adapter in training.

    Args:
        name: name of the task.
        recipe: shape and schedule.
        rows: rows of the task, some of which are held out.
        factors: the initial factors.

    Attributes:
        name, recipe, factors: as given.
        held_out: the held-out rows.
        steps: the largest number of steps.
        course: the progress.
    """

    def __init__(self, name: str, recipe: Recipe, rows: Sequence[Example], factors: Factors) -> None:
        self.name, self.recipe, self.factors = name, recipe, factors
        order = list(range(len(rows)))
        random.Random(f"{recipe.seed} {name} held out").shuffle(order)
        count = recipe.held_out_rows(len(rows))
        self.held_out = [rows[place] for place in sorted(order[:count])]
        self._rows = [rows[place] for place in sorted(order[count:])]
        self.steps = recipe.length(len(self._rows))
        self.course = Course()
        self._best: dict[str, Tensor] = {}
        parameters = factors.parameters
        self._optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)
        self._share = _schedule(recipe, self.steps, self._optimizer)

    # -- learning ---------------------------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        """Whether training continues."""
        return self.course.status == RUNNING

    def batch(self) -> list[Example]:
        """The rows of the next step."""
        size = self.recipe.batch_size
        per_epoch = -(-len(self._rows) // size)
        epoch, place = divmod(self.course.step, per_epoch)
        order = self._order(epoch)
        return [self._rows[row] for row in order[place * size : (place + 1) * size]]

    def _order(self, epoch: int) -> list[int]:
        if self._epoch is None or self._epoch[0] != epoch:
            order = list(range(len(self._rows)))
            random.Random(f"{self.recipe.seed} {self.name} {epoch}").shuffle(order)
            self._epoch = epoch, order
        return self._epoch[1]

    _epoch: tuple[int, list[int]] | None = None

    def gradient_norm(self) -> float:
        """The norm of the collected gradient, which is clipped to the recipe's largest norm."""
        return float(torch.nn.utils.clip_grad_norm_(self.factors.parameters, self.recipe.clip))

    def step(self, loss: float, batch: Sequence[Example]) -> None:
        """Makes a step along the collected gradient of a batch with this mean loss."""
        if self.course.first is None:
            self.course.first = loss
        elif not self.course.measured:  # factors with a finite loss are kept until the first measurement
            self.course.best, self._best = self.course.step, self.factors.copy()
        for group in self._optimizer.param_groups:
            group["lr"] = self.recipe.lr * self._share(self.course.step)
        self._optimizer.step()
        self.course.step += 1
        self.course.tokens += sum(map(len, batch))
        self.course.recent.append((loss, sum(example.completion for example in batch)))

    # -- measuring --------------------------------------------------------------------------------------------------

    @cached_property
    def _measured_at(self) -> frozenset[int]:
        count = min(self.recipe.evaluations, self.steps)
        return frozenset(round(self.steps * (number + 1) / count) for number in range(count))

    @property
    def due(self) -> bool:
        """Whether a measurement is due."""
        last = self.course.measured[-1].step if self.course.measured else 0
        return self.course.step in self._measured_at and last != self.course.step

    def measured(self, held_out: float | None) -> None:
        """Records a measurement, keeps the factors if they are the best so far, and ends training if patience is
        exhausted.
        """
        course = self.course
        weight = sum(tokens for _, tokens in course.recent)
        train = sum(loss * tokens for loss, tokens in course.recent) / weight
        course.measured.append(Measurement(course.step, train, held_out))
        course.recent.clear()
        best = next((one for one in course.measured[:-1] if one.step == course.best), None)
        if best is None or course.measured[-1].better(best):
            course.best, self._best = course.step, self.factors.copy()
        since = sum(one.step > (course.best or 0) for one in course.measured)
        if course.step >= self.steps:
            course.status = DONE
        elif self.recipe.patience is not None and self.held_out and since >= self.recipe.patience:
            course.status = EARLY

    def diverge(self, reason: str) -> None:
        """Ends training and keeps the best factors so far."""
        self.course.status, self.course.reason = DIVERGED, reason

    @property
    def best(self) -> dict[str, Tensor] | None:
        """The best factors, as `Factors.copy`; None if none are kept, or after `release`."""
        return self._best or None

    def release(self) -> None:
        """Frees all memory except the progress, once training has ended and the adapter is written."""
        self._best = {}
        self._optimizer.state.clear()
        for parameter in self.factors.parameters:
            parameter.data, parameter.grad = parameter.data.new_empty(0), None

    # -- keeping ----------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Factors, best factors and moments of the optimiser, on the host; empty after the end of training."""
        if not self.running:
            return {}
        kept: dict[str, Tensor] = {f"now.{key}": tensor for key, tensor in self.factors.named()}
        kept |= {f"best.{key}": tensor for key, tensor in self._best.items()}
        for number, parameter in enumerate(self.factors.parameters):
            for key, value in self._optimizer.state.get(parameter, {}).items():
                kept[f"adam.{number}.{key}"] = value
        return {key: tensor.detach().to("cpu", copy=True) for key, tensor in kept.items()}

    def load(self, course: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Restores the state of a checkpoint."""
        self.course = Course.of(course)
        if not self.running:  # its adapter was written before the checkpoint
            self.release()
            return
        self.factors.load(_below("now.", tensors))
        self._best = {key: tensor.to(self._device_of(key)) for key, tensor in _below("best.", tensors).items()}
        state: dict[Tensor, dict[str, Tensor]] = {}
        for number, parameter in enumerate(self.factors.parameters):
            found = _below(f"adam.{number}.", tensors)
            if found:
                state[parameter] = {key: value.to(parameter.device) for key, value in found.items()}
        self._optimizer.state.update(state)

    def _device_of(self, key: str) -> torch.device:
        side, _, path = key.partition(".")
        return (self.factors.A if side == "A" else self.factors.B)[path].device


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key[len(prefix) :]: tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def _schedule(recipe: Recipe, steps: int, optimizer: torch.optim.Optimizer) -> Any:
    """Step -> factor of the learning rate, as in transformers' schedulers."""
    from transformers import get_scheduler

    name = "constant_with_warmup" if recipe.schedule == "constant" else recipe.schedule
    warmup = round(recipe.warmup * steps)
    return get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps).lr_lambdas[0]
