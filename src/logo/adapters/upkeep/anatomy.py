"""`Anatomy`: the updates of a pool's adapters on each module, and how alike they are.

Tensors are read once, module by module, and only factors are decomposed. Two adapters are compared on the modules that
both adapt:

    overlap   ‖U_iᵀ U_j‖_F² / min(k_i, k_j)   the mean over these modules: 1 if the column space of one holds that of
                                              the other, about k / d_out for unrelated updates. U_i are the left
                                              singular vectors that hold `ENERGY` of ‖ΔW_i‖², since the smallest ones
                                              of a trained adapter are noise.
    cosine    ⟨ΔW_i, ΔW_j⟩ / (‖ΔW_i‖ ‖ΔW_j‖)   over all modules: 1 only for equal updates, up to their size.

Near-duplicates have similar norms, too: `min(‖ΔW_i‖, ‖ΔW_j‖) / max(‖ΔW_i‖, ‖ΔW_j‖)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from logo.adapters.format import Adapter
from logo.adapters.layout import core_path
from logo.adapters.upkeep.spectra import Spectrum, effective_rank, rank_for, spectrum

ENERGY = 0.99
_ROUNDING = 1e-6
# Floats of one block of inner products (64 MiB), which bounds memory for pools of any size.
_BLOCK = 16 * 2**20

Tell = Callable[[], None]


@dataclass(frozen=True)
class Update:
    """One adapter on one module: `‖s B A‖_F`, and the effective rank."""

    norm: float
    effective_rank: float


@dataclass(frozen=True)
class Anatomy:
    """The updates of a pool's adapters, compared.

    Attributes:
        names: of the adapters, in pool order.
        updates: adapter -> module path, without wrappers in front -> update.
        overlap: (n, n) float64; NaN if two adapters share no module (of one shape) on which both are not zero.
        cosine: (n, n) float64; NaN if one adapter is zero.
    """

    names: tuple[str, ...]
    updates: Mapping[str, Mapping[str, Update]]
    overlap: Tensor
    cosine: Tensor

    def norm(self, name: str) -> float:
        """`‖ΔW‖_F` over all modules."""
        return math.hypot(*(update.norm for update in self.updates[name].values()))

    def effective_rank(self, name: str) -> float:
        """The mean over modules on which the adapter is not zero; 0 if there is none."""
        found = [update.effective_rank for update in self.updates[name].values() if update.norm > 0]
        return fmean(found) if found else 0.0

    def nearest(self, name: str) -> tuple[str, float, float] | None:
        """The adapter with the highest overlap, the overlap and the cosine; None if there is none to compare with."""
        row = self.names.index(name)
        others = [i for i in range(len(self.names)) if i != row and not math.isnan(float(self.overlap[row, i]))]
        if not others:
            return None
        best = max(others, key=lambda i: float(self.overlap[row, i]))
        return self.names[best], float(self.overlap[row, best]), float(self.cosine[row, best])

    def near_duplicates(self, threshold: float) -> list[tuple[str, str, float, float]]:
        """Pairs whose overlap, cosine and ratio of norms all reach the threshold, with overlap and cosine, best first.

        Without the norms, an adapter could be a duplicate of one with the same update at a hundredth of the size.
        """
        norms = torch.tensor([self.norm(name) for name in self.names], dtype=torch.float64)
        ratio = torch.minimum(norms[:, None], norms) / torch.maximum(norms[:, None], norms)
        # NaN reaches no threshold. Norms that differ by rounding count as equal.
        alike = (self.overlap >= threshold) & (self.cosine >= threshold) & (ratio >= threshold - _ROUNDING)
        pairs = [(i, j) for i, j in alike.nonzero().tolist() if i < j]
        found = [(self.names[i], self.names[j], float(self.overlap[i, j]), float(self.cosine[i, j])) for i, j in pairs]
        return sorted(found, key=lambda pair: -min(pair[2:]))


def anatomy(adapters: Sequence[Adapter], tell: Tell | None = None) -> Anatomy:
    """Compares the adapters of a pool. The time grows with the square of the sum of ranks.

    Args:
        tell: called after each module of `module_paths`.

    Raises:
        AdapterError: an adapter cannot be read.
    """
    count = len(adapters)
    shared, overlap = torch.zeros(count, count, dtype=torch.float64), torch.zeros(count, count, dtype=torch.float64)
    products = torch.zeros(count, count, dtype=torch.float64)
    updates: dict[str, dict[str, Update]] = {adapter.name: {} for adapter in adapters}
    for path, holders in module_paths(adapters).items():
        alike: dict[
            tuple[int, int], dict[int, Spectrum]
        ] = {}  # by shape: adapters of different base models are not compared
        for place, own in holders.items():
            found = spectrum(adapters[place].read([own])[own])
            updates[adapters[place].name][path] = Update(found.norm, effective_rank(found.values))
            if found.norm > 0:
                alike.setdefault((len(found.left), found.right.shape[1]), {})[place] = found
        for spectra in alike.values():
            places = torch.tensor(list(spectra), dtype=torch.int64)
            for rows, inner, common in _compared(spectra):
                at = (rows[:, None], places[None, :])
                products[at] += inner
                overlap[at] += common
                shared[at] += 1
        if tell is not None:
            tell()
    norms = products.diagonal().sqrt()
    cosine = (products / (norms[:, None] * norms[None, :])).clamp(-1.0, 1.0)
    return Anatomy(tuple(adapter.name for adapter in adapters), updates, (overlap / shared).clamp(0.0, 1.0), cosine)


def module_paths(adapters: Sequence[Adapter]) -> dict[str, dict[int, str]]:
    """Module path without wrappers -> index of an adapter -> the path in its file, in the model's order."""
    found: dict[str, dict[int, str]] = {}
    for place, adapter in enumerate(adapters):
        for path in adapter.modules:
            found.setdefault(core_path(path), {})[place] = path
    return {path: found[path] for path in sorted(found, key=_in_order)}


