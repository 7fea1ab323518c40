"""The scripts in `benchmarks/`: that each part measures what its name says. The measured numbers are not tested."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import cost
import long_rows
from cost import RATIOS, Plan
from logo import AdapterPool, LoGo, SelectionSettings
from parts import Lengths, exactly
from peft_arm import PeftArm
from synthetic import Sizes, base_model, prompts, random_mixtures, related_mixtures, write_adapters
from tolerances import same_weights

SMALL = Sizes(hidden=64, layers=3, heads=4, vocabulary=256, rank=2)
SHORT = Lengths(prompt=8, asked=6, new=2, known=70, rest=4)


def test_every_ratio_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = tmp_path / "cost.json"
    plan = Plan(sizes=SMALL, layer=replace(SMALL, layers=1), adapters=6, k=2, lengths=SHORT)
    cost.main(["--rounds", "1", "--json", str(found)], plan)
    report = json.loads(found.read_text())
    assert list(report) == ["about", "ratios", "parts"] and list(report["ratios"]) == list(RATIOS)
    arms = {
        name: {arm: timed["seconds"] for arm, timed in part["arms"].items()} for name, part in report["parts"].items()
    }
    opened, end = arms["open pool"], arms["end to end, batch 1"]
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


def test_related_rows_overlap_as_measured() -> None:
    names = tuple(f"{i:03}" for i in range(260))
    rows = [set(row) for row in related_mixtures(names, 400, 20)]
    assert all(len(row) == 20 for row in rows)
    pairs = [len(rows[i] & rows[i + 4]) for i in range(0, 396)]
    assert sum(pairs) / len(pairs) == pytest.approx(18.3, abs=0.3)
    fours = [len(rows[i] | rows[i + 4] | rows[i + 8] | rows[i + 12]) for i in range(0, 380)]
    assert sum(fours) / len(fours) == pytest.approx(23.3, abs=0.4)
    assert all(sum(row.values()) == pytest.approx(1) for row in related_mixtures(names, 4, 20))
    assert all(len(row) == 20 for row in random_mixtures(names, 4, 20))


class Words:
    """A tokenizer whose tokens are words."""

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[str]]:
        return {"input_ids": text.split()}

    def decode(self, tokens: list[str]) -> str:
        return " ".join(tokens)


def test_long_rows_place_the_task_as_their_condition_says(tmp_path: Path) -> None:
    plural, other = "Say the plural.\n\nNoun: cat\nPlural:", f"Do it.\n\nText: {'foreign ' * 9}\nAnswer:"
    for name, context in (("plural", plural), ("other", other)):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"context": context, "completion": "cats"}) + "\n")
    tokenizer: Any = Words()
    make = long_rows.Prompts(tmp_path, tokenizer)
    made = {condition: make("plural", 0, condition, 0) for condition in long_rows.CONDITIONS}
    assert made["short"] == plural
    for condition, prompt in made.items():
        size = int(condition.partition("-")[2] or 0)
        assert prompt.split().count("foreign") == size
        places = [prompt.index(part) for part in ("Say the plural.", "Noun: cat", "Plural:")]
        assert places == sorted(places)
    places = [made[f"{place}-500"].index("foreign") for place in ("before", "around", "cued", "after")]
    assert places == [0, len("Say the plural.\n\n"), len(plural) - len("\nPlural:") + 2, len(plural) + 2]
    where = [made[name].index("Say the plural.") for name in ("first", "middle", "last")]
    assert where == sorted(where) and where[0] == 0
