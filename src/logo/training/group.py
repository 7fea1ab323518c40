"""Learners that share every forward pass of the base model.

A round is one optimiser step of every running learner. The batches of all learners are cut into passes, and each
learner gets the gradient of its own mean loss. A learner with non-finite values is ended, and the round is repeated
without it, so the others are not affected.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from logo.training.checkpoint import Checkpoint, read_checkpoint
from logo.training.examples import Example
from logo.training.factors import Bank
from logo.training.learner import RUNNING, Learner
from logo.training.passes import Limits, Owned, checkpointing, cut, laid_out, losses

# A mean loss has exploded above both _EXPLODED times that of a uniform guess over the vocabulary and _WORSE times the
# task's first one. The second limit is there because a base model may do worse than guessing on a task.
_EXPLODED, _WORSE = 3.0, 2.0


@dataclass(frozen=True)
class Base:
    """The frozen model of a group.

    Attributes:
        model: in evaluation mode, without gradients of its own.
        pad: padding token.
        vocabulary: number of tokens that the model predicts.
        limits: limits of a forward pass.
        device: where rows are read.
        recompute: recompute activations in the backward pass instead of keeping them.
    """

    model: Any
    pad: int
    vocabulary: int
    limits: Limits
    device: torch.device
    recompute: bool = False

    def scale(self, tokens: int) -> float:
        """The factor of the loss: a power of two near the number of tokens of a step if the model computes in float16,
        in which the gradient of a single token can underflow.
        """
        return 2.0 ** round(math.log2(max(1, tokens))) if self.model.dtype is torch.float16 else 1.0


class Group:
    """Trains adapters together.

    Args:
        base: the model.
        learners: one for each task.
        members: task name -> digest of everything that the adapter is made from.
        folder: the folder of the group's checkpoint. Training continues from an existing checkpoint.
        save: called with each learner when it has ended.
        every: seconds between two checkpoints.
        stands: whether the adapter of a task is still where `save` put it; else an ended task begins anew.

    Raises:
        StorageError: there is a checkpoint that cannot be read.
    """

    def __init__(
        self,
        base: Base,
        learners: Sequence[Learner],
        members: Mapping[str, str],
        folder: Path,
        save: Callable[[Learner], None],
        every: float = 60.0,
        stands: Callable[[str], bool] = lambda _: True,
    ) -> None:
        self._base, self.learners, self._members = base, list(learners), members
        self._folder, self._save, self._every = folder, save, every
        self._others: Checkpoint | None = None
        if folder.is_dir():
            self._go_on(read_checkpoint(folder), stands)

    def run(self, on_round: Callable[[], None] | None = None) -> None:
        """Trains until every learner has ended, and saves each.

        Raises:
            StorageError: a file cannot be written. The last checkpoint stays, and training can continue from it.
        """
        kept_at = time.monotonic()
        if not self._folder.is_dir():
            self.keep()
        with checkpointing(self._base.model, self._base.recompute):
            running = [learner for learner in self.learners if learner.running]
            bank = Bank([learner.factors for learner in running])
            while running:
                stepped, bank = self._round(running, bank)
                self._measure(stepped, bank)
                left = [learner for learner in stepped if learner.running]
                if on_round is not None:
                    on_round()
                if len(left) < len(running):
                    for learner in running:
                        if not learner.running:
                            self._save(learner)
                    running, bank = left, Bank([learner.factors for learner in left])
                if time.monotonic() - kept_at >= self._every:
                    self.keep()
                    kept_at = time.monotonic()

    def keep(self) -> None:
        """Writes a checkpoint.

        Raises:
            StorageError: it cannot be written; the earlier checkpoint stays.
        """
        own = Checkpoint(
            self._members,
            {learner.name: learner.course.as_dict() for learner in self.learners},
            {learner.name: learner.tensors() for learner in self.learners},
        )
        (own if self._others is None else self._others.joined(own)).write(self._folder)

    @property
    def others(self) -> bool:
        """Whether the checkpoint has members that are not trained now; these stay in it."""
        return self._others is not None

    def _go_on(self, checkpoint: Checkpoint, stands: Callable[[str], bool]) -> None:
        for learner in self.learners:
            course = checkpoint.courses[learner.name]
            gone = course["status"] != RUNNING and course["best"] is not None and not stands(learner.name)
            if course["step"] and not gone:
                learner.load(course, checkpoint.tensors[learner.name])
        self._others = checkpoint.without(self._members)

    # -- one round --------------------------------------------------------------------------------------------------

    def _round(self, running: Sequence[Learner], bank: Bank) -> tuple[Sequence[Learner], Bank]:
        """One step of each of these learners, except those that diverge. Returns the others and their bank."""
        while running:
            batches = {learner: learner.batch() for learner in running}
            means = self._gradients(running, batches, bank)
            wrong = {learner: reason for learner, mean in means.items() if (reason := self._wrong(learner, mean))}
            wrong = wrong or self._overflowing(running, batches, bank)
            if not wrong:
                for learner, batch in batches.items():
                    learner.step(means[learner], batch)
                return self._without_overflown(running, bank)
            for learner, reason in wrong.items():
                learner.diverge(f"at step {learner.course.step + 1} {reason}")
            running = [learner for learner in running if learner.running]
            bank = Bank([learner.factors for learner in running])
        return running, bank

    def _without_overflown(self, running: Sequence[Learner], bank: Bank) -> tuple[Sequence[Learner], Bank]:
        """Ends the learners with non-finite factors, which would affect rows of others: 0 times infinity is NaN."""
        if bank.finite:
            return running, bank
        for learner in running:
            if not learner.factors.finite:
                learner.diverge(f"after step {learner.course.step} its factors are not finite")
        left = [learner for learner in running if learner.running]
        return left, Bank([learner.factors for learner in left])

    def _overflowing(
        self, running: Sequence[Learner], batches: Mapping[Learner, Sequence[Example]], bank: Bank
    ) -> dict[Learner, str]:
        """Learner -> why its non-finite gradient ends it. If it is empty, all gradients are clipped to their norms."""
        norms = {learner: learner.gradient_norm() for learner in batches}
        suspects = [learner for learner, norm in norms.items() if not math.isfinite(norm)]
        wrong = {}
        for learner in suspects:  # read alone, because rows of others in the same pass may be the cause
            self._gradients(running, {learner: batches[learner]}, bank)
            if not math.isfinite(learner.gradient_norm()):
                wrong[learner] = "its gradient is not finite"
        alone = "its gradient is finite alone but not beside others: the base model overflows; try --dtype float32"
        return wrong or dict.fromkeys(suspects, alone)

    def _gradients(
        self, running: Sequence[Learner], batches: Mapping[Learner, Sequence[Example]], bank: Bank
    ) -> dict[Learner, float]:
        """The mean loss of each batch; the gradients are in the learners' parameters afterwards."""
        bank.clear()
        tokens = {learner: sum(example.completion for example in batch) for learner, batch in batches.items()}
        shares = torch.tensor([1 / tokens[learner] if learner in tokens else 0.0 for learner in running])
        scale = self._base.scale(sum(tokens.values()))
        sums = summed(self._base, running, batches, bank, shares * scale)
        bank.collect(scale)
        return {learner: sums[learner] / tokens[learner] for learner in batches}

    def _wrong(self, learner: Learner, loss: float) -> str | None:
        """Why a mean loss ends a learner, in words; None if it does not."""
        if not math.isfinite(loss):
            return f"its loss is {loss}"
        guessing, first = math.log(self._base.vocabulary), learner.course.first
        if first is not None and loss > max(_EXPLODED * guessing, _WORSE * first):
            return f"its loss is {loss:.1f}; it began at {first:.1f}, and guessing among all words has {guessing:.1f}"
        return None

    def _measure(self, running: Sequence[Learner], bank: Bank) -> None:
        due = [learner for learner in running if learner.running and learner.due]
        held_out = {learner: learner.held_out for learner in due if learner.held_out}
        means = held_out_losses(self._base, running, held_out, bank) if held_out else {}
        for learner in due:
            if learner not in means:
                learner.measured(None)
                continue
            mean = means[learner]
            wrong = self._wrong(learner, mean)
            if wrong:
                learner.diverge(f"after step {learner.course.step}, on held-out rows, {wrong}")
            else:
                learner.measured(mean)


