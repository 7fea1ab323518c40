"""`AdapterStore`: the factors of adapters on the devices of a model, one store per model.

An adapter gets columns (`logo.mixing.columns`) when it is first used. When the budget is spent, the adapter that was
used longest ago is evicted, but never one that is held.

A thread of the store reads and writes adapters, so a caller waits only for those that are not there yet. If growing,
writing or evicting fails, everything stays as it was.
"""

from __future__ import annotations

import functools
import threading
import traceback
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Real

import torch
from torch import nn

from logo.adapters.adapter import Adapter, LoraWeights
from logo.adapters.layout import adaptable_modules
from logo.errors import StoreFull, check_type
from logo.mixing.columns import Columns
from logo.mixing.host_cache import HostCache
from logo.mixing.placement import ADAPTER_SHARE, device_of, dtype_of, free_bytes

# Columns that are allocated for the first adapter: room for a few adapters of usual rank.
_FIRST_COLUMNS = 64


@dataclass(frozen=True)
class Source:
    """An adapter that the store may hold.

    Attributes:
        key: identifies its tensors.
        name: for messages.
        read: module path -> factors, fitted to the base; called each time that it is loaded.
    """

    key: Hashable
    name: str
    read: Callable[[], Mapping[str, LoraWeights]]


@dataclass(eq=False)
class Resident:
    """A source that has columns in the store, or will have them once the store's thread has written it.

    Attributes:
        users: the number of holds on it.
        retired: its columns are freed as soon as nobody holds it.
        ready: done when its columns are written, or failed with the error.
    """

    source: Source
    users: int = 0
    retired: bool = False
    ready: Future[None] = field(default_factory=Future)


@dataclass(frozen=True)
class Hold:
    """Adapters whose columns stay in place until `AdapterStore.release`, in the order of the call."""

    residents: tuple[Resident, ...]

    @property
    def keys(self) -> tuple[Hashable, ...]:
        """The keys of the sources."""
        return tuple(resident.source.key for resident in self.residents)


