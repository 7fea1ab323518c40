"""`Worker` by itself: no engine is started, and of vLLM's managers there is what it asks for."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from logo.backends.vllm import core, hooks, worker
from logo.backends.vllm.core import WorkerError, WorkerFailure, values
from logo.backends.vllm.offline import VllmLoGo
from logo.backends.vllm.pool import KeyedPool
from logo.backends.vllm.recipe import Recipe
from logo.backends.vllm.worker import Worker
from logo.backends.vllm.wrapper import Tapped
from logo.errors import AdapterError, ModelError, UsageError
from logo.models import demo_folder
from logo.pools import default_pool
from logo.selection import Selection
from test_engine import write_adapter

KEYS = [f"{i:016x}" for i in range(4)]


@dataclass(frozen=True)
class Request:
    """vLLM's `LoRARequest`."""

    lora_int_id: int
    lora_path: str


@dataclass
class Gates:
    """What was written last: (recipes, slots), and the row of each token."""

    rows: Any = None
    tokens: Any = None

    def write(self, rows: Any, tokens: Any, sampled: Any) -> None:
        self.rows, self.tokens = rows, tokens


@dataclass
class Taps:
    def begin(self, spans: Sequence[Any]) -> None:
        """Nothing is probed."""

    def take(self, keys: Sequence[str], among: object = None) -> dict[str, Any]:
        return {}


@dataclass
class Manager:
    """Of adapters, in as many slots as there are keys."""

    modules: dict[str, Any] = field(default_factory=dict)
    packed_modules: dict[str, list[str]] = field(default_factory=dict)
    removed: list[int] = field(default_factory=list)

    def remove_adapter(self, number: int) -> None:
        self.removed.append(number)


@pytest.fixture
def made() -> Any:
    made: Any = object.__new__(Worker)
    made.mode, made._compiled = "gate", False
    made.taps, made.gates, made.spans = Taps(), Gates(), ()
    made._worker_manager = SimpleNamespace(_adapter_manager=Manager())
    made._by_key = {key: SimpleNamespace(modules=()) for key in KEYS}
    made._ids = {key: 1000 + i for i, key in enumerate(KEYS)}
    made._mixtures, made._failures = {}, {}
    made.make_resident = lambda: None
    return made


def recipe(*weights: float) -> str:
    return str(Recipe(tuple((key, weight) for key, weight in zip(KEYS, weights, strict=False) if weight)))


def gates(made: Any, ids: Sequence[int]) -> Any:
    """Rows of gates of tokens with these ids of vLLM's: (tokens, slots)."""
    mapping = SimpleNamespace(index_mapping=tuple(ids), prompt_mapping=tuple(ids))
    made.write_gates(mapping, [made._ids[key] for key in KEYS])
    return made.gates.rows[made.gates.tokens]


