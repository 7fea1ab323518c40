"""`Mixer`: makes names and weights per row into an active mixture on the model, folded or gated.

For a merge that is not the exact mixture, the adapters of every distinct row are merged into one source of the store,
which is then folded or gated; or each token is routed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from logo.adapters.format import LoraWeights
from logo.adapters.layout import adaptable_modules
from logo.adapters.pool import AdapterPool
from logo.errors import UsageError
from logo.mixing.activated import OpeningGates
from logo.mixing.costs import EXPECTED, KINDS, Work, folding_pays, kind_of
from logo.mixing.folding import Folder, foldable
from logo.mixing.gated import GatedLoRA, Gates
from logo.mixing.groups import GroupedMixture, Groups, cheapest
from logo.mixing.merges import EXACT, Merge, merged
from logo.mixing.placement import device_of
from logo.mixing.routing import Router
from logo.mixing.stacks import Copies, GroupedStack, Stack, grouped, ranks, stacked
from logo.mixing.store import AdapterStore, Hold, Source

# The form of a mixture: none, added to the weights, gated beside them, or routed token by token.
Form = Literal["base", "folded", "gated", "routed"]

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
        merge: how the adapters of a row are combined unless `active` says otherwise; may be changed.
        neutral: makes token ids of neutral texts, for routing by `seqr`.
    """

    def __init__(
        self,
        model: nn.Module,
        store: AdapterStore,
        fold: bool | None = None,
        merge: Merge = EXACT,
        neutral: Callable[[], Sequence[Sequence[int]]] | None = None,
    ) -> None:
        modules = adaptable_modules(model)
        self.store = store
        self._model = model
        self._gated = GatedLoRA(modules)
        self._folder = Folder(modules)
        self._router = Router(modules, None if neutral is None else partial(_read, model, neutral))
        self._fold = fold
        self.merge = merge
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
        merge: Merge | None = None,
        begins: Begins | None = None,
    ) -> Iterator[Form]:
        """Activates one mixture per row of the batch, or one for all rows; no hook is set if no row has an adapter.

        Args:
            pool: fitted to the model.
            rows: adapter name -> weight. The union of the names is the working set, the weights are the gates.
            work: what the mixture will be used for, by which its form is chosen; None: not known.
            merge: how the adapters of a row are combined; None: as `Mixer.merge` says. Adapters of weight 0 do not
                belong to a row that is merged or routed.
            begins: for each row, adapter name -> the first column in which it acts (default 0), counted with padding
                and cached tokens. None: all act everywhere.

        Yields:
            The form, which depends on the arguments, the sizes, the dtype and the kind of device alone.

        Raises:
            UsageError: adapters of one row that cannot be merged in this way.
        """
        merge = merge or self.merge
        if begins is not None and not any(map(any, (row.values() for row in begins))):
            begins = None
        used = {name for row in rows for name, weight in row.items() if weight or merge.exact}
        names = tuple(name for name in pool.names if name in used)
        if not names:
            yield "base"
            return
        parts = (
            _Parts.of(self.store, pool, names, rows)
            if merge.exact or merge.routes
            else _Parts.merged(pool, names, rows, merge)
        )
        with self.store.held(parts.sources) as hold:
            if begins is not None:
                gates = OpeningGates(parts.weights, _columns(names, rows, begins, merge))
                with gates.following(self._model), self._gated.active(self._stacked(hold), gates):
                    yield "gated"
                return
            form, context = self._chosen(hold, parts, len(rows), work, merge)
            with context:
                yield form

    def _chosen(
        self, hold: Hold, parts: _Parts, rows: int, work: Work | None, merge: Merge
    ) -> tuple[Form, AbstractContextManager[Any]]:
        weights = parts.weights
        if merge.routes:
            for path in self._stacked(hold):
                if isinstance(self._gated.modules[path], nn.Embedding):
                    raise UsageError(
                        f"merge {merge.kind!r}: an adapter acts on the embedding {path}, where tokens cannot be routed"
                    )
            allowed = weights != 0
            if bool((allowed == allowed[0]).all()):
                allowed = allowed[:1]
            return "routed", self._router.active(hold.keys, self._stacked(hold), allowed, merge.routing)
        if bool((weights == weights[0]).all()):
            if self._folds(hold, work):
                return "folded", self._folder.active(hold.keys, lambda: self._stacked(hold), weights[0])
            return "gated", self._gated.active(self._stacked(hold), Gates(weights[:1]))
        room = (self.store.budget - self.store.bytes) / self.store.dtype.itemsize
        groups = cheapest(weights, parts.sizes, work or Work(_A_PROMPT * rows, rows, 0), self._read, room)
        if len(groups.adapters) == 1:
            return "gated", self._gated.active(self._stacked(hold), Gates(weights))
        return "gated", self._gated.grouped(self._grouped(hold, groups), GroupedMixture(groups, weights))

    def prefetch(self, pool: AdapterPool, names: Sequence[str]) -> None:
        """Begins to load these adapters into the store, unless the engine's rule merges them before they are stored."""
        if not (self.merge.exact or self.merge.routes):
            return
        self.store.prefetch([self.store.source(pool[name]) for name in names])

    def forget(self, pool: AdapterPool) -> None:
        """Drops everything that does not belong to this pool, after it has changed."""
        self._last = self._groups = None
        self._copies.clear()
        self._folder.forget()
        self._router.forget()
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


