"""Training of a whole pool: finds and encodes tasks, trains one after the other, lists the adapters.

Errors of one task are reported at the end, and the other tasks continue.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from logo.adapters.activation import Activation, read_notes
from logo.errors import DataError, StorageError, UsageError
from logo.models import context_length, load_config, load_tokenizer, skeleton
from logo.prompts import asked_text
from logo.training.activation import Settling, common
from logo.training.examples import encode
from logo.training.learner import DIVERGED, Course
from logo.training.pool import check_pool, diverged, record_of, write_pool
from logo.training.prepared import Prepared, check_names, prepare, stands
from logo.training.recipe import FEWEST_TO_HOLD_OUT, Recipe, Recipes
from logo.training.tasks import Found, Task
from logo.training.trainer import Opening, Trainer

LOCK = ".training.lock"


@dataclass(frozen=True)
class Wanted:
    """The request.

    Attributes:
        found: the tasks, and why some cannot be trained.
        recipes: how to train them.
        root: folder of the pool.
        opening: how to load the base model.
        retrain: replace adapters that were made from something else.
        examples: number of example prompts that are written beside each adapter.
    """

    found: Found
    recipes: Recipes
    root: Path
    opening: Opening
    retrain: bool = False
    examples: int = 4


@dataclass(frozen=True)
class Trained:
    """The outcome.

    Attributes:
        trained: names of the adapters that were trained now; `done`: names of those that were there already.
        failed: task name -> why it has no adapter, or not the requested one.
        cut: task name -> number of prompts that were truncated at their beginning.
        copies: task name -> number of rows that were not trained on, because they are copies of held-out ones.
    """

    trained: tuple[str, ...]
    done: tuple[str, ...]
    failed: Mapping[str, str]
    cut: Mapping[str, int]
    copies: Mapping[str, int]


def train(
    wanted: Wanted,
    planned: Callable[[Sequence[Prepared], int], None] = lambda tasks, done: None,
    tell: Callable[[Prepared, Course], None] = lambda task, course: None,
) -> Trained:
    """Trains the adapters that are not in the pool yet.

    Args:
        planned: called with the tasks to train, and the number of those that are trained already.
        tell: called with a task and its progress, after each of its steps.

    Raises:
        UsageError, DataError: nothing can be trained, or the folder holds something else.
        StorageError: something cannot be read or written. Adapters that were written stay, and the next run trains the
            others.
        ModelError, HubError: the base model cannot be loaded.
    """
    root, recipes = wanted.root, wanted.recipes
    recipes.check(wanted.found.names)
    check_names(wanted.found.tasks)
    failed = dict(wanted.found.refused)
    with alone(root):
        for left in list(root.rglob(".*.new-*")):  # by writers that died; the lock keeps others out
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
        trainer = Trainer(wanted.opening)
        base = trainer.facts
        prepared = _prepared(wanted, base, failed)
        activation = common(prepared)
        check_pool(root, base, activation)
        for recipe in {task.recipe.targets: task.recipe for task in prepared}.values():
            trainer.check(recipe)
        todo = [task for task in prepared if not stands(task, root, wanted.retrain)]
        planned(todo, len(prepared) - len(todo))
        done = sorted(task.name for task in prepared if task not in todo)
        failed |= {name: reason for name in done if (reason := diverged(record_of(root / name) or {})) is not None}
        facts = {"base_model": wanted.opening.base_model, "base": base, "versions": trainer.versions}
        facts |= _acting(root, prepared, activation, recipes.usual)
        write_pool(root, facts, failed)  # first, because it says where the new adapters act
        trained = []
        for task in todo:
            course = trainer.train(task, root, partial(tell, task))
            if course.status == DIVERGED:
                kept = "no adapter is kept" if course.best is None else f"the adapter of step {course.best} is kept"
                failed[task.name] = f"{course.reason}; {kept}"
            if course.best is not None:
                trained.append(task.name)
            write_pool(root, facts, failed)
    cut, copies = (
        {task.name: task.record[key] for task in prepared if task.record[key]} for key in ("cut_prompts", "copies")
    )
    return Trained(tuple(sorted(trained)), tuple(done), failed, cut, copies)


def _examples(wanted: Wanted, task: Task) -> list[str]:
    """The first prompts of a task, which become the example prompts of its adapter."""
    asked = [pair.prompt for pair in task.pairs[: wanted.examples]]
    texts = (one if isinstance(one, str) else asked_text(one) for one in asked)
    return [text for text in texts if text]


def _prepared(wanted: Wanted, base: Mapping[str, Any], failed: dict[str, str]) -> list[Prepared]:
    """The trainable tasks. Errors of the other tasks go into `failed`."""
    base_model, place = wanted.opening.base_model, wanted.opening.model_dir
    tokenizer = load_tokenizer(base_model, model_dir=place)
    context = context_length(skeleton(load_config(base_model, model_dir=place)))
    prepared, settling = [], Settling(tokenizer)
    for task in wanted.found.tasks:
        recipe = wanted.recipes.of(task.name)
        try:
            examples = encode(tokenizer, task, recipe.max_length, context)
            settled = settling.settle(task, recipe, examples.rows)
        except DataError as error:
            failed[task.name] = str(error)
            continue
        found = (settled.recipe, settled.rows, examples.cut, base, settled.invocation, _examples(wanted, task))
        prepared.append(prepare(task, *found))
        if recipe.held_out and not prepared[-1].held_out:
            warnings.warn(
                f"task {task.name!r} has {len(set(examples.rows))} different rows: too few to hold any out, so it is "
                f"trained for all of its steps without a held-out loss; give it {FEWEST_TO_HOLD_OUT} or more",
                UserWarning,
                stacklevel=2,
            )
    if not prepared and not wanted.found.tasks and not failed:
        raise DataError("no task to train")
    return prepared


def _acting(root: Path, prepared: Sequence[Prepared], activation: Activation | None, usual: Recipe) -> dict[str, Any]:
    """The entries of the pool's notes for its activation and its usual recipe."""
    if activation is None:  # no task can be trained: the noted activation stays
        return {"activation": read_notes(root).get("activation", "everywhere"), "recipe": usual.as_dict()}
    one = prepared[0].recipe
    usual = replace(usual, activation=one.activation, invocation=one.invocation)
    return {"activation": str(activation), "recipe": usual.as_dict()}


@contextlib.contextmanager
def alone(root: Path) -> Iterator[None]:
    """Creates the folder, and locks it against other runs within the block, where the system has such locks.

    Raises:
        StorageError: it cannot be created.
        UsageError: another run trains into it.
    """
    file = root / LOCK
    busy = UsageError(f"pool folder {root}: another run trains into it; wait for it, or name another")
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = file.open("ab")
    except OSError as error:
        raise StorageError(f"pool folder {root}: cannot be written ({error.strerror or error})") from error
    with lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not file.exists() or not os.path.samestat(os.fstat(lock.fileno()), file.stat()):
                raise busy  # the run that had it has just ended, and removed the file
        except BlockingIOError:
            raise busy from None
        except (ImportError, OSError):  # Windows and some network drives have none
            pass
        try:
            yield
        finally:
            file.unlink(missing_ok=True)
