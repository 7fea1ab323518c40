"""The parts of the vLLM backend that are PyTorch alone: gated products over slots, taps, recipes, options."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from logo.adapters.pool import open_pool
from logo.backends.vllm import ops
from logo.backends.vllm.gates import StepGates, add_gated, turned
from logo.backends.vllm.options import OPTIONS, POOL, VllmOptions
from logo.backends.vllm.pool import KeyedPool
from logo.backends.vllm.recipe import Recipe, is_recipe
from logo.backends.vllm.slots import Slots, check_slots
from logo.backends.vllm.taps import Taps
from logo.core import Selection
from logo.errors import UsageError

CPU = torch.device("cpu")
KEYS = st.text("0123456789abcdef", min_size=16, max_size=16)


# -- products ---------------------------------------------------------------------------------------------------------


def factors(slots: int, rank: int, inside: int, outside: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A as vLLM keeps it, B as `turned` lays it out; the same values both ways."""
    torch.manual_seed(seed)
    a, b = torch.randn(slots, 1, rank, inside), torch.randn(slots, 1, outside, rank)
    kept = turned(b)
    kept.copy_(b)
    assert kept.shape == b.shape and kept[:, 0].transpose(1, 2).is_contiguous()
    return a[:, 0], kept[:, 0].transpose(1, 2)


