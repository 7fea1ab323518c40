"""Recipes: what a YAML file, options and single tasks have to say, and what no recipe has."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st

import tiny
from logo.errors import StorageError, UsageError
from logo.training.recipe import Recipe, Recipes, read_recipes, targets_of
from logo.training.trainer import check_targets

names = st.text("abcd_", min_size=1, max_size=6)
recipes = st.builds(
    Recipe,
    r=st.integers(1, 64),
    alpha=st.floats(0.5, 64),
    rslora=st.booleans(),
    targets=st.lists(names, min_size=1, max_size=3).map(tuple),
    lr=st.floats(1e-6, 1.0),
    epochs=st.floats(0.1, 9),
    steps=st.none() | st.integers(1, 99),
    batch_size=st.integers(1, 32),
    max_length=st.integers(2, 4096),
    seed=st.integers(0, 9),
    warmup=st.floats(0, 0.9),
    schedule=st.sampled_from(["cosine", "linear", "constant"]),
    weight_decay=st.floats(0, 1),
    clip=st.floats(0.01, 9),
    held_out=st.floats(0, 0.9),
    evaluations=st.integers(1, 20),
    patience=st.none() | st.integers(1, 9),
)


ACTING = ("activation", "invocation")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipes") / "recipe.yaml"


def read(file: Path, text: str, **given: Any) -> Recipes:
    file.write_text(text)
    return read_recipes(file, given)


@given(recipe=recipes, data=st.data())
def test_what_is_said_last_counts(file: Path, recipe: Recipe, data: st.DataObject) -> None:
    """A file says some fields, options some, single tasks some: single tasks count most, then options."""
    known = st.lists(st.sampled_from([one.name for one in fields(Recipe) if one.name not in ACTING]), unique=True)
    other = data.draw(recipes, label="options")
    third = data.draw(recipes, label="task")
    in_file, given_, of_task = (data.draw(known) for _ in range(3))
    for layer in (in_file, given_, of_task):
        assume(not {"epochs", "steps"} <= set(layer))  # which is refused unless there are no steps
    raw = {name.replace("_", data.draw(st.sampled_from("-_"))): recipe.as_dict()[name] for name in in_file}
    raw["tasks"] = {"a*": {name: third.as_dict()[name] for name in of_task}}
    made = read(file, yaml.safe_dump(raw), **{name: getattr(other, name) for name in given_})
    expected = {name: getattr(Recipe(), name) for name in (one.name for one in fields(Recipe))}
    expected |= instead(in_file) | {name: getattr(recipe, name) for name in in_file}
    expected |= instead(given_) | {name: getattr(other, name) for name in given_}
    assert made.of("b") == made.usual == Recipe(**expected)
    assert made.of("ab") == Recipe(**expected | instead(of_task) | {name: getattr(third, name) for name in of_task})
    assert Recipe(**json.loads(json.dumps(made.of("ab").as_dict())) | {"targets": made.of("ab").targets}) == made.of(
        "ab"
    )


def instead(layer: list[str]) -> dict[str, None]:
    """Who says how many epochs takes back how many steps."""
    return {"steps": None} if "epochs" in layer else {}


@given(recipe=recipes, rows=st.integers(1, 3000))
def test_lengths(recipe: Recipe, rows: int) -> None:
    held_out = recipe.held_out_rows(rows)
    assert 0 <= held_out <= min(64, rows - 1)
    assert (held_out > 0) == (recipe.held_out > 0 and rows >= 10)
    steps = recipe.length(rows)
    if recipe.steps is not None:
        assert steps == recipe.steps
    else:
        assert steps == max(1, math.ceil(recipe.epochs * math.ceil(rows / recipe.batch_size)))


def test_later_entries_count_more_and_names_may_be_patterns() -> None:
    made = Recipes(Recipe(), {"word_*": {"r": 16, "lr": 1e-3}, "word_a": {"r": 4}, "*": {"seed": 5}})
    assert (made.of("word_a").r, made.of("word_b").r, made.of("other").r) == (4, 16, 8)
    assert made.of("word_a").lr == 1e-3 and {made.of(name).seed for name in ("word_a", "x")} == {5}
    made.check(["word_a", "other"])
    with pytest.raises(UsageError, match=r"no task is called 'word_a'\. Did you mean 'word_b'\?|'word_b'"):
        made.check(["word_b"])


def test_a_later_entry_may_give_steps_instead_of_epochs_and_epochs_instead_of_steps(file: Path) -> None:
    made = read(file, '{steps: 9, tasks: {"*": {epochs: 5}, a: {steps: 50}, "b*": {steps: 7}, bb: {epochs: 2}}}')
    assert [made.of(name).length(8) for name in ("a", "b", "bb", "c")] == [50, 7, 2, 5]


def test_an_invocation_and_another_activation_take_each_other_back(file: Path) -> None:
    text = "invocation: 'A:'\ntasks: {a: {activation: 'last:2'}, b: {activation: everywhere}, c: {invocation: 'B:'}}\n"
    made = read(file, text)
    assert made.usual == Recipe(activation="invocation", invocation="A:")
    assert made.of("a") == Recipe(activation="last:2") and made.of("b") == Recipe()
    assert made.of("c") == Recipe(activation="invocation", invocation="B:")
    assert read(file, text, activation="last:3").usual == Recipe(activation="last:3")
    assert read(file, "activation: 'last:3'", invocation="A:").usual == made.usual
    assert read(file, "activation: activated").usual.activation == "activated"


def test_numbers_as_yaml_reads_them(file: Path) -> None:
    """YAML 1.1 takes 2e-3 for a text."""
    assert yaml.safe_load("lr: 2e-3") == {"lr": "2e-3"}
    made = read(file, "lr: 2e-3\nalpha: 32\nweight-decay: 0\ntargets: q_proj, k_proj\npatience: null\n")
    assert made.usual == Recipe(lr=0.002, alpha=32.0, weight_decay=0.0, targets=("q_proj", "k_proj"), patience=None)
    assert isinstance(made.usual.alpha, float)
    assert read(file, "").usual == Recipe() and read_recipes(None, {"r": 2}).usual == Recipe(r=2)
    assert read(file, "targets: [all-linear]").usual.lora().target_modules == "all-linear"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: 1", "unknown field 'learning_rate'"),
        ("tasks: {a: {epoch: 1}}", "task 'a': unknown field 'epoch'.*'epochs'"),
        ("tasks: [a, b]", "'tasks' must hold names of tasks with their own values, found "),
        ("tasks: {a: {r: 0}}", "r: expected 1 or more, found 0"),
        ("{epochs: 2, steps: 10}", "either epochs or steps"),
        ("- r", "expected fields such as `lr: 0.001`, found list"),
        ("r: [", "is not valid YAML: "),
        ("r: eight", "r: expected int, found 'eight'"),
        ("r: true", "r: expected int, found True"),
        ("steps: many", "steps: expected int or nothing, found 'many'"),
        ("lr: .nan", "lr: expected a number above 0, found nan"),
        ("weight_decay: .inf", "weight_decay: expected 0 or more, found inf"),
        ("warmup: 1", "warmup: expected a share from 0 to below 1, found 1"),
        ("schedule: cosin", "schedule: expected one of cosine, linear, constant, found 'cosin'"),
        ("activation: late", "activation: expected everywhere, invocation or last:N, found 'late'"),
        ("activation: last:0", "invocation or last:N, found 'last:0'; N is 1 or more"),
        ("activation: invocation", "activation invocation: give the text"),
        ("{activation: last:2, invocation: A}", "give either an invocation or activation last:2, found both"),
        ("tasks: {a: {activation: activated, invocation: A}}", "give either an invocation or activation activated"),
        ("targets: ''", "targets: expected names of modules or all-linear"),
        ("max_length: 1", "max_length: expected 2 or more, found 1"),
    ],
)
def test_what_no_recipe_has(text: str, message: str, file: Path) -> None:
    with pytest.raises(UsageError, match=message):
        read(file, text)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"recipe .*none\.yaml: cannot be read \(No such file"):
        read_recipes(tmp_path / "none.yaml", {})
    (tmp_path / "bytes.yaml").write_bytes(b"r: \xff\xfe")
    with pytest.raises(UsageError, match=r"bytes\.yaml: is not valid YAML"):
        read_recipes(tmp_path / "bytes.yaml", {})


def test_targets_that_cannot_be_trained() -> None:
    for targets, message in [
        ("q_prj", "targets q_prj: .*q_prj"),
        ("lm_head", "lm_head is the output head, which cannot be trained here; leave it out"),
        ("q_proj,lm_head", "targets q_proj, lm_head: lm_head is the output head"),
        ("embed_tokens", "embed_tokens is not a linear module"),
        ("input_layernorm", "targets input_layernorm: "),
    ]:
        with pytest.raises(UsageError, match=message):
            check_targets(tiny.model("llama"), Recipe(targets=targets_of(targets)))
