"""What vLLM does on GPUs alone, as far as a CPU can run it: `pretend` says how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engines import mixtures, run
from vllm.config import VllmConfig
from vllm.config.compilation import CompilationConfig, CompilationMode

from logo import LoGo
from logo.vllm import layers

KINDS: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "v2": ({"PRETEND_V2": "1"}, {}),
    "compiled": (
        {"PRETEND_COMPILE": "1", "VLLM_DISABLE_COMPILE_CACHE": "1"},
        {"enforce_eager": False, "compilation_config": {"mode": 3, "backend": "eager"}},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_scores_and_tokens_are_the_librarys(kind: str, tmp_path: Path, logo: LoGo, rows: list[str]) -> None:
    variables, flags = KINDS[kind]
    count, signals = 8, ("calibrated", "norm")
    wanted = mixtures(logo.names, count)
    prompts = [*rows[:5], " ".join(rows[:16])]  # the last one is read in chunks
    job = {"prompts": prompts, "signals": signals, "rows": [*zip(rows, wanted, strict=False)], "max_tokens": 5}
    flags = {"max_num_batched_tokens": 160, "max_num_seqs": 16, **flags}
    found = run(tmp_path, {**job, "flags": flags, "logo": {}}, **variables)
    for signal in signals:
        for own, expected in zip(found["scores"][signal], logo.select(prompts, signal=signal), strict=True):
            assert own == pytest.approx(list(expected.scores.values()), rel=1e-3, abs=1e-3), signal
    answers = logo.generate(rows[:count], adapters=wanted, max_new_tokens=5, batch_size=8)
    assert found["tokens"] == [list(answer.token_ids) for answer in answers]
    assert (found["runner"] == "vllm.v1.worker.cpu.model_runner") == (kind == "v2")
    if kind == "compiled":
        [pieces] = found["pieces"]
        tapped = [piece for piece in pieces if "logo.tap.default" in piece["operators"]]
        assert tapped and all(piece["split"] and set(piece["operators"]) == {"logo.tap.default"} for piece in tapped)
        # Half of the layers is read, at the input of their q_proj, and the residual stream once.
        assert sum(len(piece["operators"]) for piece in tapped) < len(pieces) / 3


# -- graphs -----------------------------------------------------------------------------------------------------------


def settled(operators: list[str]) -> VllmConfig:
    config = VllmConfig(additional_config={"logo": {"pool": "p"}})
    config.compilation_config = CompilationConfig(mode=CompilationMode.VLLM_COMPILE, splitting_ops=list(operators))
    return config


def test_the_model_is_split_at_taps_where_it_is_split_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = "vllm::unified_attention_with_output"
    for operators in ([attention], []):
        config = settled(operators)
        for _ in range(2):
            layers.split(config, ["one"])
        assert config.compilation_config.splitting_ops == ([*operators, "logo::tap"] if operators else [])
        assert layers.is_compiled(config)
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")
    config = settled([attention])
    layers.split(config, ["one"])
    assert config.compilation_config.splitting_ops == [attention]


def test_what_is_compiled_is_known_to_vllms_cache() -> None:
    digests = set()
    for said in (None, ["one"], ["two"]):
        config = settled([])
        if said is not None:
            layers.split(config, said)
        assert config.additional_config["logo"] == {"pool": "p"}
        digests.add(config.compute_hash())
    assert len(digests) == 3
