"""`logo bench`: that each part measures what its name says. The measured numbers are not tested."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import tiny
from logo import AdapterPool, LoGo, SelectionSettings
from logo.bench import curves, full, large, parts
from logo.bench.peft_arm import PeftArm
from logo.bench.probe import probe_bench
from logo.bench.synthetic import (
    TARGETS,
    Sizes,
    base_model,
    memory_pool,
    parse_targets,
    prompts,
    random_mixtures,
    related_mixtures,
    write_adapters,
)
from logo.cli.run import run
from logo.generation import greedy_config
from test_engine import PROMPTS, tokenizer, write_adapter
from tolerances import same_weights


def test_every_arm_is_timed_against_the_prefill(tmp_path: Path) -> None:
    model = tiny.model("llama")
    for i in range(3):
        write_adapter(tmp_path / f"t{i}", model, ("q_proj", "v_proj"), rank=2, seed=i)
    pool = AdapterPool.from_directory(tmp_path)
    engines = {
        signal: LoGo(model, tokenizer(), pool, settings=SelectionSettings(signal=signal, k=2))
        for signal in ("norm", "calibrated")
    }
    rounds = []
    result = probe_bench(engines, PROMPTS, rounds=3, on_round=lambda: rounds.append(1))
    assert len(rounds) == 4  # the first does not count
    assert list(result.arms) == ["prefill", "norm", "calibrated"]
    assert result.prompts == len(PROMPTS)
    assert result.tokens == sum(map(len, engines["norm"].prompts.encode(PROMPTS)))
    for name, arm in result.arms.items():
        assert arm.seconds > 0
        assert arm.ratio == pytest.approx(arm.seconds / result.arms["prefill"].seconds)
        assert (arm.index_bytes > 0) == (name != "prefill")
    assert result.arms["norm"].points == 1
    assert result.arms["calibrated"].points == len(engines["calibrated"].scorer.points)


def test_the_command_prints_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("What is 7 plus 5?\nSpell cat backwards.\n")
    assert run(["bench", "probe", "--prompts", str(prompts), "--rounds", "1", "--json"]) == 0
    arms = json.loads(capsys.readouterr().out)["arms"]
    assert set(arms) == {"prefill", "norm", "calibrated"}
    assert run(["bench", "probe", "--prompts", str(tmp_path / "none")]) == 1
    assert "cannot be read" in capsys.readouterr().err


SMALL = Sizes(hidden=64, layers=3, heads=4, vocabulary=256, rank=2)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything in a few seconds."""
    monkeypatch.setattr(full, "LLAMA_8B_LAYER", replace(SMALL, layers=1))
    monkeypatch.setattr(large, "SMALL", replace(SMALL, layers=1, rank=1))
    for name, values in (("POOLS", (2, 4)), ("KS", (1, 2)), ("BATCHES", (1, 2)), ("LENGTHS", (8, 16))):
        monkeypatch.setattr(curves, name, values)
    monkeypatch.setattr(parts, "_DECODED", 2)
    for name, value in (("_PROMPT", 8), ("_DECODE_PROMPT", 6), ("_NEW", 2), ("_PREFIX", 70), ("_BATCH", 3)):
        monkeypatch.setattr(full, name, value)


