"""`Shadow`: what LoGo would select where requests name the adapters, beside their answers and without slowing these.

    a request that names its adapters -> its prompt waits -> (no answer is generated) -> selected -> a line of JSON

While answers are generated, the shadow reads at most `SHARE` of the tokens that their prompts have; what waits then is
selected for when it is quiet. What finds no room to wait is counted, and has no line.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from contextvars import Context
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from logo.api.logs import LOGGED_TOKENS
from logo.core import Prompt, Selection
from logo.errors import StorageError

# The most tokens that the shadow reads under load, as a share of those of the prompts that are answered.
SHARE = 0.02
_MOST_WAITING = 256  # prompts
_PROBED = 64  # tokens of a prompt that a selection reads, at most
_SAID = 3  # adapters of a line, the best first
_AGAIN = 0.05  # seconds until a waiting shadow looks again whether it is quiet
_log = logging.getLogger("logo.shadow")

Outcome = Literal["selected", "dropped", "failed"]
Selects = Callable[[Prompt], Awaitable[Selection]]


@dataclass(frozen=True)
class _Named:
    """A prompt and the mixture that its request has named, at a moment."""

    prompt: Prompt
    mixture: Mapping[str, float]
    select: Selects
    when: datetime


class Shadow:
    """Writes a line per prompt to a file.

    Args:
        file: it is appended to; StorageError: it cannot be written.
        is_busy: whether answers are being generated or wait.
        text_of: what a line shows of a prompt; None: nothing.
        count: is told what has become of each prompt.
    """

    def __init__(
        self,
        file: Path,
        is_busy: Callable[[], bool],
        text_of: Callable[[Prompt], str] | None,
        count: Callable[[Outcome], None],
    ) -> None:
        try:
            _end_line(file)
        except OSError as error:
            raise StorageError(f"--shadow {file}: cannot be written ({error.strerror}); name another file") from error
        self._file = file
        self._is_busy = is_busy
        self._text_of = text_of
        self._count = count
        self._waiting: deque[_Named] = deque()
        self._tokens = 0.0  # that may be read while answers are generated
        self._task: asyncio.Task[None] | None = None

    def offer(self, prompts: Sequence[Prompt], mixture: Mapping[str, float], select: Selects) -> None:
        """Takes the prompts of a request that has named this mixture of adapters; returns at once."""
        for prompt in prompts:
            self._tokens = min(self._tokens + SHARE * len(prompt), 10 * _PROBED)
            if len(self._waiting) >= _MOST_WAITING:
                self._count("dropped")
            else:
                self._waiting.append(_Named(prompt, mixture, select, datetime.now(timezone.utc)))
        if self._task is None or self._task.done():
            # In a context of its own, so that lines of the log do not have the identity of this request.
            self._task = Context().run(asyncio.create_task, self._work())

    async def close(self) -> None:
        """Ends; what waits is dropped, which is counted and said."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        for _ in self._waiting:
            self._count("dropped")
        if self._waiting:
            _log.warning("%d prompts have no line in %s, since the server ends", len(self._waiting), self._file)
        self._waiting.clear()

    async def _work(self) -> None:
        """Selects for what waits, as long as something does."""
        while self._waiting:
            needed = min(_PROBED, len(self._waiting[0].prompt.probed))
            busy = self._is_busy()
            if busy and self._tokens < needed:
                await asyncio.sleep(_AGAIN)
                continue
            if busy:
                self._tokens -= needed
            named = self._waiting.popleft()
            try:
                selection = await named.select(named.prompt)
                await asyncio.to_thread(self._write, self._line(named, selection))
            except Exception as error:  # nobody waits for it, and the next prompt may be selected for
                _log.warning("a prompt has no line in %s: %s", self._file, error, exc_info=error)
                self._count("failed")
            else:
                self._count("selected")

    def _line(self, named: _Named, selection: Selection) -> dict[str, Any]:
        """What is written of a prompt; `adapter` is the one that its request has named alone, or null."""
        alone = [name for name, weight in named.mixture.items() if weight == 1 and len(named.mixture) == 1]
        probabilities = selection.probabilities
        # Adapters that cannot act on the prompt come last, whatever their scores are.
        ranked = sorted(selection.scores, key=lambda name: (name in selection.silent, -selection.scores[name]))
        line: dict[str, Any] = {
            "time": named.when.isoformat(timespec="milliseconds"),
            "adapter": alone[0] if alone else None,
            "named": dict(named.mixture),
            "first": [
                {
                    "adapter": name,
                    "score": round(selection.scores[name], 4),
                    "probability": round(probabilities[name], 4),
                }
                for name in ranked[:_SAID]
            ],
            "confidence": selection.confidence,
        }
        if self._text_of is not None:
            line["prompt"] = self._text_of(named.prompt)
            line["cut"] = len(named.prompt.probed) > LOGGED_TOKENS
        return line

    def _write(self, line: Mapping[str, Any]) -> None:
        """Appends a line, which is whole or not there: half of one would make the next one unreadable as well."""
        written = (json.dumps(line, ensure_ascii=False) + "\n").encode()
        with self._file.open("ab", buffering=0) as file:
            size = file.tell() if file.seekable() else None
            try:
                if file.write(written) != len(written):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                if size is not None:
                    file.truncate(size)
                raise


def _end_line(file: Path) -> None:
    """Ends the last line of a file, which a machine that was switched off may have left without its end."""
    with file.open("ab") as appended:
        if not appended.seekable() or not appended.tell():
            return
        with file.open("rb") as read:
            read.seek(-1, os.SEEK_END)
            if read.read() != b"\n":
                appended.write(b"\n")
