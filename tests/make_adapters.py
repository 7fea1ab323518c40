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
from pathlib import Path
from typing import Any

import peft
import torch
from hypothesis import HealthCheck
from hypothesis import settings as budget
from safetensors.torch import load_file, save_file
from torch import nn

import tiny
from logo.adapters.adapter import LoraWeights
from logo.adapters.peft import LoraModule
from logo.selection.index import ScoringIndex, Wanted, read_indices
from logo.selection.points import Point
from logo.selection.whitening import Whitening

# For properties that touch files: how long one example takes says nothing on a machine that does other work too.
calm = budget(deadline=None, suppress_health_check=[HealthCheck.too_slow])

CONFIG = "adapter_config.json"
SAFETENSORS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"

# What the tiny Llama of `tiny.py` has: module path -> (in, out).
Q, V = "self_attn.q_proj", "self_attn.v_proj"
LLAMA = {f"model.layers.{i}.{name}": (32, out) for i in range(3) for name, out in ((Q, 32), (V, 16))}
ONE_KEY = f"base_model.model.model.layers.0.{Q}.lora_A.weight"


def pair(
    path: str, in_features: int, out_features: int, rank: int = 4, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """lora_A (rank, in) and lora_B (out, rank) under PEFT's keys, without the `base_model.model.` in front."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{path}.lora_A.weight": torch.randn(rank, in_features, generator=generator).to(dtype),
        f"{path}.lora_B.weight": torch.randn(out_features, rank, generator=generator).to(dtype),
    }


def tensors(
    modules: Mapping[str, tuple[int, int]] = LLAMA, rank: int = 4, prefix: str = "base_model.model.", **how: Any
) -> dict[str, torch.Tensor]:
    """The weight file of an adapter on these modules."""
    return {
        prefix + key: tensor
        for path, (in_features, out_features) in modules.items()
        for key, tensor in pair(path, in_features, out_features, rank, **how).items()
    }


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


def cut(folder: Path, keep: float) -> Path:
    """Leaves only a part of the weight file, as a broken download does."""
    path = folder / SAFETENSORS
    os.truncate(path, int(path.stat().st_size * keep))
    return folder


def without(folder: Path, name: str) -> Path:
    (folder / name).unlink()
    return folder


def with_text(folder: Path, text: str) -> Path:
    (folder / CONFIG).write_text(text, encoding="utf-8")
    return folder


def two_adapters() -> dict[str, torch.Tensor]:
    named = {key.replace(".weight", ".first.weight"): value for key, value in tensors().items()}
    return named | {key.replace(".weight", ".second.weight"): value for key, value in tensors().items()}


def by_peft(**changes: Any) -> Callable[[Path], Path]:
    return lambda folder: write_peft(folder, **changes)


def by_hand(**changes: Any) -> Callable[[Path], Path]:
    return lambda folder: write(folder, **changes)


REFUSED: dict[str, Callable[[Path], Path]] = {
    # another kind of adapter
    "ia3": lambda f: write_peft(f, config=peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])),
    # settings that make it more than s B A
    "alora_of_nothing": by_hand(alora_invocation_tokens=[]),
    "arrow": by_hand(arrow_config={"top_k": 3}),
    "bdlora": by_hand(use_bdlora={"nblocks": 2}),
    "bias_all": lambda f: write_peft(f, tiny.model("qwen2"), bias="all"),
    "bias_lora_only": lambda f: write_peft(f, tiny.model("qwen2"), bias="lora_only"),
    "kasa": by_hand(kasa_config={"beta": 1e-4}),
    "layer_replication": by_peft(layer_replication=[[0, 2], [1, 3]]),
    "lora_bias": by_peft(lora_bias=True),
    "megatron": by_hand(megatron_config={"tensor_model_parallel_size": 1}),
    "monteclora": by_hand(monteclora_config={"num_samples": 4}),
    "qalora": by_hand(use_qalora=True),
    "target_parameters": by_peft(target_modules=[], target_parameters=["mlp.up_proj.weight"]),
    "trainable_tokens": by_peft(trainable_token_indices=[3, 4]),
    "velora": by_hand(velora_config={"rank": 1}),
    # initialisations that changed the base
    "corda": by_hand(init_lora_weights="corda", corda_config={"corda_method": "kpm"}),
    "lora_ga": by_hand(init_lora_weights="lora_ga"),
    "olora": by_peft(init_lora_weights="olora"),
    "pissa": by_peft(init_lora_weights="pissa"),
    # the same, where only the tensors tell
    "tensors_bias": lambda f: edit_config(write_peft(f, tiny.model("qwen2"), bias="lora_only"), bias="none"),
    "dora": by_hand(use_dora=True),
    "tensors_dora": lambda f: edit_config(write_peft(f, use_dora=True), use_dora=False),
    "tensors_lora_bias": lambda f: edit_config(write_peft(f, lora_bias=True), lora_bias=False),
    "tensors_tokens": lambda f: edit_config(
        write_peft(f, trainable_token_indices=[3]), trainable_token_indices=None
    ),
    "tensors_unknown": lambda f: edit_weights(write(f), lambda w: w.update({"hada_w1_a": torch.ones(2)})),
    # tensors that do not make an adapter
    "empty": by_hand(weights={}),
    "inf": lambda f: damage(write(f), float("-inf")),
    "integers": by_hand(weights={key: value.to(torch.int8) for key, value in tensors().items()}),
    "lonely_lora_A": lambda f: edit_weights(write(f), lambda w: w.pop(ONE_KEY.replace("lora_A", "lora_B"))),
    "nan": lambda f: damage(write(f), float("nan")),
    "rank_mismatch": by_hand(r=8),
    "shape_mismatch": lambda f: edit_weights(write(f), lambda w: w.update({ONE_KEY: torch.ones(3, 32)})),
    "twice": by_hand(weights=tensors() | tensors(prefix="")),
    "two_adapters": lambda f: write(f, two_adapters()),
    # files
    "config_list": lambda f: with_text(write(f), "[]"),
    "config_malformed": lambda f: with_text(write(f), '{"peft_type": "LORA", "r": 4'),
    "config_missing": lambda f: without(write(f), CONFIG),
    "pickled": lambda f: write_peft(f, save={"safe_serialization": False}),
    "weights_missing": lambda f: without(write(f), SAFETENSORS),
    "weights_truncated": lambda f: cut(write(f), 0.5),
}  # fmt: skip

# Opened from headers these look well; only reading the tensors shows what they are.
SEEN_WHEN_READ = frozenset({"inf", "integers", "nan"})


def write_drawer(root: Path, kinds: Iterable[str] = tuple(REFUSED)) -> Path:
    """One good adapter (`good`) and one of each refused kind, all below `root`."""
    write_peft(root / "good")
    for kind in kinds:
        REFUSED[kind](root / kind)
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


def index_of(factors: Iterable[tuple[torch.Tensor, torch.Tensor]], whitening: Whitening | None = None) -> ScoringIndex:
    """The scoring index of adapters with these `A (r, d)` and `B (out, r)`, without any file."""
    point = Point(0, "layer", "layer.module")
    adapters = [Loose(str(i), LoraWeights(a, b, 1.0)) for i, (a, b) in enumerate(factors)]
    [index] = read_indices([Wanted(adapters, point, torch.device("cpu"), whitening)])  # type: ignore[arg-type]
    return index


class Loose:
    """An adapter of one module whose tensors are in memory."""

    def __init__(self, name: str, weights: LoraWeights) -> None:
        self.name, self.file = name, name
        rank, in_features = weights.A.shape
        self.modules = {"layer.module": LoraModule("a", "b", rank, in_features, len(weights.B), weights.scaling)}
        self._weights = weights
        self.digest = name

    def read(self, modules: Iterable[str]) -> dict[str, LoraWeights]:
        return dict.fromkeys(modules, self._weights)
