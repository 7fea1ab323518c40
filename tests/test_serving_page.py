"""The page at `/` of a real server, in a real browser: asked, searched, stopped, refused, at two widths."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import logo.serving
from browser import MISSING, Browser, browser
from http_server import eventually
from logo.demo import adapters_dir, model_dir
from relay import relay
from serving import Served, served

browses = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

PAGE = Path(logo.serving.__file__).parent / "page"
PROMPT = "Write the verb 'climb' in its past form."
KEY = "right-key"
EVIL = ("<img src=x onerror=document.title=1>", "a\"b'c&lt;", "\u202eTxeT\u202c")
COPIES = 3  # of each adapter in the strange pool: more than one screen, so that there is a picture of the scores
LONG = 300

ASK = "document.getElementById('prompt').value = arguments[0]; document.getElementById('ask-form').requestSubmit()"
IDLE = "return document.getElementById('stop').hidden"
SET = (
    "const control = document.getElementById(arguments[0]); control.value = arguments[1];"
    "control.dispatchEvent(new Event('input'))"
)
# [name, width of the bar, number] of each row of a table of bars.
BARS = (
    "return [...document.querySelectorAll(arguments[0] + ' tbody tr')].map(row => [row.querySelector('th').textContent,"
    "row.querySelector('rect').getBoundingClientRect().width, row.querySelector('.num').textContent])"
)
ROWS = "return [...document.querySelectorAll('.pool tbody tr')].map(row => row.dataset.adapter)"
USE = (
    "[...document.querySelectorAll('.pool tbody tr')].find(row => row.dataset.adapter === arguments[0])"
    ".querySelector('button').click()"
)
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


@pytest.fixture(scope="module")
def strange(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server with a key and room for three answers; its model never stops by itself, and names are hostile."""
    root = tmp_path_factory.mktemp("strange")
    base = shutil.copytree(model_dir(), root / "endless")
    for file in (base / "config.json", base / "generation_config.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": 600}))
    folders = sorted(adapters_dir().iterdir())
    for folder in folders:
        for copy in range(COPIES):
            shutil.copytree(folder, root / "pool" / f"{folder.name}.{copy}")
    for name in EVIL:
        shutil.copytree(folders[0], root / "pool" / name)
    limits = ("--max-concurrent", "3", "--max-queue", "0")
    engine = ("--selection-strategy", "norm", "--n-selected-modules", "10")
    with served("--base-model", str(base), "--adapters", str(root / "pool"), *limits, *engine, key=KEY) as server:
        yield server


def enter(window: Browser, server: Served, width: int = 1280, *, dark: bool = False) -> None:
    """The page as at a first visit, with the key where one is needed."""
    window.emulate(width, dark=dark)
    window.visit(f"{server.url}/")
    if server.key and window.run("return !document.getElementById('key').hidden"):
        give_key(window, server.key)
        window.wait("return !document.getElementById('ask').hidden")
    window.messages()


def give_key(window: Browser, key: str) -> None:
    window.run(SET, "key-text", key)
    window.run("document.getElementById('key-form').requestSubmit()")


def ask(window: Browser, prompt: str, **settings: object) -> tuple[str, str]:
    """Both answers when they are complete: the base model's and LoGo's."""
    for name, value in settings.items():
        window.run(SET, name.replace("_", "-"), str(value))
    window.run(ASK, prompt)
    window.wait(IDLE, seconds=60)
    base, right = window.run("return [...document.querySelectorAll('.answer .text')].map(node => node.textContent)")
    return base, right


def errors(window: Browser) -> list[str]:
    """What the two answers and the scores say went wrong."""
    found: list[str] = window.run("return [...document.querySelectorAll('.error')].map(node => node.textContent)")
    return [text for text in found if text]


def completion(server: Served, model: str, prompt: str = PROMPT, **more: Any) -> tuple[str, Any]:
    """An answer of the API as the page shows it, and what it was mixed from."""
    body = {"model": model, "prompt": prompt, "max_tokens": 64, "temperature": 0, **more}
    reply = server.post("/v1/completions", body)
    return reply["choices"][0]["text"].lstrip(), reply["logo"]


def check_bars(rows: list[list[Any]], names: list[str], values: list[float]) -> None:
    """The rows name these values in this order, and their bars are as long in proportion."""
    assert [name for name, _, _ in rows] == names
    widest = max(width for _, width, _ in rows)
    assert widest > 50
    for (_, width, text), value in zip(rows, values, strict=True):
        assert abs(width / widest - value / max(values)) < 0.01
        assert text == "<0.001" if value < 0.0005 else abs(float(text) - value) < 0.0006


# -- files ---------------------------------------------------------------------------------------------------------


def test_the_page_is_small_and_writes_text_only_as_text() -> None:
    files = sorted(PAGE.iterdir())
    assert sum(file.stat().st_size for file in files) < 60_000
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|style=|cssText", text), file
        assert len(text.splitlines()) <= 400
        loaded = re.findall(r"(?:src|import|stylesheet\" href)[^\n]*?[\"'](https?:[^\"']*)", text)
        assert loaded == [], file  # everything comes from the server itself


