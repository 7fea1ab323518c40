"""Where the adapters of a request begin to act inside vLLM: ids of its tokens, and what its cache knows blocks by."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from logo.adapters.activation import EVERYWHERE, Activation
from logo.backends.vllm.marks import PROMPT, reading, seal
from logo.backends.vllm.onsets import Onset, Rows, hash_as, mapped, others
from logo.backends.vllm.recipe import Recipe
from logo.errors import UsageError

A, B = "a" * 16, "b" * 16


@dataclass(frozen=True)
class Lora:
    """vLLM's `LoRARequest`, as far as it is read."""

    lora_name: str
    lora_int_id: int
    lora_path: str


@dataclass(frozen=True)
class Mapping:
    """vLLM's `LoRAMapping`, likewise."""

    index_mapping: tuple[int, ...]
    prompt_mapping: tuple[int, ...]


def lora(**where: Activation) -> Lora:
    recipe = Recipe.of([(A, 0.7), (B, 0.3)], {A: where.get("a", EVERYWHERE), B: where.get("b", EVERYWHERE)})
    return Lora(str(recipe), 5, str(recipe))


def onset(request: Any, prompt: list[int]) -> Onset | None:
    return Onset.of(request, None, prompt, len(prompt))


ACTIVATIONS = st.one_of(
    st.just(EVERYWHERE),
    st.builds(lambda last: Activation(last=last), st.integers(1, 40)),
    st.builds(lambda tokens: Activation(tuple(tokens)), st.lists(st.integers(0, 2), min_size=1, max_size=2)),
)


@given(ACTIVATIONS, ACTIVATIONS, st.lists(st.integers(0, 2), min_size=1, max_size=30), st.data())
def test_every_token_has_the_adapters_that_act_on_it(
    a: Activation, b: Activation, prompt: list[int], data: Any
) -> None:
    request = lora(a=a, b=b)
    begins = {A: a.begin(prompt), B: b.begin(prompt)}
    end = len(prompt) + 3  # some of the answer
    expected = [{key for key, begin in begins.items() if begin is not None and begin <= i} for i in range(end)]
    found = onset(request, prompt)
    if found is None:
        assert expected == [{A, B}] * end
        return
    keys_of = {0: set(), found.number: {A, B}, **{n: set(some.keys) for n, some in found.others.items()}}
    cut = data.draw(st.integers(0, end))
    ids = [*found.ids(0, cut), *found.ids(cut, end - cut)]
    assert [keys_of[number] for number in ids] == expected
    assert keys_of[found.last] == expected[-1]
    assert found.settled(cut) == (expected[-1] == {A, B} and all(keys == {A, B} for keys in expected[cut:]))


def test_only_the_rows_of_the_request_are_mapped() -> None:
    late = onset(lora(a=Activation(last=2), b=Activation(last=2)), [1] * 6)
    never = onset(lora(a=Activation((9,)), b=Activation((9,))), [1] * 6)
    assert late is not None and never is not None
    before = Mapping((7, 7, 5, 5, 5, 5, 5, 5), (7, 5, 5, 5))
    rows = [Rows(late, 2, 3, 2, 1, 1), Rows(never, 5, 3, 6, 2, 2)]
    assert mapped(before, rows) == Mapping((7, 7, 0, 0, 5, 0, 0, 0), (7, 5, 0, 0))


def test_adapters_may_begin_to_act_one_after_the_other() -> None:
    request = lora(a=Activation(last=2), b=Activation(last=4))
    late = onset(request, [1] * 6)
    assert late is not None and late.begins == (2, 4)
    [(number, (text, recipe))] = others([Rows(late, 0, 6, 0, 0, 1)]).items()
    assert text == request.lora_path and recipe.keys == (B,) and late.ids(0, 6) == [0, 0, number, number, 5, 5]


def scheduled(request: Any, prompt: list[int], parameters: Any = None) -> Any:
    return SimpleNamespace(
        lora_request=request, sampling_params=parameters, prompt_token_ids=prompt, num_prompt_tokens=len(prompt)
    )


def test_blocks_before_adapters_act_are_the_base_models() -> None:
    request = scheduled(lora(a=Activation(last=4), b=Activation(last=4)), [1] * 40)  # from position 36 on
    assert [hash_as(request, end) for end in (16, 32, 36)] == [None] * 3
    late = hash_as(request, 37)
    assert late.lora_name == late.lora_path == f"{request.lora_request.lora_name}@36"
    # The same tokens, but a prompt that ends elsewhere: other keys and values behind the beginning.
    other = scheduled(request.lora_request, [1] * 41)
    assert hash_as(other, 48).lora_name != hash_as(request, 48).lora_name
    silent = scheduled(lora(a=Activation((9,)), b=Activation((9,))), [1] * 40)
    assert hash_as(silent, 48) is None
    for plain in (lora(), Lora("an adapter of vLLM", 3, "/folder@last:4")):
        assert hash_as(scheduled(plain, [1] * 40), 16) is plain


def test_a_completion_that_is_scored_is_no_part_of_the_prompt() -> None:
    class Parameters:
        extra_args: dict[str, Any] | None = None

    parameters, request = Parameters(), lora(a=Activation(last=2), b=Activation(last=2))
    parameters.extra_args = {PROMPT: 3}  # a client says so
    seal(parameters)
    assert parameters.extra_args is None
    with reading(6):
        seal(parameters)
    found = Onset.of(request, parameters, [1] * 9, 9)
    assert found is not None and found.begins == (4,)
    assert hash_as(scheduled(request, [1] * 9, parameters), 4) is None


@given(ACTIVATIONS, ACTIVATIONS)
def test_a_recipe_says_where_adapters_act(a: Activation, b: Activation) -> None:
    made = Recipe.of([(A, 0.7), (B, 0.3)], {A: a, B: b})
    assert Recipe.parse(str(made)) == made
    assert (made.activation(A), made.activation(B)) == (a, b)


@pytest.mark.parametrize("where", ["", "x", "last:0", "last:", "7.", "7~on", "everywhere"])
def test_what_is_no_place_to_act(where: str) -> None:
    with pytest.raises(UsageError):
        Recipe.parse(f"logo://{A}:1@{where}")
