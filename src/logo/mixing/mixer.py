"""`Mixer`: names and weights per row, made into an active mixture on the model, folded or gated.

Where adapters are to be combined in another way than the exact mixture, every distinct row of a batch becomes one
adapter first, and that is folded or gated; or each token is routed. Keeps what was stacked last, so that a batch like
the one before costs no stacking.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from logo.adapters.format import LoraWeights
from logo.adapters.layout import linear_modules
from logo.adapters.pool import AdapterPool
from logo.mixing.adapter_cache import AdapterCache
from logo.mixing.arrow import Arrow, Routing
from logo.mixing.costs import EXPECTED, READ, folding_pays
from logo.mixing.folding import Folder, foldable
from logo.mixing.gated import GatedLoRA, Gates
from logo.mixing.groups import GroupedMixture, GroupedStack, Groups, cheapest, stacked
from logo.mixing.merges import ARROW, EXACT, Merge, merged
from logo.mixing.work import Work
from logo.mixing.working_set import WorkingSet

# How a mixture acts: not at all, added into the weights, beside them with gates, or routed token by token.
Form = Literal["base", "folded", "gated", "routed"]

# The pool's own (for probing with it active) and that of the batch at hand.
_READY_SETS = 2
# Tokens of a row where nothing is known about the work: one pass over some text.
_A_PROMPT = 64


class Mixer:
    """Mixes adapters of a fitted pool on one base model.

    Args:
        model: the base model.
        dtype: what mixtures compute in.
        cache_bytes: host memory for adapter tensors.
        fold: whether one mixture for all rows is folded into the weights where it can be; None: when that pays and
            the weights are not of half precision (`logo.mixing.costs`).
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
        self._fold = fold
        self.merge = merge
        self._dtype = dtype
        self._cache = AdapterCache(cache_bytes)
        self._ready: OrderedDict[Hashable, Any] = OrderedDict()

    @property
    def folding(self) -> dict[str, Any]:
        """What decides whether a mixture is folded, for JSON; see `logo.mixing.costs`."""
        return {"asked": self._fold, "expected": EXPECTED, "read": READ}

    @contextmanager
    def active(
        self,
        pool: AdapterPool,
        rows: Sequence[Mapping[str, float]],
        work: Work | None = None,
        merge: Merge | None = None,
    ) -> Iterator[Form]:
        """Activates one mixture per row of the batch, or one for all rows; nothing at all if no row has an adapter.

        Args:
            pool: fitted to the model.
            rows: adapter name -> weight. The union of the names is the working set, the weights are the gates.
            work: what the mixture will be used for, if that is known: the ground on which folding is chosen.
            merge: how the adapters of a row are combined; None: as `Mixer.merge` says. Adapters of weight 0 are no
                part of a row that is merged or routed.

        Yields:
            The form that was chosen. It depends on the arguments, the sizes, the dtype and the kind of device alone.

        Raises:
            UsageError: adapters of one row that cannot be merged in this way.
        """
        form, context = self._chosen(pool, rows, work, merge or self.merge)
        with context:
            yield form

    def _chosen(
        self, pool: AdapterPool, rows: Sequence[Mapping[str, float]], work: Work | None, merge: Merge
    ) -> tuple[Form, AbstractContextManager[Any]]:
        used = {name for row in rows for name, weight in row.items() if weight or merge.exact}
        names = tuple(name for name in pool.names if name in used)
        if not names:
            return "base", nullcontext()
        if merge.exact or merge.kind == ARROW:
            parts = _Parts.of(pool, names, rows, self._cache)
        else:
            parts = _Parts.merged(pool, names, rows, merge, self._cache)
        if merge.kind == ARROW:
            allowed = parts.weights != 0
            if bool((allowed == allowed[0]).all()):
                allowed = allowed[:1]
            routing = Routing(merge.arrow_top_k, merge.arrow_temperature)
            return "routed", self._arrow.active(self._working_set(parts), allowed, routing)
        if bool((parts.weights == parts.weights[0]).all()):
            working_set = self._working_set(parts)
            if self._folds(working_set, work):
                return "folded", self._folder.active(working_set, parts.weights[0])
            return "gated", self._gated.active(working_set, Gates(parts.weights[:1]))
        groups = cheapest(parts.weights, parts.sizes, work or Work(_A_PROMPT * len(rows), len(rows), 0))
        if len(groups.adapters) == 1:
            return "gated", self._gated.active(self._working_set(parts), Gates(parts.weights))
        return "gated", self._gated.grouped(self._grouped(parts, groups), GroupedMixture(groups, parts.weights))

    def prefetch(self, pool: AdapterPool, names: Sequence[str]) -> None:
        """Starts to read these adapters in the background."""
        self._cache.prefetch([pool[name] for name in names])

    def forget(self) -> None:
        """Drops what is stacked: the pool has changed."""
        self._ready.clear()
        self._folder.forget()
        self._arrow.forget()

    def _folds(self, working_set: WorkingSet, work: Work | None) -> bool:
        if self._fold is False or (self._fold is None and work is None):
            return False
        modules = self._gated.modules
        if not all(foldable(modules[path]) for path in working_set.stacks):
            return False
        return self._fold is True or (work is not None and folding_pays(working_set, modules, work))

    def _working_set(self, parts: _Parts) -> WorkingSet:
        def build() -> WorkingSet:
            return WorkingSet.of(parts.names, parts.read(), self._gated.modules, self._dtype)

        found: WorkingSet = self._kept(parts.key, build)
        return found

    def _grouped(self, parts: _Parts, groups: Groups) -> dict[str, GroupedStack]:
        def build() -> dict[str, GroupedStack]:
            return stacked(groups, parts.read(), self._gated.modules, self._dtype)

        found: dict[str, GroupedStack] = self._kept((parts.key, groups.adapters), build)
        return found

    def _kept(self, key: Hashable, build: Callable[[], Any]) -> Any:
        if key not in self._ready:
            while len(self._ready) >= _READY_SETS:
                self._ready.popitem(last=False)
            self._ready[key] = build()
        self._ready.move_to_end(key)
        return self._ready[key]


