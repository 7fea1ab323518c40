"""The gated LoRA on any linear module: `y = W x + B (g ⊙ (A x))`, with another gate `g` in every row or token.

The base module is called as it is: a forward hook adds the low-rank term to its output while a mixture is active.
Without an active mixture there is no hook, so outputs equal the base model's bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from logo.mixing.costs import kind_of
from logo.mixing.groups import Gate, GroupedMixture, gated_product
from logo.mixing.placement import unwaited
from logo.mixing.stacks import GroupedStack, Stack


class Gating(Protocol):
    """Multiplies the responses of adapters: `Gates`, or gates that open at positions (`OpeningGates`)."""

    def applied(self, stack: Stack, response: Tensor) -> Tensor:
        """`g ⊙ (A x)` of one module, for `A x` (..., R)."""

    def applied_turned(self, stack: Stack, lead: torch.Size, response: Tensor) -> Tensor:
        """`g ⊙ (A x)` of one module, for `A x` with the rank first: (R, *lead)."""


class Gates:
    """The weight of each of n adapters, per row of the batch or per token.

    Args:
        weights: (rows, n); with `per_token`, (tokens, n). Columns without an adapter have a gate of 0.
        per_token: the rows of `weights` are tokens, in the order in which a packed or (rows, length) batch is laid
            out in memory, instead of rows of the batch.
        placed: copies of the weights by device and dtype, with a column of zeros at the end; others are made when they
            are first used.

    A batch dimension that is a multiple of `rows` (beam search, several return sequences, flattened tokens) repeats
    every row that many times. One row of weights serves any batch. Decisions read the weights on the host, so that they
    do not wait for a device.
    """

    def __init__(
        self, weights: Tensor, *, per_token: bool = False, placed: Mapping[tuple[Any, ...], Tensor] | None = None
    ) -> None:
        if weights.dim() != 2:
            raise ValueError(f"gate weights must be (rows, adapters), got shape {tuple(weights.shape)}")
        self.weights = weights
        self.per_token = per_token
        self._placed = dict(placed or {})  # by device and dtype
        self._open: dict[torch.dtype, bool] = {}
        self._expanded: dict[tuple[int, int, torch.device, torch.dtype], Tensor] = {}
        self._shaped: dict[tuple[int, torch.Size, bool, torch.device, torch.dtype], Gate] = {}

    def applied(self, stack: Stack, response: Tensor) -> Tensor:
        """`g ⊙ (A x)` of one module, for `A x` (..., R).

        A gate of 0 gives 0 even if `A x` is not finite, so an adapter that overflows affects only the rows that use it.
        """
        return gated_product(response, self._gate(stack, response.shape[:-1], response, turned=False))

    def applied_turned(self, stack: Stack, lead: torch.Size, response: Tensor) -> Tensor:
        """As `applied`, for `A x` with the rank first: (R, *lead)."""
        return gated_product(response, self._gate(stack, lead, response, turned=True))

    def _gate(self, stack: Stack, lead: torch.Size, like: Tensor, *, turned: bool) -> Gate:
        """The gate, shaped to multiply `A x`, whose dimensions but the rank are `lead`."""
        key = (id(stack.owner), lead, turned, like.device, like.dtype)
        if key not in self._shaped:
            gate = self._repeated(stack.owner, lead.numel() if self.per_token else lead[0], like)
            gate = gate.reshape(*(lead if self.per_token else (gate.shape[0], *[1] * (len(lead) - 1))), -1)
            gate = gate.movedim(-1, 0).contiguous() if turned else gate
            self._shaped[key] = gate, None if self._all_open(like.dtype) and not stack.gaps else gate == 0
        return self._shaped[key]

    def _all_open(self, dtype: torch.dtype) -> bool:
        if dtype not in self._open:
            self._open[dtype] = bool(self.weights.to(dtype).all())
        return self._open[dtype]

    def _repeated(self, owner: Tensor, count: int, like: Tensor) -> Tensor:
        # Modules that the same adapters touch share one owner tensor, which lives as long as their stacks do.
        key = (id(owner), count, like.device, like.dtype)
        if key not in self._expanded:
            rows = self.weights.shape[0]
            if rows != 1 and (count % rows or (self.per_token and count != rows)):
                unit = "tokens" if self.per_token else "rows"
                raise ValueError(f"gates for {rows} {unit} cannot serve a batch of {count} {unit}")
            place = (like.device, like.dtype)
            if place not in self._placed:
                wide = torch.nn.functional.pad(self.weights, (0, 1))
                self._placed[place] = wide.to(*place, non_blocking=unwaited(like.device))
            gate = self._placed[place].index_select(1, owner)  # (rows, R)
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
    def active(self, stacks: Mapping[str, Stack], gates: Gating | Tensor) -> Iterator[None]:
        """Adds `Σ_i g_i s_i B_i A_i x` to every module that has a stack, inside the block."""
        made = Gates(gates) if isinstance(gates, Tensor) else gates
        with hooked(self.modules, {path: adding(low_rank, stack, made) for path, stack in stacks.items()}):
            yield

    @contextmanager
    def grouped(self, stacks: Mapping[str, GroupedStack], mixture: GroupedMixture) -> Iterator[None]:
        """Adds the mixtures of groups of rows, each multiplied by the factors of its own adapters, inside the block."""
        with hooked(self.modules, {path: adding(mixture.low_rank, stack) for path, stack in stacks.items()}):
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


def adding(term: Callable[..., Tensor], *factors: Any) -> Any:
    """A forward hook that adds a low-rank term to the output of a module."""

    def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        more = scaled(module, term(inputs[0], *factors)).to(output.dtype)
        # The output may be changed in place: it is new, and without gradients nobody else reads it.
        return output + more if output.requires_grad else output.add_(more)

    return add


def scaled(module: nn.Module, term: Tensor) -> Tensor:
    """A term times the scale by which a module multiplies its output, as Gemma's embeddings do; PEFT does the same."""
    scale = getattr(module, "embed_scale", None)
    return term if scale is None else term * scale


def low_rank(x: Tensor, stack: Stack, gates: Gating) -> Tensor:
    """`B (g ⊙ (A x))` for `x` (..., d_in), or for tokens (...) of an embedding; (..., d_out) in the stack's dtype."""
    if not x.is_floating_point():
        return gates.applied(stack, torch.nn.functional.embedding(x, stack.A.T)) @ stack.B
    x = x.to(stack.A.dtype)
    turned = kind_of(x.device).turned
    if turned is None or not turned[0] <= x.numel() // x.shape[-1] <= turned[1]:
        shrunk = torch.nn.functional.linear(x, stack.A)  # (..., R)
        return gates.applied(stack, shrunk) @ stack.B  # (..., d_out)
    # The same product with the factors on the left: CPU libraries compute it faster for the few tokens of a batch.
    lead = x.shape[:-1]
    shrunk = torch.mm(stack.A, x.reshape(-1, x.shape[-1]).T)  # (R, tokens)
    shrunk = gates.applied_turned(stack, lead, shrunk.view(-1, *lead)).view(len(stack.A), -1)
    return torch.unflatten(torch.mm(stack.B.T, shrunk).T, 0, lead)
