"""Failures of one task do not affect others: losses that explode, gradients that overflow, rows that cannot be read."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

import tiny
from learning import command, examples, learn, learner, rows, task, write_base, write_rows
from logo.cli.app import run
from logo.training.prepared import split
from logo.training.recipe import Recipe

SHORT = Recipe(r=2, lr=3e-3, steps=8, batch_size=4, evaluations=8, warmup=0.0)


@pytest.mark.parametrize(
    ("recipe", "best", "step"),
    [
        # A rate that rises: nothing is learned in the first step, and far too much in the second.
        (Recipe(r=2, lr=3e38, steps=8, batch_size=4, evaluations=8, warmup=0.5), 1, 2),
        (Recipe(r=2, lr=3e38, steps=8, batch_size=4, evaluations=2, warmup=0.0), None, 1),
    ],
)
def test_a_task_that_explodes_ends_with_its_last_good_step(
    llama: nn.Module, recipe: Recipe, best: int | None, step: int
) -> None:
    made = learner(llama, task("b", recipe, examples(16, 1)))
    begun = {name: factor.detach().clone() for name, factor in made.factors.items() if ".lora_A." in name}
    made.run()
    made.close()
    course = made.course
    assert (course.status, course.best, course.step) == ("diverged", best, step)
    assert course.reason == f"after step {step} its factors are not finite"
    assert bool(made.best) == (best is not None)
    if made.best:
        assert all(torch.equal(made.best[name.replace(".default", "")], factor) for name, factor in begun.items())


def test_a_task_whose_loss_is_not_finite(llama: nn.Module) -> None:
    """Its factors are, and what they give is not."""
    made = learner(llama, task("b", SHORT, examples(16, 1)))
    for factor in made.factors.values():
        factor.data.fill_(3e38)
    made.run()
    made.close()
    assert made.course.reason == "at step 1 its loss is nan" and not made.best
    assert all(factor.grad is None for factor in made.factors.values())


def test_a_loss_far_above_guessing_and_the_first_one_is_an_explosion(
    llama: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    twice = task("a", replace(SHORT, steps=2, held_out=0.0, evaluations=2), examples(16))
    first, second = learn(llama, twice).course.measured
    monkeypatch.setattr("logo.training.learner._EXPLODED", 0.0)
    monkeypatch.setattr("logo.training.learner._WORSE", second.train / first.train * 1.01)
    assert learn(llama, twice).course.status == "done"
    monkeypatch.setattr("logo.training.learner._WORSE", second.train / first.train * 0.99)
    again = learn(llama, twice).course
    said = (
        f"at step 2 its loss is {second.train:.1f}; it began at {first.train:.1f}, and guessing among all words has 4.6"
    )
    assert (again.reason, again.best) == (said, 1)


class Overflowing(torch.autograd.Function):
    """Gives what it gets, and a gradient that is not finite."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return gradient * math.inf


def test_a_gradient_that_is_not_finite_ends_the_task(llama: nn.Module) -> None:
    """Though its loss is finite; and the next task is what it would be."""
    layer = llama.get_submodule("model.layers.1.mlp")
    handle = layer.register_forward_hook(lambda module, inputs, output: Overflowing.apply(output))
    found = learn(llama, task("b", SHORT, examples(16, 1)))
    handle.remove()
    assert found.course.reason == "at step 1 its gradient is not finite" and not found.best
    assert learn(llama, task("c", SHORT, examples(16, 2))).course.status != "diverged"


def test_training_ends_without_patience(llama: nn.Module) -> None:
    hasty = Recipe(r=8, targets=("all-linear",), lr=0.1, epochs=40, batch_size=4, patience=2, evaluations=40)
    course = learn(llama, task("a", hasty, examples(20, 3))).course
    assert course.status == "early" and course.best is not None
    assert len([one for one in course.measured if one.step > course.best]) == 2 and course.step < 200


# -- copies of held-out rows ------------------------------------------------------------------------------------------


