"""What remains to be trained: finished tasks, groups that were started, and groups of the remaining tasks.

An adapter is identified by a digest of everything that it is made from: recipe, rows, base model and dtype. An adapter
in the folder with the same digest is finished. An adapter with another digest is refused, so that nobody loses it by
accident.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from logo.adapters.examples import examples_sha256
from logo.adapters.files import CONFIG
from logo.digests import fingerprint
from logo.errors import DataError, StorageError, UsageError
from logo.training.checkpoint import STATE, forget
from logo.training.examples import Example
from logo.training.pool import TOKENS, UNFINISHED, WRITTEN, record_of
from logo.training.recipe import Recipe
from logo.training.tasks import Task

USUAL_AT_ONCE = 16


@dataclass(frozen=True)
class Prepared:
    """A task, ready to be trained.

    Attributes:
        name: name of the task.
        recipe: the task's recipe.
        rows: its examples.
        digest: digest of everything that its adapter is made from.
        record: the same facts as JSON, which are written beside the adapter.
        invocation: tokens from which the adapter acts; empty if it has none.
    """

    name: str
    recipe: Recipe
    rows: tuple[Example, ...]
    digest: str
    record: Mapping[str, Any]
    invocation: tuple[int, ...] = ()

    @property
    def steps(self) -> int:
        """Largest number of steps."""
        return self.recipe.length(len(self.rows) - self.recipe.held_out_rows(len(self.rows)))

    @property
    def tokens(self) -> float:
        """Approximate number of tokens that it will be trained on."""
        learned = len(self.rows) - self.recipe.held_out_rows(len(self.rows))
        epochs = self.steps / math.ceil(learned / self.recipe.batch_size)
        return epochs * learned * sum(map(len, self.rows)) / len(self.rows)


@dataclass(frozen=True)
class GroupPlan:
    """Tasks that are trained together.

    Attributes:
        tasks: in the order of the group.
        folder: the folder of the group's checkpoints. An existing checkpoint may have further members, which stay as
            they are.
    """

    tasks: tuple[Prepared, ...]
    folder: Path

    @property
    def members(self) -> dict[str, str]:
        """Name -> digest."""
        return {task.name: task.digest for task in self.tasks}


@dataclass(frozen=True)
class Plan:
    """The remaining work.

    Attributes:
        groups: what is to be trained, including finished members of a group that was begun.
        done: names of the other adapters that are trained already.
    """

    groups: tuple[GroupPlan, ...]
    done: tuple[str, ...]


def prepare(
    task: Task,
    recipe: Recipe,
    rows: Sequence[Example],
    cut: int,
    base: Mapping[str, Any],
    invocation: Sequence[int] = (),
    examples: Sequence[str] = (),
) -> Prepared:
    """A task with its digest.

    Args:
        rows, cut: of `logo.training.examples.encode`.
        base: digests of the base model and of its tokenizer, and its dtype.
        invocation: tokens from which its adapter acts.
        examples: the prompts that are going to be written beside its adapter.
    """
    record = {
        "source": task.source,
        "rows": len(rows),
        "rows_sha256": task.sha256,
        "held_out": recipe.held_out_rows(len(rows)),
        "cut_prompts": cut,
        "recipe": recipe.as_dict(),
        "base": dict(base),
        WRITTEN: examples_sha256(examples),
    }
    invoked = {TOKENS: list(invocation)} if invocation else {}
    # The tokens, too: they also depend on the chat template and on this version of LoGo.
    read = fingerprint({"rows": [[row.prompt, *row.ids] for row in rows]})
    digest = fingerprint({"rows": task.sha256, "read": read, "recipe": recipe.as_dict(), "base": dict(base), **invoked})
    return Prepared(task.name, recipe, tuple(rows), digest, {"digest": digest, **record, **invoked}, tuple(invocation))


def plan(tasks: Sequence[Prepared], root: Path, at_once: int, *, retrain: bool = False) -> Plan:
    """What is left to be trained.

    Args:
        root: folder of the pool.
        at_once: most tasks of a group.
        retrain: replace adapters that were made from something else, and restart tasks that were begun from it.

    Raises:
        UsageError: the folder holds an adapter, or the beginnings of one, that was made from something else.
        StorageError: something in it cannot be read.
    """
    done = []
    left: dict[str, Prepared] = {}
    for task in tasks:
        if _stands(task, root, retrain):
            done.append(task.name)
        else:
            left[task.name] = task
    known = {task.name: task for task in tasks}
    groups = []
    for folder in sorted(path for path in (root / UNFINISHED).glob("[!.]*") if path.is_dir()):
        if not (folder / STATE).exists():  # its removal was interrupted
            forget(folder)
            continue
        members = _members(folder)
        changed = [name for name, digest in members.items() if name in left and left[name].digest != digest]
        if changed and not retrain:
            raise UsageError(
                f"{root}: {', '.join(repr(name) for name in changed[:3])} was begun here from other rows or with "
                "another recipe; use those again, or start over with --retrain"
            )
        same = tuple(known[name] for name, digest in members.items() if name in known and known[name].digest == digest)
        if any(task.name in left for task in same):
            groups.append(GroupPlan(same, folder))
            for task in same:
                left.pop(task.name, None)
        elif all(name in known for name in members):  # its unfinished tasks begin anew
            forget(folder)
    # Tasks that an interrupted run has not begun are trained in the groups that it would have made, because the other
    # members of its group affect the last digits of an adapter.
    for group in _groups(list(tasks), root, at_once):
        if all(task.name in left for task in group.tasks):
            groups.append(group)
            for task in group.tasks:
                del left[task.name]
    groups += _groups(list(left.values()), root, at_once)
    begun = {task.name for group in groups for task in group.tasks}
    return Plan(tuple(groups), tuple(name for name in done if name not in begun))


def _groups(tasks: Sequence[Prepared], root: Path, at_once: int) -> list[GroupPlan]:
    """Tasks in as few groups as possible, with similar numbers of steps in each group."""
    if not tasks:
        return []
    count = math.ceil(len(tasks) / at_once)
    ordered = sorted(tasks, key=lambda task: (-task.steps, task.name))
    bounds = [round(number * len(ordered) / count) for number in range(count + 1)]
    groups = []
    for start, stop in pairwise(bounds):
        part = tuple(sorted(ordered[start:stop], key=lambda task: task.name))
        digest = fingerprint({task.name: task.digest for task in part})[:16]
        groups.append(GroupPlan(part, root / UNFINISHED / digest))
    return groups


def _stands(task: Prepared, root: Path, retrain: bool) -> bool:
    """Whether the task's adapter is in the pool; raises UsageError if another one is in its place, unless `retrain`."""
    folder = root / task.name
    record = record_of(folder)
    if record is not None and record.get("digest") == task.digest:
        return True
    if retrain or (record is None and not (folder / CONFIG).is_file()):
        return False
    if record is None:
        raise UsageError(
            f"{folder}: holds an adapter that was not trained here; name another --out, or replace it with --retrain"
        )
    raise UsageError(
        f"{folder}: was trained with {_difference(record, task.record)}; name another --out, or replace it with "
        "--retrain"
    )


def _difference(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The differences between an adapter's record and the request, in words."""
    old, new = was.get("recipe", {}), now["recipe"]
    for name in {**old, **new}:
        if old.get(name) != new.get(name):
            return f"{name} {old.get(name)}, and {new.get(name)} is asked for"
    if was.get("rows_sha256") != now["rows_sha256"]:
        return "other rows"
    return "another base model, tokenizer or dtype"


def _members(folder: Path) -> dict[str, str]:
    try:
        members = json.loads((folder / STATE).read_text(encoding="utf-8"))["members"]
        return {str(name): str(digest) for name, digest in members.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(f"checkpoint {folder}: cannot be read ({error}); remove it to begin anew") from error


def check_names(tasks: Sequence[Task]) -> None:
    """Raises DataError for names of tasks that are the same folder on some disks."""
    seen: dict[str, str] = {}
    for task in tasks:
        other = seen.setdefault(task.name.casefold(), task.name)
        if other != task.name:
            raise DataError(f"tasks {other!r} and {task.name!r} differ in case only; rename one of them")
