"""Prompt prefixes that were probed before: keys and values of every layer, and the summed responses of the adapters.

Prefixes are cached in blocks of tokens, each under a digest of all tokens up to its end, so that prompts share the
blocks of their common beginning. The least recently used blocks are dropped when the budget is exceeded.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache, cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from logo.selection.probe import cache_argument

# Tokens of a block: prefixes are reused in whole blocks.
BLOCK = 64

KeyValues = list[tuple[Tensor, Tensor]]

# The layers of a cache that hold nothing but keys and values, or nothing: those of an earlier layer are used again.
_PLAIN = (DynamicLayer, DynamicSlidingWindowLayer, getattr(cache_utils, "DummyLayer", DynamicLayer))


@dataclass(frozen=True)
class Block:
    """One block of one prefix.

    Attributes:
        keys_values: per layer that was run, (1, heads, BLOCK, size) each.
        sums: per reading of a point, the summed responses to the block's tokens that are read, (adapters,), and per
            description of a place, their summed hidden vectors, (d,) (`ResponseReader._late`); empty where
            responses are not summed over tokens.
        tokens: how many tokens of the block are read.
    """

    keys_values: KeyValues
    sums: list[Tensor]
    tokens: int

    @property
    def bytes(self) -> int:
        """Memory it takes."""
        tensors = [*self.sums, *(tensor for pair in self.keys_values for tensor in pair)]
        return sum(tensor.nbytes for tensor in tensors)


class Prefixes:
    """Blocks of prefixes within a byte budget.

    Args:
        budget: bytes to keep.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.bytes = 0
        self._blocks: OrderedDict[bytes, Block] = OrderedDict()

    def common(self, rows: Sequence[Sequence[int]]) -> int:
        """How many whole blocks all rows begin with, so that every row has a token after them."""
        shortest = min(rows, key=len)
        shared = 0
        while shared < len(shortest) - 1 and all(row[shared] == shortest[shared] for row in rows):
            shared += 1
        return shared // BLOCK

    def find(self, row: Sequence[int], most: int, reading: str = "") -> list[Block]:
        """The cached blocks among the first `most` blocks of a row, of the same reading."""
        found = []
        keys = self._keys(row, most, reading)
        for key in keys:
            if key not in self._blocks:
                break
            found.append(self._blocks[key])
        self._use(keys[: len(found)])
        return found

    def keep(
        self,
        rows: Sequence[Sequence[int]],
        first: int,
        size: int,
        make: Callable[[int, int], Block],
        reading: str = "",
    ) -> None:
        """Caches the whole blocks of rows from number `first` on; if not all fit, the first ones of the last rows.

        Args:
            rows: token ids.
            size: bytes of a block.
            make: makes the block of a row and a number; called for blocks that are not cached yet.
            reading: names the signal whose responses the blocks hold.
        """
        places: dict[bytes, tuple[int, int]] = {}
        for r in reversed(range(len(rows))):
            for number, key in enumerate(self._keys(rows[r], len(rows[r]) // BLOCK, reading)):
                places.setdefault(key, (r, number))
        wanted = list(places)[: self.budget // size]
        self._use(wanted)
        new = [key for key in wanted if key not in self._blocks and places[key][1] >= first]
        while self.bytes + size * len(new) > self.budget:
            self.bytes -= self._blocks.popitem(last=False)[1].bytes
        for key in new:
            self._blocks[key] = block = make(*places[key])
            self.bytes += block.bytes
        self._use(wanted)

    def _use(self, keys: Sequence[bytes]) -> None:
        """Marks blocks as used; the first of them was used last, since most prompts share it."""
        for key in reversed(keys):
            if key in self._blocks:
                self._blocks.move_to_end(key)

    @staticmethod
    def _keys(row: Sequence[int], count: int, reading: str) -> list[bytes]:
        digest = hashlib.blake2b(reading.encode(), digest_size=16)
        keys = []
        for block in range(count):
            digest.update(torch.tensor(row[block * BLOCK : (block + 1) * BLOCK]).numpy().tobytes())
            keys.append(digest.digest())
        return keys


def reusable(model: nn.Module) -> bool:
    """Whether a model keeps nothing but keys and values of earlier tokens, in a plain cache.

    Recurrent models also carry a state, and not all of them say so.
    """
    if cache_argument(model) is None or getattr(model, "_is_stateful", False):
        return False
    if not model._supports_default_dynamic_cache():  # type: ignore[operator]  # it has a cache class of its own
        return False
    return all(type(layer) in _PLAIN for layer in DynamicCache(config=model.config).layers)


def cache_of(blocks: Sequence[Block], rows: int) -> DynamicCache:
    """The key-value cache of these blocks, for a batch of rows that all begin with them."""
    cache = DynamicCache()
    for layer, pairs in enumerate(zip(*(block.keys_values for block in blocks), strict=True)):
        keys, values = (torch.cat(part, dim=2).expand(rows, -1, -1, -1) for part in zip(*pairs, strict=True))
        cache.update(keys, values, layer)
    return cache


def cut(cache: DynamicCache, row: int, block: int) -> KeyValues:
    """Keys and values of one block of one row of a cache; copies."""
    part = slice(block * BLOCK, (block + 1) * BLOCK)
    return [
        (layer.keys[row : row + 1, :, part].clone(), layer.values[row : row + 1, :, part].clone())
        for layer in cache.layers
    ]


def block_bytes(cache: DynamicCache, sums: Sequence[Tensor]) -> int:
    """Memory of one block of a cache, with sums (rows, blocks, adapters) of each point."""
    parts = [part[:1, :, :BLOCK] for layer in cache.layers for part in (layer.keys, layer.values)]
    return sum(part.nbytes for part in (*parts, *(part[0, 0] for part in sums)))
