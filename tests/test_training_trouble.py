"""Failures of one task do not affect others: losses that explode, gradients that overflow, a disk that is full."""

from __future__ import annotations

import json
import math
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

import tiny
from learning import UNUSED, command, contents, examples, gap, learn, learner, rows, write_base, write_rows
from logo.cli.run import run
from logo.training.learner import Learner
from logo.training.recipe import Recipe

SHORT = Recipe(r=2, lr=3e-3, steps=8, batch_size=4, evaluations=8, warmup=0.0)


def three(second: Recipe) -> list[Learner]:
    """Learners of which the second is another one."""
    recipes = {"a": SHORT, "b": second, "c": Recipe(r=4, targets=("all-linear",), lr=1e-3, steps=8, evaluations=2)}
    return [learner("llama", name, recipe, examples(16, seed)) for seed, (name, recipe) in enumerate(recipes.items())]


def same_without_it(llama: nn.Module, found: list[Learner]) -> None:
    """The other two are what they are without the second."""
    expected = three(SHORT)
    del expected[1]
    learn(llama, expected)
    for one, other in zip(expected, [found[0], found[2]], strict=True):
        assert other.course.status == one.course.status != "diverged" and other.course.best == one.course.best
        assert gap(other.factors.copy(), one.factors.copy()) < 1e-5


def test_a_task_that_explodes_ends_with_its_last_good_step(llama: nn.Module) -> None:
    """A rate that rises: nothing is learned in the first step, and far too much in the second."""
    learners = three(Recipe(r=2, lr=3e38, steps=8, batch_size=4, evaluations=8, warmup=0.5))
    begun = {key: tensor for key, tensor in learners[1].factors.copy().items() if key.startswith("A.")}
    learn(llama, learners)
    course = learners[1].course
    assert course.status == "diverged" and course.best == 1 and course.step == 2
    assert course.reason == "after step 2 its factors are not finite"
    best = learners[1].best
    assert best is not None and all(torch.equal(best[key], tensor) for key, tensor in begun.items())
    same_without_it(llama, learners)


def test_a_task_that_explodes_at_once_has_no_good_step(llama: nn.Module) -> None:
    learners = three(Recipe(r=2, lr=3e38, steps=8, batch_size=4, evaluations=2, warmup=0.0))
    learn(llama, learners)
    course = learners[1].course
    assert (course.status, course.step, course.best) == ("diverged", 1, None) and learners[1].best is None
    assert course.reason == "after step 1 its factors are not finite"
    same_without_it(llama, learners)


def test_a_task_whose_loss_is_not_finite_spoils_no_other(llama: nn.Module) -> None:
    """Its factors are, and what they give is not."""
    learners = three(SHORT)
    for parameter in learners[1].factors.parameters:
        parameter.data.fill_(3e38)
    learn(llama, learners)
    assert learners[1].course.reason == "at step 1 its loss is nan"
    same_without_it(llama, learners)


