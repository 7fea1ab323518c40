"""A PEFT folder as an `Adapter`: equal to what PEFT loads from it, or refused in one line that says why."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st
from safetensors.torch import save_file

import tiny
from logo.adapters.adapter import open_adapter
from logo.adapters.layout import BaseLayout
from logo.adapters.peft import module_path
from logo.errors import AdapterError
from make_adapters import (
    CONFIG,
    LLAMA,
    ONE_KEY,
    PICKLE,
    REFUSED,
    SAFETENSORS,
    SEEN_WHEN_READ,
    Q,
    V,
    calm,
    damage,
    everyones_folder,
    load_peft,
    lock,
    lora_layers,
    tensors,
    write,
    write_drawer,
    write_peft,
)
from tolerances import same_tensor

# What each refusal has to say, besides the name.
REASONS = {
    "ia3": 'peft_type is "IA3"; only "LORA" adapters can be mixed',
    "alora_of_nothing": "alora_invocation_tokens must be a list",
    "arrow": "it is an Arrow router",
    "bdlora": "BD-LoRA (use_bdlora)",
    "bias_all": 'bias is "all"',
    "bias_lora_only": 'bias is "lora_only"',
    "kasa": "KaSA",
    "layer_replication": "it replicates layers of the base model (layer_replication: [[0, 2], [1, 3]])",
    "lora_bias": "it has a bias on lora_B (lora_bias)",
    "megatron": "it was trained on Megatron layers",
    "monteclora": "MonteCLoRA",
    "qalora": "QALoRA (use_qalora)",
    "target_parameters": 'it adapts raw parameters (target_parameters: ["mlp.up_proj.weight"])',
    "trainable_tokens": "it trains token embeddings (trainable_token_indices)",
    "velora": "VeLoRA",
    "corda": 'init_lora_weights is "corda"',
    "lora_ga": 'init_lora_weights is "lora_ga"',
    "olora": 'init_lora_weights is "olora"',
    "pissa": 'init_lora_weights is "pissa"',
    "tensors_bias": "it holds biases of the base model (base_model.model.model.layers.0.self_attn.q_proj.base_layer",
    "dora": "it is a DoRA adapter (use_dora)",
    "tensors_dora": "it holds a DoRA magnitude (base_model.model.model.layers.0.self_attn.q_proj.lora_mag",
    "tensors_lora_bias": "it has a bias on a LoRA factor (base_model.model.model.layers.0.self_attn.q_proj.lora_B",
    "tensors_tokens": "it trains token embeddings (base_model.model.model.embed_tokens.token_adapter.tr",
    "tensors_unknown": "tensor hada_w1_a is neither lora_A nor lora_B",
    "empty": "the file holds no LoRA tensors",
    "inf": f"tensor {ONE_KEY} holds Inf",
    "integers": f"tensor {ONE_KEY} is stored as torch.int8; expected float16",
    "lonely_lora_A": "module model.layers.0.self_attn.q_proj has no lora_B tensor",
    "nan": f"tensor {ONE_KEY} holds NaN",
    "rank_mismatch": f"{CONFIG} gives rank 8 to module model.layers.0.self_attn.q_proj, but its tensors have rank 4",
    "shape_mismatch": "module model.layers.0.self_attn.q_proj has lora_A [3, 32] and lora_B [32, 4]; expected (r, in)",
    "twice": f"two tensors for one module: {ONE_KEY} and {ONE_KEY.removeprefix('base_model.model.')}",
    "two_adapters": "the file holds several adapters (first, second)",
    "config_list": f"{CONFIG} must hold an object, found list",
    "config_malformed": f"{CONFIG} is not valid JSON",
    "config_missing": f"{CONFIG} is missing",
    "pickled": f"its weights are pickled ({PICKLE}), and a pickle can run code",
    "weights_missing": f"{SAFETENSORS} is missing",
    "weights_truncated": f"{SAFETENSORS} cannot be read",
}


@pytest.fixture(scope="session")
def drawer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_drawer(tmp_path_factory.mktemp("drawer"))


def refusal(folder: Path, name: str | None = None, **options: Any) -> AdapterError:
    """The error that opening and reading the folder ends in; always one line that begins with the name."""
    with pytest.raises(AdapterError) as caught:
        open_adapter(folder, name, **options).read()
    error = caught.value
    assert error.name == (name if name is not None else folder.name)
    assert str(error) == f"adapter {error.name!r}: {error.reason}"
    assert len(str(error).splitlines()) == 1
    return error


# ---- refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", REFUSED)
def test_each_kind_that_cannot_be_mixed_is_refused_with_its_reason(drawer: Path, kind: str) -> None:
    assert refusal(drawer / kind).reason.startswith(REASONS[kind])
    if kind in SEEN_WHEN_READ:  # others are refused when they are opened
        open_adapter(drawer / kind)
    else:
        with pytest.raises(AdapterError):
            open_adapter(drawer / kind)


# ---- accepted: the same modules, factors and scales as PEFT ---------------------------------------------------------

ACCEPTED: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "rslora": ("llama", {"use_rslora": True}),
    "layers_pattern": ("llama", {"layers_to_transform": [0, 2], "layers_pattern": "layers"}),
    "regex": ("llama", {"target_modules": r".*\.(0|2)\.self_attn\.(q|o)_proj"}),
    "all_linear": ("llama", {"target_modules": "all-linear"}),
    "lm_head": ("llama", {"target_modules": ["lm_head", "q_proj"], "save": {"save_embedding_layers": False}}),
    "ranks": ("llama", {"target_modules": "all-linear", "rank_pattern": {r"layers\.1\..*": 3, "mlp.*": 2}}),
    "scales": ("llama", {"alpha_pattern": {"layers.2.self_attn.q_proj": 3, "v_proj": 5}, "use_rslora": True}),
    "gaussian": ("llama", {"init_lora_weights": "gaussian"}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "fused": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"]}),
    "gpt_neox": ("gpt_neox", {"target_modules": ["query_key_value"]}),
    "with_biases": ("qwen2", {"target_modules": ["q_proj", "k_proj"]}),
}  # fmt: skip


@pytest.mark.parametrize("kind", ACCEPTED)
def test_what_is_read_is_what_peft_loads(tmp_path: Path, kind: str) -> None:
    base, changes = ACCEPTED[kind]
    write_peft(tmp_path, tiny.model(base), **changes)
    layers = lora_layers(load_peft(tmp_path, tiny.model(base)))
    adapter = open_adapter(tmp_path).fit(BaseLayout.of(tiny.model(base)))
    weights = adapter.read()
    assert set(adapter.modules) == set(layers) == set(weights)
    for path, layer in layers.items():
        assert adapter.modules[path].rank == layer.r["default"]
        assert weights[path].scaling == layer.scaling["default"]
        assert torch.equal(weights[path].A, layer.lora_A["default"].weight)
        assert torch.equal(weights[path].B, layer.lora_B["default"].weight)
        delta = weights[path].scaled_b() @ weights[path].A  # (out, in)
        expected = layer.get_delta_weight("default")
        same_tensor(delta.T if layer.fan_in_fan_out else delta, expected)
    assert adapter.config.unknown == ()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tensors_keep_the_type_they_are_stored_in_and_scale_in_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    stored = tensors(dtype=dtype)
    adapter = open_adapter(write(tmp_path, stored, lora_alpha=3))
    weights = adapter.read()[f"model.layers.0.{Q}"]
    assert weights.A.dtype == weights.B.dtype == dtype
    assert torch.equal(weights.A, stored[ONE_KEY])
    assert weights.scaled_b().dtype == torch.float32
    assert torch.equal(weights.scaled_b(), stored[ONE_KEY.replace("lora_A", "lora_B")].float() * 0.75)


# ---- keys -----------------------------------------------------------------------------------------------------------

PATH = f"model.layers.0.{Q}"
VARIANTS = {
    "peft": f"base_model.model.{PATH}.lora_A.weight",
    "in memory": f"base_model.model.{PATH}.lora_A.default.weight",
    "adapter name with dots": f"base_model.model.{PATH}.lora_A.flanv2.wmt16.weight",
    "no prefix": f"{PATH}.lora_A.weight",
    "compiled": f"_orig_mod.base_model.model.{PATH}.lora_A.weight",
    "compiled module": f"base_model.model.{PATH}._orig_mod.lora_A.weight",
    "fsdp": f"base_model.model._fsdp_wrapped_module.model.layers.0._fsdp_wrapped_module.{Q}.lora_A.weight",
    "base_layer": f"base_model.model.{PATH}.base_layer.lora_A.weight",
    "base_layer inside": "base_model.model.model.layers.0.self_attn.base_layer.q_proj.lora_A.weight",
}


@pytest.mark.parametrize("key", VARIANTS.values(), ids=VARIANTS)
def test_wrappers_that_training_tools_leave_in_keys_are_removed(tmp_path: Path, key: str) -> None:
    a, b = tensors({PATH: (32, 32)}, prefix="").values()
    adapter = open_adapter(write(tmp_path, {key: a, key.replace("lora_A", "lora_B"): b}))
    assert set(adapter.fit(BaseLayout.of(tiny.model("llama"))).modules) == {PATH}
    assert torch.equal(next(iter(adapter.read().values())).A, a)


WRAPPERS = st.lists(st.sampled_from(["_orig_mod", "_fsdp_wrapped_module", "base_layer"]), max_size=2)


@calm
@given(st.data())
def test_wrappers_anywhere_leave_the_path(data: st.DataObject) -> None:
    segments = PATH.split(".")
    front = data.draw(st.sampled_from(["", "base_model.model.", "_orig_mod.base_model.model."]))
    wrapped = [part for segment in segments for part in (segment, *data.draw(WRAPPERS))]
    assert module_path(front + ".".join(wrapped)) == PATH


@pytest.mark.parametrize(
    "shape_a, shape_b",
    [((4, 32, 1), (32, 4)), ((4, 32), (32, 4, 1, 1)), ((0, 32), (32, 0)), ((4,), (4,)), ((32, 4), (32, 4))],
    ids=["3-D", "convolution", "rank 0", "1-D", "transposed"],
)
def test_factors_of_other_shapes_are_refused_with_both(
    tmp_path: Path, shape_a: tuple[int, ...], shape_b: tuple[int, ...]
) -> None:
    key_b = ONE_KEY.replace("lora_A", "lora_B")
    folder = write(tmp_path / "a", {ONE_KEY: torch.ones(shape_a), key_b: torch.ones(shape_b)})
    assert f"has lora_A {list(shape_a)} and lora_B {list(shape_b)}; expected" in refusal(folder).reason


# ---- files ----------------------------------------------------------------------------------------------------------


@budget(calm, max_examples=60)
@given(st.data())
def test_a_damaged_file_is_refused_in_one_line_or_still_an_adapter(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp() / "damaged"
    write(folder, tensors({PATH: (32, 32)}))
    content = bytearray((folder / SAFETENSORS).read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=3)):
        content[place] ^= data.draw(st.integers(1, 255))
    (folder / SAFETENSORS).write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        weights = open_adapter(folder).read()
    except AdapterError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert all(bool(w.A.isfinite().all() and w.B.isfinite().all()) for w in weights.values())


@pytest.fixture
def shared() -> Iterator[Path]:
    with everyones_folder() as folder:
        yield folder


@pytest.mark.parametrize("locked", [CONFIG, SAFETENSORS, "."])
def test_what_may_not_be_read_is_refused(shared: Path, locked: str) -> None:
    folder = write(shared / "a")
    open_adapter(folder).read()  # imports everything before rights are gone
    lock(folder / locked, shared)
    assert "ermission denied" in refusal(folder).reason


def test_a_file_that_is_gone_when_it_is_needed_is_refused(tmp_path: Path) -> None:
    adapter = open_adapter(write(tmp_path / "a"))
    shutil.rmtree(tmp_path / "a")
    for use in (adapter.read, lambda: adapter.sha256):
        with pytest.raises(AdapterError, match=rf"adapter 'a': {SAFETENSORS} cannot be read: No such file") as caught:
            use()
        assert len(str(caught.value).splitlines()) == 1


def test_reading_some_modules_reads_only_those(tmp_path: Path) -> None:
    adapter = open_adapter(damage(write(tmp_path), float("nan")))
    other = f"model.layers.0.{V}"
    assert set(adapter.read([other])) == {other}
    with pytest.raises(AdapterError, match="holds NaN"):
        adapter.read([PATH])


# ---- pickles --------------------------------------------------------------------------------------------------------


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.mark}",)


def pickled(folder: Path, content: object) -> Path:
    write(folder)
    (folder / SAFETENSORS).unlink()
    torch.save(content, folder / PICKLE)
    return folder


def test_a_pickle_is_read_when_it_is_allowed(tmp_path: Path) -> None:
    write_peft(tmp_path, save={"safe_serialization": False})
    adapter = open_adapter(tmp_path, allow_pickle=True)
    weights = adapter.read()
    for path, layer in lora_layers(load_peft(tmp_path)).items():
        assert torch.equal(weights[path].A, layer.lora_A["default"].weight)
    assert adapter.sha256 == hashlib.sha256((tmp_path / PICKLE).read_bytes()).hexdigest()
    write(tmp_path)  # safetensors win over a pickle beside them
    (tmp_path / PICKLE).write_bytes(b"never read")
    assert set(open_adapter(tmp_path, allow_pickle=True).read()) == set(LLAMA)


def test_what_is_verified_is_what_was_opened(tmp_path: Path) -> None:
    """A verdict of what is in the file now says nothing of what was in it, nor of a pickle in memory."""
    for name, file in (("plain", "adapter_model.safetensors"), ("pickled", "adapter_model.bin")):
        folder = write(tmp_path / name, tensors())
        bad = {key: torch.full_like(tensor, torch.nan) for key, tensor in tensors().items()}
        if name == "pickled":
            (folder / "adapter_model.safetensors").unlink()
            torch.save(bad, folder / file)
        adapter = open_adapter(folder, allow_pickle=True)
        if name == "pickled":
            torch.save(tensors(), folder / file)
            with pytest.raises(AdapterError, match="holds NaN"):
                adapter.verify()
            continue
        save_file(bad, folder / file)
        with pytest.raises(AdapterError, match="it has changed since it was opened"):
            adapter.verify()
        (folder / file).unlink()
        with pytest.raises(AdapterError, match="No such file"):
            adapter.verify()


def test_invocation_tokens_are_tokens_of_the_base_model(tmp_path: Path) -> None:
    adapter = open_adapter(write(tmp_path, tensors(), alora_invocation_tokens=[10**6]))
    with pytest.raises(AdapterError, match=r"its invocation tokens are \[1000000\]; the base model knows \d+ tokens"):
        adapter.fit(BaseLayout.of(tiny.model("llama")))


def test_a_pickle_that_runs_code_does_not_run_and_nobody_is_told_how_to(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    folder = pickled(tmp_path / "evil", tensors() | {"x": Evil(mark)})
    reason = refusal(folder, allow_pickle=True).reason
    assert (
        reason == f"{PICKLE} cannot be read: it holds objects other than tensors, or is damaged; no code in it was run"
    )
    assert not mark.exists()
    torch.load(folder / PICKLE, weights_only=False)
    assert mark.exists()  # so the trap was a real one


@pytest.mark.parametrize(
    "content",
    [
        list(tensors().values()),
        {1: torch.ones(2)},
        {"step": 3},
        {"model": tensors()},
        {key: value.to_sparse() for key, value in tensors().items()},
    ],
    ids=["list", "number key", "number", "nested", "sparse"],
)
def test_a_pickle_of_something_else_is_refused(tmp_path: Path, content: object) -> None:
    reason = refusal(pickled(tmp_path / "a", content), allow_pickle=True).reason
    assert reason == f"{PICKLE} cannot be read: not a dictionary of dense tensors by name"


def test_a_file_that_was_replaced_is_not_read_with_the_old_scale(tmp_path: Path) -> None:
    adapter = open_adapter(write(tmp_path, lora_alpha=8))
    adapter.read()
    write(tmp_path, tensors(seed=3), lora_alpha=16)
    with pytest.raises(AdapterError, match="has changed since it was opened; open the pool again"):
        adapter.read()
    assert open_adapter(tmp_path).read()[PATH].scaling == 4


def test_the_digest_is_never_that_of_a_later_file(tmp_path: Path) -> None:
    adapter = open_adapter(write(tmp_path))
    write(tmp_path, tensors(seed=3))
    with pytest.raises(AdapterError, match="has changed since it was opened; open the pool again"):
        assert adapter.sha256


def test_the_digest_of_a_pickle_is_that_of_the_tensors_that_were_read(tmp_path: Path) -> None:
    adapter = open_adapter(pickled(tmp_path, tensors()), allow_pickle=True)
    content, before = (tmp_path / PICKLE).read_bytes(), adapter.read()[PATH]
    torch.save(tensors(seed=3), tmp_path / PICKLE)
    assert torch.equal(adapter.read()[PATH].B, before.B)
    assert adapter.sha256 == hashlib.sha256(content).hexdigest()  # a calibration would be kept under another one's


# ---- names ----------------------------------------------------------------------------------------------------------


def test_a_link_has_a_name_of_its_own(tmp_path: Path) -> None:
    write(tmp_path / "run7")
    (tmp_path / "best").symlink_to("run7")
    assert open_adapter(tmp_path / "best").name == open_adapter(tmp_path / "run7" / ".." / "best").name == "best"


def test_a_git_lfs_pointer_is_called_what_it_is(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / SAFETENSORS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "is a Git LFS pointer" in refusal(tmp_path).reason
