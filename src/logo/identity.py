"""Every digest: of files, adapters and pools, base models, tokenizers and settings; and versions of libraries.

What is computed is kept under digests of what it was computed from, never under names or paths. Of a base model a
sample of its weights is read, since reading a large one whole takes long.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from logo.files import cache_folder, read_cached, write_cached
from logo.models import stored, tensor_of
from logo.version import __version__

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

KEY_DIGITS = 16  # hexadecimal digits of an adapter's key, and of a pool's digest: 64 bits
_ELSEWHERE = frozenset({"_name_or_path", "transformers_version", "dtype", "torch_dtype"})  # of a configuration
_LAST_CALL = ("padding", "truncation")  # of a tokenizer
# Weights of each parameter, in the digest of weights and in that of calibrations.
_SAMPLE = 16
_CALIBRATED = 64
_GOLDEN = 0.6180339887498949  # whose multiples, without their whole parts, lie nowhere close together
_TEXT = "  It's 1,234 km  to Zürich\n\tand\u00a0back: e\u0301 \U0001f600"  # a text that tokenizers split differently

_SETTLED = 2e9  # ns after which a further change of a file gets another stamp on every file system
Stamp = tuple[int, int, int, int, int]
_known: dict[tuple[str, Stamp], str] = {}  # what was found out of the content of files, in this process


def content_stamp(path: str | os.PathLike[str]) -> Stamp:
    """Size, modification time, inode, change time and device of a file, by which a change is noticed. Writing changes
    the change time even if the modification time is set back, as `rsync --inplace --times` does."""
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns, stat.st_ino, stat.st_ctime_ns, stat.st_dev


def of_content(path: str | os.PathLike[str], what: str, find: Callable[[], str]) -> str:
    """What `find` says of a file's content, in one line, asked once by all processes until the file has changed."""
    stamp = content_stamp(path)
    now = time.time_ns()
    key = what, stamp
    if key in _known:
        return _known[key]
    folder = cache_folder(None)
    name = f"files/{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}"

    def written(file: Path) -> str:
        line = file.read_text()
        if not (line.startswith(f"{what} ") and line.endswith("\n")):
            raise ValueError(f"expected one line about {what}")
        return line[len(what) + 1 : -1]

    finding = None if folder is None else read_cached(folder / name, written)
    if finding is None:
        finding = find()
        if content_stamp(path) != stamp or now - max(stamp[1], stamp[3]) < _SETTLED:
            return finding  # it was written to meanwhile, or may have been without another stamp
        if folder is not None:
            write_cached(folder, name, f"{what} {finding}\n".encode())
    _known[key] = finding
    return finding


def file_sha256(path: str | os.PathLike[str]) -> str:
    """The hex digest that `sha256sum` prints for the file."""

    def find() -> str:
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()

    return of_content(path, "sha256", find)


def adapter_digest(weights: str, scales: Sequence[tuple[str, float]], tokens: Sequence[int], last: int | None) -> str:
    """The digest of what decides an adapter's effect: the digest of its weight file, path and scale of every module,
    sorted, and where it acts (`logo.adapters.activation`) unless that is everywhere."""
    where = f" {list(tokens)} {last}" if tokens or last is not None else ""
    return hashlib.sha256(f"{weights} {list(scales)}{where}".encode()).hexdigest()[:32]


def adapter_key(digest: str, said: bytes) -> str:
    """The short digest of an adapter with that of what is said about it, if anything, which decides selections, too."""
    if said:
        digest = hashlib.sha256(f"{digest} {hashlib.sha256(said).hexdigest()}".encode()).hexdigest()
    return digest[:KEY_DIGITS]


def pool_digest(keys: Iterable[tuple[str, str]]) -> str:
    """The digest of a pool from the names and keys of its adapters, in pool order."""
    lines = "".join(f"{len(name)} {name} {key}\n" for name, key in keys)
    return hashlib.sha256(lines.encode()).hexdigest()[:KEY_DIGITS]


def fingerprint(content: Mapping[str, object]) -> str:
    """The SHA-256 of a run's settings and data, in hex; values that JSON does not know count as text."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def library_versions() -> dict[str, str]:
    """The installed versions of libraries on which results depend, read without importing them, which takes seconds."""
    return {"logo": __version__, **{name: version(name) for name in ("torch", "transformers")}}


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """The SHA-256 of a tokenizer (vocabulary, merges, normaliser, added and special tokens), in hex."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        reads = tokenizer(_TEXT)["input_ids"]
        whole = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab(), "reads": reads}
    else:  # padding and truncation of the last call do not count
        whole = {key: value for key, value in json.loads(backend.to_str()).items() if key not in _LAST_CALL}
    return fingerprint({"tokenizer": whole, "special": tokenizer.special_tokens_map})


def template_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """The SHA-256 of how a tokenizer makes prompts of conversations and texts of answers, in hex."""
    settings = ("chat_template", "clean_up_tokenization_spaces")
    return fingerprint({name: getattr(tokenizer, name, None) for name in settings})


def config_digest(config: PretrainedConfig) -> str:
    """The SHA-256 of a base model's configuration, without its path and what is recorded elsewhere, in hex."""
    return fingerprint({"config": _without_elsewhere(config.to_dict())})


def _without_elsewhere(content: Any) -> Any:
    """The content without the keys in `_ELSEWHERE`, also in nested configurations of a multimodal model."""
    if not isinstance(content, Mapping):
        return content
    return {str(key): _without_elsewhere(value) for key, value in content.items() if key not in _ELSEWHERE}


def weights_digest(model: PreTrainedModel) -> str:
    """The digest of a few numbers of every stored tensor, also of offloaded ones; errors as `tensor_of`."""
    digest = hashlib.sha256()
    for name, _ in stored(model, shared=True):
        tensor = tensor_of(model, name)
        digest.update(f"{name} {tuple(tensor.shape)} ".encode() + sampled(tensor, _SAMPLE).numpy().tobytes())
    return digest.hexdigest()


def base_digest(model: nn.Module) -> str:
    """The digest of a base model by which calibrations are kept: its configuration, and a sample of its weights. vLLM's
    skeleton carries a `sample` of each tensor, and in `others` a digest of what else its checkpoint has."""
    config = model.config.to_dict()  # type: ignore[union-attr,operator]
    settings = {key: value for key, value in config.items() if key not in ("_name_or_path", "transformers_version")}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in stored(model):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        sample = getattr(tensor, "sample", None) if hasattr(tensor, "read") else sampled(tensor_of(model, name))
        if sample is not None:
            digest.update(sample.numpy().tobytes())
    digest.update(getattr(model, "others", b""))
    return digest.hexdigest()


def sampled(tensor: Tensor, count: int = _CALIBRATED) -> Tensor:
    """`count` numbers of a tensor, float32 on the CPU; of a tall matrix, such as embeddings, one of each row, since
    training may change a few rows.

    Each is drawn from a part of its own, at a place that differs from part to part: evenly spaced ones might all lie in
    one column.
    """
    import torch

    flat = tensor.detach().reshape(-1)
    if tensor.ndim == 2 and len(tensor) >= 4 * tensor.shape[1]:
        count = len(tensor)
    count = min(count, len(flat))
    parts = torch.arange(count, dtype=torch.float64)
    places = ((parts + (parts * _GOLDEN) % 1) * (len(flat) / max(1, count))).long()
    return flat[places.clamp(max=len(flat) - 1).to(flat.device)].to("cpu", torch.float32)
