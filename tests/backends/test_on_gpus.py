"""What vLLM does on GPUs alone, as far as a CPU can run it: `pretend` says how."""

from __future__ import annotations

from pathlib import Path

import pytest
from engines import Engines
from test_engine_steps import SLOTS, mixtures
from vllm.config import VllmConfig
from vllm.config.compilation import CompilationConfig, CompilationMode

from logo import LoGo
from logo.vllm import layers

KINDS: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "v2": ({"PRETEND_V2": "1"}, {}),
    "compiled": ({"PRETEND_COMPILE": "1"}, {"backend": "eager"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_scores_and_tokens_are_the_librarys(
    kind: str,
    engines: Engines,
    tmp_path: Path,
    logo: LoGo,
    rows: list[str],
) -> None:
    environment, compilation = KINDS[kind]
    flags = SLOTS | {"max_num_batched_tokens": 48, "max_num_seqs": 8}
    if compilation:
        flags |= {"enforce_eager": False, "compilation_config": {"mode": 3, **compilation}}
    count = 24
    wanted = [m if i % 8 else {} for i, m in enumerate(mixtures(logo.names, count))]
    prompts = [*rows[:5], " ".join(rows[:6])]  # the last one is read in chunks
    probes = [{"do": "probe", "prompts": prompts, "signal": signal} for signal in ("calibrated", "norm")]
    jobs = {"do": "generate", "rows": list(zip(rows, wanted, strict=False)), "max_tokens": 8}
    found = engines.run(
        tmp_path,
        flags,
        {"k": 4},
        *probes,
        jobs,
        *({"do": what} for what in ("pieces", "runner")),
        **environment,
        **({"VLLM_CACHE_ROOT": str(tmp_path / "cache")} if compilation else {}),
    )
    *scores, made, pieces, runner = found
    for one, signal in zip(scores, ("calibrated", "norm"), strict=True):
        for prompt, own, expected in zip(prompts, one, logo.select(prompts, signal=signal), strict=True):
            assert own == pytest.approx(list(expected.scores.values()), rel=1e-3, abs=1e-3), (signal, prompt)
    answers = logo.generate(rows[:count], adapters=wanted, max_new_tokens=8, batch_size=8)
    assert made["tokens"] == [list(answer.token_ids) for answer in answers]
    assert (runner == "vllm.v1.worker.cpu.model_runner") == ("v2" in kind)
    if compilation:
        [pieces] = pieces
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
