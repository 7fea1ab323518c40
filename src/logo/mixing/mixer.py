"""`Mixer`: activates one mixture per row of a batch on a model, in one of three forms.

none      no row has an adapter: nothing is changed and no hook is set
merged    all rows have the same mixture: it is added to a copy of the weights
gated     all adapters of the batch are multiplied side by side, with a gate for each row
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial

import torch
from torch import nn

from logo.adapters.adapter import Adapter
from logo.adapters.pool import AdapterPool
from logo.core import Form
from logo.mixing.cache import AdapterCache
from logo.mixing.gates import added, hooked, opening
from logo.mixing.merge import Merger, mergeable
from logo.models import lock_of, text_config

PASS = 16  # gates make a pass of one token as much slower as one of so many tokens


@dataclass(frozen=True)
class Mixture:
    """The mixture of one row: the weighted sum of adapters by name, each from a position on."""

    weights: Mapping[str, float] = field(default_factory=dict)
    # The first column in which an adapter acts, counted with padding and cached tokens; 0 if it is missing.
    begins: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, pool: AdapterPool, weights: Mapping[str, float], prompt: Sequence[int]) -> Mixture:
        """A mixture for a prompt, whose tokens say where each adapter acts; those that do not act are left out."""
        begin = cache(lambda activation: activation.begin(prompt))
        begins = {name: begin(pool[name].activation) for name in weights}
        acting = {name: weights[name] for name, begin in begins.items() if begin is not None}
        return cls(acting, {name: begin for name, begin in begins.items() if begin})

    def shifted(self, pads: int, read: int = 0) -> Mixture:
        """The same in a row with so many columns of padding in front, the first `read` of which are read already."""
        moved = {name: begin + pads for name, begin in self.begins.items()}
        return Mixture(self.weights, {name: begin for name, begin in moved.items() if begin > read})


class Mixer:
    """Mixes adapters of a fitted pool on one base model.

    Args:
        merge: whether one mixture for all rows is merged into the weights wherever that is possible; None: if it pays
            and the weights are not of half precision, where `W + ΔW` would be rounded and could change the answer.
    """

    def __init__(self, model: nn.Module, cache: AdapterCache, merge: bool | None = None) -> None:
        self.cache = cache
        self.merge = merge
        self._model = model
        self._lock = lock_of(model)
        self._width = text_config(model).hidden_size
        self._merger = Merger(cache.modules)

    @contextmanager
    def active(self, pool: AdapterPool, mixtures: Sequence[Mixture], tokens: float = 0) -> Iterator[Form]:
        """Activates one mixture per row of the batch, or one for all rows, inside the block, which gets the form.

        Args:
            pool: fitted to the model.
            mixtures: of each row. A batch of a multiple of them repeats every row that many times.
            tokens: that the model is expected to read of a row inside the block, where each pass that adds one token
                counts as `PASS`; merging pays for many.

        Raises:
            UsageError: another mixture is active.
            CacheFull: the adapters do not fit into the memory for adapters.
        """
        if all(mixture == mixtures[0] for mixture in mixtures):
            mixtures = mixtures[:1]  # which acts on all rows
        used = {name for mixture in mixtures for name in mixture.weights}
        names = [name for name in pool.names if name in used]
        with self._lock.running(mixed=bool(names)):
            if not names:
                yield "none"
                return
            adapters = [pool[name] for name in names]
            shares = [[mixture.weights.get(name, 0.0) for name in names] for mixture in mixtures]
            weights = torch.tensor(shares, dtype=torch.float32)
            with self.cache.held(adapters) as hold:
                if self._merges(adapters, mixtures, tokens):
                    key = tuple(adapter.file for adapter in adapters), tuple(weights[0].tolist())
                    with self._merger.active(key, lambda: self.cache.stacks(hold).modules, weights[0]):
                        yield "merged"
                    return
                begins = torch.tensor([[mixture.begins.get(name, 0) for name in names] for mixture in mixtures])
                stacks = self.cache.stacks(hold).modules
                with opening(self._model, weights, begins) as gates:
                    hooks = {path: partial(added, stack, gates) for path, stack in stacks.items()}
                    with hooked(self.cache.modules, hooks):
                        yield "gated"

    def forget(self, pool: AdapterPool) -> None:
        """Drops everything that does not belong to this pool, after it has changed."""
        self._merger = Merger(self.cache.modules)  # frees the memory of the merged copy
        self.cache.retain({adapter.file for adapter in pool})

    def _merges(self, adapters: Sequence[Adapter], mixtures: Sequence[Mixture], tokens: float) -> bool:
        """Whether these mixtures are one that is merged, whatever ran before, so that this changes no answer."""
        if self.merge is False or len(mixtures) > 1 or mixtures[0].begins:
            return False
        # Merging computes about as much as gating half as many tokens as the model is wide.
        if not self.merge and 2 * tokens < self._width:
            return False
        modules = {path: self.cache.modules[path] for adapter in adapters for path in adapter.modules}
        if not all(map(mergeable, modules.values())):
            return False
        exact = all(module.weight.element_size() >= 4 for module in modules.values())  # type: ignore[operator]
        return (bool(self.merge) or exact) and self._merger.fits(modules)
