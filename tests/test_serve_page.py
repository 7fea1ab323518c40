"""The page at `/` of a real server, in a real browser: asked, searched, read, at two widths and by keys alone."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import logo.serve
from browser import Browser, browser, needs_browser
from logo.demo import adapters_dir
from page_tools import BARS, PROMPT, ROWS, SET, USE, ask, completion, enter, errors, give_key
from serving import Served, served

browses = needs_browser
pytestmark = pytest.mark.slow

PAGE = Path(logo.serve.__file__).parent / "page"
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


# -- a server with a key, and adapters with hostile names --

KEY = "right-key"
EVIL = ("<img src=x onerror=document.title=1>", "a\"b'c&lt;", "\u202eTxeT\u202c")


@pytest.fixture(scope="module")
def strange(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    pool = tmp_path_factory.mktemp("pool")
    for name in (*EVIL, "antonym"):
        shutil.copytree(adapters_dir() / "antonym", pool / name)
    with served("--base-model", "demo", "--adapters", str(pool), "--signal", "norm", key=KEY) as server:
        yield server


@browses
def test_a_wrong_key_is_refused_and_a_right_one_kept_in_this_tab(window: Browser, strange: Served) -> None:
    window.emulate(390)
    window.visit(f"{strange.url}/")
    window.run("sessionStorage.clear()")  # of what an earlier test left in this tab
    window.visit(f"{strange.url}/")
    hidden = "return ['key', 'ask', 'pool'].map(id => document.getElementById(id).hidden)"
    assert window.run(hidden) == [False, True, True]
    assert window.run("return document.activeElement.id") == "key-text"
    give_key(window, "wrong-key")
    window.wait("return document.getElementById('key-trouble').textContent !== ''")
    assert errors(window) == ["This key was refused. Please check it."]
    give_key(window, "ключ")  # what no header can hold
    window.wait("return document.getElementById('key-trouble').textContent.includes('plain letters')")
    give_key(window, KEY)
    window.wait("return document.activeElement.id === 'prompt'")
    assert window.run(hidden) == [True, False, False]
    assert window.run("return [localStorage.length, document.cookie, location.search + location.hash]") == [0, "", ""]
    window.visit(f"{strange.url}/")
    assert window.run(hidden) == [True, False, False]
    assert window.run("return document.getElementById('spec').hidden")  # a link cannot bring the key along
    window.run("document.getElementById('forget').click()")
    window.wait("return document.activeElement?.id === 'key-text'")
    assert window.run("return sessionStorage.length") == 0
    messages = window.messages()
    assert messages and all("401" in message for message in messages)  # the browser's own lines, and no others


@browses
def test_hostile_text_stays_text(window: Browser, strange: Served) -> None:
    enter(window, strange, 390)
    title = window.run("return document.title")
    prompt = f"{EVIL[0]}<script>document.title='x'</script>"
    ask(window, prompt, max_tokens=8, k=4)
    assert errors(window) == []
    assert window.run("return document.getElementById('asked').textContent") == prompt
    assert set(EVIL) <= {name for name, _, _ in window.run(BARS, "#logo .bars")}
    assert set(EVIL) <= {name for name, _, _ in window.run(BARS, "#scores table")}
    window.run(SET, "search", "tXEt")
    assert window.run(ROWS) == [EVIL[2]]
    window.run(SET, "search", EVIL[0])
    assert window.run(ROWS) == [EVIL[0]]
    window.run(USE, EVIL[0])
    ask(window, prompt)
    assert window.run("return document.getElementById('logo-title').textContent") == EVIL[0]
    assert window.run("return [document.title, document.querySelectorAll('img, main script').length]") == [title, 0]
    assert window.run("return document.documentElement.scrollWidth") == 390
    assert window.messages() == []
