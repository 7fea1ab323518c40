"""The page in a real browser: opened from a file, filtered, searched and read, at two widths."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from browser import Browser, browser, needs_browser
from logo.evaluation.report import analyse, page
from logo.evaluation.runs import read_runs
from report_runs import ROWS, TASKS, demo_results, write_result

pytestmark = [needs_browser, pytest.mark.slow]

LINES = "return [...document.querySelectorAll('#list > li')].map(item => item.innerText)"
STATUS = "return document.getElementById('status').textContent"
CHOOSE = (
    "const control = document.getElementById(arguments[0]); control.value = arguments[1];"
    "control.dispatchEvent(new Event(control.tagName === 'INPUT' ? 'input' : 'change'))"
)


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    demo = demo_results(tmp_path_factory)
    file = tmp_path_factory.mktemp("page") / "r.html"
    file.write_text(page(analyse(read_runs([demo / "results"], demo / "data"))), encoding="utf-8")
    return file


def choose(window: Browser, control: str, value: str, status: str) -> list[str]:
    """Sets a control and returns the lines as soon as the status is as expected."""
    window.run(CHOOSE, control, value)
    window.wait(f"{STATUS} === arguments[0]", status)
    found: list[str] = window.run(LINES)
    return found


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_its_window_and_says_nothing_on_the_console(
    window: Browser, report: Path, width: int, dark: bool
) -> None:
    window.emulate(width, dark=dark)
    window.open(report)
    assert window.messages() == []
    assert window.run("return document.documentElement.scrollWidth") == width
    assert window.run("return document.querySelectorAll('#list > li').length") == ROWS * len(TASKS)
    ground, ink = window.run(
        "const style = getComputedStyle(document.body); return [style.backgroundColor, style.color]"
        ".map(colour => colour.match(/\\d+/g).map(Number).reduce((a, b) => a + b))"
    )
    assert (ground < ink) == dark and abs(ground - ink) > 400


def test_wrong_rows_are_found_and_one_is_opened(window: Browser, report: Path) -> None:
    window.emulate(1280)
    window.open(report)
    marks = window.run("return [...document.querySelectorAll('#list .worth .unseen')].map(mark => mark.textContent)")
    wrong = marks.count("wrong")
    assert 0 < wrong <= len(marks) == ROWS * len(TASKS)
    lines = choose(window, "f-show", "wrong", f"1–{wrong} of {wrong} instances")
    assert len(lines) == wrong and all("✗" in line for line in lines)
    window.run("document.querySelector('#list .line').click()")
    window.wait("return document.querySelectorAll('#list .answer').length === 2")
    opened = window.run("return document.querySelector('#list .open').innerText")
    assert "Prompt" in opened and "Gold text" in opened and "entropy" in opened and "norm" in opened
    bars = window.run(
        "return [...document.querySelectorAll('#list .answer:first-child .bars li')].map(item => "
        "[item.querySelector('.bar i').getBoundingClientRect().width, "
        "Number(item.querySelector('.value').textContent)])"
    )
    assert len(bars) == 3 and abs(sum(weight for _, weight in bars) - 1) < 0.002
    widest = bars[0]
    assert all(abs(bar / widest[0] - weight / widest[1]) < 0.02 for bar, weight in bars)
    address = window.run("return location.hash")
    assert address.startswith("#i/demo.")
    window.run("document.querySelector('#list .line').click()")
    assert window.run("return document.querySelector('#list .open')") is None

    window.open(report, "?again" + address)  # the address of one instance leads to it
    assert window.wait("return document.querySelector('#list .open')?.innerText") == opened
    assert window.messages() == []


def test_lost_won_and_order(window: Browser, tmp_path: Path) -> None:
    rows = [{"context": f"prompt {n}", "completion": "gold"} for n in range(45)]
    values = {"a": [0.2, 0.9, 0.4, 0.6, 0.5] * 9, "b": [0.9, 0.2, 0.3, 0.7, 0.5] * 9}
    for name, worth in values.items():
        write_result(tmp_path / "r" / name / "wmt14.fr-en", worth, rows=rows)
    file = tmp_path / "r.html"
    file.write_text(page(analyse(read_runs([tmp_path / "r"]))), encoding="utf-8")
    window.open(file)
    lost = choose(window, "f-show", "lost", "1–9 of 9 instances")
    assert all(" 20.0" in f" {line}" and "prompt" in line for line in lost)
    won = choose(window, "f-show", "won", "1–9 of 9 instances")
    assert all(" 90.0" in f" {line}" for line in won)
    choose(window, "f-run", "1", "1–9 of 9 instances")
    choose(window, "f-show", "all", "1–20 of 45 instances")
    window.run(CHOOSE, "f-order", "worst")
    window.wait("return document.querySelector('#list .worth').textContent.startsWith('20.0')")
    for _ in range(2):
        window.run("document.getElementById('next').click()")
    window.wait(f"{STATUS} === '41–45 of 45 instances'")
    shown = window.run(
        "return [...document.querySelectorAll('#list .worth')].map(each => parseFloat(each.textContent))"
    )
    assert shown == [90.0] * 5
    assert window.run("return document.getElementById('next').disabled")


def test_a_name_with_slashes_has_an_address(window: Browser, tmp_path: Path) -> None:
    name = "words/forms/plural.v2"
    rows = [{"context": f"prompt {n}", "completion": "gold"} for n in range(3)]
    said = {"dataset": {"name": name}, "options": {}}
    write_result(tmp_path / "r" / name, [1, 0, 1], rows=rows, run_json=said)
    file = tmp_path / "r.html"
    file.write_text(page(analyse(read_runs([tmp_path / "r"]))), encoding="utf-8")
    window.open(file, "#i/words%2Fforms%2Fplural.v2/2")
    assert "prompt 1" in window.wait("return document.querySelector('#list .open')?.innerText")
    window.run("document.querySelector(`a[data-dataset='${arguments[0]}']`).click()", name)
    window.wait(f"{STATUS} === '1–3 of 3 instances'")
    assert window.messages() == []


def test_search_and_dataset(window: Browser, report: Path) -> None:
    window.open(report)
    lines = choose(window, "f-dataset", "2", f"1–{ROWS} of {ROWS} instances")
    assert all(f"demo.{TASKS[2]}" in line for line in lines)
    assert choose(window, "f-text", "no such text anywhere", "No such instance.") == []
    window.run("document.getElementById('f-reset').click()")
    total = ROWS * len(TASKS)
    window.wait(f"{STATUS} === arguments[0]", f"1–{total} of {total} instances")
    text = window.run("return document.querySelector('#list .gist span').textContent")
    window.run(CHOOSE, "f-text", text.upper())
    window.wait("return document.querySelectorAll('#list mark').length > 0")
    assert window.run("return document.querySelector('#list mark').textContent") == text


def test_keys(window: Browser, report: Path) -> None:
    window.open(report)
    window.run("document.getElementById('browser').focus()")
    focused = "return [...document.querySelectorAll('#list .line')].indexOf(document.activeElement)"
    for key, place in (("j", 0), ("j", 1), ("j", 2), ("k", 1)):
        window.press(key)
        assert window.run(focused) == place
    window.press("Enter")
    window.wait("return document.querySelector('#list .open') !== null")
    window.press("/")
    assert window.run("return document.activeElement.id") == "f-text"
    window.press("j")  # now it is a letter
    assert window.run("return document.getElementById('f-text').value") == "j"


def test_without_script_the_tables_are_there(window: Browser, report: Path) -> None:
    window.devtools("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        window._send("POST", "/url", {"url": report.resolve().as_uri()})
        text = window._send("POST", "/execute/sync", {"script": "return document.body.innerText", "args": []})
    finally:
        window.devtools("Emulation.setScriptExecutionDisabled", {"value": False})
    assert "demo.antonym" in text and "Browsing instances needs JavaScript" in text


def test_hostile_text_in_a_browser(window: Browser, tmp_path: Path) -> None:
    evil = ["</script><script>document.title='x'</script>", "<img src=x onerror=\"document.title='x'\">"]
    write_result(
        tmp_path / "r" / "d.x",
        [0, 0],
        predictions=evil,
        selected=[evil, evil],
        weights=[[0.5, 0.5]] * 2,
        rows=[{"context": text, "completion": text} for text in evil],
        run_json={"score_columns": evil, "options": {"method": evil[1]}},
        metrics={"errors": [{"index": 0, "message": evil[1]}]},
    )
    file = tmp_path / "r.html"
    file.write_text(page(analyse(read_runs([tmp_path / "r"])), "safe"), encoding="utf-8")
    window.open(file)
    window.run("for (const line of document.querySelectorAll('#list .line')) line.click()")
    window.wait("return document.querySelectorAll('#list .answer').length === 2")
    assert window.run("return [document.title, document.querySelectorAll('img').length]") == ["safe", 0]
    assert evil[1] in window.run("return document.getElementById('list').innerText")
    assert window.messages() == []
