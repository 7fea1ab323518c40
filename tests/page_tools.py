"""Helpers for tests of the page: opening it, asking, and reading what it shows."""

from __future__ import annotations

from typing import Any

from browser import Browser
from serving import Served

PROMPT = "Write the verb 'climb' in its past form."

SET = (
    "const control = document.getElementById(arguments[0]); control.value = arguments[1];"
    "control.dispatchEvent(new Event('input')); control.dispatchEvent(new Event('change'))"
)
TEXT = "return document.getElementById(arguments[0]).textContent"
IDLE = "return document.getElementById('stop').disabled"
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
    window.wait(IDLE)
    return str(window.run(TEXT, "answer"))


def completion(server: Served, model: str, prompt: str = PROMPT, **more: Any) -> tuple[str, Any]:
    """An answer of the API as the page shows it, and what it was mixed from."""
    body = {"model": model, "prompt": prompt, "max_tokens": 64, "temperature": 0, **more}
    reply = server.post("/v1/completions", body)
    return reply["choices"][0]["text"].lstrip(), reply.get("logo")
