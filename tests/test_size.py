"""The relative size of adapters: the definition, wherever the weights and the indices come from."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch

import tiny
from logo.models import skeleton
from logo.selection import index_file
from logo.selection.points import find_points, named_points
from logo.selection.size import USUAL, relative_sizes, weight_norm
from test_engine import write_adapter
from test_index import opened


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.model("llama", num_hidden_layers=4)


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pool")
    for i in range(4):
        names = ("q_proj", "v_proj", "o_proj") if i else ("q_proj",)
        write_adapter(root / f"t{i}", model, names, rank=2 + i % 2, seed=i, scale=0.1 * (i + 1))
    return root


def expected(logo: Any) -> dict[str, float]:
    """By the definition, with whole matrices."""
    found = {}
    for adapter in logo.fitted:
        ratios = []
        for point in logo.scorer.points:
            if point.module in adapter.modules:
                lora = adapter.read([point.module])[point.module]
                change = lora.scaling * lora.B.float() @ lora.A.float()
                ratios.append(float(change.norm() / logo.model.get_submodule(point.module).weight.norm()))
        found[adapter.name] = sum(ratios) / len(ratios)
    return found


def test_a_size_is_the_mean_ratio_over_points(model: Any, folder: Path) -> None:
    logo = opened(model, folder, signal="calibrated")
    assert len(logo.scorer.points) > 1
    assert logo.scorer.sizes == pytest.approx(expected(logo), rel=1e-5)
    sizes = list(logo.scorer.sizes.values())
    assert sizes == sorted(sizes) and sizes[3] > 2 * sizes[0]


@pytest.mark.parametrize("mapped", [False, True])
def test_sizes_are_in_the_file_of_an_index(
    model: Any, folder: Path, tmp_path: Path, mapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if mapped:
        monkeypatch.setattr(index_file, "MAPPED", 0)
    first, again = (opened(model, folder, signal="calibrated", cache=str(tmp_path)) for _ in range(2))
    before = first.scorer
    assert list((tmp_path / "index").iterdir())
    monkeypatch.setattr("logo.selection.scorers.weight_norm", lambda *_: pytest.fail("the file was not used"))
    after = again.scorer
    assert after.sizes == before.sizes
    assert [index.weight for index in after.indices] == [index.weight for index in before.indices]


def test_sizes_stay_when_a_pool_changes(model: Any, folder: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "new", model, ("q_proj", "v_proj", "o_proj"), rank=2, seed=9)
    logo = opened(model, folder, signal="calibrated", probe_points=["1.q_proj", "2.v_proj"])
    before = dict(logo.scorer.sizes)
    logo.pool.add(tmp_path / "new")
    assert {name: size for name, size in logo.scorer.sizes.items() if name != "new"} == before
    assert logo.scorer.sizes == pytest.approx(expected(logo), rel=1e-5)


def test_fused_projections_count_by_the_rows_of_the_query() -> None:
    model = tiny.model("gpt2")
    [point] = find_points(model)
    assert point.rows is not None
    weight = model.get_submodule(point.module).weight  # Conv1D stores it transposed
    assert weight_norm(model, point) == pytest.approx(float(weight[:, list(point.rows)].norm()))


def test_weights_that_are_kept_elsewhere_count_too(tmp_path: Path) -> None:
    [point] = named_points(tiny.model("llama"), "1.v_proj")
    norm = weight_norm(tiny.model("llama"), point)
    assert norm == pytest.approx(float(tiny.model("llama").get_submodule(point.module).weight.norm()))
    model = accelerate.disk_offload(tiny.model("llama"), str(tmp_path), execution_device=torch.device("cpu"))
    assert model.get_submodule(point.module).weight.is_meta and weight_norm(model, point) == norm
    bare = skeleton(tiny.model("llama").config)
    assert math.isnan(weight_norm(bare, point))
    bare.get_submodule(point.module).weight.read = lambda: tiny.model("llama").get_submodule(point.module).weight
    assert weight_norm(bare, point) == norm


def test_an_unknown_size_is_the_usual_one() -> None:
    model = tiny.model("llama")
    [point] = named_points(model, "1.v_proj")
    linear = model.get_submodule(point.module)
    linear.weight = torch.nn.Parameter(torch.zeros(8, 8, dtype=torch.uint8), requires_grad=False)  # as bitsandbytes
    assert math.isnan(weight_norm(model, point))
    touched = torch.tensor([[True, True], [True, False], [False, True], [False, False]])
    found = relative_sizes([torch.tensor([0.2, 0.4]), torch.tensor([0.1, math.nan])], touched)
    assert found.tolist() == pytest.approx([0.15, 0.4, USUAL, USUAL])
