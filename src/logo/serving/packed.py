"""Gates for sequences that are packed in one row of tokens, each with its own mixture, and that may change every step.

Every token is gated by the mixture of its own sequence. The output head may get one token per sequence only, and then
has gates of its own. Not thread-safe: everything is called by the thread that runs the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from logo.mixing.cache import AdapterCache, Hold, Stack
from logo.mixing.gates import Gates, added, hooked
from logo.mixing.mixer import Mixture


@dataclass(frozen=True, eq=False)
class PackedMixture:
    """The mixture of one sequence, whose adapters have to be held while it is used."""

    hold: Hold  # the adapters of the mixture, in its order
    mixture: Mixture  # columns are positions in the sequence
    end: int = 0  # the number of tokens before any adapter of the pool acts, which the base model alone reads

    @property
    def last(self) -> int:
        """The token from which all adapters act."""
        return max(self.mixture.begins.values(), default=0)


class Packed:
    """The mixtures of the current step.

    Args:
        head: path of the module that gets one row per sequence instead of all tokens: first, in order, the last tokens
            of sequences whose next token is drawn, then anything for the others. None: there is no such module.
    """

    def __init__(self, cache: AdapterCache, head: str | None = None) -> None:
        self._cache, self._head = cache, head
        self._stacks: Mapping[str, Stack] = {}
        self._gates = self._head_gates = Gates(torch.zeros(1, 0))

    def hooks(self) -> AbstractContextManager[None]:
        """Adds the gated term to every module inside the block, while gates are set."""
        return hooked(self._cache.modules, {path: partial(self._add, path) for path in self._cache.modules})

    def gate(self, step: Sequence[tuple[PackedMixture | None, int, bool, int]]) -> bool:
        """Sets the sequences of the next forward pass, and says if any has a mixture; the one before must have ended.

        Args:
            step: for each sequence, in the order of the packed row: its mixture, its number of tokens, whether its
                next token is drawn, and the position of its first token in the sequence. Empty: the base model alone.
        """
        self._stacks = {}  # frees the memory of the copies, should others be needed
        used = dict.fromkeys(resident for held, *_ in step if held is not None for resident in held.hold)
        if not used:
            return False
        stacks = self._cache.stacks(tuple(used), grows=True)
        place = {resident: column for column, resident in enumerate(stacks.residents)}
        weights, begins = ([[zero] * len(place) for _ in step] for zero in (0.0, 0))
        for row, (held, *_) in enumerate(step):
            if held is not None:
                for resident, (name, weight) in zip(held.hold, held.mixture.weights.items(), strict=True):
                    weights[row][place[resident]] += weight  # one file may have two names
                    begins[row][place[resident]] = held.mixture.begins.get(name, 0)
        rows, lengths = torch.tensor(weights), torch.tensor([tokens for _, tokens, *_ in step])
        gates = rows.repeat_interleave(lengths, dim=0)  # (tokens, adapters)
        if any(held is not None and first < held.last for held, _, _, first in step):
            tokens_at = torch.cat([torch.arange(first, first + tokens) for _, tokens, _, first in step])
            gates[tokens_at[:, None] < torch.tensor(begins).repeat_interleave(lengths, dim=0)] = 0
        drawn_first = sorted(range(len(step)), key=lambda row: not step[row][2])
        self._gates, self._head_gates = Gates(gates, per_token=True), Gates(rows[drawn_first], per_token=True)
        self._stacks = stacks.modules
        return True

    def _add(self, path: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        stack, gates = self._stacks.get(path), self._head_gates if path == self._head else self._gates
        return None if stack is None else added(stack, gates, module, inputs, output)
