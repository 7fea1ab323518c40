"""Merges: several adapters on one module made into one, as pure functions on their factors.

    parts  (A_i (r_i, d_in), B_i (d_out, r_i), scale s_i)   weights w_i   ->   A', B' acting as B' A'

What LoGo computes is `mixture`, the weighted sum of what the adapters do. Every other kind sums A and B apart from each
other, which multiplies every A with every B, and is here to be compared with. Routing (`arrow`, `spectr`,
`seqr`) is no function of the factors alone, since every token has weights of its own: see `logo.mixing.routing`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar, get_args

import torch
from torch import Tensor

from logo.adapters.format import LoraWeights
from logo.errors import PluginError, UsageError
from logo.mixing.routing import Kind as RoutingKind
from logo.mixing.routing import Routing
from logo.plugins import Registry, running

Parts = Sequence[LoraWeights]
MajoritySign = Literal["total", "frequency"]

ROUTED: tuple[RoutingKind, ...] = get_args(RoutingKind)
"""Kinds that give every token weights of its own."""
_ALIASES = {"cat": "mixture", "dare": "dare_linear"}  # PEFT's name, and what its users call the plainer one


@dataclass(frozen=True)
class Merge:
    """How the adapters of one selection are combined.

    Attributes:
        kind: a name of `MERGES`, or of `ROUTED`; `"cat"` is PEFT's name for `"mixture"`.
        density: share of the entries that `ties`, `dare_linear` and `dare_ties` keep, above 0 and up to 1.
        majority_sign: for `ties` and `dare_ties`: `"total"`, the sign of the sum; or `"frequency"`, the sign that most
            adapters have.
        seed: for the random choice of the entries that `dare_linear` and `dare_ties` drop.
        arrow_top_k, arrow_temperature: for `arrow` and `spectr`: adapters per token and module, and the temperature of
            the softmax that gives their weights.

    Raises:
        UsageError: a kind that does not exist, or a value out of range.
    """

    kind: str = "mixture"
    density: float = 0.5
    majority_sign: MajoritySign = "total"
    seed: int = 0
    arrow_top_k: int = 3
    arrow_temperature: float = 1.0

    def __post_init__(self) -> None:
        kind = _ALIASES.get(self.kind, self.kind)
        object.__setattr__(self, "kind", kind)
        if kind not in ROUTED:
            _ = MERGES[kind]  # refuses one that does not exist
        if not 0 < self.density <= 1:
            raise UsageError(f"merge density: expected a share above 0 and up to 1, found {self.density}")
        if self.majority_sign not in ("total", "frequency"):
            raise UsageError(f"majority_sign: expected 'total' or 'frequency', found {self.majority_sign!r}")
        if self.arrow_top_k < 1:
            raise UsageError(f"arrow_top_k: expected 1 or more adapters, found {self.arrow_top_k}")
        if not 0 < self.arrow_temperature < math.inf:
            raise UsageError(f"arrow_temperature: expected a number above 0, found {self.arrow_temperature}")

    @property
    def exact(self) -> bool:
        """Whether it is `Σ w s B A`, which gates compute without merging anything."""
        return self.kind == "mixture"

    @property
    def routes(self) -> bool:
        """Whether every token chooses its own adapters in the forward pass (`logo.mixing.routing`)."""
        return self.kind in ROUTED

    @property
    def routing(self) -> Routing:
        """The options of the routing, for a kind that `routes`. SEQR uses one adapter per token."""
        kind = next(kind for kind in ROUTED if kind == self.kind)
        return Routing(1, kind=kind) if kind == "seqr" else Routing(self.arrow_top_k, self.arrow_temperature, kind)

    def __call__(self, parts: Parts, weights: Sequence[float], generator: torch.Generator) -> LoraWeights:
        """The merged factors; only the random kinds draw from the generator."""
        function = MERGES[self.kind]
        if self.kind not in MERGES.sources:
            return function(self, parts, weights, generator)
        with running(f"merge {self.kind!r}"):
            found = function(self, parts, weights, generator)
        return _checked(self.kind, found, parts)


# -- kinds ------------------------------------------------------------------------------------------------------


def mixture(parts: Parts, weights: Sequence[float]) -> LoraWeights:
    """Equals `Σ w s B A`: the factors side by side, of rank `Σ r`. PEFT calls it `cat`. Any ranks."""
    return LoraWeights(
        torch.cat([part.A.float() for part in parts]),
        torch.cat([w * part.scaled_b() for part, w in zip(parts, weights, strict=True)], dim=1),
        1.0,
    )


def fusion(parts: Parts, weights: Sequence[float]) -> LoraWeights:
    """Does not equal `Σ w s B A`, but `(Σ w √s B)(Σ w √s A)`: weights come out squared, and every A meets every B.

    The fusion of LoraHub and LoraRetriever (arXiv 2307.13269, 2402.09997), which sum A and B of adapters of one scale.
    If scales differ, A and B are each multiplied by √s. A single adapter of weight 1 is left unchanged.
    """
    scales = [part.scaling for part in parts]
    left, right = _roots(scales)
    return LoraWeights(
        _weighted(_factors(parts, "A"), [w * s for w, s in zip(weights, right, strict=True)]),
        _weighted(_factors(parts, "B"), [w * s for w, s in zip(weights, left, strict=True)]),
        1.0,
    )


def linear(parts: Parts, weights: Sequence[float]) -> LoraWeights:
    """Does not equal `Σ w s B A`: the product also has a term for the B of each adapter with the A of every other.

    `(Σ √|w s| B)(Σ ±√|w s| A)`, with the sign of `w s` on A: PEFT's `linear`. A single adapter is left unchanged.
    """
    left, right = _roots_of(parts, weights)
    return LoraWeights(_weighted(_factors(parts, "A"), right), _weighted(_factors(parts, "B"), left), 1.0)


def ties(
    parts: Parts, weights: Sequence[float], density: float = 0.5, majority_sign: MajoritySign = "total"
) -> LoraWeights:
    """Does not equal `Σ w s B A`: as `linear`, of trimmed factors, and only where signs agree.

    TIES (arXiv 2306.01708) as PEFT applies it to A and B: the largest entries of each factor are kept; for each entry
    the majority's sign is elected; the values that have this sign are averaged, and others are left out.
    """
    left, right = _roots_of(parts, weights)
    trimmed = [_trimmed(_factors(parts, side), density) for side in ("A", "B")]
    return LoraWeights(_agreed(trimmed[0], right, majority_sign), _agreed(trimmed[1], left, majority_sign), 1.0)


def dare_linear(
    parts: Parts, weights: Sequence[float], density: float = 0.5, generator: torch.Generator | None = None
) -> LoraWeights:
    """Does not equal `Σ w s B A`: as `linear`, of factors with random entries dropped and the others scaled up for it.

    DARE (arXiv 2311.03099) as PEFT applies it to A and B; entries are drawn for all A first, then for all B.
    """
    left, right = _roots_of(parts, weights)
    dropped = [_dropped(_factors(parts, side), density, generator) for side in ("A", "B")]
    return LoraWeights(_weighted(dropped[0], right), _weighted(dropped[1], left), 1.0)


def dare_ties(
    parts: Parts,
    weights: Sequence[float],
    density: float = 0.5,
    majority_sign: MajoritySign = "total",
    generator: torch.Generator | None = None,
) -> LoraWeights:
    """Does not equal `Σ w s B A`: as `ties`, of factors with random entries dropped instead of the small ones."""
    left, right = _roots_of(parts, weights)
    dropped = [_dropped(_factors(parts, side), density, generator) for side in ("A", "B")]
    return LoraWeights(_agreed(dropped[0], right, majority_sign), _agreed(dropped[1], left, majority_sign), 1.0)


class MergeFunction(Protocol):
    """What a merge computes, on one module: a pure function of the adapters' factors."""

    def __call__(
        self, merge: Merge, parts: Parts, weights: Sequence[float], generator: torch.Generator, /
    ) -> LoraWeights:
        """One adapter of several.

        Args:
            merge: its options; a merge looks at those it knows.
            parts: factors `A` (r_i, d_in), `B` (d_out, r_i) and the factor `scaling` of each adapter, in pool order, in
                the dtype of their files; `part.scaled_b()` is `scaling · B` in float32.
            weights: of the adapters, parallel to `parts`. They sum to 1 unless a selection is
                unsure or a user forced others.
            generator: the only source of randomness; the same mixture is always given the same one.

        Returns:
            `LoraWeights(A, B, scaling)` that acts as `scaling · B A`, of any rank, on the device of the parts.

        Raises:
            UsageError: adapters that cannot be merged in this way.
        """


