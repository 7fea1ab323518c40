"""`BatchedCache`: the keys and values of sequences that are decoded together, which join and leave at any step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

_MORE = 32  # columns that are made when there is none left
_SPARE = 16  # the most rows that are made beside those in use, so that not every new one copies all


class _Layer(DynamicLayer):  # type: ignore[misc]
    """What a step of some rows sees of one layer. The cache alone knows how many columns there are."""

    def __init__(self, cache: BatchedCache, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys = keys
        self.values = values
        self.is_initialized = True
        self.dtype = keys.dtype
        self.device = keys.device
        self._cache = cache

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Writes the new column; all columns up to it, (rows, heads, columns + 1, size)."""
        column = self._cache.columns
        self.keys[:, :, column : column + 1] = key_states
        self.values[:, :, column : column + 1] = value_states
        return self.keys[:, :, : column + 1], self.values[:, :, : column + 1]

    def get_seq_length(self, *_: Any) -> int:
        """The columns before the step."""
        return self._cache.columns


class BatchedCache:
    """One tensor per layer, (rows, heads, columns, size), of the shapes of `cache`. Every row ends in the same column:
    a step of all of them is a plain batch that is padded on the left. The tensors are copied only when they have to
    grow, or too many columns in front are padding; where memory is short, the rows stay as they were. What is made
    beyond the rows and columns in use stays within `most` tokens."""

    def __init__(self, cache: DynamicCache, most: int) -> None:
        self._most = most
        self.columns = 0  # that are filled, padding included; whoever has computed a step adds one
        self._starts: list[int] = []  # the first column of each row that is no padding
        self._layers = [_empty(layer.keys, layer.values) for layer in cache.layers]
        self._seen: dict[tuple[int, int], Cache] = {}

    def join(self, cache: DynamicCache, lengths: Sequence[int], places: Sequence[int]) -> None:
        """Puts the rows of a batch that is padded on the left, of so many tokens each, in the places of rows that are
        not needed any more, or behind the last one."""
        count = max(len(self._starts), *(place + 1 for place in places))
        longest = max(lengths)
        if longest > self.columns or count > len(self._layers[0][0]):
            self._lay_out(count, longest, places)
        for row, (place, length) in enumerate(zip(places, lengths, strict=True)):
            start = self.columns - length
            for number, own_pair in enumerate(self._layers):
                for own in own_pair:
                    own[place, :, :start] = 0  # what is masked must be finite
                if length:  # else the batch may have no layers
                    layer = cache.layers[number]
                    for own, new in zip(own_pair, (layer.keys, layer.values), strict=True):
                        own[place, :, start : self.columns] = new[row, :, new.shape[2] - length :]
        self._starts += [0] * (count - len(self._starts))
        for place, length in zip(places, lengths, strict=True):
            self._starts[place] = self.columns - length

    def drop(self, row: int) -> None:
        """Removes a row; the last one takes its place."""
        last = len(self._starts) - 1
        if row != last:
            for own in (tensor for pair in self._layers for tensor in pair):
                own[row, :, : self.columns] = own[last, :, : self.columns]
            self._starts[row] = self._starts[last]
        self._starts.pop()
        if not self._starts:
            self.columns = 0
            self._layers = [_empty(keys, values) for keys, values in self._layers]
            self._seen.clear()

    def make_room(self) -> None:
        """Makes room for one more column; half of the columns may be padding in all rows, and then they are dropped."""
        if self.columns == self._layers[0][0].shape[2] or min(self._starts) > max(_MORE, self.columns // 2):
            self._lay_out(len(self._starts))

    def _lay_out(self, count: int, length: int = 0, new: Sequence[int] = ()) -> None:
        """Copies all rows but `new` ones into tensors for so many, without padding in front of the longest row."""
        old_starts = {row: start for row, start in enumerate(self._starts) if row not in new}
        columns = max([length, *(self.columns - start for start in old_starts.values())])
        shift = columns - self.columns
        width = columns + max(1, min(_MORE, self._most // count - columns))
        spare_rows = max(0, min(count, _SPARE, self._most // width - count))

        def laid_out(old: Tensor) -> Tensor:
            tensor = old.new_zeros(count + spare_rows, old.shape[1], width, old.shape[3])
            for row, start in old_starts.items():
                tensor[row, :, start + shift : columns] = old[row, :, start : self.columns]
            return tensor

        # All of them before any takes its place: where memory is short, the rows stay as they were.
        self._layers = [(laid_out(keys), laid_out(values)) for keys, values in self._layers]
        self.columns = columns
        self._starts = [start + shift for start in self._starts]
        self._seen.clear()

    def seen(self, begin: int, end: int) -> tuple[Tensor, Tensor, Cache]:
        """For a step of these rows: the mask (rows, columns + 1) and positions (rows, 1), on the device of the first
        layer, and the cache."""
        if (begin, end) not in self._seen:
            layers = [_Layer(self, keys[begin:end], values[begin:end]) for keys, values in self._layers]
            self._seen = {(begin, end): Cache(layers=layers)}
        device = self._layers[0][0].device  # where the mask is made: a copy of it in every step would be large
        starts = torch.tensor(self._starts[begin:end], device=device)[:, None]
        mask = (torch.arange(self.columns + 1, device=device) >= starts).long()
        return mask, self.columns - starts, self._seen[begin, end]


def _empty(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Tensors of these shapes without rows and columns."""
    return keys[:0, :, :0].clone(), values[:0, :, :0].clone()
