"""Gates of the model that a server runs, which change from step to step; for the thread that runs it alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from logo.mixing.cache import AdapterCache, Hold, Stack, Stacks
from logo.mixing.gates import Gates, OpeningGates, added, hooked
from logo.mixing.mixer import Mixture


@dataclass(frozen=True, eq=False)
class PackedMixture:
    """The mixture of one sequence, whose adapters have to be held while it is used."""

    hold: Hold  # the adapters of the mixture, in its order
    mixture: Mixture  # columns are positions in the sequence
    end: int = 0  # the number of tokens before any adapter of the pool acts, which the base model alone reads


class Packed:
    """The mixtures of the current step: of every row, or of one prompt, from the positions on at which adapters act."""

    def __init__(self, cache: AdapterCache) -> None:
        self._cache = cache
        self._stacks: Mapping[str, Stack] = {}
        self._gates: Gates | OpeningGates = Gates(torch.zeros(1, 0))

    @property
    def mixed(self) -> bool:
        """Whether there is a mixture."""
        return bool(self._stacks)

    def hooks(self) -> AbstractContextManager[None]:
        """Adds the gated term to every module inside the block, while gates are set."""
        return hooked(self._cache.modules, {path: partial(self._add, path) for path in self._cache.modules})

    def clear(self) -> None:
        """The base model alone."""
        self._stacks = {}

    def gate(self, rows: Sequence[PackedMixture]) -> None:
        """Sets the mixtures of a batch of rows, in which all adapters act."""
        self.clear()  # frees the memory of the copies, should others be needed
        used = tuple(dict.fromkeys(resident for row in rows for resident in row.hold))
        if used:
            stacks = self._cache.stacks(used, grows=True)
            weights, _ = _placed(stacks, rows)
            self._gates, self._stacks = Gates(weights), stacks.modules

    @contextmanager
    def opening(self, model: nn.Module, rows: Sequence[PackedMixture], pads: Tensor) -> Iterator[None]:
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


def _placed(stacks: Stacks, rows: Sequence[PackedMixture]) -> tuple[Tensor, Tensor]:
    """The weight of each resident of the stacks in each row, and where it begins to act: (rows, n) each."""
    place = {resident: column for column, resident in enumerate(stacks.residents)}
    weights, begins = torch.zeros(len(rows), len(place)), torch.zeros(len(rows), len(place), dtype=torch.int64)
    for at, row in enumerate(rows):
        for resident, (name, weight) in zip(row.hold, row.mixture.weights.items(), strict=True):
            weights[at, place[resident]] += weight  # one file may have two names
            begins[at, place[resident]] = row.mixture.begins.get(name, 0)
    return weights, begins
