"""`logo eval report`: the page in a real browser without a network, and its tables as CSV and LaTeX."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas
import pytest

from browser import Browser, browser, needs_browser
from logo.cli.app import run
from report_runs import LEFT, RIGHT, two_runs, write_result

EVIL = ["</script><script>document.title='x'</script>", "<img src=x onerror=\"document.title='x'\">", "a_b & 50 % {#}"]
LINES = "return [...document.querySelectorAll('#rows tbody tr')].map(line => line.innerText)"
SEARCH = (
    "const box = document.getElementById('search'); box.value = arguments[0]; box.dispatchEvent(new Event('input'))"
)
STATUS = "return document.getElementById('status').textContent"
HEAD = "[...document.querySelectorAll('#rows th button')].find(one => one.textContent === arguments[0])"
COLUMN = "return [...document.querySelectorAll(`#rows td[data-name=${arguments[0]}]`)].map(cell => cell.textContent)"


def report(*arguments: object) -> None:
    assert run(["eval", "report", *map(str, arguments)]) == 0


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        opened.devtools("Network.enable", {})
        nothing = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
        opened.devtools("Network.emulateNetworkConditions", nothing)
        yield opened


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("results")
    two_runs(root)
    report(root, "--save", root / "r.html")
    return root / "r.html"


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_its_window_without_errors(window: Browser, page: Path, width: int, dark: bool) -> None:
    window.emulate(width, dark=dark)
    window.messages()
    window.open(page)
    assert window.messages() == []
    assert window.run("return [document.title, document.documentElement.scrollWidth]") == [
        f"LoGo: {RIGHT}, {LEFT}",
        width,
    ]
    charts = window.run("return [...document.querySelectorAll('.chart svg')].map(svg => svg.clientWidth)")
    assert len(charts) == 5 and all(width / 2 < each <= width for each in charts)
    style = "const style = getComputedStyle(document.body); return [style.backgroundColor, style.color]"
    ground, ink = window.run(f"{style}.map(one => one.match(/\\d+/g).map(Number).reduce((a, b) => a + b))")
    assert (ground < ink) == dark and abs(ground - ink) > 400
    marked = window.run("return [...document.querySelectorAll('.marked')].map(line => line.innerText)")
    assert len(marked) == 1 and "BIG-Bench Hard (2)" in marked[0]


@needs_browser
@pytest.mark.slow
def test_rows_are_searched_sorted_and_paged(window: Browser, tmp_path: Path) -> None:
    answers, golds = [f"Answer {n:05}" for n in range(10_000)], [f"answer {n // 2 * 2:05}" for n in range(10_000)]
    write_result(tmp_path / LEFT / "bbh.many", answers, golds, confidence=[n / 10_000 for n in range(10_000)])
    report(tmp_path, "--save", tmp_path / "r.html")
    window.emulate(1280)
    window.open(tmp_path / "r.html")
    assert window.run(STATUS) == "1–50 of 10000" and len(window.run(LINES)) == 50
    window.run(SEARCH, "ANSWER 0123 question")  # words in any order, in any column
    assert window.run(STATUS) == "1–11 of 11" and window.run(COLUMN, "row")[:2] == ["124", "1231"]
    window.run(SEARCH, "")
    window.run(f"{HEAD}.click(); {HEAD}.click()", "confidence")
    assert window.run(COLUMN, "row")[:2] == ["10000", "9999"]
    window.run("document.getElementById('next').click()")
    assert window.run(STATUS) == "51–100 of 10000" and window.run(COLUMN, "row")[0] == "9950"
    window.run(f"{HEAD}.click()", "score")
    assert set(window.run(COLUMN, "score")) == {"0.00"} and window.run(STATUS) == "1–50 of 10000"
    window.run(SEARCH, "nothing says this")
    assert window.run(LINES) == [] and window.run(STATUS) == "no such row"
    assert window.messages() == []


@needs_browser
@pytest.mark.slow
def test_hostile_text_stays_text(window: Browser, tmp_path: Path) -> None:
    columns: dict[str, Any] = {"prompt": EVIL, "selected": [EVIL] * 3, "weights": [[0.5, 0.3, 0.2]] * 3, "error": EVIL}
    for name in (LEFT, RIGHT):
        said = {"dataset": {"name": EVIL[1]}, "metric": "em"}
        write_result(tmp_path / name / "bbh.x", EVIL, EVIL, more=said, **columns)
    report(tmp_path, "--save", tmp_path / "r.html", "--save", tmp_path / "csv", "--save", tmp_path / "t.tex")
    window.open(tmp_path / "r.html")
    title, images = window.run("return [document.title, document.querySelectorAll('img').length]")
    assert (title, images) == (f"LoGo: {RIGHT}, {LEFT}", 0) and window.messages() == []
    assert window.run(COLUMN, "answer") == EVIL * 2 and window.run(COLUMN, "prompt") == EVIL * 2
    with open(tmp_path / "csv" / "rows.csv", newline="", encoding="utf-8") as file:
        assert [one["prediction"] for one in csv.DictReader(file)] == EVIL * 2
    weights = pandas.read_csv(tmp_path / "csv" / "adapters.csv")
    assert set(weights["adapter"]) == set(EVIL) and set(weights["weight"].round(6)) == {0.5, 0.3, 0.2}


def test_numbers_of_the_page_as_json_csv_and_latex(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two_runs(tmp_path)
    page, tables, tex = tmp_path / "r.html", tmp_path / "csv", tmp_path / "t.tex"
    report(tmp_path, "--save", page, "--save", tables, "--save", tex, "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["files"][str(page)] == page.stat().st_size < 1_500_000
    scores = {(one["run"], one["name"]): one for one in found["scores"]}
    group = scores[RIGHT, "BIG-Bench Hard"]
    assert (group["score"], group["datasets"], group["rows"]) == (0.75, 2, 16) and group["low"] < 0.75 < group["high"]
    assert scores[LEFT, "wmt16.en-de"]["low"] is None
    written = pandas.read_csv(tables / "results.csv")
    assert written["score"].tolist() == pytest.approx([one["score"] for one in found["scores"]])
    compared = pandas.read_csv(tables / "comparisons.csv")
    assert compared["p_holm"].tolist() == pytest.approx([one["p_holm"] for one in found["comparisons"]])
    text = tex.read_text()
    assert r"bbh.one & em & 25.00 [7.1, 59.1] &" in text or r"bbh.one & em & 100.00 [67.6, 100.0] &" in text
    assert LEFT.replace("_", r"\_") in text and "BIG-Bench Hard (2)" in text and text.count(r"\begin{tabular}") == 2
    assert LEFT not in text and r"in percent with 95 \% intervals" in text


def test_group_means_are_of_all_datasets_or_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that lacks the hard dataset of a group must not look better."""
    two_runs(tmp_path)
    write_result(tmp_path / "other_selection_norm_n_1_seed_0" / "bbh.one", ["yes", "no"] * 4, ["yes", "no"] * 4)
    report(tmp_path, "--save", tmp_path / "r.html", "--json")
    found = json.loads(capsys.readouterr().out)["scores"]
    assert len([one for one in found if one["name"] == "bbh.one"]) == 3
    assert len([one for one in found if one["name"] == "BIG-Bench Hard"]) == 2


