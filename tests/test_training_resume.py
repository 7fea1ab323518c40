"""Nothing is lost: killed at any moment, the same command makes the same adapters, and what stands is left alone."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dying import dying as commands_dying
from learning import command, contents, rows, write_base, write_rows
from logo.cli.run import run
from logo.training.checkpoint import STATE, TENSORS, Checkpoint
from logo.training.plan import GroupPlan, Prepared, plan
from logo.training.recipe import Recipe
from tolerances import PATIENCE
from warm import python

TASKS = ("a", "b", "c", "d/e", "f")

IMPORTS = """
import peft, transformers.models.llama.modeling_llama
import logo.cli.app, logo.training.learner, logo.training.running
"""
STEPS = """
    learner = logo.training.learner.Learner
    learner.step, learner.measured = counted(learner.step), counted(learner.measured)
"""


@pytest.fixture(scope="module")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    for number, name in enumerate(TASKS):
        write_rows(folder / f"{name}.jsonl", rows(10 + number, number))
    return folder


Dying = Callable[[int, Path], int]


@pytest.fixture(scope="module")
def dying(base_model: Path, tasks: Path) -> Iterator[Dying]:
    """Trains in a process of its own up to a step; returns how it ended."""
    with commands_dying("--out", IMPORTS, STEPS) as run_until:
        yield lambda step, pool: run_until(step, asked(base_model, tasks, pool), pool.with_suffix(".steps"))


def asked(base_model: Path, tasks: Path, pool: Path) -> list[str]:
    """Three groups, a checkpoint after every step."""
    return command(base_model, tasks, pool, "--at-once", "2", "--checkpoint-every", "0")


@pytest.fixture(scope="module")
def whole(dying: Dying, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A pool whose training nobody stopped, and how many steps it took."""
    pool = tmp_path_factory.mktemp("whole") / "pool"
    assert dying(-1, pool) == 0
    return pool, int(pool.with_suffix(".steps").read_text())


def test_the_whole_pool_is_there_and_nothing_else(whole: tuple[Path, int]) -> None:
    pool, _ = whole
    files = ("adapter_config.json", "adapter_model.safetensors", "examples.jsonl", "training.json")
    assert set(contents(pool)) == {f"{name}/{file}" for name in TASKS for file in files} | {"pool.json"}
    assert not (pool / ".training").exists()


