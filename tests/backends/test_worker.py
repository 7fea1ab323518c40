"""`Worker` by itself: no engine is started, and of vLLM's managers there is what it asks for."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from logo.adapters.pool import AdapterPool, open_pool
from logo.backends.vllm import core, hooks, worker
from logo.backends.vllm import router as router_module
from logo.backends.vllm.core import WorkerError, WorkerFailure, values
from logo.backends.vllm.likelihood import scored
from logo.backends.vllm.offline import VllmLoGo, _check_finite
from logo.backends.vllm.pool import KeyedPool
from logo.backends.vllm.recipe import Recipe
from logo.backends.vllm.requests import Running
from logo.backends.vllm.worker import Worker
from logo.backends.vllm.wrapper import Tapped
from logo.core import Prompt, Selection
from logo.errors import AdapterError, ModelError, NotFinite, UsageError
from logo.selection.settings import SelectionSettings
from logo.serve.names import MixtureRequest

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
    def begin(self, spans: Sequence[Any], running: Any) -> None:
        """Nothing is probed."""


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
    made._compiled, made._staged, made.opener = False, None, None
    made.taps, made.gates, made.spans, made.running, made.answers = Taps(), Gates(), (), (), ()
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
    made.answers = [(one, "a"), (other, "b"), (third, "c")]
    made.begin_step([Request(7, one), Request(7, other), Request(8, third)])
    assert gates(made, [8])[0, 2] == 0.5
    said = "another mixture in this batch has the same id by chance; send the request again"
    assert made.failures(["a", "b", "c"]) == {"a": said, "b": said, "c": None}
    assert made.failures(["a"]) == {"a": None}  # who asks for the same later is not told of it
    made.begin_step([Request(7, one), Request(9, other)])  # under another id
    assert gates(made, [7, 9])[:, :2].tolist() == [[0.5, 0], [0, 0.5]] and not made._failures


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
    assert wrapper.used == (True, False, True)
    made.forget([KEYS[1], KEYS[0]])  # one that is part of the pool stays
    assert wrapper.used == (True, False, False)
    assert len(manager.removed) == 1
    assert list(made._by_key) == [KEYS[0]]
    made.answers = [(recipe(0.0, 1.0), "late")]
    made.begin_step({Request(7, recipe(0.0, 1.0))})
    assert made.failures(["late"]) == {"late": "this worker lacks one of its adapters"}


def test_a_new_adapter_is_loaded_before_anything_changes(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a rank that cannot read it fails while all of them can still go back."""
    before, new = dict(made._by_key), "f" * 16
    keys = dict(zip("abcd", KEYS, strict=True))
    made.pool, made.scoring, made._layout, made._places = SimpleNamespace(keys=keys), None, None, frozenset()
    added = SimpleNamespace(
        keys={**keys, "e": new}, by_key={**before, new: SimpleNamespace(modules=())}, adapters=[], digest="d"
    )
    made.pool.changed = lambda change, layout: added
    made._lora, made._read_at, made._device = SimpleNamespace(max_loras=5), lambda pool: frozenset(), None
    made.skeleton = made.options = made._prompts = None
    monkeypatch.setattr(worker, "check_slots", lambda *_: None)
    monkeypatch.setattr(worker, "Scoring", lambda *_, **__: SimpleNamespace(install=lambda: None))
    manager = made._worker_manager._adapter_manager

    def unreadable() -> None:
        if new in made._by_key:
            raise AdapterError("e", "it is damaged")

    made.make_resident = unreadable
    with pytest.raises(AdapterError):
        made.stage(("add", "e", "folder"))
    assert made._staged is None and made._by_key == before and set(made._ids) == set(before)
    assert len(manager.removed) == 1  # its slot is free again
    made.begin_step({Request(7, recipe(0.5))})  # the other adapters still answer
    assert gates(made, [7])[0, 0] == 0.5
    # One that is dropped, since another rank has failed, leaves its slot, too.
    made.make_resident = lambda: None
    made.stage(("add", "e", "folder"))
    assert new in made._by_key and made.pool is not added
    made.abandon()
    assert made._by_key == before and len(manager.removed) == 2
    made.stage(("add", "e", "folder"))
    made.commit()
    assert made.pool is added and new in made._by_key and made._staged is None
    with pytest.raises(ModelError, match="no change"):
        made.commit()


@pytest.fixture(scope="module")
def demo() -> KeyedPool:
    return KeyedPool.of(open_pool(None, "demo"))


