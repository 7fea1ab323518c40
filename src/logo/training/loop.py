"""Training of one adapter: a PEFT model around the frozen base model, AdamW, and a loop over its rows."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from logo.adapters.layout import linear_shape
from logo.errors import ModelError, NotFinite, UsageError
from logo.models import device_of, load_base, pick_device
from logo.training.config import ALL_LINEAR, TrainingConfig
from logo.training.rows import TaskRows, TokenizedRow

PASS_TOKENS = 2048  # tokens of a forward pass, padding included; a single row is never cut
MAX_LOGITS = 2**27  # values of a pass: 0.5 GB in float32, and twice as much again in the backward pass
_WARMUP = 0.03  # of the steps
_CLIP = 1.0  # the largest norm of a gradient
_MEASURED = 10  # times, if there are as many steps


@dataclass(frozen=True)
class Base:
    """The frozen base model, in evaluation mode and without gradients of its own, and its tokenizer."""

    model: Any
    tokenizer: Any

    @classmethod
    def load(cls, base_model: str, device: str = "auto", model_dir: str | None = None) -> Base:
        """Loads a base model: in bfloat16 on an accelerator, on the CPU as `load_base` does.

        Raises:
            ModelError, HubError, UsageError: as `load_base`; ModelError if it is no language model.
        """
        dtype = "auto" if pick_device(device).type == "cpu" else "bfloat16"
        base = cls(*load_base(base_model, device=device, dtype=dtype, model_dir=model_dir))
        if base.head is None:
            raise ModelError(f"base model {base_model}: expected a language model with an output head")
        return base

    @property
    def head(self) -> Any:
        """The output head."""
        return self.model.get_output_embeddings()

    @property
    def vocabulary(self) -> int:
        """The number of tokens that the model predicts."""
        return int(self.head.weight.shape[0])

    @property
    def device(self) -> torch.device:
        """Where rows are read."""
        return device_of(self.model.get_input_embeddings())


@dataclass(frozen=True)
class Measured:
    """The losses of an adapter.

    Attributes:
        step: optimiser steps so far.
        train: mean loss per token of the steps since the last measurement, in nats.
        held_out: mean loss per token of the held-out rows; None if there are none.
    """

    step: int
    train: float
    held_out: float | None

    def better(self, other: Measured) -> bool:
        """Whether it is better than an earlier one; without held-out rows it is, since losses of different batches
        cannot be compared."""
        return self.held_out is None or other.held_out is None or self.held_out < other.held_out


@dataclass(frozen=True)
class Fitted:
    """A trained adapter.

    Attributes:
        tensors: its factors in float32, by PEFT's names.
        config: PEFT's configuration.
        steps: optimiser steps that were made.
        early: whether that is fewer than asked for, because the held-out loss no longer fell.
        best: the losses at the step whose factors are kept.
        measured: all measurements.
    """

    tensors: Mapping[str, Tensor]
    config: Any
    steps: int
    early: bool
    best: Measured
    measured: tuple[Measured, ...]


@dataclass(frozen=True)
class Adapted:
    """A base model in which PEFT has put an adapter, to be trained.

    Attributes:
        wrapped: PEFT's model.
        layers: PEFT's layers in it.
        factors: the adapter's parameters by name: every A and then every B.
    """

    base: Base
    wrapped: Any
    layers: tuple[Any, ...]
    factors: Mapping[str, nn.Parameter]

    def gradient(self, rows: Sequence[TokenizedRow]) -> tuple[float, float]:
        """Gives the factors the clipped gradient of the mean loss per token of these rows; that loss, and the norm of
        the gradient before it was clipped."""
        tokens = completion_tokens(rows)
        loss = summed(self.base, self.layers, rows, 1 / tokens) / tokens
        norm = nn.utils.clip_grad_norm_(self.factors.values(), _CLIP)
        return loss, float(norm)

    def loss(self, rows: Sequence[TokenizedRow]) -> float:
        """The mean loss per token of these rows, in nats."""
        return summed(self.base, self.layers, rows) / completion_tokens(rows)

    def copied(self) -> dict[str, Tensor]:
        """A copy of the factors as they are now, by the names of PEFT's files."""
        from peft import get_peft_model_state_dict

        state = get_peft_model_state_dict(self.wrapped, save_embedding_layers=False)
        return {name: tensor.detach().clone() for name, tensor in state.items()}