def test_copies_of_held_out_rows_are_not_learned_from() -> None:
    some = examples(20, 5)
    learned, held_out = split("a", Recipe(), (*some, *some))
    assert len(held_out) == 4 and not set(learned) & set(held_out)
    assert set(learned) | set(held_out) == set(some) and len(learned) == 40 - 2 * len(set(held_out))
    assert split("a", Recipe(held_out=0.0), (*some, *some)) == ((*some, *some), ())
    plain = split("a", Recipe(), some)
    assert len(plain[0]) == 18 and len(plain[1]) == 2  # nothing is lost where there are no copies
    assert split("a", Recipe(), some[:1] * 12) == (some[:1] * 12, ())  # nothing would be left to learn


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
    write_rows(tasks / "twice.jsonl", rows(12, 9) * 2)
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
        "logo: warning: task 'few' has 3 different rows: too few to hold any out, so it is trained for all of its "
        "steps without a held-out loss; give it 10 or more"
    ) in told.err.splitlines()
    lines = " ".join(told.out.split())
    assert "long: 1 prompts were longer than --max-length or the model's context and lost their beginning" in lines
    assert "twice: 2 rows are copies of held-out rows and were not trained on" in lines
    assert "failed a: several files have this name (a.csv, a.jsonl); rename all but one" in lines
    assert "failed b: after step 2 its factors are not finite; the adapter of step 1 is kept " in lines
    assert "failed c: after step 1 its factors are not finite; no adapter is kept" in lines
    assert "endless.jsonl, row 3: the completion has 51 tokens, and a row may have 20 with its prompt" in lines
    assert "failed empty: " in lines and "empty.jsonl: expected one JSON object per line" in lines
    assert lines.endswith(f"{pool}: 4 adapters trained, 5 failed")
    assert sorted(path.parent.name for path in pool.rglob("training.json")) == ["b", "few", "long", "twice"]
    assert sorted(json.loads((pool / "pool.json").read_text())["failed"]) == ["a", "b", "c", "empty", "endless"]
    before = (pool / "few" / "training.json").stat().st_mtime_ns
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert run([*asked, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["done"] == ["b", "few", "long", "twice"] and found["trained"] == [] and len(found["failed"]) == 5
    assert (pool / "few" / "training.json").stat().st_mtime_ns == before


def test_targets_that_are_wrong_are_met_before_anything_is_trained(
    base_model: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also those of a task whose turn is late."""
    more = with_recipe(tmp_path, tasks={"c": {"targets": "q_prj", "steps": 1}})
    assert run(command(base_model, tasks, tmp_path / "pool", *more)) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("logo: error: targets q_prj: ") and not list((tmp_path / "pool").rglob("*.safetensors"))
    more = with_recipe(tmp_path, tasks={"d": {"r": 4}})
    assert run(command(base_model, tasks, tmp_path / "pool", *more)) == 2
    assert "recipe: no task is called 'd'" in capsys.readouterr().err


def test_no_row_is_longer_than_the_models_context(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Positions behind it are an error with learned ones."""
    base_model = write_base(tmp_path / "base", "gpt2")
    tiny.model("gpt2", n_positions=32).save_pretrained(base_model)
    write_rows(tmp_path / "tasks" / "a.jsonl", [*rows(11, 8), {"context": "w3 " * 50, "completion": "w4"}])
    write_rows(tmp_path / "tasks" / "b.jsonl", [*rows(11, 8), {"context": "w3", "completion": "w4 " * 40}])
    assert run([*command(base_model, tmp_path / "tasks", tmp_path / "pool"), "--targets", "c_attn"]) == 1
    lines = " ".join(capsys.readouterr().out.split())
    assert "a: 1 prompts were longer than --max-length or the model's context and lost their beginning" in lines
    assert "row 12: the completion has 41 tokens, and a row may have 32 with its prompt; shorten it, since" in lines
    assert lines.endswith("1 adapters trained, 1 failed")


def test_training_again_replaces_its_own_examples_and_no_others(base_model: Path, tasks: Path, tmp_path: Path) -> None:
    pool = tmp_path / "pool"
    assert run(command(base_model, tasks, pool, "--examples", "0")) == 0
    assert not (pool / "b" / "examples.jsonl").exists()
    for name in "ab":
        write_rows(tasks / f"{name}.jsonl", rows(12, 7))
    assert run([*command(base_model, tasks, pool), "--retrain"]) == 0
    own = '{"prompt": "w3 w4"}\n'
    (pool / "a" / "examples.jsonl").write_text(own)
    for name in "abc":
        write_rows(tasks / f"{name}.jsonl", rows(12, 77))
    assert run([*command(base_model, tasks, pool), "--retrain"]) == 0
    assert (pool / "a" / "examples.jsonl").read_text() == own
    for name in "bc":
        written = (pool / name / "examples.jsonl").read_text().splitlines()
        assert [json.loads(line)["prompt"] for line in written] == [row["context"] for row in rows(12, 77)[:4]]
