"""Texts as vectors, by any sentence-transformers model: what retrieval compares prompts and adapters with."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from logo.errors import ModelError, UsageError

DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
_BATCH = 64


def embed(texts: Sequence[str], model: str = DEFAULT_MODEL, instruction: str = "", device: str = "cpu") -> Tensor:
    """(texts, d), float32 on the CPU, rows of length 1.

    Args:
        model: a Hub id or a folder. It is loaded once; a folder, or a model in the cache, needs no network.
        instruction: put before every text, for models that were trained with one.
        device: where to compute.

    Raises:
        UsageError: sentence-transformers is not installed.
        ModelError: the model cannot be loaded.
    """
    loaded = _load(model, device)
    with torch.no_grad():
        vectors: Tensor = loaded.encode(
            list(texts),
            prompt=instruction or None,
            batch_size=_BATCH,
            convert_to_tensor=True,
            show_progress_bar=False,
        )
    return torch.nn.functional.normalize(vectors.float().cpu(), dim=-1)


@functools.lru_cache(maxsize=1)
def _load(model: str, device: str) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise UsageError("retrieval by text needs sentence-transformers: install lora-on-the-go[eval]") from None
    try:
        return SentenceTransformer(model, device=device)
    except Exception as error:  # whatever the Hub's client, transformers or the model's own files raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(
            f"embedding model {model!r} cannot be loaded: {reason[:300]}. Expected a sentence-transformers model: "
            "a folder or a Hub id"
        ) from error
