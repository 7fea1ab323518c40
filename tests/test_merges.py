"""Merges: against PEFT's own, against their algebra, and as mixtures of the engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tiny
from logo.adapters.format import LoraWeights
from logo.errors import UsageError
from logo.mixing import Merge
from logo.mixing.merges import MERGES, fusion, linear, merged, mixture, ties
from test_engine import PROMPTS, engine, hooks, write_adapter
from tolerances import SCORES, same_scores, same_tensor

PEFT_NAMES = {"mixture": "cat", "linear": "linear", "ties": "ties", "dare_linear": "dare_linear"}
PEFT_NAMES |= {"dare_ties": "dare_ties"}
SUMS_FACTORS = [kind for kind in MERGES if kind != "mixture"]
calm = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def acts(part: LoraWeights) -> Tensor:
    """`ΔW`."""
    return part.scaled_b() @ part.A.float()


def exact(parts: list[LoraWeights], weights: list[float]) -> Tensor:
    return torch.stack([w * acts(part) for part, w in zip(parts, weights, strict=True)]).sum(dim=0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@st.composite
def parts_and_weights(draw: Any, equal: bool = True, most: int = 4) -> tuple[list[LoraWeights], list[float]]:
    count, random = draw(st.integers(1, most)), generator(draw(st.integers(0, 999)))
    rank = draw(st.integers(1, 4))
    ranks = [rank] * count if equal else draw(st.lists(st.integers(1, 4), min_size=count, max_size=count))
    scales = draw(st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=count, max_size=count))
    weights = draw(st.lists(st.floats(-1.5, 1.5, width=32), min_size=count, max_size=count))
    parts = [
        LoraWeights(torch.randn(r, 6, generator=random), torch.randn(5, r, generator=random), s)
        for r, s in zip(ranks, scales, strict=True)
    ]
    return parts, weights


def close(one: Tensor, other: Tensor) -> None:
    same_tensor(one, other)


# -- against PEFT -----------------------------------------------------------------------------------------------


@contextmanager
def drawing_from(source: torch.Generator) -> Iterator[None]:
    """PEFT draws from the global generator, after it was used for things of its own; here from this one."""
    draw = torch.bernoulli
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "bernoulli", lambda shares: draw(shares, generator=source))
        yield


@pytest.mark.parametrize("kind", list(PEFT_NAMES))
@settings(calm, max_examples=12)
@given(
    alphas=st.lists(st.integers(1, 16), min_size=2, max_size=4),
    weights=st.lists(st.floats(-1.5, 1.5, width=32), min_size=4, max_size=4),
    density=st.sampled_from([0.2, 0.5, 0.9]),
    sign=st.sampled_from(["total", "frequency"]),
    seed=st.integers(0, 99),
)
def test_equals_peft(kind: str, alphas: list[int], weights: list[float], density: float, sign: Any, seed: int) -> None:
    """Any scales, negative weights, densities and signs; random kinds drop the entries that PEFT drops."""
    configs = [peft.LoraConfig(r=3, lora_alpha=alpha, target_modules=["q_proj", "down_proj"]) for alpha in alphas]
    names = [f"a{i}" for i in range(len(configs))]
    model = peft.get_peft_model(tiny.model("llama", num_hidden_layers=1), configs[0], names[0])
    for name, config in zip(names[1:], configs[1:], strict=True):
        model.add_adapter(name, config)
    random = generator(seed)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=random)
            parameter.requires_grad_(False)
    how = {"density": density, "majority_sign_method": sign}
    with drawing_from(generator(seed)):
        model.add_weighted_adapter(names, weights[: len(names)], "merged", PEFT_NAMES[kind], **how)
    merge, source = Merge(kind, density, sign), generator(seed)
    layers = [module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    assert len(layers) == 2
    for layer in layers:
        parts = [LoraWeights(layer.lora_A[n].weight, layer.lora_B[n].weight, layer.scaling[n]) for n in names]
        ours = merge(parts, weights[: len(names)], source)
        theirs = LoraWeights(layer.lora_A["merged"].weight, layer.lora_B["merged"].weight, layer.scaling["merged"])
        difference = float((acts(ours) - acts(theirs)).abs().max())
        assert difference <= SCORES * (1 + float(acts(theirs).abs().max())), f"maximal difference {difference:.2e}"
        if kind != "mixture":  # where the scale of each adapter goes is open, there alone
            close(ours.A, theirs.A)
            close(ours.B, theirs.B)


# -- algebra ----------------------------------------------------------------------------------------------------


@calm
@given(parts_and_weights(equal=False))
def test_mixture_is_the_weighted_sum(drawn: tuple[list[LoraWeights], list[float]]) -> None:
    close(acts(mixture(*drawn)), exact(*drawn))


@calm
@given(parts_and_weights())
def test_fusion_and_linear_are_the_sums_of_factors(drawn: tuple[list[LoraWeights], list[float]]) -> None:
    """`linear` has every cross term with the root of both coefficients, `fusion` with their product."""
    parts, weights = drawn
    crossed = [[p.B @ q.A * (p.scaling * q.scaling) ** 0.5 for q in parts] for p in parts]
    fused = sum(v * w * crossed[i][j] for i, v in enumerate(weights) for j, w in enumerate(weights))
    close(acts(fusion(parts, weights)), fused)
    rooted = sum(
        abs(v * w) ** 0.5 * (1 if w >= 0 else -1) * crossed[i][j]
        for i, v in enumerate(weights)
        for j, w in enumerate(weights)
    )
    close(acts(linear(parts, weights)), rooted)


@calm
@given(parts_and_weights(most=1))
def test_one_adapter(drawn: tuple[list[LoraWeights], list[float]]) -> None:
    [part], [weight] = drawn
    close(acts(fusion([part], [1.0])), acts(part))
    close(acts(linear([part], [weight])), weight * acts(part))
    close(acts(ties([part], [weight], density=1.0)), weight * acts(part))


@pytest.mark.parametrize("kind", list(MERGES))
@calm
@given(parts_and_weights(), st.integers(0, 23))
def test_order_does_not_count(kind: str, drawn: tuple[list[LoraWeights], list[float]], turn: int) -> None:
    """Pool order decides what is drawn, so that a mixture is one thing however it is written."""
    parts, weights = drawn
    names = [f"a{i}" for i in range(len(parts))]
    tensors = {name: {"m": part} for name, part in zip(names, parts, strict=True)}
    mix = dict(zip(names, weights, strict=True))
    turned = names[turn % len(names) :] + names[: turn % len(names)]
    one = merged(Merge(kind), mix, tensors)["m"]
    again = merged(Merge(kind), mix, dict(reversed(tensors.items())))["m"]
    assert torch.equal(one.A, again.A) and torch.equal(one.B, again.B)
    if not kind.startswith("dare"):
        other = MERGES[kind](Merge(kind), [tensors[n]["m"] for n in turned], [mix[n] for n in turned], generator())
        whole = MERGES[kind](Merge(kind), parts, weights, generator())
        close(acts(other), acts(whole))


def test_what_is_dropped_depends_on_seed_module_and_names_alone() -> None:
    random = generator()
    part = LoraWeights(torch.ones(4, 50), torch.ones(50, 4), 1.0)
    other = LoraWeights(torch.randn(4, 50, generator=random), torch.randn(50, 4, generator=random), 1.0)
    tensors = {"a": {"m": part, "n": part}, "b": {"m": other, "n": other}, "c": {"m": other}}

    def kept(seed: int, path: str, mix: dict[str, float]) -> Tensor:
        return merged(Merge("dare_linear", seed=seed), mix, tensors)[path].A

    first = kept(0, "m", {"a": 0.5, "b": 0.5})
    assert torch.equal(first, kept(0, "m", {"a": 0.5, "b": 0.5}))
    assert not torch.equal(first, kept(1, "m", {"a": 0.5, "b": 0.5}))
    assert not torch.equal(first, kept(0, "n", {"a": 0.5, "b": 0.5}))
    assert not torch.equal(first, kept(0, "m", {"a": 0.5, "c": 0.5}))
    zeros = first == 0
    assert torch.equal(zeros, kept(0, "m", {"a": 0.9, "b": 0.1}) == 0)


@calm
@given(seed=st.integers(0, 50), density=st.sampled_from([0.1, 0.5, 0.9]))
def test_dropping_keeps_expectation(seed: int, density: float) -> None:
    part = LoraWeights(torch.ones(8, 400), torch.ones(400, 8), 1.0)
    dropped = Merge("dare_linear", density)([part, part], [0.5, 0.5], generator(seed))
    spread = ((1 - density) / density / (2 * part.A.numel())) ** 0.5
    assert abs(float(dropped.A.mean()) - 2 * 0.5**0.5) < 6 * spread * 2 * 0.5**0.5


def test_one_adapter_is_not_trimmed_or_dropped() -> None:
    """As in PEFT: there is nothing to agree about."""
    part = LoraWeights(torch.randn(2, 6), torch.randn(5, 2), 2.0)
    for kind in ("ties", "dare_linear", "dare_ties", "linear"):
        close(acts(merged(Merge(kind), {"a": 0.7}, {"a": {"m": part}})["m"]), 0.7 * acts(part))
    close(acts(merged(Merge("fusion"), {"a": 0.7}, {"a": {"m": part}})["m"]), 0.49 * acts(part))


# -- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SUMS_FACTORS)
def test_unequal_ranks_are_refused_by_name(kind: str, llama: nn.Module, adapters: Path) -> None:
    logo = engine(llama, adapters)
    logo.merge = kind
    expected = r"'tasks/t0' has rank 1 and 'tasks/t1' has 2; use 'mixture'"
    with pytest.raises(UsageError, match=expected):
        logo.generate(PROMPTS[0], adapters={"tasks/t0": 0.5, "tasks/t1": 0.5}, max_new_tokens=2)
    with pytest.raises(ValueError, match="expected factors of one rank, found ranks 1, 2"):
        MERGES[kind](
            Merge(kind), [LoraWeights(torch.ones(r, 3), torch.ones(3, r), 1.0) for r in (1, 2)], [1, 1], generator()
        )
    assert logo.generate(PROMPTS[0], adapters={"tasks/t0": 0.5}, max_new_tokens=2).token_ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "tise"}, "unknown merge 'tise' .did you mean 'ties'"),
        ({"density": 0}, "density: expected a share above 0 and up to 1, found 0"),
        ({"density": 1.1}, "found 1.1"),
        ({"majority_sign": "most"}, "expected 'total' or 'frequency', found 'most'"),
        ({"arrow_top_k": 0}, "arrow_top_k: expected 1 or more"),
        ({"arrow_temperature": 0.0}, "arrow_temperature: expected a number above 0"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Merge(**options)


def test_other_names() -> None:
    assert Merge("cat") == Merge("mixture") and Merge("cat").exact
    assert Merge("dare").kind == "dare_linear"
    for kind, function in {"fusion": fusion, "linear": linear, "ties": ties}.items():
        assert not Merge(kind).exact and function.__doc__.startswith("Does not equal `Σ w s B A`")
    assert mixture.__doc__ is not None and mixture.__doc__.startswith("Equals `Σ w s B A`")


# -- in the engine ----------------------------------------------------------------------------------------------

MIXES: list[dict[str, float]] = [
    {"t0": 0.6, "t1": 0.4},
    {"t1": -0.5, "t2": 1.2, "t3": 0.2},
    {},
    {"t0": 0.6, "t1": 0.4},
    {"t3": 1.0, "t0": 0.0},
]


@pytest.fixture(scope="module")
def equals(llama: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four adapters of rank 3, not all on the same modules."""
    root = tmp_path_factory.mktemp("equals")
    for i, names in enumerate([("q_proj", "v_proj"), ("q_proj",), ("q_proj", "down_proj"), ("q_proj", "v_proj")]):
        write_adapter(root / f"t{i}", llama, names, rank=3, seed=i, scale=0.4)
    return root


