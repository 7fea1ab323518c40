"""Training of a whole pool: finds and encodes tasks, trains groups here or in several processes, lists the adapters.

Errors of one task are reported at the end, and the other tasks continue.
"""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from logo.adapters.activation import Activation
from logo.adapters.files import EXAMPLES, RESPONSES
from logo.adapters.notes import read_notes
from logo.errors import DataError, LoGoError, StorageError, UsageError
from logo.models import context_length, load_config, load_tokenizer, skeleton
from logo.prompts import asked_text
from logo.training.activation import Settling, common
from logo.training.examples import encode
from logo.training.plan import USUAL_AT_ONCE, GroupPlan, Plan, Prepared, check_names, plan, prepare
from logo.training.pool import (
    UNFINISHED,
    check_activation,
    check_base,
    diverged,
    leave_examples,
    record_of,
    write_pool,
)
from logo.training.progress import Status, Telling, states
from logo.training.recipe import Recipe, Recipes
from logo.training.tasks import Found, Task
from logo.training.trainer import Opening, Outcome, Trainer, same_base

if TYPE_CHECKING:
    from logo.backends.cluster import Layout
    from logo.backends.ray import Workers

# Seconds between two reads of the progress of other processes.
_LOOK = 1.0
Tell = Callable[[Sequence[Status]], None]


@dataclass(frozen=True)
class Wanted:
    """The request.

    Attributes:
        found: the tasks, and why some cannot be trained.
        recipes: how to train them.
        root: folder of the pool.
        opening: how to load the base model.
        at_once: most tasks that are trained together; None: `USUAL_AT_ONCE`, or an equal share for each process.
        every: seconds between two checkpoints.
        retrain: replace adapters that were made from something else.
        calibrate: calibrate the adapters and write the calibration beside them.
        examples: number of example prompts that are written beside each adapter.
    """

    found: Found
    recipes: Recipes
    root: Path
    opening: Opening
    at_once: int | None = None
    every: float = 60.0
    retrain: bool = False
    calibrate: bool = True
    examples: int = 4


@dataclass(frozen=True)
class Trained:
    """The outcome.

    Attributes:
        trained: names of the adapters that were trained now; `done`: names of those that were there already.
        failed: task name -> why it has no adapter, or not the requested one.
        cut: task name -> number of prompts that were truncated at their beginning.
    """

    trained: tuple[str, ...]
    done: tuple[str, ...]
    failed: Mapping[str, str]
    cut: Mapping[str, int]


