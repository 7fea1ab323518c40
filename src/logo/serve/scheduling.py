"""`Schedule`: which prompts are read next, when running answers continue, and who waits for the memory of adapters.

It only decides, from lengths and counts; `batching.py` reads and generates, `service.py` holds adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar


class Progress(Protocol):
    """What is known of a prompt that waits to be read, or of an answer that is being generated."""

    @property
    def unread(self) -> int:
        """Tokens of the prompt that are not read yet."""

    @property
    def most(self) -> int:
        """The most tokens of prompt and answer."""

    @property
    def apart(self) -> bool:
        """Whether the prompt cannot be read beside others, since a part of it is read already."""

    @property
    def answering(self) -> bool:
        """Whether its answer has begun, so that somebody waits for the next token."""


W = TypeVar("W", bound=Progress)


@dataclass(frozen=True)
class Schedule:
    """The policy of a server.

    - Prompts are read in the order in which they come: nobody passes the first one, which begins as soon as there is
      room for as many tokens as it may become.
    - At most `step_tokens` are read between two tokens of an answer that has begun. While none has, as in a burst that
      finds the server idle, reading goes on as long as more wait than run: the first tokens of all come sooner.
    - A request that waits for the memory of adapters is passed by `most_passes` others that need adapters, too; then
      these wait behind it. The base model alone needs none, and never waits.

    Attributes:
        rows: the most answers that are generated together.
        kv_tokens: the most tokens whose keys and values have room, padding included.
        step_tokens: the most tokens of prompts that are read between two steps of the running answers.
        most_passes: how many requests may pass one that waits for the memory of adapters.
    """

    rows: int
    kv_tokens: int
    step_tokens: int = 512
    most_passes: int = 32

    def room_to_read(self, read: int, waiting: Sequence[Progress], running: Sequence[Progress]) -> int:
        """How many more tokens of prompts may be read before the running answers continue, if `read` were read since
        they had their last token; 0: they continue now."""
        if read < self.step_tokens:
            return self.step_tokens - read
        stalls = any(answer.answering for answer in running)
        return 0 if stalls or len(waiting) <= len(running) else self.step_tokens

    def next_prompts(self, room: int, waiting: Sequence[W], running: Sequence[Progress]) -> list[W]:
        """The prompts that are read next: the first of those that wait, and if it is short, others beside it, up to
        `room` tokens with padding; none: there is no room for the first beside the running answers.

        A prompt that is longer than `room` is the only one, and that many tokens of it are read.
        """
        prompts: list[W] = []
        longest_answer = max((answer.most for answer in running), default=0)
        widest = 0
        for prompt in waiting:
            rows = len(running) + len(prompts) + 1
            longest_with_it = max(longest_answer, prompt.most)
            if rows > self.rows or rows * longest_with_it > self.kv_tokens:
                break
            widest_with_it = max(widest, prompt.unread)
            is_alone = prompt.apart or prompt.unread > room
            if prompts and (is_alone or (len(prompts) + 1) * widest_with_it > room):
                continue  # a later one may be short enough
            prompts.append(prompt)
            longest_answer = longest_with_it
            widest = widest_with_it
            if is_alone:
                break
        return prompts

    def waits_for_memory(self, needs_adapters: bool, someone_waits: bool, passes: int) -> bool:
        """Whether a request waits behind the one that waits for the memory of adapters, which `passes` have passed."""
        return needs_adapters and someone_waits and passes >= self.most_passes
