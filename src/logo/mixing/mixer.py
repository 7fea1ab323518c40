"""`Mixer`: makes names and weights per row into an active mixture on the model, folded or gated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
from torch import nn

from logo.adapters.adapter import Adapter
from logo.adapters.layout import adaptable_modules
from logo.adapters.pool import AdapterPool
from logo.mixing.activated import OpeningGates
from logo.mixing.costs import EXPECTED, KINDS, Work, folding_pays, kind_of
from logo.mixing.folding import Folder, foldable
from logo.mixing.gated import GatedLoRA, Gates
from logo.mixing.groups import GroupedMixture, Groups, cheapest
from logo.mixing.placement import device_of
from logo.mixing.stacks import Copies, GroupedStack, Stack, grouped, ranks, stacked
from logo.mixing.store import AdapterStore, Hold
from logo.models import lock_of

# The form of a mixture: none, added to the weights, or gated beside them.
Form = Literal["base", "folded", "gated"]

# For each row: adapter name -> the first column in which it acts.
Begins = Sequence[Mapping[str, int]]

# Assumed tokens of a row if the work is not known: one pass over a short prompt.
_A_PROMPT = 64


class Mixer:
    """Mixes adapters of a fitted pool on one base model.

    Args:
        model: the base model.
        store: its adapters.
        fold: whether one mixture for all rows is folded into the weights if that is possible; None: if it pays and
            the weights are not of half precision (`logo.mixing.costs`).
    """

    def __init__(self, model: nn.Module, store: AdapterStore, fold: bool | None = None) -> None:
        modules = adaptable_modules(model)
        self.store = store
        self._model, self._lock = model, lock_of(model)
        self._gated = GatedLoRA(modules)
        self._folder = Folder(modules)
        self._fold = fold
        self._read = kind_of(device_of(model)).group_read
        self._last: tuple[Hold, dict[str, Stack]] | None = None
        self._copies = Copies()
        self._groups: tuple[Hold, tuple[tuple[int, ...], ...], dict[str, GroupedStack]] | None = None

    @property
    def folding(self) -> dict[str, Any]:
        """The settings by which a mixture is folded, for JSON; see `logo.mixing.costs`."""
        return {
            "asked": self._fold,
            "expected": EXPECTED,
            "read": {name: kind.fold_read for name, kind in KINDS.items()},
        }

    @contextmanager
    def active(
        self,
        pool: AdapterPool,
        rows: Sequence[Mapping[str, float]],
        work: Work | None = None,
        begins: Begins | None = None,
    ) -> Iterator[Form]:
        """Activates one mixture per row of the batch, or one for all rows; no hook is set if no row has an adapter.

        Args:
            pool: fitted to the model.
            rows: adapter name -> weight. The union of the names is the working set, the weights are the gates.
            work: what the mixture will be used for, by which its form is chosen; None: not known.
            begins: for each row, adapter name -> the first column in which it acts (default 0), counted with padding
                and cached tokens. None: all act everywhere.

        Yields:
            The form, which depends on the arguments, the sizes, the dtype and the kind of device alone.

        Raises:
            UsageError: another mixture is active.
            StoreFull: the adapters do not fit into the memory for adapters.
        """
        used = {name for row in rows for name in row}
        names = tuple(name for name in pool.names if name in used)
        with self._lock.running(mixed=bool(names)):
            if not names:
                yield "base"
                return
            adapters = [pool[name] for name in names]
            weights = torch.tensor([[row.get(name, 0.0) for name in names] for row in rows])
            with self.store.held([self.store.source(adapter) for adapter in adapters]) as hold:
                if begins is not None and any(any(row.values()) for row in begins):
                    gates = OpeningGates(
                        weights, torch.tensor([[begin.get(name, 0) for name in names] for begin in begins])
                    )
                    with gates.following(self._model), self._gated.active(self._stacked(hold), gates):
                        yield "gated"
                    return
                form, context = self._chosen(hold, adapters, weights, work)
                with context:
                    yield form

    def _chosen(
        self, hold: Hold, adapters: Sequence[Adapter], weights: torch.Tensor, work: Work | None
    ) -> tuple[Form, AbstractContextManager[Any]]:
        if bool((weights == weights[0]).all()):
            if self._folds(hold, work):
                return "folded", self._folder.active(hold.keys, lambda: self._stacked(hold), weights[0])
            return "gated", self._gated.active(self._stacked(hold), Gates(weights[:1]))
        rows, sizes = len(weights), [float(adapter.parameters) for adapter in adapters]
        room = (self.store.budget - self.store.bytes) / self.store.dtype.itemsize
        groups = cheapest(weights, sizes, work or Work(_A_PROMPT * rows, rows, 0), self._read, room)
        if len(groups.adapters) == 1:
            return "gated", self._gated.active(self._stacked(hold), Gates(weights))
        return "gated", self._gated.grouped(self._grouped(hold, groups), GroupedMixture(groups, weights))

    def prefetch(self, pool: AdapterPool, names: Sequence[str]) -> None:
        """Begins to load these adapters into the store."""
        self.store.prefetch([self.store.source(pool[name]) for name in names])

    def forget(self, pool: AdapterPool) -> None:
        """Drops everything that does not belong to this pool, after it has changed."""
        self._last = self._groups = None
        self._copies.clear()
        self._folder.forget()
        self.store.retain({adapter.file for adapter in pool})

    def _folds(self, hold: Hold, work: Work | None) -> bool:
        if self._fold is False or (self._fold is None and work is None):
            return False
        modules, touched = self._gated.modules, ranks(self.store, hold)
        if not all(foldable(modules[path]) for path in touched):
            return False
        wanted = self._fold is True or (work is not None and folding_pays(touched, modules, work))
        return wanted and self._folder.fits(touched)

    def _stacked(self, hold: Hold) -> dict[str, Stack]:
        """The stacks of what is held; the last ones are cached, so that the same adapters are not copied again."""
        # They stay valid, since the columns of a resident do not move.
        if self._last is None or self._last[0] != hold:
            self._last = None
            self._last = hold, stacked(self.store, hold)
        return self._last[1]

    def _grouped(self, hold: Hold, groups: Groups) -> dict[str, GroupedStack]:
        """The stacks of what is held, for groups of rows; the last ones are cached."""
        if self._groups is None or self._groups[:2] != (hold, groups.adapters):
            self._groups = None  # so that the memory of their copies is free
            self._groups = hold, groups.adapters, grouped(self.store, hold, groups.adapters, self._copies)
        return self._groups[2]