def test_recipes_in_use_are_not_forgotten(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_REMEMBERED", 4)
    own = Request(7, recipe(0.25, 0.75))
    for number in range(100, 150):  # far more than are remembered, beside one answer that goes on all the time
        other = Request(number, recipe(0.0, 0.0, number / 1000))
        made.begin_step({own, other})
        found = gates(made, [7, number, 0])
        expected = torch.tensor([[0.25, 0.75, 0, 0], [0, 0, number / 1000, 0], [0, 0, 0, 0]])
        assert torch.equal(found, expected)
        assert len(made._mixtures) <= 4
    many = [Request(number, recipe(number / 1000)) for number in range(200, 209)]  # more in one step
    made.begin_step(many)
    assert gates(made, range(200, 209))[:, 0].tolist() == pytest.approx([n / 1000 for n in range(200, 209)])
    assert not made._failures
    made.begin_step({own})
    assert gates(made, [7]).tolist() == [[0.25, 0.75, 0, 0]] and len(made._mixtures) <= 4


def test_an_id_may_mean_another_recipe_later(made: Any) -> None:
    for weight in (0.5, 0.25, 0.5):
        made.begin_step({Request(7, recipe(weight))})
        assert gates(made, [7])[0, 0] == weight
    assert not made._failures


def test_two_recipes_with_one_id_in_a_step_both_fail(made: Any) -> None:
    one, other, third = recipe(0.5), recipe(0.0, 0.5), recipe(0.0, 0.0, 0.5)
    made.begin_step([Request(7, one), Request(7, other), Request(8, third)])
    found = made.take([one, other, third])
    assert found[third] is None and gates(made, [8])[0, 2] == 0.5
    for text in (one, other):
        assert found[text] == "another mixture in this batch has the same id by chance; send the request again"
    made.begin_step([Request(7, one), Request(9, other)])  # under another id
    assert gates(made, [7, 9])[:, :2].tolist() == [[0.5, 0], [0, 0.5]]


def test_slices_are_multiplied_for_as_long_as_an_adapter_is_there(made: Any) -> None:
    parts = ["layer.q", "layer.k", "layer.v"]
    wrapper: Any = object.__new__(Tapped)
    layer = SimpleNamespace(n_slices=3, punica_wrapper=wrapper)
    manager = made._worker_manager._adapter_manager
    manager.modules, manager.packed_modules = {"layer.qkv": layer}, {"layer.qkv": parts}
    stays, leaves = SimpleNamespace(modules=("layer.q",)), SimpleNamespace(modules=("layer.q", "layer.v"))
    made._by_key = {KEYS[0]: stays, KEYS[1]: leaves}
    made.pool = SimpleNamespace(keys={"stays": KEYS[0], "leaves": KEYS[1]})
    made._note_used()
    assert wrapper.used == (True, False, True)
    made.begin_step({Request(7, recipe(0.0, 1.0))})
    # The pool is another one, but an answer with the adapter is still on its way.
    staged = SimpleNamespace(keys={"stays": KEYS[0]}, by_key={KEYS[0]: stays})
    made._staged = staged, SimpleNamespace(install=lambda: None)
    made.commit()
    assert wrapper.used == (True, False, True) and made.recipe(recipe(0.0, 1.0)).parts
    made.forget([KEYS[1], KEYS[0]])  # one that is part of the pool stays
    assert wrapper.used == (True, False, False)
    assert len(manager.removed) == 1
    assert list(made._by_key) == [KEYS[0]] and not made._mixtures
    assert not made.recipe(recipe(0.0, 1.0)).parts and "no adapter" in made._failures[recipe(0.0, 1.0)]


def test_a_new_adapter_that_cannot_be_loaded_leaves_the_pool_as_it_was(made: Any) -> None:
    before, new = dict(made._by_key), "f" * 16
    made.pool, made.scoring = SimpleNamespace(keys=dict(zip("abcd", KEYS, strict=True))), None
    added = {**before, new: SimpleNamespace(modules=())}
    made._staged = SimpleNamespace(keys=dict(zip("abcde", added, strict=True)), by_key=added), SimpleNamespace()

    def unreadable() -> None:
        if new in made._by_key:
            raise AdapterError("e", "it is damaged")

    made.make_resident = unreadable
    with pytest.raises(AdapterError):
        made.commit()
    made.abandon()
    made.begin_step({Request(7, recipe(0.5))})  # the other adapters still answer
    assert gates(made, [7])[0, 0] == 0.5
    assert made._by_key == before and set(made._ids) == set(before)
    assert len(made._worker_manager._adapter_manager.removed) == 1  # its slot is free again


@pytest.fixture(scope="module")
def demo() -> KeyedPool:
    """The demo's adapters, which have rank 8."""
    return KeyedPool.of(default_pool("demo"))


def test_a_mixture_that_no_slot_can_hold_is_refused(demo: KeyedPool) -> None:
    made: Any = object.__new__(core.Core)
    made.pool, made.mode, made._max_rank = demo, "merge", 32
    made._salts, made._live, made._answering, made._texts = Counter(), Counter(), Counter(), {}
    names = list(demo.keys)
    with made.request(Selection.forced(dict.fromkeys(names[:4], 0.25))) as request:
        assert len(Recipe.parse(request.lora_path).keys) == 4
    five = Selection.forced(dict.fromkeys(names[:5], 0.2))
    with pytest.raises(UsageError, match=r"the 5 adapters of this mixture have rank 40 together.*is 32.*-rank 64"):
        made.request(five).__enter__()
    made.mode = "gate"
    with made.request(five) as request:
        assert len(Recipe.parse(request.lora_path).keys) == 5


def test_a_mixture_that_no_slot_can_hold_does_not_reach_vllm(made: Any, demo: KeyedPool) -> None:
    made.mode, made.pool, made._by_key = "merge", demo, demo.by_key
    made._lora, made._dtype = SimpleNamespace(max_lora_rank=32), torch.float32
    fits, large = (demo.recipe(Selection.forced(dict.fromkeys(list(demo.keys)[:n], 0.2))) for n in (4, 5))
    assert made.merged(Request(7, str(fits))).rank == 32 and not made._failures
    assert made.merged(Request(8, str(large))).rank == 1
    assert made._failures == {str(large): "its rank is 40, and a slot has 32"}


def test_of_recipes_that_have_failed_the_last_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "_FAILED", 3)
    made: Any = object.__new__(core.Core)
    made._salts = Counter()
    for weight in (0.1, 0.2, 0.3, 0.4, 0.4):
        made.failed(recipe(weight))
    made.failed(f"{recipe(0.3)}#1")  # it fails under its next text, too
    assert made._salts == {recipe(0.2): 1, recipe(0.3): 2, recipe(0.4): 2}


