"""Gates for sequences that are packed in one row of tokens, each with its own mixture, and that may change every step.

    gate (tokens, adapters)      every token is gated by the mixture of its own sequence

Factors are multiplied in place in the store, without a copy. The output head may get one token per sequence only, and
then has gates of its own. Not thread-safe: everything is called by the thread that runs the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from logo.mixing.gated import Gates, hooked, low_rank, scaled
from logo.mixing.placement import unwaited
from logo.mixing.stacks import Stack, as_they_lie
from logo.mixing.store import AdapterStore, Hold, Resident


@dataclass(frozen=True, eq=False)
class Mixture:
    """The mixture of one sequence. Its adapters have to be held while it is used.

    Attributes:
        hold: the adapters.
        weights: one for each.
        begins: for each, the first token of the sequence on which it acts; empty: all act everywhere.
        end: the number of tokens before any adapter of the pool acts, which the base model alone reads.
    """

    hold: Hold
    weights: tuple[float, ...]
    begins: tuple[int, ...] = ()
    end: int = 0

    @property
    def last(self) -> int:
        """The token from which all adapters act."""
        return max(self.begins, default=0)


class Packed:
    """The mixtures of the current step.

    Args:
        modules: base module path -> linear module.
        store: of the same model.
        head: path of the module that gets one row per sequence instead of all tokens: first, in order, the last tokens
            of sequences whose next token is drawn, then anything for the others. None: there is no such module.
    """

    def __init__(self, modules: Mapping[str, nn.Module], store: AdapterStore, head: str | None = None) -> None:
        self._modules = modules
        self._store = store
        self._head = head
        self._residents: tuple[Resident, ...] = ()
        self._stacks: dict[str, Stack] = {}
        self._memory: dict[tuple[torch.device, torch.dtype], Tensor] = {}  # reused for the gates of every step
        self._gates: Gates | None = None
        self._head_gates: Gates | None = None

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Adds the gated term to every module inside the block; adds nothing while no gates are set."""
        with hooked(self._modules, {path: self._hook(path) for path in self._modules}):
            yield

    def gate(self, step: Sequence[tuple[Mixture | None, int, bool, int]]) -> bool:
        """Sets the sequences of the next forward pass; the one before must have finished.

        Args:
            step: for each sequence, in the order of the packed row: its mixture, its number of tokens, whether its
                next token is drawn, and the position of its first token in the sequence. Empty: the base model alone.

        Returns:
            Whether any token has a mixture.
        """
        residents = tuple(dict.fromkeys(r for mixture, *_ in step if mixture for r in mixture.hold.residents))
        if not residents:
            self._gates = self._head_gates = None
            return False
        if residents != self._residents:
            self._residents, self._stacks = residents, as_they_lie(self._store, Hold(residents))
        place = {resident: column for column, resident in enumerate(residents)}
        rows = torch.zeros(len(step), len(residents) + 1)  # the last column belongs to no adapter
        begins = torch.zeros(rows.shape, dtype=torch.int64)
        for row, (mixture, *_) in enumerate(step):
            if mixture is not None:
                columns = [place[resident] for resident in mixture.hold.residents]
                rows[row, columns] = torch.tensor(mixture.weights)
                if mixture.begins:
                    begins[row, columns] = torch.tensor(mixture.begins)
        lengths = torch.tensor([tokens for _, tokens, *_ in step])
        drawn_first = sorted(range(len(step)), key=lambda row: not step[row][2])
        gates = rows.repeat_interleave(lengths, dim=0)  # (tokens, adapters + 1)
        if any(mixture is not None and first < mixture.last for mixture, _, _, first in step):
            tokens_at = torch.cat([torch.arange(first, first + tokens) for _, tokens, _, first in step])
            gates[tokens_at[:, None] < begins.repeat_interleave(lengths, dim=0)] = 0
        every = torch.cat([gates, rows[drawn_first]])  # (tokens + sequences, ...)
        places = {(stack.A.device, stack.A.dtype) for stack in self._stacks.values()}
        placed = {place: self._copied(every, *place) for place in places}
        tokens = len(every) - len(step)
        self._gates, self._head_gates = (
            Gates(every[part, :-1], per_token=True, placed={key: gates[part] for key, gates in placed.items()})
            for part in (slice(tokens), slice(tokens, None))
        )
        return True

    def _copied(self, gates: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Gates on a device, in the memory of the gates of the step before."""
        key = (device, dtype)
        if key not in self._memory or self._memory[key].numel() < gates.numel():
            self._memory[key] = torch.empty(2 * gates.numel(), dtype=dtype, device=device)  # steps vary in size
        placed = self._memory[key][: gates.numel()].view_as(gates)
        return placed.copy_(gates.to(dtype), non_blocking=unwaited(device))

    def _hook(self, path: str) -> Any:
        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            stack, gates = self._stacks.get(path), self._head_gates if path == self._head else self._gates
            if gates is None or stack is None:
                return None
            return output.add_(scaled(module, low_rank(inputs[0], stack, gates)).to(output.dtype))

        return add
