"""Routing: every token chooses adapters on every module by a similarity to them, without training.

    arrow      |x·v_i|                     v_i the first right singular vector of ΔW_i = s_i B_i A_i (arXiv 2405.11157)
    spectr     ‖ΔW_i x‖ = ‖Σ_i V_iᵀ x‖     the whole spectrum instead of its first direction (arXiv 2504.03454)
    seqr       (‖ΔW_i x‖ - μ_i) / σ_i      the same, standardised on neutral text (arXiv 2509.18093)

    c          softmax(similarity / τ) over the top k adapters of this token, 0 for the others; seqr: the first alone
    y          W x + Σ_i c_i s_i B_i A_i x

Norms are `‖ΔW_i x‖ = ‖R_i A_i x‖` with the QR decomposition `s_i B_i = Q_i R_i`, so that no vector of the output's size
is needed. All adapters that tokens may choose from have to be in memory. The weights of a selection only say which
adapters a row may use. Routes are chosen in the forward pass, so nothing is folded.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from logo.errors import UsageError
from logo.mixing.gated import adding, hooked
from logo.mixing.stacks import Stack

Kind = Literal["arrow", "spectr", "seqr"]


@dataclass(frozen=True)
class Moments:
    """Mean and standard deviation of the norms that adapters have on neutral text at one module, each (n,)."""

    mean: Tensor
    deviation: Tensor


@dataclass(frozen=True)
class Experts:
    """The adapters on one module, as a router compares them.

    Attributes:
        factors: (F, d_in). For `arrow` one unit vector per adapter (zeros for an adapter of zeros), else the rows of
            all `R_i A_i`.
        of: (F,) index into `members` for each factor.
        members: (n,) the adapters that touch the module, ascending.
        owner: (R,) index into `members` for each rank column.
        kind: the similarity.
        moments: of the norms, for `seqr`.
    """

    factors: Tensor
    of: Tensor
    members: Tensor
    owner: Tensor
    kind: Kind = "arrow"
    moments: Moments | None = None

    @classmethod
    @torch.no_grad()
    def made(cls, stack: Stack, kind: Kind = "arrow") -> Experts:
        """The experts of one stack, without moments."""
        members = torch.unique(stack.owner)
        factors: list[Tensor] = []
        for member in members:
            columns = stack.owner == member
            a, b = stack.A[columns].float(), stack.B[columns].float().T
            factors.append(direction(a, b)[None] if kind == "arrow" else reduced(a, b))
        of = torch.repeat_interleave(torch.arange(len(members)), torch.tensor([len(rows) for rows in factors]))
        owner = torch.searchsorted(members, stack.owner)
        return cls(torch.cat(factors).to(stack.A.dtype), of.to(owner.device), members, owner, kind)

    def __len__(self) -> int:
        return len(self.members)

    def norms(self, x: Tensor) -> Tensor:
        """`‖ΔW_i x‖` (..., n) in float32, for tokens x (..., d_in)."""
        squares = torch.nn.functional.linear(x, self.factors).float().square()
        sums = squares.new_zeros(*x.shape[:-1], len(self))
        return sums.index_add_(-1, self.of, squares).sqrt_()

    def similarity(self, x: Tensor) -> Tensor:
        """The similarity (..., n) of tokens x (..., d_in) to each adapter."""
        if self.kind == "arrow":
            return torch.nn.functional.linear(x, self.factors).abs()
        norms = self.norms(x)
        if self.kind == "spectr":
            return norms
        if self.moments is None:
            raise ValueError("the norms of seqr are compared with what neutral text has: expected moments, found none")
        scores = (norms - self.moments.mean) / self.moments.deviation
        # An adapter of zeros has no deviation, and is never chosen.
        return scores.masked_fill(self.moments.deviation == 0, -torch.inf)


@dataclass(frozen=True)
class Routing:
    """How many adapters a token gets, and how sharp their coefficients are.

    Attributes:
        top_k: adapters per token, fewer where a module has fewer.
        temperature: `τ`, in units of the similarity.
        kind: the similarity.
    """

    top_k: int = 3
    temperature: float = 1.0
    kind: Kind = "arrow"

    def __call__(self, similarity: Tensor, allowed: Tensor | None = None) -> Tensor:
        """The coefficients `c` (..., n) of tokens with this similarity (..., n).

        Args:
            allowed: (..., n) whether a token may use an adapter; None: all.
        """
        if allowed is not None:
            similarity = similarity.masked_fill(~allowed, -torch.inf)
        top, indices = similarity.topk(min(self.top_k, similarity.shape[-1]), dim=-1)
        shares = (top.float() / self.temperature).softmax(dim=-1)
        shares = shares.masked_fill(top == -torch.inf, 0.0)  # without an allowed adapter, the softmax is NaN
        return torch.zeros_like(similarity).scatter(-1, indices, shares.to(similarity.dtype))


class Router:
    """Routes tokens on the linear modules of one base model, for as long as a `with` block lasts.

    Args:
        modules: base module path -> linear module.
        read: runs the base model over neutral text without adapters, and reports before each pass which positions
            count; for `seqr`. None: there is no neutral text.
    """

    def __init__(
        self, modules: Mapping[str, nn.Module], read: Callable[[Callable[[Tensor], None]], None] | None = None
    ) -> None:
        self.modules, self._read = modules, read
        self._held: tuple[Kind, tuple[Hashable, ...], dict[str, Experts]] | None = None
        self._moments: dict[tuple[Hashable, str], tuple[float, float]] = {}  # by adapter and module

    @contextmanager
    def active(
        self, keys: tuple[Hashable, ...], stacks: Mapping[str, Stack], allowed: Tensor, routing: Routing
    ) -> Iterator[None]:
        """Adds `Σ_i c_i s_i B_i A_i x` to every adapted module inside the block.

        Args:
            keys: identify the adapters of these stacks.
            allowed: (rows, adapters of the stacks), whether a row of the batch may use an adapter; one row
                serves any batch. A batch that is a multiple of the rows (beams) repeats each of them.

        Raises:
            UsageError: the routing compares with neutral text, and there is none.
        """
        experts = self.experts(keys, stacks, routing.kind)
        some = None if len(allowed) == 1 and bool(allowed.all()) else allowed
        hooks = {path: adding(routed, stack, experts[path], routing, some) for path, stack in stacks.items()}
        with hooked(self.modules, hooks):
            yield

    def forget(self) -> None:
        """Drops everything about adapters, after the pool has changed."""
        self._held = None
        self._moments.clear()

    def experts(self, keys: tuple[Hashable, ...], stacks: Mapping[str, Stack], kind: Kind) -> dict[str, Experts]:
        """Module path -> the experts there; the last ones are cached."""
        if self._held is None or self._held[:2] != (kind, keys):
            found = {path: Experts.made(stack, kind) for path, stack in stacks.items()}
            self._held = kind, keys, self._calibrated(keys, found) if kind == "seqr" else found
        return self._held[2]

    def _calibrated(self, keys: Sequence[Hashable], experts: Mapping[str, Experts]) -> dict[str, Experts]:
        """The experts with moments; neutral text is read if an adapter has none yet."""
        wanted = {path: [(keys[i], path) for i in of.members.tolist()] for path, of in experts.items()}
        if any(name not in self._moments for names in wanted.values() for name in names):
            for path, found in self._measured(experts).items():
                pairs = zip(found.mean.tolist(), found.deviation.tolist(), strict=True)
                self._moments |= zip(wanted[path], pairs, strict=True)
        made = {}
        for path, of in experts.items():
            mean, deviation = torch.tensor([self._moments[name] for name in wanted[path]], device=of.members.device).T
            made[path] = replace(of, moments=Moments(mean, deviation))
        return made

    @torch.no_grad()
    def _measured(self, experts: Mapping[str, Experts]) -> dict[str, Moments]:
        if self._read is None:
            raise UsageError("routing by 'seqr' compares adapters on neutral text, and this engine reads none")
        counted: list[Tensor] = []
        sums = {path: torch.zeros(3, len(of), dtype=torch.float64) for path, of in experts.items()}

        def recorder(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                of = experts[path]
                x = inputs[0].reshape(-1, inputs[0].shape[-1])[counted[-1].to(inputs[0].device)]
                norms = of.norms(x.to(of.factors.dtype)).double().cpu()
                sums[path] += torch.stack([torch.full((len(of),), len(x)), norms.sum(0), norms.square().sum(0)])

            return add

        handles = [self.modules[path].register_forward_pre_hook(recorder(path)) for path in experts]
        try:
            self._read(counted.append)
        finally:
            for handle in handles:
                handle.remove()
        return {path: _moments(*found) for path, found in sums.items()}


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


def reduced(A: Tensor, B: Tensor) -> Tensor:
    """`R A` (r or fewer, d_in) with `B = Q R`: as long as `B A` for every vector, `‖R A x‖ = ‖B A x‖`."""
    found: Tensor = torch.linalg.qr(B.cpu(), mode="r").R.to(A.device, A.dtype) @ A
    return found


def routed(x: Tensor, stack: Stack, experts: Experts, routing: Routing, allowed: Tensor | None = None) -> Tensor:
    """`Σ_i c_i s_i B_i A_i x` for x (rows, ..., d_in); returns (rows, ..., d_out) in the stack's dtype.

    Args:
        allowed: (rows or a divisor of them, adapters of the stacks); None: all.
    """
    x = x.to(stack.A.dtype)
    if allowed is not None:
        allowed = _spread(allowed, experts.members, x)
    coefficients = routing(experts.similarity(x), allowed).to(x.dtype)  # (..., n)
    coefficients = coefficients[..., experts.owner]  # (..., R)
    mixed = torch.nn.functional.linear(x, stack.A) * coefficients
    # Infinity times 0 is NaN, so without this an adapter that overflows would spoil tokens that do not use it.
    return mixed.masked_fill(coefficients == 0, 0) @ stack.B


def _moments(count: Tensor, total: Tensor, squares: Tensor) -> Moments:
    """Of n adapters from sums (n,) over as many norms as `count` says."""
    mean = total / count
    variance = squares / count - mean.square()
    # What is left of equal numbers by rounding is no spread.
    spread = torch.where(variance > 1e-12 * mean.square(), variance.clamp_min(0).sqrt(), 0.0)
    return Moments(mean.float(), spread.float())


def _spread(allowed: Tensor, members: Tensor, x: Tensor) -> Tensor:
    """(rows, 1, ..., n): for each row of the batch, which of a module's adapters it may use."""
    allowed = allowed.to(x.device)[:, members]
    if len(x) % len(allowed):
        raise ValueError(f"routes for {len(allowed)} rows cannot serve a batch of {len(x)} rows")
    if len(allowed) > 1:
        allowed = allowed.repeat_interleave(len(x) // len(allowed), dim=0)
    return allowed.reshape(len(allowed), *[1] * (x.dim() - 2), -1)