def fit(
    base: Base, task: TaskRows, config: TrainingConfig, tell: Callable[[int, float], None] = lambda *_: None
) -> Fitted:
    """Trains an adapter; the base model is afterwards as it was before.

    Args:
        tell: called after each step, with the number of steps so far and the step's loss.

    Raises:
        UsageError: the targets of the config cannot be trained.
        NotFinite: a loss, a gradient or a factor is not finite.
    """
    from peft import get_peft_model
    from peft.tuners.lora import LoraLayer

    try:
        wrapped = get_peft_model(base.model, config.lora(base.model))
    except ValueError as error:  # no module of these names, or one of another kind
        raise UsageError(f"targets {config.targets}: {' '.join(str(error).split())}") from None
    try:
        wrapped.eval()  # no dropout
        layers = {name: module for name, module in base.model.named_modules() if isinstance(module, LoraLayer)}
        _check_targets(base, layers, config)
        trained = [(name, parameter) for name, parameter in wrapped.named_parameters() if parameter.requires_grad]
        factors = dict(sorted(trained, key=lambda named: (".lora_B." in named[0], named[0])))
        _initialise(factors, f"{config.seed} {task.name}")
        return _optimised(Adapted(base, wrapped, tuple(layers.values()), factors), task, config, tell)
    finally:
        wrapped.unload()


def _optimised(adapted: Adapted, task: TaskRows, config: TrainingConfig, tell: Callable[[int, float], None]) -> Fitted:
    """Takes the steps of a training, measures, and keeps the factors of the best measurement."""
    from transformers import get_scheduler

    optimizer = torch.optim.AdamW(adapted.factors.values(), lr=config.lr, weight_decay=0.0, fused=True)
    steps = config.length(len(task.learned))
    schedule = get_scheduler("cosine", optimizer, round(_WARMUP * steps), steps)
    measured_at = _measured_at(steps)
    measurements: list[Measured] = []
    best = Measured(0, math.inf, math.inf)
    best_factors: dict[str, Tensor] = {}
    # Of the steps since the last measurement.
    nats = 0.0
    tokens = 0
    for step in range(1, steps + 1):
        batch = task.batch(step - 1, config)
        optimizer.zero_grad()
        loss, norm = adapted.gradient(batch)
        _check_finite(step, "loss", loss)
        _check_finite(step, "gradient", norm)
        optimizer.step()
        schedule.step()
        nats += loss * completion_tokens(batch)
        tokens += completion_tokens(batch)
        tell(step, loss)
        if step not in measured_at:
            continue
        held_out = None
        if task.held_out:
            held_out = adapted.loss(task.held_out)
            _check_finite(step, "held-out loss", held_out)
        measurement = Measured(step, nats / tokens, held_out)
        measurements.append(measurement)
        nats = 0.0
        tokens = 0
        if measurement.better(best):
            best = measurement
            best_factors = adapted.copied()
            _check_finite(step, "sum of factors", sum(float(tensor.sum()) for tensor in best_factors.values()))
        since_best = sum(measurement.step > best.step for measurement in measurements)
        if config.patience and since_best >= config.patience:
            break
    peft_config = adapted.wrapped.peft_config["default"]
    return Fitted(best_factors, peft_config, step, step < steps, best, tuple(measurements))


def _measured_at(steps: int) -> set[int]:
    """The steps after which losses are measured; the last one is among them."""
    count = min(_MEASURED, steps)
    return {round(steps * (number + 1) / count) for number in range(count)}


def completion_tokens(rows: Sequence[TokenizedRow]) -> int:
    """The number of tokens that the loss of these rows covers."""
    return sum(row.completion for row in rows)


