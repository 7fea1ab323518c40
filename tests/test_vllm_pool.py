"""The pool in vLLM's processes, and the router's calls to workers, which are made up."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from logo.adapters.layout import BaseLayout
from logo.backends.vllm.core import Core, WorkerError
from logo.backends.vllm.options import POOL, VllmOptions
from logo.backends.vllm.pool import KeyedPool, check_alike, described
from logo.backends.vllm.workers import Workers
from logo.core import Selection
from logo.errors import AdapterError, PoolError, UsageError
from logo.models import demo_folder, load_config, skeleton
from make_adapters import edit_weights


class Client:
    """vLLM's client of an engine with some ranks, whose replies to each call are made up."""

    def __init__(self, processes: int = 1, **replies: Any) -> None:
        self.vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(_api_process_count=processes))
        self.replies, self.calls = replies, list[tuple[str, Any]]()

    async def collective_rpc(self, name: str, args: Any) -> list[dict[str, Any]]:
        self.calls.append((name, args))
        reply = self.replies.get(name, [{"value": None}])
        return next(reply) if isinstance(reply, Iterator) else reply


def test_what_any_rank_could_not_do_is_an_error() -> None:
    first, second = {"a": None, "b": None}, {"a": "out of memory", "b": None}
    ranks = [{"value": first}, {"value": first}, {"value": second}]
    workers = Workers(Client(logo_failures=ranks, logo_scores=ranks))

    async def taken() -> list[Any]:
        return await asyncio.gather(*map(workers.failures, first))

    assert asyncio.run(taken()) == ["out of memory", None]


@pytest.fixture(scope="module")
def core() -> Core:
    """The demo's pool, without vLLM."""
    options = VllmOptions.of(None, {POOL: str(demo_folder() / "adapters")})
    assert options is not None
    made: Any = object.__new__(Core)
    made.skeleton = skeleton(load_config("demo"))
    made.options, made._layout = options, BaseLayout.of(made.skeleton)
    made.pool, made.signals, made.broken = KeyedPool.open(options, made.skeleton), (), None
    found: Core = made
    return found


REMOVE = ("remove", "antonym", "")


def test_a_change_that_one_rank_cannot_prepare_is_dropped_by_all(core: Core) -> None:
    client = Client(logo_stage=[{"value": {}}, {"error": "no room for it"}])
    before = core.pool
    with pytest.raises(WorkerError, match="no room"):
        asyncio.run(Workers(client).change(core, REMOVE))
    assert [name for name, _ in client.calls] == ["logo_stage", "logo_abandon"]
    assert core.pool is before and core.broken is None


def test_after_a_commit_that_one_rank_has_failed_nothing_is_answered(core: Core) -> None:
    """Ranks with different pools would go on with mixtures that nobody has asked for."""
    staged = described(core.pool.changed(REMOVE, core._layout))
    client = Client(logo_stage=[{"value": staged}] * 2, logo_commit=[{"value": None}, {"error": "it broke"}])
    before = core.pool
    try:
        with pytest.raises(WorkerError, match="it broke"):
            asyncio.run(Workers(client).change(core, REMOVE))
        assert core.broken is not None and "start the server again (it broke)" in core.broken
        assert core.pool is before
    finally:
        core.broken = None


def test_with_several_processes_one_opens_the_pool_and_nobody_changes_it(core: Core) -> None:
    selector = {"names": ["antonym"], "default_k": 1, "evidence": None, "sizes": {}}
    scored = {"norm": {"points": ["5.self_attn.q_proj"], "selector": selector}}
    opened = [{"value": {**described(core.pool), "scored": scored}}]
    client = Client(2, logo_stage=iter([[{"value": {"wait": True}}], opened]))
    workers = Workers(client)
    asyncio.run(workers.change(core))
    assert [name for name, _ in client.calls] == ["logo_stage", "logo_stage"]  # and nothing was committed again
    with pytest.raises(UsageError, match="several processes answer HTTP: leave out --api-server-count"):
        asyncio.run(workers.change(core, REMOVE))
    assert len(client.calls) == 2


def copied(folder: Path, task: str, scale: float = 1.0) -> Path:
    shutil.copytree(demo_folder() / "adapters" / task, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": scale * config["lora_alpha"]}))
    return folder


def test_files_that_differ_are_another_pool(tmp_path: Path, core: Core) -> None:
    new = copied(tmp_path / "new", "capital", 0.9)
    there = core.pool.changed(("add", "new", str(new)), core._layout)
    check_alike([described(there)], there)
    shutil.rmtree(new)
    copied(new, "capital", 0.7)
    with pytest.raises(PoolError, match="another pool"):
        check_alike([described(there)], core.pool.changed(("add", "new", str(new)), core._layout))


def test_an_adapter_that_is_not_finite_cannot_be_added(tmp_path: Path, core: Core) -> None:
    damaged = copied(tmp_path / "new", "capital")
    edit_weights(damaged, lambda weights: next(iter(weights.values())).view(-1).__setitem__(5, math.nan))
    for change in (("add", "new", str(damaged)), ("replace", "capital", str(damaged))):
        with pytest.raises(AdapterError, match="holds NaN"):
            core.pool.changed(change, core._layout)


def test_where_adapters_act_is_part_of_a_pool(tmp_path: Path) -> None:
    model, layout = skeleton(load_config("demo")), BaseLayout.of(skeleton(load_config("demo")))
    pool = tmp_path / "pool"
    for task in ("antonym", "capital"):
        copied(pool / task, task)
    (pool / "pool.json").write_text(json.dumps({"activation": "last:4"}))
    options = VllmOptions.of(None, {POOL: str(pool)})
    forced = VllmOptions.of({"logo": {"activation": "last:2"}}, {POOL: str(pool)})
    assert options is not None and forced is not None
    own, other = KeyedPool.open(options, model), KeyedPool.open(forced, model)
    for there, said in ((own, "last:4"), (other, "last:2")):
        changed = there.changed(("add", "new", str(pool / "capital")), layout)
        for found in (there, changed):
            assert {str(adapter.activation) for adapter in found.adapters} == {said}
            recipe = found.recipe(Selection.forced({"antonym": 0.7, "capital": 0.3}))
            assert str(recipe).count(f"@{said}") == 2
