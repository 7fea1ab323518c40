"""`logo eval study`: its numbers, its intervals, what it survives, and how it fails."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as profile
from hypothesis import strategies as st

import tiny
from logo import AdapterPool, DataError, LoGo, SelectionSettings, StorageError, UsageError
from logo.cli.output import write_json
from logo.cli.run import run
from logo.evaluation.arms import Arms, rank_metrics
from logo.evaluation.datasets import Dataset, find_datasets
from logo.evaluation.intervals import FEWEST
from logo.evaluation.study import Study, cut, journal_of, study
from logo.evaluation.summary import section
from logo.files import replace_file
from logo.rows import Row
from test_engine import tokenizer, write_adapter
from tolerances import same_scores

F1 = Path(__file__).parent / "data" / "golden" / "F1"
METRICS = ("top1", "top3", "mrr", "exact_match", "nll")
Engines = dict[str, LoGo]


def write_rows(folder: Path, name: str, rows: list[tuple[str, Any]]) -> Path:
    file = folder / f"{name}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"context": context, "completion": completion}) for context, completion in rows]
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Engines:
    """Two signals on one model and a pool of five."""
    root = tmp_path_factory.mktemp("pool")
    model = tiny.model("llama")
    for i in range(5):
        write_adapter(root / f"t{i}", model, ("q_proj", "v_proj"), rank=i + 1, seed=i, scale=0.4)
    pool = AdapterPool.open(root)
    return {
        signal: LoGo(model, tokenizer(), pool, settings=SelectionSettings(signal=signal, k=2))
        for signal in ("norm", "entropy")
    }


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory, engines: Engines) -> Path:
    """Own tasks t1 (its completions partly the oracle's own words) and t3, and an unseen one; t3 has fewer rows."""
    root = tmp_path_factory.mktemp("rows")
    prompts = [f"w{i} w{i + 7} w{2 * i}" for i in range(5, 11)]
    logo = engines["norm"]
    golds = [logo.generate(prompt, adapters={"t1": 1.0}, max_new_tokens=2).text for prompt in prompts]
    write_rows(root, "t1", [(p, g if g.startswith("w") else "w9") for p, g in zip(prompts, golds, strict=True)])
    write_rows(root, "t3", [("w50 w51", ["w52 w53", "w54"]), ("w60 w61 w62", "w63")])
    write_rows(root, "other", [(f"w{i} w80", "w81 w82") for i in range(30, 34)])
    return root


@pytest.fixture(scope="module")
def report(engines: Engines, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    journal = tmp_path_factory.mktemp("out") / "journal"
    return study(Arms(engines), find_datasets(rows), journal, settings={"base_model": "tiny"}).report


def entries(report: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for part in (report, report["left_out"], report["unseen"]):
        for kind in ("signals", "mixtures"):
            yield from part[kind].values()


def test_what_the_report_holds(report: dict[str, Any]) -> None:
    assert list(report) == [
        *("signals", "mixtures", "left_out", "unseen", "tasks", "pool", "settings", "seconds", "versions", "run")
    ]
    assert report["pool"] == [f"t{i}" for i in range(5)]
    assert list(report["mixtures"]) == ["oracle", "uniform", "base"]
    for entry in report["signals"].values():
        assert list(entry) == [*METRICS, "intervals"] and list(entry["intervals"]) == list(METRICS)
    for part in (report["left_out"], report["unseen"]):
        assert list(part) == ["signals", "mixtures"]
        assert list(part["signals"]) == ["norm", "entropy"] and list(part["mixtures"]) == ["uniform", "base"]
    for entry in entries(report):
        for metric, ends in entry["intervals"].items():
            assert ends is None or ends[0] <= entry[metric] <= ends[1]
        assert entry["intervals"]["exact_match"] is not None and entry["intervals"]["nll"] is None  # few rows
    assert {name: task["rows"] for name, task in report["tasks"].items()} == {"other": 4, "t1": 6, "t3": 2}
    assert list(report["tasks"]["t1"]["signals"]["norm"]) == list(METRICS)
    assert "left_out" in report["tasks"]["t1"] and "left_out" not in report["tasks"]["other"]
    assert report["settings"]["base_model"] == "tiny" and report["settings"]["seed"] == 0
    assert "merge" not in {**report["settings"], **report["run"]}  # nobody asked for it
    assert report["settings"]["signals"]["entropy"]["points"] == ["model.layers.2.self_attn.q_proj"]
    assert set(report["seconds"]) == {"loading", "select", "score"}
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_numbers_are_means_of_task_means(engines: Engines, rows: Path, report: dict[str, Any]) -> None:
    """Everything once more, row by row, through the public calls."""
    for signal, logo in engines.items():
        means: dict[str, list[float]] = {metric: [] for metric in METRICS}
        for task in find_datasets(rows, "t*"):
            found: dict[str, list[float]] = {metric: [] for metric in METRICS}
            for row in task.rows:
                selection = logo.select(row.context)
                gold = row.completion if isinstance(row.completion, str) else row.completion[0]
                [scored] = logo.score(row.context, gold, [selection])
                rank = sorted(selection.scores, key=lambda name: -selection.scores[name]).index(task.name) + 1
                values = (rank == 1, rank <= 3, 1 / rank, scored.exact_match, scored.nll)
                for metric, value in zip(METRICS, values, strict=True):
                    found[metric].append(float(value))
            for metric in METRICS:
                means[metric].append(sum(found[metric]) / len(found[metric]))
        for metric in METRICS:
            assert report["signals"][signal][metric] == same_scores(sum(means[metric]) / 2), metric
    assert 0 < report["mixtures"]["oracle"]["exact_match"] <= 0.5 < 1  # t1 yes, t3 no


def test_left_out_is_a_pool_without_the_adapter(engines: Engines, rows: Path, report: dict[str, Any]) -> None:
    """What these signals say of an adapter does not depend on the others, so a smaller pool must give the same."""
    for name in ("t1", "t3"):
        for signal, logo in engines.items():
            smaller = logo.pool.subset([other for other in logo.names if other != name])
            without = LoGo(logo.model, logo.tokenizer, smaller, settings=logo.settings)
            nll = []
            for row in find_datasets(rows, name)[0].rows:
                gold = row.completion if isinstance(row.completion, str) else row.completion[0]
                nll.append(without.score(row.context, gold, [without.select(row.context)])[0].nll)
            left_out = report["tasks"][name]["left_out"]["signals"][signal]
            assert left_out["nll"] == same_scores(sum(nll) / len(nll))
    assert report["left_out"]["mixtures"]["uniform"]["nll"] != report["mixtures"]["uniform"]["nll"]
    bases = [part["mixtures"]["base"] for part in (report, report["left_out"])]
    assert bases[0]["nll"] == same_scores(bases[1]["nll"])


def test_all_mixtures_of_a_row_are_scored_together(
    engines: Engines, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logo = engines["norm"]
    asked: list[list[dict[str, float]]] = []
    score = logo.score

    def spy(prompt: str, completion: str, mixtures: Any) -> Any:
        asked.append(list(mixtures))
        return score(prompt, completion, mixtures)

    monkeypatch.setattr(logo, "score", spy)
    study(Arms(engines), find_datasets(rows, "other,t3", limit=1), tmp_path / "journal", settings={})
    other, own = asked
    assert len(other) == 4 and other[2:] == [dict.fromkeys(logo.names, 0.2), {}]
    assert own[2:5] == [{"t3": 1.0}, dict.fromkeys(logo.names, 0.2), {}]
    assert len(own) == 9 and not any("t3" in mixture for mixture in own[5:])
    assert own[7] == dict.fromkeys(("t0", "t1", "t2", "t4"), 0.25)


@pytest.mark.parametrize(("request_", "missing"), [("t1", ["unseen"]), ("other", ["signals", "mixtures", "left_out"])])
def test_parts_without_rows_are_null(
    engines: Engines, rows: Path, tmp_path: Path, request_: str, missing: list[str]
) -> None:
    report = study(Arms(engines), find_datasets(rows, request_, limit=1), tmp_path / "journal", settings={}).report
    assert [part for part in ("signals", "mixtures", "left_out", "unseen") if report[part] is None] == missing


def test_a_pool_of_one_has_nothing_left(engines: Engines, rows: Path, tmp_path: Path) -> None:
    logo = engines["norm"]
    one = LoGo(logo.model, logo.tokenizer, logo.pool.subset(["t1"]), settings=SelectionSettings("norm", k=1))
    report = study(Arms({"norm": one}), find_datasets(rows, "t1", limit=1), tmp_path / "journal", settings={}).report
    assert report["left_out"] is None and report["signals"]["norm"]["top1"] == 1.0


# -- interruptions ----------------------------------------------------------------------------------------------


def interrupted(engines: Engines, rows: Path, journal: Path, after: int) -> None:
    done: list[str] = []

    def stop(name: str) -> None:
        done.append(name)
        if len(done) == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study(Arms(engines), find_datasets(rows), journal, settings={"base_model": "tiny"}, on_progress=stop)


def test_a_killed_study_goes_on(
    engines: Engines, rows: Path, report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = tmp_path / "out.json.partial.jsonl"
    interrupted(engines, rows, journal, after=5)
    interrupted(engines, rows, journal, after=7)
    with open(journal, "ab") as stream:  # cut in the middle of a line
        stream.write(b'{"task": "t1", "ind')
    scored: list[str] = []
    score = engines["norm"].score

    def spy(prompt: str, completion: str, mixtures: Any) -> Any:
        scored.append(prompt)
        return score(prompt, completion, mixtures)

    monkeypatch.setattr(engines["norm"], "score", spy)
    progress: list[str] = []
    tasks = find_datasets(rows)
    again = study(Arms(engines), tasks, journal, settings={"base_model": "tiny"}, on_progress=progress.append).report
    assert len(scored) == 12 - 7 and len(progress) == 12
    assert set(again["seconds"]) == set(report["seconds"])
    assert json.dumps(again | {"seconds": 0}) == json.dumps(report | {"seconds": 0})
    assert len(journal.read_text().splitlines()) == 13


def test_another_study_is_not_mixed_in(
    engines: Engines, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = tmp_path / "journal"
    interrupted(engines, rows, journal, after=2)
    before = journal.read_bytes()
    for other, tasks, settings in (
        (engines, find_datasets(rows, limit=3), {"base_model": "tiny"}),
        (engines, find_datasets(rows), {"base_model": "tiny2"}),
        ({"norm": engines["norm"]}, find_datasets(rows), {"base_model": "tiny"}),
    ):
        with pytest.raises(UsageError, match="left by a run with other settings, pool or rows"):
            study(Arms(other), tasks, journal, settings=settings)
        assert journal.read_bytes() == before
    assert "unsure_below" not in before.decode()  # which decides nothing unless `when_unsure` does
    logo = engines["norm"]
    carry = SelectionSettings("norm", k=2)
    with pytest.raises(UsageError, match=r"signals\.norm\.probe_context"):
        in_order = {"norm": LoGo(logo.model, logo.tokenizer, logo.pool, settings=carry, probe_context="carry")}
        study(Arms(in_order), find_datasets(rows), journal, settings={"base_model": "tiny"})
    merged = {
        name: LoGo(one.model, one.tokenizer, one.pool, settings=one.settings, merge=True)
        for name, one in engines.items()
    }
    with pytest.raises(UsageError, match="merge is not given, not true"):
        study(Arms(merged), find_datasets(rows), journal, settings={"base_model": "tiny"})
    monkeypatch.setattr("logo.evaluation.arms.environment", lambda logo: {"torch": "99"})
    with pytest.raises(UsageError, match=r'environment\.torch is ".*", not "99"'):
        study(Arms(engines), find_datasets(rows), journal, settings={"base_model": "tiny"})
    assert journal.read_bytes() == before


def test_where_order_matters_nothing_is_resumed(engines: Engines, rows: Path, tmp_path: Path) -> None:
    logo = engines["norm"]
    journal = tmp_path / "journal"

    def carry() -> Engines:
        settings = SelectionSettings("norm", k=2)
        return {"norm": LoGo(logo.model, logo.tokenizer, logo.pool, settings=settings, probe_context="carry")}

    whole = study(Arms(carry()), find_datasets(rows), journal, settings={"base_model": "tiny"}).report
    interrupted(carry(), rows, journal, after=5)
    again = study(Arms(carry()), find_datasets(rows), journal, settings={"base_model": "tiny"}).report
    assert again["signals"] == whole["signals"] and again["unseen"] == whole["unseen"]


def test_a_finished_report_is_neither_measured_again_nor_replaced(
    engines: Engines, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, journal = tmp_path / "study.json", tmp_path / "journal"

    def run_study(limit: int | None = None, **how: Any) -> Study:
        tasks = find_datasets(rows, "t1,other", limit=limit)
        return study(Arms(engines), tasks, journal, settings={"base_model": "tiny"}, finished=file, **how)

    whole = run_study()
    write_json(file, whole.report)
    journal.unlink()
    assert len(whole.rows) == 10 and not whole.note
    assert run_study() == Study(json.loads(file.read_text()), ())
    with pytest.raises(UsageError, match=r"study\.json: it is the report of another study \(.*seed is 0, not 1"):
        run_study(seed=1)
    journal.touch()  # of a study that was killed before its first row
    with pytest.raises(UsageError, match="it is the report of another study"):
        run_study(limit=1)
    other = run_study(limit=1, overwrite=True)
    assert len(other.rows) == 2 and json.loads(file.read_text()) == whole.report
    again = run_study(limit=1)  # goes on where --overwrite was interrupted
    assert again.report | {"seconds": 0} == other.report | {"seconds": 0}
    assert len(run_study(overwrite=True).rows) == 10  # whatever study the journal is of
    journal.unlink()
    monkeypatch.setattr("logo.evaluation.arms.environment", lambda logo: {"torch": "99"})
    elsewhere = run_study()
    assert not elsewhere.rows and "torch is" in elsewhere.note
    for content in ("[]", "{", '{"run": 3}', '{"signals": {}}'):
        file.write_text(content)
        with pytest.raises(UsageError, match="it is no report of a study; --overwrite"):
            run_study()


def test_a_report_is_written_whole(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "study.json"
    write_json(file, {"ä": 1})
    write_json(file, {"ä": 2})
    assert json.loads(file.read_text()) == {"ä": 2} and [p.name for p in file.parent.iterdir()] == ["study.json"]
    with pytest.raises(StorageError, match="cannot be written"):
        replace_file(file.parent, b"")
    assert file.is_file() and [p.name for p in tmp_path.iterdir()] == ["deep"]


# -- numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ({"a": 3.0, "b": 2.0, "c": 1.0}, (1.0, 1.0, 1.0)),
        ({"a": 2.0, "b": 2.0, "c": 1.0}, (0.0, 1.0, 0.5)),
        ({"a": 0.0, "b": 0.0, "c": 0.0, "d": 0.0}, (0.0, 0.0, 0.25)),
        ({"b": 1.0}, (0.0, 0.0, 0.0)),
    ],
)
def test_ranks(scores: dict[str, float], expected: tuple[float, float, float]) -> None:
    assert tuple(rank_metrics(scores, "a").values()) == expected


def measured(tasks: list[list[float]]) -> list[list[Any]]:
    return [[{"signals": {"norm": {"nll": value}}} for value in rows] for rows in tasks]


@given(
    tasks=st.lists(st.lists(st.floats(-10, 10), min_size=1, max_size=14), min_size=1, max_size=4),
    seed=st.integers(0, 5),
)
@profile(max_examples=40, deadline=None)
def test_intervals_hold_the_mean(tasks: list[list[float]], seed: int) -> None:
    found = section(measured(tasks), seed)
    assert found is not None and found == section(measured(tasks), seed)
    entry = found["signals"]["norm"]
    assert entry["nll"] == pytest.approx(np.mean([np.mean(rows) for rows in tasks]))
    ends = entry["intervals"]["nll"]
    assert ends is None or ends[0] <= entry["nll"] <= ends[1]
    few = any(len(rows) < FEWEST and not set(rows) <= {0, 1} for rows in tasks)
    assert ends is None if few else True


def test_intervals_are_as_wide_as_statistics_says() -> None:
    random = np.random.default_rng(1)
    found = section(measured([list(random.normal(size=300)), list(random.normal(size=75))]))
    assert found is not None
    low, high = found["signals"]["norm"]["intervals"]["nll"]
    assert high - low == pytest.approx(1.96 * math.sqrt(1 / 300 + 1 / 75), rel=0.15)


def test_without_rows_there_are_no_means() -> None:
    assert section([]) is None and section([[]]) is None


# -- rows -------------------------------------------------------------------------------------------------------


def test_held_out_rows_are_the_last_ones() -> None:
    some = tuple(Row(f"w{i}", "w9") for i in range(6))
    task = Dataset("t", Path("x"), some)
    [asked], held = cut([task], 3, 2)
    assert asked.rows == some[:3] and held == {"t": some[4:]}
    [asked], held = cut([task], None, 2)
    assert asked.rows == some[:4]
    assert cut([asked], None, 0) == ([asked], {})
    with pytest.raises(UsageError, match="hold-out 6: task 't' has 6 rows, expected more"):
        cut([task], None, 6)


# -- the command ------------------------------------------------------------------------------------------------

ENGINE = ["--base-model", str(F1 / "model"), "--adapters", str(F1 / "adapters"), "--device", "cpu"]


@pytest.fixture
def some_rows(tmp_path: Path) -> Path:
    folder = tmp_path / "rows"
    write_rows(folder, "ad03", [("Hello there", "you"), ("Good bye", "then")])
    write_rows(folder, "ad05", [("One more", "time")])
    write_rows(folder, "unknown", [("What?", "Nothing.")])
    return folder


def test_the_command(some_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results" / "study.json"
    command = [
        "eval",
        "study",
        *ENGINE,
        "--rows",
        str(some_rows),
        "--signals",
        "norm, entropy",
        "-k",
        "3",
        "--save",
        str(out),
    ]
    assert run([*command, "--limit", "1"]) == 0
    captured = capsys.readouterr()
    for word in ("top-1", "NLL", "left out", "unseen", "norm", "entropy", "oracle", "uniform", "base", "95 %"):
        assert word in captured.out
    assert "with an adapter of their own: 2 · unseen tasks: 1" in captured.err
    report = json.loads(out.read_text())
    assert report["settings"]["limit"] == 1 and report["settings"]["rows"] == str(some_rows)
    assert f"{report['signals']['norm']['nll']:.2f}" in captured.out
    assert [path.name for path in out.parent.iterdir()] == ["study.json"]
    assert run([*command, "--limit", "1"]) == 0
    captured = capsys.readouterr()
    assert "study.json is done already (--overwrite measures it again)" in " ".join(captured.err.split())
    assert f"{report['signals']['norm']['nll']:.2f}" in captured.out and json.loads(out.read_text()) == report
    other = [*command, "--tasks", "ad0[35]", "--seed", "3"]
    assert run(other) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "study.json: it is the report of another study (" in said and "seed is 0, not 3" in said
    assert json.loads(out.read_text()) == report and not journal_of(out).exists()
    assert run([*other, "--overwrite"]) == 0
    again = json.loads(out.read_text())
    assert again["unseen"] is None and list(again["tasks"]) == ["ad03", "ad05"] and again["settings"]["seed"] == 3


@pytest.mark.parametrize("signals", ["norm,calibrated", "calibrated,norm"])
def test_an_option_of_one_signal_may_be_given_in_any_order(signals: str, some_rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "study.json"
    command = ["eval", "study", *ENGINE, "--rows", str(some_rows), "--signals", signals, "--examples", "ignore"]
    assert run([*command, "-k", "3", "--limit", "1", "--save", str(out)]) == 0
    assert set(json.loads(out.read_text())["signals"]) == {"norm", "calibrated"}


@pytest.mark.slow
def test_the_command_after_an_interruption(
    some_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "study.json"
    command = ["eval", "study", *ENGINE, "--rows", str(some_rows), "--signals", "norm", "-k", "3", "--save", str(out)]
    assert run(command) == 0
    whole = json.loads(out.read_text())
    out.unlink()
    score, calls = LoGo.score, []

    def killed(self: LoGo, *arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score(self, *arguments)

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(LoGo, "score", killed)
        assert run(command) == 130
    assert "repeat the command to continue" in " ".join(capsys.readouterr().err.split())
    assert journal_of(out).is_file() and not out.exists()
    assert run([*command, "--limit", "1"]) == 2
    assert f"logo: error: journal {journal_of(out)}: left by a run with other" in capsys.readouterr().err
    assert run(command) == 0
    assert json.loads(out.read_text()) | {"seconds": 0} == whole | {"seconds": 0} and not journal_of(out).exists()


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (["--rows", "nowhere"], 1, "or NAME.jsonl files, found nothing"),
        (["--rows", "empty"], 1, "or NAME.jsonl files, found no files"),
        (["--rows", "packed"], 1, "or NAME.jsonl files, found ad03.jsonl.gz"),
        (["--rows", "bad"], 1, "bad/ad03.jsonl:2: expected"),
        (["--tasks", "ad04"], 1, "dataset 'ad04': not in rows (did you mean 'ad0"),
        (["--signals", "nrom"], 2, "unknown signal 'nrom' (did you mean 'norm'?)"),
        (["--signals", ","], 2, "signals ',': expected names separated by commas, found none"),
        (["--limit", "0"], 2, "limit 0: expected at least 1 row"),
        (["--metric", "rouge"], 2, "--metric rouge: judges generated answers"),
        (["--save", "rows"], 2, "--save rows: expected a file to write, found a folder"),
        (["--save", "rows/ad03.jsonl/x.json"], 1, "cannot be written"),
        (["--adapters", "nowhere"], 1, "nowhere"),
    ],
)
def test_what_goes_wrong_is_one_line(
    change: list[str],
    code: int,
    message: str,
    some_rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "ad03.jsonl.gz").touch()
    bad = write_rows(tmp_path / "bad", "ad03", [("x", "y")])
    bad.write_text(bad.read_text() + "{}\n")
    command = [
        "eval",
        "study",
        *ENGINE,
        "--rows",
        "rows",
        "--signals",
        "norm",
        "-k",
        "3",
        "--save",
        "study.json",
        *change,
    ]
    assert run(command) == code
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("logo: error:")]
    assert len(errors) == 1 and message in errors[0]
    assert not (tmp_path / "study.json").exists()


def test_no_own_tasks_is_a_warning(some_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["eval", "study", *ENGINE, "--rows", str(some_rows), "--signals", "norm", "-k", "3", "--tasks", "unknown"]
    assert run([*command, "--save", str(tmp_path / "study.json")]) == 0
    captured = capsys.readouterr()
    assert "logo: warning: no file of rows is named like an adapter" in captured.err and "oracle" not in captured.out
    assert json.loads((tmp_path / "study.json").read_text())["signals"] is None


def test_a_row_that_cannot_be_scored_is_named(engines: Engines, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows", "t1", [("w3", "w4"), ("w3", " ".join(["w4"] * 200))])
    with pytest.raises(DataError, match=rf"{file}:2: the completion has 200 tokens"):
        study(Arms(engines), find_datasets(tmp_path / "rows"), tmp_path / "journal", settings={})
