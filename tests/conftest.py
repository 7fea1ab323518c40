"""Shared by all tests."""

from __future__ import annotations

import atexit
import importlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

import warm
from order import longest_first

if TYPE_CHECKING:
    from torch import nn

# Tiny models gain nothing from threads and lose much to them on a busy machine; subprocesses inherit this.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Without bytecode every process that tests start compiles the package anew: a second or more.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# How long an example of a property takes says nothing on a machine that does other work too.
few = settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("any machine", few)
settings.load_profile("any machine")
if "PYTEST_XDIST_WORKER" not in os.environ:  # in the process of pytest that starts the others
    os.environ["LOGO_CACHE"] = tempfile.mkdtemp(prefix="logo-cache-")  # what tests calibrate stays among them
    atexit.register(shutil.rmtree, os.environ["LOGO_CACHE"], ignore_errors=True)
    warm.start()


@pytest.hookimpl(trylast=True)  # pytest-randomly has shuffled them
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    longest_first(items)


@pytest.fixture
def plugins_forgotten(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Forgets the plugins that a test has registered, and the modules that it has imported from folders of its own."""
    from logo import plugins

    kept = [(one, dict(one), dict(one.definitions), dict(one._places)) for one in plugins._REGISTRIES]
    loaded = dict(plugins._LOADED)
    modules, path, temporary = set(sys.modules), list(sys.path), str(tmp_path_factory.getbasetemp())
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(plugins.VARIABLE, raising=False)
        yield
    for registry, *before in kept:
        for held, entries in zip((registry, registry.definitions, registry._places), before, strict=True):
            held.clear()
            held.update(entries)
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(temporary):
            del sys.modules[name]
    sys.path[:] = path
    plugins._LOADED.clear()
    plugins._LOADED.update(loaded)
    importlib.invalidate_caches()


@pytest.fixture(scope="session")
def llama() -> nn.Module:
    import tiny

    return tiny.model("llama")


@pytest.fixture(scope="session")
def adapters(llama: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six adapters: different ranks and targets, one of which lacks the query projection's last layer."""
    from test_engine import write_adapter

    root = tmp_path_factory.mktemp("adapters")
    for i, names in enumerate(
        [("q_proj", "v_proj"), ("q_proj",), ("q_proj", "down_proj"), ("q_proj", "o_proj"), ("q_proj", "v_proj")]
    ):
        write_adapter(root / "tasks" / f"t{i}", llama, names, rank=i + 1, seed=i)
    return root
