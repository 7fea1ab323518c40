"""What training writes: adapters as PEFT writes them, which it and pools open, and what they were made of."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import tiny
from hub_server import HubServer
from learning import command, contents, rows, write_base, write_rows
from logo import AdapterPool
from logo.cli.app import run
from logo.training.learner import Learner
from tolerances import PATIENCE
from warm import python

RECIPES: dict[str, list[str]] = {
    "llama": ["--targets", "q_proj,v_proj"],
    "llama-all": ["--targets", "all-linear", "--rslora", "--alpha", "3"],
    "gpt2": ["--targets", "c_attn"],
    "gpt2-all": ["--targets", "all-linear"],
}


@pytest.fixture(params=list(RECIPES), scope="module")
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A pool of two tasks, and the best factors that their learners came to."""
    kind = request.param.partition("-")[0]
    root = tmp_path_factory.mktemp(request.param)
    write_base(root / "base", kind)
    for number, name in enumerate(("deep/two", "one")):
        write_rows(root / "tasks" / f"{name}.jsonl", rows(12, number))
    learners: list[Learner] = []
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # nothing is said that a user need not know
        close = Learner.close

        def closing(self: Learner) -> None:
            learners.append(self)
            close(self)

        patch.setattr(Learner, "close", closing)
        assert run(command(root / "base", root / "tasks", root / "pool", *RECIPES[request.param])) == 0
    return kind, root, {name: one.best for name, one in zip(("deep/two", "one"), learners, strict=True)}


def test_peft_opens_an_adapter_with_the_learned_factors(made: Any, tmp_path: Path) -> None:
    """And writes the same configuration for it."""
    kind, root, learned = made
    ids, mask = tiny.padded(tiny.prompts([7, 4], seed=1))
    for name, best in learned.items():
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            wrapped = peft.PeftModel.from_pretrained(tiny.model(kind), root / "pool" / name).eval()
        found = peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False)
        assert found.keys() == best.keys() and all(torch.equal(found[key], best[key]) for key in best)
        logits = wrapped(input_ids=ids, attention_mask=mask).logits
        base = tiny.model(kind)(input_ids=ids, attention_mask=mask).logits
        assert float((logits - base)[mask.bool()].abs().max()) > 1e-3
        wrapped.save_pretrained(tmp_path / name)
        theirs, ours = (
            json.loads((folder / name / "adapter_config.json").read_text()) for folder in (tmp_path, root / "pool")
        )
        for values in (theirs, ours):
            values["target_modules"].sort()
        assert ours == theirs and ours["base_model_name_or_path"] == str(root / "base")


def test_a_pool_opens_them_without_a_word(made: Any) -> None:
    _, root, learned = made
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pool = AdapterPool.open(root / "pool", on_bad_adapter="error")
    assert pool.names == ("deep/two", "one")
    for name, best in learned.items():
        paths = {key.removeprefix("base_model.model.").partition(".lora_")[0] for key in best}
        for path, weights in pool[name].read(sorted(paths)).items():
            assert torch.equal(weights.A, best[f"base_model.model.{path}.lora_A.weight"])
            assert torch.equal(weights.B, best[f"base_model.model.{path}.lora_B.weight"])


def test_the_pool_says_what_it_was_made_of(made: Any) -> None:
    _, root, learned = made
    notes = json.loads((root / "pool" / "pool.json").read_text())
    assert notes["failed"] == {} and notes["base_model"] == str(root / "base")
    assert set(notes["base"]) == {"weights", "config", "tokenizer", "dtype"} and notes["base"]["dtype"] == "float32"
    assert {"torch", "transformers", "peft"} <= set(notes["versions"])
    assert sorted(notes["adapters"]) == sorted(learned)
    for name in learned:
        record = notes["adapters"][name]
        assert record == json.loads((root / "pool" / name / "training.json").read_text())
        pairs = [json.loads(line) for line in (root / "tasks" / f"{name}.jsonl").read_text().splitlines()]
        listed = json.dumps([[row["context"], row["completion"]] for row in pairs], sort_keys=True)
        assert record["rows_sha256"] == hashlib.sha256(listed.encode()).hexdigest()
        assert (record["rows"], record["held_out"], record["copies"], record["cut_prompts"]) == (12, 1, 0, 0)
        assert record["recipe"] == notes["recipe"] and record["base"] == notes["base"]
        course = record["course"]
        assert course["steps"] == 6 and [at["step"] for at in course["measured"]] == [2, 4, 6]
        best = min(course["measured"], key=lambda at: at["held_out"])
        assert course["best_step"] == best["step"]
        assert course["held_out_loss"] == pytest.approx(best["held_out"], abs=1e-6)
        assert course["train_loss"] == pytest.approx(best["train"], abs=1e-6)


def test_other_seeds_begin_elsewhere_and_the_same_seed_in_the_same_place(tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    write_rows(tmp_path / "tasks" / "a.jsonl", rows(12))
    write_rows(tmp_path / "tasks" / "b.jsonl", rows(12))
    for pool, seed in (("one", "0"), ("again", "0"), ("other", "1")):
        assert run(command(tmp_path / "base", tmp_path / "tasks", tmp_path / pool, "--seed", seed)) == 0
    weights = {name: content for name, content in contents(tmp_path).items() if name.endswith("model.safetensors")}
    del weights["base/model.safetensors"]
    digests = {name.removesuffix("/adapter_model.safetensors"): content for name, content in weights.items()}
    assert digests["one/a"] == digests["again/a"] and digests["one/b"] == digests["again/b"]
    assert len(set(digests.values())) == 4


@pytest.mark.slow
def test_configurations_of_a_data_set_on_the_hub_are_tasks(tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    for number, name in enumerate(("one", "two")):
        some = rows(12, number)
        write_rows(tmp_path / "hub" / f"{name}.jsonl", some)
        write_rows(tmp_path / "tasks" / f"{name}.jsonl", some)
    card = (
        "---\nconfigs:\n- config_name: one\n  data_files: one.jsonl\n- config_name: two\n  data_files: two.jsonl\n---\n"
    )
    (tmp_path / "hub" / "README.md").write_text(card)

    def trained(tasks: str, pool: str, *more: str) -> subprocess.CompletedProcess[str]:
        asked = command(tmp_path / "base", Path(tasks), tmp_path / pool, *more)
        env = {**os.environ, **hub.env(tmp_path / "home")}
        return subprocess.run(
            [*python(), "-m", "logo.cli", *asked], env=env, capture_output=True, text=True, timeout=PATIENCE
        )

    with HubServer({"datasets/org/tasks": tmp_path / "hub"}) as hub:
        done = trained("org/tasks", "pool")
        assert done.returncode == 0, done.stderr
        missing = trained("org/other", "none")
    assert run(command(tmp_path / "base", tmp_path / "tasks", tmp_path / "own")) == 0
    for name in ("one", "two"):
        file = f"{name}/adapter_model.safetensors"
        assert (tmp_path / "pool" / file).read_bytes() == (tmp_path / "own" / file).read_bytes()
    record = json.loads((tmp_path / "pool" / "one" / "training.json").read_text())
    assert record["source"] == "org/tasks/one"
    assert missing.returncode == 1
    assert [line for line in missing.stderr.splitlines() if line.startswith("logo: error: ")] == (
        missing.stderr.splitlines()[-1:]
    )
    assert "org/other" in missing.stderr.splitlines()[-1]