class AdapterStore:
    """The adapters of one model on its devices.

    Args:
        modules: base module path -> linear module.
        dtype: of mixtures; scales are applied in float32 before the cast.
        budget: bytes for the columns of all modules.
        host: caches files in host memory; None: files are read each time.
    """

    def __init__(
        self, modules: Mapping[str, nn.Module], dtype: torch.dtype, budget: int, host: HostCache | None = None
    ) -> None:
        self.modules = modules
        self.dtype = dtype
        self.budget = budget
        self.host = host
        self._parts: tuple[Columns, ...] = ()  # replaced as a whole, so that it may be read without the lock
        self._residents: OrderedDict[Hashable, Resident] = OrderedDict()  # the one used longest ago first
        self._leaving: deque[Hold] = deque()
        self._lock = threading.RLock()  # for residents and their columns; tensors belong to the writer
        self._writer: ThreadPoolExecutor | None = None

    def source(self, adapter: Adapter) -> Source:
        """The source of an adapter; fitting a pool again makes other adapters of the same file with the same key."""
        read = adapter.read if self.host is None else functools.partial(self.host.read, adapter)
        return Source(adapter.file, adapter.name, read)

    # -- holding ----------------------------------------------------------------------------------------------------

    @contextmanager
    def held(self, sources: Sequence[Source]) -> Iterator[Hold]:
        """Holds these inside the block; as `hold`."""
        hold = self.hold(sources)
        try:
            yield hold
        finally:
            self.release(hold)

    def reserve(self, sources: Sequence[Source]) -> Hold:
        """As `hold`, but without waiting: each `Resident.ready` says when it is loaded, or why it cannot be."""
        with self._lock:
            self._release_all()
            hold = Hold(tuple(self._wanted(source) for source in sources))
            for resident in hold.residents:
                resident.users += 1
        return hold

    def hold(self, sources: Sequence[Source]) -> Hold:
        """Waits until all of these are loaded, and keeps them so until `release`. All of them are held, or none.

        Raises:
            StoreFull: they do not fit beside the adapters that others hold.
            AdapterError: one cannot be read.
            NotFinite: one overflows the dtype.
        """
        hold = self.reserve(sources)
        try:
            # All are waited for, so that the state after a failure does not depend on timing.
            failures = [resident.ready.exception() for resident in hold.residents]
            for failure in failures:
                if failure is not None:
                    raise failure
        except BaseException:
            self.release(hold)
            raise
        return hold

    def release(self, hold: Hold) -> None:
        """Ends a hold; adapters that nobody holds may be evicted."""
        self.release_later(hold)
        with self._lock:
            self._release_all()

    def release_later(self, hold: Hold) -> None:
        """As `release`, but without the lock: the next holder of the lock does the work.

        Finalizers call this, and they may run at any point of any thread.
        """
        self._leaving.append(hold)

    def _release_all(self) -> None:
        """Does the releases that `release_later` has queued. The lock is held."""
        while self._leaving:
            for resident in self._leaving.popleft().residents:
                resident.users -= 1
                if resident.retired and not resident.users:
                    self._forget(resident)

    def retain(self, keys: Collection[Hashable]) -> None:
        """Frees the columns of all other keys; those of held adapters as soon as they are released."""
        with self._lock:
            self._release_all()
            for resident in list(self._residents.values()):
                if resident.source.key not in keys:
                    resident.retired = True
                    if resident.ready.done() and not resident.users:
                        self._forget(resident)

    def prefetch(self, sources: Sequence[Source]) -> None:
        """Begins to load these. An error is raised where they are held."""
        with self._lock:
            for source in sources:
                self._wanted(source)

    # -- reading ----------------------------------------------------------------------------------------------------

    @property
    def parts(self) -> tuple[Columns, ...]:
        """The columns, grouped by modules that have the same adapters."""
        return self._parts

    @contextmanager
    def still(self) -> Iterator[None]:
        """Inside the block, columns are neither taken nor freed."""
        with self._lock:
            yield

    @property
    def keys(self) -> tuple[Hashable, ...]:
        """The keys of loaded adapters, the one used longest ago first."""
        with self._lock:
            self._release_all()
            return tuple(key for key, resident in self._residents.items() if resident.ready.done())

    @property
    def bytes(self) -> int:
        """Memory of all columns, taken or not."""
        return sum(part.capacity * part.column_bytes for part in self._parts)

    # -- writing: by one thread -------------------------------------------------------------------------------------

    def _wanted(self, source: Source) -> Resident:
        """The resident of a source; a new one is handed to the thread that writes. The lock is held."""
        resident = self._residents.get(source.key)
        if resident is None:
            resident = self._residents[source.key] = Resident(source)
            if self._writer is None:
                self._writer = ThreadPoolExecutor(1, "logo-store")
            self._writer.submit(self._make_resident, resident)
        resident.retired = False
        self._residents.move_to_end(source.key)
        return resident

    def _make_resident(self, resident: Resident) -> None:
        source = resident.source
        try:
            weights = source.read()
            for part, columns in self._place(source, weights).items():
                part.write(source.name, columns, weights)
            with self._lock:
                resident.ready.set_result(None)
                if resident.retired and not resident.users:
                    self._forget(resident)
        except BaseException as error:  # raised where it is waited for; the next hold tries again
            traceback.clear_frames(error.__traceback__)  # so that the error does not keep tensors alive
            with self._lock:
                self._forget(resident)
            resident.ready.set_exception(error)

    def _place(self, source: Source, weights: Mapping[str, LoraWeights]) -> dict[Columns, tuple[int, ...]]:
        """Takes columns in every part that the factors touch: free ones, new ones, or those of evicted adapters.

        Raises:
            StoreFull: the budget does not allow it.
        """
        while True:
            with self._lock:  # columns must not be freed while parts are split
                self._release_all()
                touched = self._touched(weights)
                missing = {part: part.missing(rank) for part, rank in touched.items()}
                room = self.budget - self.bytes
                needed = sum(part.column_bytes * more for part, more in missing.items())
                if not needed:
                    return {part: part.take(source.key, rank) for part, rank in touched.items()}
                if needed > room:
                    self._make_room(source, needed)
                    continue
            spare = (room - needed) // max(1, sum(part.column_bytes for part in missing))
            for part, more in missing.items():
                if more:  # doubling, so that adapters loaded one by one do not grow it each time
                    part.grow(more + max(0, min(max(part.capacity, _FIRST_COLUMNS) - more, spare)))

    def _touched(self, weights: Mapping[str, LoraWeights]) -> dict[Columns, int]:
        """The parts of these modules, with the highest rank in each; parts with other modules are split.

        The lock is held.
        """
        parts: list[Columns] = []
        touched: dict[Columns, int] = {}
        new = dict(weights)
        for part in self._parts:
            inside = weights.keys() & part.factors.keys()
            if not inside:
                parts.append(part)
                continue
            if len(inside) < len(part.factors):
                part, rest = part.split(inside)
                parts.append(rest)
            parts.append(part)
            touched[part] = max(len(weights[path].A) for path in inside)
            for path in inside:
                del new[path]
        if new:
            part = Columns.on(new, {path: device_of(self.modules[path]) for path in new}, self.dtype)
            parts.append(part)
            touched[part] = max(len(factors.A) for factors in new.values())
        self._parts = tuple(parts)
        return touched

    def _make_room(self, source: Source, needed: int) -> None:
        """Evicts the adapter used longest ago; if all are in use, frees memory behind the columns in use."""
        idle = next((r for r in self._residents.values() if r.ready.done() and not r.users), None)
        if idle is not None:
            self._forget(idle)
            return
        before = self.bytes
        for part in self._parts:
            part.trim()
        if self.bytes == before:
            others = sum(1 for resident in self._residents.values() if resident.ready.done())
            raise StoreFull(
                f"adapter {source.name!r}: expected room for {needed / 1e6:.1f} MB, found none beside the {others} "
                f"adapters in use; the memory for adapters is {self.budget / 1e9:.3f} GB: give it more "
                "(--adapter-memory-gb), select fewer adapters per prompt (-k), or answer fewer prompts at once"
            )

    def _forget(self, resident: Resident) -> None:
        """Frees the columns of a resident, once."""
        if self._residents.get(resident.source.key) is resident:
            del self._residents[resident.source.key]
            for part in self._parts:
                part.leave(resident.source.key)


