"""How indices are read: every file once for all points, where scores are computed, and rows that depend on nobody."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import make_adapters
import tiny
from logo import AdapterPool, LoGo, SelectionSettings
from logo.adapters.peft import WeightFile
from logo.selection import calibration
from logo.selection.index import joined
from logo.selection.whitening import Whitening
from test_engine import tokenizer, write_adapter


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.model("llama", num_hidden_layers=6)


def write_pool(root: Path, model: Any) -> Path:
    """Four adapters of several ranks and modules, the later ones larger."""
    for i in range(4):
        names = ("q_proj", "v_proj", "o_proj") if i else ("q_proj",)
        write_adapter(root / f"t{i}", model, names, rank=2 + i % 2, seed=i, scale=0.1 * (i + 1))
    return root


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pool(tmp_path_factory.mktemp("pool"), model)


def opened(model: Any, folder: Path, **chosen: Any) -> LoGo:
    settings = SelectionSettings.of(**{"k": 2, "cache": "", **chosen})
    return LoGo(model, tokenizer(), AdapterPool.open(folder), settings=settings)


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


def test_passes_of_bounded_size_measure_the_same(model: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = opened(model, folder, signal="calibrated").calibrate()
    monkeypatch.setattr(calibration, "_HELD_BYTES", 1)  # one layer and one index at a time
    parts = opened(model, folder, signal="calibrated").calibrate()
    assert whole is not None and parts is not None and parts.points == whole.points
    torch.testing.assert_close(parts.neutral, whole.neutral, equal_nan=True)


def test_points_of_dead_inputs_are_not_one_place() -> None:
    """Their whitenings look alike, since nothing is in them, but the vectors are of other widths."""
    both = [
        make_adapters.index_of([(torch.zeros(2, width), torch.zeros(4, 2))], Whitening.of(torch.zeros(9, width)))
        for width in (6, 8)
    ]
    parts, every = joined(both)
    assert [at for at, _ in every] == [0, 1] and [one.stacked.shape[1] for one in parts] == [6, 8]


def test_points_that_read_the_same_vectors_are_scored_together(model: Any, folder: Path) -> None:
    """q and v of a layer read the same ones, o reads others; the scores are those of each point alone."""
    scorer = opened(model, folder, signal="calibrated").scorer
    layers = [(point.layer, point.module.endswith("o_proj")) for point in scorer.points]
    assert len(scorer.joined) < len(scorer.points)
    assert [layers[at] for at, _ in scorer.joined] == [layer for layer, _ in itertools.groupby(layers)]
    hidden = {layer: torch.randn(5, scorer.indices[0].stacked.shape[1]) for layer in layers}
    alone = [scorer.signal(one, hidden[layer]) for one, layer in zip(scorer.indices, layers, strict=True)]
    together = [scorer.signal(one, hidden[layers[at]]) for at, one in scorer.joined]
    torch.testing.assert_close(torch.cat(together, dim=1), torch.cat(alone, dim=1))
    for at, whole in scorer.joined:  # which take no memory of their own
        assert scorer.indices[at].stacked.data_ptr() == whole.stacked.data_ptr()
