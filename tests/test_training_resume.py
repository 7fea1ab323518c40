"""A run that ended too early is continued by the same command, and what stands is left alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from learning import command, contents, rows, write_base, write_rows
from logo.cli.app import run
from logo.training.learner import Learner
from logo.training.running import LOCK, alone
from tolerances import PATIENCE
from warm import python

TASKS = ("a", "b", "d/e")


@pytest.fixture(scope="module")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    for number, name in enumerate(TASKS):
        write_rows(folder / f"{name}.jsonl", rows(10 + number, number))
    return folder


@pytest.fixture(scope="module")
def whole(base_model: Path, tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pool whose training nobody stopped."""
    pool = tmp_path_factory.mktemp("whole") / "pool"
    assert run(command(base_model, tasks, pool)) == 0
    return pool


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "copy")
    return tmp_path / "copy"


def adapters(pool: Path) -> dict[str, bytes]:
    return {name: content for name, content in contents(pool).items() if name != "pool.json"}


def test_a_run_that_was_interrupted_continues_with_the_next_task(
    whole: Path,
    base_model: Path,
    tasks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ctrl-C in the second task: exit code 130. That task begins again, and all adapters are those of a whole run."""
    steps, step = 0, Learner.step

    def stepping(self: Learner) -> Any:
        nonlocal steps
        steps += 1
        if steps == 9:
            raise KeyboardInterrupt
        return step(self)

    pool = tmp_path / "pool"
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", stepping)
        assert run(command(base_model, tasks, pool)) == 130
    assert "repeat the command to train the others" in capsys.readouterr().err
    assert {name.partition("/")[0] for name in contents(pool)} == {"a", "pool.json"}
    assert run([*command(base_model, tasks, pool), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["trained"], found["done"]) == (["b", "d/e"], ["a"])
    assert contents(pool) == contents(whole)
    files = ("adapter_config.json", "adapter_model.safetensors", "examples.jsonl", "training.json")
    assert set(contents(pool)) == {f"{name}/{file}" for name in TASKS for file in files} | {"pool.json"}


@pytest.mark.slow
def test_kill_9_and_the_same_command(base_model: Path, tasks: Path, tmp_path: Path) -> None:
    """Killed once it has begun, so that a lock is left behind."""
    pool = tmp_path / "pool"
    asked = [*command(base_model, tasks, pool), "--steps", "200", "--patience", "200"]
    process = subprocess.Popen([*python(), "-m", "logo.cli", *asked], stderr=subprocess.DEVNULL)
    for _ in range(PATIENCE * 50):
        if (pool / "a" / "training.json").exists():
            break
        try:
            process.wait(0.02)
        except subprocess.TimeoutExpired:
            continue
    process.kill()
    process.wait()
    assert json.loads((pool / "train.json").read_text())["command"]["name"] == "train"
    before = (pool / "a" / "training.json").stat().st_mtime_ns
    (pool / ".pool.json.new-1a2b3c4d").write_text("{")  # what a kill amid a write leaves
    (pool / ".b.new-1a2b3c4d").mkdir()
    (pool / ".b.new-1a2b3c4d" / "adapter_config.json").write_text("{")
    assert run(asked) == 0
    assert (pool / "a" / "training.json").stat().st_mtime_ns == before
    assert not (pool / LOCK).exists() and {name.rpartition("/")[0] for name in adapters(pool)} == set(TASKS)


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
    assert run(command(base_model, more, copied)) == 0
    told = capsys.readouterr()
    assert "adapters to train: 1, 3 trained already" in told.err
    assert told.out.splitlines()[-1] == f"{copied}: 1 adapters trained, 3 stood already, 0 failed"
    after = {name: content for name, content in contents(copied).items() if not name.startswith("bb/")}
    assert after.pop("pool.json") != before.pop("pool.json") and after == before
    assert stood.items() <= times(copied).items()
    assert sorted(json.loads((copied / "pool.json").read_text())["adapters"]) == sorted([*TASKS, "bb"])
    stood = times(copied)
    assert run(command(base_model, more, copied)) == 0 and times(copied) == stood  # nothing is left to do


def test_another_recipe_other_rows_and_foreign_adapters_are_refused_by_name(
    copied: Path, base_model: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(copied)

    def refused(*more: str, folder: Path = tasks) -> str:
        capsys.readouterr()
        assert run([*command(base_model, folder, copied), *more]) == 2
        assert contents(copied) == before
        return capsys.readouterr().err.splitlines()[-1]

    end = "; name another --out, or replace it with --retrain"
    line = refused("--lr", "0.001")
    assert line == f"logo: error: {copied / 'a'}: was trained with lr 0.005, and 0.001 is asked for{end}"
    assert f"{copied / 'b'}: was trained with r 2, and 3 is asked for" in refused("--r", "3", "--tasks", "b")
    assert "another base model, or in another dtype" in refused("--dtype", "bfloat16")
    other = tmp_path / "tasks"
    shutil.copytree(tasks, other)
    write_rows(other / "b.jsonl", rows(12, 77))
    assert refused(folder=other) == f"logo: error: {copied / 'b'}: was trained with other rows{end}"
    (copied / "b" / "training.json").unlink()
    before = contents(copied)
    assert "holds an adapter that was not trained here" in refused()
    assert run([*command(base_model, other, copied), "--retrain"]) == 0
    assert "adapters to train: 1, 2 trained already" in capsys.readouterr().err
    after = contents(copied)
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {"b/adapter_model.safetensors", "pool.json"}  # its examples may be a user's own
    assert run(command(base_model, other, copied)) == 0


def test_two_runs_in_one_folder(
    copied: Path, base_model: Path, tasks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with alone(copied):
        before = contents(copied)
        assert run(command(base_model, tasks, copied)) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith(f"logo: error: pool folder {copied}: another run trains into it")
        assert contents(copied) == before
    assert run(command(base_model, tasks, copied)) == 0


@pytest.mark.parametrize("synced", [0, 1, 4, 9])
def test_a_full_disk_leaves_no_half_of_anything(
    synced: int,
    base_model: Path,
    tasks: Path,
    tmp_path: Path,
    whole: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One line, and the same command goes on once there is room."""
    pool = tmp_path / "pool"
    left, fsync = synced, os.fsync

    def filling(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", filling)
        assert run(command(base_model, tasks, pool)) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("logo: ")]
    assert len(errors) == 1 and "cannot be written (No space left on device)" in errors[0]
    assert "--result_dir" not in errors[0]
    assert adapters(pool).items() <= adapters(whole).items()
    assert run(command(base_model, tasks, pool)) == 0
    assert contents(pool) == contents(whole)
