"""Which part of the base model a path in an adapter file means: the same layer or none. Whole weights are left out
where they are those of the base model, and adapters on its embedding answer as PEFT's; refused by name otherwise."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
import transformers as tf
from hypothesis import assume, given
from hypothesis import settings as budget
from hypothesis import strategies as st
from torch import nn

import tiny
from logo import AdapterPool, LoGo, PoolError, SelectionSettings
from logo.adapters.adapter import open_adapter
from logo.adapters.layout import BaseLayout, LinearShape, linear_modules
from logo.cli.app import run
from logo.errors import AdapterError
from make_adapters import Q, V, edit_config, edit_weights, load_peft, tensors, write, write_peft
from test_engine import PROMPTS, tokenizer, write_adapter
from test_mixing import Mixed, peft_logits, peft_model, save
from tolerances import same_tensor

pytestmark = pytest.mark.slow

SQUARE = LinearShape(8, 8)
WRAPPERS = ["base_model", "model", "language_model", "text_model", "transformer", "module", "llm"]


def layout(*paths: str, shape: LinearShape = SQUARE) -> BaseLayout:
    return BaseLayout(dict.fromkeys(paths, shape))


def layers(count: int, front: str = "model.layers") -> BaseLayout:
    return layout(*(f"{front}.{i}.{name}" for i in range(count) for name in (Q, V, "mlp.up_proj")))


def adapter_on(tmp_path: Path, modules: dict[str, tuple[int, int]], **how: Any) -> Any:
    return open_adapter(write(tmp_path / "a", tensors(modules, rank=2, **how), r=2))


FRONT = st.lists(st.sampled_from(WRAPPERS), max_size=3)
NAMES = st.sampled_from([Q, V, "mlp.up_proj", "q_proj", "self_attn.k_proj"])


@given(st.integers(1, 40), st.integers(0, 60), FRONT, FRONT, NAMES, st.sampled_from(["layers", "h"]))
def test_a_path_matches_its_own_layer_or_nothing(
    count: int, index: int, base: list[str], adapter: list[str], name: str, blocks: str
) -> None:
    """Wrappers in front may be missing or extra."""
    there = layers(count, ".".join([*base, blocks]))
    found = there.matches(".".join([*adapter, blocks, str(index), name]))
    exists = index < count and name in (Q, V, "mlp.up_proj")
    assert found == ([".".join([*base, blocks, str(index), name])] if exists else [])


@given(st.lists(st.sampled_from(["a", "b", "0", "1", "11", "model", "layers"]), min_size=1, max_size=5), st.data())
def test_below_the_wrappers_every_segment_has_to_agree(path: list[str], data: st.DataObject) -> None:
    other = data.draw(st.permutations(path))
    there = layout(".".join(path))
    front = [next((i for i, s in enumerate(p) if s not in WRAPPERS), len(p) - 1) for p in (path, other)]
    same = path[front[0] :] == other[front[1] :]
    assert there.matches(".".join(other)) == ([".".join(path)] if same else [])


def test_a_path_that_is_too_short_to_tell_the_layer_matches_nothing() -> None:
    for path in ("q_proj", "self_attn.q_proj", "0.self_attn.q_proj", "ayers.0.self_attn.q_proj", "", "."):
        assert layers(1).matches(path) == []


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


@budget(max_examples=25)
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
    start = f"adapter 'a': does not fit the base model: {missing} of {depth} modules do not match"
    assert text.startswith(start) and len(text.splitlines()) == 1
    assert text.count("no such linear module") == min(missing, 5)
    assert text.endswith((f" and {missing - 5} more" if missing > 5 else ")") + ". Was it trained on another one?")


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
@budget(max_examples=15)
def test_other_shapes_are_refused_with_both(
    tmp_path_factory: pytest.TempPathFactory, a_in: int, a_out: int, in_features: int, out_features: int
) -> None:
    assume((a_in, a_out) != (in_features, out_features))
    adapter = adapter_on(tmp_path_factory.mktemp("shape"), {f"layers.0.{Q}": (a_in, a_out)})
    with pytest.raises(AdapterError) as caught:
        adapter.fit(layout(f"layers.0.{Q}", shape=LinearShape(in_features, out_features)))
    assert f"layers.0.{Q} (adapter {a_in} -> {a_out}, base {in_features} -> {out_features})" in str(caught.value)


def test_a_module_whose_weight_is_used_without_a_call_is_no_target(tmp_path: Path) -> None:
    model = tiny.model("mamba")
    write_adapter(tmp_path / "a", model, ("in_proj", "dt_proj"), rank=2, seed=1)
    said = r"3 of 6 modules do not match: \S+dt_proj \(the model uses its weight without calling it\)"
    with pytest.raises(PoolError, match=said):
        AdapterPool.open(tmp_path).fit(BaseLayout.of(model))


def test_a_router_whose_weight_is_used_without_a_call_is_no_target() -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "num_layers": 1, "num_attention_heads": 4, "vocab_size": 96}
    with torch.device("meta"):
        model = tf.AutoModelForCausalLM.from_config(tf.LongcatFlashConfig(**sizes))
    linear = [path for path, _ in linear_modules(model)]
    assert {*linear} - BaseLayout.of(model).shapes.keys() == {path for path in linear if "router" in path} != set()


def test_modules_and_entries_are_pairs(tmp_path: Path) -> None:
    for there, fronts, said in (
        (("model", "text_model"), [""], rf"may be any of model\.layers\.0\.{Q}, text_model\.layers\.0\.{Q}\)"),
        (("model",), ["model.", "language_model."], rf"a second entry for model\.layers\.0\.{Q}"),
    ):
        adapter = adapter_on(tmp_path, {f"{front}layers.0.{Q}": (8, 8) for front in fronts})
        with pytest.raises(AdapterError, match=said):
            adapter.fit(layout(*(f"{front}.layers.0.{Q}" for front in there)))


# ---- more than linear modules ---------------------------------------------------------------------------------------


def with_bias() -> Any:
    """A model whose head has a bias."""
    base = tiny.model("llama")
    base.lm_head = nn.Linear(32, 96)
    base.lm_head.weight.data = tiny.model("llama").lm_head.weight.data.clone()  # type: ignore[union-attr]
    base.lm_head.bias.data = torch.linspace(-1, 1, 96)
    return base


IDS = torch.tensor([tiny.prompts([9])[0]])
HEAD, BIAS = "base_model.model.lm_head.weight", "base_model.model.lm_head.bias"
KINDS: dict[str, dict[str, Any]] = {
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "a_norm": {"modules_to_save": ["norm"]},
    "adapted_head": {"target_modules": ["lm_head", "q_proj"]},
    "resized": {"save": {"save_embedding_layers": True}},
    "biased": {"modules_to_save": ["lm_head"]},
    "biased_and_adapted": {"target_modules": ["lm_head", "q_proj"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_copies_of_the_base_are_left_out_and_answers_are_pefts(kind: str, tmp_path: Path) -> None:
    make = with_bias if kind.startswith("biased") else partial(tiny.model, "llama")
    write_peft(tmp_path / "pool" / "a", make(), **KINDS[kind])
    write_peft(tmp_path / "pool" / "b")
    base = make()
    pool = AdapterPool.open(tmp_path / "pool")
    assert make is not with_bias or set(pool["a"].copies.values()) == {"lm_head.bias", "lm_head.weight"}
    assert AdapterPool.open(tmp_path / "pool")["a"].copies == pool["a"].copies
    assert pool["a"].copies and not pool["b"].copies
    with pytest.raises(AdapterError, match=r"holds full weights .* unless they equal the base model's"):
        pool["a"].read()
    with pytest.raises(PoolError, match="holds full weights"):
        pool.fit(BaseLayout.of(base))
    with pytest.warns(UserWarning, match="adapters a: copies of base weights .* are left out"):
        pool.fit(BaseLayout.of(base), model=base)
    with pytest.warns(UserWarning, match="are left out"):
        ours = Mixed(base, pool).logits([{"a": 1.0}], IDS)
    with torch.no_grad():
        same_tensor(ours, load_peft(tmp_path / "pool" / "a", make())(input_ids=IDS).logits)
    with pytest.warns(UserWarning, match="are left out"):
        logo = LoGo(base, tokenizer(), pool, settings=SelectionSettings.of(signal="norm", cache=""))
    assert logo.names == ("a", "b")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w[HEAD].view(-1).__setitem__(3, 9.0), "lm_head.weight, with other values"),
        (lambda w: w.update({HEAD: w[HEAD][:-1].clone()}), "lm_head.weight, of shape"),
        (lambda w: w.update({"base_model.model.score.weight": torch.ones(2, 3)}), "score.weight, which the base model"),
        (lambda w: w[HEAD].fill_(float("nan")), "lm_head.weight, with other values"),
        (lambda w: w[BIAS].view(-1).__setitem__(3, 9.0), r"lm_head\.bias, with other values"),
    ],
    ids=["trained", "resized", "another", "nan", "bias"],
)
def test_what_is_not_the_bases_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    write_peft(tmp_path / "a", with_bias(), modules_to_save=["lm_head"])
    write_peft(tmp_path / "b")
    edit_weights(tmp_path / "a", change)
    base = with_bias()
    pool = AdapterPool.open(tmp_path)
    with pytest.raises(PoolError, match=f"it replaces a weight of the base model, {message}"):
        pool.fit(BaseLayout.of(base), model=base)
    fitted = pool.fit(BaseLayout.of(base), model=base, on_bad_adapter="skip")
    assert fitted.names == ("b",) and [bad.name for bad in fitted.refused] == ["a"]


def test_the_bases_dtype_decides_wherever_its_weights_are(tmp_path: Path) -> None:
    write_peft(tmp_path / "a", modules_to_save=["lm_head"])
    base = accelerate.cpu_offload(tiny.model("llama").to(torch.bfloat16))
    with pytest.warns(UserWarning, match="are left out"):
        assert AdapterPool.open(tmp_path).fit(BaseLayout.of(base), model=base).names == ("a",)


def test_a_manifest_leaves_it_as_it_is(tmp_path: Path) -> None:
    write_peft(tmp_path / "pool" / "a", modules_to_save=["lm_head"])
    edit_config(tmp_path / "pool" / "a", modules_to_save=None)  # the tensors tell
    assert run(["pool", "lock", str(tmp_path / "pool"), "--save", str(tmp_path / "pool.yaml")]) == 0
    assert AdapterPool.open(tmp_path / "pool.yaml")["a"].copies


EMBEDDINGS = {"llama": "embed_tokens", "qwen2": "embed_tokens", "gemma3": "embed_tokens", "gpt2": "wte"}


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_embeddings_equal_pefts(name: str, tmp_path: Path) -> None:
    base = tiny.model(name)
    linear = {"gpt2": ["c_attn"]}.get(name, ["q_proj", "down_proj"])
    configs = [
        peft.LoraConfig(r=rank, lora_alpha=7, target_modules=[EMBEDDINGS[name], *more], fan_in_fan_out=name == "gpt2")
        for rank, more in ((3, linear), (5, []))
    ]
    oracle = peft_model(base, configs, seed=1)
    pool = save(oracle, tmp_path)
    assert [module.embedding for module in pool["a1"].modules.values()] == [True]
    ids, mask = tiny.padded(tiny.prompts([6, 9, 4]))
    rows = [{"a0": 0.7, "a1": 0.3}, {"a1": 1.0}, {"a0": 1.0}]
    ours = Mixed(base, pool).logits(rows, ids, mask)
    for i, weights in enumerate(rows):
        length = int(mask[i].sum())
        same_tensor(ours[i, :length], peft_logits(oracle, weights, ids, mask)[i, :length])


@pytest.fixture
def pool(tmp_path: Path) -> AdapterPool:
    for i in range(3):
        write_peft(
            tmp_path / "pool" / f"t{i}",
            seed=i,
            target_modules=["embed_tokens", "q_proj"] if i else ["q_proj", "v_proj"],
            save={"save_embedding_layers": False},
        )

        def larger(weights: dict[str, torch.Tensor], i: int = i) -> None:
            generator = torch.Generator().manual_seed(i)
            for key in weights:
                if "embedding" in key:  # PEFT begins with zeros in A here
                    weights[key] = torch.randn(weights[key].shape, generator=generator)

        edit_weights(tmp_path / "pool" / f"t{i}", larger)
    return AdapterPool.open(tmp_path / "pool")


@pytest.mark.parametrize("merge", [None, True, False])
def test_batches_equal_single_prompts(pool: AdapterPool, merge: bool | None) -> None:
    settings = SelectionSettings.of(signal="norm", cache="")
    logo = LoGo(tiny.model("llama"), tokenizer(), pool, settings=settings, merge=merge)
    forced = [{"t1": 1.0}, {"t2": 0.6, "t0": 0.4}, {}, {"t0": 1.0}, {"t1": 0.5, "t2": 0.5}]
    together = logo.generate(PROMPTS, adapters=forced, max_new_tokens=6)
    alone = [logo.generate(p, adapters=row, max_new_tokens=6) for p, row in zip(PROMPTS, forced, strict=True)]
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]
    base = logo.generate(PROMPTS[0], adapters={}, max_new_tokens=6)
    assert base.token_ids != alone[0].token_ids  # the embedding counts
    assert logo.select(PROMPTS[0], k=3).adapters


def test_an_embedding_that_cannot_be_mixed_is_refused_by_name(pool: AdapterPool) -> None:
    """Where there is no model, as in vLLM, or another vocabulary."""
    with pytest.raises(PoolError, match=r"'t1': it adapts an embedding .*, which is not mixed here"):
        pool.fit(BaseLayout.of(tiny.model("llama")))
    base = tiny.model("llama", vocab_size=97)
    with pytest.raises(PoolError, match=r"embed_tokens \(adapter 96 -> 32, base 97 -> 32\)"):
        pool.fit(BaseLayout.of(base), model=base)
