"""The bundled demo world: what its rows promise, its tokenizer, and the assets that ship."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM

from demo_world import tasks
from demo_world.build import write_model
from demo_world.evaluate import greedy, load_deltas, mixed, normalise
from demo_world.pretrain import PretrainConfig, pretrain
from demo_world.tasks import TASKS, Task
from demo_world.tokenizer import build_tokenizer
from demo_world.train_adapters import CONFIG, train_adapters, write_shipped, write_training_rows
from logo import demo
from logo.rows import read_rows
from logo.training.rows import task_files
from tolerances import WEIGHTS

_TOKENIZER = build_tokenizer()
BY_TASK = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
SMALL = PretrainConfig(steps=2, batch=4, hidden=32, layers=3, heads=2, intermediate=48)


@pytest.fixture(scope="module")
def loaded() -> tuple[LlamaForCausalLM, AutoTokenizer]:
    model = LlamaForCausalLM.from_pretrained(demo.model_dir(), dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(demo.model_dir())


def payload_of(row: tasks.Row) -> str:
    return " and ".join(row.context[left:right].strip("'\"") for left, right in row.spans)


@BY_TASK
def test_phrasings_are_many_and_disjoint(task: Task) -> None:
    train, held = task.train_templates, task.held_out_templates
    assert len(set(train)) >= 12
    assert len(set(held)) >= 4
    everything_trained = {line for other in TASKS for line in other.train_templates}
    assert everything_trained.isdisjoint(held)


@BY_TASK
def test_held_out_inputs_never_meet_their_instruction_in_training(task: Task) -> None:
    rng = random.Random(5)
    held = {payload_of(row) for row in tasks.held_out_rows(task, 48, 0)}
    assert len(held) >= 12
    for _ in range(400):
        assert payload_of(tasks.train_row(task, rng)) not in held
        assert payload_of(tasks.chat_row(task, rng)) not in held
    for _ in range(400):
        row = tasks.foreign_row(rng.choice(TASKS), rng)
        assert row.asked != row.task
        assert row.asked != task.name or payload_of(row) not in held
        # Where a rule answers, its held-out inputs are in no training at all.
        assert task.closed or not tasks.is_held_out(task, payload_of(tasks.foreign_row(task, rng)))


def test_rows_depend_on_the_seed_alone() -> None:
    def draw(seed: int) -> list[tasks.Row]:
        rng = random.Random(seed)
        return [make(task, rng) for task in TASKS for make in (tasks.train_row, tasks.foreign_row, tasks.chat_row)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert tasks.held_out_rows(TASKS[0], 48, 3) == tasks.held_out_rows(TASKS[0], 48, 3)


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=60))
def test_tokenizer_decodes_back(text: str) -> None:
    ids = _TOKENIZER(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert _TOKENIZER.decode(ids) == text
    assert _TOKENIZER(text)["input_ids"][0] == _TOKENIZER.bos_token_id


def test_words_of_requests_are_whole_and_payloads_are_spelled() -> None:
    pieces = _TOKENIZER.tokenize("What is the opposite of hot?")
    assert pieces == ["What", "Ġis", "Ġthe", "Ġopposite", "Ġof", "Ġ", "h", "o", "t", "?"]
    assert len(_TOKENIZER) < 800


def test_the_training_rows_are_what_logo_train_reads(tmp_path: Path) -> None:
    write_training_rows(tmp_path, 0, count=20)
    found = task_files(tmp_path)
    assert set(found) == {task.name for task in TASKS}
    held = {name: {row["context"] for row in rows} for name, rows in demo.heldout().items()}
    for name, file in found.items():
        rows = read_rows(file)
        assert len(rows) == 20 and held[name].isdisjoint(row.context for row in rows)


def test_a_tiny_world_is_pretrained_and_its_adapters_ship_as_half_floats(tmp_path: Path) -> None:
    lines: list[str] = []
    model = pretrain(_TOKENIZER, SMALL, 0, lines.append)
    again = pretrain(_TOKENIZER, SMALL, 0, lines.append)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    assert all(torch.allclose(value, again.state_dict()[name], atol=1e-5) for name, value in weights.items())
    write_model(again, _TOKENIZER, tmp_path / "model")
    write_training_rows(tmp_path / "rows", 0, count=8)
    config = replace(CONFIG, r=4, alpha=8, steps=2, batch_size=4)
    losses = train_adapters(tmp_path / "model", tmp_path / "rows", tmp_path / "pool", config)
    assert set(losses) == {task.name for task in TASKS} and all(loss > 0 for loss in losses.values())
    write_shipped(tmp_path / "pool", tmp_path / "adapters")
    folder, made = tmp_path / "adapters" / "plural", tmp_path / "pool" / "plural"
    names = {"adapter_config.json", "adapter_model.safetensors", "examples.jsonl"}
    assert {path.name for path in folder.iterdir()} == names
    shipped, rows = (
        [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        for file in (folder / "examples.jsonl", tmp_path / "rows" / "plural.jsonl")
    )
    assert [one["prompt"] for one in shipped] == [row["context"] for row in rows[:4]]
    written, before = (json.loads((at / "adapter_config.json").read_text(encoding="utf-8")) for at in (folder, made))
    assert written == before | {"base_model_name_or_path": "demo"}
    tensors, exact = (load_file(at / "adapter_model.safetensors") for at in (folder, made))
    assert exact.keys() == tensors.keys()
    assert all(torch.equal(tensors[name], value.half()) for name, value in exact.items())
    deltas = load_deltas(folder)
    assert set(deltas) == {
        f"model.layers.{i}.self_attn.{part}" for i in range(SMALL.layers) for part in ("q_proj", "v_proj")
    }
    with mixed(model, [(deltas, 0.5)]):
        changed = model.state_dict()["model.layers.0.self_attn.v_proj.weight"].clone()
    name = "model.layers.0.self_attn.v_proj"
    assert torch.allclose(changed, weights[f"{name}.weight"] + 0.5 * deltas[name], atol=WEIGHTS)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def shipped() -> Iterator[Path]:
    return (path for path in demo.assets_dir().rglob("*") if path.is_file())


def test_assets_are_small_and_name_no_machine() -> None:
    assert sum(path.stat().st_size for path in shipped()) <= 12_000_000
    for path in shipped():
        if path.suffix in (".json", ".jsonl", ".md", ".txt"):
            text = path.read_text(encoding="utf-8")
            for place in (Path.home(), Path(tempfile.gettempdir()), Path(__file__).parent.parent):
                assert str(place) not in text, path
    assert {path.name for path in demo.adapters_dir().iterdir()} == {task.name for task in TASKS} | {"pool.json"}


def world() -> dict[str, Any]:
    """The record of the build."""
    measured: dict[str, Any] = json.loads((demo.assets_dir() / "world.json").read_text(encoding="utf-8"))
    return measured


def test_the_shipped_rows_are_those_of_the_generator() -> None:
    seed = world()["seed"]
    shown = demo.heldout()
    assert set(shown) == {task.name for task in TASKS}
    for task in TASKS:
        rows = tasks.held_out_rows(task, len(shown[task.name]), seed)
        assert len(rows) >= 40
        assert shown[task.name] == [{"context": row.context, "completion": row.completion} for row in rows]
    assert [row["task"] for row in demo.showcase()] == [task.name for task in TASKS]


def test_the_build_met_its_targets() -> None:
    average = world()["average"]
    assert average["base"] <= 0.30
    assert average["oracle"] >= 0.85
    assert average["uniform"] < average["oracle"] - 0.3
    assert average["foreign"] < 0.2


def test_model_size_and_tokenizer(loaded: tuple[LlamaForCausalLM, AutoTokenizer]) -> None:
    model, tokenizer = loaded
    assert sum(parameter.numel() for parameter in model.parameters()) <= 4_200_000
    assert model.config.max_position_embeddings == 512
    text = "Write the plural of 'box'."
    assert tokenizer(text)["input_ids"] == _TOKENIZER(text)["input_ids"]
    assert tokenizer(text)["input_ids"][0] == tokenizer.bos_token_id
    assert tokenizer.pad_token_id is not None and tokenizer.eos_token_id is not None


@pytest.mark.slow
def test_own_adapters_answer_and_the_base_does_not(loaded: tuple[LlamaForCausalLM, AutoTokenizer]) -> None:
    model, tokenizer = loaded
    rows = {name: held[:6] for name, held in demo.heldout().items()}

    def matches(answering: LlamaForCausalLM, name: str) -> int:
        answers = greedy(answering, tokenizer, [row["context"] for row in rows[name]])
        golds = [row["completion"] for row in rows[name]]
        return sum(normalise(answer) == normalise(gold) for answer, gold in zip(answers, golds, strict=True))

    total = sum(map(len, rows.values()))
    assert sum(matches(model, name) for name in rows) / total <= 0.3
    peft: PeftModel | None = None
    own = 0
    for name in rows:
        folder = str(demo.adapters_dir() / name)
        if peft is None:
            peft = PeftModel.from_pretrained(model, folder, adapter_name=name)
        else:
            peft.load_adapter(folder, adapter_name=name)
        peft.set_adapter(name)
        own += matches(peft.eval().base_model.model, name)
    assert own / total >= 0.75
