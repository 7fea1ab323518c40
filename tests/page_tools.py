"""Helpers for tests of the page: opening it, asking, and reading what it shows."""

from __future__ import annotations

from typing import Any

from browser import Browser
from serving import Served

PROMPT = "Write the verb 'climb' in its past form."

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
    window.wait(IDLE)
    base, right = window.run("return [...document.querySelectorAll('.answer .text')].map(node => node.textContent)")
    return base, right


def errors(window: Browser) -> list[str]:
    """What the two answers and the scores that are shown say went wrong."""
    shown = "[...document.querySelectorAll('.error')].filter(node => node.checkVisibility())"
    found: list[str] = window.run(f"return {shown}.map(node => node.textContent)")
    return [text for text in found if text]


def completion(server: Served, model: str, prompt: str = PROMPT, **more: Any) -> tuple[str, Any]:
    """An answer of the API as the page shows it, and what it was mixed from."""
    body = {"model": model, "prompt": prompt, "max_tokens": 64, "temperature": 0, **more}
    reply = server.post("/v1/completions", body)
    return reply["choices"][0]["text"].lstrip(), reply.get("logo")
