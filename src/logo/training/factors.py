"""The factors of adapters during training: one pair of matrices per module for all adapters of a group.

    A (R, d_in)   B (R, d_out)      R = Σ r_i, as in the store; an adapter's parameters are its rows of them

An adapter's parameters are views into the group's matrices. The forward pass multiplies by whole matrices and the
optimiser of each adapter writes into its own rows, so nothing is copied between the two.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from logo.adapters.layout import LinearShape, linear_shape
from logo.errors import UsageError
from logo.mixing.placement import device_of
from logo.mixing.stacks import Stack
from logo.training.recipe import Recipe


class Factors:
    """One adapter's `A (r, d_in)` and `B (r, d_out)` per module, in float32; PEFT's `lora_B` is `B` transposed.

    They are initialised as PEFT does: A from Kaiming's uniform distribution, B with zeros.

    Args:
        shapes: module path -> its sizes.
        devices: module path -> where it computes.
        r: the rank.
        seed, name: of the adapter; adapters of the same seed and different names start from different factors.
    """

    def __init__(
        self,
        shapes: Mapping[str, LinearShape],
        devices: Mapping[str, torch.device],
        r: int,
        seed: int,
        name: str,
    ) -> None:
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        self.A: dict[str, nn.Parameter] = {}
        self.B: dict[str, nn.Parameter] = {}
        for path, shape in sorted(shapes.items()):
            A = torch.empty(r, shape.in_features)
            nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
            self.A[path] = nn.Parameter(A.to(devices[path]))
            self.B[path] = nn.Parameter(torch.zeros(r, shape.out_features, device=devices[path]))

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All parameters, in the order of the module paths, A before B."""
        return [self.A[path] for path in self.A] + [self.B[path] for path in self.B]

    @property
    def finite(self) -> bool:
        """Whether all values are finite."""
        return all(bool(parameter.isfinite().all()) for parameter in self.parameters)

    def copy(self) -> dict[str, Tensor]:
        """A copy of the present values, by `A.path` and `B.path`."""
        return {key: tensor.detach().clone() for key, tensor in self.named()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Sets the values to those of a `copy`."""
        with torch.no_grad():
            for key, tensor in self.named():
                tensor.copy_(tensors[key])

    def named(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters by `A.path` or `B.path`."""
        return [(f"A.{path}", A) for path, A in self.A.items()] + [(f"B.{path}", B) for path, B in self.B.items()]


class Bank:
    """The factors of several adapters, as one stack per module.

    Args:
        factors: the factors of each adapter. Their parameters become views into the bank; optimisers keep working on
            them.

    Attributes:
        stacks: module path -> the factors of all adapters that adapt it, as tensors with gradients.
    """

    def __init__(self, factors: Sequence[Factors]) -> None:
        self.stacks: dict[str, Stack] = {}
        self._parts: list[tuple[Tensor, slice, nn.Parameter]] = []
        owners: dict[tuple[Any, ...], Tensor] = {}
        for path in dict.fromkeys(path for one in factors for path in one.A):
            members = [(number, one) for number, one in enumerate(factors) if path in one.A]
            A = self._joined([one.A[path] for _, one in members])
            B = self._joined([one.B[path] for _, one in members])
            owner = [number for number, one in members for _ in range(len(one.A[path]))]
            # Modules that the same adapters touch share one tensor, and so the gates made from it.
            key = (A.device, *owner)
            if key not in owners:
                owners[key] = torch.tensor(owner, device=A.device)
            self.stacks[path] = Stack(A, B, owners[key])

    def _joined(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """A tensor that concatenates these parameters, which become views of its rows."""
        whole = torch.cat([parameter.detach() for parameter in parameters]).requires_grad_()
        start = 0
        for parameter in parameters:
            rows = slice(start, start + len(parameter))
            parameter.data = whole.detach()[rows]
            parameter.grad = None
            self._parts.append((whole, rows, parameter))
            start = rows.stop
        return whole

    @property
    def finite(self) -> bool:
        """Whether all values are finite."""
        return all(bool(factors.isfinite().all()) for stack in self.stacks.values() for factors in (stack.A, stack.B))

    def clear(self) -> None:
        """Resets the gradients."""
        for whole, _, parameter in self._parts:
            whole.grad = parameter.grad = None

    def collect(self, scale: float = 1.0) -> None:
        """Gives each parameter its rows of the gradients, divided by the scale of the loss."""
        for whole, rows, parameter in self._parts:
            if whole.grad is not None:
                parameter.grad = whole.grad[rows] if scale == 1 else whole.grad[rows] / scale


@dataclass(frozen=True)
class Adapted:
    """The modules of a model that a recipe adapts, as PEFT finds them.

    Attributes:
        shapes: module path -> its sizes.
        targets: names of these modules, as PEFT writes them into a configuration.
        transposed: whether the modules store their weights transposed (Conv1D, as in GPT-2).
    """

    shapes: Mapping[str, LinearShape]
    targets: tuple[str, ...]
    transposed: bool


def adapted(model: Any, recipe: Recipe) -> Adapted:
    """The modules that a recipe adapts.

    Args:
        model: on the meta device; it is changed.

    Raises:
        UsageError: it adapts no module, one that is not linear, or the output head.
    """
    from peft import inject_adapter_in_model

    shapes = {path: linear_shape(module) for path, module in model.named_modules()}
    head = {path for path, module in model.named_modules() if module is model.get_output_embeddings()}
    asked = ", ".join(recipe.targets)
    try:
        config = recipe.lora(transposed=any(type(module).__name__ == "Conv1D" for module in model.modules()))
        injected = inject_adapter_in_model(config, model)
    except ValueError as error:  # no module of these names, or one of another kind
        raise UsageError(f"targets {asked}: {' '.join(str(error).split())}") from None
    found = [path for path, module in injected.named_modules() if hasattr(module, "lora_A")]
    made: dict[str, LinearShape] = {}
    for path in found:
        shape = shapes[path]
        if shape is None or path in head:
            what = "the output head" if path in head else "not a linear module"
            raise UsageError(f"targets {asked}: {path} is {what}, which cannot be trained here; leave it out")
        made[path] = shape
    # PEFT has written the names that it found into the configuration.
    return Adapted(made, tuple(sorted(config.target_modules)), bool(config.fan_in_fan_out))


def devices_of(model: nn.Module, paths: Sequence[str]) -> dict[str, torch.device]:
    """Module path -> the device on which the module computes."""
    return {path: device_of(model.get_submodule(path)) for path in paths}
