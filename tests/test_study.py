"""`logo eval study`: its numbers against the public calls, its protocols, prompts without answers, interruptions."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logo import LoGo
from logo.cli.app import run
from logo.demo import heldout
from logo.evaluation.results import lines, read_run
from logo.evaluation.statistics import auroc, calibration_error
from logo.evaluation.study import ALWAYS, IN_POOL, OUT_OF_POOL, REMOVED, summary
from tolerances import same_scores

DEMO = ("--base-model", "demo", "--device", "cpu")
TASKS = ("antonym", "plural", "french")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks with an adapter, and one without."""
    root = tmp_path_factory.mktemp("rows")
    for name in TASKS:
        (root / f"{name}.jsonl").write_text("\n".join(map(json.dumps, heldout()[name][:3])))
    other = [{"context": f"Name the {n}th planet.", "completion": "Mars"} for n in range(2)]
    (root / "planets.jsonl").write_text("\n".join(map(json.dumps, other)))
    return root


def studied(save: Path, rows: Path, *more: str, code: int = 0) -> dict[str, Any]:
    assert run(["eval", "study", *DEMO, "--rows", str(rows), "--save", str(save), *more]) == code
    return read_run(save)["report"] if code == 0 else {}


@pytest.fixture(scope="module")
def folder(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    save = tmp_path_factory.mktemp("out") / "study"
    studied(save, rows, "--signals", "calibrated,norm", "--methods", "random", "--generate", "8")
    return save


@pytest.fixture(scope="module")
def logo() -> LoGo:
    return LoGo.from_pretrained("demo", device="cpu")


def test_the_protocols_and_their_arms(folder: Path) -> None:
    report = read_run(folder)["report"]
    arms = ["calibrated", "norm", "target", "uniform", "base", "random"]
    assert {name: [*found] for name, found in report["protocols"].items()} == {
        IN_POOL: arms,
        REMOVED: [name for name in arms if name != "target"],
        OUT_OF_POOL: [name for name in arms if name != "target"],
    }
    assert (report["tasks"], report["rows"]) == (4, 11)
    in_pool = report["protocols"][IN_POOL]
    assert in_pool["target"]["of_target"]["value"] == 1.0 and "top1" not in in_pool["target"]
    assert in_pool["calibrated"]["top1"]["value"] == 1.0 and report["confidence"]["calibrated"]["auroc"][REMOVED] > 0.9
    assert "norm" not in report["confidence"] and "of_target" not in report["protocols"][OUT_OF_POOL]["base"]


def test_numbers_are_means_of_task_means(folder: Path, rows: Path, logo: LoGo) -> None:
    """Everything once more, row by row, through the public calls."""
    report, found = read_run(folder)["report"], Counter[tuple[str, str, str]]()
    for task in TASKS:
        for row in heldout()[task][:3]:
            for signal in ("calibrated", "norm"):
                for protocol in (IN_POOL, REMOVED):
                    among = None if protocol == IN_POOL else [name for name in logo.names if name != task]
                    selection = logo.select(row["context"], signal=signal, candidates=among)
                    [scored] = logo.score(row["context"], row["completion"], [selection])
                    answer = logo.generate(row["context"], adapters=selection, max_new_tokens=8, stop_at_newline=True)
                    found[protocol, signal, "nll"] += scored.nll / 9
                    found[protocol, signal, "exact_match"] += scored.exact_match / 9
                    found[protocol, signal, "score"] += (answer.text.strip().lower() == row["completion"].lower()) / 9
                    if protocol == IN_POOL:
                        rank = sum(score >= selection.scores[task] for score in selection.scores.values())
                        found[protocol, signal, "mrr"] += 1 / rank / 9
    for (protocol, signal, metric), value in found.items():
        assert report["protocols"][protocol][signal][metric]["value"] == same_scores(value), (protocol, signal, metric)


def test_a_finished_study_is_shown_again_and_another_is_refused(
    folder: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (folder / "run.json").read_bytes()
    same = ("--signals", "calibrated,norm", "--methods", "random", "--generate", "8")
    studied(folder, rows, *same)
    shown = capsys.readouterr().out
    assert "in-pool" in shown and "reliability error" in shown and (folder / "run.json").read_bytes() == before
    studied(folder, rows, *same, "--limit", "2", code=2)
    assert "another run" in capsys.readouterr().err and (folder / "run.json").read_bytes() == before


def test_an_interrupted_study_goes_on(
    folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, score = list[Any](), LoGo.score

    def interrupted(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return score(*arguments, **options)

    monkeypatch.setattr(LoGo, "score", interrupted)
    same = ("--signals", "calibrated,norm", "--methods", "random", "--generate", "8")
    studied(tmp_path / "s", rows, *same, code=130)
    assert not (tmp_path / "s").exists()
    report = studied(tmp_path / "s", rows, *same)
    whole = read_run(folder)["report"]
    assert (
        report.pop("milliseconds").keys()
        == whole.pop("milliseconds").keys()
        == {*same[1].split(","), "random", *ALWAYS}
    )
    assert len(calls) == 11 + 1 and report == whole
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_prompts_without_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in TASKS:
        prompts = [{"prompt": row["context"]} for row in heldout()[name][:3]]
        (tmp_path / "prompts").mkdir(exist_ok=True)
        (tmp_path / "prompts" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    report = studied(tmp_path / "s", tmp_path / "prompts", "--signals", "norm,calibrated")
    assert set(report["protocols"][IN_POOL]) == {"norm", "calibrated"}
    assert set(report["protocols"][IN_POOL]["calibrated"]) == {"top1", "top3", "mrr", "confidence"}
    confused = Counter(
        (line["task"], arm["first"])
        for line in lines(tmp_path / "s")
        for arm in line["arms"]
        if (arm["protocol"], arm["arm"]) == (IN_POOL, "norm") and arm["first"] != line["task"]
    )
    assert {(one["task"], one["first"]): one["rows"] for one in report["confusions"]["norm"]} == confused
    top1 = report["protocols"][IN_POOL]["norm"]["top1"]["value"]
    assert (
        top1 == same_scores(1 - sum(confused.values()) / 9) and "puts another adapter first" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--signals", "nrom"], "did you mean 'norm'"),
        (["--protocols", "own"], "protocol 'own'; known: in-pool, removed, out-of-pool"),
        (["--protocols", "out-of-pool", "--tasks", "antonym"], "they ask for none of these rows"),
        (["--methods", "lorahup"], "did you mean 'lorahub'"),
        (["--methods", "random", "--method-args", "budget=3"], "method option 'budget': none of random has it"),
        (["--tasks", "antonyms"], "did you mean 'antonym'"),
    ],
)
def test_what_cannot_be_studied_is_one_line(
    more: list[str], message: str, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["eval", "study", *DEMO, "--rows", str(rows), "--save", str(tmp_path / "s"), *more]) in (1, 2)
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err


def arm(protocol: str, confidence: float, **more: Any) -> dict[str, Any]:
    return {"protocol": protocol, "arm": "s", "selected": [], "weights": [], "confidence": confidence, **more}


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=2, max_size=40))
def test_confidence_against_its_definitions(values: list[tuple[float, bool]]) -> None:
    own, others = ([value for value, is_own in values if is_own is kind] for kind in (True, False))
    records = [
        {"task": f"t{n}", "seconds": {"s": n}, "arms": [arm(IN_POOL if is_own else OUT_OF_POOL, value)]}
        for n, (value, is_own) in enumerate(values)
    ]
    report = summary(records)
    if not own or not others:
        return
    pairs = [(a > b) + (a == b) / 2 for a in own for b in others]
    assert auroc(own, others) == pytest.approx(fmean(pairs))
    assert report["confidence"]["s"]["auroc"] == {OUT_OF_POOL: pytest.approx(fmean(pairs))}
    error = 0.0
    for low in range(10):
        inside = [(v, k) for v, k in values if min(int(v * 10), 9) == low]
        weights = [0.5 / len(own) if k else 0.5 / len(others) for _, k in inside]
        error += abs(float(np.dot(weights, [v - k for v, k in inside])))
    assert report["confidence"]["s"]["error"] == pytest.approx(error)
    assert report["milliseconds"] == {"s": 500 * (len(values) - 1)}
    assert calibration_error([1.0] * 3 + [0.0] * 2, [True] * 3 + [False] * 2) == 0.0
