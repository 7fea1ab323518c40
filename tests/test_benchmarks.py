"""What stands beside the package. The scripts in `benchmarks/`: each part measures what its name says; the measured
numbers are not tested. And how the bundled demo world is made: what its rows promise, its tokenizer, and the assets
that ship."""

from __future__ import annotations

import json
import random
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import cost
from cost import RATIOS, Plan
from demo_world import tasks
from demo_world.build import write_model
from demo_world.pretrain import PretrainConfig, pretrain
from demo_world.tasks import TASKS, Task
from demo_world.tokenizer import build_tokenizer
from demo_world.train_adapters import CONFIG, train_adapters, write_shipped, write_training_rows
from logo import AdapterPool, LoGo, SelectionSettings, demo
from logo.models import load_base
from parts import Lengths, exactly
from peft_arm import PeftArm
from synthetic import Sizes, base_model, prompts, write_adapters
from tolerances import same_weights

pytestmark = pytest.mark.slow

SMALL = Sizes(hidden=64, layers=3, heads=4, vocabulary=256, rank=2)
SHORT = Lengths(prompt=8, asked=6, new=2, known=70, rest=4)


def test_every_ratio_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = tmp_path / "cost.json"
    plan = Plan(sizes=SMALL, layer=replace(SMALL, layers=1), adapters=6, k=2, lengths=SHORT)
    cost.main(["--rounds", "1", "--json", str(found)], plan)
    report = json.loads(found.read_text())
    assert list(report) == ["about", "ratios", "parts"] and list(report["ratios"]) == list(RATIOS)
    opened, end = (
        {arm: timed["seconds"] for arm, timed in report["parts"][name]["arms"].items()}
        for name in ("open pool", "end to end, batch 1")
    )
    assert report["ratios"]["open_vs_peft"] == pytest.approx(opened["cold"] / opened["PEFT"])  # a cost: ours to theirs
    assert report["ratios"]["e2e1_vs_peft"] == pytest.approx(end["PEFT"] / end["norm"])  # a speed: ours to theirs
    assert report["ratios"]["e2e1_vs_base"] == pytest.approx(end["calibrated"] / end["base"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in RATIOS) and "medians of 1 rounds" in shown and "6 adapters, k 2" in shown
    assert report["about"]["hardware"] in shown


def test_peft_does_the_same_method(tmp_path: Path) -> None:
    """Same adapters, weights and tokens: what is compared is the same work."""
    write_adapters(tmp_path, SMALL, 6, seed=3)
    for one in tmp_path.iterdir():  # strong enough to change answers
        tensors = load_file(one / "adapter_model.safetensors")
        save_file({key: 12 * value for key, value in tensors.items()}, one / "adapter_model.safetensors")
    arm = PeftArm(*base_model(SMALL), tmp_path, 3)
    logo = LoGo(*base_model(SMALL), AdapterPool.open(tmp_path), settings=SelectionSettings("norm", k=3))
    config = exactly(8)
    asked = prompts(SMALL, 4, 12)
    ours = logo.generate(asked, generation_config=config, batch_size=4)
    plain = logo.generate(asked, adapters={}, generation_config=config, batch_size=4)
    assert [answer.token_ids for answer in ours] != [answer.token_ids for answer in plain]
    for prompt, answer in zip(asked, ours, strict=True):
        weights = arm.select(prompt)
        assert list(weights) == list(answer.selection.adapters)
        assert list(weights.values()) == same_weights(list(answer.selection.weights))
        assert arm.answer(prompt, config) == list(answer.token_ids)
        assert arm.answer_active(prompt, config) == list(answer.token_ids)
    assert arm.answer_batch(asked, config) == [list(answer.token_ids) for answer in ours]


# -- the demo world ----------------------------------------------------------------------------------------------------

_TOKENIZER = build_tokenizer()
BY_TASK = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
TINY = PretrainConfig(steps=2, batch=4, hidden=32, layers=3, heads=2, intermediate=48)


@BY_TASK
def test_held_out_inputs_never_meet_their_instruction_in_training(task: Task) -> None:
    """Phrasings, too, are others."""

    def payload_of(row: tasks.Row) -> str:
        return " and ".join(row.context[left:right].strip("'\"") for left, right in row.spans)

    assert len(set(task.train_templates)) >= 12 and len(set(task.held_out_templates)) >= 4
    assert {line for other in TASKS for line in other.train_templates}.isdisjoint(task.held_out_templates)

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


def test_a_tiny_world_is_pretrained_and_its_adapters_ship_as_half_floats(tmp_path: Path) -> None:
    lines: list[str] = []
    model, again = (pretrain(_TOKENIZER, TINY, 0, lines.append) for _ in range(2))
    assert all(torch.allclose(value, again.state_dict()[name], atol=1e-5) for name, value in model.state_dict().items())
    write_model(again, _TOKENIZER, tmp_path / "model")
    write_training_rows(tmp_path / "rows", 0, count=8)
    config = replace(CONFIG, r=4, alpha=8, steps=2, batch_size=4)
    losses = train_adapters(tmp_path / "model", tmp_path / "rows", tmp_path / "pool", config)
    assert set(losses) == {task.name for task in TASKS} and all(loss > 0 for loss in losses.values())
    write_shipped(tmp_path / "pool", tmp_path / "adapters")
    folder, made = tmp_path / "adapters" / "plural", tmp_path / "pool" / "plural"
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".jsonl", ".safetensors"]
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


def test_assets_are_small_and_name_no_machine() -> None:
    shipped = [path for path in demo.assets_dir().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in shipped) <= 12_000_000
    for path in shipped:
        if path.suffix in (".json", ".jsonl", ".md", ".txt"):
            text = path.read_text(encoding="utf-8")
            for place in (Path.home(), Path(tempfile.gettempdir()), Path(__file__).parent.parent):
                assert str(place) not in text, path
    assert {path.name for path in demo.adapters_dir().iterdir()} == {task.name for task in TASKS} | {"pool.json"}


def test_the_shipped_rows_are_those_of_the_generator() -> None:
    seed = json.loads((demo.assets_dir() / "world.json").read_text(encoding="utf-8"))["seed"]
    shown = demo.heldout()
    assert set(shown) == {task.name for task in TASKS}
    for task in TASKS:
        rows = tasks.held_out_rows(task, len(shown[task.name]), seed)
        assert len(rows) >= 40
        assert shown[task.name] == [{"context": row.context, "completion": row.completion} for row in rows]
    assert [row["task"] for row in demo.showcase()] == [task.name for task in TASKS]


def test_the_model_is_small_and_has_this_tokenizer() -> None:
    model, tokenizer = load_base("demo", device="cpu")
    assert sum(parameter.numel() for parameter in model.parameters()) <= 4_200_000
    assert model.config.max_position_embeddings == 512
    text = "Write the plural of 'box'."
    assert tokenizer(text)["input_ids"] == _TOKENIZER(text)["input_ids"]
    assert tokenizer(text)["input_ids"][0] == tokenizer.bos_token_id and len(tokenizer) < 800
    assert _TOKENIZER.tokenize("the hot") == ["the", "Ġ", "h", "o", "t"]  # words of requests are whole
    assert tokenizer.pad_token_id is not None and tokenizer.eos_token_id is not None
