"""`logo eval run --engine vllm`: what it writes is what the local engine gives."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from logo.cli.app import run
from logo.demo import heldout
from tolerances import same_scores, same_weights

pytest.importorskip("vllm.lora", reason="needs vLLM: make test-vllm")

DEMO = ("--base-model", "demo")
ANY = ("--engine", "vllm")
INSIDE = (*ANY, "--engine-args", "enforce_eager=true")
FILES = ("eval_results", "predictions", "selected_loras")


@pytest.fixture(autouse=True)
def settings_of_the_command(settings_of_vllm: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """It sets these two for the process that it is."""
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "WARNING")
    monkeypatch.setenv("VLLM_LOGGING_STREAM", "ext://sys.stderr")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    for name in ("antonym", "plural"):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in heldout()[name][:6]))
    return folder


def evaluating(results: Path, rows: Path, *arguments: str) -> tuple[str, ...]:
    asked = ("eval", "run", *DEMO, "--rows", str(rows), "--result-dir", str(results), "--max-new-tokens", "8")
    return (*asked, *arguments)


def evaluated(results: Path, rows: Path, *arguments: str) -> Path:
    assert run(evaluating(results, rows, *arguments)) == 0
    [folder] = results.iterdir()
    return folder


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / f"{name}.json").read_text())


def same_results(found: Path, expected: Path, datasets: Sequence[str] = ("antonym", "plural")) -> None:
    assert found.name == expected.name
    for dataset in datasets:
        one, other = found / dataset, expected / dataset
        assert {file.name for file in one.iterdir()} == {file.name for file in other.iterdir()}
        for name in FILES:
            assert read(one, name) == read(other, name), name
        for mine, theirs in zip(read(one, "weights"), read(other, "weights"), strict=True):
            assert mine == same_weights(theirs)
        scores, others = (next(iter(read(place, "metric_dict").values())) for place in (one, other))
        for mine, theirs in zip(scores, others, strict=True):
            assert mine == same_scores(theirs)
        assert read(one, "run")["command"]["options"]["engine"] == "vllm"


def test_results_are_those_of_the_local_engine(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--signal", "calibrated")
    expected = evaluated(tmp_path / "local", rows, *asked)
    same_results(evaluated(tmp_path / "vllm", rows, *asked, *INSIDE), expected)
    capsys.readouterr()
    evaluated(tmp_path / "local", rows, *asked, *INSIDE)  # what one engine has answered, the other does not again
    said = " ".join(capsys.readouterr().err.split())
    assert "antonym is done already" in said and "answered under other versions" in said


def test_methods_answer_through_vllm_too(rows: Path, tmp_path: Path) -> None:
    others = tmp_path / "train"
    others.mkdir()
    (others / "antonym.jsonl").write_text("\n".join(json.dumps(row) for row in heldout()["antonym"][6:9]))
    train = ("--train-rows", str(others), "--dataset", "antonym", "--method", "uniform")
    expected = evaluated(tmp_path / "local", rows, *train)
    same_results(evaluated(tmp_path / "vllm", rows, *train, *INSIDE), expected, ["antonym"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--device", "cpu"), "device: the engine 'vllm' has no such option"),
        (("--engine-args", "max_lora=1"), "model_kwargs: vllm.LLM refuses them"),
        (("--engine-args", "eager"), "--engine-args 'eager': expected NAME=VALUE"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_run_there_is_refused_in_a_line(
    rows: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str
) -> None:
    assert run(evaluating(tmp_path / "results", rows, *ANY, *arguments)) in (1, 2)
    told = capfd.readouterr()
    assert said in [line for line in told.err.splitlines() if line][-1]
    assert not [file for file in (tmp_path / "results").rglob("*") if file.is_file()]
