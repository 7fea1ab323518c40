"""Tests that run vLLM itself: `make test-vllm` gives them an environment of their own, and anywhere else they are left
out."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from vllm_server import KEY, Server, command, environment, free_port, started

_found = importlib.util.find_spec("vllm")
if _found is None or _found.origin is None:  # without an origin: a folder that happens to be called so
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """Starts servers, and waits until they answer. All of them end with the tests."""
    with ExitStack() as stack:

        def start(*flags: str, env: dict[str, str] | None = None) -> Server:
            port, log = free_port(), tmp_path_factory.mktemp("server") / "log"
            asked = command(*flags, "--port", str(port), "--host", "127.0.0.1", "--api-key", KEY)
            return stack.enter_context(started(asked, port, env or environment(), log))

        yield start
