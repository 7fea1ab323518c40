"""The same requests without a server: `LoGo.generate` one by one, and whether a server's answers are the same."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from logo.bench.wire import Answer, Ask

if TYPE_CHECKING:
    from logo.engine import LoGo


@dataclass(frozen=True)
class Difference:
    """An answer that is not what `LoGo.generate` gives.

    Attributes:
        arm: whose answer it is.
        ask: which of the asks.
        prompt: its text.
        position: the first token that differs.
        found, expected: the tokens from there on.
        adapters, expected_adapters: that gave the one and the other.
    """

    arm: str
    ask: int
    prompt: str
    position: int
    found: tuple[int, ...]
    expected: tuple[int, ...]
    adapters: tuple[str, ...]
    expected_adapters: tuple[str, ...]

    def __str__(self) -> str:
        mixed = ", ".join(self.adapters) or "no adapter"
        other = ", ".join(self.expected_adapters) or "no adapter"
        by = mixed if mixed == other else f"{mixed} instead of {other}"
        return (
            f"{self.arm}, request {self.ask} ({self.prompt[:60]!r}, {by}): from token {self.position} on "
            f"{list(self.found[:8])} instead of {list(self.expected[:8])}"
        )


def one_by_one(
    engine: LoGo,
    asks: Sequence[Ask],
    numbers: Iterable[int],
    *,
    base_only: bool = False,
    seconds: float | None = None,
    on_answer: Callable[[], None] = lambda: None,
) -> list[Answer]:
    """`LoGo.generate` of these asks, one prompt at a time.

    Args:
        numbers: which of the asks.
        base_only: with no adapter instead of the selected ones.
        seconds: begin none later than this.
        on_answer: called after each.

    Returns:
        Answers whose `seconds` are those of the call.
    """
    answers: list[Answer] = []
    started = time.perf_counter()
    for number in numbers:
        if seconds is not None and time.perf_counter() - started >= seconds:
            break
        ask = asks[number]
        before = time.perf_counter()
        made = engine.generate(
            ask.prompt, adapters={} if base_only else None, max_new_tokens=ask.max_tokens, batch_size=1
        )
        spent = time.perf_counter() - before
        [prompt] = engine.prompts.encode([ask.prompt], room=ask.max_tokens)
        answers.append(
            Answer(
                number,
                "ok",
                spent,
                token_ids=made.token_ids,
                output_tokens=len(made.token_ids),
                prompt_tokens=len(prompt),
                adapters=made.selection.adapters,
            )
        )
        on_answer()
    return answers


def differences(
    arm: str, asks: Sequence[Ask], answers: Iterable[Answer], expected: Mapping[int, Answer]
) -> list[Difference]:
    """Whole answers whose tokens are not those expected for their ask."""
    found = []
    for answer in answers:
        wanted = expected[answer.ask]
        got, right = answer.token_ids or (), wanted.token_ids or ()
        if answer.token_ids is not None and got == right:
            continue
        position = next(
            (i for i, (a, b) in enumerate(zip(got, right, strict=False)) if a != b), min(len(got), len(right))
        )
        found.append(
            Difference(
                arm,
                answer.ask,
                asks[answer.ask].prompt,
                position,
                got[position:],
                right[position:],
                answer.adapters,
                wanted.adapters,
            )
        )
    return found
