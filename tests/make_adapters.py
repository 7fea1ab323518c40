"""Tiny PEFT folders: written by hand where a detail matters, by PEFT itself where it can make the kind.

`write_drawer` fills a folder with one good adapter and one of every kind that is refused, each named after its kind.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import tiny
from logo.adapters.adapter import LoraWeights
from logo.adapters.peft import LoraModule
from logo.selection.index import IndexRequest, ScoringIndex, read_indices
from logo.selection.points import Point
from logo.selection.whitening import Whitening

CONFIG = "adapter_config.json"
SAFETENSORS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"

# What the tiny Llama of `tiny.py` has: module path -> (in, out).
Q, V = "self_attn.q_proj", "self_attn.v_proj"
LLAMA = {f"model.layers.{i}.{name}": (32, out) for i in range(3) for name, out in ((Q, 32), (V, 16))}
ONE = f"model.layers.0.{Q}"
ONE_KEY = f"base_model.model.{ONE}.lora_A.weight"


def tensors(
    modules: Mapping[str, tuple[int, int]] = LLAMA,
    rank: int = 4,
    prefix: str = "base_model.model.",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:
    """The weight file of an adapter on these modules: lora_A (rank, in) and lora_B (out, rank) under PEFT's keys."""
    made = {}
    for path, (in_features, out_features) in modules.items():
        generator = torch.Generator().manual_seed(seed)
        for name, shape in (("lora_A", (rank, in_features)), ("lora_B", (out_features, rank))):
            made[f"{prefix}{path}.{name}.weight"] = torch.randn(shape, generator=generator).to(dtype)
    return made


def settings(**changes: Any) -> dict[str, Any]:
    """The least that makes an `adapter_config.json`, with changes."""
    return {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **changes}


def write(folder: Path, weights: Mapping[str, torch.Tensor] | None = None, **changes: Any) -> Path:
    """An adapter folder by hand; `changes` go into the configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(settings(**changes)), encoding="utf-8")
    save_file(dict(tensors() if weights is None else weights), folder / SAFETENSORS)
    return folder


def write_peft(
    folder: Path,
    base: nn.Module | None = None,
    config: peft.PeftConfig | None = None,
    save: Mapping[str, Any] | None = None,
    seed: int = 0,
    **changes: Any,
) -> Path:
    """An adapter folder as PEFT saves it, with random values in what starts as zero; `base` is changed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice about tiny and nameless models
        if config is None:
            kept = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
            config = peft.LoraConfig(**{**kept, **changes})
        wrapped = peft.get_peft_model(base if base is not None else tiny.model("llama"), config)
        torch.manual_seed(seed)
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_()
        wrapped.save_pretrained(folder, **(save or {}))
    return folder


def load_peft(folder: Path, base: nn.Module | None = None) -> nn.Module:
    """The base model with the adapter in it, as PEFT loads it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(base if base is not None else tiny.model("llama"), folder)


def lora_layers(wrapped: nn.Module) -> dict[str, nn.Module]:
    """PEFT's adapted modules by their path in the base model."""
    layers = wrapped.base_model.model.named_modules()
    return {path: module for path, module in layers if isinstance(module, peft.tuners.lora.LoraLayer)}


def edit_config(folder: Path, **changes: Any) -> Path:
    """Changes settings of an adapter that is there."""
    raw = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    (folder / CONFIG).write_text(json.dumps(raw | changes), encoding="utf-8")
    return folder


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """Changes the tensors of an adapter that is there."""
    weights = load_file(folder / SAFETENSORS)
    change(weights)
    save_file(weights, folder / SAFETENSORS)
    return folder


def damage(folder: Path, value: float) -> Path:
    """Puts one value where it should not be: an adapter that opens well and fails when it is read."""
    return edit_weights(folder, lambda weights: weights[ONE_KEY].view(-1).__setitem__(5, value))


