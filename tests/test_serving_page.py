"""The page at `/` of a real server, in a real browser: asked, searched, read, at two widths and by keys alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import logo.serving
from browser import Browser, browser, needs_browser
from page_tools import ASK, BARS, PROMPT, ROWS, SET, USE, ask, completion, enter, errors
from serving import Served, served

browses = needs_browser
pytestmark = pytest.mark.slow

PAGE = Path(logo.serving.__file__).parent / "page"
# Every piece of text that can be seen, with its contrast to what lies behind it.
CONTRASTS = """
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (colour) => {
    const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = numbers(colour).map((v) => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (node) => {
    const colour = getComputedStyle(node).backgroundColor;
    return numbers(colour)[3] === 0 ? ground(node.parentElement) : colour;
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const found = [];
  for (let text = walker.nextNode(); text; text = walker.nextNode()) {
    const node = text.parentElement;
    if (!text.data.trim() || !node.checkVisibility({ visibilityProperty: true })) continue;
    const [a, b] = [light(getComputedStyle(node).color), light(ground(node))].sort((x, y) => y - x);
    found.push([text.data, (a + 0.05) / (b + 0.05)]);
  }
  return found;
"""


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def demo() -> Iterator[Served]:
    with served("--base-model", "demo") as server:
        yield server


def check_bars(rows: list[list[Any]], names: list[str], values: list[float]) -> None:
    """The rows name these values in this order, and their bars are as long in proportion."""
    assert [name for name, _, _ in rows] == names
    widest = max(width for _, width, _ in rows)
    assert widest > 50
    for (_, width, text), value in zip(rows, values, strict=True):
        assert abs(width / widest - max(value, 0) / max(values)) < 0.015  # no bar is narrower than it can be seen
        assert text == "<0.001" if 0 <= value < 0.0005 else abs(float(text) - value) < 0.0006


def test_the_page_is_small_and_writes_text_only_as_text() -> None:
    files = sorted(PAGE.iterdir())
    assert sum(file.stat().st_size for file in files) < 60_000
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|style=|cssText", text), file
        assert len(text.splitlines()) <= 400
        loaded = re.findall(r"(?:src|import|stylesheet\" href)[^\n]*?[\"'](https?:[^\"']*)", text)
        assert loaded == [], file  # everything comes from the server itself


@browses
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_is_readable_and_says_nothing_on_the_console(
    window: Browser, demo: Served, width: int, dark: bool
) -> None:
    enter(window, demo, width, dark=dark)
    window.run("document.querySelector('#examples button').click()")
    window.wait("return !document.getElementById('scores').hidden && document.getElementById('stop').hidden")
    window.run(USE, "plural")
    assert window.messages() == []
    assert window.run("return [document.documentElement.scrollWidth, document.body.scrollWidth]") == [width] * 2
    outside = "node.getBoundingClientRect().right > innerWidth + 0.5 || node.getBoundingClientRect().left < -0.5"
    seen = "[...document.querySelectorAll('main *, footer *')].filter(node => node.checkVisibility())"
    assert window.run(f"return {seen}.filter(node => {outside}).map(node => node.outerHTML)") == []
    ground, ink = window.run(
        "const style = getComputedStyle(document.body); return [style.backgroundColor, style.color]"
        ".map(colour => colour.match(/\\d+/g).map(Number).reduce((a, b) => a + b))"
    )
    assert (ground < ink) == dark and abs(ground - ink) > 400
    contrasts = window.run(CONTRASTS)
    assert len(contrasts) > 100
    assert [(text, ratio) for text, ratio in contrasts if ratio < 4.5] == []
    height = window.run("return document.querySelector('#send').getBoundingClientRect().height")
    assert height >= 36  # a finger finds it
    window.emulate(width - 30, dark=dark)
    assert window.run("return document.documentElement.scrollWidth") == width - 30


@browses
def test_both_answers_are_the_apis_and_come_piece_by_piece(window: Browser, demo: Served) -> None:
    before = {adapter["id"]: adapter["selected"] for adapter in demo.get("/v1/logo/adapters")["data"]}
    enter(window, demo)
    window.run(
        "window.pieces = 0; new MutationObserver(() => window.pieces++).observe("
        "document.querySelector('#base .text'), { characterData: true, subtree: true })"
    )
    shown = ask(window, PROMPT)
    base, _ = completion(demo, "demo")
    text, mixture = completion(demo, "logo")
    assert shown == (base, text) and base != text
    assert window.run("return window.pieces") > 3
    check_bars(window.run(BARS, "#logo .bars"), mixture["adapters"], mixture["weights"])
    assert window.run(BARS, "#base .bars") == []
    stages = window.run("return [...document.querySelectorAll('.stages dd')].map(node => node.textContent)")
    spent = r"[\d.]+ m?s"
    forms = [spent, f"{spent}|none", spent, r"[\d,]+/s", spent, r"\d+"]
    assert all(re.fullmatch(form, stage) for form, stage in zip(forms * 2, stages, strict=True)), stages
    assert stages[1] == "none" != stages[7]  # the base model selects nothing
    said = window.run("return document.getElementById('said').textContent")
    assert text in said and base in said

    after = {adapter["id"]: adapter["selected"] for adapter in demo.get("/v1/logo/adapters")["data"]}
    best = mixture["adapters"][0]
    assert after[best] > before[best]
    told = "[...document.querySelectorAll('.pool tbody tr')].find(row => row.dataset.adapter === arguments[0])"
    window.wait(f"return Number({told}.querySelectorAll('.num')[4].textContent) > arguments[1]", best, before[best])


@browses
def test_all_scores_are_shown_best_first(window: Browser, demo: Served) -> None:
    enter(window, demo)
    ask(window, PROMPT)
    reply = demo.post("/v1/logo/select", {"prompt": PROMPT})
    ranked = sorted(reply["scores"].items(), key=lambda item: -item[1])
    rows = window.run(BARS, "#scores table")
    check_bars(rows, [name for name, _ in ranked], [score for _, score in ranked])
    marked = "return [...document.querySelectorAll('#scores tr.chosen th')].map(cell => cell.textContent)"
    assert window.run(marked) == reply["adapters"]
    assert f"prompt of {reply['tokens']} tokens" in window.run(
        "return document.getElementById('scores-about').textContent"
    )


@browses
def test_settings_reach_the_server(window: Browser, demo: Served) -> None:
    enter(window, demo)
    _, text = ask(window, "I like trains", max_tokens=2, k=5, mode="chat")
    expected, mixture = completion(
        demo, "logo", "I like trains", max_tokens=2, logo={"k": 5}
    )  # fmt: skip
    assert text == expected
    assert [name for name, _, _ in window.run(BARS, "#logo .bars")] == mixture["adapters"]
    assert len(mixture["adapters"]) == 5
    ends = window.run("return [...document.querySelectorAll('.end')].map(node => node.textContent)")
    assert "Cut at max tokens." in ends
    window.run(SET, "temperature", "3")  # the browser says what is wrong, and nothing is sent
    window.run(ASK, PROMPT)
    assert window.run("return document.querySelector('#ask input:invalid').id") == "temperature"
    assert window.run("return document.getElementById('asked').textContent") == "I like trains"


@browses
def test_one_adapter_is_made_to_answer(window: Browser, demo: Served) -> None:
    enter(window, demo)
    window.run(USE, "upper_case")
    assert window.run("return document.activeElement.id") == "prompt"
    assert "only upper_case will answer" in window.run("return document.getElementById('forced').innerText")
    _, text = ask(window, PROMPT)
    assert text == completion(demo, "upper_case")[0] != completion(demo, "logo")[0]
    assert window.run("return document.getElementById('logo-title').textContent") == "upper_case"
    assert [row[0] for row in window.run(BARS, "#logo .bars")] == ["upper_case"]
    pressed = "return [...document.querySelectorAll('[aria-pressed=true]')].map(node => node.textContent)"
    assert window.run(pressed) == ["Use only upper_case"]
    window.run("document.getElementById('unforce').click()")
    assert window.run(pressed) == []
    assert ask(window, PROMPT)[1] == completion(demo, "logo")[0]


@browses
def test_the_pool_is_searched_and_sorted(window: Browser, demo: Served) -> None:
    enter(window, demo)
    cards = demo.get("/v1/logo/adapters")["data"]
    names = sorted(card["id"] for card in cards)
    assert window.run(ROWS) == names
    window.run(SET, "search", "LETTER")
    assert window.run(ROWS) == [name for name in names if "letter" in name]
    assert window.run("return document.getElementById('count').textContent") == "3 of 16 adapters"
    window.run(SET, "search", "q_proj")  # a module
    assert len(window.run(ROWS)) == 16
    window.run(SET, "search", "nothing like it")
    assert window.run(ROWS) == []
    window.run(SET, "search", "")
    window.run("document.querySelector('.pool .sort').click()")
    assert window.run(ROWS) == names[::-1]
    ask(window, PROMPT)
    window.run("[...document.querySelectorAll('.pool .sort')].at(-1).click()")
    counts = window.run("return [...document.querySelectorAll('.pool tr .num:nth-child(7)')].map(c => c.textContent)")
    assert [int(count) for count in counts[1:]] == sorted(map(int, counts[1:]), reverse=True)
    sorts = "return [...document.querySelectorAll('.pool thead th')].map(head => head.getAttribute('aria-sort'))"
    assert window.run(sorts) == [None] * 6 + ["descending", None]


@browses
def test_keys_alone_are_enough(window: Browser, demo: Served) -> None:
    enter(window, demo)
    window.press("Tab")
    assert window.run("return document.activeElement.textContent") == "Skip to the prompt"
    window.press("Enter")
    window.wait("return document.activeElement.id === 'prompt'")
    for key in "hello":
        window.press(key)
    window.press("Enter")  # a new line, not yet sent
    typed = "return [document.getElementById('prompt').value, document.getElementById('answers').hidden]"
    assert window.run(typed) == ["hello\n", True]
    window.press("Enter", control=True)
    window.wait("return !document.getElementById('answers').hidden && document.getElementById('stop').hidden")
    assert window.run("return document.activeElement.id") == "prompt"

    # From here to the end of the page: every control once, in order, each with an outline.
    # They are looked up each time, because the page renders its pool anew once the answer is counted.
    controls = "[...document.querySelectorAll('a, button, input, select, textarea')]"
    inside = f"{controls}.filter(node => node.checkVisibility())"
    total = window.run(f"return {inside}.length")
    where = f"return {inside}.indexOf(document.activeElement)"
    outlined = "const s = getComputedStyle(document.activeElement); return s.outlineStyle + ' ' + s.outlineWidth"
    for place in range(window.run(where) + 1, total):
        window.press("Tab")
        assert window.run(where) == place
        assert window.run(outlined) == "solid 2px"
    window.press("Tab", shift=True)
    assert window.run(where) == total - 2


@browses
def test_a_screen_reader_is_told_what_is_what(window: Browser, demo: Served) -> None:
    enter(window, demo)
    ask(window, PROMPT)
    nodes = window.devtools("Accessibility.getFullAXTree", {})["nodes"]
    heard = [
        (node["role"]["value"], node.get("name", {}).get("value", ""), node) for node in nodes if not node["ignored"]
    ]
    controls = {"button", "textbox", "searchbox", "spinbutton", "combobox", "link", "heading", "table", "article"}
    assert [node for role, name, node in heard if role in controls and not name.strip()] == []
    roles = {role for role, _, _ in heard}
    assert {"banner", "main", "contentinfo", "search", "status", "table", "columnheader", "rowheader"} <= roles
    regions = [name for role, name, _ in heard if role == "region"]
    assert regions == ["Ask", "Answers", "Scores", "Pool"]
    headings = "[...document.querySelectorAll('h1, h2, h3, h4, h5, h6')].filter(node => node.checkVisibility())"
    levels = window.run(f"return {headings}.map(node => Number(node.tagName[1]))")
    assert levels == [1, 2, 2, 3, 3, 2, 2]
    live = "return [...document.querySelectorAll('.text')].map(node => node.closest('[aria-live], [role=status]'))"
    assert window.run(live) == [None, None]  # answers are told once, when they are complete


@browses
def test_what_the_server_refuses_is_told(window: Browser, demo: Served) -> None:
    enter(window, demo)
    ask(window, "word " * 600)
    assert len(found := errors(window)) == 2
    assert all(text.startswith("This model's context holds 512 tokens") for text in found)
    assert window.run("return document.getElementById('scores').hidden")
    ask(window, PROMPT)
    assert errors(window) == []
    assert not window.run("return document.getElementById('scores').hidden")
    ask(window, "word " * 600)
    assert window.run("return document.getElementById('scores').hidden")  # those of another prompt are gone