def train(
    wanted: Wanted,
    layout: Layout | None = None,
    tell: Tell | None = None,
    planned: Callable[[Plan], None] | None = None,
) -> Trained:
    """Trains the adapters that are not in the pool yet.

    Args:
        layout: several processes; None: this one.
        tell: called repeatedly with the progress of the tasks in training.
        planned: called with the plan, once it is known.

    Raises:
        UsageError, DataError: nothing can be trained, or the folder holds something else.
        StorageError: something cannot be read or written. What was written is kept, and the next run continues from it.
        ModelError, HubError: the base model cannot be loaded.
        WorkersError: processes cannot be started, or are not alike.
    """
    root, recipes = wanted.root, wanted.recipes
    recipes.check(wanted.found.names)
    check_names(wanted.found.tasks)
    failed = dict(wanted.found.refused)
    with alone(root), opened(wanted.opening, layout) as trainers:
        check_base(root, trainers.facts)
        prepared, cut = _prepared(wanted, trainers.facts, failed)
        activation = common(prepared)
        if activation is not None:
            check_activation(root, activation)
        trainers.check([task.recipe for task in prepared])
        share = max(1, min(USUAL_AT_ONCE, -(-len(prepared) // trainers.count)))
        at_once = wanted.at_once or (USUAL_AT_ONCE if trainers.count == 1 else share)
        todo = plan(prepared, root, at_once, retrain=wanted.retrain)
        if planned is not None:
            planned(todo)
        for name in todo.done:
            reason = diverged(record_of(root / name) or {})
            if reason is not None:
                failed[name] = reason
        trained: list[str] = []
        done = list(todo.done)
        facts = {"base_model": wanted.opening.base_model, "base": trainers.facts, "versions": trainers.versions}
        facts |= _acting(root, prepared, activation, recipes.usual)
        write_pool(root, facts, failed)  # first, because it says where the new adapters act
        for outcomes in trainers.train(todo.groups, root, wanted.every, tell):
            for outcome in outcomes:
                if outcome.reason is not None:
                    failed[outcome.task] = outcome.reason
                if outcome.written:
                    (done if outcome.before else trained).append(outcome.task)
            write_pool(root, facts, failed)
        _leave_examples(wanted, [*trained, *done])
        known = (any((root / name / RESPONSES).rglob("*.safetensors")) for name in (*trained, *done))
        if wanted.calibrate and not all(known):
            try:
                trainers.calibrate(root)
            except LoGoError as error:
                warnings.warn(f"the pool is not calibrated yet: {error}", UserWarning, stacklevel=2)
    return Trained(tuple(sorted(trained)), tuple(sorted(done)), failed, cut)


def _leave_examples(wanted: Wanted, names: Collection[str]) -> None:
    """Writes example prompts beside the adapters of these tasks that have none."""
    for task in wanted.found.tasks:
        texts = _examples(wanted, task)
        if texts and task.name in names and not (wanted.root / task.name / EXAMPLES).exists():
            leave_examples(wanted.root / task.name, texts)


def _examples(wanted: Wanted, task: Task) -> list[str]:
    """The first prompts of a task, which become the example prompts of its adapter."""
    asked = [pair.prompt for pair in task.pairs[: wanted.examples]]
    texts = (one if isinstance(one, str) else asked_text(one) for one in asked)
    return [text for text in texts if text]


def _prepared(wanted: Wanted, base: Mapping[str, Any], failed: dict[str, str]) -> tuple[list[Prepared], dict[str, int]]:
    """The trainable tasks, and the number of truncated prompts by task. Errors of the other tasks go into `failed`."""
    base_model, place = wanted.opening.base_model, wanted.opening.model_dir
    tokenizer = load_tokenizer(base_model, model_dir=place)
    context = context_length(skeleton(load_config(base_model, model_dir=place)))
    prepared, cut, settling = [], {}, Settling(tokenizer)
    for task in wanted.found.tasks:
        recipe = wanted.recipes.of(task.name)
        try:
            examples = encode(tokenizer, task, recipe.max_length, context)
            settled = settling.settle(task, recipe, examples.rows)
        except DataError as error:
            failed[task.name] = str(error)
            continue
        if examples.cut:
            cut[task.name] = examples.cut
        if recipe.held_out and not recipe.held_out_rows(len(examples.rows)):
            warnings.warn(
                f"task {task.name!r} has {len(examples.rows)} rows: too few to hold any out, so it is trained for all "
                "of its steps without a held-out loss; give it 10 or more",
                UserWarning,
                stacklevel=2,
            )
        found = (settled.recipe, settled.rows, examples.cut, base, settled.invocation, _examples(wanted, task))
        prepared.append(prepare(task, *found))
    if not prepared and not wanted.found.tasks and not failed:
        raise DataError("no task to train")
    return prepared, cut


def _acting(root: Path, prepared: Sequence[Prepared], activation: Activation | None, usual: Recipe) -> dict[str, Any]:
    """The entries of the pool's notes for its activation and its usual recipe."""
    if activation is None:  # no task can be trained: the noted activation stays
        return {"activation": read_notes(root).get("activation", "everywhere"), "recipe": usual.as_dict()}
    one = prepared[0].recipe
    usual = replace(usual, activation=one.activation, invocation=one.invocation)
    return {"activation": str(activation), "recipe": usual.as_dict()}


# -- who trains --------------------------------------------------------------------------------------------------------


class InThisProcess:
    """Trains in this process."""

    count = 1

    def __init__(self, opening: Opening) -> None:
        self._trainer = Trainer(opening)
        self.facts, self.versions = self._trainer.facts, self._trainer.versions

    def train(
        self, groups: Sequence[GroupPlan], root: Path, every: float, tell: Tell | None
    ) -> Iterator[list[Outcome]]:
        """Trains groups one after the other."""
        for group in groups:
            yield self._trainer.train(group, root, every, tell)

    def check(self, recipes: Sequence[Recipe]) -> None:
        """As `Trainer.check`."""
        self._trainer.check(recipes)

    def calibrate(self, root: Path) -> None:
        """As `Trainer.calibrate`."""
        self._trainer.calibrate(root)


class InWorkers:
    """Trains in other processes, each with the base model loaded and the pool's folder at the same path."""

    def __init__(self, workers: Workers[Trainer]) -> None:
        self._workers, self.count = workers, workers.count
        self.facts, self.versions = workers.description

    def train(
        self, groups: Sequence[GroupPlan], root: Path, every: float, tell: Tell | None
    ) -> Iterator[list[Outcome]]:
        """Trains groups in parallel. If a process disappears, another one continues its group."""
        from logo.backends.items import Item, Lost

        files = {group.folder: group.folder.with_suffix(".progress.json") for group in groups}
        for file in files.values():
            file.unlink(missing_ok=True)  # left by an interrupted run
        items = (
            Item((group, root, every, files[group.folder]), round(sum(task.tokens for task in group.tasks)))
            for group in groups
        )
        with _watched(list(files.values()), tell):
            for item, outcome in self._workers.map(items, _train):
                group, file = item.args[0], item.args[3]
                if tell is not None:
                    tell(states(file))
                file.unlink(missing_ok=True)
                if isinstance(outcome, Lost):
                    yield [_lost(task, root, outcome.reason) for task in group.tasks]
                else:
                    yield outcome

    def check(self, recipes: Sequence[Recipe]) -> None:
        """As `Trainer.check`, in one of the processes."""
        self._workers.ask(Trainer.check, recipes)

    def calibrate(self, root: Path) -> None:
        """As `Trainer.calibrate`, in one of the processes."""
        self._workers.ask(Trainer.calibrate, root)


def _lost(task: Prepared, root: Path, reason: str) -> Outcome:
    """The outcome of a task whose group no process finished; its adapter may have been written before."""
    if (record_of(root / task.name) or {}).get("digest") == task.digest:
        return Outcome(task.name, None, True)
    return Outcome(task.name, f"not finished: {reason}; repeat the command to continue", False)


@contextlib.contextmanager
def opened(opening: Opening, layout: Layout | None) -> Iterator[InThisProcess | InWorkers]:
    """Within the block: the trainer, in this process or in several others."""
    if layout is None:
        yield InThisProcess(opening)
        return
    from logo.backends.ray import Workers

    workers: Workers[Trainer] = Workers(layout, partial(Trainer, opening), _describe, _differs)
    with workers:
        yield InWorkers(workers)


def _describe(trainer: Trainer) -> tuple[dict[str, Any], dict[str, str]]:
    return trainer.facts, trainer.versions


def _differs(own: tuple[dict[str, Any], dict[str, str]], first: tuple[dict[str, Any], dict[str, str]]) -> str | None:
    return same_base({**own[0], **own[1]}, {**first[0], **first[1]})


def _train(trainer: Trainer, group: GroupPlan, root: Path, every: float, file: Path) -> list[Outcome]:
    if not root.is_dir():
        raise StorageError(f"{root}: a worker does not see this folder; put the pool where all of them do")
    return trainer.train(group, root, every, Telling(file))


@contextlib.contextmanager
def _watched(files: Sequence[Path], tell: Tell | None) -> Iterator[None]:
    """Within the block: reports the progress that other processes write."""
    if tell is None:
        yield
        return
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(_LOOK):
            tell([status for file in files for status in states(file)])

    thread = threading.Thread(target=look, name="logo-train-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextlib.contextmanager
def alone(root: Path) -> Iterator[None]:
    """Creates the folder, and locks it against other runs within the block.

    Raises:
        StorageError: it cannot be created.
        UsageError: another run trains into it.
    """
    try:
        (root / UNFINISHED).mkdir(parents=True, exist_ok=True)
        lock = (root / UNFINISHED / "lock").open("ab")
    except OSError as error:
        raise StorageError(f"pool folder {root}: cannot be written ({error.strerror or error})") from error
    with lock:
        _lock(lock, root)
        try:
            yield
        finally:
            (root / UNFINISHED / "lock").unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # not empty: checkpoints
                (root / UNFINISHED).rmdir()


def _lock(file: IO[bytes], root: Path) -> None:
    """Locks the file against other runs, if the file system can.

    Raises:
        UsageError: another run holds it.
    """
    busy = UsageError(f"pool folder {root}: another run trains into it; wait for it, or name another")
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows has no such lock
        return
    except BlockingIOError:
        raise busy from None
    except OSError as error:  # some network drives have none either
        warnings.warn(f"{root}: cannot be locked ({error.strerror}); let no other run train into it", stacklevel=2)
        return
    try:
        same = os.path.samestat(os.fstat(file.fileno()), os.stat(root / UNFINISHED / "lock"))
    except FileNotFoundError:
        same = False
    if not same:  # the run that had it has just ended, and removed the file
        raise busy
