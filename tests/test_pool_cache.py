"""Opening a pool again: from one file while nothing has changed, and never from it when something has."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from logo import AdapterPool, LoGo, PoolError, SelectionSettings
from logo.adapters import format as adapter_format
from logo.adapters import survey as survey_module
from logo.adapters.format import Adapter
from logo.adapters.pool_cache import PoolCache
from logo.selection import index, index_file, scorers
from test_engine import PROMPTS, tokenizer, write_adapter
from tolerances import same_scores


@pytest.fixture
def made(llama: nn.Module, tmp_path: Path) -> Path:
    for i in range(4):
        write_adapter(tmp_path / "pool" / f"t{i}", llama, ("q_proj", "v_proj"), rank=2, seed=i)
    return tmp_path / "pool"


@pytest.fixture
def cache(tmp_path: Path) -> str:
    return str(tmp_path / "cache")


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the adapters whose files are opened from here on."""
    names: list[str] = []

    def open_adapter(folder: Any, name: str, **how: Any) -> Adapter:
        names.append(name)
        return adapter_format.open_adapter(folder, name, **how)

    monkeypatch.setattr(survey_module, "open_adapter", open_adapter)
    return names


def same(one: AdapterPool, other: AdapterPool) -> bool:
    """Equal in everything that counts."""
    return [(a.name, a.folder, a.config, dict(a.modules), a.file.path) for a in one] == [
        (a.name, a.folder, a.config, dict(a.modules), a.file.path) for a in other
    ]


def test_a_known_pool_is_not_opened_again(made: Path, cache: str, opened: list[str]) -> None:
    first = AdapterPool.from_directory(made, cache=cache)
    assert opened == ["t0", "t1", "t2", "t3"]
    opened.clear()
    again = AdapterPool.from_directory(made, cache=cache)
    assert opened == []
    assert same(first, again)
    assert same(again, AdapterPool.from_directory(made, cache=""))


def test_adapters_of_one_recipe_share_their_modules(made: Path, cache: str) -> None:
    for pool in (AdapterPool.from_directory(made, cache=cache), AdapterPool.from_directory(made, cache=cache)):
        assert len({id(adapter.modules) for adapter in pool}) == 1
        assert pool["t0"].read().keys() == pool["t3"].read().keys()


def test_patterns_in_another_order_are_another_recipe(made: Path, cache: str) -> None:
    """The first key that matches counts, so the order of patterns is part of what they mean."""
    for name, pattern in (("t0", {"q_proj": 2, ".*q_proj": 8}), ("t1", {".*q_proj": 8, "q_proj": 2})):
        config = made / name / "adapter_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "alpha_pattern": pattern}))
    for _ in range(2):
        pool = AdapterPool.from_directory(made, cache=cache)
        scales = [next(m.scaling for p, m in pool[n].modules.items() if p.endswith("q_proj")) for n in ("t0", "t1")]
        assert scales == [1, 4]


def change_weights(adapter: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({key: 2 * value for key, value in tensors.items()}, adapter / "adapter_model.safetensors")


def change_scale(adapter: Path) -> None:
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 9}))


@pytest.mark.parametrize("change", [change_weights, change_scale])
def test_what_changed_is_opened_again(change: Any, made: Path, cache: str, opened: list[str], llama: nn.Module) -> None:
    def engine(kept: str) -> LoGo:
        chosen = SelectionSettings("norm", k=2, cache=kept)
        return LoGo(llama, tokenizer(), AdapterPool.from_directory(made, cache=kept), settings=chosen)

    before = engine(cache).select(PROMPTS[0])
    opened.clear()
    change(made / "t1")
    after = engine(cache).select(PROMPTS[0])
    assert opened == ["t1"]
    assert after.scores["t1"] != before.scores["t1"]
    assert after == engine("").select(PROMPTS[0])


