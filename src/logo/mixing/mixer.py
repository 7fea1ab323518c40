"""`Mixer`: names and weights per row, made into an active mixture on the model, folded or gated.

Where adapters are to be combined in another way than the exact mixture, every distinct row of a batch becomes one
adapter first, and that is folded or gated; or each token is routed. Keeps the working sets that were used last, so that
a batch like the one before costs no stacking.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from logo.adapters.layout import linear_modules
from logo.adapters.pool import AdapterPool
from logo.mixing.adapter_cache import AdapterCache
from logo.mixing.arrow import Arrow, Routing
from logo.mixing.costs import Costs, Work
from logo.mixing.folding import Folder, foldable
from logo.mixing.gated import GatedLoRA, Gates
from logo.mixing.merges import ARROW, Merge, merged
from logo.mixing.working_set import WorkingSet

# The pool's own (for probing with it active) and that of the batch at hand.
_READY_SETS = 2

EXACT = Merge()


class Mixer:
    """Mixes adapters of a fitted pool on one base model.

    Args:
        model: the base model.
        dtype: what mixtures compute in.
        cache_bytes: host memory for adapter tensors.
        fold: whether one mixture for all rows may be folded into the weights; None: when that pays.
        merge: how the adapters of a row are combined where `active` is not told; may be changed.
    """

    def __init__(
        self,
        model: nn.Module,
        dtype: torch.dtype,
        cache_bytes: int,
        fold: bool | None = None,
        merge: Merge = EXACT,
    ) -> None:
        modules = dict(linear_modules(model))
        self._gated = GatedLoRA(modules)
        self._folder = Folder(modules)
        self._arrow = Arrow(modules)
        self._costs = Costs(modules)
        self._fold = fold
        self.merge = merge
        self._dtype = dtype
        self._cache = AdapterCache(cache_bytes)
        self._sets: OrderedDict[Hashable, WorkingSet] = OrderedDict()

    def active(
        self,
        pool: AdapterPool,
        rows: Sequence[Mapping[str, float]],
        work: Work | None = None,
        merge: Merge | None = None,
    ) -> AbstractContextManager[Any]:
        """Activates one mixture per row of the batch, or one for all rows; nothing at all if no row has an adapter.

        Args:
            pool: fitted to the model.
            rows: adapter name -> weight. The union of the names is the working set, the weights are the gates.
            work: what the mixture will be used for, if that is known: the ground on which folding is chosen.
            merge: how the adapters of a row are combined; None: as `Mixer.merge` says. Adapters of weight 0 are no
                part of a row that is merged or routed.

        Raises:
            UsageError: adapters of one row that cannot be merged in this way.
        """
        merge = merge or self.merge
        used = {name for row in rows for name, weight in row.items() if weight or merge.exact}
        names = tuple(name for name in pool.names if name in used)
        if not names:
            return nullcontext()
        if merge.exact or merge.kind == ARROW:
            working_set = self._working_set(pool, names)
            weights = torch.tensor([[row.get(name, 0.0) for name in names] for row in rows])
        else:
            working_set, weights = self._merged(pool, names, rows, merge)
        if merge.kind == ARROW:
            weights = (weights != 0).float()  # whether, not how much
        shared = bool((weights == weights[0]).all())
        weights = weights[:1] if shared else weights
        if merge.kind == ARROW:
            return self._arrow.active(working_set, weights != 0, Routing(merge.arrow_top_k, merge.arrow_temperature))
        if shared and self._folds(working_set, work):
            return self._folder.active(working_set, weights[0])
        return self._gated.active(working_set, Gates(weights))

    def prefetch(self, pool: AdapterPool, names: Sequence[str]) -> None:
        """Starts to read these adapters in the background."""
        self._cache.prefetch([pool[name] for name in names])

    def forget(self) -> None:
        """Drops the stacked working sets: the pool has changed."""
        self._sets.clear()
        self._folder.forget()
        self._arrow.forget()

    def _folds(self, working_set: WorkingSet, work: Work | None) -> bool:
        if self._fold is False or (self._fold is None and work is None):
            return False
        if not all(foldable(self._gated.modules[path]) for path in working_set.stacks):
            return False
        return self._fold is True or (work is not None and self._costs.folding_pays(working_set, work))

    def _working_set(self, pool: AdapterPool, names: tuple[str, ...]) -> WorkingSet:
        adapters = [pool[name] for name in names]
        return self._ready(names, lambda: WorkingSet.build(adapters, self._gated.modules, self._cache, self._dtype))

    def _merged(
        self, pool: AdapterPool, names: Sequence[str], rows: Sequence[Mapping[str, float]], merge: Merge
    ) -> tuple[WorkingSet, torch.Tensor]:
        """A working set of one merged adapter per distinct mixture, and which of them each row has: 1, else 0."""
        mixtures = [tuple((name, row[name]) for name in names if row.get(name)) for row in rows]
        distinct = tuple(mixture for mixture in dict.fromkeys(mixtures) if mixture)

        def build() -> WorkingSet:
            adapters = []
            for mixture in distinct:  # the tensors of one at a time, so that the cache may drop the others'
                tensors = {name: self._cache.read(pool[name]) for name, _ in mixture}
                adapters.append(merged(merge, dict(mixture), tensors))
            made = ["+".join(name for name, _ in mixture) for mixture in distinct]
            return WorkingSet.of(made, adapters, self._gated.modules, self._dtype)

        chosen = torch.tensor([[float(mixture == other) for other in distinct] for mixture in mixtures])
        return self._ready((merge, distinct), build), chosen

    def _ready(self, key: Hashable, build: Callable[[], WorkingSet]) -> WorkingSet:
        if key not in self._sets:
            while len(self._sets) >= _READY_SETS:
                self._sets.popitem(last=False)
            self._sets[key] = build()
        self._sets.move_to_end(key)
        return self._sets[key]
