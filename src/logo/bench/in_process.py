"""The same requests without a server: `LoGo.generate` one by one, and the comparison with a server's answers."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from logo.bench.wire import Answer, Ask

if TYPE_CHECKING:
    from logo.bench.watch import Churn
    from logo.engine import LoGo

Begin = Callable[[str, "int | None"], Callable[[], None]]
"""Called with the name of a step and its length (None: unknown); returns a function to call after each unit."""


@dataclass(frozen=True)
class Difference:
    """An answer that differs from that of `LoGo.generate`.

    Attributes:
        arm: the arm of the answer.
        ask: number of the request.
        prompt: its text.
        position: the first token that differs.
        found, expected: the tokens from there on.
        adapters, expected_adapters: the adapters of both answers.
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
    """`LoGo.generate` for these requests, one prompt at a time.

    Args:
        numbers: which of the requests.
        base_only: use no adapter instead of the selected ones.
        seconds: start no request later than this.
        on_answer: called after each answer.

    Returns:
        Answers whose `seconds` are the duration of the call.
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


@dataclass(frozen=True)
class Compared:
    """The result of a comparison; `with_passing` counts answers in which the temporary adapter took part."""

    differences: list[Difference]
    with_passing: int


def compare(
    engine: LoGo,
    arm: str,
    asks: Sequence[Ask],
    answers: Sequence[Answer],
    known: Mapping[int, Answer],
    *,
    base_only: bool = False,
    churn: Churn | None = None,
    begin: Begin = lambda what, steps: lambda: None,
) -> Compared:
    """Compares a server's complete answers with `LoGo.generate`; answers with the temporary adapter are compared with
    it in the pool.

    Args:
        known: selections and answers of `LoGo.generate` without it.
        churn: the temporary adapter.
    """
    passing = None if churn is None else churn.name
    found: list[Difference] = []
    counts = {}
    for present in (False, True):
        part = [answer for answer in answers if (passing in answer.adapters) == present]
        expected = {} if present or base_only else dict(known)
        missing = sorted({answer.ask for answer in part} - set(expected))
        step = begin(f"comparing {arm}", len(missing)) if missing else lambda: None
        with _added(engine, churn if present and part else None):
            made = one_by_one(engine, asks, missing, base_only=base_only, on_answer=step)
        found += differences(arm, asks, part, expected | {answer.ask: answer for answer in made})
        counts[present] = len(part)
    return Compared(found, counts[True])


@contextlib.contextmanager
def _added(engine: LoGo, churn: Churn | None) -> Iterator[None]:
    """Within the block: the adapter is in the engine's pool, as it was in the server's."""
    if churn is None:
        yield
        return
    engine.pool.add(churn.folder, churn.name)
    try:
        yield
    finally:
        engine.pool.remove(churn.name)


def differences(
    arm: str, asks: Sequence[Ask], answers: Iterable[Answer], expected: Mapping[int, Answer]
) -> list[Difference]:
    """Complete answers whose tokens differ from the expected ones."""
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
