"""The baseline `arrow` against PEFT's own model, and what it refuses."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from torch import nn

from logo.baselines import Task, get_method
from logo.cli.app import run
from logo.errors import UsageError
from test_engine import PROMPTS, engine, write_adapter


def alike(model: nn.Module, folder: Path, ranks: tuple[int, ...] = (2, 2, 2)) -> Path:
    """Adapters of these ranks on the same modules."""
    for i, rank in enumerate(ranks):
        write_adapter(folder / f"t{i}", model, ("q_proj", "v_proj"), rank=rank, seed=i, scale=2.0)
    return folder


@pytest.mark.parametrize("top_k", [1, 2, 9])
def test_arrow_answers_as_pefts_own_model(top_k: int, llama: nn.Module, tmp_path: Path) -> None:
    """Batches of our engine against `create_arrow_model` and `model.generate`, one prompt at a time."""
    from peft import ArrowConfig, create_arrow_model

    logo = engine(llama, alike(llama, tmp_path), k=2)
    before = logo.generate(PROMPTS, max_new_tokens=6, adapters={})
    prepared = get_method("arrow", top_k=top_k, temperature=0.5).prepare(logo, Task("main.x", PROMPTS))
    assert prepared.select is not None and prepared.engine is not None
    chosen = prepared.select(PROMPTS, 8)
    found = prepared.engine.generate(PROMPTS, adapters=chosen, max_new_tokens=6, batch_size=3)
    config = ArrowConfig(top_k=min(top_k, 3), router_temperature=0.5, rng_seed=0)
    theirs = create_arrow_model(copy.deepcopy(llama), [str(tmp_path / f"t{i}") for i in range(3)], config).eval()
    for prompt, answer in zip(PROMPTS, found, strict=True):
        [ids] = theirs.generate(**logo.tokenizer(prompt, return_tensors="pt"), max_new_tokens=6, do_sample=False)
        assert logo.tokenizer.decode(ids[-len(answer.token_ids) :]) == logo.tokenizer.decode(answer.token_ids)
    assert [one.token_ids for one in found] != [one.token_ids for one in before]
    again = logo.generate(PROMPTS, max_new_tokens=6, adapters={})
    assert [one.token_ids for one in again] == [one.token_ids for one in before]


def test_a_pool_that_peft_refuses(llama: nn.Module, tmp_path: Path) -> None:
    logo = engine(llama, alike(llama, tmp_path, (2, 3)), k=2)
    with pytest.raises(UsageError, match=r"method 'arrow': PEFT refuses this pool: .*rank mismatch: 3 != 2"):
        get_method("arrow").prepare(logo, Task("main.x", PROMPTS))


@pytest.mark.filterwarnings("ignore:2 of 3 adapters act on every token")
def test_adapters_that_act_on_some_tokens_only(llama: nn.Module, tmp_path: Path) -> None:
    folder = alike(llama, tmp_path)
    config = json.loads((folder / "t1" / "adapter_config.json").read_text())
    (folder / "t1" / "adapter_config.json").write_text(json.dumps({**config, "alora_invocation_tokens": [5]}))
    with pytest.raises(UsageError, match="expected adapters that act on every token, found t1"):
        get_method("arrow").prepare(engine(llama, folder, k=2), Task("main.x", PROMPTS))


def test_arrow_in_an_evaluation_but_not_in_a_study(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows"
    rows.mkdir()
    (rows / "capital.jsonl").write_text('{"context": "The capital of France is", "completion": "Paris"}\n')
    given = ["--base-model", "demo", "--rows", str(rows), "--method", "arrow"]
    assert run(["eval", "run", *given, "--result-dir", str(tmp_path / "r"), "--run-name", "a"]) == 0
    [stored] = (tmp_path / "r").rglob("rows.jsonl")
    [row] = stored.read_text().splitlines()
    assert json.loads(row)["selected"] == [] and json.loads(row)["error"] is None
    assert run(["eval", "study", "--rows", str(rows), "--methods", "arrow", "--save", str(tmp_path / "s")]) == 2
    assert "method 'arrow' answers with a model of its own: compare it by `logo eval run`" in capfd.readouterr().err
