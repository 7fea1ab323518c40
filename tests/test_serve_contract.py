"""The contract of servers (`server_contract.py`) on our own one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from local_server import LocalServer
from logo import LoGo
from server_contract import *  # noqa: F403
from server_contract import KEY, Server, write_changes, write_keys
from tolerances import PATIENCE
from warm import logo

pytestmark = pytest.mark.slow


@contextlib.contextmanager
def started(changes: Path, *options: str, key: str = "") -> Iterator[Server]:
    with LocalServer(options, {"LOGO_API_KEY": key}, start=PATIENCE, stop=PATIENCE, program=logo()) as running:

        def start(*options: str, key: str = "") -> contextlib.AbstractContextManager[Server]:
            return started(changes, *options, key=key)

        yield Server(running.url, "demo", "local", frozenset(), changes, lambda: running.said, start, key)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    (folder / "changes").mkdir()
    changes, keys = write_changes(folder / "changes"), write_keys(folder)
    options = ("--key-adapters", str(keys), "--allow-adapter-changes", str(changes), "--log", "json")
    with started(changes, "--base-model", "demo", *options, key=KEY) as running:
        yield running


@pytest.fixture(scope="module")
def library() -> LoGo:
    return LoGo.from_pretrained("demo")
