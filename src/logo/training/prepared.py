"""Tasks that are ready to be trained, and whether the adapter of one stands already.

An adapter is identified by a digest of everything that it is made from: recipe, rows, base model and dtype. An adapter
in the folder with the same digest is finished. An adapter with another digest is refused, so that nobody loses it by
accident.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from logo.adapters.examples import examples_sha256
from logo.adapters.peft import CONFIG
from logo.errors import DataError, UsageError
from logo.identity import fingerprint
from logo.training.examples import Example
from logo.training.pool import TOKENS, WRITTEN, record_of
from logo.training.recipe import Recipe
from logo.training.tasks import Task


@dataclass(frozen=True)
class Prepared:
    """A task, ready to be trained.

    Attributes:
        name: name of the task.
        recipe: the task's recipe.
        learned, held_out: its rows.
        digest: digest of everything that its adapter is made from.
        record: the same facts as JSON, which are written beside the adapter.
        invocation: tokens from which the adapter acts; empty if it has none.
        examples: the prompts that are written beside the adapter.
    """

    name: str
    recipe: Recipe
    learned: tuple[Example, ...]
    held_out: tuple[Example, ...]
    digest: str = ""
    record: Mapping[str, Any] = field(default_factory=dict)
    invocation: tuple[int, ...] = ()
    examples: Sequence[str] = ()

    @property
    def steps(self) -> int:
        """Largest number of steps."""
        return self.recipe.length(len(self.learned))

    @property
    def tokens(self) -> float:
        """Approximate number of tokens that it will be trained on."""
        per_epoch = math.ceil(len(self.learned) / self.recipe.batch_size)
        return self.steps / per_epoch * sum(map(len, self.learned))

    def batch(self, step: int) -> list[Example]:
        """The rows of a step: each epoch has all of them in another order."""
        size = self.recipe.batch_size
        epoch, place = divmod(step, math.ceil(len(self.learned) / size))
        order = _shuffled(len(self.learned), f"{self.recipe.seed} {self.name} {epoch}")
        return [self.learned[row] for row in order[place * size : (place + 1) * size]]


@lru_cache(1)
def _shuffled(count: int, seed: str) -> list[int]:
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


def split(name: str, recipe: Recipe, rows: Sequence[Example]) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """The rows to learn from, and those that are held out. Copies of held-out rows are not learned from, since their
    loss would say how well the rows are known by heart. Where nothing else remained, none is held out.
    """
    order = _shuffled(len(rows), f"{recipe.seed} {name} held out")
    count = recipe.held_out_rows(len(rows))
    held_out = tuple(rows[place] for place in sorted(order[:count]))
    copied = set(held_out)
    learned = tuple(row for place in sorted(order[count:]) if (row := rows[place]) not in copied)
    return (learned, held_out) if learned else (tuple(rows), ())


def prepare(
    task: Task,
    recipe: Recipe,
    rows: Sequence[Example],
    cut: int,
    base: Mapping[str, Any],
    invocation: tuple[int, ...] = (),
    examples: Sequence[str] = (),
) -> Prepared:
    """A task with its digest.

    Args:
        rows, cut: of `logo.training.examples.encode`.
        base: digests of the base model and of its tokenizer, and its dtype.
        invocation: tokens from which its adapter acts.
        examples: prompts to write beside its adapter.
    """
    learned, held_out = split(task.name, recipe, rows)
    # The tokens, too: they also depend on the chat template and on this version of LoGo.
    read = [[[row.prompt, *row.ids] for row in some] for some in (learned, held_out)]
    made_from = {"rows_sha256": task.sha256, "recipe": recipe.as_dict(), "base": dict(base), TOKENS: list(invocation)}
    record: dict[str, Any] = {
        "digest": fingerprint({"read": fingerprint({"rows": read}), **made_from}),
        "source": task.source,
        "rows": len(rows),
        "held_out": len(held_out),
        "copies": len(rows) - len(held_out) - len(learned),
        "cut_prompts": cut,
        **made_from,
        WRITTEN: examples_sha256(examples),
    }
    return Prepared(task.name, recipe, learned, held_out, record["digest"], record, invocation, examples)


def stands(task: Prepared, root: Path, retrain: bool) -> bool:
    """Whether the task's adapter is in the pool.

    Args:
        retrain: adapters that were made from something else may be replaced.

    Raises:
        UsageError: another adapter is in its place, which may not be replaced.
        StorageError: its record cannot be read.
    """
    folder = root / task.name
    record = record_of(folder)
    if record is not None and record.get("digest") == task.digest:
        return True
    if retrain or (record is None and not (folder / CONFIG).is_file()):
        return False
    what = "holds an adapter that was not trained here"
    if record is not None:
        what = f"was trained with {_difference(record, task.record)}"
    raise UsageError(f"{folder}: {what}; name another --out, or replace it with --retrain")


def _difference(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The differences between an adapter's record and the request, in words."""
    old, new = was.get("recipe", {}), now["recipe"]
    for name in {**old, **new}:
        if old.get(name) != new.get(name):
            return f"{name} {old.get(name)}, and {new.get(name)} is asked for"
    if was.get("rows_sha256") != now["rows_sha256"]:
        return "other rows"
    return "another base model, tokenizer or dtype"


def check_names(tasks: Sequence[Task]) -> None:
    """Raises DataError for names of tasks that are the same folder on some disks."""
    seen: dict[str, str] = {}
    for task in tasks:
        other = seen.setdefault(task.name.casefold(), task.name)
        if other != task.name:
            raise DataError(f"tasks {other!r} and {task.name!r} differ in case only; rename one of them")