def test_a_loss_far_above_guessing_and_the_first_one_is_an_explosion(
    llama: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    twice = Recipe(r=2, lr=0.05, warmup=0.0, steps=2, held_out=0.0, evaluations=2)

    def learners() -> list[Learner]:
        return [learner("llama", name, twice, examples(16, seed)) for seed, name in enumerate("abc")]

    def growth(one: Learner) -> float:
        first, second = one.course.measured
        return second.train / first.train

    fine = learners()
    learn(llama, fine)
    least, middle, most = sorted(fine, key=growth)
    monkeypatch.setattr("logo.training.group._EXPLODED", 0.0)
    monkeypatch.setattr("logo.training.group._WORSE", (growth(middle) + growth(most)) / 2)
    again = {one.name: one for one in learners()}
    learn(llama, list(again.values()))
    first, second = most.course.measured
    said = (
        f"at step 2 its loss is {second.train:.1f}; it began at {first.train:.1f}, and guessing among all words has 4.6"
    )
    assert again[most.name].course.reason == said
    assert again[most.name].course.best == 1
    assert again[least.name].course.step == again[middle.name].course.step == 2


class Overflowing(torch.autograd.Function):
    """Gives what it gets, and a gradient that is not finite where its input is the marked one."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return gradient * math.inf


def test_a_gradient_that_is_not_finite_ends_the_task_that_it_is_of(llama: nn.Module) -> None:
    """Though its loss is finite, and the gradients of all are computed in one pass."""
    learners = three(SHORT)
    batch = learners[1].batch

    def marked() -> Any:
        return [type(row)((row.ids[0], UNUSED, *row.ids[2:]), row.prompt) for row in batch()]

    learners[1].batch = marked  # type: ignore[method-assign]
    embed = llama.get_input_embeddings()
    seen: list[torch.Tensor] = []

    def read(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        seen.append((inputs[0] == UNUSED).any(1))

    def spoil(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        rows_ = seen[-1]
        if not output.requires_grad or not bool(rows_.any()):
            return output
        return torch.where(rows_[:, None, None], Overflowing.apply(output), output)

    handles = [
        embed.register_forward_pre_hook(read),
        llama.get_submodule("model.layers.1.self_attn.q_proj").register_forward_hook(spoil),
    ]
    try:
        learn(llama, learners)
    finally:
        for handle in handles:
            handle.remove()
    assert learners[1].course.reason == "at step 1 its gradient is not finite"
    same_without_it(llama, learners)


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    for number, name in enumerate("abc"):
        write_rows(tmp_path / "tasks" / f"{name}.jsonl", rows(12, number))
    return tmp_path / "tasks"


def with_recipe(folder: Path, **values: Any) -> list[str]:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return ["--recipe", str(folder / "recipe.yaml")]


def test_a_list_at_the_end_says_what_is_wrong(
    base_model: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With exit code 1, also when the same command finds everything done that can be."""
    pool = tmp_path / "pool"
    write_rows(tasks / "few.jsonl", rows(3, 7))
    write_rows(tasks / "long.jsonl", [*rows(11, 8), {"context": "w3 " * 50, "completion": "w4"}])
    write_rows(tasks / "endless.jsonl", [*rows(2, 8), {"context": "w3", "completion": "w4 " * 50}])
    write_rows(tasks / "empty.jsonl", [])
    (tasks / "a.csv").write_text("context,completion\nx,y\n")
    late = {"b": {"lr": 3e38, "warmup": 0.5, "evaluations": 6}, "c": {"lr": 3e38, "warmup": 0.0}}
    asked = command(base_model, tasks, pool, "--max-length", "20", *with_recipe(tmp_path, tasks=late))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert run(asked) == 1
    told = capsys.readouterr()
    assert (
        "logo: warning: task 'few' has 3 rows: too few to hold any out, so it is trained for all of its steps "
        "without a held-out loss; give it 10 or more"
    ) in told.err.splitlines()
    lines = " ".join(told.out.split())
    assert "long: 1 prompts were longer than --max-length or the model's context and lost their beginning" in lines
    assert "failed a: several files have this name (a.csv, a.jsonl); rename all but one" in lines
    assert "failed b: after step 2 its factors are not finite; the adapter of step 1 is kept " in lines
    assert "failed c: after step 1 its factors are not finite; no adapter is kept" in lines
    assert "endless.jsonl, row 3: the completion has 51 tokens, and a row may have 20 with its prompt" in lines
    assert "failed empty: " in lines and "empty.jsonl: expected one JSON object per line" in lines
    assert lines.endswith(f"{pool}: 3 adapters trained, 5 failed")
    assert sorted(path.parent.name for path in pool.rglob("training.json")) == ["b", "few", "long"]
    assert sorted(json.loads((pool / "pool.json").read_text())["failed"]) == ["a", "b", "c", "empty", "endless"]
    before = (pool / "few" / "training.json").stat().st_mtime_ns
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert run([*asked, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["done"] == ["b", "few", "long"] and found["trained"] == [] and len(found["failed"]) == 5
    assert (pool / "few" / "training.json").stat().st_mtime_ns == before


def test_targets_that_are_wrong_are_met_before_anything_is_trained(
    base_model: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also those of a task whose turn is late."""
    more = with_recipe(tmp_path, tasks={"c": {"targets": "q_prj", "steps": 1}})
    assert run(command(base_model, tasks, tmp_path / "pool", "--at-once", "1", *more)) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("logo: error: targets q_prj: ") and not list((tmp_path / "pool").rglob("*.safetensors"))
    more = with_recipe(tmp_path, tasks={"c": {"targets": "lm_head"}})
    assert run(command(base_model, tasks, tmp_path / "pool", *more)) == 2
    assert "lm_head is the output head, which cannot be trained here" in capsys.readouterr().err.splitlines()[-1]


def test_a_recipe_may_name_tasks_that_are_not_asked_for_and_none_that_are_not_there(
    base_model: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = with_recipe(tmp_path, tasks={"c": {"r": 4}})
    assert run(command(base_model, tasks, tmp_path / "pool", "--tasks", "a", *more)) == 0
    more = with_recipe(tmp_path, tasks={"d": {"r": 4}})
    assert run(command(base_model, tasks, tmp_path / "pool", *more)) == 2
    assert "recipe: no task is called 'd'" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_no_row_is_longer_than_the_models_context(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Positions behind it are an error with learned ones, and were never trained with rotary ones."""
    base_model = write_base(tmp_path / "base", kind)
    size = "n_positions" if kind == "gpt2" else "max_position_embeddings"
    config = json.loads((base_model / "config.json").read_text())
    (base_model / "config.json").write_text(json.dumps(config | {size: 32}))
    if kind == "gpt2":
        tiny.model(kind, n_positions=32).save_pretrained(base_model)
    write_rows(tmp_path / "tasks" / "a.jsonl", [*rows(11, 8), {"context": "w3 " * 50, "completion": "w4"}])
    write_rows(tmp_path / "tasks" / "b.jsonl", [*rows(11, 8), {"context": "w3", "completion": "w4 " * 40}])
    asked = command(base_model, tmp_path / "tasks", tmp_path / "pool")
    assert run([*asked, "--targets", "c_attn" if kind == "gpt2" else "q_proj"]) == 1
    lines = " ".join(capsys.readouterr().out.split())
    assert "a: 1 prompts were longer than --max-length or the model's context and lost their beginning" in lines
    assert "row 12: the completion has 41 tokens, and a row may have 32 with its prompt; shorten it, since" in lines
    assert lines.endswith("1 adapters trained, 1 failed")


@pytest.fixture
def stopped(base_model: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A run of one group that was stopped after its first member had ended; returns the command."""
    asked = command(base_model, tasks, tmp_path / "pool", "--checkpoint-every", "0")
    asked += with_recipe(tmp_path, tasks={"a": {"steps": 2}})
    step = Learner.step

    def stopping(self: Learner, *what: Any) -> None:
        if self.course.step == 3:
            raise KeyboardInterrupt
        step(self, *what)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", stopping)
        assert run(asked) == 130
    assert [path.parent.name for path in (tmp_path / "pool").glob("*/training.json")] == ["a"]
    return asked


def test_an_adapter_that_was_removed_after_it_had_ended_is_trained_again(
    stopped: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = adapters(tmp_path / "pool")
    shutil.rmtree(tmp_path / "pool" / "a")
    capsys.readouterr()
    assert run([*stopped, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trained"] == ["a", "b", "c"]
    assert before and before.items() <= adapters(tmp_path / "pool").items()


def test_an_adapter_of_an_earlier_run_is_not_trained_now_and_keeps_the_examples_that_a_user_gave(
    stopped: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "pool" / "a" / "examples.jsonl"
    own.write_text('{"prompt": "w3 w4"}\n')
    capsys.readouterr()
    assert run([*stopped, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["trained"], found["done"]) == (["b", "c"], ["a"])
    assert own.read_text() == '{"prompt": "w3 w4"}\n'
    assert (tmp_path / "pool" / "b" / "examples.jsonl").exists()


def test_training_again_replaces_its_own_examples_and_no_others(base_model: Path, tasks: Path, tmp_path: Path) -> None:
    pool = tmp_path / "pool"
    assert run(command(base_model, tasks, pool, "--examples", "0")) == 0
    assert not (pool / "b" / "examples.jsonl").exists()
    assert run(command(base_model, tasks, pool)) == 0  # writes them beside adapters that stand
    own = '{"prompt": "w3 w4"}\n'
    (pool / "a" / "examples.jsonl").write_text(own)
    record = json.loads((pool / "c" / "training.json").read_text())
    del record["examples_sha256"]  # as in a pool of an earlier version
    (pool / "c" / "training.json").write_text(json.dumps(record))
    for name in "abc":
        write_rows(tasks / f"{name}.jsonl", rows(12, 77))
    assert run([*command(base_model, tasks, pool), "--retrain"]) == 0
    assert (pool / "a" / "examples.jsonl").read_text() == own
    for name in "bc":
        written = (pool / name / "examples.jsonl").read_text().splitlines()
        assert [json.loads(line)["prompt"] for line in written] == [row["context"] for row in rows(12, 77)[:4]]


@pytest.fixture(scope="module")
def whole(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the three tasks come to where nothing goes wrong."""
    root = tmp_path_factory.mktemp("whole")
    for number, name in enumerate("abc"):
        write_rows(root / "tasks" / f"{name}.jsonl", rows(12, number))
    assert run(command(base_model, root / "tasks", root / "pool", "--checkpoint-every", "0")) == 0
    return adapters(root / "pool")


def adapters(pool: Path) -> dict[str, bytes]:
    return {name: content for name, content in contents(pool).items() if name.endswith("adapter_model.safetensors")}


@pytest.mark.parametrize("synced", [0, 1, 9, 20, 26, 29])
def test_a_full_disk_leaves_no_half_of_anything(
    synced: int,
    base_model: Path,
    tasks: Path,
    tmp_path: Path,
    whole: dict[str, bytes],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One line, and the same command goes on once there is room."""
    pool = tmp_path / "pool"
    asked = command(base_model, tasks, pool, "--checkpoint-every", "0")
    left, fsync = synced, os.fsync

    def filling(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", filling)
        assert run(asked) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("logo: ")]
    assert len(errors) == 1 and "cannot be written (No space left on device)" in errors[0]
    assert "--result_dir" not in errors[0]
    assert not [path for path in pool.rglob("*") if ".new-" in path.name or ".old-" in path.name]
    for folder in (path for path in pool.iterdir() if path.is_dir() and path.name != ".training"):
        assert sorted(file.name for file in folder.iterdir()) == [
            "adapter_config.json",
            "adapter_model.safetensors",
            "training.json",
        ]
    assert adapters(pool).items() <= whole.items()
    assert run(asked) == 0
    assert adapters(pool) == whole and not (pool / ".training").exists()
