"""Digests that identify a base model and its tokenizer, and versions of libraries.

The digest of a base model is that of a sample of its weights, which is enough to tell two models apart at no cost.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from logo import __version__
from logo.tensors import stored, tensor_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_ELSEWHERE = frozenset({"_name_or_path", "transformers_version", "dtype", "torch_dtype"})  # of a configuration
_SAMPLE = 16  # weights of each parameter
_TEXT = "  It's 1,234 km  to Zürich\n\tand\u00a0back: e\u0301 \U0001f600"  # a text that tokenizers split differently


def fingerprint(content: Mapping[str, object]) -> str:
    """The SHA-256 of a run's settings and data, in hex; values that JSON does not know count as text."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def library_versions() -> dict[str, str]:
    """The versions of libraries in this process on which results depend."""
    import torch
    import transformers

    return {"logo": __version__, "torch": str(torch.__version__), "transformers": transformers.__version__}


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """The SHA-256 of a tokenizer (vocabulary, merges, normaliser, added and special tokens), in hex."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        whole = json.loads(backend.to_str())
        # Padding and truncation of the last call do not count.
        whole = {key: value for key, value in whole.items() if key not in ("padding", "truncation")}
    else:
        reads = tokenizer(_TEXT)["input_ids"]
        whole = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab(), "reads": reads}
    return fingerprint({"tokenizer": whole, "special": tokenizer.special_tokens_map})


def config_digest(config: PretrainedConfig) -> str:
    """The SHA-256 of a base model's configuration, without its path and what is recorded elsewhere, in hex."""
    return fingerprint({"config": _said(config.to_dict())})


def _said(content: Any) -> Any:
    """The content without the keys in `_ELSEWHERE`, also in nested configurations of a multimodal model."""
    if not isinstance(content, Mapping):
        return content
    return {str(key): _said(value) for key, value in content.items() if key not in _ELSEWHERE}


def weights_digest(model: PreTrainedModel) -> str:
    """The digest of a few numbers of every stored tensor, also of offloaded ones.

    Raises:
        ModelError: a tensor is neither in memory nor where accelerate keeps what is offloaded.
    """
    import torch

    digest = hashlib.sha256()
    for name, _ in stored(model, shared=True):
        tensor = tensor_of(model, name)
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLE)][:_SAMPLE].to("cpu", torch.float32)
        digest.update(f"{name} {tuple(tensor.shape)} ".encode() + sample.numpy().tobytes())
    return digest.hexdigest()