def unsaid(base: str = "llama", off: Any = False, **on: Any) -> Callable[[Path], Path]:
    """An adapter whose configuration does not say what its tensors hold."""
    return lambda folder: edit_config(write_peft(folder, tiny.model(base), **on), **dict.fromkeys(on, off))


def edited(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], Path]:
    return lambda folder: edit_weights(write(folder), change)


def named(name: str) -> dict[str, torch.Tensor]:
    """The tensors of an adapter as they are called in the memory of a model that has several."""
    return {key.replace(".weight", f".{name}.weight"): value for key, value in tensors().items()}


# Each kind with how it is made, and what its refusal begins with.
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    # another kind of adapter
    "ia3": (
        lambda f: write_peft(f, config=peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])),
        'peft_type is "IA3"; only "LORA" adapters can be mixed',
    ),
    # settings that make it more than s B A
    "alora_of_nothing": (partial(write, alora_invocation_tokens=[]), "alora_invocation_tokens must be a list"),
    "arrow": (partial(write, arrow_config={"top_k": 3}), "it is an Arrow router"),
    "bdlora": (partial(write, use_bdlora={"nblocks": 2}), "BD-LoRA (use_bdlora)"),
    "bias_all": (lambda f: write_peft(f, tiny.model("qwen2"), bias="all"), 'bias is "all"'),
    "bias_lora_only": (lambda f: write_peft(f, tiny.model("qwen2"), bias="lora_only"), 'bias is "lora_only"'),
    "kasa": (partial(write, kasa_config={"beta": 1e-4}), "KaSA"),
    "layer_replication": (
        partial(write_peft, layer_replication=[[0, 2], [1, 3]]),
        "it replicates layers of the base model (layer_replication: [[0, 2], [1, 3]])",
    ),
    "lora_bias": (partial(write_peft, lora_bias=True), "it has a bias on lora_B (lora_bias)"),
    "megatron": (partial(write, megatron_config={"tensor_model_parallel_size": 1}), "it was trained on Megatron"),
    "monteclora": (partial(write, monteclora_config={"num_samples": 4}), "MonteCLoRA"),
    "qalora": (partial(write, use_qalora=True), "QALoRA (use_qalora)"),
    "target_parameters": (
        partial(write_peft, target_modules=[], target_parameters=["mlp.up_proj.weight"]),
        'it adapts raw parameters (target_parameters: ["mlp.up_proj.weight"])',
    ),
    "trainable_tokens": (partial(write_peft, trainable_token_indices=[3]), "it trains token embeddings (trainable_t"),
    "velora": (partial(write, velora_config={"rank": 1}), "VeLoRA"),
    # initialisations that changed the base
    "pissa": (partial(write_peft, init_lora_weights="pissa"), 'init_lora_weights is "pissa"'),
    # the same, where only the tensors tell
    "tensors_bias": (unsaid("qwen2", "none", bias="lora_only"), "it holds biases of the base model (base_model.model"),
    "dora": (partial(write, use_dora=True), "it is a DoRA adapter (use_dora)"),
    "tensors_dora": (unsaid(use_dora=True), f"it holds a DoRA magnitude (base_model.model.{ONE}.lora_mag"),
    "tensors_lora_bias": (unsaid(lora_bias=True), f"it has a bias on a LoRA factor (base_model.model.{ONE}.lora_B"),
    "tensors_tokens": (
        unsaid(off=None, trainable_token_indices=[3]),
        "it trains token embeddings (base_model.model.model.embed_tokens.token_adapter.tr",
    ),
    "tensors_unknown": (edited(lambda w: w.update({"hada": torch.ones(2)})), "tensor hada is neither lora_A nor lora"),
    # tensors that do not make an adapter
    "empty": (partial(write, weights={}), "the file holds no LoRA tensors"),
    "inf": (lambda f: damage(write(f), float("-inf")), f"tensor {ONE_KEY} holds Inf"),
    "integers": (
        partial(write, weights={key: value.to(torch.int8) for key, value in tensors().items()}),
        f"tensor {ONE_KEY} is stored as torch.int8; expected float16",
    ),
    "lonely_lora_A": (edited(lambda w: w.pop(ONE_KEY.replace("lora_A", "lora_B"))), f"module {ONE} has no lora_B"),
    "nan": (lambda f: damage(write(f), float("nan")), f"tensor {ONE_KEY} holds NaN"),
    "rank_mismatch": (partial(write, r=8), f"{CONFIG} gives rank 8 to module {ONE}, but its tensors have rank 4"),
    "shape_mismatch": (
        edited(lambda w: w.update({ONE_KEY: torch.ones(3, 32)})),
        f"module {ONE} has lora_A [3, 32] and lora_B [32, 4]; expected (r, in)",
    ),
    "twice": (
        partial(write, weights=tensors() | tensors(prefix="")),
        f"two tensors for one module: {ONE_KEY} and {ONE_KEY.removeprefix('base_model.model.')}",
    ),
    "two_adapters": (partial(write, weights=named("one") | named("two")), "the file holds several adapters (one, two)"),
    # files
    "config_list": (lambda f: (write(f) / CONFIG).write_text("[]"), f"{CONFIG} must hold an object, found list"),
    "config_malformed": (lambda f: (write(f) / CONFIG).write_text('{"r": 4'), f"{CONFIG} is not valid JSON"),
    "config_missing": (lambda f: (write(f) / CONFIG).unlink(), f"{CONFIG} is missing"),
    "pickled": (partial(write_peft, save={"safe_serialization": False}), f"its weights are pickled ({PICKLE}), and a"),
    "weights_missing": (lambda f: (write(f) / SAFETENSORS).unlink(), f"{SAFETENSORS} is missing"),
    "weights_truncated": (lambda f: os.truncate(write(f) / SAFETENSORS, 3000), f"{SAFETENSORS} cannot be read"),
}  # fmt: skip