def test_what_was_scored_answers_though_the_pool_changes_meanwhile(
    demo: KeyedPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two prompts, the second is probed while an adapter is replaced; the first keeps what its scores belong to."""
    made: Any = object.__new__(core.Core)
    made.pool, made._live, made._answering, made._texts = demo, Counter(), Counter(), {}
    made.options, made.window = SimpleNamespace(settings=SelectionSettings(signal="norm")), lambda signal: "whole"
    made.select = lambda call, scores: Selection.forced({"antonym": 1.0})
    replaced = replace(demo, keys={**demo.keys, "antonym": "f" * 16})
    seconds = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if b"second" in (await receive())["body"]:
            await asyncio.sleep(0)
            made.pool = replaced
        await router_module.answer(send, 200, b"{}")

    async def scores(key: str) -> Any:
        return [made.pool.digest, [1.0]]

    monkeypatch.setattr(router_module, "Counts", lambda: SimpleNamespace(selected=lambda *_: None))
    router: Any = router_module.Router(app)
    router._core, router._workers = made, SimpleNamespace(scores=scores)
    router._models = SimpleNamespace(base_model_paths=[SimpleNamespace(name="base")])

    async def chosen(prompt: str, held: ExitStack) -> Any:
        scope = {"type": "http", "headers": []}
        return await router._chosen("/v1/completions", {"prompt": prompt}, MixtureRequest(), scope, seconds.wait, held)

    async def both(held: ExitStack) -> Any:
        return [await chosen("first", held), await chosen("second", held)]

    with ExitStack() as held:
        first, second = asyncio.run(both(held))
        assert Recipe.parse(first.request.lora_path).keys == (demo.keys["antonym"],)
        assert Recipe.parse(second.request.lora_path).keys == ("f" * 16,)
        assert made.answering([demo.keys["antonym"]])  # so that no worker forgets it
    assert not made.answering([demo.keys["antonym"]]) and not made._live


def test_the_scheduler_allows_any_number_of_mixtures() -> None:
    lora = SimpleNamespace(max_loras=2, max_lora_rank=64)
    config = SimpleNamespace(additional_config={"logo": {"pool": "pool"}}, lora_config=lora)
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
    made._ask = lambda name, keys: [dict.fromkeys(keys), {**dict.fromkeys(keys), "bad": "out of memory"}]
    made._check_mixed("good", [object()])
    made._check_mixed("bad", [None])  # of the base model alone
    with pytest.raises(ModelError, match="the mixture could not be made: out of memory"):
        made._check_mixed("bad", [None, object()])
    made._probe, made.core = (lambda *_: ["bad"]), SimpleNamespace(probe_text=None)
    with pytest.raises(ModelError, match="the prompt could not be scored: out of memory"):
        made._scores(
            AdapterPool(),
            SimpleNamespace(name="norm", signal=SelectionSettings().reading()),
            [Prompt.of_ids([1])],
            [None],
            8,
        )


def test_what_the_offline_engine_computes_is_finite_or_an_error() -> None:
    _check_finite(Running("key"), Selection.forced({"x": 1.0}))
    for mixture, said in (({"x": 1.0}, "with the adapters 'x'"), ({}, "with no adapter")):
        with pytest.raises(NotFinite, match=said):
            _check_finite(Running("key", finite=False), Selection.forced(mixture))
    nothing = SimpleNamespace(logprob=float("nan"), rank=1)
    output = SimpleNamespace(outputs=[SimpleNamespace(logprobs=[{7: nothing}], token_ids=[7])])
    with pytest.raises(ModelError, match="the likelihood of the completion is nan"):
        scored(output, [7])


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


def test_answers_whose_logits_are_nan_become_errors() -> None:
    """vLLM itself would go on with any token. Where several answers are drawn, all of them end."""
    put: dict[str, list[Any]] = {name: [] for name in ("one", "child", "sound")}

    def state(name: str, parent: str | None = None) -> Any:
        queue = SimpleNamespace(put=put[name].append)
        above = None if parent is None else SimpleNamespace(request_id=parent)
        return SimpleNamespace(request_id=name, parent_req=above, queue=queue)

    aborted: list[Any] = []
    states = {"one": state("one"), "child": state("child", "parent"), "sound": state("sound")}

    def abort(ids: Any, internal: bool) -> list[str]:
        aborted.append((sorted(ids), internal))
        return ["one", "child"]

    processor: Any = SimpleNamespace(request_states=states, abort_requests=abort)
    outputs = [
        SimpleNamespace(request_id=name, num_nans_in_logits=count)
        for name, count in (("one", 512), ("child", 1), ("sound", 0), ("gone", 3))
    ]
    made = hooks._notice(lambda *_: SimpleNamespace(reqs_to_abort=[]), processor, outputs)
    assert [len(put[name]) for name in put] == [1, 1, 0] and "NaN" in str(put["one"][0])
    assert aborted == [(["one", "parent"], True)] and made.reqs_to_abort == ["one", "child"]
