"""`logo pool` commands on a pool with adapters that they cannot work on: refused by name, or left out if asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import tiny
from logo import AdapterPool, PoolError
from logo.cli.run import run
from make_adapters import edit_weights, write_peft
from test_dora import write_dora

SKIP = ["--on-bad-adapter", "skip"]


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    """A plain adapter, one that cannot be rewritten, and one with a copy of weights of the base model."""
    write_peft(tmp_path / "pool" / "plain")
    write_dora(tmp_path / "pool" / "dora")
    write_peft(tmp_path / "pool" / "whole", tiny.model("llama"), modules_to_save=["lm_head"])
    return tmp_path / "pool"


@pytest.mark.parametrize(
    ("command", "bad"),
    [
        (["prune", "--rank", "1"], ["dora", "whole"]),
        (["convert", "--dtype", "bf16"], ["dora", "whole"]),
        (["dedupe"], ["whole"]),
    ],
)
def test_new_pools(pool: Path, capsys: pytest.CaptureFixture[str], command: list[str], bad: list[str]) -> None:
    out = pool.parent / "out"
    line = ["pool", *command, str(pool), "--out", str(out)]
    assert run(line) == 1 and not out.exists()
    said = capsys.readouterr().err
    assert f"adapter '{bad[0]}': it " in said and "--on-bad-adapter skip" in said
    assert run([*line, *SKIP]) == 0
    said = capsys.readouterr().err
    assert all(f"refused {name}: it " in said for name in bad)
    assert AdapterPool.from_directory(out).names == tuple(sorted({"plain", "dora", "whole"} - set(bad)))
    [change] = json.loads((out / "pool.json").read_text())["changes"]
    assert change["refused"] == bad


def test_an_adapter_without_its_initial_state_is_left_out_of_a_conversion(pool: Path) -> None:
    write_peft(pool / "begun", init_lora_weights="pissa")
    out = pool.parent / "out"
    assert run(["pool", "convert", str(pool), "--out", str(out), *SKIP]) == 0
    assert AdapterPool.from_directory(out).names == ("plain",)


def test_a_manifest_names_the_place_of_the_adapter_that_was_opened(tmp_path: Path) -> None:
    """Where two places have an adapter of one name, and the first is left out."""
    for place in ("pa", "pb"):
        write_peft(tmp_path / place / "x", seed=ord(place[1]))
    (tmp_path / "pa" / "x" / "adapter_config.json").write_text("{")
    places = [str(tmp_path / "pa"), str(tmp_path / "pb")]
    assert run(["pool", "lock", *places, "-o", str(tmp_path / "pool.yaml"), *SKIP]) == 0
    [adapter] = AdapterPool.open(tmp_path / "pool.yaml")
    assert (adapter.name, adapter.folder) == ("x", tmp_path / "pb" / "x")


def test_adapters_to_which_a_pattern_gives_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, path in enumerate(("task/lora1", "task1/lora", "task2/lora")):
        write_peft(Path("lib", path), seed=seed)
    with pytest.raises(PoolError, match="adapter '1': lib/task/lora1 and lib/task1/lora have the same name"):
        AdapterPool.open("./lib/task*/lora*")
    pool = AdapterPool.open("./lib/task*/lora*", on_bad_adapter="skip")
    assert pool.names == ("1", "2") and len(pool.refused) == 1


def test_a_check_of_nothing_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["pool", "inspect", str(tmp_path)]) == 0
    assert run(["pool", "inspect", str(tmp_path), "--check"]) == 1
    assert "0 usable" in capsys.readouterr().out
    write_peft(tmp_path / "plain")
    assert run(["pool", "inspect", str(tmp_path), "--check"]) == 0


def test_names_that_a_manifest_cannot_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("plain", "two\nlines"):
        write_peft(tmp_path / "pool" / name)
    manifest = tmp_path / "pool.yaml"
    line = ["pool", "lock", str(tmp_path / "pool"), "--out", str(manifest)]
    assert run(line) == 1 and not manifest.exists()
    assert r"adapter 'two\nlines': a manifest cannot hold its name 'two\nlines'" in capsys.readouterr().err
    assert run([*line, *SKIP]) == 0
    pool = AdapterPool.open(manifest)
    assert pool.names == ("plain",)


def test_nothing_is_left(pool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["pool", "prune", str(pool / "dora"), "--rank", "1", "--out", str(pool.parent / "out"), *SKIP]
    assert run(line) == 1
    assert "cannot be rewritten" in capsys.readouterr().err and not (pool.parent / "out").exists()


def test_comparisons(pool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["pool", "diff", str(pool), str(pool)]) == 1
    assert "adapter 'whole': it holds full weights" in capsys.readouterr().err
    assert run(["pool", "diff", str(pool), str(pool), *SKIP]) == 0
    assert run(["pool", "inspect", str(pool), "--spectra"]) == 0
    said = capsys.readouterr().out
    assert "refused whole: it holds full weights" in said and "2 usable" in said


def test_magnitudes_of_dora_are_no_duplicates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Equal factors are no equal adapters if there are magnitudes beside them, which scale every output."""

    def louder(weights: dict[str, torch.Tensor]) -> None:
        weights |= {key: 3 * tensor for key, tensor in weights.items() if "magnitude" in key}

    write_peft(tmp_path / "pool" / "plain")
    write_dora(tmp_path / "pool" / "dora")
    edit_weights(write_dora(tmp_path / "pool" / "louder"), louder)
    assert run(["pool", "dedupe", str(tmp_path / "pool"), "--dry-run"]) == 0
    assert "3 of 3 adapters stay" in capsys.readouterr().out
    for one in ("plain", "louder"):
        pair = [str(tmp_path / "pool" / name) for name in (one, "dora")]
        assert run(["pool", "diff", *pair, "--check"]) == 1
        assert "1 other update" in capsys.readouterr().out
    assert run(["pool", "diff", pair[1], pair[1], "--check"]) == 0
