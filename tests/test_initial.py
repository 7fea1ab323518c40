"""PiSSA and OLoRA adapters with what they began as below their folder: they answer as the model that PEFT trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from logo import AdapterPool
from logo.adapters.layout import BaseLayout, linear_modules
from logo.cli.run import run
from logo.errors import LeftOut, PoolError
from logo.mixing.gated import GatedLoRA
from make_adapters import edit_config, load_peft, tensors, write
from test_conversion import IDS, trained_from
from test_mixing import stacks_of
from tolerances import same_tensor


def beside(tmp_path: Path, name: str = "pissa_init", **settings: Any) -> torch.Tensor:
    """`pool/task`, with what it began as in a folder below; returns what the trained model answers."""
    answer = trained_from(tmp_path, **settings)
    shutil.copytree(tmp_path / "trained", tmp_path / "pool")
    shutil.move(tmp_path / "initial", tmp_path / "pool" / "task" / name)
    return answer


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True}, {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {r"layers\.1.*q_proj": 3}}],
    ids=["plain", "rslora", "patterns"],
)
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_it_answers_as_the_trained_model(tmp_path: Path, init: str, settings: dict[str, Any]) -> None:
    answer = beside(tmp_path, f"{init}_init", init_lora_weights=init, **settings)
    base = tiny.model("llama")
    pool = AdapterPool.from_directory(tmp_path / "pool", cache=tmp_path / "cache").fit(BaseLayout.of(base))
    assert pool.names == ("task",)
    [gone] = pool.refused
    assert isinstance(gone, LeftOut) and gone.name == f"task/{init}_init"
    [adapter] = pool
    for path, module in adapter.modules.items():
        assert module.rank == adapter.config.rank(path) == len(adapter.read([path])[path].A)
        assert module.scaling == pytest.approx(adapter.config.scaling(path, module.rank))
    stacks = stacks_of(base, [adapter])
    with torch.no_grad(), GatedLoRA(dict(linear_modules(base))).active(stacks, torch.ones(1, 1)):
        same_tensor(base(input_ids=IDS).logits, answer)
    again = AdapterPool.from_directory(tmp_path / "pool", cache=tmp_path / "cache")
    assert again.names == ("task",) and again.sha256() == pool.sha256()


def test_pools_that_are_made_of_it_stay_right(tmp_path: Path) -> None:
    answer = beside(tmp_path, init_lora_weights="pissa")
    pool = str(tmp_path / "pool")
    assert run(["pool", "convert", pool, "--out", str(tmp_path / "converted")]) == 0
    assert run(["pool", "prune", pool, "--out", str(tmp_path / "pruned"), "--rank", "8"]) == 0
    assert run(["pool", "dedupe", pool, "--out", str(tmp_path / "copied")]) == 0
    for name in ("converted", "pruned"):
        with torch.no_grad():
            same_tensor(load_peft(tmp_path / name / "task")(input_ids=IDS).logits, answer)
    assert AdapterPool.from_directory(tmp_path / "copied").sha256() == AdapterPool.from_directory(pool).sha256()
    manifest = str(tmp_path / "pool.yaml")
    assert run(["pool", "lock", pool, "-o", manifest]) == 0
    assert AdapterPool.open(manifest).names == ("task",)
    start = tmp_path / "pool" / "task" / "pissa_init"
    write(start, tensors(seed=5), init_lora_weights=True)
    with pytest.raises(PoolError, match="not the one in the manifest"):
        AdapterPool.open(manifest)


def test_copies_of_the_base_beside_it_are_left_out(tmp_path: Path) -> None:
    copy = {"base_model.model.lm_head.base_layer.weight": tiny.model("llama").get_submodule("lm_head").weight.clone()}
    write(tmp_path / "task", tensors(seed=1) | copy, init_lora_weights="pissa")
    write(tmp_path / "task" / "pissa_init", tensors(seed=2))
    base = tiny.model("llama")
    with pytest.warns(UserWarning, match="copies of base weights .* are left out"):
        [adapter] = AdapterPool.from_directory(tmp_path).fit(BaseLayout.of(base), model=base)
    assert adapter.ranks == (8,) and adapter.read().keys() == adapter.modules.keys()
    assert adapter.file.shapes()[next(iter(copy))] == next(iter(copy.values())).shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 2}, "its initial adapter .* another shape or scale"),
        ({"lora_alpha": 9}, "its initial adapter .* another shape or scale"),
        ({"only": "q_proj"}, "its initial adapter .* adapts other modules"),
        ({"use_dora": True}, "DoRA"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_an_initial_adapter_of_something_else(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write(tmp_path / "task", tensors(seed=1), init_lora_weights="pissa")
    rank, only = change.get("r", 4), change.pop("only", "")
    weights = {key: value for key, value in tensors(seed=2, rank=rank).items() if only in key}
    write(tmp_path / "task" / "pissa_init", weights, **change)
    with pytest.raises(PoolError, match=message):
        AdapterPool.from_directory(tmp_path)


def test_a_plain_adapter_keeps_what_lies_below_it(tmp_path: Path) -> None:
    write(tmp_path / "task", tensors(seed=1))
    write(tmp_path / "task" / "initial", tensors(seed=2))
    pool = AdapterPool.from_directory(tmp_path)
    assert pool.names == ("task", "task/initial") and not pool.refused
    assert json.loads((tmp_path / "task" / "adapter_config.json").read_text())["r"] == pool["task"].ranks[0]


def test_without_what_it_began_as_it_is_refused_as_before(tmp_path: Path) -> None:
    write(tmp_path / "task", tensors(seed=1), init_lora_weights="pissa_niter_4")
    with pytest.raises(PoolError, match="logo pool convert --initial"):
        AdapterPool.from_directory(tmp_path)
    write(tmp_path / "task" / "pissa_init", tensors(seed=2))
    edit_config(tmp_path / "task", use_qalora=True)
    with pytest.raises(PoolError, match="QALoRA"):
        AdapterPool.from_directory(tmp_path)