@pytest.mark.parametrize("kind", list(MERGES))
def test_a_batch_of_merges_equals_one_by_one(kind: str, llama: nn.Module, equals: Path) -> None:
    logo = engine(llama, equals)
    logo.merge = Merge(kind, density=0.6)
    before, there = llama(input_ids=torch.tensor([[5, 6, 7]])).logits, hooks(llama)
    batched = logo.generate(PROMPTS, adapters=MIXES, max_new_tokens=8, batch_size=5)
    for prompt, mix, answer in zip(PROMPTS, MIXES, batched, strict=True):
        assert logo.generate(prompt, adapters=mix, max_new_tokens=8).token_ids == answer.token_ids
    assert batched[2].token_ids == logo.generate(PROMPTS[2], adapters={}, max_new_tokens=8).token_ids
    assert torch.equal(before, llama(input_ids=torch.tensor([[5, 6, 7]])).logits)
    assert hooks(llama) == there


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("kind", list(MERGES))
def test_scores_are_those_of_a_model_with_the_merge_in_its_weights(kind: str, fold: bool, equals: Path) -> None:
    """Gated, folded, and added to a copy of the weights by hand: the same likelihoods."""
    llama = tiny.model("llama")
    logo = engine(llama, equals)
    logo._mixer._fold = fold
    logo.merge = merge = Merge(kind, density=0.6, seed=3)
    found = [logo.score(PROMPTS[0], "w50 w51", [mix])[0].nll for mix in MIXES]
    together = [scored.nll for scored in logo.score(PROMPTS[0], "w50 w51", MIXES)]
    assert together == same_scores(found)
    tensors = {adapter.name: adapter.read() for adapter in logo.pool}
    for mix, nll in zip(MIXES, found, strict=True):
        copy = tiny.model("llama")
        used = {name: mix[name] for name in sorted(mix) if mix[name]}
        with torch.no_grad():
            for path, factors in (merged(merge, used, tensors) if used else {}).items():
                copy.get_submodule(path).weight += acts(factors)
        by_hand = engine(copy, equals).score(PROMPTS[0], "w50 w51", [{}])[0].nll
        assert nll == same_scores(by_hand)
    assert len(set(found)) >= 4  # they do differ


def test_probing_never_merges(llama: nn.Module, adapters: Path) -> None:
    """With the pool active, or carried, the probe sees the official sum, whatever answers are made with."""
    for context in ("pool", "carry"):
        plain, merging = (engine(llama, adapters, probe_context=context, k=1) for _ in range(2))
        merging.merge = "ties"  # the pool's ranks differ: merging it would be refused
        for one, other in zip(plain.select(PROMPTS), merging.select(PROMPTS), strict=True):
            assert one == other


def test_a_changed_merge_counts_from_the_next_call(llama: nn.Module, equals: Path) -> None:
    logo = engine(llama, equals)
    mix = {"t0": 0.9, "t2": 0.8}
    values = {}
    for kind in (*MERGES, "mixture"):
        logo.merge = kind
        values.setdefault(kind, []).append(logo.score(PROMPTS[0], "w50", [mix])[0].nll)
    assert values["mixture"][0] == values["mixture"][1]
    assert len({value[0] for value in values.values()}) == len(MERGES)