def _check_targets(base: Base, layers: Mapping[str, Any], config: TrainingConfig) -> None:
    """Raises UsageError for layers that cannot be trained here, or mixed afterwards, and names that match none."""
    targets = [] if config.names == [ALL_LINEAR] else config.names
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in layers):
            raise UsageError(f"targets {config.targets}: no module of the base model is called {target}; leave it out")
    for name, layer in layers.items():
        if layer is base.head or linear_shape(layer.get_base_layer()) is None:
            kind = "the output head" if layer is base.head else "not a linear module"
            raise UsageError(f"targets {config.targets}: {name} is {kind}, which cannot be trained here; leave it out")


def _check_finite(step: int, name: str, value: float) -> None:
    if not math.isfinite(value):
        raise NotFinite(f"at step {step} its {name} is {value}; give a lower --lr")


def _initialise(factors: Mapping[str, nn.Parameter], seed: str) -> None:
    """Draws all A as PEFT does, from a seed of their own: adapters of the same seed and other names begin elsewhere."""
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "big"))
    with torch.no_grad():
        for name, factor in factors.items():
            if ".lora_A." in name:
                drawn = torch.empty(factor.shape)
                factor.copy_(nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator))


def passes(rows: Sequence[TokenizedRow], vocabulary: int) -> list[list[TokenizedRow]]:
    """The rows, longest first, in forward passes within the limits."""
    filled: list[list[TokenizedRow]] = []
    for row in sorted(rows, key=len, reverse=True):
        if filled:
            joined = [*filled[-1], row]
            padded_tokens = len(joined) * len(joined[0])
            logits = completion_tokens(joined) * vocabulary
            if padded_tokens <= PASS_TOKENS and logits <= MAX_LOGITS:
                filled[-1] = joined
                continue
        filled.append([row])
    return filled


def summed(base: Base, layers: Collection[Any], rows: Sequence[TokenizedRow], weight: float | None = None) -> float:
    """The negative log likelihood of all completion tokens of these rows, in nats.

    Args:
        layers: PEFT's layers in the model.
        weight: if given, the gradient of this many times the sum is added to that of the adapter's parameters.
    """
    total = 0.0
    for batch in passes(rows, base.vocabulary):
        length = len(batch[0]) - 1  # the longest; a row's last token is only predicted, never read
        ids = torch.zeros(len(batch), length, dtype=torch.int64)
        mask = torch.zeros(len(batch), length, dtype=torch.int64)
        positions: list[int] = []
        for number, row in enumerate(batch):
            ids[number, : len(row) - 1] = torch.tensor(row.ids[:-1])
            mask[number, : len(row) - 1] = 1
            positions += range(number * length + row.prompt - 1, number * length + len(row) - 1)
        targets = torch.tensor([token for row in batch for token in row.ids[row.prompt :]])
        inputs = {"input_ids": ids.to(base.device), "attention_mask": mask.to(base.device), "use_cache": False}
        with (
            torch.set_grad_enabled(weight is not None),
            acting_from(layers, [row.begin for row in batch], length),
            logits_at(base.head, torch.tensor(positions)),
        ):
            logits = base.model(**inputs).logits
            losses = nn.functional.cross_entropy(logits.float(), targets.to(logits.device), reduction="none")
        if weight is not None:
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

    handles = [up.register_forward_hook(masked) for layer in layers for up in layer.lora_B.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def logits_at(head: nn.Module, positions: Tensor) -> Iterator[None]:
    """Within the block, the output head computes logits (n, vocabulary) only at these positions of the concatenated
    rows: with a vocabulary of 262,000, the logits of whole rows would be most of the work."""

    def picked(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = inputs[0]
        return (hidden.reshape(-1, hidden.shape[-1])[positions.to(hidden.device)], *inputs[1:])

    handle = head.register_forward_pre_hook(picked)
    try:
        yield
    finally:
        handle.remove()