@pytest.mark.parametrize("mode", ["gate", "auto"])
def test_the_scheduler_counts_the_adapters_that_fit(tmp_path: Path, mode: str) -> None:
    """As the workers do, whose gates need a slot for each of these."""
    for task in ("antonym", "capital"):
        shutil.copytree(demo_folder() / "adapters" / task, tmp_path / "pool" / task)
    write_adapter(tmp_path / "pool" / "of-another-model", nn.ModuleDict({"q_proj": nn.Linear(3, 3)}), ("q_proj",), 1, 0)
    own = {"pool": str(tmp_path / "pool"), "mode": mode, "on_bad_adapter": "skip"}
    lora = SimpleNamespace(max_loras=2, max_lora_rank=64)
    config = SimpleNamespace(
        additional_config={"logo": own},
        lora_config=lora,
        device_config=SimpleNamespace(device_type="cuda"),
        model_config=SimpleNamespace(model=str(demo_folder() / "model"), dtype=torch.float32, revision=None),
    )
    scheduler: Any = SimpleNamespace(lora_config=lora, scheduler_config=SimpleNamespace(max_num_seqs=8))
    hooks._schedule(lambda *_, **__: None, scheduler, config)
    assert (scheduler.lora_config.max_loras, lora.max_loras) == (8, 2)


def config(lora: dict[str, Any], **parallel: Any) -> Any:
    """vLLM's configuration, as far as LoGo refuses it."""
    sizes = {"pipeline_parallel_size": 1, "data_parallel_size": 1, **parallel}
    given = SimpleNamespace(**{"fully_sharded_loras": False, **lora})
    return SimpleNamespace(parallel_config=SimpleNamespace(**sizes), lora_config=given)


def test_what_would_be_wrong_is_refused() -> None:
    hooks._check(config({}))
    for refused, said in (
        (config({"enable_tower_connector_lora": True}), "--enable-tower-connector-lora"),
        (config({"fully_sharded_loras": True}), "--fully-sharded-loras"),
        (config({}, pipeline_parallel_size=2), "pipeline"),
    ):
        with pytest.raises(ModelError, match=said):
            hooks._check(refused)


def test_a_mixture_that_any_rank_could_not_make_is_an_error() -> None:
    made: Any = object.__new__(VllmLoGo)
    made._call = lambda name, keys: [dict.fromkeys(keys), {**dict.fromkeys(keys), recipe(0.5): "out of memory"}]
    made._check_mixed([recipe(0.25)])
    with pytest.raises(ModelError, match="the mixture could not be made: out of memory"):
        made._check_mixed([recipe(0.25), recipe(0.5)])


def test_no_error_of_a_call_reaches_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would leave the replies of other ranks in their queues, where later calls would find them."""
    logged: list[Any] = []
    monkeypatch.setattr(hooks.log, "error", lambda *_, exc_info: logged.append(exc_info))
    raised: dict[str, Exception] = {
        "no such adapter": UsageError("no such adapter"),
        "OutOfMemoryError: no room for 2 GB": torch.OutOfMemoryError("no room\n for 2 GB"),
        "KeyError: 'a'": KeyError("a"),
    }

    def call(worker: Any, error: Exception | None) -> str:
        if error is not None:
            raise error
        return "done"

    answer = hooks._answering(call)
    assert answer(None, None) == {"value": "done"}
    for said, error in raised.items():
        unexpected = {} if isinstance(error, UsageError) else {"unexpected": True}
        assert answer(None, error) == {"error": said, **unexpected}
        with pytest.raises(WorkerFailure if unexpected else WorkerError, match=said):
            values([{"value": 1}, answer(None, error)])
    assert logged == [error for error in list(raised.values())[1:] for _ in range(2)]


def test_speculation_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(hooks.log, "warning", said.append)
    plain = config({})
    plain.speculative_config = None
    hooks._check(plain)
    assert not said
    plain.speculative_config = SimpleNamespace(num_speculative_tokens=3)
    hooks._check(plain)
    assert len(said) == 1 and "speculative decoding" in said[0]


def test_vllms_metrics_have_no_series_per_recipe() -> None:
    counted = []
    for name in ("logo://0123456789abcdef:1", "an-adapter", None):
        hooks._count(lambda self, request, name, *more: counted.append((name, more)), object(), "r", name, True)
    assert counted == [(None, (True,)), ("an-adapter", (True,)), (None, (True,))]
