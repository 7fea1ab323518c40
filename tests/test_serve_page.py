"""The page at `/` of a real server, in a real browser."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest

import logo.serve
from browser import Browser, browser, needs_browser
from http_server import eventually
from logo.demo import adapters_dir
from serving import Served, endless, served

pytestmark = pytest.mark.slow

KEY = "right-key"
EVIL = ("<img src=x onerror=document.title=1>", "a\"b'c&lt;", "\u202eTxeT\u202c")
PROMPT = "Write the verb 'climb' in its past form."
SET = (
    "const control = document.getElementById(arguments[0]); control.value = arguments[1];"
    "control.dispatchEvent(new Event('input')); control.dispatchEvent(new Event('change'))"
)
TEXT = "return document.getElementById(arguments[0]).textContent"
# [name, weight, width of the bar] of each adapter that answered.
BARS = (
    "return [...document.querySelectorAll('#mixture tr')].map(row => [row.querySelector('th').textContent,"
    "Number(row.querySelector('.number').textContent), row.querySelector('span').getBoundingClientRect().width])"
)


def enter(window: Browser, server: Served, width: int = 1280, *, dark: bool = False) -> None:
    """The page as at a first visit, with the key where one is needed."""
    window.emulate(width, dark=dark)
    window.visit(f"{server.url}/")
    if server.key:
        give_key(window, server.key)
        window.wait("return !document.getElementById('inside').hidden")
    window.messages()


def give_key(window: Browser, key: str) -> None:
    window.run(SET, "key", key)
    window.run("document.getElementById('key-form').requestSubmit()")


def ask(window: Browser, prompt: str, **settings: object) -> str:
    """The answer when it is complete."""
    for name, value in {**settings, "prompt": prompt}.items():
        window.run(SET, name, str(value))
    window.run("document.getElementById('ask').requestSubmit()")
    window.wait("return document.getElementById('stop').disabled")
    return str(window.run(TEXT, "answer"))


def completion(server: Served, model: str, prompt: str = PROMPT, max_tokens: int = 64) -> tuple[str, Any]:
    """An answer of the API as the page shows it, and what it was mixed from."""
    body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
    reply = server.post("/v1/completions", body)
    return reply["choices"][0]["text"].lstrip(), reply.get("logo")


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def demo() -> Iterator[Served]:
    with served("--base-model", "demo") as server:
        yield server


def test_it_is_small_and_writes_text_only_as_text() -> None:
    files = {file.name: file.read_text("utf-8") for file in (Path(logo.serve.__file__).parent / "page").iterdir()}
    assert sum(len(text.splitlines()) for text in files.values()) <= 400
    for name, text in files.items():
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|style=|cssText", text), name


@needs_browser
def test_the_answer_streams_in_and_its_adapters_are_the_apis(window: Browser, demo: Served) -> None:
    before = {adapter["id"]: adapter["selected"] for adapter in demo.get("/v1/logo/adapters")["data"]}
    enter(window, demo)
    window.run(
        "window.pieces = window.shift = 0; new MutationObserver(() => window.pieces++).observe("
        "document.getElementById('answer'), { childList: true });"
        "new PerformanceObserver(list => list.getEntries().forEach(entry => { window.shift += entry.value; }))"
        ".observe({ type: 'layout-shift' })"
    )
    for model in ("logo", "upper_case", "demo"):
        window.run("window.pieces = 0")
        text, mixture = completion(demo, model)
        assert ask(window, PROMPT, model=model, longest=64) == text
        assert window.run("return window.pieces") > 2
        rows = window.run(BARS)
        assert [name for name, *_ in rows] == mixture["adapters"]
        for (_, shown, width), weight in zip(rows, mixture["weights"], strict=True):
            assert abs(shown - weight) < 0.0006
            assert abs(width / rows[0][2] - weight / mixture["weights"][0]) < 0.02
        if model == "logo":
            assert window.run(TEXT, "confidence") == f"Confidence {mixture['confidence']:.2f}"
            [best, *_] = mixture["adapters"]
    assert window.run("return window.shift") < 0.01
    assert window.messages() == []
    row = "[...document.querySelectorAll('#pool tr')].find(row => row.querySelector('th').textContent === arguments[0])"
    counted = f"return Number({row}.querySelectorAll('td')[1].textContent) === arguments[1]"
    window.wait(counted, best, before[best] + 2)  # by the API, and by the page


@needs_browser
def test_stop_ends_the_answer_here_and_on_the_server(window: Browser, tmp_path: Path) -> None:
    pool = ("--adapters", str(adapters_dir()), "--signal", "norm")
    with served("--base-model", str(endless(tmp_path / "endless")), *pool) as server:
        enter(window, server)
        window.run(
            "const stop = document.getElementById('stop'); "
            "new MutationObserver((_, seen) => { seen.disconnect(); stop.focus(); stop.click(); }).observe("
            "document.getElementById('answer'), { characterData: true, childList: true, subtree: true })"
        )
        text = ask(window, PROMPT, longest=450)
        assert window.run(TEXT, "status") == "Stopped."
        assert window.run("return document.activeElement.id") == "prompt"  # a disabled button would lose the focus
        whole, _ = completion(server, "logo", max_tokens=450)
        assert whole.startswith(text) and len(text) < len(whole)
        eventually(lambda: "logo:num_requests_running 0.0" in server.text("/metrics"))
        assert window.run(TEXT, "answer") == text and window.messages() == []


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(390, True), (1280, False)])
def test_it_fits_names_all_controls_and_takes_keys(window: Browser, demo: Served, width: int, dark: bool) -> None:
    enter(window, demo, width, dark=dark)
    assert window.run("return document.documentElement.scrollWidth <= innerWidth")
    ground = window.run("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground))) < 300) == dark
    nodes = window.devtools("Accessibility.getFullAXTree", {})["nodes"]
    roles = ("textbox", "combobox", "spinbutton", "checkbox", "searchbox", "button", "region")
    names = [n["name"]["value"] for n in nodes if not n["ignored"] and n["role"]["value"] in roles]
    assert "Prompt" in names and "Use antonym alone" in names and all(names)
    window.run(SET, "search", "per")
    assert window.run(TEXT, "count") == "1 of 16 adapters"
    window.run("document.querySelector('#pool button').click(); document.getElementById('prompt').focus()")
    assert window.run("return document.getElementById('model').value") == "upper_case"
    for key in "hello":
        window.press(key)
    window.press("Enter", control=True)
    window.wait("return document.getElementById('status').textContent.includes('tokens in')")
    assert window.run(BARS)[0][0] == "upper_case"
    with pytest.raises(HTTPError) as caught:
        completion(demo, "upper_case", "hello", max_tokens=100_000)
    with caught.value as answer:
        said = json.load(answer)["error"]["message"]
    ask(window, "hello", longest=100_000)
    assert window.run(TEXT, "error") == said and "\n" not in said
    ask(window, "hello", longest=8)
    assert window.run(TEXT, "error") == ""


@needs_browser
def test_a_key_is_asked_for_and_hostile_names_stay_text(window: Browser, tmp_path: Path) -> None:
    for name in (*EVIL, "antonym"):
        shutil.copytree(adapters_dir() / "antonym", tmp_path / name)
    with served("--base-model", "demo", "--adapters", str(tmp_path), "--signal", "norm", key=KEY) as server:
        window.visit(f"{server.url}/")
        shown = "return ['key-form', 'inside'].map(id => document.getElementById(id).checkVisibility())"
        assert window.run(shown) == [True, False] and window.run(TEXT, "trouble") == ""
        assert window.run("return document.activeElement.id") == "key"
        give_key(window, "wrong-key")
        window.wait("return document.getElementById('trouble').textContent.includes('API key')")
        assert window.run(shown) == [True, False]
        enter(window, server)
        assert window.run(shown) == [False, True]
        assert window.run("return [localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]
        prompt = f"{EVIL[0]}<script>document.title='x'</script>"
        assert ask(window, prompt, longest=8) == completion(server, "logo", prompt, max_tokens=8)[0]
        assert set(EVIL) <= {name for name, *_ in window.run(BARS)}
        assert set(EVIL) < set(window.run("return [...document.querySelectorAll('#pool th')].map(n => n.textContent)"))
        ask(window, prompt, model=EVIL[0])
        assert [name for name, *_ in window.run(BARS)] == [EVIL[0]]
        assert window.run("return document.title") == "demo · LoGo"
        assert window.run("return document.querySelectorAll('img, main script').length") == 0
        assert window.messages() == []
