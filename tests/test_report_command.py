"""`logo eval compare` and `logo eval report` on result folders as runs and the official script write them: numbers, a
page in a real browser without a network, and its tables as CSV and LaTeX."""

from __future__ import annotations

import csv
import functools
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas
import pytest
import vl_convert

from browser import Browser, browser, needs_browser
from logo.cli.app import run
from logo.errors import DataError
from logo.evaluation.compare import GROUPS, grouped
from logo.evaluation.metrics import measure, metric_kind
from logo.evaluation.results import OFFICIAL, RUN, Partial, official_files, read
from logo.evaluation.statistics import holm

pytestmark = pytest.mark.slow

LEFT, RIGHT = "m_selection_norm_n_2_seed_0", "m_selection_calibrated_n_2_seed_0"
EVIL = ["</script><script>document.title='x'</script>", "<img src=x onerror=\"document.title='x'\">", "a_b & 50 % {#}"]
LINES = "return [...document.querySelectorAll('#rows tbody tr')].map(line => line.innerText)"
SEARCH = "const box = document.querySelector('#search');box.value = arguments[0]; box.dispatchEvent(new Event('input'))"
STATUS = "return document.getElementById('status').textContent"
HEAD = "[...document.querySelectorAll('#rows th button')].find(one => one.textContent === arguments[0])"
COLUMN = "return [...document.querySelectorAll(`#rows td[data-name=${arguments[0]}]`)].map(cell => cell.textContent)"


@pytest.fixture(scope="module", autouse=True)
def bundled_once() -> Iterator[None]:
    """The libraries of every page are the same, and take two seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vl_convert, "javascript_bundle", functools.cache(vl_convert.javascript_bundle))
        yield


def write_result(
    folder: Path, answers: Sequence[str], golds: Sequence[Any], more: Mapping[str, Any] | None = None, **columns: Any
) -> None:
    """The result of one dataset, whose name is the folder's, judged by its metric; `more` goes into its `run.json`, and
    `columns` into `rows.jsonl`."""
    kind = metric_kind(folder.name)
    records = [
        {"index": index, "prompt": f"question {index}", "completion": gold, "references": None, "target": None}
        | {"prediction": answer, "value": measure(kind, answer, gold), "error": None, "selected": ["a", "b"]}
        | {"weights": [0.75, 0.25], "scores": {"a": 3.0, "b": 1.0}, "confidence": 0.5, "form": "weights"}
        | {"seconds": {"inference": 0.1}, **{name: values[index] for name, values in columns.items()}}
        for index, (answer, gold) in enumerate(zip(answers, golds, strict=True))
    ]
    files = official_files(records, "norm", 1.0, sorted({name for one in records for name in one["scores"]}))
    identity = {"base_model": "m", "seed": 0, "metric": kind}
    about = {"identity": identity, "dataset": {"name": folder.name}, "metric": kind, **(more or {})}
    partial = Partial(folder, identity)
    partial.add(records)
    partial.finish({**files, RUN: about})
    partial.close()


def two_runs(root: Path) -> tuple[Path, Path]:
    """B is right on all rows of bbh.one and on half of bbh.two, A on two rows of each; their translations are alike."""
    golds = ["yes", "no"] * 4
    for name, one, two in ((LEFT, 2, 2), (RIGHT, 8, 4)):
        write_result(root / name / "bbh.one", golds[:one] + ["maybe"] * (8 - one), golds)
        write_result(root / name / "bbh.two", golds[:two] + ["maybe"] * (8 - two), golds)
        write_result(root / name / "wmt16.en-de", ["das ist ein kleines Haus"], ["das ist ein Haus"])
    return root / LEFT, root / RIGHT


def test_a_result_counts_once_under_all_its_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And two datasets of a plugin's method are one run."""
    folder = tmp_path / "m_method_my_own_n_2_seed_0"
    for name in ("bbh.one", "bbh.two"):
        write_result(folder / name, ["yes"], ["yes"])
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    found = read([folder, Path(folder.name), Path("link")])
    assert found["dataset"].tolist() == ["bbh.one", "bbh.two"] and set(found["run"]) == {folder.name}
    shutil.copytree(folder / "bbh.one", folder / "bbh.one_old")
    with pytest.raises(DataError, match=r"/bbh\.one and .*/bbh\.one_old both hold 'bbh\.one' of one run"):
        read([folder])


