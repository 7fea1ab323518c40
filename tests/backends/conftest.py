"""Tests that run vLLM itself: `make test-vllm` gives them an environment of their own, and anywhere else they are left
out."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest
from vllm_server import ASSETS, KEY, Server, command, environment, free_port, started

if TYPE_CHECKING:  # the process that starts the others reads this file, too, and needs no PyTorch
    from logo import LoGo

_found = importlib.util.find_spec("vllm")
if _found is None or _found.origin is None:  # without an origin: a folder that happens to be called so
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """Starts servers, and waits until they answer. All of them end with their file's tests."""
    with ExitStack() as stack:

        def start(*flags: str, env: dict[str, str] | None = None) -> Server:
            port, log = free_port(), tmp_path_factory.mktemp("server") / "log"
            asked = command(*flags, "--port", str(port), "--host", "127.0.0.1", "--api-key", KEY)
            return stack.enter_context(started(asked, port, env or environment(), log))

        yield start


@pytest.fixture(scope="module")
def settings_of_vllm() -> Iterator[None]:
    """Sets vLLM's environment for engines in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        yield


@pytest.fixture(scope="module")
def logo() -> LoGo:
    """The library on the demo model and its pool, as the oracle."""
    from logo import LoGo

    return LoGo.from_pretrained("demo", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def rows() -> list[str]:
    """Held-out prompts: eight of each task."""
    files = sorted((ASSETS / "heldout").glob("*.jsonl"))
    return [json.loads(line)["context"] for file in files for line in file.read_text().splitlines()[:8]]
