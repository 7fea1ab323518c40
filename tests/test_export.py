"""A mixture written down as one PEFT adapter: PEFT and our own reader answer with it as the engine does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tiny
from logo import AdapterPool, LoGo, StorageError, UsageError
from logo.cli.app import run
from logo.mixing.mixer import Mixture
from make_adapters import load_peft, lora_layers
from test_engine import PROMPTS, engine, ids_of, write_adapter
from tolerances import same_tensor

MIXTURE = {"tasks/t0": 0.5, "tasks/t2": -0.25, "tasks/t3": 2.0, "tasks/t1": 0.0}  # unequal ranks and targets


def logits(model: nn.Module, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.tensor([ids])).logits
    return found


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_peft_and_our_reader_answer_with_it(name: str, tmp_path: Path) -> None:
    model = tiny.model(name)
    kinds = [("q_proj", "qkv_proj", "c_attn"), ("down_proj", "c_proj"), ("q_proj", "o_proj", "qkv_proj", "c_attn")]
    for i, targets in enumerate(kinds):
        write_adapter(tmp_path / "pool" / f"t{i}", model, targets, rank=i + 1, seed=i)
    logo = engine(model, tmp_path / "pool", unscorable="skip", k=1)
    mixture = {"t0": 0.7, "t1": -0.4, "t2": 1.5}
    assert logo.save_mixture(mixture, tmp_path / "all" / "mixture") == tmp_path / "all" / "mixture"
    pool = AdapterPool.open(tmp_path / "all")
    [written] = pool
    assert written.ranks[-1] == 4  # t0 and t2 meet on a module
    expected = logo.generate(PROMPTS, adapters=mixture, max_new_tokens=12)
    again = engine(model, tmp_path / "all", unscorable="skip", k=1).generate(
        PROMPTS, adapters={"mixture": 1.0}, max_new_tokens=12
    )
    assert [one.token_ids for one in again] == [one.token_ids for one in expected]
    assert {one.token_ids for one in expected} != {one.token_ids for one in logo.generate(PROMPTS, adapters={})}
    peft = load_peft(tmp_path / "all" / "mixture", tiny.model(name))
    for prompt, answer in zip(PROMPTS, expected, strict=True):
        [ids] = ids_of(logo, [prompt])
        found = peft.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, pad_token_id=2)
        assert tuple(found[0, len(ids) :].tolist()) == answer.token_ids
        with logo._mixer.active(logo.fitted, [Mixture(mixture)]):
            ours = logits(model, ids)
        same_tensor(logits(peft, ids), ours)


def test_names_of_modules_are_short_where_all_of_that_name_are_adapted(llama: nn.Module, tmp_path: Path) -> None:
    write_adapter(tmp_path / "pool" / "even", llama, ("q_proj",), rank=2, seed=0)
    write_adapter(tmp_path / "pool" / "odd", llama, ("layers.1.self_attn.v_proj", "q_proj"), rank=3, seed=1)
    logo = engine(llama, tmp_path / "pool", k=1)

    def config(mixture: dict[str, float], name: str) -> Any:
        return json.loads((logo.save_mixture(mixture, tmp_path / name) / "adapter_config.json").read_text())

    even = config({"even": 1.0}, "a")
    assert (even["target_modules"], even["r"], even["rank_pattern"]) == (["q_proj"], 2, {})
    both = config({"even": 1.0, "odd": 1.0}, "b")
    assert both["r"] == both["lora_alpha"] == 5 and list(both["rank_pattern"].values()) == [3]
    assert (
        both["target_modules"]
        == sorted(f"model.layers.{i}.self_attn.q_proj" for i in range(3)) + ["model.layers.1.self_attn.v_proj"]
        or len(both["target_modules"]) == 4
    )
    assert sorted(lora_layers(load_peft(tmp_path / "b", tiny.model("llama")))) == both["target_modules"]


def test_what_cannot_be_written_is_refused_and_leaves_nothing(llama: nn.Module, adapters: Path, tmp_path: Path) -> None:
    logo = engine(llama, adapters, unscorable="skip", k=1)
    for nothing in ({}, {"tasks/t1": 0.0}):
        with pytest.raises(UsageError, match="has no adapter, so there is nothing to write"):
            logo.save_mixture(nothing, tmp_path / "new")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    with pytest.raises(UsageError, match="exists already and is not an empty folder"):
        logo.save_mixture(MIXTURE, tmp_path / "full")
    with pytest.raises(StorageError, match="cannot be written"):
        logo.save_mixture(MIXTURE, tmp_path / "full" / "x" / "below")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    (tmp_path / "empty").mkdir()
    logo.save_mixture(MIXTURE, str(tmp_path / "empty"))
    assert len(AdapterPool.open(tmp_path / "empty")) == 1


def test_the_command_writes_what_a_prompt_selects(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt, place = "What is 7 plus 5?", ["--base-model", "demo", "--device", "cpu"]
    assert run(["pool", "export", prompt, *place, "--save", str(tmp_path / "pool" / "sums")]) == 0
    assert "add_numbers" in capsys.readouterr().err
    demo = LoGo.from_pretrained("demo", device="cpu", signal="calibrated")
    answer = demo.generate(prompt)
    other = LoGo.from_pretrained("demo", tmp_path / "pool", device="cpu")
    assert other.generate(prompt, adapters={"sums": 1.0}).token_ids == answer.token_ids
    forced = ["--adapter", "french=0.5", "--adapter", "plural"]
    assert run(["pool", "export", *forced, *place, "--save", str(tmp_path / "two")]) == 0
    assert run(["pool", "export", *forced, *place, "--save", str(tmp_path / "two")]) == 2
    assert run(["pool", "export", prompt, *forced, *place, "--save", str(tmp_path / "three")]) == 2
    assert "expected one of: a prompt, which selects; --adapter NAME=WEIGHT" in capsys.readouterr().err
