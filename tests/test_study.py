"""`logo eval study` by kinds of evidence and in several wordings: against the public calls, and each wording alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logo import LoGo
from logo.cli.app import run
from logo.demo import heldout
from logo.evaluation.contest import IN_POOL, OUT_OF_POOL, REMOVED
from logo.evaluation.results import lines, read_run
from test_evaluate import MODEL, one_line
from tolerances import same_scores
from written import write_rows

TASKS = ("antonym", "plural", "french")
ARMS = ("calibrated", "examples", "responses+examples", "responses")


@pytest.fixture(scope="module")
def wordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks with an adapter and one without, in two wordings."""
    root = tmp_path_factory.mktemp("wordings")
    for task in TASKS:
        rows = heldout()[task][:2]
        write_rows(root / "training" / f"{task}.jsonl", rows)
        short = [{**row, "context": row["context"].rstrip(".?").split()[-1] + " ->"} for row in rows]
        write_rows(root / "short" / f"{task}.jsonl", short)
    write_rows(root / "training" / "planets.jsonl", [{"context": "Name the third planet.", "completion": "Earth"}])
    write_rows(root / "short" / "planets.jsonl", [{"context": "planet 3 ->", "completion": "Earth"}])
    return root


def studied(save: Path, rows: str, *more: str, code: int = 0) -> dict[str, Any]:
    asked = ["eval", "study", *MODEL, "--rows", rows, "--save", str(save), *more]
    assert run(asked) == code
    return read_run(save)["report"] if code == 0 else {}


def without_times(report: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in report.items() if name != "milliseconds"}


@pytest.fixture(scope="module")
def both(wordings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of both wordings."""
    save = tmp_path_factory.mktemp("out") / "both"
    studied(save, f"{wordings / 'training'},{wordings / 'short'}", "--signals", ",".join(ARMS))
    return save


def test_an_arm_of_evidence_is_what_the_engine_selects_by_it(both: Path) -> None:
    logo = LoGo.from_pretrained("demo", device="cpu")
    engines = {
        "calibrated": logo,
        "responses+examples": logo,  # all that there is without an encoder
        "examples": logo.only(["examples"]),
        "responses": LoGo.from_pretrained("demo", device="cpu", examples="ignore"),
    }
    checked = 0
    for record in lines(both):
        for arm in record["arms"]:
            if arm["arm"] in ARMS:
                among = [name for name in logo.names if name != record["task"]] if arm["protocol"] == REMOVED else None
                expected = engines[arm["arm"]].select(record["prompt"], candidates=among)
                assert arm["selected"] == list(expected.adapters)
                assert arm["weights"] == same_scores(list(expected.weights))
                assert arm["confidence"] == same_scores(expected.confidence)
                checked += 1
    assert checked == 2 * (3 * 2 * 2 + 1) * len(ARMS)


def test_each_wording_is_reported_as_if_it_were_alone(
    both: Path, wordings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """So the confidence compares rows with those of unseen tasks in the same wording."""
    report = read_run(both)["report"]
    alone = {}
    for wording in ("training", "short"):
        alone[wording] = studied(tmp_path / wording, str(wordings / wording), "--signals", ",".join(ARMS))
        assert without_times(report["wordings"][wording]) == without_times(alone[wording])
    for arm in ARMS:
        found = report["confidence"][arm]
        parts = [one["confidence"][arm] for one in alone.values()]
        assert found["error"] == same_scores(np.mean([part["error"] for part in parts]))
        for protocol in (REMOVED, OUT_OF_POOL):
            assert found["auroc"][protocol] == same_scores(np.mean([part["auroc"][protocol] for part in parts]))
        top1 = [one["protocols"][IN_POOL][arm]["top1"]["value"] for one in alone.values()]
        assert report["protocols"][IN_POOL][arm]["top1"]["value"] == same_scores(np.mean(top1))
    capsys.readouterr()
    assert run(["eval", "study", "--config", str(both / "run.json")]) == 0  # in the order of --rows
    shown = capsys.readouterr().out.splitlines()
    [heading] = [line.split() for line in shown if line.startswith("in-pool, top-1")]
    assert heading == ["in-pool,", "top-1", "training", "short", "all"]
    row = shown[[line.startswith("in-pool, top-1") for line in shown].index(True) + 1].split()
    assert row[:3] == [
        "calibrated",
        *(f"{one['protocols'][IN_POOL]['calibrated']['top1']['value']:.2f}" for one in alone.values()),
    ]
    assert run(["eval", "study", "--config", str(both / "run.json"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == report


def test_k_is_that_of_methods_too(wordings: Path, tmp_path: Path) -> None:
    rows = ("--limit", "1", "--signals", "responses", "--protocols", IN_POOL)
    studied(tmp_path / "s", str(wordings / "training"), *rows, "--methods", "random", "-k", "2")
    [record, *_] = lines(tmp_path / "s")
    selected = {arm["arm"]: arm["selected"] for arm in record["arms"]}
    assert len(selected["random"]) == 2 and len(selected["responses"]) <= 2


def test_a_long_study_tells_a_log_how_far_it_is(
    wordings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("logo.cli.study.QUIET", -1.0)
    studied(tmp_path / "s", str(wordings / "short"), "--signals", "responses")
    told = [line.partition(" after ")[0] for line in capsys.readouterr().err.splitlines() if line.startswith("rows: ")]
    assert told == [f"rows: {done} of 7" for done in range(1, 8)]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--signals", "encoder"), "evidence 'encoder': expected a text encoder, found none; name one with --encoder"),
        (("--signals", "examples+norm"), "signal 'examples+norm': expected a sum of different kinds of evidence"),
        (("--rows", "a/b,b"), "--rows: expected folders of different names, each a wording of the tasks, found a/b, b"),
    ],
)
def test_what_is_lacking_is_said(
    more: tuple[str, str], said: str, wordings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [] if more[0] == "--rows" else ["--rows", str(wordings / "short")]
    assert run(["eval", "study", *MODEL, *rows, "--save", str(tmp_path / "s"), *more]) == 2
    assert said in one_line(capsys) and not (tmp_path / "s").exists()
