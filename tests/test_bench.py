"""`logo bench probe`: that it measures what it says. What it measures is no test's business."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tiny
from logo import AdapterPool, LoGo, SelectionSettings
from logo.bench.probe import probe_bench
from logo.cli.run import run
from test_engine import PROMPTS, tokenizer, write_adapter


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
    assert result.arms["calibrated"].points == len(engines["calibrated"].router.points)


def test_the_command_prints_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("What is 7 plus 5?\nSpell cat backwards.\n")
    assert run(["bench", "probe", "--file", str(prompts), "--rounds", "1", "--json"]) == 0
    arms = json.loads(capsys.readouterr().out)["arms"]
    assert set(arms) == {"prefill", "norm", "calibrated"}
    assert run(["bench", "probe", "--file", str(tmp_path / "none")]) == 1
    assert "cannot be read" in capsys.readouterr().err
