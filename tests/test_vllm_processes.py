"""Several processes in front of one engine: whose turn it is, who has taken note, and what may be forgotten."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from logo.adapters.layout import BaseLayout
from logo.backends.vllm.options import OPTIONS, POOL, Options
from logo.backends.vllm.pool import KeyedPool, check_alike, described
from logo.backends.vllm.probing import InWorkers
from logo.backends.vllm.processes import Processes
from logo.backends.vllm.workers import Workers
from logo.errors import AdapterError, ModelError, PoolError, UsageError
from logo.models import demo_folder, load_skeleton
from logo.selection import Selection
from make_adapters import edit_weights


def test_one_process_changes_the_pool_at_a_time() -> None:
    found = Processes()
    assert found.begin("a") and found.begin("a")  # one that begins anew
    assert not found.begin("b")
    assert not found.end("b") and not found.begin("b")  # nobody ends what another has begun
    assert found.end("a") and not found.end("a")
    assert found.begin("b") and not found.begin("a")


def test_who_selects_from_another_pool_is_counted() -> None:
    found = Processes()
    assert found.behind("new") == 0
    for process in ("a", "b", "c"):
        found.note(process, "old")
    found.note("a", "new")
    assert found.behind("new") == 2
    found.note("b", "new")
    found.note("c", "new")
    assert found.behind("new") == 0


def test_an_adapter_is_forgotten_when_every_process_has_released_it() -> None:
    found = Processes()
    found.note("a", "old")
    found.note("b", "old")
    found.changed(["one", "two", "three"], ["one"])
    assert found.held("a") == found.held("b") == ["three", "two"]
    assert found.release("a", ["two", "three", "unknown"]) == []
    assert found.held("a") == [] and found.held("b") == ["three", "two"]
    assert found.release("a", ["two"]) == []  # twice is once
    assert found.release("b", ["two"]) == ["two"]
    found.note("late", "new")  # a process that never had it does not hold it
    assert found.held("late") == []
    found.changed(["one"], ["one", "three"])  # it has come back
    assert found.held("b") == [] and found.release("b", ["three"]) == []
    found.changed(["one", "three"], ["one"])
    assert found.held("late") == ["three"]  # a change that it has not followed yet may still give it


class Ranks:
    """vLLM's client of an engine with several ranks, each of which has these outcomes."""

    def __init__(self, *outcomes: dict[str, Any]) -> None:
        self.vllm_config = SimpleNamespace(parallel_config=SimpleNamespace())
        self.outcomes = outcomes

    async def collective_rpc(self, name: str, args: Any) -> list[dict[str, Any]]:
        return [{"value": {key: outcomes[key] for key in args[0]}} for outcomes in self.outcomes]


def test_what_any_rank_could_not_do_is_an_error() -> None:
    recipe, other, scores = "logo://a:1", "logo://b:1", ["digest", [1.0, 2.0]]
    first = {recipe: None, other: None, "probe": scores, "again": scores}
    second = {recipe: "out of memory", other: None, "probe": "the prompt was not run", "again": scores}
    workers = Workers(Ranks(first, first, second))

    async def taken() -> list[Any]:
        return await asyncio.gather(*map(workers.take, first))

    assert asyncio.run(taken()) == ["out of memory", None, "the prompt was not run", scores]
    probing: Any = object.__new__(InWorkers)
    probing._run, probing._call = (lambda rows, whole: ["probe", "again"]), lambda name, keys, among: [first, second]
    with pytest.raises(ModelError, match="the prompt was not run"):
        probing._probed([([1], "norm", None), ([2], "norm", None)], whole=True)


def copied(folder: Path, task: str, scale: float = 1.0) -> Path:
    shutil.copytree(demo_folder() / "adapters" / task, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": scale * config["lora_alpha"]}))
    return folder


def test_a_process_takes_over_what_another_has_changed(tmp_path: Path) -> None:
    model = load_skeleton("demo")
    layout = BaseLayout.of(model)
    options = Options.of(None, {POOL: str(demo_folder() / "adapters")})
    assert options is not None
    here = there = KeyedPool.open(options, model)
    first, *_ = there.keys
    there = there.changed(("add", "new", str(copied(tmp_path / "new", "capital", 0.9))), layout)
    there = there.changed(("replace", "antonym", str(copied(tmp_path / "antonym", "antonym", 0.8))), layout)
    there = there.changed(("remove", first, ""), layout)
    followed = here.following(json.loads(json.dumps(there.places)), layout)
    assert (followed.digest, followed.keys) == (there.digest, there.keys)
    check_alike([described(there, "gate", "")], followed)
    kept = next(name for name in followed.keys if name not in ("new", "antonym"))
    assert followed.adapters[kept] is here.adapters[kept]  # and not opened again
    assert here.keys.keys() >= {first, "antonym"} and "new" not in here.keys
    # Files that have changed since are another pool, and files that have gone are none.
    copied_again = tmp_path / "new"
    shutil.rmtree(copied_again)
    copied(copied_again, "capital", 0.7)
    with pytest.raises(PoolError, match="another pool"):
        check_alike([described(there, "gate", "")], here.following(there.places, layout))
    shutil.rmtree(copied_again)
    with pytest.raises(AdapterError):
        here.following(there.places, layout)


def test_an_adapter_that_is_not_finite_cannot_be_added(tmp_path: Path) -> None:
    model = load_skeleton("demo")
    options = Options.of(None, {POOL: str(demo_folder() / "adapters")})
    assert options is not None
    pool, damaged = KeyedPool.open(options, model), copied(tmp_path / "new", "capital")
    edit_weights(damaged, lambda weights: next(iter(weights.values())).view(-1).__setitem__(5, math.nan))
    for change in (("add", "new", str(damaged)), ("replace", "capital", str(damaged))):
        with pytest.raises(AdapterError, match="holds NaN"):
            pool.changed(change, BaseLayout.of(model))


def test_where_adapters_act_is_part_of_a_pool(tmp_path: Path) -> None:
    model, layout = load_skeleton("demo"), BaseLayout.of(load_skeleton("demo"))
    pool = tmp_path / "pool"
    for task in ("antonym", "capital"):
        copied(pool / task, task)
    (pool / "pool.json").write_text(json.dumps({"activation": "last:4"}))
    options = Options.of(None, {POOL: str(pool)})
    forced = Options.of({"logo": {"activation": "last:2"}}, {POOL: str(pool)})
    assert options is not None and forced is not None
    own, other = KeyedPool.open(options, model), KeyedPool.open(forced, model)
    for there, said in ((own, "last:4"), (other, "last:2")):
        changed = there.changed(("add", "new", str(pool / "capital")), layout)
        followed = there.following({**changed.places}, layout)
        for found in (there, changed, followed):
            assert {str(adapter.activation) for adapter in found.adapters} == {said}
            recipe = found.recipe(Selection.forced({"antonym": 0.7, "capital": 0.3}))
            assert str(recipe).count(f"@{said}") == 2
            assert found.recipe(Selection.forced({"antonym": 1.0}), "everywhere").activations == {}


@pytest.mark.parametrize(
    "given", [{"adapter_changes": "yes"}, {"max_body_mb": 0}, {"max_body_mb": "3"}, {"max_body_mb": True}], ids=str
)
def test_options_that_are_none(given: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=next(iter(given))):
        Options.of(None, {POOL: "pool", OPTIONS: json.dumps(given)})
