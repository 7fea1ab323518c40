"""Adapter tensors in host memory, read when they are first needed or a little earlier, dropped when they are many."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from logo.adapters.format import Adapter, LoraWeights

Weights = dict[str, LoraWeights]


class AdapterCache:
    """The adapters that were used last; least recently used ones are dropped above a byte budget.

    Args:
        budget: bytes to keep. One adapter larger than that is still read, and is then the only one kept.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.bytes = 0
        self._entries: OrderedDict[str, tuple[Adapter, Weights, int]] = OrderedDict()
        self._coming: dict[str, tuple[Adapter, Future[Weights]]] = {}
        self._lock = threading.Lock()
        self._reader: ThreadPoolExecutor | None = None

    def read(self, adapter: Adapter) -> Weights:
        """All tensors of the adapter; from memory if it is the adapter that was read under this name before.

        Raises:
            AdapterError: as `Adapter.read`, also for one that was prefetched.
        """
        with self._lock:
            weights = self._held(adapter)
            coming = self._coming.pop(adapter.name, None)
        if weights is not None:
            return weights
        weights = coming[1].result() if coming is not None and _same(coming[0], adapter) else adapter.read()
        with self._lock:
            self._put(adapter, weights)
        return weights

    def prefetch(self, adapters: Sequence[Adapter]) -> None:
        """Starts to read adapters that are not held, in a thread of its own; what is read waits until it is asked for.

        As many as fit the budget beside each other.
        """
        with self._lock:
            waiting = sum(adapter.size for adapter, _ in self._coming.values())
            for adapter in adapters:
                if self._held(adapter) is not None or adapter.name in self._coming:
                    continue
                waiting += adapter.size
                if waiting > self.budget:
                    return
                if self._reader is None:
                    self._reader = ThreadPoolExecutor(1, "logo-prefetch")
                self._coming[adapter.name] = adapter, self._reader.submit(adapter.read)

    def drop(self, name: str) -> None:
        """Forgets an adapter; nothing happens if it is not held."""
        with self._lock:
            self._drop(name)

    @property
    def names(self) -> tuple[str, ...]:
        """What is held, least recently used first."""
        return tuple(self._entries)

    def _held(self, adapter: Adapter) -> Weights | None:
        entry = self._entries.get(adapter.name)
        if entry is None or not _same(entry[0], adapter):
            return None
        self._entries.move_to_end(adapter.name)
        return entry[1]

    def _put(self, adapter: Adapter, weights: Weights) -> None:
        self._drop(adapter.name)
        size = sum(w.A.nbytes + w.B.nbytes for w in weights.values())
        self._entries[adapter.name] = (adapter, weights, size)
        self.bytes += size
        while self.bytes > self.budget and len(self._entries) > 1:
            self._drop(next(iter(self._entries)))

    def _drop(self, name: str) -> None:
        entry = self._entries.pop(name, None)
        if entry is not None:
            self.bytes -= entry[2]


def _same(one: Adapter, other: Adapter) -> bool:
    """Whether two adapters of one name hold the same tensors: fitting a pool again makes new ones of the same file."""
    return one is other or (one.file is other.file and one.modules.keys() == other.modules.keys())
