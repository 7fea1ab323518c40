"""Forward passes over rows of different adapters: which rows share a pass, and the loss of every completion token.

Rows are sorted by length and cut into passes with little padding. Logits are computed for completion tokens only: with
a vocabulary of 262,000, the logits of whole rows would be most of the work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from logo.errors import UsageError
from logo.mixing.gated import GatedLoRA, Gates
from logo.training.examples import Example
from logo.training.factors import Bank

# The most values that the logits of a pass may have: 0.5 GB in float32, and twice as much again in the backward pass.
MAX_LOGITS = 2**27


# The fixed cost of a pass, in tokens. On a CPU short passes multiply nearly as fast as long ones; other
# devices are not busy with a few hundred tokens.
_PER_PASS = {"cpu": 192}
_PER_PASS_ELSEWHERE = 512


@dataclass(frozen=True)
class Limits:
    """Limits and cost of one pass; a single row is never cut.

    Attributes:
        tokens: most tokens, padding included.
        positions: most positions with logits.
        per_pass: fixed cost of a pass, in tokens.
    """

    tokens: int
    positions: int
    per_pass: int = _PER_PASS["cpu"]

    @classmethod
    def of(cls, tokens: int, vocabulary: int, device: torch.device) -> Limits:
        """Limits for a vocabulary of this size on this device."""
        return cls(tokens, max(1, MAX_LOGITS // vocabulary), _PER_PASS.get(device.type, _PER_PASS_ELSEWHERE))


@dataclass(frozen=True)
class Owned:
    """A row, and the number of its adapter."""

    owner: int
    example: Example


@dataclass(frozen=True)
class Pass:
    """The rows of one forward pass, padded on the right.

    Attributes:
        ids, mask: (rows, length).
        gates: (rows, adapters): the scale of a row's own adapter, 0 for the others. Where one of them acts from a later
            token on, (rows, length, adapters): 0 before it.
        positions: (n,): where, in the rows laid one behind the other, the logits of completion tokens are.
        targets: (n,): the completion tokens; `owners`: (n,): the numbers of their adapters.
    """

    ids: Tensor
    mask: Tensor
    gates: Tensor
    positions: Tensor
    targets: Tensor
    owners: Tensor


def cut(rows: Sequence[Owned], limits: Limits) -> list[list[Owned]]:
    """The rows, longest first, in the cheapest passes: few passes with little padding."""
    ordered = sorted(rows, key=lambda one: -len(one.example))
    # For each row: the lowest cost of the rows from it on, and the number of rows in their first pass.
    best = [(0, 0)] * (len(ordered) + 1)
    for start in reversed(range(len(ordered))):
        length, positions = len(ordered[start].example), 0
        options = []
        for count, row in enumerate(ordered[start:], start=1):
            positions += row.example.completion
            if count > 1 and (count * length > limits.tokens or positions > limits.positions):
                break
            options.append((limits.per_pass + count * length + best[start + count][0], count))
        best[start] = min(options)
    passes, start = [], 0
    while start < len(ordered):
        count = best[start][1]
        passes.append(ordered[start : start + count])
        start += count
    return passes


def laid_out(rows: Sequence[Owned], scales: Sequence[float], pad: int, device: torch.device) -> Pass:
    """The pass over these rows.

    Args:
        scales: the scale of each adapter's update.
        pad: padding token.
    """
    length = max(len(row.example) - 1 for row in rows)  # a row's last token is only predicted, never read
    ids = torch.full((len(rows), length), pad)
    mask = torch.zeros(len(rows), length, dtype=torch.int64)
    gates = torch.zeros(len(rows), len(scales))
    begins = torch.tensor([row.example.begin for row in rows])
    positions: list[int] = []
    targets: list[int] = []
    owners: list[int] = []
    for number, row in enumerate(rows):
        tokens = row.example.ids
        ids[number, : len(tokens) - 1] = torch.tensor(tokens[:-1])
        mask[number, : len(tokens) - 1] = 1
        gates[number, row.owner] = scales[row.owner]
        positions += range(number * length + row.example.prompt - 1, number * length + len(tokens) - 1)
        targets += tokens[row.example.prompt :]
        owners += [row.owner] * row.example.completion
    if begins.any():
        gates = torch.where((torch.arange(length) >= begins[:, None])[:, :, None], gates[:, None], 0.0)
    placed = (torch.tensor(values, device=device) for values in (positions, targets, owners))
    return Pass(ids.to(device), mask.to(device), gates, *placed)


def losses(model: Any, bank: Bank, one: Pass, weights: Tensor | None = None) -> Tensor:
    """The negative log likelihood (n,) of every completion token of a pass, in nats, each under its row's adapter.

    Args:
        weights: (n,): if given, the gradient of the weighted sum of the losses is added to that of the bank's factors,
            unless a loss is not finite.
    """
    adapted = GatedLoRA({path: model.get_submodule(path) for path in bank.stacks})
    gates = Gates(one.gates.flatten(0, -2), per_token=one.gates.dim() == 3)
    with adapted.active(bank.stacks, gates), logits_at(model, one.positions):
        logits = model(input_ids=one.ids, attention_mask=one.mask, use_cache=False).logits
        found: Tensor = nn.functional.cross_entropy(logits.float(), one.targets.to(logits.device), reduction="none")
        if weights is not None and bool(found.isfinite().all()):
            # Within the block, because the backward pass recomputes layers whose activations were not kept.
            torch.autograd.backward((found * weights).sum())
    return found.detach()


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
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    dropping = [
        (layer, name, value)
        for layer in layers
        for name, value in vars(layer).items()
        if "dropout" in name and isinstance(value, float)
    ]
    for layer, name, _ in dropping:
        setattr(layer, name, 0.0)
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False
        for layer, name, value in dropping:
            setattr(layer, name, value)
        model.gradient_checkpointing_disable()
