"""Keys and values of rows that join and leave: what fails harms no other row, and memory is given back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from logo.serve.batched_cache import BatchedCache


def read(*lengths: int) -> DynamicCache:
    """A batch of prompts, padded on the left, whose keys and values are their lengths."""
    rows = torch.zeros(len(lengths), 1, max(lengths), 2)
    for row, length in zip(rows, lengths, strict=True):
        row[:, row.shape[1] - length :] = length
    cache = DynamicCache()
    cache.update(rows, rows.clone(), 0)
    return cache


def seen(cache: BatchedCache, rows: int) -> list[tuple[int, list[float]]]:
    """The position of each row's next token, and what the row holds."""
    mask, positions, layers = cache.seen(0, rows)
    keys = layers.layers[0].keys[:, 0, : cache.columns, 0]
    return [(int(at), row[keep.bool()].tolist()) for at, row, keep in zip(positions, keys, mask[:, :-1], strict=True)]


def test_a_row_for_which_there_is_no_memory_leaves_the_others_in_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = BatchedCache(read(1))
    cache.join(read(4, 3), [4, 3], [0, 1])
    before = seen(cache, 2)
    assert before == [(4, [4.0] * 4), (3, [3.0] * 3)]

    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "new_zeros", full)
        with pytest.raises(torch.OutOfMemoryError):
            cache.join(read(40), [40], [2])
    assert seen(cache, 2) == before
    cache.join(read(40), [40], [2])
    cache.drop(0)  # the last one takes its place
    assert seen(cache, 2) == [(40, [40.0] * 40), before[1]]


def test_rows_that_have_left_take_no_memory_once_others_grow() -> None:
    cache = BatchedCache(read(1))
    cache.join(read(*[4] * 64), [4] * 64, range(64))
    for row in reversed(range(1, 64)):
        cache.drop(row)
    for _ in range(500):
        cache.make_room()
        cache.columns += 1
    _, _, layers = cache.seen(0, 1)
    held = layers.layers[0].keys.untyped_storage().nbytes()
    assert held <= 2 * (504 + 32) * 2 * 4  # two rows: one may come without a copy of all
