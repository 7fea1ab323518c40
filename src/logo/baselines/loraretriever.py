"""`loraretriever` (arXiv 2402.09997): the adapters whose example prompts are most similar to a prompt, as texts."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from logo.baselines.method import Prepared, Task, ranked, register_method, text_of
from logo.core import Selection
from logo.errors import DataError, ModelError, listed, need
from logo.hub import hub_error, is_hub_id

if TYPE_CHECKING:
    from torch import Tensor

    from logo.engine import LoGo

DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
_BATCH = 64
_LORA_RETRIEVER = "Styxxxx/lora_retriever"  # LoraRetriever's own, an INSTRUCTOR model by another name
_OTHER_FRAMEWORKS = ["onnx/*", "openvino/*", "tf_model*", "flax_model*", "rust_model*"]


@register_method(needs="examples")
def loraretriever(
    logo: LoGo, task: Task, *, k: int = 3, embedding_model: str = DEFAULT_MODEL, instruction: str = ""
) -> Prepared:
    """The `k` adapters whose example prompts' mean embedding has the largest inner product with the prompt's, with
    equal weights; k=1 is LoraRetriever's selection of one. The mean is not normalised: it is short for an adapter of
    many kinds of prompts.

    Args:
        embedding_model: a Hub id or a folder of sentence-transformers.
        instruction: before every text, prompts and examples alike.

    Raises:
        DataError: an adapter has no example prompts.
        MissingLibrary, HubError, ModelError: as `embed`.
    """
    import torch

    names = task.candidates(logo)
    lacking = [name for name in names if not logo.pool[name].examples]
    if lacking:
        raise DataError(
            f"method 'loraretriever' compares prompts with the example prompts of every adapter, found none of "
            f"{listed(lacking, 5)}; give them some with `logo pool examples`"
        )
    device = str(logo.devices[0])
    means = [_mean(tuple(logo.pool[name].examples), embedding_model, instruction, device) for name in names]
    vectors = torch.stack(means)  # (pool, d)

    def select(prompts: Sequence[Any], batch_size: int) -> list[Selection]:
        texts = [text_of(prompt) for prompt in prompts]
        return [closest(row) for row in embed(texts, embedding_model, instruction, device) @ vectors.T]

    def closest(similarities: Tensor) -> Selection:
        order = torch.sort(similarities, descending=True, stable=True).indices[:k].tolist()
        scores = dict(zip(names, similarities.tolist(), strict=True))
        return ranked(dict.fromkeys((names[i] for i in order), 1 / len(order)), scores)

    return Prepared(select, {"embedding_model": embedding_model})


@functools.lru_cache(maxsize=2048)
def _mean(texts: tuple[str, ...], model: str, instruction: str, device: str) -> Tensor:
    """The mean embedding (d,) of texts; cached, since all datasets of a run use the same groups."""
    return embed(texts, model, instruction, device).mean(dim=0)


def embed(texts: Sequence[str], model: str = DEFAULT_MODEL, instruction: str = "", device: str = "cpu") -> Tensor:
    """Embeds texts: (texts, d), float32 on the CPU, rows of length 1.

    INSTRUCTOR models (arXiv 2212.09741) leave the tokens of an instruction out of the mean. sentence-transformers does
    so only for three models that it knows by their Hub ids; here a model counts as INSTRUCTOR if its name says so, if
    it is LoraRetriever's own, or if its pooling was saved with `include_prompt: false`.

    Args:
        model: a Hub id or a folder. It is loaded once; a folder, or a model in the cache, needs no network.
        instruction: put before every text. INSTRUCTOR models get both without blanks around them.

    Raises:
        MissingLibrary: sentence-transformers is not installed.
        HubError: the model is not a folder, and cannot be fetched from the Hub.
        ModelError: it cannot be loaded.
    """
    import torch

    loaded = _load(model, device)
    if any(getattr(module, "include_prompt", True) is False for module in loaded):
        instruction = instruction.strip()
        texts = [text.strip() for text in texts]
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

    folder = _fetch(model)
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


def _fetch(model: str) -> str:
    """The folder of a model; one of the Hub is downloaded, unless it is in the cache."""
    if Path(model).is_dir():
        return model
    repo_id = model if "/" in model else f"sentence-transformers/{model}"
    if not is_hub_id(repo_id):
        raise ModelError(f"embedding model {model!r}: no such folder, and not a Hub id such as {DEFAULT_MODEL!r}")
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(repo_id, ignore_patterns=_OTHER_FRAMEWORKS)
    except Exception as error:  # httpx, xet and the file system each raise their own kinds
        raise hub_error(repo_id, error) from error
