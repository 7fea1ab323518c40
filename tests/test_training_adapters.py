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
from logo.training.factors import Bank
from logo.training.group import Group

import tiny
from hub_server import HubServer
from learning import command, contents, rows, write_base, write_rows
from logo import AdapterPool
from logo.cli.run import run
from logo.mixing.gated import GatedLoRA, Gates
from logo.training.learner import Learner
from tolerances import PATIENCE, same_tensor
from warm import python

RECIPES: dict[str, list[str]] = {
    "llama": ["--targets", "q_proj,v_proj"],
    "llama-all": ["--targets", "all-linear", "--rslora", "--alpha", "3"],
    "gpt2": ["--targets", "c_attn"],
    "gpt2-all": ["--targets", "all-linear"],
    "qwen2-all": ["--targets", "all-linear"],
}


@pytest.fixture(params=list(RECIPES), scope="module")
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A pool of two tasks, and the learners that they came from."""
    kind = request.param.partition("-")[0]
    root = tmp_path_factory.mktemp(request.param)
    write_base(root / "base", kind)
    for number, name in enumerate(("one", "deep/two")):
        write_rows(root / "tasks" / f"{name}.jsonl", rows(12, number))
    groups: list[Group] = []
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # nothing is said that a user need not know
        begin = Group.run

        def watched(self: Group, *arguments: Any) -> None:
            groups.append(self)
            begin(self, *arguments)

        patch.setattr(Group, "run", watched)
        patch.setattr(Learner, "release", lambda self: None)  # what it has learned is looked at
        assert run(command(root / "base", root / "tasks", root / "pool", *RECIPES[request.param])) == 0
    [group] = groups
    return kind, root, {one.name: one for one in group.learners}


def test_peft_opens_an_adapter_that_says_what_the_learner_said(made: Any) -> None:
    """And writes the same configuration for it."""
    kind, root, learners = made
    ids, mask = tiny.padded(tiny.prompts([7, 4], seed=1))
    for name, one in learners.items():
        plain = tiny.model(kind)
        base = plain(input_ids=ids, attention_mask=mask).logits
        best = one.best
        one.factors.load(best)
        bank = Bank([one.factors])
        gated = GatedLoRA({path: plain.get_submodule(path) for path in bank.stacks})
        with gated.active(bank.stacks, Gates(torch.full((2, 1), one.recipe.scaling))):
            expected = plain(input_ids=ids, attention_mask=mask).logits.detach()
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            wrapped = peft.PeftModel.from_pretrained(tiny.model(kind), root / "pool" / name).eval()
        found = wrapped(input_ids=ids, attention_mask=mask).logits.detach()
        real = mask.bool()
        same_tensor(found[real], expected[real])
        assert float((found - base)[real].abs().max()) > 1e-3


def test_the_configuration_is_what_peft_writes(made: Any, tmp_path: Path) -> None:
    kind, root, learners = made
    for name, one in learners.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's advice about Conv1D
            config = one.recipe.lora(str(root / "base"))
            wrapped = peft.get_peft_model(tiny.model(kind), config)
            wrapped.peft_config["default"].base_model_name_or_path = str(root / "base")
            wrapped.save_pretrained(tmp_path / name)
        theirs = json.loads((tmp_path / name / "adapter_config.json").read_text())
        ours = json.loads((root / "pool" / name / "adapter_config.json").read_text())
        for values in (theirs, ours):
            if isinstance(values["target_modules"], list):
                values["target_modules"].sort()
        assert ours == theirs


def test_a_pool_opens_them_without_a_word(made: Any) -> None:
    _, root, learners = made
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pool = AdapterPool.from_directory(root / "pool", on_bad_adapter="error")
    assert pool.names == ("deep/two", "one")
    for name, one in learners.items():
        found = pool[name].read(list(one.factors.A))
        for path, weights in found.items():
            best = one.best
            assert torch.equal(weights.A, best[f"A.{path}"]) and torch.equal(weights.B, best[f"B.{path}"].T)
            assert weights.scaling == pytest.approx(one.recipe.scaling)


def test_the_pool_says_what_it_was_made_of(made: Any) -> None:
    _, root, learners = made
    notes = json.loads((root / "pool" / "pool.json").read_text())
    assert notes["failed"] == {} and notes["base_model"] == str(root / "base")
    assert set(notes["base"]) == {"weights", "config", "tokenizer", "dtype"} and notes["base"]["dtype"] == "float32"
    assert {"torch", "transformers", "peft"} <= set(notes["versions"])
    assert sorted(notes["adapters"]) == sorted(learners)
    for name, one in learners.items():
        record = notes["adapters"][name]
        assert record == json.loads((root / "pool" / name / "training.json").read_text())
        pairs = [json.loads(line) for line in (root / "tasks" / f"{name}.jsonl").read_text().splitlines()]
        listed = json.dumps([[row["context"], row["completion"]] for row in pairs], sort_keys=True)
        assert record["rows_sha256"] == hashlib.sha256(listed.encode()).hexdigest()
        assert (record["rows"], record["held_out"], record["cut_prompts"]) == (12, 1, 0)
        assert record["recipe"] == one.recipe.as_dict() and record["base"] == notes["base"]
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