@dataclass(frozen=True)
class _Parts:
    """What is stacked for a batch, before it is read.

    Attributes:
        names: the adapters, or those that mixtures were merged into.
        weights: (rows, names).
        sizes: how many numbers each has, in some unit.
        read: reads, or merges, their tensors: module path -> factors, for each.
        key: what tells these tensors from others.
    """

    names: tuple[str, ...]
    weights: torch.Tensor
    sizes: tuple[float, ...]
    read: Callable[[], list[Mapping[str, LoraWeights]]]
    key: Hashable

    @classmethod
    def of(
        cls, pool: AdapterPool, names: tuple[str, ...], rows: Sequence[Mapping[str, float]], cache: AdapterCache
    ) -> _Parts:
        """Adapters as they are."""
        adapters = [pool[name] for name in names]
        return cls(
            names,
            torch.tensor([[row.get(name, 0.0) for name in names] for row in rows]),
            tuple(float(adapter.parameters) for adapter in adapters),
            lambda: [cache.read(adapter) for adapter in adapters],
            names,
        )

    @classmethod
    def merged(
        cls,
        pool: AdapterPool,
        names: tuple[str, ...],
        rows: Sequence[Mapping[str, float]],
        merge: Merge,
        cache: AdapterCache,
    ) -> _Parts:
        """One merged adapter per distinct mixture: weight 1 in the rows that have it, else 0."""
        mixtures = [tuple((name, row[name]) for name in names if row.get(name)) for row in rows]
        distinct = tuple(mixture for mixture in dict.fromkeys(mixtures) if mixture)

        def read() -> list[Mapping[str, LoraWeights]]:
            adapters: list[Mapping[str, LoraWeights]] = []
            for mixture in distinct:  # the tensors of one at a time, so that the cache may drop the others'
                tensors = {name: cache.read(pool[name]) for name, _ in mixture}
                adapters.append(merged(merge, dict(mixture), tensors))
            return adapters

        return cls(
            tuple("+".join(name for name, _ in mixture) for mixture in distinct),
            torch.tensor([[float(mixture == other) for other in distinct] for mixture in mixtures]),
            (1.0,) * len(distinct),
            read,
            (merge, distinct),
        )
