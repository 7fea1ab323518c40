"""`Mixer`: names and weights per row, made into an active mixture on the model.

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
from logo.mixing.gated import GatedLoRA, Gates
from logo.mixing.working_set import AdapterCache, WorkingSet

# The pool's own (for probing with it active) and that of the batch at hand.
_READY_SETS = 2


class Mixer:
    """Mixes adapters of a fitted pool on one base model.

    Args:
        model: the base model.
        dtype: what mixtures compute in.
        cache_bytes: host memory for adapter tensors.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, cache_bytes: int) -> None:
        self._gated = GatedLoRA(dict(linear_modules(model)))
        self._dtype = dtype
        self._cache = AdapterCache(cache_bytes)
        self._sets: OrderedDict[tuple[str, ...], WorkingSet] = OrderedDict()

    def active(self, pool: AdapterPool, rows: Sequence[Mapping[str, float]]) -> AbstractContextManager[Any]:
        """Activates one mixture per row of the batch, or one for all rows; nothing at all if no row has an adapter.

        Args:
            pool: fitted to the model.
            rows: adapter name -> weight. The union of the names is the working set, the weights are the gates.
        """
        used = {name for row in rows for name in row}
        names = tuple(name for name in pool.names if name in used)
        if not names:
            return nullcontext()
        weights = torch.tensor([[row.get(name, 0.0) for name in names] for row in rows])
        return self._gated.active(self._working_set(pool, names), Gates(weights))

    def forget(self) -> None:
        """Drops the stacked working sets: the pool has changed."""
        self._sets.clear()

    def _working_set(self, pool: AdapterPool, names: tuple[str, ...]) -> WorkingSet:
        if names not in self._sets:
            while len(self._sets) >= _READY_SETS:
                self._sets.popitem(last=False)
            adapters = [pool[name] for name in names]
            self._sets[names] = WorkingSet.build(adapters, self._gated.modules, self._cache, self._dtype)
        self._sets.move_to_end(names)
        return self._sets[names]
