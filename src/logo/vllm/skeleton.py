"""The base model as transformers knows it, without its weights: module paths, shapes, and a sample of each weight from
the checkpoint, so that calibrations are cached under the local engine's digest where it has transformers' names."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from logo import models
from logo.errors import ModelError
from logo.identity import sampled
from logo.models import context_length, fetch, loading, stored
from logo.prompts import Prompts
from logo.selection.texts import WHOLE, Window

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class _Stored:
    """A tensor of the checkpoint: its file, a sample of its values, and its type there."""

    file: Path
    sample: Tensor
    dtype: torch.dtype


def prompts_of(model_config: Any, model: PreTrainedModel) -> Prompts:
    """What reads texts for the model of vLLM's `ModelConfig`, whose skeleton this is, as the local engine does."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_config.tokenizer, trust_remote_code=False)
    most: int = model_config.max_model_len
    return Prompts(tokenizer, min(context_length(model) or most, most))


def fitting(prompts: Prompts, window: Window, max_model_len: int) -> Prompts:
    """The same for texts that are cut to a window and run as probes, behind which vLLM generates one more token."""
    if window != WHOLE and sum(window) < max_model_len:
        return prompts
    most = max_model_len - 1
    return replace(prompts, context=min(prompts.context or most, most))


def skeleton(source: str, dtype: torch.dtype, revision: str | None = None) -> PreTrainedModel:
    """A causal LM on the meta device, in the dtype that the engine computes in; `source`: a folder, or a Hub repository
    whose files were fetched before. Each parameter has a function `read`, which reads it from the checkpoint, a
    `sample` of its values, and the type `stored` there; if the checkpoint lacks its name, there is no sample and no
    type, and `read` returns an empty tensor. The model then has a digest `others` of what the checkpoint has instead.
    ModelError: transformers does not know the model, or its files cannot be read."""
    import transformers

    folder = fetch(source, revision=revision)
    with loading(source, folder):
        model = models.skeleton(transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False), dtype)
        samples = _samples(Path(folder))
    names = set()
    tensor: Any  # gets attributes
    for name, tensor in stored(model):
        names.add(name)
        tensor.read = functools.partial(torch.empty, 0)
        if name in samples:
            computed = dtype if tensor.is_floating_point() else tensor.dtype
            tensor.stored = samples[name].dtype
            tensor.sample = samples[name].sample.to(computed).float()
            tensor.read = functools.partial(_tensor, samples[name].file, name, computed)
    if names - samples.keys():
        model.others = _others(Path(folder), {name: samples[name] for name in samples if name not in names})
    return model


def _others(folder: Path, samples: Mapping[str, _Stored]) -> bytes:
    """Digest of these tensors, such as those of quantised layers; without any, of the sizes and times of all files."""
    digest = hashlib.sha256()
    for name in sorted(samples):
        digest.update(f"{name} {samples[name].dtype}".encode() + samples[name].sample.numpy().tobytes())
    for file in [] if samples else sorted(file for file in folder.iterdir() if file.is_file()):
        about = file.stat()
        digest.update(f"{file.name} {about.st_size} {about.st_mtime_ns}".encode())
    return digest.digest()


def _samples(folder: Path) -> Mapping[str, _Stored]:
    """The tensors of the checkpoint, by name. Files are mapped into memory, so that little of them is read."""
    index = folder / _INDEX
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {_WEIGHTS}
    samples: dict[str, _Stored] = {}
    for path in sorted(folder / name for name in names if (folder / name).is_file()):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(key)
                samples[key] = _Stored(path, sampled(tensor), tensor.dtype)
    return samples


def _tensor(file: Path, name: str, dtype: torch.dtype) -> Tensor:
    try:
        with safe_open(file, framework="pt") as opened:
            return opened.get_tensor(name).to(dtype)  # type: ignore[no-any-return]
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file}: {name} cannot be read: {error}") from error