def summed(
    base: Base,
    learners: Sequence[Learner],
    rows: Mapping[Learner, Sequence[Example]],
    bank: Bank,
    shares: Tensor | None,
) -> dict[Learner, float]:
    """Reads rows in as few passes as they need: the loss of each learner's rows, summed over tokens.

    Args:
        learners: all that are in the bank, in its order; `rows`: the rows to read, of some of them.
        shares: (learners,): the weight of a token's loss in the gradient; None: no gradient is computed.
    """
    place = {learner: number for number, learner in enumerate(learners)}
    owned = [Owned(place[learner], example) for learner, examples in rows.items() for example in examples]
    scales = [learner.recipe.scaling for learner in learners]
    sums = torch.zeros(len(learners), dtype=torch.float64)
    for part in cut(owned, base.limits):
        one = laid_out(part, scales, base.pad, base.device)
        weights = None if shares is None else shares.to(base.device)[one.owners]
        with torch.set_grad_enabled(shares is not None):
            found = losses(base.model, bank, one, weights)
        sums.index_add_(0, one.owners.cpu(), found.double().cpu())
    return {learner: float(sums[place[learner]]) for learner in rows}


def held_out_losses(
    base: Base, learners: Sequence[Learner], rows: Mapping[Learner, Sequence[Example]], bank: Bank
) -> dict[Learner, float]:
    """The mean loss per completion token of each learner's rows, in nats; arguments as in `summed`."""
    sums = summed(base, learners, rows, bank, None)
    return {learner: total / sum(example.completion for example in rows[learner]) for learner, total in sums.items()}
