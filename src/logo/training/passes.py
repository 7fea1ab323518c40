"""Forward passes over the rows of one adapter: the loss of every completion token, and its gradient.

Logits are computed for completion tokens only: with a vocabulary of 262,000, the logits of whole rows would be most of
the work.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from logo.errors import UsageError
from logo.training.examples import Example

# The most values that the logits of a pass may have: 0.5 GB in float32, and twice as much again in the backward pass.
MAX_LOGITS = 2**27


@dataclass(frozen=True)
class Base:
    """The frozen base model.

    Attributes:
        model: in evaluation mode, without gradients of its own.
        pad: padding token.
        vocabulary: number of tokens that the model predicts.
        device: where rows are read.
        pass_tokens: tokens of a forward pass, padding included; a single row is never cut.
        recompute: recompute activations in the backward pass instead of keeping them.
    """

    model: Any
    pad: int
    vocabulary: int
    device: torch.device
    pass_tokens: int
    recompute: bool = False

    def scale(self, tokens: int) -> float:
        """The factor of the loss: a power of two near the number of tokens of a step if the model computes in float16,
        in which the gradient of a single token can underflow.
        """
        return 2.0 ** round(math.log2(max(1, tokens))) if self.model.dtype is torch.float16 else 1.0

    def cut(self, rows: Sequence[Example]) -> list[list[Example]]:
        """The rows, longest first, in passes within the limits."""
        positions = max(1, MAX_LOGITS // self.vocabulary)
        parts: list[list[Example]] = []
        for row in sorted(rows, key=len, reverse=True):
            more = [*parts[-1], row] if parts else []
            fits = len(more) * len(more[0]) <= self.pass_tokens if more else False
            if fits and sum(one.completion for one in more) <= positions:
                parts[-1] = more
            else:
                parts.append([row])
        return parts


def summed(base: Base, layers: Collection[Any], rows: Sequence[Example], weight: float | None = None) -> float:
    """The negative log likelihood of all completion tokens of these rows, in nats.

    Args:
        layers: PEFT's layers in the model.
        weight: if given, the gradient of this many times the sum is added to that of the adapter's parameters, but for
            passes in which a loss is not finite.
    """
    total = 0.0
    for part in base.cut(rows):
        length = len(part[0]) - 1  # the longest; a row's last token is only predicted, never read
        ids = torch.full((len(part), length), base.pad)
        mask = torch.zeros(len(part), length, dtype=torch.int64)
        positions: list[int] = []
        for number, row in enumerate(part):
            ids[number, : len(row) - 1] = torch.tensor(row.ids[:-1])
            mask[number, : len(row) - 1] = 1
            positions += range(number * length + row.prompt - 1, number * length + len(row) - 1)
        targets = torch.tensor([token for row in part for token in row.ids[row.prompt :]])
        inputs = {"input_ids": ids.to(base.device), "attention_mask": mask.to(base.device), "use_cache": False}
        with (
            torch.set_grad_enabled(weight is not None),
            acting_from(layers, [row.begin for row in part], length),
            logits_at(base.model, torch.tensor(positions)),
        ):
            logits = base.model(**inputs).logits
            losses = nn.functional.cross_entropy(logits.float(), targets.to(logits.device), reduction="none")
            if weight is not None and bool(losses.isfinite().all()):
                # Within the block, because the backward pass recomputes layers whose activations were not kept.
                torch.autograd.backward((losses * weight).sum())
        total += float(losses.detach().double().sum())
    return total


@contextmanager
def acting_from(layers: Collection[Any], begins: Sequence[int], length: int) -> Iterator[None]:
    """Within the block, the adapter changes the tokens of each row from its `begin` on, and none before."""
    if not any(begins):
        yield
        return
    before = torch.arange(length) < torch.tensor(begins)[:, None]

    def masked(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output.masked_fill(before.reshape(*output.shape[:-1], 1).to(output.device), 0.0)

    handles = [part.register_forward_hook(masked) for layer in layers for part in layer.lora_B.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def logits_at(model: Any, positions: Tensor) -> Iterator[None]:
    """Within the block, the output head computes logits (n, vocabulary) only at these positions of the concatenated
    rows.
    """

    def picked(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = inputs[0]
        return (hidden.reshape(-1, hidden.shape[-1])[positions.to(hidden.device)], *inputs[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(picked)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def checkpointing(model: Any, on: bool) -> Iterator[None]:
    """Inside the block, activations between layers are computed again in the backward pass instead of being kept.

    transformers does so in training mode only, so the layers (and nothing else) are put into it, with dropout set to 0.

    Raises:
        UsageError: the model does not support it.
    """
    if not on:
        yield
        return
    from transformers.modeling_layers import GradientCheckpointingLayer

    try:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as error:
        raise UsageError(f"--recompute: {' '.join(str(error).split())}; leave it out") from None
    before = {
        layer: {
            name: value
            for name, value in vars(layer).items()
            if name == "training" or ("dropout" in name and isinstance(value, float))
        }
        for layer in model.modules()
        if isinstance(layer, GradientCheckpointingLayer)
    }
    for layer, values in before.items():
        vars(layer).update({**dict.fromkeys(values, 0.0), "training": True})
    try:
        yield
    finally:
        for layer, values in before.items():
            vars(layer).update(values)
        model.gradient_checkpointing_disable()
