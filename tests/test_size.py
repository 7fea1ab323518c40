"""The relative size of adapters: the definition, wherever the weights and the indices come from."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from logo.models import skeleton
from logo.selection.calibration import weight_norm
from logo.selection.points import Point, last_query
from logo.vllm.skeleton import skeleton as skeleton_of
from test_engine import write_adapter
from test_index import opened, write_pool


class Quantised(torch.Tensor):
    """As torchao and Quanto have them: the values are somewhere else."""


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.model("llama", num_hidden_layers=6)


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pool(tmp_path_factory.mktemp("pool"), model)


def expected(logo: Any, scorer: Any = None) -> dict[str, float]:
    """By the definition, with whole matrices."""
    found = {}
    for adapter in logo.fitted:
        ratios = []
        for point in (scorer or logo.scorer).points:
            if point.module in adapter.modules:
                lora = adapter.read([point.module])[point.module]
                change = lora.scaling * lora.B.float() @ lora.A.float()
                ratios.append(float(change.norm() / logo.model.get_submodule(point.module).weight.norm()))
        found[adapter.name] = sum(ratios) / len(ratios)
    return found


def test_a_size_is_the_mean_ratio_over_points(model: Any, folder: Path, tmp_path: Path) -> None:
    """Also of what joins the pool."""
    logo = opened(model, folder, signal="calibrated")
    assert len(logo.scorer.points) > 1
    assert logo.scorer.selector.sizes == pytest.approx(expected(logo), rel=1e-5)
    sizes = list(logo.scorer.selector.sizes.values())
    assert sizes == sorted(sizes) and sizes[3] > 2 * sizes[0]
    write_adapter(tmp_path / "new", model, ("q_proj", "v_proj", "o_proj"), rank=2, seed=9)
    logo.pool.add(tmp_path / "new")
    assert "new" in logo.scorer.selector.sizes
    assert logo.scorer.selector.sizes == pytest.approx(expected(logo), rel=1e-5)


def test_a_base_model_has_its_own_sizes(model: Any, folder: Path, tmp_path: Path) -> None:
    larger = tiny.model("llama", num_hidden_layers=6)
    with torch.no_grad():
        for name, weight in larger.named_parameters():
            if name.endswith("q_proj.weight"):
                weight.mul_(10)
    for base in (model, larger):
        logo = opened(base, folder, signal="norm", cache=str(tmp_path))
        assert not logo.scorer.selector.sizes
        scorer = logo._scorer("calibrated")
        assert scorer.selector.sizes == pytest.approx(expected(logo, scorer), rel=1e-5)


def test_fused_projections_count_by_the_rows_of_the_query() -> None:
    model = tiny.model("gpt2")
    point = last_query(model)
    assert point.rows is not None
    weight = model.get_submodule(point.module).weight  # Conv1D stores it transposed
    assert weight_norm(model, point) == pytest.approx(float(weight[:, list(point.rows)].norm()))


VALUES = [Point(i, f"model.layers.{i}", f"model.layers.{i}.self_attn.v_proj") for i in (0, 1)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_weights_may_be_of_any_plain_type_and_kept_elsewhere(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny.model("llama").to(dtype)
    point = VALUES[1]
    weight = model.get_submodule(point.module).weight
    norm = weight_norm(model, point)
    assert norm == pytest.approx(float(weight.double().norm()), rel=1e-5)
    offloaded = accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    assert offloaded.get_submodule(point.module).weight.is_meta and weight_norm(offloaded, point) == norm


def test_a_skeleton_reads_what_is_stored_as_plain_numbers(tmp_path: Path) -> None:
    model = tiny.model("llama")
    point = VALUES[1]
    model.save_pretrained(tmp_path / "plain")
    assert weight_norm(skeleton_of(str(tmp_path / "plain"), torch.float32), point) == weight_norm(model, point)
    shutil.copytree(tmp_path / "plain", tmp_path / "eight")
    tensors = load_file(tmp_path / "plain" / "model.safetensors")
    tensors[f"{point.module}.weight"] = (tensors[f"{point.module}.weight"] * 100).to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "eight" / "model.safetensors", {"format": "pt"})
    stored = skeleton_of(str(tmp_path / "eight"), torch.float32)
    assert math.isnan(weight_norm(stored, point))
    (tmp_path / "eight" / "model.safetensors").unlink()
    assert math.isnan(weight_norm(stored, VALUES[0]))


def test_weights_that_are_not_at_hand_have_no_norm() -> None:
    model = tiny.model("llama")
    point = VALUES[1]
    assert math.isnan(weight_norm(skeleton(model.config), point))
    linear = model.get_submodule(point.module)
    plain = linear.weight
    for other in (
        torch.ones(plain.shape, dtype=torch.uint8),
        torch.ones(plain.shape).to(torch.float8_e4m3fn),
        torch.ones(plain.numel() // 4, 1),  # bits of four weights in each number
        torch.ones(plain.shape).as_subclass(Quantised),
        torch.zeros(plain.shape),
    ):
        linear.weight = torch.nn.Parameter(other, requires_grad=False)
        assert math.isnan(weight_norm(model, point))
    del linear.weight
    assert math.isnan(weight_norm(model, point))
    for device in ("cpu", "meta"):
        linear.weight = torch.ones(plain.shape, device=device)  # no parameter
        assert math.isnan(weight_norm(model, point)) == (device == "meta")
