"""`Prefixes`: sums of adapter responses and of hidden vectors over prefixes of prompts, so that a prompt whose prefix
is in vLLM's cache can be scored without computing the prefix again.

The model does not compute the tokens of a cached prefix, so their responses have to come from the prompt that was first
computed with them. A prefix is identified by the digest of its tokens rather than by its cache blocks: the same tokens
under the base model have the same hidden vectors in every prompt, and nothing has to be undone when vLLM reuses a
block.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class _Entry:
    """The prefixes of one prompt that became known together.

    Attributes:
        keys: of the prefixes.
        sums: per point: (prefixes, n).
    """

    keys: tuple[bytes, ...]
    sums: tuple[Tensor, ...]

    @property
    def size(self) -> int:
        return sum(part.nbytes for part in self.sums)


def block_of(cache: Any) -> int:
    """Number of tokens of a block of vLLM's cache; 0 if it is not known yet.

    Args:
        cache: vLLM's `CacheConfig`.
    """
    return int(getattr(cache, "hash_block_size", None) or cache.block_size or 0)


def digests(tokens: Sequence[int], block: int, of: str) -> tuple[bytes, ...]:
    """The keys of all prefixes of a prompt that are whole blocks, the shortest first.

    Args:
        tokens: of the prompt.
        block: tokens of a block.
        of: what is summed; sums of another kind have other keys.
    """
    whole = np.asarray(tokens, dtype=np.int64)[: len(tokens) // block * block]
    digest = hashlib.blake2b(of.encode(), digest_size=16)
    found = []
    for row in whole.reshape(-1, block):
        digest.update(row.tobytes())
        found.append(digest.digest())
    return tuple(found)


class Prefixes:
    """Sums over prefixes of prompts. If they exceed the budget, the least recently used ones are dropped.

    Args:
        budget: bytes for all of them together.
    """

    def __init__(self, budget: int) -> None:
        self._budget, self._size = budget, 0
        self._places: dict[bytes, tuple[_Entry, int]] = {}
        self._entries: OrderedDict[int, _Entry] = OrderedDict()  # by identity, the latest last

    def get(self, key: bytes) -> list[Tensor] | None:
        """Per point: the sum over a prefix (n,); None where it is not known."""
        if key not in self._places:
            return None
        entry, row = self._places[key]
        self._entries.move_to_end(id(entry))
        return [part[row] for part in entry.sums]

    def put(self, keys: Sequence[bytes], sums: Sequence[Tensor]) -> None:
        """Stores prefixes that are not stored yet.

        Args:
            keys: of prefixes.
            sums: per point: (prefixes, n).
        """
        new = [row for row, key in enumerate(keys) if key not in self._places]
        if not new:
            return
        entry = _Entry(tuple(keys[row] for row in new), tuple(part[new] for part in sums))
        self._places.update((key, (entry, row)) for row, key in enumerate(entry.keys))
        self._entries[id(entry)] = entry
        self._size += entry.size
        while self._size > self._budget:
            _, old = self._entries.popitem(last=False)
            self._size -= old.size
            for key in old.keys:
                del self._places[key]

    def clear(self) -> None:
        """Forgets all of them."""
        self._places.clear()
        self._entries.clear()
        self._size = 0
