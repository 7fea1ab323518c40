"""`AdapterCache`: the factors of adapters on the devices of a model, and side by side as a batch multiplies them.

A thread reads the files. One half of the budget is for single adapters: when it is full, the one that was used longest
ago gives way, but never one that is held. The other half is for the copies that a batch multiplies (`Stacks`): they are
of adapters in the first half, so they never need more.
"""

from __future__ import annotations

import math
import os
import threading
import traceback
from collections import OrderedDict, deque
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Real
from weakref import WeakSet

import psutil
import torch
from torch import Tensor, nn

from logo.adapters.adapter import Adapter, LoraWeights
from logo.adapters.layout import BaseLayout
from logo.errors import CacheFull, NotFinite, UsageError, check_type
from logo.models import device_of

# The share of the free memory that adapters may have by default.
ADAPTER_SHARE = 0.3
_CACHES: WeakSet[AdapterCache] = WeakSet()  # of this process


@dataclass(frozen=True)
class Stack:
    """The factors of some adapters on one module, side by side: `ΔW_i = B[owner == i].T A[owner == i]`."""

    A: Tensor  # (R, d_in)
    B: Tensor  # (R, d_out), with the scale in it
    owner: Tensor  # (R,) int64 on the host: the adapter of each column, by its place in `Stacks.residents`


@dataclass(eq=False)
class Resident:
    """An adapter in the cache, or on its way there."""

    adapter: Adapter
    # Module path -> A (r, d_in) and B (r, d_out); empty until it is loaded, and once its memory is free.
    factors: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    bytes: int = 0  # of the factors; counted from before they are allocated
    users: int = 0  # the number of holds on it
    ready: Future[None] = field(default_factory=Future)  # done when it is loaded, or failed with the error


# Adapters that stay in the cache until `AdapterCache.release`, in the order of the call.
Hold = tuple[Resident, ...]


@dataclass(frozen=True)
class Stacks:
    """Some adapters side by side; on modules that the same ones touch with the same ranks they share an `owner`."""

    residents: Hold
    modules: Mapping[str, Stack]  # by module path

    @classmethod
    def of(cls, residents: Hold) -> Stacks:
        """Copies the factors of loaded adapters; those of an adapter that is alone on a module are used as they are."""
        factors: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}  # module -> adapter -> A and B
        for i, resident in enumerate(residents):
            for path, pair in resident.factors.items():
                factors.setdefault(path, {})[i] = pair
        modules: dict[str, Stack] = {}
        owners: dict[tuple[object, ...], Tensor] = {}
        for path, pairs in factors.items():
            A = _beside([down for down, _ in pairs.values()])
            B = _beside([up for _, up in pairs.values()])
            ranks = [len(down) for down, _ in pairs.values()]
            key = (*pairs, *ranks)
            if key not in owners:
                owners[key] = torch.tensor(list(pairs)).repeat_interleave(torch.tensor(ranks))
            modules[path] = Stack(A, B, owners[key])
        return cls(residents, modules)


def _beside(factors: list[Tensor]) -> Tensor:
    """Factors (r, d) side by side along the rank; a single one as it is."""
    return factors[0] if len(factors) == 1 else torch.cat(factors)


