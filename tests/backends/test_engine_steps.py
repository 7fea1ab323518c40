"""Scores and mixtures of vLLM's workers against the library, on real engines."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from engines import Engines

from logo import AdapterPool, LoGo
from logo.adapters.pool import open_pool
from logo.models import load_base
from logo.selection.settings import SelectionSettings
from test_engine import write_adapter

SLOTS = {"max_loras": 16, "max_lora_rank": 8}


def mixtures(names: Sequence[str], count: int, k: int = 4, seed: int = 0) -> list[dict[str, float]]:
    drawn = random.Random(seed)
    return [{name: drawn.uniform(0.1, 1.0) for name in drawn.sample(list(names), k)} for _ in range(count)]


@pytest.mark.parametrize("slots", [16, 5])
def test_128_prompts_with_128_mixtures_among_base_rows(
    slots: int, engines: Engines, tmp_path: Path, logo: LoGo, rows: list[str]
) -> None:
    """Also with fewer slots than the pool has adapters."""
    wanted = [m if i % 8 else {} for i, m in enumerate(mixtures(logo.names, 128))]
    jobs = list(zip(rows, wanted, strict=True))
    step = {"do": "generate", "rows": jobs, "max_tokens": 12}
    [made] = engines.run(tmp_path, SLOTS | {"max_loras": slots, "max_cpu_loras": 16}, {"k": 4}, step)
    expected = logo.generate(rows, adapters=wanted, max_new_tokens=12, batch_size=16)
    assert made["tokens"] == [list(one.token_ids) for one in expected]


def test_scores_are_the_librarys(engines: Engines, tmp_path: Path, logo: LoGo, rows: list[str]) -> None:
    """Also of prompts that are read in chunks."""
    flags = SLOTS | {"max_num_batched_tokens": 48, "max_num_seqs": 8}
    shared = " ".join(rows[:12])
    prompts = [*rows, *(f"{shared} {row}" for row in rows[:6]), rows[0]]  # a shared beginning, and one a second time
    steps = [{"do": "probe", "prompts": prompts, "signal": signal} for signal in ("calibrated", "norm", "calibrated")]
    found = engines.run(tmp_path, flags, {}, *steps)
    for scores, signal in zip(found, ("calibrated", "norm", "calibrated"), strict=True):
        for prompt, one, expected in zip(prompts, scores, logo.select(prompts, signal=signal), strict=True):
            assert one == pytest.approx(list(expected.scores.values()), rel=1e-4, abs=1e-4), (signal, prompt)


def test_calibrations_are_kept_where_the_library_keeps_them(
    engines: Engines, tmp_path: Path, rows: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = str(tmp_path / "cache")
    step = {"do": "probe", "prompts": rows[:2], "signal": "calibrated"}
    [found] = engines.run(tmp_path, SLOTS, {"cache": cache}, step)
    model, tokenizer = load_base("demo", device="cpu", dtype="float32")
    own = LoGo(model, tokenizer, open_pool(None, "demo"), settings=SelectionSettings(cache=cache))
    calibration = own.calibrate()
    assert calibration is not None and calibration.measured == 0
    assert found[0] == pytest.approx(list(own.select(rows[0]).scores.values()), rel=1e-4)


def test_adapters_of_any_rank_on_any_layers(engines: Engines, tmp_path: Path, rows: list[str]) -> None:
    model, tokenizer = load_base("demo", device="cpu", dtype="float32")
    pool = tmp_path / "pool"
    targets = [
        ("q_proj", "v_proj"),
        ("q_proj", "down_proj"),
        ("q_proj", "o_proj", "gate_proj"),
        ("q_proj", "k_proj", "up_proj"),
    ]
    for i, names in enumerate(targets):
        write_adapter(pool / f"t{i}", model, names, rank=2 * i + 1, seed=i)
    logo = LoGo(model, tokenizer, AdapterPool.open(pool))
    wanted = [{}, *({name: 1.0} for name in logo.names), *mixtures(logo.names, 11, 3)]
    found = engines.run(
        tmp_path,
        {"max_loras": 4, "max_lora_rank": 8},
        {"pool": str(pool), "k": 3},
        {"do": "generate", "rows": list(zip(rows[:16], wanted, strict=True)), "max_tokens": 12},
        {"do": "probe", "prompts": rows[:16], "signal": "calibrated"},
    )
    expected = logo.generate(rows[:16], adapters=wanted, max_new_tokens=12, batch_size=16)
    assert found[0]["tokens"] == [list(one.token_ids) for one in expected]
    for one, selection in zip(found[1], logo.select(rows[:16]), strict=True):
        assert one == pytest.approx(list(selection.scores.values()), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(
    ("flags", "options", "expected"),
    [
        ({"max_loras": 16, "max_lora_rank": 1}, {}, "has rank 8: pass --max-lora-rank 8 or more"),
        ({"max_loras": 16, "max_lora_rank": 8}, {"pool": "/nowhere"}, "/nowhere"),
        ({"max_loras": 16, "max_lora_rank": 8, "lora_target_modules": ["o_proj"]}, {}, "has no layer there that takes"),
    ],
)
def test_what_cannot_start_says_what_to_do(
    engines: Engines, tmp_path: Path, flags: dict[str, Any], options: dict[str, Any], expected: str
) -> None:
    with pytest.raises(AssertionError) as error:
        engines.run(tmp_path, flags, options)
    assert expected in str(error.value)