@pytest.mark.slow
def test_the_whole_bench(small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--hidden", "64", "--layers", "3", "--heads", "4", "--vocabulary", "256", "--rank", "2"]
    found = tmp_path / "bench.json"
    options = ["--count", "6", "-k", "2", "--rounds", "1", "--large", "24", "--save", str(found)]
    assert run(["bench", *size, *options]) == 0
    shown = capsys.readouterr()
    report = json.loads(found.read_text())
    assert (tmp_path / "bench.png").read_bytes()[:4] == b"\x89PNG"
    asked = {
        "open_vs_peft", "select_vs_prefill", "select_calibrated_vs_prefill", "prefill_vs_base", "decode1_vs_base",
        "decode16_vs_base", "decode16_random_vs_base", "decode16_random_8b_layer_vs_base", "e2e1_vs_peft",
        "e2e1_vs_peft_all_active", "e2e16_vs_peft", "e2e16_vs_peft_one_batch", "prefix_second_vs_first",
        "read_once_vs_prefill", "read_once_long_vs_prefill", "read_once_cached_vs_prefill",
        "read_once_cached_vs_cached_prefill", "e2e1_read_once_vs_base", "e2e16_read_once_vs_base",
        "e2e16_related_read_once_vs_base",
        "prefix_calibrated_second_vs_first", "e2e1_vs_base", "e2e16_vs_base", "e2e16_related_vs_base",
    }  # fmt: skip
    assert set(report["ratios"]) == asked
    seconds = {name: {a: arm["seconds"] for a, arm in part["arms"].items()} for name, part in report["parts"].items()}
    opened, end = seconds["open pool"], seconds["end to end, batch 1"]
    assert report["ratios"]["open_vs_peft"] == pytest.approx(opened["cold"] / opened["PEFT"])  # a cost: ours to theirs
    assert report["ratios"]["e2e1_vs_peft"] == pytest.approx(end["PEFT"] / end["norm"])  # a speed: ours to theirs
    assert report["ratios"]["e2e1_vs_base"] == pytest.approx(end["calibrated"] / end["base"])
    assert report["large_pool"]["adapters"] == 24 and report["large_pool"]["same_best"]
    assert report["large_pool"]["index_bytes"] == 24 * 64 * 4
    assert len(report["curves"]) == 4
    assert all(name in shown.out for name in asked)
    assert "6 adapters, k 2" in shown.err


def test_a_real_model_and_pool(small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.model("llama", max_position_embeddings=512)
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    for i in range(3):
        write_adapter(tmp_path / "pool" / f"t{i}", model, ("q_proj", "v_proj"), rank=2, seed=i)
    real = ["--base-model", str(tmp_path / "model"), "--adapters", str(tmp_path / "pool")]
    found = tmp_path / "bench.json"
    less = ["--rounds", "1", "--large", "0", "--no-peft", "--no-curves"]
    assert run(["bench", *real, *less, "--save", str(found), "--json"]) == 0
    report = json.loads(found.read_text())
    assert json.loads(capsys.readouterr().out) == report
    assert report["about"]["adapters"] == 3 and report["about"]["k"] == 3
    assert "open_vs_peft" not in report["ratios"] and report["large_pool"] is None
    assert run(["bench", "--base-model", "x"]) == 2


def test_adapters_in_memory_are_those_on_disk(tmp_path: Path) -> None:
    """The same tensors, selections and answers, whichever projections are adapted."""
    sizes = replace(SMALL, targets=parse_targets("all-linear"))
    write_adapters(tmp_path, sizes, 5, seed=3)
    pools = AdapterPool.from_directory(tmp_path), memory_pool(sizes, 5, seed=3)
    for written, drawn in zip(*pools, strict=True):
        assert written.name == drawn.name and len(written.modules) == len(TARGETS) * sizes.layers
        others = drawn.read()
        for module, weights in written.read().items():
            assert weights.A.equal(others[module].A) and weights.B.equal(others[module].B)
            assert weights.scaling == others[module].scaling == 2
    assert len({float(weights.A[0, 0]) for adapter in pools[1] for weights in adapter.read().values()}) == 5 * 21
    asked = prompts(sizes, 3, 12)
    answers = []
    for pool in pools:
        logo = LoGo(*base_model(sizes), pool, settings=SelectionSettings(k=2, cache=""))
        answers.append([
            (answer.token_ids, answer.selection)
            for signal in ("norm", "calibrated")
            for answer in logo.generate(asked, signal=signal, max_new_tokens=4)
        ])  # fmt: skip
    assert answers[0] == answers[1]
    assert len({selection.adapters for _, selection in answers[0]}) > 1


def test_a_bench_without_files_in_half_precision(small: None, tmp_path: Path, capsys: Any) -> None:
    found = tmp_path / "bench.json"
    size = ["--hidden", "64", "--layers", "3", "--heads", "4", "--vocabulary", "256", "--rank", "2", "--count", "4"]
    options = ["-k", "2", "--rounds", "1", "--large", "8", "--no-curves", "--save", str(found)]
    chosen = ["--in-memory", "--dtype", "bfloat16", "--targets", "q_proj,down_proj"]
    assert run(["bench", *size, *options, *chosen]) == 0
    assert "bfloat16 · 4 adapters, k 2" in capsys.readouterr().err
    report = json.loads(found.read_text())
    assert report["about"]["dtype"] == "bfloat16" and report["about"]["in_memory"]
    assert set(report["parts"]["open pool"]["arms"]) == {"cold"}  # there are no files that could be known, nor PEFT
    assert "decode16_random_8b_layer_vs_base" in report["ratios"]
    assert report["large_pool"]["adapters"] == 8 and report["large_pool"]["same_best"]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--dtype", "float61"], "unknown dtype 'float61'"),
        (["--targets", "q_proj,gate"], "unknown target 'gate'"),
        (["--in-memory", "--peft"], "PEFT, which reads files"),
    ],
)
def test_what_a_bench_cannot_do_is_said_at_once(options: list[str], problem: str, capsys: Any) -> None:
    assert run(["bench", *options]) == 2
    assert problem in capsys.readouterr().err


