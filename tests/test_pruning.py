"""Pools of smaller rank: as near as any matrix of that rank, and PEFT answers with them as our numbers say."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny
from logo import AdapterPool
from logo.adapters.format import open_adapter
from logo.adapters.upkeep.pruning import Budget, pruned, write_pruned
from logo.cli.run import run
from logo.errors import AdapterError, UsageError
from logo.training.pool import record_of
from logo.training.pool import write_pool as write_trained_pool
from make_adapters import (
    CONFIG,
    LLAMA,
    calm,
    damage,
    edit_config,
    edit_weights,
    load_peft,
    lora_layers,
    tensors,
    write,
    write_peft,
)
from tolerances import same_tensor

IDS = torch.tensor([tiny.prompts([9])[0]])


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = load_peft(folder)(input_ids=IDS).logits
    return found


@calm
@given(
    rank=st.integers(1, 6),
    kept=st.integers(1, 7),
    alpha=st.floats(0.1, 32),
    rslora=st.booleans(),
    seed=st.integers(0, 99),
)
def test_each_update_is_cut_as_torch_cuts_the_whole_product(
    tmp_path_factory: pytest.TempPathFactory, rank: int, kept: int, alpha: float, rslora: bool, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("a")
    write(folder / "a", tensors(rank=rank, seed=seed), r=rank, lora_alpha=alpha, use_rslora=rslora)
    adapter = open_adapter(folder / "a")
    result = pruned(adapter, Budget(rank=kept))
    lost = total = 0.0
    for path, one in adapter.read().items():
        whole = one.scaled_b().double() @ one.A.double()
        values = torch.linalg.svdvals(whole)
        lost += float((values[kept:] ** 2).sum())
        total += float((values**2).sum())
        made = result.weights[path]
        assert len(made.A) == min(rank, kept) and (made.scaling == 1.0 or kept >= rank)
        found = float((whole - made.scaled_b().double() @ made.A.double()).norm())
        assert found == pytest.approx(float(values[kept:].norm()), rel=1e-4, abs=1e-5 * float(values[0]))
    assert result.error == pytest.approx(math.sqrt(lost / total), rel=1e-4, abs=1e-6)
    write_pruned(result, folder / "b")
    again = open_adapter(folder / "b")
    for path, one in again.read().items():
        assert one.scaling == pytest.approx(result.weights[path].scaling)
        torch.testing.assert_close(one.A, result.weights[path].A)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True, "lora_alpha": 3},
        {"rank_pattern": {r"layers\.1.*q_proj": 2}, "alpha_pattern": {"v_proj": 5}},
        {"target_modules": ["o_proj", "up_proj", "down_proj"], "layers_to_transform": [0, 2]},
    ],
    ids=["plain", "rslora", "patterns", "layers"],
)
def test_peft_answers_as_before_where_nothing_is_lost(tmp_path: Path, settings: dict[str, Any]) -> None:
    """All of the energy: other factors, ranks per module and scales of 1, the same outputs."""
    write_peft(tmp_path / "pool" / "one", seed=3, **settings)

    def idle(weights: dict[str, torch.Tensor]) -> None:  # one direction of the first module does nothing
        next(weights[key] for key in sorted(weights) if "lora_B" in key)[:, -1] = 0

    edit_weights(tmp_path / "pool" / "one", idle)
    assert run(["pool", "prune", str(tmp_path / "pool"), "-o", str(tmp_path / "out"), "--energy", "1", "--json"]) == 0
    same_tensor(logits(tmp_path / "out" / "one"), logits(tmp_path / "pool" / "one"))
    assert not torch.allclose(logits(tmp_path / "out" / "one"), tiny.model("llama")(input_ids=IDS).logits, atol=1e-3)
    before, after = (json.loads((tmp_path / name / "one" / CONFIG).read_text()) for name in ("pool", "out"))
    changed = {key for key in before | after if before.get(key) != after.get(key)}
    assert changed <= {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"}
    assert after["lora_alpha"] == after["r"] and after["rank_pattern"] == after["alpha_pattern"]


def test_peft_opens_it_whatever_it_was_initialised_with(tmp_path: Path) -> None:
    write_peft(tmp_path / "pool" / "one", init_lora_weights="orthogonal")
    assert run(["pool", "prune", str(tmp_path / "pool"), "-o", str(tmp_path / "out"), "--rank", "3"]) == 0
    [adapter] = AdapterPool.from_directory(tmp_path / "out")
    layer = lora_layers(load_peft(tmp_path / "out" / "one"))[next(iter(LLAMA))]
    assert torch.equal(layer.lora_A["default"].weight, adapter.read()[next(iter(LLAMA))].A)


def test_energy_decides_the_rank_of_every_module_and_peft_reads_it(tmp_path: Path) -> None:
    """One module needs one direction, another all four."""
    steep = f"base_model.model.{next(iter(LLAMA))}.lora_B.weight"
    edit_weights(write(tmp_path / "pool" / "one"), lambda w: w[steep][:, 1:].mul_(1e-3))
    assert run(["pool", "prune", str(tmp_path / "pool"), "-o", str(tmp_path / "out"), "--energy", "0.95"]) == 0
    [adapter] = AdapterPool.from_directory(tmp_path / "out")
    ranks = {path: module.rank for path, module in adapter.modules.items()}
    assert ranks[next(iter(LLAMA))] == 1 and max(ranks.values()) > 1
    result = pruned(open_adapter(tmp_path / "pool" / "one"), Budget(energy=0.95))
    assert result.ranks == ranks and 0 < result.error <= math.sqrt(0.05)
    peft = load_peft(tmp_path / "out" / "one")
    for path, weights in result.weights.items():
        layer = peft.get_submodule(f"base_model.model.{path}")
        same_tensor(layer.get_delta_weight("default"), weights.B @ weights.A)


@pytest.mark.filterwarnings("ignore:.*unknown settings ignored")
def test_the_command_says_what_was_lost_and_keeps_what_it_does_not_know(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, name in enumerate(("a", "deep/b")):
        write(tmp_path / "pool" / name, tensors(seed=number, dtype=torch.bfloat16), something_new={"x": [1]})
    (tmp_path / "pool" / "pool.json").write_text('{"activation": "last:4", "changes": [{"command": "dedupe"}]}')
    assert run(["pool", "prune", str(tmp_path / "pool"), "-o", str(tmp_path / "out"), "--rank", "2"]) == 0
    said = capsys.readouterr().out
    assert (
        "relative error" in said and "deep/b" in said and f"{tmp_path / 'out'}: written, 50% of the parameters" in said
    )
    notes = json.loads((tmp_path / "out" / "pool.json").read_text())
    assert notes["activation"] == "last:4" and [one["command"] for one in notes["changes"]] == ["dedupe", "prune"]
    assert notes["changes"][1]["relative_errors"].keys() == {"a", "deep/b"}
    config = json.loads((tmp_path / "out" / "deep" / "b" / CONFIG).read_text())
    assert config["something_new"] == {"x": [1]} and config["r"] == config["lora_alpha"] == 2
    weights = open_adapter(tmp_path / "out" / "a").read()
    assert {one.A.dtype for one in weights.values()} == {torch.bfloat16}


def test_an_untrained_adapter_stays_one(tmp_path: Path) -> None:
    edit_weights(write(tmp_path / "pool" / "a"), lambda w: [w[key].zero_() for key in w if "lora_B" in key])
    result = pruned(open_adapter(tmp_path / "pool" / "a"), Budget(energy=0.5))
    assert result.error == 0.0 and set(result.ranks.values()) == {1}


def test_what_does_not_fit_in_the_dtype_is_no_adapter(tmp_path: Path) -> None:
    """Factors of float16 whose product is beyond it: cut to factors of equal size they fit, or the adapter is named."""
    large = {key: torch.full_like(value, 6e4).half() for key, value in tensors(rank=2).items()}
    write(tmp_path / "a", large, r=2, lora_alpha=1e6)
    with pytest.raises(AdapterError, match=r"'a': the pruned factors of .* do not fit in torch.float16"):
        pruned(open_adapter(tmp_path / "a"), Budget(rank=1))


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "expected either an energy or a rank"),
        (["--energy", "0.9", "--rank", "2"], 2, "expected either an energy or a rank"),
        (["--energy", "1.5"], 2, "energy: expected a share above 0 and up to 1, found 1.5"),
        (["--rank", "0"], 2, "rank: expected 1 or more, found 0"),
    ],
)
def test_budgets_that_make_no_sense(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, said: str
) -> None:
    write(tmp_path / "pool" / "a")
    assert run(["pool", "prune", str(tmp_path / "pool"), "-o", str(tmp_path / "out"), *arguments]) == code
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_nothing_is_half_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pool, out = tmp_path / "pool", tmp_path / "out"
    write(pool / "a")
    damage(write(pool / "b"), float("nan"))
    prune = ["pool", "prune", str(pool), "--rank", "1", "-o"]
    assert run([*prune, str(out)]) == 1  # a was written by then
    assert "'b'" in capsys.readouterr().err and [path.name for path in tmp_path.iterdir()] == ["pool"]
    assert run([*prune, str(out), "--on-bad-adapter", "skip"]) == 0
    assert AdapterPool.from_directory(out).names == ("a",)
    assert run([*prune, str(out), "--on-bad-adapter", "skip"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert run([*prune, str(pool / "c"), "--on-bad-adapter", "skip"]) == 2
    assert "is inside the pool" in capsys.readouterr().err
    (tmp_path / "file").write_text("x")
    assert run([*prune, str(tmp_path / "file" / "x"), "--on-bad-adapter", "skip"]) == 1
    assert "cannot be written" in capsys.readouterr().err
    edit_config(pool / "a", r=9)
    assert run([*prune, str(tmp_path / "more")]) == 1 and not (tmp_path / "more").exists()


@pytest.mark.parametrize("command", [["prune", "--rank", "1"], ["convert"], ["dedupe"]], ids=lambda c: c[0])
def test_a_full_disk_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    for number, name in enumerate(("a", "b")):
        write(tmp_path / "pool" / name, tensors(seed=number))
    written: list[object] = []

    def full(*arguments: Any, **how: Any) -> Any:
        written.append(arguments)
        if len(written) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return kept[len(arguments) == 3](*arguments, **how)

    kept = {True: safetensors.torch.save_file, False: shutil.copyfile}
    monkeypatch.setattr(safetensors.torch, "save_file", full)
    monkeypatch.setattr(shutil, "copyfile", full)
    written += [None] * (command[0] != "dedupe")  # one file for an adapter instead of two
    assert run(["pool", *command, str(tmp_path / "pool"), "--out", str(tmp_path / "out")]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["pool"]


def test_budgets() -> None:
    with pytest.raises(UsageError):
        Budget(energy=0.0)


def test_a_pool_that_is_one_adapter(tmp_path: Path) -> None:
    write(tmp_path / "one")
    assert run(["pool", "prune", str(tmp_path / "one"), "-o", str(tmp_path / "out"), "--rank", "2"]) == 0
    assert open_adapter(tmp_path / "out").ranks == (2,)


@pytest.mark.parametrize("budget", [["--rank", "4"], ["--rank", "64"], ["--energy", "1"]], ids="_".join)
def test_an_adapter_within_the_budget_keeps_its_factors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], budget: list[str]
) -> None:
    """In bfloat16, where other factors of the same update would be rounded once more."""
    write(tmp_path / "pool" / "a", tensors(dtype=torch.bfloat16), lora_alpha=3)
    (tmp_path / "pool" / "a" / "training.json").write_text("{}")
    assert run(["pool", "prune", str(tmp_path / "pool"), "-o", str(tmp_path / "out"), *budget, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["adapters"][0]["error"] == 0.0
    before, after = (open_adapter(tmp_path / place / "a") for place in ("pool", "out"))
    assert after.scales == before.scales
    for path, one in before.read().items():
        assert torch.equal(one.A, after.read()[path].A) and torch.equal(one.B, after.read()[path].B)
    assert (tmp_path / "out" / "a" / "training.json").is_file()


@pytest.mark.parametrize("command", [["prune", "--rank", "1"], ["convert", "--dtype", "bf16"]], ids=lambda c: c[0])
def test_what_was_measured_before_is_not_said_of_what_is_now(tmp_path: Path, command: list[str]) -> None:
    """Losses stand under `before`, no card shows them, and `logo train` does not take the task as done."""
    pool, out = tmp_path / "pool", tmp_path / "out"
    record = {"digest": "d", "course": {"held_out_loss": 1.25}}
    write(pool / "a")
    (pool / "a" / "training.json").write_text(json.dumps(record))
    notes = {"recipe": {"r": 4}, "adapters": {"a": record, "gone": record}, "measured": {"a": {"loss": 1.5}, "x": 1}}
    (pool / "pool.json").write_text(json.dumps(notes))
    assert run(["pool", *command, str(pool), "--out", str(out)]) == 0
    made = json.loads((out / "pool.json").read_text())
    assert made["before"] == {"adapters": {"a": record}, "measured": {"a": {"loss": 1.5}}}
    assert (made["recipe"], made["adapters"], made["measured"]) == ({"r": 4}, {}, {"x": 1})
    assert run(["pool", "card", str(out)]) == 0
    assert "loss |" not in (out / "README.md").read_text()
    assert record_of(out / "a") is None and record_of(pool / "a") == record
    write_trained_pool(out, {"base_model": "b"}, {})
    kept = json.loads((out / "pool.json").read_text())
    assert (kept["changes"], kept["before"], kept["base_model"]) == (made["changes"], made["before"], "b")