# Opened from headers these look well; only reading the tensors shows what they are.
SEEN_WHEN_READ = frozenset({"inf", "integers", "nan"})


def write_drawer(root: Path, kinds: Iterable[str] = tuple(REFUSED)) -> Path:
    """One good adapter (`good`) and one of each refused kind, all below `root`."""
    write_peft(root / "good")
    for kind in kinds:
        make, _ = REFUSED[kind]
        make(root / kind)
    return root


@contextmanager
def everyones_folder() -> Iterator[Path]:
    """A folder that every user may enter (pytest's own may not be); gives rights back and removes it at the end."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    user = os.geteuid()
    try:
        yield folder
    finally:
        os.seteuid(user)
        for path in sorted(folder.rglob("*")):
            path.chmod(0o755)
        shutil.rmtree(folder)


def lock(path: Path, root: Path) -> None:
    """Takes all rights from `path`, opens everything else below `root` to everyone, and makes root nobody."""
    for file in root.rglob("*"):
        if file.is_file():
            file.chmod(0o644)  # safetensors saves for the owner only
    path.chmod(0)
    if os.geteuid() == 0:
        os.seteuid(65534)


def same_for(weights: LoraWeights, modules: Iterable[str]) -> dict[str, LoraWeights]:
    return dict.fromkeys(modules, weights)


def index_of(factors: Iterable[tuple[torch.Tensor, torch.Tensor]], whitening: Whitening | None = None) -> ScoringIndex:
    """The scoring index of adapters with these `A (r, d)` and `B (out, r)`, without any file."""
    point, adapters = Point(0, "layer", "layer.module"), list[Any]()
    for number, (a, b) in enumerate(factors):
        module = LoraModule("a", "b", *a.shape, len(b), 1.0)
        weights = LoraWeights(a, b, 1.0)
        name = dict.fromkeys(("name", "file", "digest"), str(number))
        adapters.append(SimpleNamespace(**name, modules={"layer.module": module}, read=partial(same_for, weights)))
    [index] = read_indices([IndexRequest(adapters, point, torch.device("cpu"), whitening)])
    return index
