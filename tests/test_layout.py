"""Which module of the base model a path in an adapter file means: the same layer or none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from hypothesis import assume, given
from hypothesis import settings as budget
from hypothesis import strategies as st

import tiny
from logo.adapters.adapter import open_adapter
from logo.adapters.layout import BaseLayout, LinearShape, linear_modules
from logo.errors import AdapterError
from make_adapters import Q, V, calm, tensors, write, write_peft

SQUARE = LinearShape(8, 8)
WRAPPERS = ["base_model", "model", "language_model", "text_model", "transformer", "module", "llm"]


def layout(*paths: str, shape: LinearShape = SQUARE) -> BaseLayout:
    return BaseLayout(dict.fromkeys(paths, shape))


def layers(count: int, front: str = "model.layers") -> BaseLayout:
    return layout(*(f"{front}.{i}.{name}" for i in range(count) for name in (Q, V, "mlp.up_proj")))


def adapter_on(tmp_path: Path, modules: dict[str, tuple[int, int]], **how: Any) -> Any:
    return open_adapter(write(tmp_path / "a", tensors(modules, rank=2, **how), r=2))


# ---- matching -------------------------------------------------------------------------------------------------------

FRONT = st.lists(st.sampled_from(WRAPPERS), max_size=3)
NAMES = st.sampled_from([Q, V, "mlp.up_proj", "q_proj", "self_attn.k_proj"])


@calm
@given(st.integers(1, 40), st.integers(0, 60), FRONT, FRONT, NAMES)
def test_a_path_matches_its_own_layer_or_nothing(
    count: int, index: int, base: list[str], adapter: list[str], name: str
) -> None:
    there = layers(count, ".".join([*base, "layers"]))
    found = there.matches(".".join([*adapter, "layers", str(index), name]))
    exists = index < count and name in (Q, V, "mlp.up_proj")
    assert found == ([".".join([*base, "layers", str(index), name])] if exists else [])


@calm
@given(st.lists(st.sampled_from(["a", "b", "0", "1", "11", "model", "layers"]), min_size=1, max_size=5), st.data())
def test_below_the_wrappers_every_segment_has_to_agree(path: list[str], data: st.DataObject) -> None:
    other = data.draw(st.permutations(path))
    there = layout(".".join(path))
    front = [next((i for i, s in enumerate(p) if s not in WRAPPERS), len(p) - 1) for p in (path, other)]
    same = path[front[0] :] == other[front[1] :]
    assert there.matches(".".join(other)) == ([".".join(path)] if same else [])


@pytest.mark.parametrize(
    "path", ["q_proj", "self_attn.q_proj", "0.self_attn.q_proj", "ayers.0.self_attn.q_proj", "", "."]
)
def test_a_path_that_is_too_short_to_tell_the_layer_matches_nothing(path: str) -> None:
    assert layers(1).matches(path) == []


@pytest.mark.parametrize(
    ("base", "adapter"),
    [
        ("model.layers", "layers"),
        ("model.language_model.layers", "model.layers"),
        ("model.layers", "model.language_model.layers"),
        ("model.text_model.layers", "layers"),
        ("transformer.h", "h"),
        ("model.layers", "module.base_model.model.model.layers"),
    ],
)
def test_wrappers_may_be_missing_or_extra_in_front(base: str, adapter: str) -> None:
    assert layers(2, base).matches(f"{adapter}.1.{Q}") == [f"{base}.1.{Q}"]


def test_a_vision_tower_of_the_same_names_is_left_alone() -> None:
    there = layout(
        *(f"model.language_model.layers.{i}.{Q}" for i in range(2)),
        *(f"model.vision_tower.vision_model.encoder.layers.{i}.{Q}" for i in range(2)),
        *(f"model.visual.layers.{i}.{Q}" for i in range(4)),
        *(f"model.vision_tower.layers.{i}.{Q}" for i in range(4)),
    )
    assert there.matches(f"model.layers.1.{Q}") == [f"model.language_model.layers.1.{Q}"]
    assert there.matches(f"model.layers.3.{Q}") == []  # only the vision tower is that deep
    assert there.matches(f"vision_tower.vision_model.encoder.layers.1.{Q}") == [
        f"model.vision_tower.vision_model.encoder.layers.1.{Q}"
    ]


# ---- real models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt_neox", "gpt2", "opt", "phi3"])
def test_an_adapter_fits_the_model_with_and_without_its_head(tmp_path: Path, name: str) -> None:
    with_head = tiny.model(name)
    headless = with_head.base_model
    assert headless is not with_head
    write_peft(tmp_path / "with", tiny.model(name), target_modules="all-linear", fan_in_fan_out=name == "gpt2")
    write_peft(
        tmp_path / "without",
        tiny.model(name).base_model,
        target_modules=sorted({path.rsplit(".")[-1] for path, _ in linear_modules(headless)}),
        task_type=None,
        fan_in_fan_out=name == "gpt2",
    )
    for folder in ("with", "without"):
        for model in (with_head, headless):
            fitted = open_adapter(tmp_path / folder).fit(BaseLayout.of(model))
            assert set(fitted.modules) == {path for path, _ in linear_modules(model)} - {"lm_head", "embed_out"}


def test_the_layout_of_a_model_on_the_meta_device_is_the_same() -> None:
    with torch.device("meta"):
        meta = tf.AutoModelForCausalLM.from_config(tiny.CONFIGS["llama"]())
    assert BaseLayout.of(meta) == BaseLayout.of(tiny.model("llama"))


# ---- adapters -------------------------------------------------------------------------------------------------------


@budget(calm, max_examples=25)
@given(st.integers(1, 6), st.integers(1, 9))
def test_a_model_with_fewer_layers_is_refused_and_one_with_more_is_not(
    tmp_path_factory: pytest.TempPathFactory, base: int, depth: int
) -> None:
    modules = {f"model.layers.{i}.{Q}": (8, 8) for i in range(depth)}
    adapter = adapter_on(tmp_path_factory.mktemp("depth"), modules)
    if depth <= base:
        assert set(adapter.fit(layers(base)).modules) == set(modules)
        return
    with pytest.raises(AdapterError) as caught:
        adapter.fit(layers(base))
    missing = depth - base
    text = str(caught.value)
    assert f"{missing} of {depth} modules do not match" in text
    assert text.count("no such linear module") == min(missing, 5)
    assert (f"and {missing - 5} more" in text) == (missing > 5)
    assert len(text.splitlines()) == 1


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
@budget(calm, max_examples=15)
def test_other_shapes_are_refused_with_both(
    tmp_path_factory: pytest.TempPathFactory, a_in: int, a_out: int, in_features: int, out_features: int
) -> None:
    assume((a_in, a_out) != (in_features, out_features))
    adapter = adapter_on(tmp_path_factory.mktemp("shape"), {f"layers.0.{Q}": (a_in, a_out)})
    with pytest.raises(AdapterError) as caught:
        adapter.fit(layout(f"layers.0.{Q}", shape=LinearShape(in_features, out_features)))
    assert f"layers.0.{Q} (adapter {a_in} -> {a_out}, base {in_features} -> {out_features})" in str(caught.value)


def test_another_base_model_is_refused_with_five_offenders_and_a_question(tmp_path: Path) -> None:
    write_peft(tmp_path / "for llama")
    with pytest.raises(
        AdapterError, match=r"^adapter 'for llama': does not fit the base model: 6 of 6 modules"
    ) as caught:
        open_adapter(tmp_path / "for llama").fit(BaseLayout.of(tiny.model("gpt2")))
    assert str(caught.value).count("no such linear module") == 5
    assert str(caught.value).endswith("and 1 more. Was it trained on another one?")


def test_an_ambiguous_module_is_refused_with_what_it_may_be(tmp_path: Path) -> None:
    there = layout(f"model.layers.0.{Q}", f"text_model.layers.0.{Q}")
    with pytest.raises(AdapterError, match=rf"may be any of model\.layers\.0\.{Q}, text_model\.layers\.0\.{Q}\)"):
        adapter_on(tmp_path, {f"layers.0.{Q}": (8, 8)}).fit(there)


def test_two_entries_for_one_module_are_refused(tmp_path: Path) -> None:
    adapter = adapter_on(tmp_path, {f"model.layers.0.{Q}": (8, 8), f"language_model.layers.0.{Q}": (8, 8)})
    with pytest.raises(AdapterError, match=rf"a second entry for model\.layers\.0\.{Q}"):
        adapter.fit(layers(1))


def test_conv1d_is_matched_by_what_goes_in_and_out(tmp_path: Path) -> None:
    there = BaseLayout.of(tiny.model("gpt2"))
    assert there.shapes["transformer.h.0.attn.c_attn"] == LinearShape(32, 96)
    right = adapter_on(tmp_path / "right", {"h.0.attn.c_attn": (32, 96)})
    assert set(right.fit(there).modules) == {"transformer.h.0.attn.c_attn"}
    with pytest.raises(AdapterError, match="adapter 96 -> 32, base 32 -> 96"):
        adapter_on(tmp_path / "wrong", {"h.0.attn.c_attn": (96, 32)}).fit(there)
