"""`logo eval compare` on result folders as `logo evaluate` writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from logo.cli.run import run
from logo.evaluation.groups import GROUPS, group_of, grouped
from logo.evaluation.paired import holm


def write(
    folder: Path,
    predictions: list[str],
    golds: list[Any],
    *,
    rows: bool = True,
    sha256: str | None = "ab" * 32,
    **more: Any,
) -> Path:
    """One dataset's results."""
    from logo.evaluation.metrics import measure, metric_kind

    kind = metric_kind(folder.name)
    texts = [gold if isinstance(gold, str) else gold[0] for gold in golds]
    values = [measure(kind, answer, gold) for answer, gold in zip(predictions, texts, strict=True)]
    files: dict[str, Any] = {
        "eval_results.json": values,
        "predictions.json": predictions,
        "selected_loras.json": [["a"]] * len(values),
        "weights.json": [[1.0]] * len(values),
        "metric_dict.json": {"norm": [[1.0]] * len(values)},
        "time_dict.json": {"loading": 1.0, "inference": 1.0},
    }
    if rows:
        files["rows.json"] = [
            {"context": f"question {i}", "completion": text} | ({} if isinstance(gold, str) else {"references": gold})
            for i, (text, gold) in enumerate(zip(texts, golds, strict=True))
        ]
    if sha256 is not None:
        files["run.json"] = {"dataset": {"name": folder.name, "sha256": sha256, "rows": len(golds)}}
    folder.mkdir(parents=True)
    for name, content in (files | more).items():
        (folder / name).write_text(json.dumps(content))
    return folder


GOLDS = ["yes", "no", "yes", "no", "yes", "no", "yes", "no"]
WRONG = ["maybe"] * 8


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    """B is right on all of bbh.one and half of bbh.two, where A is on two rows each; their translations are alike."""
    for name, one, two in (("a", 2, 2), ("b", 8, 4)):
        write(tmp_path / name / "bbh.one", GOLDS[:one] + WRONG[one:], GOLDS)
        write(tmp_path / name / "bbh.two", GOLDS[:two] + WRONG[two:], GOLDS)
        write(tmp_path / name / "wmt16.en-de", ["das ist ein kleines Haus"], [["das ist ein Haus", "ein Haus"]])
    write(tmp_path / "a" / "nq.open", ["x"], ["y"])
    write(tmp_path / "b" / ".bbh.one.new-12", ["x"], ["y"])  # left by a writer that died
    return tmp_path / "a", tmp_path / "b"


