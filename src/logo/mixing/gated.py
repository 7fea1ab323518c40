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

from logo.mixing.groups import GroupedMixture, GroupedStack
from logo.mixing.working_set import Stack, WorkingSet

# A gate, and where it is closed; None: nowhere.
_Gate = tuple[Tensor, Tensor | None]

# Tokens for which products with the factors on the left are faster on a CPU (measured: 20 to 30 % at 16 to 256).
_FEW, _MANY = 12, 256


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
        self._all_open = bool((weights != 0).all())
        self._expanded: dict[tuple[int, int, torch.device, torch.dtype], Tensor] = {}
        self._shaped: dict[tuple[int, torch.Size, bool, torch.device, torch.dtype], _Gate] = {}

    def applied(self, owner: Tensor, response: Tensor) -> Tensor:
        """`g ⊙ (A x)` of one module.

        A closed gate gives 0, also where `A x` is not finite: an adapter that overflows spoils no row but its own.

        Args:
            owner: (R,) adapter index of each rank column.
            response: `A x`, (..., R).
        """
        return _product(response, self._gate(owner, response.shape[:-1], response, turned=False))

    def applied_turned(self, owner: Tensor, lead: torch.Size, response: Tensor) -> Tensor:
        """The same with the rank first: (R, *lead)."""
        return _product(response, self._gate(owner, lead, response, turned=True))

    def _gate(self, owner: Tensor, lead: torch.Size, like: Tensor, *, turned: bool) -> _Gate:
        """The gate, shaped to multiply `A x`, whose dimensions but the rank are `lead`."""
        key = (id(owner), lead, turned, like.device, like.dtype)
        if key not in self._shaped:
            gate = self._repeated(owner, lead.numel() if self.per_token else lead[0], like)
            gate = gate.reshape(*(lead if self.per_token else (gate.shape[0], *[1] * (len(lead) - 1))), -1)
            gate = gate.movedim(-1, 0).contiguous() if turned else gate
            self._shaped[key] = gate, None if self._all_open else gate == 0
        return self._shaped[key]

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
        with hooked(self.modules, {path: mixture.hook(stack) for path, stack in working_set.stacks.items()}):
            yield mixture

    @contextmanager
    def grouped(self, stacks: Mapping[str, GroupedStack], mixture: GroupedMixture) -> Iterator[None]:
        """The same for rows in groups, each with its own adapters' factors."""
        with hooked(self.modules, {path: mixture.hook(stack) for path, stack in stacks.items()}):
            yield


@contextmanager
def hooked(modules: Mapping[str, nn.Module], hooks: Mapping[str, Any]) -> Iterator[None]:
    """Forward hooks on modules, by path, inside the block."""
    handles = [modules[path].register_forward_hook(hook) for path, hook in hooks.items()]
    try:
        yield
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


def _product(response: Tensor, gate: _Gate) -> Tensor:
    factor, closed = gate
    product = response * factor
    return product if closed is None else product.masked_fill_(closed, 0)


def low_rank(x: Tensor, stack: Stack, gates: Gates) -> Tensor:
    """`B (g ⊙ (A x))` for `x` (..., d_in); returns (..., d_out) in the stack's dtype."""
    x = x.to(stack.A.dtype)
    if x.device.type != "cpu" or not _FEW <= x.numel() // x.shape[-1] <= _MANY:
        shrunk = torch.nn.functional.linear(x, stack.A)  # (..., R)
        return torch.nn.functional.linear(gates.applied(stack.owner, shrunk), stack.B)  # (..., d_out)
    # The same with the factors on the left, which CPU libraries multiply faster by the few columns of a batch.
    lead = x.shape[:-1]
    turned = torch.mm(stack.A, x.reshape(-1, x.shape[-1]).T)  # (R, tokens)
    turned = gates.applied_turned(stack.owner, lead, turned.view(-1, *lead)).view(len(stack.A), -1)
    return torch.unflatten(torch.mm(stack.B, turned).T, 0, lead)
