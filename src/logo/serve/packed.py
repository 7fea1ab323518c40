"""The mixtures of sequences, and the gates of the model that a server runs, which change from step to step."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from logo.core import Selection
from logo.mixing.cache import AdapterCache, Hold, Stack, Stacks
from logo.mixing.gates import Gates, OpeningGates, added, hooked
from logo.mixing.mixer import Mixture


@dataclass(frozen=True, eq=False)
class Chosen:
    """The mixture of one prompt. Its adapters are held, so that the prompt is answered with them even if the pool
    changes, until `release` is called (or the garbage collector does it); they are loaded once `loaded` has returned.

    Attributes:
        selection: names, weights, scores.
        mixture: those that act on the prompt; columns are positions in the sequence.
        end: the number of tokens before any adapter of the pool acts, which the base model alone reads.
        queue_ms: how long the prompt waited to be probed.
        probe_ms: how long the probe took, which prompts may share; 0 if nothing was selected.
        hold: the adapters of the mixture, in its order.
    """

    selection: Selection
    mixture: Mixture
    end: int
    queue_ms: float
    probe_ms: float
    hold: Hold
    cache: AdapterCache = field(repr=False)
    release: Callable[[], object] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "release", weakref.finalize(self, self.cache.release, self.hold))

    async def loaded(self) -> None:
        """Waits until the adapters are loaded; after an error or a cancellation they are not held any more.

        Raises:
            LoGoError: an adapter that cannot be read, or no room for it.
        """
        loop = asyncio.get_running_loop()
        try:
            for ready in (resident.ready for resident in self.hold if not resident.ready.done()):
                arrived = asyncio.Event()
                # Not `wrap_future`, which passes a cancellation of this request on to all that wait for the adapter.
                ready.add_done_callback(partial(_tell, loop, arrived))
                await arrived.wait()
            for error in (resident.ready.exception() for resident in self.hold):
                if error is not None:
                    raise error.with_traceback(None)  # one object, for all requests with the adapter
        except BaseException:
            self.release()
            raise


def _tell(loop: asyncio.AbstractEventLoop, arrived: asyncio.Event, ready: Future[None]) -> None:
    with suppress(RuntimeError):  # the loop has ended, and nobody waits
        loop.call_soon_threadsafe(arrived.set)


class Packed:
    """The mixtures of the current step: of every row, or of one prompt, from the positions on at which adapters act.
    Only the thread that runs the model uses it."""

    def __init__(self, cache: AdapterCache) -> None:
        self._cache = cache
        self._stacks: Mapping[str, Stack] = {}
        self._gates: Gates | OpeningGates = Gates(torch.zeros(1, 0))

    def hooks(self) -> AbstractContextManager[None]:
        """Adds the gated term to every module inside the block, while gates are set."""
        return hooked(self._cache.modules, {path: partial(self._add, path) for path in self._cache.modules})

    def clear(self) -> None:
        """The base model alone."""
        self._stacks = {}

    def gate(self, rows: Sequence[Chosen]) -> None:
        """Sets the mixtures of a batch of rows, in which all adapters act."""
        self.clear()  # frees the memory of the copies, should others be needed
        used = tuple(dict.fromkeys(resident for row in rows for resident in row.hold))
        if used:
            stacks = self._cache.stacks(used, grows=True)
            weights, _ = _placed(stacks, rows)
            self._gates, self._stacks = Gates(weights), stacks.modules

    @contextmanager
    def opening(self, model: nn.Module, rows: Sequence[Chosen], pads: Tensor) -> Iterator[None]:
        """Sets the mixtures of prompts inside the block, with so many columns of padding in front (rows, 1)."""
        self.clear()
        used = tuple(dict.fromkeys(resident for row in rows for resident in row.hold))
        if not used:
            yield
            return
        stacks = Stacks.of(used)
        weights, begins = _placed(stacks, rows)
        gates = OpeningGates(weights, torch.where(begins > 0, begins + pads, 0))
        self._gates, self._stacks = gates, stacks.modules
        try:
            with gates.following(model):
                yield
        finally:
            self.clear()

    def _add(self, path: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        stack = self._stacks.get(path)
        return None if stack is None else added(stack, self._gates, module, inputs, output)


def _placed(stacks: Stacks, rows: Sequence[Chosen]) -> tuple[Tensor, Tensor]:
    """The weight of each resident of the stacks in each row, and where it begins to act: (rows, n) each."""
    place = {resident: column for column, resident in enumerate(stacks.residents)}
    weights, begins = torch.zeros(len(rows), len(place)), torch.zeros(len(rows), len(place), dtype=torch.int64)
    for at, row in enumerate(rows):
        for resident, (name, weight) in zip(row.hold, row.mixture.weights.items(), strict=True):
            weights[at, place[resident]] += weight  # one file may have two names
            begins[at, place[resident]] = row.mixture.begins.get(name, 0)
    return weights, begins
