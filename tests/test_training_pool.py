"""`logo train`: adapters that PEFT and pools open, what was done, runs that ended too early, tasks that fail."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import tiny
from learning import command, contents, record, rows, write_base, write_rows
from logo import AdapterPool
from logo.adapters.activation import Activation
from logo.cli.app import run

CONFIGS: dict[str, list[str]] = {
    "llama": ["--targets", "q_proj,v_proj"],
    "llama-all": ["--targets", "all-linear", "--rslora", "--alpha", "3"],
    "gpt2": ["--targets", "c_attn"],
    "gpt2-all": ["--targets", "all-linear"],
}
TASKS = ("a", "b", "d/e")
FILES = ("adapter_config.json", "adapter_model.safetensors", "examples.jsonl", "logo.yaml")


@pytest.fixture(scope="module")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    for number, name in enumerate(TASKS):
        write_rows(folder / f"{name}.jsonl", rows(10 + number, number))
    return folder


@pytest.fixture(scope="module")
def whole(base_model: Path, tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pool whose training nobody stopped."""
    pool = tmp_path_factory.mktemp("whole") / "pool"
    assert run(command(base_model, tasks, pool)) == 0
    return pool


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "copy")
    return tmp_path / "copy"


# -- what is written ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_peft_and_pools_open_the_adapters(name: str, tasks: Path, tmp_path: Path) -> None:
    """Without a word; and PEFT writes the same configuration."""
    kind = name.partition("-")[0]
    base_model, pool = write_base(tmp_path / "base", kind), tmp_path / "pool"
    ids, mask = tiny.padded(tiny.prompts([7, 4], seed=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert run(command(base_model, tasks, pool, *CONFIGS[name], "--tasks", "d/e,a")) == 0
        opened = AdapterPool.open(pool, on_bad_adapter="error")
        wrapped = peft.PeftModel.from_pretrained(tiny.model(kind), pool / "d/e").eval()
    assert opened.names == ("a", "d/e") and [one.activation.everywhere for one in opened] == [True, True]
    file, theirs = load_file(pool / "d/e" / FILES[1]), peft.get_peft_model_state_dict(wrapped)
    assert file.keys() == theirs.keys() and all(torch.equal(file[key], theirs[key]) for key in file)
    paths = {key.removeprefix("base_model.model.").partition(".lora_")[0] for key in file}
    for path, weights in opened["d/e"].read(sorted(paths)).items():
        assert torch.equal(weights.A, file[f"base_model.model.{path}.lora_A.weight"])
        assert torch.equal(weights.B, file[f"base_model.model.{path}.lora_B.weight"])
    logits = wrapped(input_ids=ids, attention_mask=mask).logits
    assert float((logits - tiny.model(kind)(input_ids=ids, attention_mask=mask).logits)[mask.bool()].abs().max()) > 1e-3
    wrapped.save_pretrained(tmp_path / "theirs")
    theirs, ours = (json.loads((at / FILES[0]).read_text()) for at in (tmp_path / "theirs", pool / "d/e"))
    theirs["target_modules"].sort()
    assert ours == theirs and ours["base_model_name_or_path"] == str(base_model)


def test_logo_yaml_says_what_was_done(whole: Path, base_model: Path, tasks: Path) -> None:
    assert set(contents(whole)) == {f"{name}/{file}" for name in TASKS for file in FILES}
    for number, name in enumerate(TASKS):
        found = record(whole / name)
        assert found["base_model"] == str(base_model) and found["base"]["dtype"] == "float32"
        given = {"r": 2, "lr": 0.005, "steps": 6, "batch_size": 4, "activation": "everywhere"}
        assert given.items() <= found["config"].items()
        counts = {"file": str(tasks / f"{name}.jsonl"), "learned": 9 + number, "held_out": 1, "copies": 0, "cut": 0}
        assert counts.items() <= found["rows"].items()
        result = found["result"]
        assert [result["steps"], *(at["step"] for at in result["measured"])] == [6, 1, 2, 3, 4, 5, 6] and not result[
            "early"
        ]
        best = min(result["measured"], key=lambda at: at["held_out"])
        assert result["best_step"] == best["step"]
        assert result["held_out_loss"] == pytest.approx(best["held_out"], abs=1e-6)
        assert {"logo", "torch", "transformers", "peft"} == set(found["versions"])
        prompts = [json.loads(line)["prompt"] for line in (whole / name / FILES[2]).read_text().splitlines()]
        assert prompts == [row["context"] for row in rows(10 + number, number)[:4]]


# -- runs that are repeated --------------------------------------------------------------------------------------------


def test_a_run_that_was_interrupted_continues_with_the_next_task(
    whole: Path, base_model: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the second task: exit code 130. That task begins again, and all adapters are those of a whole run."""
    steps, step = 0, torch.optim.AdamW.step

    def stepping(*given: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 9:
            raise KeyboardInterrupt
        return step(*given)

    pool = tmp_path / "pool"
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", stepping)
        assert run(command(base_model, tasks, pool)) == 130
    assert set(contents(pool)) == {f"a/{file}" for file in FILES}
    assert run(command(base_model, tasks, pool)) == 0 and contents(pool) == contents(whole)
    assert run(command(base_model, tasks, tmp_path / "other", "--seed", "1", "--tasks", "a")) == 0
    first, other = (load_file(root / "a" / FILES[1]) for root in (whole, tmp_path / "other"))
    assert not any(torch.equal(first[key], other[key]) for key in first)


def test_a_task_that_is_added_touches_nothing_of_the_others(
    copied: Path, base_model: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def times() -> dict[Path, tuple[int, int]]:
        return {file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in copied.rglob("*") if file.is_file()}

    more = tmp_path / "tasks"
    shutil.copytree(tasks, more)
    write_rows(more / "bb.jsonl", rows(11, 9))
    stood = times()
    assert run(command(base_model, more, copied)) == 0
    told = capsys.readouterr()
    assert "adapters to train: 1, 3 trained already" in told.err
    assert told.out.splitlines()[-1] == f"{copied}: 1 adapters trained, 3 stood already, 0 failed"
    assert stood.items() <= times().items() and len(times()) == len(stood) + len(FILES)
    stood = times()
    assert run([*command(base_model, more, copied), "--examples", "2"]) == 0 and times() == stood  # nothing is left


def test_an_adapter_of_something_else_is_refused_by_name(
    copied: Path, base_model: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(copied)

    def refused(*more: str, base: Path = base_model, folder: Path = tasks) -> str:
        capsys.readouterr()
        assert run([*command(base, folder, copied), *more]) == 2
        assert contents(copied) == before
        return capsys.readouterr().err.splitlines()[-1]

    end = "; name another --out, or replace it with --overwrite"
    line = refused("--lr", "0.001")
    assert line == f"logo: error: {copied / 'a'}: was trained with lr 0.005, and 0.001 is asked for{end}"
    assert f"{copied / 'b'}: was trained with r 2, and 3 is asked for" in refused("--r", "3", "--tasks", "b")
    base = write_base(tmp_path / "base", num_hidden_layers=2)
    assert "was trained on another base model, or in another dtype" in refused(base=base)
    shutil.copytree(tasks, tmp_path / "tasks")
    write_rows(tmp_path / "tasks" / "b.jsonl", rows(12, 77))
    assert refused(folder=tmp_path / "tasks") == f"logo: error: {copied / 'b'}: was trained from other rows{end}"
    (copied / "b" / "logo.yaml").unlink()
    before = contents(copied)
    assert "holds an adapter that was not trained here" in refused()
    assert run([*command(base_model, tmp_path / "tasks", copied), "--overwrite"]) == 0
    assert "adapters to train: 1, 2 trained already" in capsys.readouterr().err
    changed = {name for name, content in contents(copied).items() if before.get(name) != content}
    assert changed == {f"b/{file}" for file in FILES[1:]}


# -- tasks that fail ---------------------------------------------------------------------------------------------------


def test_a_list_at_the_end_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With exit code 1, also when the same command finds everything done that can be."""
    base_model, tasks, pool = tmp_path / "base", tmp_path / "tasks", tmp_path / "pool"
    write_base(base_model, "gpt2", n_positions=32)
    write_rows(tasks / "few.jsonl", rows(3, 7))
    write_rows(tasks / "twice.jsonl", rows(12, 9) * 2)
    write_rows(tasks / "long.jsonl", [*rows(11, 8), {"context": "w3 " * 50, "completion": "w4"}])
    write_rows(tasks / "endless.jsonl", [*rows(2, 8), {"context": "w3", "completion": "w4 " * 50}])
    write_rows(tasks / "empty.jsonl", [])
    asked = command(base_model, tasks, pool, "--targets", "c_attn")
    assert run(asked) == 1
    lines = " ".join(capsys.readouterr().out.split())
    assert "long: 1 prompts were longer than --max-length or the model's context and lost their beginning" in lines
    assert "twice: 2 rows are copies of held-out rows and were not trained on" in lines
    assert "endless.jsonl, row 3: the completion has 51 tokens, and a row may have 32 with its prompt" in lines
    assert "failed empty: " in lines and "empty.jsonl: expected one JSON object per line" in lines
    assert lines.endswith(f"{pool}: 3 adapters trained, 2 failed")
    assert record(pool / "few")["result"]["held_out_loss"] is None  # too few rows to hold any out
    assert AdapterPool.open(pool).names == ("few", "long", "twice")
    assert run([*asked, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert list(found["done"]) == ["few", "long", "twice"] and found["trained"] == {} and len(found["failed"]) == 2


def test_a_task_that_diverges_or_has_no_memory_does_not_stop_the_others(
    base_model: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, step = 0, torch.optim.AdamW.step

    def stepping(*given: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 2:
            raise torch.OutOfMemoryError("out of memory")
        found = step(*given)
        if steps == 3:
            given[0].param_groups[0]["params"][0].data.fill_(torch.nan)
        return found

    monkeypatch.setattr(torch.optim.AdamW, "step", stepping)
    assert run(command(base_model, tasks, tmp_path / "pool")) == 1
    lines = " ".join(capsys.readouterr().out.split())
    assert "failed a: cpu has too little memory; give a smaller --max-length or --batch-size" in lines
    assert "failed b: at step 1 its sum of factors is nan; give a lower --lr" in lines
    assert AdapterPool.open(tmp_path / "pool").names == ("d/e",)
    assert run(command(base_model, tasks, tmp_path / "none", "--targets", "q_prj")) == 2  # which no task survives
    assert capsys.readouterr().err.splitlines()[-1].startswith("logo: error: targets q_prj: ")


# -- activated adapters ------------------------------------------------------------------------------------------------

# Opens the assistant's turn with two tokens.
TEMPLATE = (
    "{% for m in messages %}{{ m.role | replace('user', 'w80 w81') | replace('assistant', 'w82 w83') }} "
    "{{ m.content }} {% endfor %}{% if add_generation_prompt %}w82 w83{% endif %}"
)


def test_adapters_of_one_pool_act_where_each_was_trained_to(tmp_path: Path) -> None:
    """Whatever the pool's own note says of others."""
    base_model, pool = write_base(tmp_path / "base", template=TEMPLATE), tmp_path / "pool"
    roles = (("user", "context"), ("assistant", "completion"))
    some = [{"messages": [{"role": role, "content": row[key]} for role, key in roles]} for row in rows(12, 3)]
    for name in ("last", "opening", "plain"):
        write_rows(tmp_path / "chats" / f"{name}.jsonl", some)

    def trained(name: str, activation: str, *more: str) -> dict[str, Activation]:
        asked = command(base_model, tmp_path / "chats", pool, "--tasks", name, "--activation", activation, *more)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            assert run(asked) == 0
        return {one.name: one.activation for one in AdapterPool.open(pool, on_bad_adapter="error")}

    trained("opening", "assistant")
    trained("last", "last:4")
    expected = {"last": Activation(last=4), "opening": Activation((82, 83)), "plain": Activation()}
    assert trained("plain", "everywhere") == expected
    assert json.loads((pool / "opening" / FILES[0]).read_text())["alora_invocation_tokens"] == [82, 83]
    (pool / "pool.json").write_text('{"activation": "last:2", "k": 2}')
    assert trained("last", "everywhere", "--overwrite") == expected | {
        "last": Activation(),
        "plain": Activation(last=2),
    }