@given(
    tokens=st.integers(1, 12),
    slots=st.integers(1, 5),
    rank=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_every_token_gets_its_own_mixture(tokens: int, slots: int, rank: int, seed: int) -> None:
    a, b = factors(slots, rank, 6, 7, seed)
    x, y = torch.randn(tokens, 6), torch.randn(tokens, 7)
    mixtures = torch.cat([torch.zeros(1, slots), torch.rand(3, slots)])
    which = torch.randint(0, 4, (tokens,))
    gates = StepGates(16, 16, slots, CPU, torch.float32)
    gates.write(mixtures, which, which[:1])
    expected = y.clone()
    for t in range(tokens):
        for s in range(slots):
            expected[t] += mixtures[which[t], s] * (b[s].T @ (a[s] @ x[t]))
    found = y.clone()
    add_gated(found, x, a, b, gates.tokens[:tokens])
    assert torch.allclose(found, expected, atol=1e-4)
    base = which == 0
    assert torch.equal(found[base], y[base])  # to the bit
    assert gates.open == bool((which != 0).any())


@given(slots=st.integers(1, 24), opened=st.integers(0, 6), seed=st.integers(0, 99))
def test_few_open_slots_are_multiplied_alone(slots: int, opened: int, seed: int) -> None:
    a, b = factors(slots, 2, 6, 7, seed)
    x, y = torch.randn(5, 6), torch.randn(5, 7)
    chosen = torch.randperm(slots)[:opened]
    mixtures = torch.zeros(3, slots)
    mixtures[1:, chosen] = torch.rand(2, len(chosen)) + 0.1
    unused = torch.full((1, slots), 9.0)  # a mixture that no token of this step has
    gates = StepGates(8, 8, slots, CPU, torch.float32)
    gates.write(torch.cat([mixtures, unused]), torch.tensor([1, 0, 2, 1, 2]), torch.tensor([1]))
    assert gates.open == bool(len(chosen))
    few = 0 < len(chosen) * 4 <= slots
    assert (gates.slots is not None) == few
    if gates.slots is not None:
        assert gates.slots.tolist() == chosen.sort().values.tolist()
    alone, among_all = y.clone(), y.clone()
    add_gated(alone, x, a, b, gates.tokens[:5], gates.slots)
    add_gated(among_all, x, a, b, gates.tokens[:5])
    assert torch.allclose(alone, among_all, atol=1e-5)


def test_what_a_longer_step_left_behind_is_gone() -> None:
    gates = StepGates(8, 8, 2, CPU, torch.float32)
    place = gates.tokens.data_ptr()
    mixtures = torch.tensor([[0.0, 0.0], [0.5, 0.5]])
    gates.write(mixtures, torch.ones(8, dtype=torch.int64), torch.ones(4, dtype=torch.int64))
    gates.write(mixtures, torch.tensor([1, 0, 1]), torch.tensor([1]))
    assert gates.tokens.data_ptr() == place
    assert gates.tokens.tolist() == [[0.5, 0.5], [0.0, 0.0], [0.5, 0.5]] + [[0.0, 0.0]] * 5
    assert gates.rows is not None and gates.rows.tolist() == [0, 2]


def test_an_adapter_that_overflows_spoils_no_other_row() -> None:
    a, b = factors(2, 2, 4, 4)
    a[1] = torch.inf
    y = torch.zeros(2, 4)
    add_gated(y, torch.ones(2, 4), a, b, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert y[0].isfinite().all() and not y[1].isfinite().all()


# -- taps -------------------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """What a layer of vLLM does, with buffers that a graph may capture."""

    def __init__(self, gates: StepGates, number: int) -> None:
        super().__init__()
        a, b = factors(3, 2, 8, 8)
        self.linear = nn.Linear(8, 8)
        self.gates, self.number = gates, number
        self.register_buffer("a", a)
        self.register_buffer("b", b)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        ops.tap(x, self.seen, self.number, "layer")
        y = self.linear(x)
        add_gated(y, x, self.a, self.b, self.gates.tokens[: x.shape[0]])
        return y


class Listening(Taps):
    """Notes what enters."""

    def __init__(self) -> None:
        super().__init__(lambda point, read: point.module, CPU)
        self.heard: list[Tensor] = []

    def active(self, place: str) -> bool:
        return place == "layer"

    def tap(self, place: str, entering: Tensor, gather: Any = None) -> None:
        self.heard.append(entering.clone())


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@torch.no_grad()
def test_a_compiled_layer_follows_its_buffers_and_keeps_its_tap(backend: str) -> None:
    torch._dynamo.reset()
    gates, taps = StepGates(16, 16, 3, CPU, torch.float32), Listening()
    layer = Layer(gates, ops.registered(taps, None)).eval()
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    mixtures = torch.tensor([[0.0, 0.0, 0.0], [0.2, 0.8, 0.0], [0.0, 0.5, 0.5]])
    for which in ([1, 2, 0, 1], [0, 0, 0, 0], [2, 2, 1, 0]):
        gates.write(mixtures, torch.tensor(which), torch.tensor(which))
        x = torch.randn(4, 8)
        expected = layer(x)
        taps.heard.clear()
        found = compiled(x)
        assert torch.allclose(found, expected, atol=1e-5)
        assert len(taps.heard) == 1 and torch.equal(taps.heard[0], x)


# -- recipes and options ----------------------------------------------------------------------------------------------


@given(st.dictionaries(KEYS, st.floats(-1e3, 1e3, width=32), min_size=1, max_size=20))
def test_a_recipe_is_read_as_it_was_written(mixture: dict[str, float]) -> None:
    recipe = Recipe.of(mixture.items())
    assert Recipe.parse(str(recipe)) == recipe and is_recipe(str(recipe))
    assert {key: torch.tensor(weight).item() for key, weight in recipe.parts} == mixture  # every float32 survives
    assert str(Recipe.of(reversed(mixture.items()))) == str(recipe)
    assert 1 <= recipe.number() < 2**31
    taken = {recipe.number(): "another"}
    assert recipe.number(taken) != recipe.number() and recipe.number({recipe.number(): str(recipe)}) == recipe.number()
    # Adapters with equal content are one.
    (key, weight), *_ = mixture.items()
    assert dict(Recipe.of([*mixture.items(), (key, 1.0)]).parts)[key] == pytest.approx(weight + 1, abs=1e-6)


@pytest.mark.parametrize("text", ["", "logo://", "logo://x:1", "http://a", "logo://" + "a" * 16 + ":nan", "logo://,"])
def test_what_is_no_recipe(text: str) -> None:
    with pytest.raises(UsageError, match="expected a recipe"):
        Recipe.parse(text)


def test_options_come_from_both_places() -> None:
    assert VllmOptions.of(None, {}) is None and VllmOptions.of({"other": 1}, {}) is None
    made = VllmOptions.of({"logo": {"k": 3}}, {POOL: "pool", OPTIONS: json.dumps({"k": 2, "signal": "norm"})})
    assert made is not None
    assert (made.pool, made.settings.k, made.settings.signal) == ("pool", 3, "norm")
    assert made.all_signals == ("norm",)


@pytest.mark.parametrize(
    ("additional", "environment", "expected"),
    [
        ({"logo": {"pol": "x"}}, {}, "unknown option 'pol' of LoGo (did you mean 'pool'?)"),
        ({"logo": 3}, {}, "expected 'logo' to be an object, found int"),
        ({"logo": {"k": 2}}, {}, "LoGo needs a pool: set LOGO_POOL"),
        ({}, {OPTIONS: "{", POOL: "p"}, "LOGO_OPTIONS: expected a JSON object"),
        ({"logo": {"products": "fast"}}, {POOL: "p"}, "products: expected one of auto, kernels, plain, found 'fast'"),
        ({"logo": {"adapter_changes": "yes"}}, {POOL: "p"}, "adapter_changes"),
        ({"logo": {"max_body_mb": 0}}, {POOL: "p"}, "max_body_mb"),
        ({"logo": {"max_body_mb": True}}, {POOL: "p"}, "max_body_mb"),
        ({"logo": {"signals": ["nosuch"]}}, {POOL: "p"}, "unknown signal 'nosuch'"),
        ({"logo": {"probe_context": "pool", "signal": "norm"}}, {POOL: "p"}, "unknown option"),
    ],
)
def test_options_that_cannot_be_used(additional: Any, environment: dict[str, str], expected: str) -> None:
    with pytest.raises(UsageError) as error:
        VllmOptions.of(additional, environment)
    assert expected in str(error.value)


def test_slots_follow_from_the_pool() -> None:
    pool = open_pool(None, "demo")  # 16 adapters of rank 8
    needed = Slots.of(pool)
    assert needed == Slots(16, 8, ("q_proj", "v_proj"))
    check_slots(pool, SimpleNamespace(max_loras=16, max_lora_rank=8))
    for slots, rank, expected in (
        (16, 4, "adapter 'add_numbers' has rank 8: pass --max-lora-rank 8 or more"),
        (2, 64, "the pool has 16 adapters, each of which needs a slot: pass --max-loras 16"),
    ):
        with pytest.raises(UsageError) as error:
            check_slots(pool, SimpleNamespace(max_loras=slots, max_lora_rank=rank))
        assert expected in str(error.value)


@pytest.mark.parametrize("weight", [16.5, -1e30, float("nan")])
def test_weights_of_a_request_are_bounded(weight: float) -> None:
    """Far larger ones make sound adapters overflow."""
    pool = KeyedPool.of(open_pool(None, "demo"))
    assert pool.recipe(Selection.forced({"antonym": -16.0, "capital": 0.5})).parts
    with pytest.raises(UsageError, match=r"adapter 'antonym': expected a weight from -16 to 16, found"):
        pool.recipe(Selection.forced({"antonym": weight, "capital": 0.5}))


def test_the_backend_is_not_reached_by_what_everybody_imports() -> None:
    source = Path(__file__).parent.parent / "src" / "logo"
    files = [path for path in source.rglob("*.py") if "backends" not in path.parts]
    lines = [line for path in files for line in path.read_text().splitlines()]
    assert not any(line.startswith(("import vllm", "from vllm")) for line in lines)  # only where it is used
