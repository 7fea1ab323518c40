"""Whitening against the textbook formula; and how indices are read: every file once for all points, where scores are
computed, and rows that depend on nobody. And the relative size of adapters: its definition, wherever the weights and
the indices come from."""

from __future__ import annotations

import itertools
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from logo import LoGo
from logo.adapters.peft import SAFETENSORS, WeightFile
from logo.models import skeleton
from logo.selection import calibration, whitening
from logo.selection.calibration import weight_norm
from logo.selection.points import Point, last_query
from logo.selection.whitening import SHRINKAGE, Whitening
from logo.vllm.skeleton import skeleton as skeleton_of
from make_adapters import index_of
from test_engine import engine, write_adapter
from tolerances import same_tensor

PROMPT = "the cat sat on the mat"


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.model("llama", num_hidden_layers=6)


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four adapters of several ranks and modules, the later ones larger."""
    root = tmp_path_factory.mktemp("pool")
    for i in range(4):
        names = ("q_proj", "v_proj", "o_proj") if i else ("q_proj",)
        write_adapter(root / f"t{i}", model, names, rank=2 + i % 2, seed=i, scale=0.1 * (i + 1))
    return root


def opened(model: Any, folder: Path, **chosen: Any) -> LoGo:
    return engine(model, folder, **{"k": 2, "cache": "", **chosen})


@contextmanager
def files_read() -> Iterator[Counter[str]]:
    """How often the file of each adapter is opened for its tensors inside the block."""
    seen: Counter[str] = Counter()
    plain = WeightFile.read

    def read(file: WeightFile, keys: Iterable[str]) -> Any:
        seen[file.path.parent.name] += 1
        return plain(file, keys)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WeightFile, "read", read)
        yield seen


def test_a_file_is_opened_once_for_all_points(model: Any, folder: Path) -> None:
    names = [f"t{i}" for i in range(4)]
    logo = opened(model, folder, signal="calibrated")
    with files_read() as seen:
        assert len(logo.scorer.points) > 1
    assert seen == dict.fromkeys(names, 2)  # to listen at every point, and to keep what is read at those chosen


def test_only_new_adapters_are_read_when_a_pool_changes(model: Any, folder: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "new", model, ("q_proj", "v_proj"), rank=2, seed=9)
    logo = opened(model, folder, signal="norm")
    [old] = logo.scorer.indices
    logo.pool.add(tmp_path / "new")
    with files_read() as seen:
        [new] = logo.scorer.indices
    assert seen == {"new": 1}
    kept = {adapter.name: rows for adapter, rows in zip(new.adapters, new.rows, strict=True)}
    for adapter, rows in zip(old.adapters, old.rows, strict=True):
        assert new.stacked[kept[adapter.name]].equal(old.stacked[rows])


def test_only_new_adapters_are_read_for_whole_responses(model: Any, folder: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "new", model, ("q_proj", "v_proj"), rank=2, seed=9)
    logo = opened(model, folder, signal="entropy")
    before = logo.select(PROMPT).scores
    logo.pool.add(tmp_path / "new")
    with files_read() as seen:
        added = logo.select(PROMPT).scores
        logo.pool.remove("new")
        removed = logo.select(PROMPT).scores
    assert seen.keys() == {"new"}
    assert {name: added[name] for name in before} == pytest.approx(before, rel=1e-5) and removed == before


def test_scores_are_those_of_the_files_that_were_opened(model: Any, folder: Path, tmp_path: Path) -> None:
    """Also if a file is written to in place, or cut short, on which a view of it would end the process."""
    pool = Path(shutil.copytree(folder, tmp_path / "pool"))
    logo = opened(model, pool, signal="entropy")
    before = logo.select(PROMPT).scores
    file = pool / "t1" / SAFETENSORS
    with open(file, "r+b") as stream:
        stream.seek(-file.stat().st_size // 2, os.SEEK_END)
        stream.write(b"\x11" * (file.stat().st_size // 2))
    assert logo.select(PROMPT).scores == before
    os.truncate(file, 0)
    assert logo.select(PROMPT).scores == before


def test_passes_of_bounded_size_measure_the_same(model: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = opened(model, folder, signal="calibrated").calibrate()
    monkeypatch.setattr(calibration, "_HELD_BYTES", 1)  # one layer and one index at a time
    parts = opened(model, folder, signal="calibrated").calibrate()
    assert whole is not None and parts is not None and parts.points == whole.points
    torch.testing.assert_close(parts.neutral, whole.neutral, equal_nan=True)


def test_points_that_read_the_same_vectors_are_scored_together(model: Any, folder: Path) -> None:
    """q and v of a layer read the same ones, o reads others; the scores are those of each point alone."""
    scorer = opened(model, folder, signal="calibrated").scorer
    layers = [(point.layer, point.module.endswith("o_proj")) for point in scorer.points]
    assert len(scorer.groups) < len(scorer.points)
    assert [layers[group.first] for group in scorer.groups] == [layer for layer, _ in itertools.groupby(layers)]
    hidden = {layer: torch.randn(5, scorer.indices[0].stacked.shape[1]) for layer in layers}
    alone = [scorer.signal(one, hidden[layer]) for one, layer in zip(scorer.indices, layers, strict=True)]
    together = [scorer.signal(group.index, hidden[layers[group.first]]) for group in scorer.groups]
    torch.testing.assert_close(torch.cat(together, dim=1), torch.cat(alone, dim=1))
    for group in scorer.groups:  # which take no memory of their own
        assert scorer.indices[group.first].stacked.data_ptr() == group.index.stacked.data_ptr()


# -- whitening ---------------------------------------------------------------------------------------------------------


def sample(tokens: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(0, -2, width)
    return torch.randn(tokens, width, generator=generator) * scales + torch.randn(width, generator=generator)


def textbook(hidden: torch.Tensor) -> torch.Tensor:
    """(C / m + λ)^-1/2 up to a constant that makes directions without variance pass unchanged."""
    centred = (hidden - hidden.mean(0)).double()
    c = centred.T @ centred / len(hidden)
    values, vectors = torch.linalg.eigh(c)
    gain = (SHRINKAGE / (values.clamp_min(0) / values.clamp_min(0).mean() + SHRINKAGE)).sqrt()
    return (vectors @ torch.diag(gain) @ vectors.T).float()


@pytest.mark.parametrize(("tokens", "width"), [(200, 12), (9, 40)], ids=["more tokens", "fewer tokens"])
def test_whitening_is_the_formula(tokens: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whitening, "_NEGLIGIBLE", 0.0)
    hidden = sample(tokens, width)
    found = Whitening.of(hidden)
    torch.testing.assert_close(found.fold(torch.eye(width)), textbook(hidden), atol=1e-4, rtol=1e-3)
    same_tensor(found.mean, hidden.mean(0))


def test_directions_that_hardly_matter_are_left_alone() -> None:
    hidden = sample(500, 64)
    found = Whitening.of(hidden)
    assert 0 < len(found.gain) < 64
    torch.testing.assert_close(found.fold(torch.eye(64)), textbook(hidden), atol=0.03, rtol=0)


def test_the_index_scores_whitened_vectors() -> None:
    generator = torch.Generator().manual_seed(1)
    factors = [(torch.randn(r, 12, generator=generator), torch.randn(7, r, generator=generator)) for r in (1, 3, 9)]
    hidden = sample(100, 12)
    found = Whitening.of(hidden)
    scored = index_of(factors, found).norms(hidden)
    particular = (hidden - found.mean) @ found.fold(torch.eye(12))
    expected = torch.stack([(particular @ a.T @ b.T).norm(dim=1) for a, b in factors], dim=1)
    same_tensor(scored, expected)


def test_a_sketch_keeps_lengths_up_to_its_noise() -> None:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(400, 96, generator=generator) @ torch.randn(96, 96, generator=generator) + 2
    found = Whitening.of(hidden)
    centred = hidden - found.mean
    exact = found.fold(centred).norm(dim=1)  # W is symmetric
    ratio = (centred @ found.sketch().T).norm(dim=1) / exact
    assert 0.9 < ratio.mean() < 1.1
    assert ratio.std() < 0.13
    same_tensor(found.sketch(), found.sketch())


# -- sizes -------------------------------------------------------------------------------------------------------------


class Quantised(torch.Tensor):
    """As torchao and Quanto have them: the values are somewhere else."""


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


@pytest.mark.slow
def test_a_base_model_has_its_own_sizes(model: Any, folder: Path, tmp_path: Path) -> None:
    larger = tiny.model("llama", num_hidden_layers=6)
    with torch.no_grad():
        for name, weight in larger.named_parameters():
            if name.endswith("q_proj.weight"):
                weight.mul_(10)
    for base in (model, larger):
        logo = opened(base, folder, signal="norm", cache=str(tmp_path))
        assert not logo.scorer.selector.sizes
        scorer = logo.calibrated(logo.prepared(), "calibrated").scorers["calibrated"]
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
