"""The gated LoRA on any linear module: `y = W x + B (g ⊙ (A x))`, with another gate `g` in every row or token.

The base module is only called, never looked into or changed: the low-rank term is added to its output by a forward
hook that exists while a mixture is active. With no mixture active there is no hook, so outputs are bit-equal to the
base model's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from logo.mixing.working_set import Stack, WorkingSet


class Gates:
    """How strongly each adapter of a working set acts, per row of the batch or per token.

    Args:
        weights: (rows, n) with one column per adapter of the working set; with `per_token`, (tokens, n).
        per_token: the rows of `weights` are tokens, in the order in which a packed or (rows, length) batch is laid
            out in memory, instead of rows of the batch.

    A batch dimension that is a multiple of `rows` (beam search, several return sequences, flattened tokens) repeats
    every row that many times. One row of weights serves any batch.
    """

    def __init__(self, weights: Tensor, *, per_token: bool = False) -> None:
        if weights.dim() != 2:
            raise ValueError(f"gate weights must be (rows, adapters), got shape {tuple(weights.shape)}")
        self.weights = weights
        self.per_token = per_token
        self._expanded: dict[tuple[int, int, torch.device, torch.dtype], Tensor] = {}

    def columns(self, owner: Tensor, like: Tensor) -> Tensor:
        """The gate `g` of one module, shaped to multiply `A x`.

        Args:
            owner: (R,) adapter index of each rank column.
            like: `A x`, (..., R).

        Returns:
            (..., R) or (rows, 1, R), broadcastable to `like`.
        """
        lead = like.shape[:-1]
        count = lead.numel() if self.per_token else lead[0]
        gate = self._repeated(owner, count, like)
        if self.per_token:
            return gate.reshape(*lead, -1)
        return gate.reshape(gate.shape[0], *[1] * (len(lead) - 1), -1)

    def _repeated(self, owner: Tensor, count: int, like: Tensor) -> Tensor:
        # Stacks with the same columns share one owner tensor, which lives as long as the working set does.
        key = (id(owner), count, like.device, like.dtype)
        if key not in self._expanded:
            rows = self.weights.shape[0]
            if rows != 1 and (count % rows or (self.per_token and count != rows)):
                unit = "tokens" if self.per_token else "rows"
                raise ValueError(f"gates for {rows} {unit} cannot serve a batch of {count} {unit}")
            gate = self.weights.to(like.device, like.dtype)[:, owner.to(like.device)]  # (rows, R)
            if rows not in (1, count):
                gate = gate.repeat_interleave(count // rows, dim=0)
            self._expanded[key] = gate
        gate = self._expanded[key]
        return gate.expand(count, -1) if self.per_token else gate


class GatedLoRA:
    """Adds mixtures to the linear modules of one base model, for as long as a `with` block lasts.

    Args:
        modules: base module path -> linear module; see `logo.adapters.layout.linear_modules`.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.modules = modules

    @contextmanager
    def active(self, working_set: WorkingSet, gates: Gates | Tensor) -> Iterator[Mixture]:
        """Adds `Σ_i g_i s_i B_i A_i x` to every adapted module inside the block.

        Yields:
            The live mixture, whose `gates` may be replaced between forward passes.
        """
        mixture = Mixture(gates if isinstance(gates, Gates) else Gates(gates))
        handles = [
            self.modules[path].register_forward_hook(mixture.hook(stack)) for path, stack in working_set.stacks.items()
        ]
        try:
            yield mixture
        finally:
            for handle in handles:
                handle.remove()


class Mixture:
    """The mixture that is active now."""

    def __init__(self, gates: Gates) -> None:
        self.gates = gates

    def hook(self, stack: Stack) -> Any:
        """A forward hook that adds this mixture's low-rank term on one module."""

        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return output + low_rank(inputs[0], stack, self.gates).to(output.dtype)

        return add


def low_rank(x: Tensor, stack: Stack, gates: Gates) -> Tensor:
    """`B (g ⊙ (A x))` for `x` (..., d_in); returns (..., d_out) in the stack's dtype."""
    shrunk = torch.nn.functional.linear(x.to(stack.A.dtype), stack.A)  # (..., R)
    return torch.nn.functional.linear(shrunk * gates.columns(stack.owner, shrunk), stack.B)  # (..., d_out)