_M = TypeVar("_M", bound=MergeFunction)

MERGES: Registry[MergeFunction] = Registry("merge", ROUTED)
"""Every kind that is a function of the factors, by name."""

for _function, _kind in (
    (mixture, lambda m, parts, weights, g: mixture(parts, weights)),
    (fusion, lambda m, parts, weights, g: fusion(parts, weights)),
    (linear, lambda m, parts, weights, g: linear(parts, weights)),
    (ties, lambda m, parts, weights, g: ties(parts, weights, m.density, m.majority_sign)),
    (dare_linear, lambda m, parts, weights, g: dare_linear(parts, weights, m.density, g)),
    (dare_ties, lambda m, parts, weights, g: dare_ties(parts, weights, m.density, m.majority_sign, g)),
):
    MERGES.add(_function.__name__, _kind, _function)

# Kinds that leave a single adapter unchanged, and need equal ranks. Neither is assumed of plugins.
_SUMMING_FACTORS = ("linear", "ties", "dare_linear", "dare_ties")


def register_merge(name: str) -> Callable[[_M], _M]:
    """Registers a `MergeFunction` as the merge of this name; a decorator.

    Raises:
        UsageError: the name is taken.
    """

    def add(function: _M) -> _M:
        if name in _ALIASES:
            raise UsageError(f"merge {name!r}: the name is taken by {_ALIASES[name]!r}; choose another one")
        MERGES.add(name, function, function)
        return function

    return add


