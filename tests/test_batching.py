"""What the server's batching does at moments that a running server reaches by chance only."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from logo.protocol import Delta, GenerationTimeout, Sampling
from logo.serving.batching import Batching, _Job


def output(*tokens: int, finished: bool = False) -> Any:
    return SimpleNamespace(generated_tokens=list(tokens), error=None, is_finished=lambda: finished)


class Manager:
    """In place of transformers': it has all of its outputs ready as soon as it is asked."""

    def __init__(self, *outputs: Any) -> None:
        self.outputs = outputs
        self.output_router = SimpleNamespace(_lock=threading.Lock(), result_handlers={})
        self.cancelled: list[str] = []

    def register_result_handler(self, sequence: str, handle: Callable[[Any], None]) -> None:
        self.output_router.result_handlers[sequence] = handle

    def add_request(self, prompt: Any, sequence: str, *_: Any, **__: Any) -> str:
        for one in self.outputs:
            self.output_router.result_handlers[sequence](one)
        return sequence

    def cancel_request(self, sequence: str) -> None:
        self.cancelled.append(sequence)


def batching(manager: Any, **held: Any) -> Batching:
    made = Batching.__new__(Batching)
    made.__dict__.update(_manager=manager, _jobs={}, _numbers=iter(range(9)), _ends=[0], found=0, missed=0, **held)
    return made


def job(end: int = 0) -> _Job:
    return _Job([1] * 40, SimpleNamespace(end=end), SimpleNamespace())  # type: ignore[arg-type]


async def answered(made: Batching) -> list[Delta]:
    return [delta async for delta in made.generate([1], SimpleNamespace(end=0), Sampling(9))]  # type: ignore[arg-type]


def test_an_answer_that_is_complete_when_its_deadline_comes_is_returned() -> None:
    """The deadline is in the queue of outputs as None."""
    manager = Manager(output(5), output(5, 6, 0, finished=True), None)
    [delta] = asyncio.run(answered(batching(manager)))
    assert delta.tokens == (5, 6, 0) and delta.finish_reason == "stop" and not manager.cancelled


def test_one_that_is_not_complete_is_ended() -> None:
    manager = Manager(output(5), output(5, 6), None)
    with pytest.raises(GenerationTimeout):
        asyncio.run(answered(batching(manager)))
    assert manager.cancelled == ["0"]


def test_a_prompt_counts_once_in_the_cache_of_beginnings() -> None:
    """In the step with its first tokens, which is the last time that the cache can have helped it."""
    made = batching(None, _beginnings=object())
    made._jobs.update(cached=job(end=36), base=job())
    for _ in range(3):
        made._count([("cached", 8, False, 32), ("base", 40, False, 0), ("cancelled", 1, True, 0)])
    assert (made.found, made.missed) == (32, 4)