class AdapterCache:
    """The adapters of one model on its devices, of any pool.

    Args:
        modules: base module path -> linear module or embedding.
        dtype: of mixtures; scales are applied in float32 before the cast.
        budget: bytes, half of them for single adapters, which take `bytes` now.
    """

    def __init__(self, modules: Mapping[str, nn.Module], dtype: torch.dtype, budget: int) -> None:
        self.modules = modules
        self.dtype = dtype
        self.budget = budget
        self.bytes = 0
        self._residents: OrderedDict[Hashable, Resident] = OrderedDict()  # by file; the one used longest ago first
        self._leaving: deque[Hold] = deque()
        self._last: Stacks | None = None
        self._begin_loading()
        _CACHES.add(self)

    def _begin_loading(self) -> None:
        """Gets what loads adapters, and what guards that; a forked process gets its own, since no thread is in it."""
        self._lock = threading.Lock()
        self._loader = ThreadPoolExecutor(1, "logo-adapters")  # begins its thread when it is needed

    def _forked(self) -> None:
        """Forgets, in a forked process, the adapters that a thread of the other process was loading."""
        self._begin_loading()
        for file, resident in list(self._residents.items()):
            if not resident.ready.done():
                del self._residents[file]
                self.bytes -= resident.bytes

    @classmethod
    def of(cls, model: nn.Module, layout: BaseLayout, memory_gb: float | None) -> AdapterCache:
        """The cache of a model of this layout; a budget in 10⁹ bytes, or None: a share of the free memory
        (`ADAPTER_SHARE`)."""
        modules = {path: model.get_submodule(path) for path in (*layout.shapes, *layout.embeddings)}
        if memory_gb is None:
            budget = int(ADAPTER_SHARE * free_bytes(device_of(module) for module in modules.values()))
        else:
            budget = bytes_of("adapter_memory_gb", memory_gb)
        dtype: torch.dtype = model.dtype  # type: ignore[assignment]
        return cls(modules, dtype if dtype.is_floating_point else torch.float32, budget)

    @contextmanager
    def held(self, adapters: Sequence[Adapter]) -> Iterator[Hold]:
        """Holds adapters inside the block, which begins when all of them are loaded.

        Raises:
            CacheFull: they do not fit beside the adapters that others hold.
            AdapterError, NotFinite: one cannot be read, or overflows the dtype.
        """
        hold = self.reserve(adapters)
        try:
            wait(resident.ready for resident in hold)  # all, so that what a failure leaves does not depend on timing
            for resident in hold:
                resident.ready.result()
            yield hold
        finally:
            self.release(hold)

    def has_room(self, adapters: Sequence[Adapter], *, alone: bool = False) -> bool:
        """Whether adapters fit beside those that are held now; `alone`: whether they would if none were held."""
        with self._locked():
            sizes: dict[Hashable, int] = {}
            if not alone:
                sizes = {file: resident.bytes for file, resident in self._residents.items() if resident.users}
            sizes |= {adapter.file: adapter.parameters * self.dtype.itemsize for adapter in adapters}
            return sum(sizes.values()) <= self.budget // 2

    def reserve(self, adapters: Sequence[Adapter]) -> Hold:
        """Holds adapters without waiting: each `Resident.ready` says when it is loaded, or why it cannot be."""
        hold = []
        with self._locked():
            for adapter in adapters:
                resident = self._residents.get(adapter.file)
                if resident is None:
                    resident = self._residents[adapter.file] = Resident(adapter)
                    self._loader.submit(self._load, resident)
                self._residents.move_to_end(adapter.file)
                resident.users += 1
                hold.append(resident)
        return tuple(hold)

    def release(self, hold: Hold) -> None:
        """Ends a hold; adapters that nobody holds may give way.

        Finalizers may call this, at any point of any thread: if the lock is taken, the next holder of it does the work.
        """
        self._leaving.append(hold)
        if not self._lock.locked():
            with self._locked():
                pass

    def retain(self, files: Collection[Hashable]) -> None:
        """Frees the adapters of all other files; those that are held as soon as they are released."""
        with self._locked():
            self._last = None
            for file in self._residents.keys() - files:
                self._free(self._residents.pop(file))

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters that are loaded, the one used longest ago first."""
        with self._locked():
            return tuple(resident.adapter.name for resident in self._residents.values() if resident.ready.done())

    def stacks(self, hold: Hold, *, grows: bool = False) -> Stacks:
        """The loaded adapters of a hold side by side; called by the thread that runs the model.

        Args:
            grows: the result may contain others too, as large at most, so that adapters that come and go are seldom
                copied. The order of sums then depends on what came before; without it, on the hold alone.
        """
        last = () if self._last is None else self._last.residents
        beside: list[Resident] = []  # of the last ones, those that stay
        if grows:
            beside = [resident for resident in last if resident not in set(hold)]
            if sum(resident.bytes for resident in beside) > sum(resident.bytes for resident in hold):
                beside = []
        unchanged = last == hold or (grows and set(last) == {*hold, *beside})
        if self._last is None or not unchanged:
            self._last = None  # frees the memory of the copies
            self._last = Stacks.of((*hold, *(resident for resident in beside if resident.factors)))
        return self._last

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Takes the lock, and ends the holds that were given back."""
        with self._lock:
            while self._leaving:
                for resident in self._leaving.popleft():
                    resident.users -= 1
                    self._free(resident)
            yield

    def _load(self, resident: Resident) -> None:
        try:
            adapter = resident.adapter
            weights = adapter.read()
            numbers = sum(factors.A.numel() + factors.B.numel() for factors in weights.values())
            size = numbers * self.dtype.itemsize
            with self._locked():
                self._make_room(adapter, size)
                resident.bytes = size
                self.bytes += size
            placed = {path: self._placed(path, factors) for path, factors in weights.items()}
            self._check_finite(adapter, placed)
            with self._locked():
                resident.factors = placed
                resident.ready.set_result(None)
                self._free(resident)
        except BaseException as error:  # raised where it is waited for; the next hold tries again
            traceback.clear_frames(error.__traceback__)  # so that the error does not keep tensors alive
            with self._locked():
                if self._residents.get(resident.adapter.file) is resident:
                    del self._residents[resident.adapter.file]
                self.bytes -= resident.bytes
                resident.bytes = 0
            resident.ready.set_exception(error)

    def _placed(self, path: str, weights: LoraWeights) -> tuple[Tensor, Tensor]:
        """Copies of A (r, d_in) and of `s B` (r, d_out) where the module computes."""
        device = device_of(self.modules[path])
        scaled = weights.scaled_b(device).T
        A = torch.empty(weights.A.shape, dtype=self.dtype, device=device).copy_(weights.A)
        B = torch.empty(scaled.shape, dtype=self.dtype, device=device).copy_(scaled)
        return A, B

    def _check_finite(self, adapter: Adapter, placed: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Raises NotFinite if a factor overflows: a gate of 0 hides that from other rows, but merging and the adapter's
        own rows would spread it."""
        by_device: dict[torch.device, list[tuple[str, Tensor]]] = {}
        for path, pair in placed.items():
            for factor in pair:
                by_device.setdefault(factor.device, []).append((path, factor))
        for factors in by_device.values():
            # One question for all of them, since each waits for whatever else the device has to compute.
            if bool(torch.stack([factor.sum() for _, factor in factors]).isfinite().all()):
                continue
            for path, factor in factors:
                if not bool(factor.isfinite().all()):  # a sum may overflow alone
                    raise NotFinite(
                        f"adapter {adapter.name!r}: module {path} overflows {self.dtype}, in which mixtures compute; "
                        "load the base model with a wider --dtype"
                    )

    def _make_room(self, adapter: Adapter, size: int) -> None:
        """Frees what was used longest ago. The lock is held."""
        while self.bytes + size > self.budget // 2:
            loaded = (resident for resident in self._residents.values() if resident.ready.done())
            idle = next((resident for resident in loaded if not resident.users), None)
            if idle is None:
                count = sum(resident.bytes > 0 for resident in self._residents.values())
                raise CacheFull(
                    f"adapter {adapter.name!r}: expected room for {size / 1e6:.1f} MB, found none beside the {count} "
                    f"adapters in use; the memory for adapters is {self.budget / 1e9:.3f} GB, half of it for what a "
                    "batch multiplies: give it more (--adapter-memory-gb), select fewer adapters per prompt (-k), or "
                    "answer fewer prompts at once"
                )
            self._free(self._residents.pop(idle.adapter.file))

    def _free(self, resident: Resident) -> None:
        """Frees an adapter, unless it is being loaded, is held, or can still be asked for. The lock is held."""
        listed = self._residents.get(resident.adapter.file) is resident
        if not listed and not resident.users and resident.ready.done():
            self.bytes -= resident.bytes
            resident.bytes = 0
            resident.factors = {}


def _after_fork() -> None:
    for cache in list(_CACHES):
        cache._forked()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)


def bytes_of(option: str, gigabytes: float) -> int:
    """A budget in bytes; raises UsageError unless it is a number of gigabytes, 0 or more."""
    check_type(option, gigabytes, Real, "a number")
    if not 0 <= gigabytes < math.inf:
        raise UsageError(f"{option}: expected gigabytes, 0 or more, found {gigabytes}")
    return int(gigabytes * 1e9)


def free_bytes(devices: Iterable[torch.device]) -> int:
    """Free memory on these devices together; host memory for devices that are no GPUs."""
    return sum(
        torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else int(psutil.virtual_memory().available)
        for device in set(devices)
    )
