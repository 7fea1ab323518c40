"""`Mixer`: names and weights per row, made into an active mixture on the model, folded or gated.

Keeps the working sets that were used last, so that a batch like the one before costs no stacking.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from logo.adapters.layout import linear_modules
from logo.adapters.pool import AdapterPool
from logo.mixing.adapter_cache import AdapterCache
from logo.mixing.costs import Costs, Work
from logo.mixing.folding import Folder, foldable
from logo.mixing.gated import GatedLoRA, Gates
from logo.mixing.working_set import WorkingSet

# The pool's own (for probing with it active) and that of the batch at hand.
_READY_SETS = 2


class Mixer:
    """Mixes adapters of a fitted pool on one base model.

    Args:
        model: the base model.
        dtype: what mixtures compute in.
        cache_bytes: host memory for adapter tensors.
        fold: whether one mixture for all rows may be folded into the weights; None: when that pays.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, cache_bytes: int, fold: bool | None = None) -> None:
        modules = dict(linear_modules(model))
        self._gated = GatedLoRA(modules)
        self._folder = Folder(modules)
        self._costs = Costs(modules)
        self._fold = fold
        self._dtype = dtype
        self._cache = AdapterCache(cache_bytes)
        self._sets: OrderedDict[tuple[str, ...], WorkingSet] = OrderedDict()

    def active(
        self, pool: AdapterPool, rows: Sequence[Mapping[str, float]], work: Work | None = None
    ) -> AbstractContextManager[Any]:
        """Activates one mixture per row of the batch, or one for all rows; nothing at all if no row has an adapter.

        Args:
            pool: fitted to the model.
            rows: adapter name -> weight. The union of the names is the working set, the weights are the gates.
            work: what the mixture will be used for, if that is known: the ground on which folding is chosen.
        """
        used = {name for row in rows for name in row}
        names = tuple(name for name in pool.names if name in used)
        if not names:
            return nullcontext()
        working_set = self._working_set(pool, names)
        weights = torch.tensor([[row.get(name, 0.0) for name in names] for row in rows])
        if bool((weights == weights[0]).all()):
            weights = weights[:1]
            if self._folds(working_set, work):
                return self._folder.active(working_set, weights[0])
        return self._gated.active(working_set, Gates(weights))

    def prefetch(self, pool: AdapterPool, names: Sequence[str]) -> None:
        """Starts to read these adapters in the background."""
        self._cache.prefetch([pool[name] for name in names])

    def forget(self) -> None:
        """Drops the stacked working sets: the pool has changed."""
        self._sets.clear()
        self._folder.forget()

    def _folds(self, working_set: WorkingSet, work: Work | None) -> bool:
        if self._fold is False or (self._fold is None and work is None):
            return False
        if not all(foldable(self._gated.modules[path]) for path in working_set.stacks):
            return False
        return self._fold is True or (work is not None and self._costs.folding_pays(working_set, work))

    def _working_set(self, pool: AdapterPool, names: tuple[str, ...]) -> WorkingSet:
        if names not in self._sets:
            while len(self._sets) >= _READY_SETS:
                self._sets.popitem(last=False)
            adapters = [pool[name] for name in names]
            self._sets[names] = WorkingSet.build(adapters, self._gated.modules, self._cache, self._dtype)
        self._sets.move_to_end(names)
        return self._sets[names]
