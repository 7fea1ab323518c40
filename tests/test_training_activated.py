"""Adapters that are trained to act from a place in the prompt on: as PEFT's aLoRA."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from learning import ATTENTION, command, contents, examples, gap, learn, rows, task, write_base, write_rows
from logo import AdapterPool, LoGo, SelectionSettings
from logo.adapters.activation import Activation
from logo.cli.app import run
from logo.errors import DataError
from logo.models import load_tokenizer
from logo.training.activation import Settling
from logo.training.examples import Example, encode
from logo.training.recipe import Recipe
from logo.training.tasks import Pair, Task
from make_adapters import edit_config, load_peft, write
from test_engine import tokenizer
from test_training_equal import KINDS, REST, STEPS, check_equal, collated, told

INVOKE = (95, 7)
ACTIVATIONS = {"invocation": Activation(INVOKE), "last:3": Activation(last=3)}
# Opens the assistant's turn with two tokens.
TEMPLATE = (
    "{% for m in messages %}{{ m.role | replace('user', 'w80 w81') | replace('assistant', 'w82 w83') }} "
    "{{ m.content }} {% endfor %}{% if add_generation_prompt %}w82 w83{% endif %}"
)


def activated(some: Sequence[Example], activation: Activation, seed: int = 0) -> tuple[Example, ...]:
    """Rows whose prompts activate an adapter; those of an invocation have it at some place."""
    dice, made = random.Random(seed), []
    for row in some:
        prompt, completion = list(row.ids[: row.prompt]), row.ids[row.prompt :]
        place = dice.randrange(1, len(prompt) + 1)
        prompt[place:place] = activation.tokens
        begin = activation.begin(prompt)
        assert begin is not None
        made.append(Example((*prompt, *completion), len(prompt), begin))
    return tuple(made)


# -- what is computed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("said", list(ACTIVATIONS))
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_the_one_that_peft_and_the_trainer_make(kind: str, said: str, tmp_path: Path) -> None:
    """The same rows in the same order, 20 steps in float32. PEFT finds invocations itself, and is told last tokens."""
    activation = ACTIVATIONS[said]
    recipe = Recipe(r=3, alpha=6, targets=ATTENTION[kind], lr=3e-3, steps=STEPS, batch_size=4, **REST)
    some = activated(examples(24, seed=3), activation)
    how = collated if activation.tokens else told
    expected = check_equal(kind, task("task", recipe, some), tmp_path, activation.tokens or INVOKE, how)
    plain = learn(tiny.model(kind), task("task", recipe, [replace(row, begin=0) for row in some]))
    assert gap(plain.factors, expected) > 1e-2  # where it acts does matter


# -- what is written ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model whose template opens turns, and tasks: texts that all end alike, and conversations."""
    root = tmp_path_factory.mktemp("activated")
    write_base(root / "base", template=TEMPLATE)
    for number, name in enumerate(("a", "deep/b", "c")):
        some = [{**row, "context": f"{row['context']} w88 w89"} for row in rows(12, number)]
        write_rows(root / "texts" / f"{name}.jsonl", some)
        asked = [[{"role": "user", "content": row["context"]}] for row in some]
        turns = [
            {"messages": [*before, {"role": "assistant", "content": row["completion"]}]}
            for row, before in zip(some, asked, strict=True)
        ]
        write_rows(root / "chats" / f"{name}.jsonl", turns)
    return root


def trained(world: Path, pool: Path, *more: str, tasks: str = "texts") -> int:
    return run(command(world / "base", world / tasks, pool, *more))


MADE = {
    "last": ("texts", ["--activated"], Activation(last=4), "last:4"),
    "invocation": ("texts", ["--invocation", "w88 w89"], Activation((88, 89)), "invocation"),
    "chats": ("chats", ["--activated"], Activation((82, 83)), "invocation"),
}


@pytest.fixture(params=list(MADE), scope="module")
def made(request: pytest.FixtureRequest, world: Path) -> tuple[str, Path]:
    """A pool of three tasks."""
    tasks, asked, _, _ = MADE[request.param]
    pool = world / request.param
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert trained(world, pool, *asked, tasks=tasks) == 0
    return request.param, pool