def test_results_of_the_official_script_and_another_metric(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two_runs(tmp_path / "theirs", official=True)
    report(tmp_path / "theirs", "--save", tmp_path / "r.html", "--save", tmp_path / "csv", "--json")
    found = json.loads(capsys.readouterr().out)
    assert len(found["scores"]) == 8 and len(found["comparisons"]) == 4 and "has no prompts" in found["notes"][0]
    assert (tmp_path / "r.html").read_text().count("The results say nothing of it.") == 2  # no confidences
    two_runs(tmp_path / "ours")
    report(tmp_path / "ours", "--save", tmp_path / "r.html", "--metric", "bleu", "--json")
    assert {one["measure"] for one in json.loads(capsys.readouterr().out)["scores"]} == {"bleu"}


def test_runs_on_other_rows_are_shown_and_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_result(tmp_path / LEFT / "bbh.one", ["yes"] * 12, ["yes"] * 12)
    write_result(tmp_path / RIGHT / "bbh.one", ["yes"] * 11, ["yes"] * 11)
    report(tmp_path, "--save", tmp_path / "r.html")
    assert f"found 11 in {RIGHT} and 12 in {LEFT}" in capsys.readouterr().err
    assert "There are no two runs on the same rows." in (tmp_path / "r.html").read_text()
    assert run(["eval", "report", str(tmp_path), "--save", str(tmp_path / "page.pdf")]) == 2
    assert "expected FILE.html, FILE.tex, or a folder without a suffix" in capsys.readouterr().err