@pytest.mark.parametrize("known", [False, True])
def test_what_changes_while_it_is_opened_is_opened_again(
    known: bool, made: Path, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if known:
        AdapterPool.from_directory(made, cache=cache)
        shutil.rmtree(made / "t3")  # something new to be kept
    with monkeypatch.context() as patch:
        keep = PoolCache.keep

        def late(self: PoolCache, adapters: Any, verified: Any) -> None:
            change_scale(made / "t1")
            keep(self, adapters, verified)

        patch.setattr(PoolCache, "keep", late)
        AdapterPool.from_directory(made, cache=cache)
    assert AdapterPool.from_directory(made, cache=cache)["t1"].config.alpha == 9


def test_an_index_belongs_to_the_adapters_that_were_opened(made: Path, cache: str, llama: nn.Module) -> None:
    def engine(kept: str) -> LoGo:
        chosen = SelectionSettings("norm", k=2, cache=kept)
        return LoGo(llama, tokenizer(), AdapterPool.from_directory(made, cache=kept), settings=chosen)

    before = engine(cache)
    change_scale(made / "t1")
    before.select(PROMPTS[0])
    assert engine(cache).select(PROMPTS[0]) == engine("").select(PROMPTS[0])


def test_adapters_come_and_go(made: Path, cache: str, opened: list[str], llama: nn.Module) -> None:
    AdapterPool.from_directory(made, cache=cache)
    write_adapter(made / "new", llama, ("q_proj",), rank=3, seed=9)
    shutil.rmtree(made / "t2")
    opened.clear()
    pool = AdapterPool.from_directory(made, cache=cache)
    assert (pool.names, opened) == (("new", "t0", "t1", "t3"), ["new"])
    assert same(pool, AdapterPool.from_directory(made, cache=cache))


def test_damaged_adapters_are_never_known(made: Path, cache: str) -> None:
    tensors = load_file(made / "t1" / "adapter_model.safetensors")
    first = next(iter(tensors))
    save_file({**tensors, first: torch.full_like(tensors[first], torch.nan)}, made / "t1" / "adapter_model.safetensors")
    for _ in range(2):
        with pytest.raises(PoolError, match=r"'t1'.*NaN"):
            AdapterPool.from_directory(made, cache=cache)
        assert AdapterPool.from_directory(made, cache=cache, on_bad_adapter="skip").names == ("t0", "t2", "t3")


def test_what_was_not_verified_is_verified_when_asked(made: Path, cache: str) -> None:
    tensors = load_file(made / "t1" / "adapter_model.safetensors")
    first = next(iter(tensors))
    save_file({**tensors, first: torch.full_like(tensors[first], torch.inf)}, made / "t1" / "adapter_model.safetensors")
    assert len(AdapterPool.from_directory(made, cache=cache, verify=False)) == 4
    with pytest.raises(PoolError, match=r"'t1'.*Inf"):
        AdapterPool.from_directory(made, cache=cache, verify=True)


@pytest.mark.parametrize("content", [b"", b"{}", b'{"format": 1}', b'{"format": 99, "adapters": []}', b"\xff\x00"])
def test_a_damaged_file_is_as_good_as_none(content: bytes, made: Path, cache: str, opened: list[str]) -> None:
    first = AdapterPool.from_directory(made, cache=cache)
    [file] = (Path(cache) / "pools").iterdir()
    file.write_bytes(content)
    opened.clear()
    assert same(first, AdapterPool.from_directory(made, cache=cache))
    assert len(opened) == 4
    opened.clear()
    AdapterPool.from_directory(made, cache=cache)
    assert opened == []


@pytest.mark.parametrize("signal", ["norm", "entropy", "calibrated", "arrow"])
def test_a_known_index_is_read_and_not_made(
    signal: str, made: Path, cache: str, llama: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def engine() -> LoGo:
        settings = SelectionSettings(signal=signal, k=2, cache=cache)
        return LoGo(llama, tokenizer(), AdapterPool.from_directory(made, cache=cache), settings=settings)

    first = engine()
    expected = [first.select(prompt) for prompt in PROMPTS]

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("made again")

    monkeypatch.setattr(index.ScoringIndex, "read", never)
    monkeypatch.setattr(scorers, "calibrate", never)
    again = engine()
    for prompt, selection in zip(PROMPTS, expected, strict=True):
        found = again.select(prompt)
        assert found.adapters == selection.adapters
        assert list(found.scores.values()) == same_scores(list(selection.scores.values()))
    assert again.scorer.points == first.scorer.points
    if signal == "calibrated":
        assert first.scorer.calibration is not None and again.scorer.calibration is not None
        assert again.scorer.calibration.ranking == first.scorer.calibration.ranking


def test_another_base_model_has_another_index(made: Path, cache: str, llama: nn.Module) -> None:
    import tiny

    settings = SelectionSettings(signal="calibrated", k=2, cache=cache)
    LoGo(llama, tokenizer(), AdapterPool.from_directory(made, cache=cache), settings=settings).calibrate()
    other = tiny.model("llama", seed=5)
    kept = LoGo(other, tokenizer(), AdapterPool.from_directory(made, cache=cache), settings=settings)
    fresh = SelectionSettings(signal="calibrated", k=2, cache="")
    alone = LoGo(other, tokenizer(), AdapterPool.from_directory(made, cache=""), settings=fresh)
    assert kept.select(PROMPTS[0]) == alone.select(PROMPTS[0])


def test_only_the_new_adapter_is_read_when_a_pool_grows(
    made: Path, llama: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    logo = LoGo(llama, tokenizer(), AdapterPool.from_directory(made), settings=SelectionSettings("norm", k=2))
    logo.select(PROMPTS[0])
    read: list[str] = []
    whole = Adapter.read

    def reading(adapter: Adapter, modules: Any = None) -> Any:
        read.append(adapter.name)
        return whole(adapter, modules)

    monkeypatch.setattr(Adapter, "read", reading)
    write_adapter(made.parent / "new", llama, ("q_proj", "v_proj"), rank=3, seed=8)
    logo.pool.add(made.parent / "new")
    grown = logo.select(PROMPTS[0])
    assert read == ["new"] and "new" in grown.scores
    logo.pool.remove("t1")
    assert "t1" not in logo.select(PROMPTS[0]).scores
    assert read == ["new"]


def test_old_indices_are_removed(made: Path, cache: str, llama: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_file, "_MOST_FILES", 3)
    for i in range(5):
        settings = SelectionSettings(
            "norm", k=2, cache=cache, probe_layer=i % 3, probe_module=("q_proj", "v_proj")[i // 3]
        )
        LoGo(llama, tokenizer(), AdapterPool.from_directory(made, cache=cache), settings=settings).calibrate()
    assert len(list((Path(cache) / "index").iterdir())) == 3
    assert not any(name.startswith(".") for name in os.listdir(Path(cache) / "index"))
