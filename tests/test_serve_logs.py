"""The log of a real server: a line per request, as text or JSON, that holds nothing of what was said."""

from __future__ import annotations

import io
import json
import logging
from contextlib import redirect_stderr
from typing import Any

import httpx
import pytest

from http_server import serving
from logo.serving import logs
from logo.serving.guards import GuardSettings, guard
from test_serving_guards import KEYS, make


def lines(run: Any, log_json: bool) -> list[str]:
    """What is written to stderr while `run(url)` talks to a server."""
    changed = [logging.getLogger(name) for name in ("logo", "uvicorn", "uvicorn.error", "uvicorn.access", "asyncio")]
    kept = [(logger, logger.handlers[:], logger.level) for logger in changed]
    written = io.StringIO()
    try:
        with redirect_stderr(written):
            logs.configure(log_json)
        with serving(guard(make(), GuardSettings(api_keys=KEYS))) as url:
            run(url)
    finally:
        for logger, handlers, number in kept:
            logger.handlers[:] = handlers
            logger.setLevel(number)
    return written.getvalue().splitlines()


def talk(url: str) -> None:
    headers = {"Authorization": f"Bearer {KEYS[0]}", "X-Request-Id": "r1", "Cookie": "biscuit"}
    httpx.post(f"{url}/v1/echo?query=hidden", json={"prompt": "private"}, headers=headers)
    httpx.get(f"{url}/v1/models", headers={"Authorization": "Bearer wrong-key"})
    httpx.get(f"{url}/v1/%0aFAKE%20LINE", headers=headers)
    httpx.get(f"{url}/health")


def test_each_request_is_a_line_of_json() -> None:
    written = lines(talk, log_json=True)
    entries = [json.loads(line) for line in written]
    assert [(e["method"], e["path"], e["status"]) for e in entries] == [
        ("POST", "/v1/echo", 200),
        ("GET", "/v1/models", 401),
        ("GET", "/v1/\\nFAKE LINE", 404),
    ]
    first = entries[0]
    assert first["model"] == "logo\\nFAKE LINE" and (first["prompt_tokens"], first["completion_tokens"]) == (3, 4)
    assert first["request_id"] == "r1" and first["level"] == "info" and first["ms"] >= 0
    assert first["time"].endswith("+00:00") and entries[1]["request_id"].startswith("req-")


def test_each_request_is_a_line_of_text() -> None:
    written = lines(talk, log_json=False)
    assert len(written) == 3
    assert " INFO r1 POST /v1/echo 200 " in written[0]
    assert written[0].endswith(' ms model="logo\\\\nFAKE LINE" prompt_tokens=3 completion_tokens=4')
    assert " GET /v1/\\nFAKE LINE 404 " in written[2]


@pytest.mark.parametrize("log_json", [True, False])
def test_no_line_holds_what_was_said_or_a_key(log_json: bool) -> None:
    written = "\n".join(lines(talk, log_json))
    for secret in (*KEYS, "wrong-key", "hidden", "query", "private", "biscuit", "Bearer"):
        assert secret not in written


def test_crashes_are_one_entry_with_their_traceback_and_request() -> None:
    headers = {"Authorization": f"Bearer {KEYS[0]}", "X-Request-Id": "r2"}
    written = lines(lambda url: httpx.get(f"{url}/v1/crash", headers=headers), log_json=True)
    entries = [json.loads(line) for line in written]
    assert sorted(e["level"] for e in entries) == ["error", "info"] and {e["request_id"] for e in entries} == {"r2"}
    [crash] = [e for e in entries if e["level"] == "error"]
    assert crash["message"] == "a request failed" and "RuntimeError: secret" in crash["exception"]