def test_the_pool_says_where_its_adapters_act(made: tuple[str, Path]) -> None:
    name, pool = made
    _, _, activation, said = MADE[name]
    noted = json.loads((pool / "pool.json").read_text())
    assert noted["activation"] == said and noted["recipe"]["activation"] == said
    opened = AdapterPool.open(pool, on_bad_adapter="error")
    assert [str(one.activation) for one in opened] == [said] * 3 and opened.read_once
    assert {one.activation for one in opened} == {activation}
    for one in ("a", "deep/b", "c"):
        config = json.loads((pool / one / "adapter_config.json").read_text())
        assert config["alora_invocation_tokens"] == (list(activation.tokens) or None)
        recipe = json.loads((pool / one / "training.json").read_text())["recipe"]
        assert recipe["activation"] == said and bool(activation.tokens) == bool(recipe["invocation"])


def test_logo_and_peft_answer_alike(made: tuple[str, Path], world: Path) -> None:
    """Also an adapter that acts on the last tokens, where PEFT is told how many."""
    name, pool = made
    activation = MADE[name][2]
    base = tiny.model("llama", eos_token_id=None)
    settings = SelectionSettings.of(signal="norm", k=1, cache="")
    logo = LoGo(base, tokenizer(bos=False), AdapterPool.open(pool), settings=settings)
    for folder in ("a", "deep/b"):
        adapter = pool / folder
        if not activation.tokens:
            adapter = world / f"{name} as aLoRA" / folder
            adapter.mkdir(parents=True)
            for file in ("adapter_config.json", "adapter_model.safetensors"):
                (adapter / file).write_bytes((pool / folder / file).read_bytes())
            edit_config(adapter, alora_invocation_tokens=[95])  # without any it would act everywhere
        reference: Any = load_peft(adapter, tiny.model("llama", eos_token_id=None))
        differ = 0
        for prompt in tiny.prompts([9, 20, 5, 40]):
            asked = [*prompt, *activation.tokens]
            ids = torch.tensor([asked])
            told = {} if activation.tokens else {"alora_offsets": [activation.last]}
            want = reference.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, **told
            )
            answer = logo.generate(asked, adapters={folder: 1.0}, max_new_tokens=8)
            assert list(answer.token_ids) == want[0, len(asked) :].tolist()
            differ += answer.token_ids != logo.generate(asked, adapters={}, max_new_tokens=8).token_ids
        assert differ  # it does something


# -- what cannot be ----------------------------------------------------------------------------------------------------


