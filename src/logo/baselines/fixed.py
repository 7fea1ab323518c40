"""Methods that do not look at the prompt: bounds for every selection."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from logo.baselines.method import Method, Need, Prepared, Task, check_count, ranked, same_for_all, text_of
from logo.core import Selection
from logo.engine import LoGo
from logo.errors import DataError, UsageError, closest
from logo.prompts import Conversation


@dataclass(frozen=True, kw_only=True)
class OwnSelector(Method):
    """LoGo: the selection of the engine's own signal for each prompt."""

    name: ClassVar[str] = "logo"

    def prepare(self, logo: LoGo, task: Task) -> Prepared:
        if not task.among:
            return Prepared(None)
        return Prepared(lambda prompts, size: logo.select(list(prompts), batch_size=size, candidates=task.among))


@dataclass(frozen=True, kw_only=True)
class Base(Method):
    """The base model alone."""

    name: ClassVar[str] = "base"

    @property
    def picks(self) -> int:
        return 0

    def prepare(self, logo: LoGo, task: Task) -> Prepared:
        return Prepared(same_for_all({}))


@dataclass(frozen=True, kw_only=True)
class Uniform(Method):
    """The whole pool with equal weights."""

    name: ClassVar[str] = "uniform"

    def prepare(self, logo: LoGo, task: Task) -> Prepared:
        names = task.candidates(logo)
        return Prepared(same_for_all(dict.fromkeys(names, 1 / len(names))))


@dataclass(frozen=True, kw_only=True)
class Random(Method):
    """k adapters drawn for each prompt, with equal weights.

    The draw depends only on the seed and the prompt's text, not on earlier prompts.
    """

    name: ClassVar[str] = "random"

    k: int = 20

    def __post_init__(self) -> None:
        check_count("k", self.k)

    @property
    def picks(self) -> int:
        return self.k

    def prepare(self, logo: LoGo, task: Task) -> Prepared:
        names = task.candidates(logo)
        k = min(self.k, len(names))

        def draw(prompt: str) -> Selection:
            chosen = random.Random(f"{self.seed} {prompt}").sample(names, k)
            return ranked(dict.fromkeys(chosen, 1 / k))

        return Prepared(lambda prompts, batch_size: [draw(text_of(prompt)) for prompt in prompts])


@dataclass(frozen=True, kw_only=True)
class Oracle(Method):
    """The right adapter alone: the one that a row names, else the one that is named like the dataset."""

    name: ClassVar[str] = "oracle"
    needs: ClassVar[frozenset[Need]] = frozenset({"prompts"})

    @property
    def picks(self) -> int:
        return 1

    def prepare(self, logo: LoGo, task: Task) -> Prepared:
        names = task.candidates(logo)
        named = _named_by_rows(task, names)
        unnamed = len(set(task.prompts)) - len(named)
        whole = None if named and not unnamed else _called_like(task.name, names)
        if whole is None and (unnamed or not named):
            sub = task.name.partition(".")[2] or task.name
            called = " or ".join(repr(name) for name in dict.fromkeys((task.name, sub)))
            raise DataError(
                f"oracle: dataset {task.name!r}: {unnamed} prompts name no adapter, and the pool has none called "
                f"{called}{closest(sub, names)}; put an 'adapter' field into the rows"
            )

        def select(prompts: Sequence[str | Conversation], batch_size: int) -> list[Selection]:
            return [ranked({_found(named.get(text_of(prompt), whole), task): 1.0}) for prompt in prompts]

        return Prepared(select, {"adapter": whole} if whole else {})


def _named_by_rows(task: Task, names: Sequence[str]) -> dict[str, str]:
    """Prompt -> adapter, for the rows that name one."""
    named: dict[str, str] = {}
    for number, (prompt, adapter) in enumerate(zip(task.prompts, task.adapters, strict=False), start=1):
        if adapter is None:
            continue
        if adapter not in names:
            raise DataError(
                f"oracle: dataset {task.name!r}: row {number} names adapter {adapter!r}, which the pool does not have"
                f"{closest(adapter, names)}"
            )
        if named.setdefault(prompt, adapter) != adapter:
            raise DataError(
                f"oracle: dataset {task.name!r}: row {number} names adapter {adapter!r}, but an earlier row with the "
                f"same context names {named[prompt]!r}"
            )
    return named


def _called_like(dataset: str, names: Sequence[str]) -> str | None:
    """The adapter with the dataset's name, or the name of its sub-folder, whole or as the last part of a path."""
    for wanted in (dataset, dataset.partition(".")[2]):
        if wanted in names:
            return wanted
        ending = [name for name in names if wanted and name.endswith(f"/{wanted}")]
        if len(ending) == 1:
            return ending[0]
    return None


def _found(adapter: str | None, task: Task) -> str:
    if adapter is None:
        raise UsageError(f"oracle: this prompt is not one of dataset {task.name!r}, so no row names its adapter")
    return adapter