# -- comparisons -------------------------------------------------------------------------------------------------------


def compare(*arguments: object, capsys: pytest.CaptureFixture[str], fails: bool = False) -> tuple[Any, str]:
    """The comparisons of a command, and what it says besides."""
    assert (run(["eval", "compare", *map(str, arguments), "--json"]) != 0) == fails
    said = capsys.readouterr()
    return None if fails else json.loads(said.out), said.err


def report(*arguments: object, capsys: pytest.CaptureFixture[str] | None = None) -> Any:
    """Writes a report; its numbers, with `--json`."""
    assert run(["eval", "report", *map(str, arguments)]) == 0
    return json.loads(capsys.readouterr().out) if capsys else None


def test_runs_by_dataset_and_group(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = two_runs(tmp_path / "one")
    found, _ = compare(a, b, capsys=capsys)
    assert [(one["name"], one["measure"], one["datasets"], one["rows"]) for one in found] == [
        ("bbh.one", "em", 1, 8),
        ("bbh.two", "em", 1, 8),
        ("wmt16.en-de", "bleu", 1, 1),
        ("BIG-Bench Hard", "em", 2, 16),
    ]
    first, second, third, group = found
    assert (first["a"], first["b"], first["difference"], first["better"], first["worse"]) == (0.25, 1, 0.75, 6, 0)
    assert (first["test"], first["p"]) == ("McNemar", pytest.approx(2 / 2**6))
    assert group["difference"] == pytest.approx((0.75 + 0.25) / 2) and group["p"] == pytest.approx(2 / 2**8)
    assert [one["p_holm"] for one in found] == holm([one["p"] for one in found]) and group["marked"]
    assert not second["marked"] and third["p"] == 1 and third["interval"] is None
    assert {(one["run_a"], one["run_b"]) for one in found} == {(LEFT, RIGHT)}
    third, _ = two_runs(tmp_path / "two")  # called as the first one is; all are corrected together
    more, _ = compare(a, b, third, capsys=capsys)
    assert [one["run_b"] for one in more] == [RIGHT] * 4 + [f"two/{LEFT}"] * 4
    assert {one["run_a"] for one in more} == {f"one/{LEFT}"} and all(one["p"] == 1 for one in more[4:])
    assert [one["p_holm"] for one in more] == holm([one["p"] for one in more])
    back, _ = compare(b, a, capsys=capsys)
    assert [one["difference"] for one in back] == pytest.approx([-one["difference"] for one in found])
    assert run(["eval", "compare", str(a), str(b)]) == 0
    said = capsys.readouterr()
    assert re.search(r"bbh\.one +em +8 +25\.00 +100\.00 +\+75\.00 +\[\+", said.out)
    assert "BIG-Bench Hard (2)" in said.out and "corrected for 4 together" in said.err


def test_another_metric_judges_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, _ = compare(*two_runs(tmp_path), "--metric", "rouge", capsys=capsys)
    measured = [one["measure"] for one in found if one["name"] == "wmt16.en-de"]
    assert measured == ["rouge-1", "rouge-2", "rouge-L"]
    assert [one["name"] for one in found if one["measure"] == "rouge-L"][-2:] == ["BIG-Bench Hard", "all"]
    assert "expected a metric" in compare(tmp_path, "--metric", "rogue", capsys=capsys, fails=True)[1]


def test_what_the_official_script_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its six files alone give the same values, answers, adapters and weights."""
    ours, theirs = two_runs(tmp_path / "ours"), two_runs(tmp_path / "theirs")
    for file in (tmp_path / "theirs").rglob("*.json*"):
        if file.stem not in OFFICIAL:
            file.unlink()
    found, said = compare(*theirs, capsys=capsys)
    assert found == compare(*ours, capsys=capsys)[0] and "has no prompts: rows of bbh.one" in said
    assert "gold texts to judge by" in compare(*theirs, "--metric", "em", capsys=capsys, fails=True)[1]
    full, bare = read(ours), read(theirs)
    for column in ("value", "prediction", "selected", "weights", "score"):
        assert list(bare[column]) == list(full[column])
    assert set(bare["method"]) == {"norm", "calibrated"} and set(bare["k"]) == {2} and set(bare["base"]) == {"m"}
    shown = report(*theirs, "--save", tmp_path / "r.html", "--json", capsys=capsys)
    shutil.copytree(theirs[0] / "bbh.one", theirs[0] / "nq.natural-questions")
    assert set(read(str(theirs[0] / "nq.natural-questions"))["metric"]) == {"em_first"}  # as the script computes it
    assert len(shown["scores"]) == 8 and len(shown["comparisons"]) == 4 and "has no prompts" in shown["notes"][0]
    assert (tmp_path / "r.html").read_text().count("The results say nothing of it.") == 2  # no confidences


def test_what_cannot_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*arguments: object) -> str:
        return compare(*arguments, capsys=capsys, fails=True)[1]

    a, b = two_runs(tmp_path)
    assert f"two runs or more to compare, found one, {LEFT}" in refused(a, a)
    assert "no such folder" in refused(a, tmp_path / "none")
    shutil.rmtree(b / "wmt16.en-de")
    assert f"only {LEFT} has wmt16.en-de" in compare(a, b, capsys=capsys)[1]
    shutil.rmtree(b / "bbh.two")
    write_result(b / "bbh.two", ["no"] * 8, ["yes", "no", "yes", "yes", "yes", "no", "yes", "no"])
    lines, said = compare(a, b, capsys=capsys)  # what can be compared is, and the rest is named
    assert "'bbh.two': expected the same rows, found row 4 with the completion 'no'" in said
    assert [line["name"] for line in lines] == ["bbh.one"]
    shutil.rmtree(b / "bbh.one")
    assert "'bbh.two': expected the same rows, found row 4 with the completion 'no'" in refused(a, b)
    shutil.rmtree(b)
    write_result(b / "nq.open", ["no"], ["yes"])
    assert "no dataset in common" in refused(a, b)
    write_result(b / "bbh.one", ["no"] * 8, ["yes", "no"] * 4, more={"metric": "rouge"}, value=[0.0] * 8)
    assert "expected values of the metric rouge, found 0.0" in refused(a, b)


def test_an_official_run_beside_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The script compares lists of answers with the first one, and its results have no gold texts to judge by."""
    official = tmp_path / "m_selection_norm_n_2_seed_0"
    ours = tmp_path / "m_selection_norm_n_2_seed_0_rows_n_100_seed_7"
    golds = [["yes", "no"], ["no", "yes"]] * 4
    for folder, answers in ((official, ["yes"] * 8), (ours, ["no"] * 4 + ["maybe"] * 4)):
        write_result(folder / "ai2_arc.ARC-Easy", answers, [first for first, _ in golds])
        write_result(folder / "nq.natural-questions", answers, golds)
    for file in official.rglob("*.json*"):
        if file.stem not in OFFICIAL:
            file.unlink()
    values = official / "nq.natural-questions" / "eval_results.json"
    values.write_text(json.dumps([1, 0] * 4))  # as the script judges these answers

    lines, said = compare(official, ours, capsys=capsys)
    assert [line["name"] for line in lines] == ["ai2_arc.ARC-Easy"]
    table = read(ours)
    assert set(table["k"]) == {2} and set(table["seed"]) == {0}  # whatever the run's own name is
    unlike = (
        f"'nq.natural-questions': expected one metric, found em_first in {official.name} and em_multi in {ours.name}"
    )
    hint = "--metric nq.natural-questions=em_first"
    assert unlike in said and hint in said
    lines, _ = compare(official, ours, *hint.split(), capsys=capsys)
    assert [(line["name"], line["measure"], line["a"], line["b"]) for line in lines] == [
        ("ai2_arc.ARC-Easy", "em", 0.5, 0.25),
        ("nq.natural-questions", "em_first", 0.5, 0.25),
        ("Closed-Book QA", "em", 0.5, 0.25),
    ]
    wrong = compare(tmp_path, "--metric", "nc=em", capsys=capsys, fails=True)[1]
    assert "--metric nc=...: expected a dataset, found 'nc'" in wrong and "there are ai2_arc.ARC-Easy" in wrong

    shown = report(official, ours, "--save", tmp_path / "r.tex", "--json", capsys=capsys)
    group = {line["run"]: line["score"] for line in shown["scores"] if line["name"] == "Closed-Book QA"}
    assert group == {official.name: 0.5, ours.name: (0.25 + 0.5) / 2}
    assert any("nq.natural-questions are compared with the first gold text alone" in one for one in shown["notes"])


def test_intervals_follow_the_metric_and_not_its_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Answers that share no word with the gold texts have zeros, as wrong ones have."""
    for name in (LEFT, RIGHT):
        write_result(tmp_path / name / "gem.dart", ["x"] * 12, ["a b"] * 12)
        write_result(tmp_path / name / "bbh.one", ["x"] * 12, ["a b"] * 12)
    found = report(tmp_path, "--save", tmp_path / "r.tex", "--json", capsys=capsys)
    ends = {(one["name"], one["measure"]): (one["low"], one["high"]) for one in found["scores"]}
    assert ends["gem.dart", "rouge-L"] == (None, None)
    assert ends["bbh.one", "em"] == (0.0, pytest.approx(0.2425, abs=1e-4))
    tests = {one["name"]: (one["test"], one["interval"]) for one in found["comparisons"]}
    assert tests["gem.dart"] == ("randomised", None) and tests["bbh.one"][0] == "McNemar"


def test_groups_of_the_paper() -> None:
    found = grouped(["code_x_glue.x", "mine/a.b", "tqa.rc", "bbh.a", "wmt16.de-en", "nq.open", "bbh.b"])
    assert list(found) == ["BIG-Bench Hard", "Translation", "Closed-Book QA", "Code", "mine"] and len(GROUPS) == 6
    assert found["Closed-Book QA"] == ["tqa.rc", "nq.open"] and found["BIG-Bench Hard"] == ["bbh.a", "bbh.b"]


# -- reports -----------------------------------------------------------------------------------------------------------


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
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_its_window_without_errors(window: Browser, page: Path, width: int, dark: bool) -> None:
    window.emulate(width, dark=dark)
    window.messages()
    window.open(page)
    assert window.messages() == []
    found = window.run("return [document.title, document.documentElement.scrollWidth]")
    assert found == [f"LoGo: {RIGHT}, {LEFT}", width]
    charts = window.run("return [...document.querySelectorAll('.chart svg')].map(svg => svg.clientWidth)")
    assert len(charts) == 5 and all(width / 2 < each <= width for each in charts)
    style = "const style = getComputedStyle(document.body); return [style.backgroundColor, style.color]"
    ground, ink = window.run(f"{style}.map(one => one.match(/\\d+/g).map(Number).reduce((a, b) => a + b))")
    assert (ground < ink) == dark and abs(ground - ink) > 400
    marked = window.run("return [...document.querySelectorAll('.marked')].map(line => line.innerText)")
    assert len(marked) == 1 and "BIG-Bench Hard (2)" in marked[0]


@needs_browser
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
    found = report(tmp_path, "--save", page, "--save", tables, "--save", tex, "--json", capsys=capsys)
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
    anew = report(tmp_path, "--save", page, "--metric", "bleu", "--json", capsys=capsys)
    assert {one["measure"] for one in anew["scores"]} == {"bleu"}
    # A run that lacks the hard dataset of a group has no mean of it: it would look better.
    write_result(tmp_path / "other_selection_norm_n_1_seed_0" / "bbh.one", ["yes", "no"] * 4, ["yes", "no"] * 4)
    names = [one["name"] for one in report(tmp_path, "--save", page, "--json", capsys=capsys)["scores"]]
    assert (names.count("bbh.one"), names.count("BIG-Bench Hard")) == (3, 2)


def test_runs_on_other_rows_are_shown_and_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_result(tmp_path / LEFT / "bbh.one", ["yes"] * 12, ["yes"] * 12)
    write_result(tmp_path / RIGHT / "bbh.one", ["yes"] * 11, ["yes"] * 11)
    write_result(tmp_path / LEFT / "bbh.two", ["yes"], ["yes"], {"identity": {"base_model": "other"}})
    report(tmp_path, "--save", tmp_path / "r.html")
    said = capsys.readouterr().err
    assert f"found 11 in {RIGHT} and 12 in {LEFT}" in said
    assert f'{LEFT} mixes settings: of bbh.two, base_model is "other", not "m"' in said
    assert "There are no two runs on the same rows." in (tmp_path / "r.html").read_text()
    assert run(["eval", "report", str(tmp_path), "--save", str(tmp_path / "page.pdf")]) == 2
    assert "expected FILE.html, FILE.tex, or a folder without a suffix" in capsys.readouterr().err