def adapter_store(model: nn.Module, memory_gb: float | None, cache_gb: float | None) -> AdapterStore:
    """The store of a model, for the adapters of any pool.

    Args:
        memory_gb: for its columns, in 10⁹ bytes; None: a share of the free memory (`ADAPTER_SHARE`).
        cache_gb: for files in host memory, if the model computes elsewhere; None: as much as the columns may have, but
            no more than the same share of the free host memory.

    Warns:
        UserWarning: `cache_gb` is less than the columns may have, so that files are read again.
    """
    for name, size in (("adapter_memory_gb", memory_gb), ("adapter_cache_gb", cache_gb)):
        if size is not None:
            check_type(name, size, Real, "a number")
    modules = adaptable_modules(model)
    devices = {device_of(module) for module in modules.values()}
    budget = int(ADAPTER_SHARE * free_bytes(devices) if memory_gb is None else memory_gb * 1e9)
    elsewhere = any(device.type != "cpu" for device in devices)
    host = None
    if elsewhere:
        usual = min(budget, int(ADAPTER_SHARE * free_bytes([torch.device("cpu")])))
        size = usual if cache_gb is None else int(cache_gb * 1e9)
        if size < budget:
            warnings.warn(
                f"the host has {size / 1e9:.2f} GB for adapter files, less than the {budget / 1e9:.2f} GB for adapters "
                "where the model computes: files that do not fit are read again from disk; give --adapter-cache-gb as "
                "much as --adapter-memory-gb",
                UserWarning,
                stacklevel=2,
            )
        host = HostCache(size, pinned=any(device.type == "cuda" for device in devices))
    return AdapterStore(modules, dtype_of(model), budget, host)
