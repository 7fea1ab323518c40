"""Finding points in every architecture, and reading them in one short pass."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, RobertaConfig

import tiny
from logo.errors import ModelError
from logo.selection.packing import keeps_texts_apart
from logo.selection.points import Point, decoder_layers, last_query, points_of
from logo.selection.probe import Probe
from logo.selection.signals import Signal, get_signal
from tolerances import same_tensor

QUERY = {
    **dict.fromkeys(("llama", "qwen2", "qwen3", "gemma2", "gemma3", "mistral"), "model.layers.2.self_attn.q_proj"),
    **dict.fromkeys(("falcon", "falcon_heads", "falcon_groups"), "transformer.h.2.self_attention.query_key_value"),
    **dict.fromkeys(("gpt2", "gpt_bigcode", "gpt_bigcode_heads"), "transformer.h.2.attn.c_attn"),
    "phi3": "model.layers.2.self_attn.qkv_proj",
    "gpt_neox": "gpt_neox.layers.2.attention.query_key_value",
    "opt": "model.decoder.layers.2.self_attn.q_proj",
    "codegen": "transformer.h.2.attn.qkv_proj",
}
FUSED = [name for name, path in QUERY.items() if path.endswith(("qkv_proj", "query_key_value", "c_attn"))]


@pytest.mark.parametrize("name", list(tiny.CONFIGS))
def test_finds_the_query_projection_of_the_last_layer(name: str) -> None:
    point = last_query(tiny.model(name))
    assert (point.layer, point.module) == (2, QUERY[name])
    assert (point.rows is not None) == (name in FUSED)
    assert point.rows is None or len(point.rows) == 32


@pytest.mark.parametrize("name", FUSED)
def test_query_rows_are_what_attention_takes_as_the_query(name: str) -> None:
    """With all other rows zero there are no keys and no values left, so the layer's attention gives nothing, as if the
    whole projection were zero; were one of the other rows a query row, or one of these a value row, it would not."""
    model = tiny.model(name)
    point = last_query(model)
    module = model.get_submodule(point.module)
    assert point.rows is not None
    rest = torch.ones(tiny_out_features(module), dtype=torch.bool)
    rest[list(point.rows)] = False
    ids, mask = tiny.padded(tiny.prompts([6]))
    zero_rows(module, rest)
    only_query = model(input_ids=ids, attention_mask=mask).logits
    zero_rows(module, torch.ones_like(rest))
    nothing = model(input_ids=ids, attention_mask=mask).logits
    same_tensor(only_query, nothing)
    # With only the query zeroed every token attends evenly, and values still come through.
    again = tiny.model(name)
    module = again.get_submodule(point.module)
    zero_rows(module, ~rest)
    flat = again(input_ids=ids, attention_mask=mask).logits
    assert not torch.allclose(flat, nothing)


def tiny_out_features(module: Any) -> int:
    return int(module.nf if hasattr(module, "nf") else module.out_features)


def zero_rows(module: Any, rows: Tensor) -> None:
    """Zeroes output rows of a Linear or Conv1D, bias included."""
    weight = module.weight.T if hasattr(module, "nf") else module.weight
    weight[rows] = 0
    if module.bias is not None:
        module.bias[rows] = 0


def read(probe: Probe, rows: list[list[int]], signal: Signal) -> list[Tensor]:
    """The hidden vectors that a signal reads of these rows."""
    hidden, owners = probe.read(rows, list(map(signal.begin, rows)))
    assert [int((owners == row).sum()) for row in range(len(rows))] == [len(row) - signal.begin(row) for row in rows]
    return hidden


def reading(token: Any) -> Signal:
    return replace(get_signal("norm"), token=token)


LAST = reading("last")


def queries(model: nn.Module, *layers: int) -> list[Point]:
    """The points of the query projection in these layers."""
    last = last_query(model)
    paths = [last.layer_path.removesuffix(str(last.layer)) + str(layer) for layer in layers]
    modules = [path + last.module.removeprefix(last.layer_path) for path in paths]
    return [Point(*one) for one in zip(layers, paths, modules, strict=True)]


@pytest.mark.parametrize("name", list(tiny.CONFIGS))
def test_what_is_read_is_the_models_own_hidden_states_or_what_the_module_receives(name: str) -> None:
    model = tiny.model(name)
    rows = tiny.prompts([7, 4, 5])
    ids, mask = tiny.padded(rows)
    points, ends = queries(model, 0, 1, 2), (torch.arange(3), mask.sum(1) - 1)
    seen: dict[str, Tensor] = {}

    def record(path: str) -> Any:
        return lambda module, args: seen.__setitem__(path, args[0])

    handles = [model.get_submodule(p.module).register_forward_pre_hook(record(p.module)) for p in points]
    with torch.no_grad():
        states = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    for point, hidden in zip(points, read(Probe(model, points), rows, LAST), strict=True):
        same_tensor(hidden, states[point.layer][ends])
    for point, hidden in zip(points, read(Probe(model, points, "projection"), rows, LAST), strict=True):
        same_tensor(hidden, seen[point.module][ends])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(tiny.CONFIGS | tiny.STATEFUL))
def test_packed_texts_are_read_as_if_each_were_alone(name: str, dtype: torch.dtype) -> None:
    """By models that keep them apart; of OPT, positions follow from the mask, and others keep a state."""
    model = tiny.model(name).to(dtype)
    assert keeps_texts_apart(model) == (name in tiny.CONFIGS and name != "opt")
    if not keeps_texts_apart(model):
        return
    layers, _ = decoder_layers(model)
    probe = Probe(model, [Point(2, f"{layers}.2", f"{layers}.2")])
    rows = tiny.prompts([1, 30, 7, 30, 18], seed=3)
    sizes: list[torch.Size] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape))
    [together] = read(probe, rows, reading("each"))
    assert sizes == [(1, 86)]
    alone = torch.cat([read(probe, [row], reading("each"))[0] for row in rows])
    if dtype == torch.float32:
        same_tensor(together, alone)
    assert torch.dist(together, alone) <= 0.05 * alone.norm()


def test_models_whose_positions_are_not_those_of_a_row_pack_nothing() -> None:
    """ALiBi's biases are rounded by column, and RoBERTa's positions begin behind that of padding."""
    roberta = RobertaConfig(**tiny.SIZES, intermediate_size=48, is_decoder=True, max_position_embeddings=128)
    for model in (tiny.model("falcon", alibi=True), AutoModelForCausalLM.from_config(roberta).eval()):
        assert not keeps_texts_apart(model)


def test_long_texts_and_those_behind_active_adapters_are_not_packed() -> None:
    sizes: list[torch.Size] = []
    model = tiny.model("llama")
    model.get_input_embeddings().register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape))
    probe = Probe(model, queries(model, 1))
    for lengths, may_pack in (([70, 60], True), ([6, 5], False), ([6, 6], True)):  # of a context of 128
        sizes.clear()
        rows = tiny.prompts(lengths)
        probe.read(rows, [0, 0], may_pack=may_pack)
        assert sizes[-1] == (2, max(lengths))


def test_stops_at_the_last_point() -> None:
    model = tiny.model("llama")
    calls: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda m, a, o, path=path: calls.append(path))
    rows = tiny.prompts([5])
    read(Probe(model, queries(model, 1)), rows, LAST)
    assert calls and all(path.startswith("model.layers.0.") for path in calls)
    calls.clear()
    values = [f"model.layers.{i}.self_attn.v_proj" for i in (0, 1)]
    read(Probe(model, points_of(model, values, 3), "projection"), rows, LAST)
    assert "model.layers.1.self_attn.v_proj" not in calls and "lm_head" not in calls


def test_leaves_no_hooks_behind_even_after_an_error() -> None:
    model = tiny.model("llama")
    probe = Probe(model, [last_query(model)])
    with pytest.raises(IndexError):
        read(probe, [[10**6]], LAST)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


LLAMA = tiny.model("llama")


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.sampled_from(["last", "each"]))
def test_the_tokens_that_a_signal_reads_in_a_padded_batch(lengths: list[int], token: Any) -> None:
    """Those that it reads of a prompt alone. Models attend to the first token of a text whatever it is, so it is left
    out of `each`, but a prompt of one token is read nevertheless."""
    rows = tiny.prompts(lengths, seed=sum(lengths))
    points, expected = queries(LLAMA, 0, 2), [[], []]  # type: ignore[var-annotated]
    for row in rows:
        states = LLAMA(input_ids=torch.tensor([row]), output_hidden_states=True).hidden_states
        first = {"last": len(row) - 1, "each": int(len(row) > 1)}[token]
        for found, point in zip(expected, points, strict=True):
            found.append(states[point.layer][0, first:])
    for found, wanted in zip(read(Probe(LLAMA, points), rows, reading(token)), expected, strict=True):
        same_tensor(found, torch.cat(wanted))


def test_points_of_modules_are_in_the_models_order_and_depth() -> None:
    modules = [f"model.layers.{i}.{name}" for i in (2, 1, 0) for name in ("mlp.up_proj", "self_attn.v_proj")]
    names = [point.name for point in points_of(LLAMA, [*modules, "lm_head"], 2)]
    assert names == ["0.self_attn.v_proj", "0.mlp.up_proj", "1.self_attn.v_proj", "1.mlp.up_proj"]


def test_a_model_without_a_known_query_says_what_it_has() -> None:
    model = tiny.model("llama")
    for layer in model.model.layers:
        layer.self_attn.mystery = layer.self_attn.q_proj
        del layer.self_attn.q_proj
    with pytest.raises(ModelError, match=r"no query projection among .*mystery.* of model.layers.2; use the sig"):
        last_query(model)


def test_the_text_model_is_found_inside_a_larger_one() -> None:
    """A vision tower as deep as the text model is not taken for it."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = LLAMA.config
            self.vision_tower = nn.ModuleDict({"layers": tiny.model("llama").model.layers})
            self.language_model = tiny.model("llama").model

    assert decoder_layers(Both())[0] == "language_model.layers"


def test_a_point_that_is_never_reached_is_an_error() -> None:
    model = tiny.model("llama")
    model.spare = nn.Linear(4, 4)
    with pytest.raises(ModelError, match="never reached spare"):
        read(Probe(model, [Point(0, "spare", "spare")]), tiny.prompts([3]), LAST)