def layer_of(path: str) -> int | None:
    """The first number in a module path, which is the layer."""
    return next((int(part) for part in path.split(".") if part.isdigit()), None)


def kind_of(path: str) -> str:
    """The module path without the layer."""
    return path.rsplit(".", 1)[-1]


def _in_order(path: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".")]


def _compared(spectra: Mapping[int, Spectrum]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields, for some adapters against all on one module: indices, inner products, overlaps of column spaces."""
    owner = torch.cat([torch.full((len(one.values),), i) for i, one in enumerate(spectra.values())])
    counts = torch.tensor([rank_for(one.values, ENERGY) for one in spectra.values()])
    place = torch.cat([torch.arange(len(one.values)) for one in spectra.values()])
    main = place < counts[owner]  # (R,): the directions that count for the overlap
    norms = torch.tensor([one.norm for one in spectra.values()], dtype=torch.float64)
    left = torch.cat([one.left for one in spectra.values()], dim=1).float()  # (out, R)
    # Scaled to norm 1, so that products of small updates do not underflow in float32.
    right = torch.cat([one.values[:, None] / one.norm * one.right for one in spectra.values()]).float()  # (R, in)
    ends = torch.bincount(owner).cumsum(0)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), ends[:-1]])
    each = max(1, _BLOCK // max(1, len(owner) * int((ends - starts).max())))
    places = torch.tensor(list(spectra), dtype=torch.int64)
    for first in range(0, len(places), each):
        last = min(first + each, len(places))
        rows = slice(int(starts[first]), int(ends[last - 1]))
        columns = left[:, rows].T @ left  # (R of these, R)
        inner = _summed(columns * (right[rows] @ right.T), owner[rows] - first, owner, last - first, len(places))
        columns = columns.square_() * main[rows, None] * main
        common = _summed(columns, owner[rows] - first, owner, last - first, len(places))
        inner *= norms[first:last, None] * norms
        yield places[first:last], inner, common / torch.minimum(counts[first:last, None], counts[None, :])


def _summed(values: Tensor, rows: Tensor, columns: Tensor, count: int, others: int) -> Tensor:
    """Sums of blocks: (R, R') with the block of each row and column -> (count, others), float64."""
    down = torch.zeros(count, values.shape[1]).index_add_(0, rows, values)
    return torch.zeros(count, others, dtype=torch.float64).index_add_(1, columns, down.double())
