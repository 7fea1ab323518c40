"""A text encoder as evidence: how similar prompts are to what is said about an adapter, read by a second, small model.

An encoder is any model that sentence-transformers loads. It reads the text that is probed. With the mean `m` of the
unit vectors of an adapter's example prompts and of its description,

    e_i(x) = cos(x, m_i)

in units of how much the similarities of ordinary texts to each other vary. `logo.selection.evidence` says how it
counts.
"""

from __future__ import annotations

import functools
import hashlib
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from logo.errors import ModelError, need
from logo.files import Store
from logo.hub import hub_error, is_hub_id
from logo.identity import sampled, tokenizer_digest
from logo.selection.evidence import Similarities
from logo.selection.examples import spread_of

DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
_BATCH = 64
_LORA_RETRIEVER = "Styxxxx/lora_retriever"  # LoraRetriever's own, an INSTRUCTOR model by another name
_OTHER_FRAMEWORKS = ["onnx/*", "openvino/*", "tf_model*", "flax_model*", "rust_model*"]
_turns = threading.Lock()  # tokenizers refuse a second thread

# A text -> its vector (d,), as an encoder has read it.
Embedded = Mapping[str, Tensor]
NO_TEXTS: Embedded = MappingProxyType({})


@dataclass(frozen=True)
class EncodedExamples:
    """The example prompts and descriptions of a pool's adapters as a text encoder reads them.

    Attributes:
        model: of `embed`.
        text_of: the text of token ids.
        centres: (adapters with such texts, d), unit vectors.
        known: (adapters,) bool, in pool order: those that have some.
        spread: the standard deviation of the similarities of ordinary texts to each other.
    """

    model: str
    text_of: Callable[[Sequence[int]], str]
    centres: Tensor
    known: Tensor
    spread: float = 1.0

    @classmethod
    def of(
        cls,
        model: str,
        text_of: Callable[[Sequence[int]], str],
        said: Sequence[Sequence[str]],
        ordinary: Sequence[str],
        store: Store,
    ) -> EncodedExamples | None:
        """From the texts that are said about each adapter, in pool order, and ordinary texts, all of them cut to the
        window; None if nothing is said of any adapter. What is read is kept in the store. Errors as `embed`."""
        known = torch.tensor([bool(texts) for texts in said])
        if not known.any():
            return None
        usual, *own = _stored(model, [ordinary, *filter(None, said)], store)
        store.release("encoded")
        centres = normalize(torch.stack([vectors.mean(dim=0) for vectors in own]), dim=1)
        return cls(model, text_of, centres, known, spread_of(usual[None]))

    def similarities(self, rows: Sequence[Sequence[int]], embedded: Embedded = NO_TEXTS) -> Similarities:
        """`e` of token ids that were cut to the window; errors as `embed`.

        Args:
            embedded: texts that this encoder has read already, as by `embed_by_text`; others are read now.
        """
        texts = [self.text_of(row) for row in rows]
        unread = [text for text in texts if text not in embedded]
        if unread:
            embedded = {**embedded, **embed_by_text(unread, self.model)}
        vectors = torch.stack([embedded[text] for text in texts])
        return Similarities(vectors @ self.centres.T / self.spread, self.known)


def embed_by_text(texts: Sequence[str], model: str) -> Embedded:
    """What an encoder reads of texts, all of them together; errors as `embed`."""
    distinct = list(dict.fromkeys(texts))
    return dict(zip(distinct, embed(distinct, model), strict=True)) if distinct else NO_TEXTS


def _stored(model: str, groups: Sequence[Sequence[str]], store: Store) -> list[Tensor]:
    """The embeddings (texts, d) of each group of texts, which the store keeps."""
    identity = encoder_digest(model)
    files = []
    for group in groups:
        content = json.dumps([identity, list(group)])
        files.append(f"encoded/{hashlib.sha256(content.encode()).hexdigest()[:24]}")
    missing = {file: group for file, group in zip(files, groups, strict=True) if not store.get(file)}
    if missing:
        vectors = embed([text for group in missing.values() for text in group], model)
        counts = [len(group) for group in missing.values()]
        for file, part in zip(missing, torch.split(vectors, counts), strict=True):
            store.put(file, {"vectors": part.clone()})
    return [store.get(file)["vectors"] for file in files]


def encoder_digest(model: str) -> str:
    """A digest of what an encoder's embeddings depend on: its weights, by samples, how its modules are configured
    (pooling, length, prompts), and its tokenizer. Errors as `embed`."""
    loaded = load_encoder(model)
    configured = (repr(loaded), loaded.max_seq_length, loaded.prompts, loaded.default_prompt_name)
    digest = hashlib.sha256(repr(configured).encode())
    digest.update(tokenizer_digest(loaded.tokenizer).encode())
    for name, tensor in loaded.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(sampled(tensor).numpy().tobytes())
    return digest.hexdigest()


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
    loaded = load_encoder(model, device)
    if any(getattr(module, "include_prompt", True) is False for module in loaded):
        instruction = instruction.strip()
        texts = [text.strip() for text in texts]
    with _turns, torch.no_grad():
        vectors: Tensor = loaded.encode(
            list(texts),
            prompt=instruction or None,
            batch_size=_BATCH,
            convert_to_tensor=True,
            show_progress_bar=False,
        )
    return normalize(vectors.float().cpu(), dim=-1)


@functools.lru_cache(maxsize=2)
def load_encoder(model: str, device: str = "cpu") -> Any:
    """The model that `embed` reads with, loaded once; errors as there."""
    need("a text encoder", "sentence_transformers")
    from sentence_transformers import SentenceTransformer

    folder = _fetch(model)
    try:
        loaded = SentenceTransformer(folder, device=device, local_files_only=True)
    except Exception as error:  # of any kind that transformers or the model's own files raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(
            f"text encoder {model!r} cannot be loaded: {reason[:300]}; expected a sentence-transformers model"
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
        raise ModelError(f"text encoder {model!r}: no such folder, and not a Hub id such as {DEFAULT_MODEL!r}")
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(repo_id, ignore_patterns=_OTHER_FRAMEWORKS)
    except Exception as error:  # httpx, xet and the file system each raise their own kinds
        raise hub_error(repo_id, error) from error