def compared(*arguments: Any, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert run(["eval", "compare", *map(str, arguments), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_two_runs(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    found = compared(*runs, capsys=capsys)
    assert [(row["name"], row["metric"]) for row in found["datasets"]] == [
        ("wmt16.en-de", "bleu"),  # the paper's own datasets come first
        ("bbh.one", "em"),
        ("bbh.two", "em"),
    ]
    translation, one, two = found["datasets"]
    assert one["difference"]["a"] == 0.25 and one["difference"]["b"] == 1.0
    assert one["difference"]["interval"][0] > 0
    assert one["record"] == {"wins": 6, "losses": 0, "ties": 2}
    assert (one["test"], one["p"]) == ("mcnemar", pytest.approx(2 / 2**6))
    assert (two["test"], two["p"]) == ("mcnemar", pytest.approx(0.5))
    assert (translation["test"], translation["p"]) == ("randomisation", 1.0)
    assert translation["difference"]["value"] == 0 and translation["difference"]["interval"] is None
    [group] = found["groups"]
    assert (group["name"], group["metric"], group["datasets"], group["rows"]) == ("BIG-Bench Hard", "em", 2, 16)
    assert group["difference"]["value"] == 0.5 and group["record"]["wins"] == 8
    assert (group["test"], group["p"]) == ("randomisation", pytest.approx(2 / 2**8, abs=0.002))
    tested = [*found["datasets"], group]
    assert [row["p_holm"] for row in tested] == holm([row["p"] for row in tested])
    assert found["only_a"] == ["nq.open"] and found["only_b"] == [] and found["unchecked"] == []


def test_the_table(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["eval", "compare", *map(str, runs)]) == 0
    printed, notes = capsys.readouterr()
    lines = {line.split("  ")[0]: line.split() for line in printed.splitlines()}
    assert lines["bbh.one"][1:6] == ["em", "8", "25.00", "100.00", "+75.00"]
    assert lines["bbh.one"][-3:] == ["0.031", "0.094", "McNemar"] and lines["wmt16.en-de"][-1] == "randomised"
    assert lines["BIG-Bench Hard (2)"][3:7] == ["em", "16", "25.00", "75.00"]
    told = " ".join(printed.split())
    assert "by McNemar's exact test or approximate randomisation with 10,000 swaps" in told
    assert "corrected for the 4 lines by Holm's method" in told
    assert str(runs[0]) in printed and str(runs[1]) in printed
    assert "nq.open" in notes and "warning" not in notes


def test_single_datasets_and_metrics_beside_the_official_ones(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = (folder / "wmt16.en-de" for folder in runs)
    found = compared(a, b, "--metric", "extra.*", capsys=capsys)
    assert [row["metric"] for row in found["datasets"]] == ["extra.bleu", "extra.chrf"]
    assert 0 < found["datasets"][0]["difference"]["a"] < 100
    both = compared(*runs, "--metric", "em, extra.f1", capsys=capsys)
    assert [row["metric"] for row in both["datasets"]] == ["em", "extra.f1"] * 2


def test_all_goes_over_groups_that_share_a_metric(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, answer in (("a", "no"), ("b", "yes")):
        for dataset in ("bbh.one", "anli.r1", "gem.dart", "mine.x"):
            write(tmp_path / name / dataset, [answer], ["yes"])
    found = compared(tmp_path / "a", tmp_path / "b", capsys=capsys)
    assert [(row["name"], row["metric"], row["datasets"]) for row in found["groups"]] == [("all", "em", 3)]
    assert [row["metric"] for row in found["datasets"] if row["name"] == "gem.dart"] == [
        "rouge-1",
        "rouge-2",
        "rouge-L",
    ]


def refused(a: Path, b: Path, *options: str, capsys: pytest.CaptureFixture[str], code: int = 1) -> str:
    assert run(["eval", "compare", str(a), str(b), *options]) == code
    printed, message = capsys.readouterr()
    assert not printed and message.startswith("logo: error: ") and message.count("\n") == 1
    return message


@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize(
    ("golds", "sha256", "message"),
    [
        (GOLDS[:3], "ab" * 32, "8 and 3 rows"),
        ([*GOLDS[:6], "x", ["y"]], "cd" * 32, "row 7 differs and 1 more"),
    ],
)
def test_other_rows_are_refused(
    tmp_path: Path, golds: list[Any], sha256: str, message: str, rows: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    a = write(tmp_path / "a" / "bbh.one", GOLDS, GOLDS, rows=rows)
    b = write(tmp_path / "b" / "bbh.one", GOLDS[: len(golds)], golds, rows=rows, sha256=sha256)
    found = refused(a, b, capsys=capsys)
    assert "'bbh.one': expected the same rows in both runs" in found
    assert (message if rows or "and 3" in message else "abababababab... and cdcdcdcdcdcd...") in found


def test_official_results_have_neither_and_that_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write(tmp_path / "a" / "bbh.one", GOLDS, GOLDS)
    b = write(tmp_path / "b" / "bbh.one", WRONG, GOLDS, rows=False, sha256=None)
    assert run(["eval", "compare", str(a), str(b)]) == 0
    assert "warning: cannot tell whether both runs used the same rows of bbh.one" in capsys.readouterr().err
    c = write(tmp_path / "c" / "bbh.one", WRONG, GOLDS, rows=False, sha256=None)
    message = refused(b, c, "--metric", "extra.f1", capsys=capsys, code=2)
    assert "found none of them; extra.* need rows.json" in message
    assert compared(a, b, "--metric", "extra.f1", capsys=capsys)["datasets"][0]["difference"]["a"] == 1


def test_what_is_not_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write(tmp_path / "a" / "bbh.one", GOLDS, GOLDS)
    other = write(tmp_path / "b" / "bbh.two", GOLDS, GOLDS)
    assert "found no such folder" in refused(a, tmp_path / "none", capsys=capsys, code=2)
    assert "found a file" in refused(a / "rows.json", a, capsys=capsys, code=2)
    assert "expected the results of one run, found 2: a, b; name one" in refused(a, tmp_path, capsys=capsys, code=2)
    assert "the first run has bbh.one, the second bbh.two" in refused(a, other, capsys=capsys)
    assert "(did you mean 'em'?)" in refused(a, a, "--metric", "emm", capsys=capsys, code=2)
    for metrics in ("em,nonsense", "nonsense,*"):
        assert "metric 'nonsense': expected names or patterns of em, " in refused(
            a, a, "--metric", metrics, capsys=capsys, code=2
        )


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("eval_results.json", "[0, 1", "expected JSON"),
        ("eval_results.json", "[]", "expected one value per instance"),
        ("eval_results.json", '["yes"]', "instance 0: expected a number"),
        ("predictions.json", '["yes"]', "expected 8 entries, as many as eval_results.json has, found 1"),
        ("rows.json", "{}", "expected a list of 8 rows"),
        ("predictions.json", None, "expected a file, found none"),
    ],
)
def test_damaged_results_are_named(
    tmp_path: Path, file: str, content: str | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    a = write(tmp_path / "a" / "bbh.one", GOLDS, GOLDS)
    b = write(tmp_path / "b" / "bbh.one", GOLDS, GOLDS)
    if content is None:
        (b / file).unlink()
    else:
        (b / file).write_text(content)
    found = refused(a, b, capsys=capsys)
    assert str(b / file) in found and message in found


def test_groups_are_the_papers() -> None:
    names = ["mine.x", "wmt16.en-de", "bbh.a", "wmt14.fr-en", "mine.y", "tqa.rc", "ai2_arc.ARC-Easy"]
    assert grouped(names) == {
        "BIG-Bench Hard": ["bbh.a"],
        "Translation": ["wmt16.en-de", "wmt14.fr-en"],
        "Closed-Book QA": ["tqa.rc", "ai2_arc.ARC-Easy"],
        "mine": ["mine.x", "mine.y"],
    }
    assert {group_of(name) for name in ("anli.r1", "glue.qnli")} == {"NLI"}
    assert {group_of(name) for name in ("words/antonym", "words/forms/plural.v2")} == {"words"}
    assert len(GROUPS) == 6  # five, and code