def test_peft_does_the_same_method(tmp_path: Path) -> None:
    """Same adapters, weights and tokens: what is compared is the same work."""
    write_adapters(tmp_path, SMALL, 6, seed=3)
    for one in tmp_path.iterdir():  # strong enough to change answers
        tensors = load_file(one / "adapter_model.safetensors")
        save_file({key: 12 * value for key, value in tensors.items()}, one / "adapter_model.safetensors")
    arm = PeftArm(*base_model(SMALL), tmp_path, 3)
    logo = LoGo(*base_model(SMALL), AdapterPool.from_directory(tmp_path), settings=SelectionSettings("norm", k=3))
    config = greedy_config(max_new_tokens=8, min_new_tokens=8)
    asked = prompts(SMALL, 4, 12)
    ours = logo.generate(asked, generation_config=config, batch_size=4)
    plain = logo.generate(asked, adapters={}, generation_config=config, batch_size=4)
    assert [answer.token_ids for answer in ours] != [answer.token_ids for answer in plain]
    for prompt, answer in zip(asked, ours, strict=True):
        weights = arm.select(prompt)
        assert list(weights) == list(answer.selection.adapters)
        assert list(weights.values()) == same_weights(list(answer.selection.weights))
        assert arm.answer(prompt, config) == list(answer.token_ids)
        assert arm.answer_active(prompt, config) == list(answer.token_ids)
    assert arm.answer_batch(asked, config) == [list(answer.token_ids) for answer in ours]


def test_related_rows_overlap_as_measured() -> None:
    names = tuple(f"{i:03}" for i in range(260))
    rows = [set(row) for row in related_mixtures(names, 400, 20)]
    assert all(len(row) == 20 for row in rows)
    pairs = [len(rows[i] & rows[i + 4]) for i in range(0, 396)]
    assert sum(pairs) / len(pairs) == pytest.approx(18.3, abs=0.3)
    fours = [len(rows[i] | rows[i + 4] | rows[i + 8] | rows[i + 12]) for i in range(0, 380)]
    assert sum(fours) / len(fours) == pytest.approx(23.3, abs=0.4)
    assert all(sum(row.values()) == pytest.approx(1) for row in related_mixtures(names, 4, 20))
    assert all(len(row) == 20 for row in random_mixtures(names, 4, 20))
