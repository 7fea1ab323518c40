"""The page in trouble: wrong keys, hostile names, large pools, stops, full servers and lost connections."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator

import pytest

from browser import Browser, browser, needs_browser
from http_server import eventually
from logo.demo import adapters_dir, model_dir
from page_tools import ASK, BARS, IDLE, PROMPT, ROWS, SET, USE, ask, completion, enter, errors, give_key
from relay import relay
from serving import Served, served

pytestmark = [needs_browser, pytest.mark.slow]

KEY = "right-key"
EVIL = ("<img src=x onerror=document.title=1>", "a\"b'c&lt;", "\u202eTxeT\u202c")
COPIES = 3  # of each adapter in the strange pool: more than one screen, so that there is a picture of the scores
LONG = 300
RUNNING = r"^logo:num_requests_running\S* (\S+)$"


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


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
    engine = ("--signal", "norm", "--n-selected-modules", "10")
    with served("--base-model", str(base), "--adapters", str(root / "pool"), *limits, *engine, key=KEY) as server:
        yield server


@pytest.fixture(autouse=True)
def without_a_key(window: Browser, strange: Served) -> None:
    """All tests share one window, and none may find the key that another gave."""
    window.visit(f"{strange.url}/")
    window.run("sessionStorage.clear()")
    window.messages()


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


def test_stop_ends_it_here_and_on_the_server(window: Browser, strange: Served) -> None:
    enter(window, strange)
    for by in ("document.getElementById('stop').click()", "press('Escape')"):
        window.run(
            "const press = (key) => document.body.dispatchEvent(new KeyboardEvent('keydown', { key, bubbles: true }));"
            "const shown = document.querySelector('#logo .text');"  # an answer may begin with a space
            f"const stop = () => {{ observer.disconnect(); {by}; }};"
            "const observer = new MutationObserver(() => { if (shown.textContent.trim()) stop(); });"
            "observer.observe(shown, { characterData: true, subtree: true })"
        )
        _, text = ask(window, PROMPT, max_tokens=LONG)
        assert text and window.run("return document.querySelector('#logo .end').textContent") == "Stopped."
        assert window.run("return document.getElementById('said').textContent") == "Stopped."
        eventually(lambda: re.findall(RUNNING, strange.text("/metrics"), re.M) == ["0.0"])
        assert len(text) < len(completion(strange, "logo", max_tokens=LONG)[0])  # which needs the place of the other
    assert errors(window) == []


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


def test_a_lost_connection_is_told_and_comes_back(window: Browser, strange: Served) -> None:
    lost = "The connection to the server was lost. Is it still running?"
    with relay(strange.url) as door:
        behind = Served(door.url, KEY)
        enter(window, behind)
        ask(window, PROMPT, max_tokens=1)
        while errors(window):  # until those of earlier tests are gone
            ask(window, PROMPT)
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
