"""`target`: the adapter that was made for a row, which only an oracle knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from logo.baselines.method import Prepared, Task, ranked, register_method, text_of
from logo.core import Selection
from logo.errors import DataError, closest

if TYPE_CHECKING:
    from logo.engine import LoGo


@dataclass(frozen=True)
class Targets:
    """The target adapters of a dataset's prompts: those that rows name, by the prompt's text, and the `usual` one of
    the others; None: it has none, and every row names its own."""

    named: Mapping[str, str]
    usual: str | None

    def of(self, prompt: str) -> str:
        """The target adapter of a prompt of the dataset."""
        return self.named.get(prompt) or str(self.usual)


def target_adapters(task: Task, names: Sequence[str]) -> Targets:
    """The target adapters of a dataset, among these adapters; nothing is computed.

    Raises:
        DataError: a row names an adapter that is not there, or another one than an equal row, or none is known.
    """
    named: dict[str, str] = {}
    for number, (prompt, adapter) in enumerate(zip(task.prompts, task.targets, strict=False), start=1):
        if adapter is None:
            continue
        where = f"target: dataset {task.name!r}: row {number} names adapter {adapter!r}"
        if adapter not in names:
            raise DataError(f"{where}, which the pool does not have{closest(adapter, names)}")
        if named.setdefault(prompt, adapter) != adapter:
            raise DataError(f"{where}, and an earlier row {named[prompt]!r}{closest(adapter, names)}")
    usual = called_like(task.name, names)
    if usual is None and not set(task.prompts) <= named.keys():
        raise DataError(
            f"target: dataset {task.name!r}: there are rows that name no adapter, and the pool has none called "
            f"{task.name!r}{closest(task.name, names)}; put an 'adapter' field into the rows"
        )
    return Targets(named, usual)


@register_method(needs="target", picks=1)
def target(logo: LoGo, task: Task) -> Prepared:
    """The adapter that a row names, else the one that is named like the dataset, alone; errors as `target_adapters`."""
    targets = target_adapters(task, task.candidates(logo))

    def select(prompts: Sequence[Any], batch_size: int) -> list[Selection]:
        return [ranked({targets.of(text_of(prompt)): 1.0}) for prompt in prompts]

    return Prepared(select, {} if targets.usual is None else {"adapter": targets.usual})


def called_like(dataset: str, names: Sequence[str]) -> str | None:
    """The adapter with the dataset's name, or the name of its sub-folder, whole or as the last part of a path."""
    for called in filter(None, (dataset, dataset.partition(".")[2])):
        if called in names:
            return called
        nested = [name for name in names if name.endswith(f"/{called}")]
        if len(nested) == 1:
            return nested[0]
    return None