def test_options_and_recipes_that_contradict_each_other(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("activation: 'last:3'\ntasks: {deep/b: {activation: everywhere}}\n")
    for asked, message in (
        (["--invocation", "w88", "--last", "3"], "give either --invocation or --last, found both"),
        (
            ["--recipe", str(file)],
            "a pool has one activation: task 'a' has last:3, and 'deep/b' has everywhere; give --last N or "
            "--invocation TEXT for all, or train them into two pools",
        ),
    ):
        assert trained(world, tmp_path / "pool", *asked) == 2
        assert capsys.readouterr().err.splitlines()[-1] == f"logo: error: {message}"
    assert not list(tmp_path.rglob("adapter_model.safetensors"))


def test_a_folder_of_adapters_of_another_activation(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever made them, and whatever task is asked for; the folder stays as it is."""
    pool = tmp_path / "pool"
    assert trained(world, pool, "--last", "3", "--tasks", "a") == 0

    def told(*more: str) -> str:
        before = contents(pool)
        assert trained(world, pool, "--tasks", "c", *more) == 2
        assert contents(pool) == before
        return capsys.readouterr().err.splitlines()[-1].removeprefix("logo: error: ")

    assert told() == f"{pool / 'a'}: has activation last:3, and everywhere is asked for; name another --out"
    assert "has activation last:3, and last:2 is asked for" in told("--last", "2", "--retrain")
    (pool / "pool.json").unlink()
    assert "has activation last:3" in told()
    write(pool / "z", alora_invocation_tokens=[5])
    assert f"{pool / 'z'}: has activation invocation (tokens [5]), and last:3 is asked for" in told("--last", "3")
    (pool / "z" / "adapter_config.json").write_text("{")  # which no pool opens
    assert trained(world, pool, "--last", "3", "--tasks", "c") == 0
    assert json.loads((pool / "pool.json").read_text())["activation"] == "last:3"
    write_rows(tmp_path / "none" / "bad.jsonl", [{"context": "w3"}])
    assert run(command(world / "base", tmp_path / "none", pool)) == 1  # nothing to train: it says what it said
    assert json.loads((pool / "pool.json").read_text())["activation"] == "last:3"


def test_prompts_that_lack_the_invocation_fail_their_task_only(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, context in {"fine": "w3 w88 w89", "lacking": "w3 w88", "long": f"w88 w89 {'w5 ' * 30}w6"}.items():
        some = [{"context": "w4 w88 w89", "completion": "w4"}] * 10
        write_rows(tmp_path / "tasks" / f"{name}.jsonl", [*some, {"context": context, "completion": "w3"}])
    asked = ["--invocation", "w88 w89", "--max-length", "20"]
    assert run(command(world / "base", tmp_path / "tasks", tmp_path / "pool", *asked)) == 1
    told = " ".join(capsys.readouterr().out.split())
    end = "fix the row, or give --last N, or an --invocation that all prompts contain"
    lacking = "lacking.jsonl, row 11: expected the invocation 'w88 w89' in the prompt, found '<s> w3 w88' at its end"
    assert "failed lacking: " in told and f"{lacking}; {end}" in told
    assert "long.jsonl, row 11: " in told and "w6' at its end (--max-length may have cut it off)" in told
    assert AdapterPool.open(tmp_path / "pool").names == ("fine",)


def settled(asked: Task, recipe: Recipe, settling: Settling, tokens: Any) -> Any:
    return settling.settle(asked, recipe, encode(tokens, asked, recipe.max_length).rows)


def asking(*contexts: str, name: str = "t") -> Task:
    return Task(name, f"{name}.jsonl", tuple(Pair(context, "x") for context in contexts))


def test_tokens_are_those_that_the_text_has_in_prompts() -> None:
    """On a tokenizer that keeps the space before a word in its token."""
    tokens = load_tokenizer("demo")
    recipe = Recipe(activation="invocation", invocation="Answer:")
    settling = Settling(tokens)
    found = settled(asking("One? Answer:", "Answer: or not? Two? Answer:"), recipe, settling, tokens)
    assert tokens.convert_ids_to_tokens(list(found.invocation)) == ["\u0120Answer", ":"]
    assert [row.begin for row in found.rows] == [row.prompt - 2 for row in found.rows]
    at_line = Settling(tokens)
    other = settled(asking("One?\nAnswer:"), recipe, at_line, tokens)
    assert tokens.convert_ids_to_tokens(list(other.invocation)) == ["Answer", ":"]
    # One that was settled holds for the tasks that follow, and for the rows that follow.
    said = (
        r"u.jsonl, row 2: the tokenizer splits the invocation 'Answer:' differently here: expected tokens "
        r"\['Answer', ':'\], found \['\u0120Answer', ':'\]"
    )
    with pytest.raises(DataError, match=said):
        settled(asking("Two?\nAnswer:", "Three? Answer:", name="u"), recipe, at_line, tokens)
    inside = r"t\.jsonl, row 1: .*expected tokens \['n', 's', 'w', 'e', 'r'\], found \['Answer'\]"
    with pytest.raises(DataError, match=inside):
        settled(asking("Two?\nAnswer:"), replace(recipe, invocation="nswer"), Settling(tokens), tokens)


def test_a_template_that_opens_no_turn() -> None:
    asked = Task("t", "t.jsonl", (Pair(({"role": "user", "content": "w4"},), "w5"),))
    recipe, tokens = Recipe(activation="activated"), tokenizer()
    assert settled(asked, recipe, Settling(tokens), tokens).recipe.activation == "last:4"  # no template: texts
    tokens.chat_template = "{% for m in messages %}w9 {{ m.content }} {% endfor %}"
    with pytest.raises(DataError, match=r"t\.jsonl: the chat template writes nothing that opens the assistant's turn"):
        settled(asked, recipe, Settling(tokens), tokens)


def test_an_invocation_in_the_completion_does_not_count() -> None:
    """PEFT would take the last one of all that is read; when it is asked, only the prompt is there."""
    asked = Task("t", "t.jsonl", (Pair("w3 w88 w4", "w88 w5"),))
    tokens = tokenizer()
    [row] = settled(asked, Recipe(activation="invocation", invocation="w88"), Settling(tokens), tokens).rows
    assert row.begin == 2 < row.prompt == 4
