"""Text embeddings by any sentence-transformers model, for the method `loraretriever`.

INSTRUCTOR models (arXiv 2212.09741) read an instruction before every text and leave its tokens out of the mean.
sentence-transformers does so only for three models that it knows by their Hub ids. Here a model counts as INSTRUCTOR if
its name says so, if it is LoraRetriever's own, or if its pooling was saved with `include_prompt: false`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from logo.errors import ModelError, need
from logo.hub import hub_error, is_hub_id

DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
_BATCH = 64
_LORA_RETRIEVER = "Styxxxx/lora_retriever"  # LoraRetriever's own, an INSTRUCTOR model by another name
_OTHER_FRAMEWORKS = ["onnx/*", "openvino/*", "tf_model*", "flax_model*", "rust_model*"]


def embed(texts: Sequence[str], model: str = DEFAULT_MODEL, instruction: str = "", device: str = "cpu") -> Tensor:
    """Embeds texts: (texts, d), float32 on the CPU, rows of length 1.

    Args:
        model: a Hub id or a folder. It is loaded once; a folder, or a model in the cache, needs no network.
        instruction: put before every text, for models that were trained with one. INSTRUCTOR models get both without
            blanks around them, as their own code does.
        device: where to compute.

    Raises:
        MissingLibrary: sentence-transformers is not installed.
        HubError: the model is not a folder, and cannot be fetched from the Hub.
        ModelError: it cannot be loaded.
    """
    loaded = _load(model, device)
    if _leaves_out_instructions(loaded):
        instruction, texts = instruction.strip(), [text.strip() for text in texts]
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
    need("retrieval by text", "sentence_transformers")
    from sentence_transformers import SentenceTransformer

    folder = fetch(model)
    try:
        loaded = SentenceTransformer(folder, device=device, local_files_only=True)
    except Exception as error:  # of any kind that transformers or the model's own files raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(
            f"embedding model {model!r} cannot be loaded: {reason[:300]}; expected a sentence-transformers model"
        ) from error
    # The library gets a folder, so it does not recognise even the INSTRUCTOR models that it knows by their ids.
    if model == _LORA_RETRIEVER or "instructor" in Path(model).name.lower():
        loaded.set_pooling_include_prompt(False)
    return loaded


def _leaves_out_instructions(loaded: Any) -> bool:
    return any(getattr(module, "include_prompt", True) is False for module in loaded)


def fetch(model: str) -> str:
    """The folder of a model; a model on the Hub is downloaded, unless it is in the cache.

    Raises:
        ModelError: the name is neither a folder nor a Hub id.
        HubError: the model cannot be fetched from the Hub.
    """
    if Path(model).is_dir():
        return model
    repo_id = model if "/" in model else f"sentence-transformers/{model}"
    if not is_hub_id(repo_id):
        raise ModelError(
            f"embedding model {model!r}: no such folder, and not a Hub id such as {DEFAULT_MODEL!r}; see "
            "--embedding-model"
        )
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(repo_id, ignore_patterns=_OTHER_FRAMEWORKS)
    except Exception as error:  # httpx, xet and the file system each raise their own kinds
        raise hub_error(repo_id, error) from error