# -- the demo ------------------------------------------------------------------------------------------------------


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
    _, text = ask(window, "Tell me the antonym of cruel.", max_tokens=2, k=5, mode="chat")
    expected, mixture = completion(
        demo, "logo", "Tell me the antonym of cruel.", max_tokens=2, logo={"k": 5}
    )  # fmt: skip
    assert text == expected
    assert [name for name, _, _ in window.run(BARS, "#logo .bars")] == mixture["adapters"]
    assert len(mixture["adapters"]) == 5
    ends = window.run("return [...document.querySelectorAll('.end')].map(node => node.textContent)")
    assert "Cut at max tokens." in ends
    window.run(SET, "temperature", "3")  # the browser says what is wrong, and nothing is sent
    window.run(ASK, PROMPT)
    assert window.run("return document.querySelector('#ask input:invalid').id") == "temperature"
    assert window.run("return document.getElementById('asked').textContent") == "Tell me the antonym of cruel."


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
    window.run("window.controls = [...document.querySelectorAll('a, button, input, select, textarea')]")
    inside = "window.controls.filter(node => node.checkVisibility())"
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


# -- trouble -------------------------------------------------------------------------------------------------------


@browses
def test_a_wrong_key_is_refused_and_a_right_one_kept_in_this_tab(window: Browser, strange: Served) -> None:
    window.emulate(390)
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
    ask(window, prompt, max_tokens=8, k=3 + 16 * COPIES)
    assert errors(window) == []
    assert window.run("return document.getElementById('asked').textContent") == prompt
    window.run("document.querySelector('#logo .more button').click()")
    assert set(EVIL) <= {name for name, _, _ in window.run(BARS, "#logo .bars")}
    window.run("document.querySelector('#scores .more button').click()")
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


@browses
def test_large_pools_have_a_picture_and_show_their_rows_on_demand(window: Browser, strange: Served) -> None:
    enter(window, strange)
    total = 3 + 16 * COPIES
    assert len(window.run(ROWS)) == 50
    window.run("document.querySelector('#pool .more button').click()")
    assert len(window.run(ROWS)) == total
    assert window.run("return document.activeElement.closest('tr').rowIndex") == 51
    ask(window, PROMPT, max_tokens=4)
    assert errors(window) == []
    assert f"{total} adapters" in window.run("return document.querySelector('.columns svg').getAttribute('aria-label')")
    columns = window.run("return [...document.querySelectorAll('.columns path')].map(p => p.getAttribute('d'))")
    assert [path.count("M") for path in columns] == [total - 10, 10]
    assert len(window.run(BARS, "#scores table")) == 20


@browses
def test_stop_ends_it_here_and_on_the_server(window: Browser, strange: Served) -> None:
    enter(window, strange)
    for by in ("document.getElementById('stop').click()", "press('Escape')"):
        window.run(
            "const press = (key) => document.body.dispatchEvent(new KeyboardEvent('keydown', { key, bubbles: true }));"
            f"const observer = new MutationObserver(() => {{ observer.disconnect(); {by}; }});"
            "observer.observe(document.querySelector('#logo .text'), { characterData: true, subtree: true })"
        )
        _, text = ask(window, PROMPT, max_tokens=LONG)
        assert text and window.run("return document.querySelector('#logo .end').textContent") == "Stopped."
        assert window.run("return document.getElementById('said').textContent") == "Stopped."
        assert len(text) < len(completion(strange, "logo", max_tokens=LONG)[0])
    assert errors(window) == []
    eventually(lambda: re.findall(r"^logo:num_requests_running\S* (\S+)$", strange.text("/metrics"), re.M) == ["0.0"])


@browses
def test_a_full_server_says_try_again(window: Browser, strange: Served) -> None:
    enter(window, strange)
    full = {"model": "logo", "prompt": PROMPT, "max_tokens": 450, "n": 3, "stream": True}
    for _ in range(5):  # a machine that stalls may lose the race
        with strange.open("/v1/completions", full) as held:
            held.readline()
            ask(window, PROMPT, max_tokens=1)
        if len(found := errors(window)) == 2:
            break
    assert all(re.fullmatch("Too many requests are waiting; try again in 1 s.", text) for text in found), found
    window.wait("return [...document.querySelectorAll('.text')].every(node => node.textContent === '')")
    ask(window, PROMPT, max_tokens=1)
    while errors(window):  # until those that were held are gone
        ask(window, PROMPT)


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


@browses
def test_a_lost_connection_is_told_and_comes_back(window: Browser, strange: Served) -> None:
    lost = "The connection to the server was lost. Is it still running?"
    with relay(strange.url) as door:
        behind = Served(door.url, KEY)
        enter(window, behind)
        window.run(SET, "max-tokens", str(LONG))
        window.run(ASK, PROMPT)
        window.wait("return document.querySelector('#logo .text').textContent !== ''")
        door.cut()
        window.wait(IDLE)
        assert lost in errors(window)
        assert window.run("return document.querySelector('#logo .text').textContent") != ""  # what there is stays

        door.refused = b" /v1/"
        assert ask(window, PROMPT) == ("", "") and errors(window) == [lost] * 2
        window.visit(f"{door.url}/")
        trouble = "return !document.getElementById('trouble').hidden && document.getElementById('trouble').innerText"
        assert lost in window.wait(trouble)
        assert window.run("return document.getElementById('ask').hidden")
        door.refused = None
        window.run("document.querySelector('#trouble button').click()")
        window.wait("return !document.getElementById('ask').hidden && document.getElementById('trouble').hidden")
        ask(window, PROMPT, max_tokens=4)
        while errors(window):  # until those that were cut off are gone
            ask(window, PROMPT)
        assert window.run("return document.querySelector('#logo .text').textContent") != ""
