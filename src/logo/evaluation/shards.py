"""Shards: the division of one dataset among several processes.

Rows stay together in blocks of one batch, and shard i of n gets every n-th block from the i-th on. Every batch of a
shard is therefore a batch of the whole run, and its numbers are bit-equal. With batches of one, shard i gets rows i, i
+ n, i + 2 n, ...
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from logo.errors import UsageError


@dataclass(frozen=True)
class Shard:
    """Part `index`, from 1, of `count`."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """`2/4` as a shard.

        Raises:
            UsageError: the text is not a shard.
        """
        match = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise UsageError(f"shard {text!r}: expected i/n with i from 1 to n, such as 1/4")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


def positions(rows: int, block: int, shard: Shard | None = None) -> tuple[int, ...]:
    """The indices of a shard's rows among this many rows, in order; all without a shard. There may be none if there are
    few blocks.
    """
    if shard is None:
        return tuple(range(rows))
    return tuple(row for row in range(rows) if row // block % shard.count == shard.index - 1)


def shard_folder(folder: Path, shard: Shard) -> Path:
    """The folder of a shard's result, beside the whole one."""
    return folder.with_name(f"{folder.name}{_ending(shard)}")


def whole_folder(folder: Path, shard: Shard) -> Path:
    """The folder of the whole result, beside this shard's."""
    return folder.with_name(folder.name.removesuffix(_ending(shard)))


def _ending(shard: Shard) -> str:
    return f".shard-{shard.index}-of-{shard.count}"
