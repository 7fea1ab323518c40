"""The contents of `logo demo`: prompts answered by the base model and by LoGo, and exact match per task.

Everything is measured on held-out rows when it is called; nothing is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from logo.demo import heldout, showcase
from logo.evaluation.metrics import answer_in, em

if TYPE_CHECKING:
    from logo.core import Selection
    from logo.engine import LoGo

MAX_NEW_TOKENS = 16  # as answers have 11 at most
BATCH_SIZE = 32
SIGNALS = ("norm", "calibrated")  # the official one and ours, side by side


@dataclass(frozen=True)
class Answer:
    """One prompt of the side-by-side view."""

    task: str
    prompt: str
    gold: str
    base: str
    logo: str
    selection: Selection


@dataclass(frozen=True)
class TaskScore:
    """Exact match of each method on one task's held-out rows."""

    task: str
    rows: int
    exact_match: Mapping[str, float]  # base, uniform, each signal, target -> 0..1


def answers(logo: LoGo) -> list[Answer]:
    """The showcase prompts, answered by the base model alone and by what LoGo selects."""
    rows = showcase()
    prompts = [row["context"] for row in rows]
    base = _generate(logo, prompts, [{}] * len(prompts))
    selections = logo.select(prompts, batch_size=BATCH_SIZE)
    mixed = _generate(logo, prompts, selections)
    return [
        Answer(row["task"], row["context"], row["completion"], plain, answer, selection)
        for row, plain, answer, selection in zip(rows, base, mixed, selections, strict=True)
    ]


def side_by_side(logo: LoGo) -> dict[str, LoGo]:
    """Signal -> an engine that selects by it, for the engine's own signal and those that are always shown."""
    engines = {}
    for signal in dict.fromkeys([*SIGNALS, logo.settings.signal]):
        if signal == logo.settings.signal:
            engines[signal] = logo
        else:
            settings = replace(logo.settings, signal=signal)
            engines[signal] = type(logo)(logo.model, logo.tokenizer, logo.pool, settings=settings)
    return engines


def scores(logo: LoGo, rows_per_task: int | None = None, on_task: Callable[[str], None] = print) -> Iterator[TaskScore]:
    """Exact match per task for: no adapter, the uniform mixture, each signal's selection, the task's own adapter."""
    uniform = dict.fromkeys(logo.names, 1 / len(logo.names))
    engines = side_by_side(logo)
    for task, rows in heldout().items():
        on_task(task)
        rows = rows[:rows_per_task]
        prompts = [row["context"] for row in rows]
        mixtures: dict[str, Sequence[Mapping[str, float] | Selection]] = {
            "base": [{}] * len(rows),
            "uniform": [uniform] * len(rows),
            **{name: engine.select(prompts, batch_size=BATCH_SIZE) for name, engine in engines.items()},
            "target": [{task: 1.0}] * len(rows),
        }
        golds = [row["completion"] for row in rows]
        matches = {
            method: sum(map(em, _generate(logo, prompts, mixture), golds)) / len(rows)
            for method, mixture in mixtures.items()
        }
        yield TaskScore(task, len(rows), matches)


def average(scores: Sequence[TaskScore]) -> dict[str, float]:
    """Mean over tasks of each method's exact match."""
    methods = scores[0].exact_match
    return {method: sum(score.exact_match[method] for score in scores) / len(scores) for method in methods}


def _generate(logo: LoGo, prompts: Sequence[str], mixtures: Sequence[Mapping[str, float] | Selection]) -> list[str]:
    generations = logo.generate(
        prompts, adapters=mixtures, max_new_tokens=MAX_NEW_TOKENS, batch_size=BATCH_SIZE, stop_at_newline=True
    )
    return [answer_in(generation.text) for generation in generations]