@dataclass(frozen=True)
class _Parts:
    """What a batch needs from the store.

    Attributes:
        sources: the adapters, or the merged mixtures.
        weights: (rows, sources).
        sizes: the number of parameters of each source, in some unit.
    """

    sources: tuple[Source, ...]
    weights: torch.Tensor
    sizes: tuple[float, ...]

    @classmethod
    def of(
        cls, store: AdapterStore, pool: AdapterPool, names: tuple[str, ...], rows: Sequence[Mapping[str, float]]
    ) -> _Parts:
        """Sources of the adapters themselves."""
        adapters = [pool[name] for name in names]
        return cls(
            tuple(store.source(adapter) for adapter in adapters),
            torch.tensor([[row.get(name, 0.0) for name in names] for row in rows]),
            tuple(float(adapter.parameters) for adapter in adapters),
        )

    @classmethod
    def merged(
        cls, pool: AdapterPool, names: tuple[str, ...], rows: Sequence[Mapping[str, float]], merge: Merge
    ) -> _Parts:
        """One merged source per distinct mixture, with weight 1 in the rows that have it and 0 in others."""
        mixtures = [tuple((name, row[name]) for name in names if row.get(name)) for row in rows]
        distinct = tuple(mixture for mixture in dict.fromkeys(mixtures) if mixture)

        def reader(mixture: tuple[tuple[str, float], ...]) -> Callable[[], Mapping[str, LoraWeights]]:
            return lambda: merged(merge, dict(mixture), {name: pool[name].read() for name, _ in mixture})

        return cls(
            tuple(
                Source(
                    (merge, tuple((pool[name].file, weight) for name, weight in mixture)),
                    "+".join(name for name, _ in mixture),
                    reader(mixture),
                )
                for mixture in distinct
            ),
            torch.tensor([[float(mixture == other) for other in distinct] for mixture in mixtures]),
            (1.0,) * len(distinct),
        )


def _columns(names: Sequence[str], rows: Sequence[Mapping[str, float]], begins: Begins, merge: Merge) -> torch.Tensor:
    """(rows, sources) int64: the column from which each source acts.

    Raises:
        UsageError: adapters that are merged into one source begin at different positions.
    """
    if merge.exact:
        return torch.tensor([[begin.get(name, 0) for name in names] for begin in begins])
    own = [
        {begin.get(name, 0) for name, weight in row.items() if weight} for row, begin in zip(rows, begins, strict=True)
    ]
    if merge.routes or any(len(found) > 1 for found in own):
        raise UsageError(
            f"merge {merge.kind!r}: the adapters of this batch begin to act at different tokens, which only the exact "
            "mixture can do; use merge 'mixture', or send the prompts one by one"
        )
    return torch.tensor([[next(iter(found), 0)] for found in own])


@torch.no_grad()
def _read(
    model: nn.Module,
    neutral: Callable[[], Sequence[Sequence[int]]],
    counts: Callable[[torch.Tensor], None],
) -> None:
    """Runs the base model over neutral texts, one at a time.

    The first token of a text does not count (`logo.selection.probe`).
    """
    body = getattr(model, "base_model", model)  # logits are not needed
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    for text in neutral():
        ids = torch.tensor([list(text)], device=device)
        counts(torch.arange(len(text), device=device) > 0)
        body(input_ids=ids, use_cache=False)
