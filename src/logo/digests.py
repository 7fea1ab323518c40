"""Digests by which a base model and its tokenizer are known, wherever they were found, and versions of libraries.

What is recorded of a base model is a digest of a sample of its weights: enough to tell two models apart, at no cost.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from logo import __version__
from logo.errors import ModelError
from logo.models import hooks

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_ELSEWHERE = frozenset({"_name_or_path", "transformers_version", "dtype", "torch_dtype"})  # of a configuration
_SAMPLE = 16  # weights of each parameter
_TEXT = "  It's 1,234 km  to Zürich\n\tand\u00a0back: e\u0301 \U0001f600"  # of what tokenizers read differently


def fingerprint(content: Mapping[str, object]) -> str:
    """The SHA-256 of a run's settings and data, in hex; values that JSON does not know count as text."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def library_versions() -> dict[str, str]:
    """Versions that results depend on, in this process."""
    import torch
    import transformers

    return {"logo": __version__, "torch": str(torch.__version__), "transformers": transformers.__version__}


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of what a tokenizer makes of texts: vocabulary, merges, normaliser, added and special tokens; SHA-256 in hex."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        whole = json.loads(backend.to_str())
        # How the last call padded and cut, if it did.
        whole = {key: value for key, value in whole.items() if key not in ("padding", "truncation")}
    else:
        reads = tokenizer(_TEXT)["input_ids"]
        whole = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab(), "reads": reads}
    return fingerprint({"tokenizer": whole, "special": tokenizer.special_tokens_map})


def config_digest(config: PretrainedConfig) -> str:
    """Of a base model's configuration, without where it lies and what is recorded elsewhere; SHA-256 in hex."""
    return fingerprint({"config": _said(config.to_dict())})


def _said(content: Any) -> Any:
    """Configurations of parts, such as a multimodal model's, are cleaned too."""
    if not isinstance(content, Mapping):
        return content
    return {str(key): _said(value) for key, value in content.items() if key not in _ELSEWHERE}


def weights_digest(model: PreTrainedModel) -> str:
    """Of a few weights of every parameter, wherever they are kept: enough to tell two models apart, at no cost.

    Raises:
        ModelError: a parameter is neither in memory nor where accelerate keeps what is offloaded.
    """
    import torch

    digest = hashlib.sha256()
    for name, parameter in _weights(model):
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLE)][:_SAMPLE].to("cpu", torch.float32)
        digest.update(f"{name} {tuple(parameter.shape)} ".encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def _weights(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter by name, shared ones under each of their names; those that accelerate keeps on the host or on the
    disk until they are used are read there, as every forward pass does, and those that another process has, in the
    checkpoint."""
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.device.type != "meta":
            yield name, parameter
        else:
            yield name, parameter.read() if hasattr(parameter, "read") else _offloaded(modules, name)


def _offloaded(modules: Mapping[str, torch.nn.Module], name: str) -> torch.Tensor:
    parts = name.split(".")
    for cut in range(len(parts) - 1, -1, -1):  # the hook of the module itself, or of one that it is part of
        for hook in hooks(modules[".".join(parts[:cut])]):
            kept = getattr(hook, "weights_map", None)
            if kept is not None:
                with contextlib.suppress(KeyError):
                    found: torch.Tensor = kept[".".join(parts[cut:])]
                    return found
    raise ModelError(
        f"base model: weight {name} is not in memory, and accelerate does not keep it either; expected a model with "
        "all its weights"
    )
