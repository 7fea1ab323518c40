"""`target`: the adapter that was made for a row, which only an oracle knows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from logo.baselines.method import Prepared, Task, ranked, register_method, text_of
from logo.core import Selection
from logo.errors import DataError, closest

if TYPE_CHECKING:
    from logo.engine import LoGo


@register_method(picks=1)
def target(logo: LoGo, task: Task) -> Prepared:
    """The adapter that a row names, else the one that is named like the dataset, alone.

    Raises:
        DataError: a row names an adapter that is not in the pool, or none is known.
    """
    names = task.candidates(logo)
    named: dict[str, str] = {}
    for number, (prompt, adapter) in enumerate(zip(task.prompts, task.targets, strict=False), start=1):
        if adapter is None:
            continue
        if adapter not in names or named.setdefault(prompt, adapter) != adapter:
            found = "which the pool does not have" if adapter not in names else f"and an earlier row {named[prompt]!r}"
            raise DataError(
                f"target: dataset {task.name!r}: row {number} names adapter {adapter!r}, {found}"
                f"{closest(adapter, names)}"
            )
    whole = called_like(task.name, names)
    if whole is None and not set(task.prompts) <= named.keys():
        raise DataError(
            f"target: dataset {task.name!r}: there are rows that name no adapter, and the pool has none called "
            f"{task.name!r}{closest(task.name, names)}; put an 'adapter' field into the rows"
        )

    def select(prompts: Sequence[Any], batch_size: int) -> list[Selection]:
        return [ranked({named.get(text_of(prompt)) or str(whole): 1.0}) for prompt in prompts]

    return Prepared(select, {} if whole is None else {"adapter": whole})


def called_like(dataset: str, names: Sequence[str]) -> str | None:
    """The adapter with the dataset's name, or the name of its sub-folder, whole or as the last part of a path."""
    for wanted in filter(None, (dataset, dataset.partition(".")[2])):
        if wanted in names:
            return wanted
        ending = [name for name in names if name.endswith(f"/{wanted}")]
        if len(ending) == 1:
            return ending[0]
    return None
