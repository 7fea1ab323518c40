"""The requests of a load: prompts of many tasks and lengths, answer lengths, streams, and clients that disconnect.

The same seed gives the same requests.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from logo.bench.wire import Ask
from logo.errors import DataError, StorageError
from logo.rows import text_lines

_FIELDS = ("prompt", "context")


def read_asked(file: Path) -> list[str]:
    """The prompts of a file, one per line, as text or as a JSON object with `prompt` (or `context`).

    Raises:
        DataError: a line is neither, or there is no prompt.
        StorageError: the file cannot be read.
    """
    try:
        lines = text_lines(file)
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"--prompts {file}: cannot be read: {error}") from error
    prompts = [_prompt(line, f"{file}:{i}") for i, line in enumerate(lines, start=1) if line.strip()]
    if not prompts:
        raise DataError(f"--prompts {file}: expected one prompt per line, found none")
    return prompts


def _prompt(line: str, place: str) -> str:
    if not line.lstrip().startswith("{"):
        return line
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{place}: begins with '{{' but is not valid JSON: {error}") from None
    found = next((row[name] for name in _FIELDS if isinstance(row.get(name), str) and row[name].strip()), None)
    if found is None:
        raise DataError(f"{place}: expected some text as 'prompt' or 'context', found the fields {sorted(row)}")
    return str(found)


def mixed_prompts(seed: int) -> list[str]:
    """Requests of many kinds for any model; most have a preamble of one to a dozen sentences."""
    from logo.selection.texts import NEUTRAL, REQUESTS

    chance = random.Random(seed)
    before = [chance.sample(NEUTRAL, chance.choice((0, 1, 2, 4, 12))) for _ in REQUESTS]
    return ["\n\n".join([*told, request]) for told, request in zip(before, REQUESTS, strict=True)]


def make_asks(
    prompts: Sequence[str],
    count: int,
    *,
    max_tokens: tuple[int, int],
    stream_share: float,
    hang_up_share: float,
    seed: int,
) -> list[Ask]:
    """This many requests: the prompts in random order, repeated if there are fewer.

    Args:
        max_tokens: range of the longest answer, drawn uniformly.
        stream_share: share of the requests (rounded to a number) that are streamed.
        hang_up_share: share of the requests (rounded) at which the client disconnects: half of them at the first token
            (or at once without streaming), the others later.
    """
    chance = random.Random(seed)
    order: list[str] = []
    while len(order) < count:
        order += chance.sample(prompts, len(prompts))
    streamed = set(chance.sample(range(count), round(stream_share * count)))
    left = set(chance.sample(range(count), round(hang_up_share * count)))
    asks = []
    for i, prompt in enumerate(order[:count]):
        length, late, when = chance.randint(*max_tokens), chance.random() < 0.5, chance.random()
        asks.append(Ask(prompt, length, i in streamed, (when if late else 0.0) if i in left else None))
    return asks
