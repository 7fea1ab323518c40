"""The mixtures of sequences, and the gates of the model that a server runs, which change from step to step."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from logo.adapters.adapter import Adapter
from logo.api.replies import Chosen
from logo.mixing.cache import AdapterCache, Hold, Stack, Stacks
from logo.mixing.gates import Gates, OpeningGates, added, hooked, opening
from logo.mixing.mixer import Mixture


@dataclass(frozen=True, eq=False)
class HeldMixture:
    """The mixture of one prompt. Its adapters are held, so that the prompt is answered with them even if the pool
    changes, until `release` is called (or the garbage collector does it); they are loaded once `loaded` has returned.

    Attributes:
        chosen: the selection that the mixture is of.
        mixture: of the adapters that act on the prompt, which are in `hold` in this order.
        end: the number of tokens before any adapter of the pool acts, which the base model alone reads.
    """

    chosen: Chosen
    mixture: Mixture
    end: int
    hold: Hold
    cache: AdapterCache = field(repr=False)
    release: Callable[[], object] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "release", weakref.finalize(self, self.cache.release, self.hold))

    @property
    def adapters(self) -> list[Adapter]:
        """The adapters that it holds."""
        return [resident.adapter for resident in self.hold]

    async def loaded(self) -> None:
        """Waits until the adapters are loaded; LoGoError: one cannot be read, or has no room. After an error or a
        cancellation they are not held any more."""
        try:
            for resident in self.hold:
                if not resident.ready.done():  # others may wait for it, too: they are not cancelled with this request
                    ready = asyncio.wrap_future(resident.ready)
                    ready.add_done_callback(_notice)
                    await asyncio.shield(ready)
                resident.ready.result()
        except BaseException as error:
            self.release()
            raise error.with_traceback(None)  # noqa: B904  # one object, for all requests with the adapter


def _notice(ready: asyncio.Future[None]) -> None:
    """Retrieves the error of an adapter that a client has waited for and left: asyncio would log it as nobody's."""
    if not ready.cancelled():
        ready.exception()


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

    def gate(self, rows: Sequence[HeldMixture]) -> None:
        """Sets the mixtures of a batch of rows, in which all adapters act."""
        self.clear()  # frees the memory of the copies, should others be needed
        residents = _residents(rows)
        if residents:
            stacks = self._cache.stacks(residents, grows=True)
            weights, _ = _placed(stacks, rows)
            self._gates = Gates(weights)
            self._stacks = stacks.modules

    @contextmanager
    def opening(self, model: nn.Module, rows: Sequence[HeldMixture], pads: Tensor) -> Iterator[None]:
        """Sets the mixtures of prompts inside the block, with so many columns of padding in front (rows, 1)."""
        self.clear()
        stacks = Stacks.of(_residents(rows))
        weights, begins = _placed(stacks, rows)
        try:
            with opening(model, weights, torch.where(begins > 0, begins + pads, 0)) as self._gates:
                self._stacks = stacks.modules
                yield
        finally:
            self.clear()

    def _add(self, path: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        stack = self._stacks.get(path)
        return None if stack is None else added(stack, self._gates, module, inputs, output)


def _residents(rows: Sequence[HeldMixture]) -> Hold:
    """The adapters of some rows, each once."""
    return tuple(dict.fromkeys(resident for row in rows for resident in row.hold))


def _placed(stacks: Stacks, rows: Sequence[HeldMixture]) -> tuple[Tensor, Tensor]:
    """The weight of each resident of the stacks in each row, and where it begins to act: (rows, n) each."""
    columns = {resident: column for column, resident in enumerate(stacks.residents)}
    weights = torch.zeros(len(rows), len(columns))
    begins = torch.zeros(len(rows), len(columns), dtype=torch.int64)
    for row, held in enumerate(rows):
        for resident, (name, weight) in zip(held.hold, held.mixture.weights.items(), strict=True):
            weights[row, columns[resident]] += weight  # one file may have two names
            begins[row, columns[resident]] = held.mixture.begins.get(name, 0)
    return weights, begins
