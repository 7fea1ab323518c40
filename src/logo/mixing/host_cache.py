"""`HostCache`: adapters in host memory, so that an accelerator's store can load an evicted one without reading a file.

A model on the CPU has no such cache, since the operating system caches the pages of the files.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping

from logo.adapters.adapter import Adapter, LoraWeights

Weights = Mapping[str, LoraWeights]


class HostCache:
    """The tensors of the adapters that were read last, in the dtype of their files.

    Args:
        budget: bytes. An adapter that is larger is read but not cached.
        pinned: whether memory is pinned, so that an accelerator copies from it asynchronously.
    """

    def __init__(self, budget: int, *, pinned: bool = False) -> None:
        self.budget = budget
        self.bytes = 0
        self._pinned = pinned
        self._held: OrderedDict[object, tuple[Weights, int]] = OrderedDict()  # by file
        self._lock = threading.Lock()

    def read(self, adapter: Adapter) -> Weights:
        """All tensors of an adapter.

        Raises:
            AdapterError: as `Adapter.read`.
        """
        with self._lock:
            if adapter.file in self._held:
                self._held.move_to_end(adapter.file)
                return self._held[adapter.file][0]
        weights: Weights = adapter.read()
        if self._pinned:
            weights = {
                path: LoraWeights(factors.A.pin_memory(), factors.B.pin_memory(), factors.scaling)
                for path, factors in weights.items()
            }
        size = sum(factors.A.nbytes + factors.B.nbytes for factors in weights.values())
        with self._lock:
            if size <= self.budget and adapter.file not in self._held:
                self._held[adapter.file] = weights, size
                self.bytes += size
                while self.bytes > self.budget:
                    self.bytes -= self._held.popitem(last=False)[1][1]
        return weights
