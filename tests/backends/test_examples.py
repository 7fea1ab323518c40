"""Example prompts inside vLLM: a pool in which half of the adapters have some selects as in the local engine."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from engines import Engines
from safetensors.torch import load_file
from test_engine_steps import MODES
from vllm_server import ASSETS

from logo import LoGo
from logo.adapters.files import EXAMPLES
from logo.backends.vllm import probing
from logo.evaluation.identity import engine_identity
from tolerances import WEIGHTS, same_scores, same_selection

pytest.importorskip("vllm.lora", reason="needs vLLM: make test-vllm")

VLLM = {"enforce_eager": True, "max_model_len": 256}
RUNNERS: dict[str, dict[str, str]] = {"v1": {}, "v2": {"PRETEND_V2": "1"}}


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's adapters; every second one has lost its examples."""
    folder = tmp_path_factory.mktemp("pools") / "half"
    shutil.copytree(ASSETS / "adapters", folder)
    for file in sorted(folder.rglob(EXAMPLES))[::2]:
        file.unlink()
    return folder


@pytest.fixture(scope="module")
def local(half: Path) -> LoGo:
    return LoGo.from_pretrained("demo", half, device="cpu", k=4)


@pytest.fixture
def opened(settings_of_vllm: None, half: Path) -> Iterator[Any]:
    """Opens engines inside vLLM; each ends before the next one begins."""

    class Opened:
        def __init__(self) -> None:
            self.last: Any = None

        def __call__(self, pool: Path = half, **options: Any) -> Any:
            self.close()
            self.last = LoGo.from_pretrained("demo", pool, engine="vllm", k=4, model_kwargs=VLLM, **options)
            return self.last

        def close(self) -> None:
            if self.last is not None:
                self.last.close()

    with closing(Opened()) as made:
        yield made


@pytest.mark.parametrize("chunk", [pytest.param(None, marks=pytest.mark.long), 48])
@pytest.mark.parametrize("runner", ["v1", pytest.param("v2", marks=pytest.mark.long)])
def test_scores_are_the_local_engines(
    engines: Engines, tmp_path: Path, half: Path, local: LoGo, rows: list[str], runner: str, chunk: int | None
) -> None:
    """Whole prompts and chunks; and a second time, when their beginnings are in vLLM's cache."""
    chunks = {"max_num_batched_tokens": chunk, "max_num_seqs": 8} if chunk else {}
    flags = MODES["gate"] | {"block_size": 32, "max_model_len": 192, **chunks}
    shared = " ".join(rows[:5])
    prompts = [*rows[: 6 if runner == "v2" else 32], *(f"{shared} {row}" for row in rows[8:11])]
    probe = {"do": "probe_counted", "prompts": prompts, "signal": "calibrated"}
    first, again = engines.run(
        tmp_path,
        flags,
        {"pool": str(half)},
        probe,
        probe,
        **RUNNERS[runner],
    )
    for i, expected in enumerate(local.select(prompts)):
        for found in (first, again):
            assert found["scores"][i] == same_scores(list(expected.scores.values())), prompts[i]
    assert min(again["cached"][-3:]) >= 64
    for one, other in zip(again["scores"], first["scores"], strict=True):
        assert one == pytest.approx(other, abs=WEIGHTS)


def test_selections_are_those_of_the_local_engine(opened: Any, local: LoGo, rows: list[str]) -> None:
    inside = opened()
    identity = engine_identity(inside, "base", {})
    assert {**identity, "engine_options": None} == {**engine_identity(local, "base", {}), "engine_options": None}
    for found, expected in zip(inside.select(rows), local.select(rows), strict=True):
        same_selection(found, expected)
        assert found.confidence == pytest.approx(expected.confidence, abs=1e-4)
    without = opened(examples="ignore")
    assert engine_identity(without, "base", {}) != identity
    responses = LoGo(local.model, local.tokenizer, local.pool, settings=without.settings)
    for found, expected in zip(without.select(rows[:16]), responses.select(rows[:16]), strict=True):
        same_selection(found, expected)
        assert found.confidence == pytest.approx(expected.confidence, abs=1e-4)


@pytest.mark.long
def test_what_one_engine_has_described_the_other_knows(
    opened: Any,
    half: Path,
    local: LoGo,
    rows: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = str(tmp_path / "cache")
    inside = opened(cache=cache)
    files = list((tmp_path / "cache").rglob("described/*.safetensors"))
    counts = sorted(next(iter(load_file(file).values())).shape[0] for file in files)
    assert counts[:-1] == [1] * 8 and counts[-1] > 1  # means of examples, and our own ordinary texts
    monkeypatch.setattr("logo.selection.examples.read", None)
    own = LoGo.from_pretrained("demo", half, device="cpu", k=4, cache=cache)
    for found, expected in zip(own.select(rows[:8]), inside.select(rows[:8]), strict=True):
        same_selection(found, expected)
    again = opened(cache=cache)
    same_selection(again.select(rows[0]), local.select(rows[0]))


@pytest.mark.long
def test_many_examples_are_run_in_portions(
    opened: Any, local: LoGo, rows: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing of them is computed twice where nothing can be kept on disk."""
    monkeypatch.setattr("logo.selection.examples._TOGETHER", 9)
    run: list[list[list[int]]] = []
    texts_of = probing.texts_of

    def noted(told: Any) -> Any:
        run.append(texts_of(told))
        return run[-1]

    monkeypatch.setattr(probing, "texts_of", noted)
    inside = opened(cache="")
    calibration, *portions, nothing = run
    assert len(calibration) > 100 and not nothing
    assert [len(texts) for texts in portions] == [8, 8, 8, 8]
    assert len({tuple(text) for texts in portions for text in texts}) == 32
    for found, expected in zip(inside.select(rows[::8]), local.select(rows[::8]), strict=True):
        same_selection(found, expected)
