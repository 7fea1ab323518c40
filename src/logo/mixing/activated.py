"""Gates that open at a position of the prompt, for adapters that act only from there on (`logo.adapters.activation`).

    g(row, column) = w  if column >= begin(row, adapter)  else 0

A column is a position in the batch, counted with padding and cached tokens. Once all gates of a batch are open, they
are ordinary `Gates`, one per row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from logo.adapters.activation import Activation
from logo.adapters.pool import AdapterPool
from logo.errors import UsageError
from logo.mixing.gated import Gates
from logo.mixing.stacks import Stack

# Larger than any column, for an adapter that never acts in a row.
NEVER = 2**62

# The arguments by which models take the cache of earlier columns.
_CACHES = ("past_key_values", "cache", "cache_params")


class OpeningGates:
    """The gates of a batch that open column by column; a hook on the model tells them which columns each pass reads.

    Args:
        weights: (rows, adapters).
        begins: (rows, adapters) int64: the first column in which each adapter acts.
    """

    def __init__(self, weights: Tensor, begins: Tensor) -> None:
        never = begins >= NEVER
        self._weights, self._begins = weights.masked_fill(never, 0.0), begins.masked_fill(never, 0)
        self._open = Gates(self._weights)
        self._last = int(self._begins.max())
        self._batch, self._width = len(weights), 0
        self._count = 0  # columns that were read up to now
        self._columns: tuple[int, int] | None = None  # of the current forward pass; None: all gates are open
        self._kept: Tensor | None = None  # those of them that the output head gets, if they are not the last ones
        self._made: dict[tuple[int, int, int], Gates] = {}

    @contextmanager
    def following(self, model: nn.Module) -> Iterator[None]:
        """Follows the forward passes of the model inside the block, to know which columns they read."""
        handle = model.register_forward_pre_hook(self._before, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        read = args[0] if args else kwargs.get("input_ids")
        if read is None:
            read = kwargs["inputs_embeds"]
        cache = next((kwargs[name] for name in _CACHES if kwargs.get(name) is not None), None)
        seen = self._seen(cache)
        self._batch, self._width = read.shape[:2]
        self._count = seen + self._width
        self._columns = None if seen >= self._last else (seen, seen + self._width)
        kept = kwargs.get("logits_to_keep")
        self._kept = seen + kept.cpu() if isinstance(kept, Tensor) else None
        self._made.clear()

    def _seen(self, cache: Any) -> int:
        """The columns that earlier passes have read into a cache."""
        if cache is None:
            return 0
        try:
            said = int(cache.get_seq_length())
        except (AttributeError, ValueError):  # linear attention keeps no columns
            said = 0
        return said or self._count  # MiniMax's cache says 0 if the first layer is of linear attention

    def applied(self, stack: Stack, response: Tensor) -> Tensor:
        """As `Gates.applied`."""
        return self._now(response.shape[:-1].numel()).applied(stack, response)

    def applied_turned(self, stack: Stack, lead: torch.Size, response: Tensor) -> Tensor:
        """As `Gates.applied_turned`."""
        return self._now(lead.numel()).applied_turned(stack, lead, response)

    def _now(self, tokens: int) -> Gates:
        """The gates of so many tokens: all of the pass, or those columns of each row that an output head gets."""
        if self._columns is None:
            return self._open
        rows, batch = len(self._weights), self._batch
        if batch % rows or tokens % batch or tokens > batch * self._width:
            raise ValueError(f"gates for {rows} rows of {self._width} tokens cannot serve {tokens} tokens")
        key = (batch, tokens, self._columns[1])
        if key not in self._made:
            count = tokens // batch
            columns = torch.arange(self._columns[1] - count, self._columns[1])
            if self._kept is not None and count < self._width:
                columns = self._kept
            gates = torch.where(columns[:, None] >= self._begins[:, None], self._weights[:, None], 0.0)
            gates = gates.repeat_interleave(batch // rows, dim=0)  # (batch, columns, adapters)
            self._made[key] = Gates(gates.flatten(0, 1), per_token=True)
        return self._made[key]


def begins(pool: AdapterPool, names: Iterable[str], prompt: Sequence[int]) -> dict[str, int]:
    """The first position of a prompt at which each of these adapters acts; `NEVER` if it does not act.

    Raises:
        UsageError: see `Activation.begin`; the message names the adapter.
    """
    found, known = {}, dict[Activation, int | None]()
    for name in names:
        activation = pool[name].activation
        if activation not in known:
            try:
                known[activation] = activation.begin(prompt)
            except UsageError as error:
                raise UsageError(f"adapter {name!r}: {error}") from None
        begin = known[activation]
        found[name] = NEVER if begin is None else begin
    return found