EXACT = Merge()
"""`Σ w s B A`."""


# -- whole adapters ---------------------------------------------------------------------------------------------


def merged(
    merge: Merge, mixture: Mapping[str, float], tensors: Mapping[str, Mapping[str, LoraWeights]]
) -> dict[str, LoraWeights]:
    """One adapter of several: module path -> merged factors.

    On a module that only some of the adapters touch, those are merged. What random kinds drop depends on the seed, the
    module and the names, so that the same mixture is the same adapter whenever it is made.

    Args:
        merge: any kind of `MERGES`.
        mixture: adapter name -> weight, in pool order.
        tensors: adapter name -> module path -> factors, of these adapters at least.

    Raises:
        UsageError: adapters of different ranks on one module, by a kind that sums factors.
    """
    if len(mixture) == 1 and merge.kind in _SUMMING_FACTORS:  # nothing to trim, drop or agree about, as in PEFT
        merge = Merge("mixture")
    whole = {}
    for path in dict.fromkeys(path for name in mixture for path in tensors[name]):
        names = [name for name in mixture if path in tensors[name]]
        parts = [tensors[name][path] for name in names]
        if merge.kind in (*_SUMMING_FACTORS, "fusion"):
            _check_ranks(merge, path, names, parts)
        digest = hashlib.sha256("\0".join((str(merge.seed), path, *names)).encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
        whole[path] = merge(parts, [mixture[name] for name in names], generator)
    return whole


def _checked(kind: str, found: object, parts: Parts) -> LoraWeights:
    """What a plugin's merge has returned.

    Raises:
        PluginError: no factors of an adapter for this module, or such that are not finite.
    """
    wanted = f"merge {kind!r}: expected LoraWeights(A, B, scaling)"
    if not isinstance(found, LoraWeights) or not (isinstance(found.A, Tensor) and isinstance(found.B, Tensor)):
        raise PluginError(f"{wanted}, found {type(found).__name__}")
    (d_in, d_out), shapes = (parts[0].A.shape[1], parts[0].B.shape[0]), (tuple(found.A.shape), tuple(found.B.shape))
    if shapes != ((len(found.A), d_in), (d_out, len(found.A))):
        raise PluginError(f"{wanted} with A (r, {d_in}) and B ({d_out}, r), found A {shapes[0]} and B {shapes[1]}")
    if not (found.A.isfinite().all() and found.B.isfinite().all() and math.isfinite(found.scaling)):
        raise PluginError(f"{wanted} of finite numbers, found NaN or infinity")
    return found


def _check_ranks(merge: Merge, path: str, names: Sequence[str], parts: Parts) -> None:
    for name, part in zip(names, parts, strict=True):
        if len(part.A) != len(parts[0].A):
            raise UsageError(
                f"merge {merge.kind!r} sums factors of equal rank, but on {path} adapter {names[0]!r} has rank "
                f"{len(parts[0].A)} and {name!r} has {len(part.A)}; use 'mixture', which takes any ranks"
            )


# -- steps ------------------------------------------------------------------------------------------------------


def _factors(parts: Parts, side: Literal["A", "B"]) -> Tensor:
    """(n, ...): one side of all parts in float32."""
    factors = [(part.A if side == "A" else part.B).float() for part in parts]
    if len({factor.shape for factor in factors}) > 1:
        ranks = ", ".join(str(len(part.A)) for part in parts)
        raise ValueError(f"expected factors of one rank, found ranks {ranks}")
    return torch.stack(factors)


def _roots(values: Sequence[float]) -> tuple[list[float], list[float]]:
    """Splits each value into two factors `√|v|`: those for B, and those for A, which carry the sign of the value."""
    roots = [math.sqrt(abs(value)) for value in values]
    return roots, [math.copysign(root, value) for root, value in zip(roots, values, strict=True)]


def _roots_of(parts: Parts, weights: Sequence[float]) -> tuple[list[float], list[float]]:
    return _roots([w * part.scaling for part, w in zip(parts, weights, strict=True)])


def _weighted(factors: Tensor, weights: Sequence[float]) -> Tensor:
    """`Σ w F` of factors (n, ...)."""
    return _scaled(factors, weights).sum(dim=0)


def _scaled(factors: Tensor, weights: Sequence[float]) -> Tensor:
    return factors * torch.tensor(weights, dtype=factors.dtype, device=factors.device)[:, None, None]


def _trimmed(factors: Tensor, density: float) -> Tensor:
    """Factors (n, ...) of which the share `density` of largest entries is kept; the others are 0."""
    flat = factors.flatten(1)
    kept = flat.abs().topk(int(density * flat.shape[1]), dim=1).indices
    return (flat * torch.zeros_like(flat).scatter_(1, kept, 1.0)).view_as(factors)


def _dropped(factors: Tensor, density: float, generator: torch.Generator | None) -> Tensor:
    """Factors (n, ...) of which each entry is kept with probability `density` and divided by it, or else is 0."""
    if density == 1:
        return factors
    kept = [torch.bernoulli(torch.full_like(factor, density), generator=generator) for factor in factors]
    return factors * torch.stack(kept) / density


def _agreed(factors: Tensor, weights: Sequence[float], majority_sign: MajoritySign) -> Tensor:
    """Per entry, the mean of the weighted factors (n, ...) that have the majority's sign."""
    signs = factors.sign()
    votes = (factors if majority_sign == "total" else signs).sum(dim=0)
    agrees = signs == torch.where(votes >= 0, 1.0, -1.0)
    return (_scaled(factors, weights) * agrees).sum(dim=0) / agrees.sum(dim=0).clamp(min=1)
