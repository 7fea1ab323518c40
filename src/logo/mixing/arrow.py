"""Arrow (arXiv 2405.11157): every token is routed on every module, to the adapters whose direction it points in.

    v_i        the first right singular vector of ΔW_i = s_i B_i A_i, of either sign
    c          softmax(|x·v_i| / τ) over the top k adapters of this token, 0 for the others
    y          W x + Σ_i c_i s_i B_i A_i x

Needs no training, no data and no probe, but every adapter it may choose from in memory. Weights of a selection say
which adapters a row may use and nothing else. Routes are found in the forward pass, so nothing is ever folded.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from logo.mixing.stacks import Stack

Hook = Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]


@dataclass(frozen=True)
class Experts:
    """The adapters on one module, as Arrow sees them.

    Attributes:
        directions: (n, d_in), unit vectors; zeros for an adapter of zeros.
        members: (n,) which of the adapters they are, ascending.
        owner: (R,) index into `members` for each rank column.
    """

    directions: Tensor
    members: Tensor
    owner: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, stack: Stack) -> Experts:
        """Of the adapters that one stack holds."""
        members = torch.unique(stack.owner)
        directions = []
        for member in members:
            columns = stack.owner == member
            directions.append(direction(stack.A[columns].float(), stack.B[columns].float().T))
        return cls(torch.stack(directions).to(stack.A.dtype), members, torch.searchsorted(members, stack.owner))


@dataclass(frozen=True)
class Routing:
    """How many adapters a token gets, and how sharply.

    Attributes:
        top_k: adapters per token, fewer where a module has fewer.
        temperature: `τ`, in units of the similarity `|x·v|`.
    """

    top_k: int = 3
    temperature: float = 1.0

    def __call__(self, x: Tensor, directions: Tensor, allowed: Tensor | None = None) -> Tensor:
        """The coefficients `c` (..., n) of tokens x (..., d_in).

        Args:
            directions: (n, d_in).
            allowed: (..., n) whether a token may use an adapter; None: all.
        """
        similarity = (x @ directions.T).abs()
        if allowed is not None:
            similarity = similarity.masked_fill(~allowed, -torch.inf)
        top, indices = similarity.topk(min(self.top_k, len(directions)), dim=-1)
        shares = (top.float() / self.temperature).softmax(dim=-1)
        shares = shares.masked_fill(top == -torch.inf, 0.0)  # without any adapter, the softmax is no number
        return torch.zeros_like(similarity).scatter(-1, indices, shares.to(similarity.dtype))


class Arrow:
    """Routes tokens on the linear modules of one base model, for as long as a `with` block lasts.

    Args:
        modules: base module path -> linear module.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.modules = modules
        self._held: tuple[Hashable, dict[str, Experts]] | None = None

    @contextmanager
    def active(self, key: Hashable, stacks: Mapping[str, Stack], allowed: Tensor, routing: Routing) -> Iterator[None]:
        """Adds `Σ_i c_i s_i B_i A_i x` to every adapted module inside the block.

        Args:
            key: tells these stacks from others.
            allowed: (rows, adapters of the stacks), whether a row of the batch may use an adapter; one row
                serves any batch. A batch that is a multiple of the rows (beams) repeats each of them.
        """
        experts = self._experts(key, stacks)
        free = len(allowed) == 1 and bool(allowed.all())
        handles = [
            self.modules[path].register_forward_hook(_hook(stack, experts[path], None if free else allowed, routing))
            for path, stack in stacks.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def forget(self) -> None:
        """Drops the directions: the pool has changed."""
        self._held = None

    def _experts(self, key: Hashable, stacks: Mapping[str, Stack]) -> dict[str, Experts]:
        if self._held is None or self._held[0] != key:
            self._held = key, {path: Experts.of(stack) for path, stack in stacks.items()}
        return self._held[1]


def direction(A: Tensor, B: Tensor) -> Tensor:
    """The first right singular vector (d_in,) of `B A`, from the r × r Gram matrices of its factors.

    With `S = (BᵀB)^½`, the eigenvectors z of `S A Aᵀ S` give the right singular vectors `Aᵀ S z` of `B A`. Its sign is
    of no consequence.
    """
    # Small matrices: on the CPU, since not every accelerator has double precision.
    inner, outer = (gram.cpu().double() for gram in (B.T @ B, A @ A.T))
    values, vectors = torch.linalg.eigh(inner)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    first = torch.linalg.eigh(root @ outer @ root)[1][:, -1]
    found: Tensor = A.T @ (root @ first).to(A.device, A.dtype)
    return torch.nn.functional.normalize(found, dim=0)


def routed(x: Tensor, stack: Stack, experts: Experts, routing: Routing, allowed: Tensor | None = None) -> Tensor:
    """`Σ_i c_i s_i B_i A_i x` for x (rows, ..., d_in); returns (rows, ..., d_out) in the stack's dtype.

    Args:
        allowed: (rows or a divisor of them, adapters of the stacks); None: all.
    """
    x = x.to(stack.A.dtype)
    if allowed is not None:
        allowed = _spread(allowed, experts.members, x)
    coefficients = routing(x, experts.directions, allowed)  # (..., n)
    shrunk = torch.nn.functional.linear(x, stack.A)  # (..., R)
    return (shrunk * coefficients[..., experts.owner]) @ stack.B


def _spread(allowed: Tensor, members: Tensor, x: Tensor) -> Tensor:
    """(rows, 1, ..., n): for each row of the batch, which of a module's adapters it may use."""
    allowed = allowed.to(x.device)[:, members]
    if len(x) % len(allowed):
        raise ValueError(f"routes for {len(allowed)} rows cannot serve a batch of {len(x)} rows")
    if len(allowed) > 1:
        allowed = allowed.repeat_interleave(len(x) // len(allowed), dim=0)
    return allowed.reshape(len(allowed), *[1] * (x.dim() - 2), -1)


def _hook(stack: Stack, experts: Experts, allowed: Tensor | None, routing: Routing) -> Hook:
    def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + routed(inputs[0], stack, experts, routing, allowed).to(output.dtype)

    return add