@pytest.mark.slow
@pytest.mark.parametrize("moment", [1, 3])
def test_kill_9_at_any_moment(moment: int, whole: tuple[Path, int], dying: Dying, tmp_path: Path) -> None:
    """Twice, since it is another process that goes on; then the same bytes in all files, and nothing else."""
    root, steps = whole
    at = random.Random(moment)
    pool = tmp_path / "pool"
    first = at.randrange(moment * steps // 5, (moment + 1) * steps // 5)
    assert dying(first, pool) == -signal.SIGKILL
    assert dying(at.randrange(1, 2 + (steps - first) // 2), pool) in (-signal.SIGKILL, 0)
    assert dying(-1, pool) == 0
    assert contents(pool) == contents(root)


@pytest.fixture(scope="module")
def killed(whole: tuple[Path, int], dying: Dying, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pool whose training was killed in its second group."""
    pool = tmp_path_factory.mktemp("killed") / "pool"
    for step in range(whole[1] // 2, whole[1]):  # the first moment at which no checkpoint is being replaced
        shutil.rmtree(pool, ignore_errors=True)
        assert dying(step, pool) == -signal.SIGKILL
        found = [path for path in (pool / ".training").iterdir() if path.is_dir()]
        if len(found) == 1 and found[0].name[0] != ".":
            break
    return pool


@pytest.fixture
def begun(killed: Path, tmp_path: Path) -> Path:
    """The checkpoint of such a pool."""
    shutil.copytree(killed, tmp_path / "pool")
    [checkpoint] = (path for path in (tmp_path / "pool" / ".training").iterdir() if path.is_dir())
    assert json.loads((checkpoint / STATE).read_text())["courses"]
    return checkpoint


def test_a_checkpoint_that_was_aside_when_it_was_killed_is_gone_on_from(
    begun: Path, whole: tuple[Path, int], base_model: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the two renames of a folder that is replaced."""
    pool = begun.parents[1]
    state = json.loads((begun / STATE).read_text())
    begun.rename(begun.with_name(f".{begun.name}.old-1a2b"))
    shutil.copytree(begun.with_name(f".{begun.name}.old-1a2b"), begun.with_name(f".{begun.name}.new-1a2b"))
    from logo.training.learner import Learner

    gone_on: dict[str, int] = {}
    load = Learner.load

    def loading(self: Learner, course: Any, tensors: Any) -> None:
        gone_on[self.name] = course["step"]
        load(self, course, tensors)

    monkeypatch.setattr(Learner, "load", loading)
    assert run(asked(base_model, tasks, pool)) == 0
    assert gone_on == {name: course["step"] for name, course in state["courses"].items() if course["step"]} != {}
    assert contents(pool) == contents(whole[0])


def cut_short(folder: Path) -> None:
    os.truncate(folder / TENSORS, 100)


def no_tensors(folder: Path) -> None:
    (folder / TENSORS).unlink()


def garbled(folder: Path) -> None:
    (folder / STATE).write_text("{")


def another_shape(folder: Path) -> None:
    state = json.loads((folder / STATE).read_text())
    (folder / STATE).write_text(json.dumps({**state, "courses": {}}))


@pytest.mark.parametrize("harm", [cut_short, no_tensors, garbled, another_shape])
def test_a_damaged_checkpoint_is_told_in_one_line(
    harm: Callable[[Path], None],
    begun: Path,
    whole: tuple[Path, int],
    base_model: Path,
    tasks: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pool = begun.parents[1]
    harm(begun)
    before = {name: content for name, content in contents(pool).items() if not name.startswith(".training/.")}
    before.pop(".training/lock")  # of the run that was killed, as what it had half written
    assert run(asked(base_model, tasks, pool)) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"logo: error: checkpoint {begun}: cannot be read (") and "remove it" in line
    assert contents(pool) == before
    shutil.rmtree(begun)
    assert run(asked(base_model, tasks, pool)) == 0
    assert contents(pool) == contents(whole[0])


def test_a_checkpoint_whose_removal_was_interrupted_is_none(
    begun: Path, whole: tuple[Path, int], base_model: Path, tasks: Path
) -> None:
    (begun / STATE).unlink()
    assert run(asked(base_model, tasks, begun.parents[1])) == 0
    assert contents(begun.parents[1]) == contents(whole[0])


def test_a_checkpoint_of_what_is_done_is_removed(
    begun: Path, whole: tuple[Path, int], base_model: Path, tasks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where all adapters were written and the process was killed then."""
    pool = begun.parents[1]
    shutil.copytree(whole[0], pool, dirs_exist_ok=True)
    assert run(asked(base_model, tasks, pool)) == 0
    assert contents(pool) == contents(whole[0]) and not begun.exists()
    assert "5 trained already" in capsys.readouterr().err


# -- what stands -------------------------------------------------------------------------------------------------------


@pytest.fixture
def copied(whole: tuple[Path, int], tmp_path: Path) -> Path:
    shutil.copytree(whole[0], tmp_path / "copy")
    return tmp_path / "copy"


def times(pool: Path) -> dict[str, tuple[int, int]]:
    """When files of adapters were written, and which ones they are."""
    found = (file for file in pool.rglob("*") if file.is_file() and file.name not in ("pool.json", "train.json"))
    return {str(file.relative_to(pool)): (file.stat().st_mtime_ns, file.stat().st_ino) for file in found}


def test_a_task_that_is_added_touches_nothing_of_the_others(
    copied: Path, base_model: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = tmp_path / "tasks"
    shutil.copytree(tasks, more)
    write_rows(more / "bb.jsonl", rows(11, 9))
    before, stood = contents(copied), times(copied)
    assert run(asked(base_model, more, copied)) == 0
    told = capsys.readouterr()
    assert "adapters to train: 1, in groups: 1, 5 trained already" in told.err
    assert told.out.splitlines()[-1] == f"{copied}: 1 adapters trained, 5 stood already, 0 failed"
    after = {name: content for name, content in contents(copied).items() if not name.startswith("bb/")}
    assert after.pop("pool.json") != before.pop("pool.json") and after == before
    assert stood.items() <= times(copied).items()
    assert sorted(json.loads((copied / "pool.json").read_text())["adapters"]) == sorted([*TASKS, "bb"])
    stood = times(copied)
    assert run(asked(base_model, more, copied)) == 0 and times(copied) == stood  # nothing is left to do


def test_another_recipe_other_rows_and_foreign_adapters_are_refused_by_name(
    copied: Path, base_model: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(copied)

    def refused(*more: str, folder: Path = tasks) -> str:
        capsys.readouterr()
        assert run([*asked(base_model, folder, copied), *more]) == 2
        assert contents(copied) == before
        return capsys.readouterr().err.splitlines()[-1]

    end = "; name another --out, or replace it with --retrain"
    line = refused("--lr", "0.001")
    assert line == f"logo: error: {copied / 'a'}: was trained with lr 0.005, and 0.001 is asked for{end}"
    assert f"{copied / 'c'}: was trained with r 2, and 3 is asked for" in refused("--r", "3", "--tasks", "c")
    assert "another base model, or in another dtype" in refused("--dtype", "bfloat16")
    other = tmp_path / "tasks"
    shutil.copytree(tasks, other)
    write_rows(other / "c.jsonl", rows(12, 77))
    assert refused(folder=other) == f"logo: error: {copied / 'c'}: was trained with other rows{end}"
    (copied / "c" / "training.json").unlink()
    before = contents(copied)
    assert "holds an adapter that was not trained here" in refused()
    assert run([*asked(base_model, other, copied), "--retrain"]) == 0
    assert "adapters to train: 1, in groups: 1, 4 trained already" in capsys.readouterr().err
    after = contents(copied)
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {"c/adapter_model.safetensors", "pool.json"}  # its examples may be a user's own
    assert run(asked(base_model, other, copied)) == 0


def test_what_was_begun_with_another_recipe_is_refused_until_it_is_begun_anew(
    begun: Path, base_model: Path, tasks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pool = begun.parents[1]
    members = sorted(json.loads((begun / STATE).read_text())["members"])
    left = ["--tasks", members[0], "--steps", "2"]
    for name in members:
        shutil.rmtree(pool / name, ignore_errors=True)
    assert run([*asked(base_model, tasks, pool), *left]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"{members[0]!r}" in line and "was begun here from other rows or with another recipe" in line
    assert run([*asked(base_model, tasks, pool), *left, "--retrain"]) == 0
    assert json.loads((pool / members[0] / "training.json").read_text())["course"]["steps"] == 2
    assert not begun.exists()


def test_two_runs_in_one_folder(begun: Path, base_model: Path, tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from logo.training.running import alone

    pool = begun.parents[1]
    with alone(pool):
        before = contents(pool)
        assert run(asked(base_model, tasks, pool)) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith(f"logo: error: pool folder {pool}: another run trains into it")
        assert contents(pool) == before
    assert run(asked(base_model, tasks, pool)) == 0


# -- plans -------------------------------------------------------------------------------------------------------------


def prepared(name: str, steps: int) -> Prepared:
    return Prepared(name, Recipe(steps=steps), (), f"digest of {name}", {"recipe": Recipe(steps=steps).as_dict()})


def finish(root: Path, group: GroupPlan) -> None:
    """As if it had been trained."""
    for task in group.tasks:
        folder = root / task.name
        folder.mkdir(parents=True)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (folder / name).touch()
        (folder / "training.json").write_text(json.dumps({"digest": task.digest}))


STATES = ("nothing", "begun", "done", "done and its checkpoint")


@settings(max_examples=60)
@given(
    steps=st.lists(st.integers(1, 4), min_size=1, max_size=14),
    at_once=st.integers(1, 5),
    states=st.lists(st.sampled_from(STATES), min_size=14, max_size=14),
)
@example(steps=[1] * 5, at_once=2, states=["done", *["nothing"] * 13])
def test_groups_are_those_of_a_run_that_nobody_interrupted(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int], at_once: int, states: list[str]
) -> None:
    """Whichever are done or begun: whom an adapter is learned with shows in its last digits."""
    root = tmp_path_factory.mktemp("pool")
    tasks = [prepared(f"t{number:02}", count) for number, count in enumerate(steps)]
    groups = plan(tasks, root, at_once).groups
    assert sorted(task.name for group in groups for task in group.tasks) == [task.name for task in tasks]
    assert len(groups) == -(-len(tasks) // at_once) and all(len(group.tasks) <= at_once for group in groups)
    for group, state in zip(groups, states, strict=False):
        if state.startswith("done"):
            finish(root, group)
        if state in ("begun", "done and its checkpoint"):
            courses = {name: {"step": 0} for name in group.members}
            Checkpoint(group.members, courses, {}).write(group.folder)
    done = {path.parent.name for path in root.rglob("training.json")}
    left = plan(tasks, root, at_once)
    assert set(left.done) == done
    expected = {group.folder: group.tasks for group in groups if group.tasks[0].name not in done}
    assert {group.folder: group.tasks for group in left.groups} == expected
    more = prepared("another", 2)
    assert {task.name for group in plan([*tasks, more], root, at_once).groups for task in group.tasks} == {
        "another",
        *(task.name for part in expected.values() for task in part),
    }


def test_interrupting_is_not_an_error_of_ours(
    base_model: Path,
    tasks: Path,
    tmp_path: Path,
    whole: tuple[Path, int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ctrl-C: exit code 130, and the same command goes on, which it says."""
    from logo.training.learner import Learner

    steps, step = 0, Learner.step

    def stepping(self: Learner, loss: float, batch: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == 9:
            raise KeyboardInterrupt
        step(self, loss, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", stepping)
        assert run(asked(base_model, tasks, tmp_path / "pool")) == 130
    assert "repeat the command to continue" in capsys.readouterr().err
    assert run(asked(base_model, tasks, tmp_path / "pool")) == 0
    assert contents(tmp_path / "pool") == contents(whole[0])


def test_the_command_is_a_process_that_can_be_killed(base_model: Path, tasks: Path, tmp_path: Path) -> None:
    """`logo train` itself, without what counts steps: killed once it has begun."""
    pool = tmp_path / "pool"
    process = subprocess.Popen(
        [*python(), "-m", "logo.cli", *asked(base_model, tasks, pool)], stderr=subprocess.DEVNULL
    )
    for _ in range(PATIENCE * 50):
        if list((pool / ".training").glob("*/state.json")):
            break
        assert process.poll() is None
        try:
            process.wait(0.02)
        except subprocess.TimeoutExpired:
            continue
    process.kill()
    process.wait()
    assert json.loads((pool / "train.json").read_text())["command"]["name"] == "train"
    assert run(asked(base_model, tasks, pool)) == 0
    assert not (pool / ".training").exists()
