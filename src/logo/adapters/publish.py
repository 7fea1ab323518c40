"""What people are told of a pool: its model card and upload to the Hub, and the sizes of its updates.

Only safetensors adapters, their configurations and training records, `pool.json` and a model card are uploaded: no
pickles, no example prompts, no checkpoints, and no other files of the folder. Uploading, retries and tokens are
`huggingface_hub`'s.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from statistics import fmean
from typing import TYPE_CHECKING

from logo.adapters.adapter import Adapter, LoraWeights, own_name
from logo.adapters.peft import CONFIG, NOTES, RECORD, SAFETENSORS
from logo.errors import HubError, StorageError, UsageError
from logo.hub import causes, clean_subfolder, hub_error, is_hub_id, is_repo_id

if TYPE_CHECKING:
    from torch import Tensor

CARD = "README.md"
# Folders of checkpoints, as training tools name them.
_CHECKPOINT = re.compile(r"checkpoints?([-_.]?\d+)?", re.IGNORECASE)
_MODELS = "hf_models/"  # the default folder of base models; `hf_models/Qwen2.5-7B` looks like a Hub id but is none
_LOG_IN = "set HF_TOKEN to a token that may write, or run `hf auth login`"
_CHANGED = "it was changed meanwhile; run the same command again: what has arrived is not sent twice"
_REFUSALS = {
    401: f"the Hub does not accept this token, or there is none; {_LOG_IN}",
    403: f"this token may not write there; use another one: {_LOG_IN}",
    404: f"not found, and this token may not create it; check the name, and {_LOG_IN}",
    409: _CHANGED,
    412: _CHANGED,
    413: "the Hub refuses files of this size; see its limits on storage",
}


def contents_of(
    root: Path, adapters: Sequence[Adapter], repo: str, folder: str | None = None, licence: str | None = None
) -> dict[str, Path | bytes]:
    """What is uploaded of these adapters and their pool: path in the repository -> the file, or what is to be in it.

    A card is made if there is no `README.md`.

    Args:
        adapters: read from safetensors files.
        folder: None: `{base}-loras-{name of the pool}`, as in the official collection.
        licence: for a card that is made.

    Raises:
        UsageError: the repository or the folder is not valid; no base model is known for the folder's name; a
            file beside adapters is a link out of the pool or no JSON object; or a `pool.json` that applies to an
            adapter is outside of the pool.
    """
    if not is_repo_id(repo):
        raise UsageError(f"{repo!r} is not a Hub repo id; expected namespace/name")
    folder = clean_subfolder(repo, (_official(root, adapters) if folder is None else folder).strip("/"))
    homes = {adapter.name: _homes(adapter.folder, root) for adapter in adapters}
    beside = [root / CARD, *dict.fromkeys(home / NOTES for found in (*homes.values(), [root]) for home in found)]
    sent = [checked(file, root) for file in beside if file.is_file()]
    for adapter in adapters:
        if adapter.activation.last is not None and not homes[adapter.name]:
            raise UsageError(
                f"{adapter.folder} acts on {adapter.activation} because of a {NOTES} in the folder above it, which "
                f"would not be uploaded: push that folder, or copy its {NOTES} into this one"
            )
        # These two were read as an adapter. Other files may be links to anything, and are checked.
        sent += [adapter.folder / CONFIG, adapter.folder / SAFETENSORS]
        if (adapter.folder / RECORD).is_file():
            sent.append(checked(adapter.folder / RECORD, root, adapter.folder))
    found: dict[str, Path | bytes] = {file.relative_to(root).as_posix(): file for file in sent}
    if CARD not in found:
        found[CARD] = card_text(own_name(root), adapters, root, repo, folder, licence).encode()
    return {"/".join(filter(None, (folder, file))): found[file] for file in sorted(found)}


def stays_behind(name: str) -> bool:
    """Whether an adapter is not published: its folder, or one above it, is called as any training tool calls
    checkpoints. Opening a pool leaves out less."""
    return any(_CHECKPOINT.fullmatch(part) for part in name.split("/"))


def checked(file: Path, *homes: Path) -> Path:
    """Checks that a file beside adapters may be published with them, and returns it.

    Args:
        homes: folders in which it may be. Links of the Hub's cache may lead to the cache's `blobs`.

    Raises:
        UsageError: it is a link that leads out of these folders, or a `.json` without an object.
        StorageError: it cannot be read.
    """
    real = file.resolve()
    allowed = [home.resolve() for home in homes]
    allowed += [above.parent / "blobs" for one in allowed for above in one.parents if above.name == "snapshots"]
    if not any(real.is_relative_to(one) for one in allowed):
        raise UsageError(f"{file} is a link out of the pool, to {real}; put the file itself there, or remove the link")
    if file.suffix == ".json":
        try:
            right = isinstance(json.loads(file.read_text(encoding="utf-8")), dict)
        except OSError as error:
            raise StorageError(f"{file}: cannot be read ({error.strerror or error})") from error
        except (ValueError, RecursionError):
            right = False
        if not right:
            raise UsageError(f"{file}: expected a JSON object, found something else; fix or remove it")
    return file


def push(repo: str, contents: Mapping[str, Path | bytes], *, message: str, private: bool = False) -> str:
    """Creates the repository if there is none, uploads what has changed, and returns the address.

    The card is also uploaded to the top of the repository, where the Hub shows it, unless there is one.

    Args:
        contents: see `contents_of`.
        private: a new repository is private, and an existing one has to be.

    Raises:
        HubError: the Hub refuses, or cannot be reached; the message quotes no request and no response.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(library_name="logo")
    [card] = [path for path in contents if PurePosixPath(path).name == CARD]
    folder = card.removesuffix(CARD).strip("/")
    sent = dict(contents)
    try:
        api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.repo_info(repo).private:
            raise HubError(f"Hub repo {repo}: it exists and is public, but --private was given; nothing was sent")
        if folder and not api.file_exists(repo, CARD):
            sent[CARD] = sent[card]
        # Not `upload_folder`, which lists the folder itself and does not follow links.
        operations = [CommitOperationAdd(path, content) for path, content in sent.items()]
        api.create_commit(repo, operations, commit_message=message)
    except HubError:
        raise
    except Exception as error:  # the boundary: httpx, xet and the file system each raise their own kinds
        for link in causes(error):
            if isinstance(link, HfHubHTTPError) and (reason := _REFUSALS.get(link.response.status_code)):
                raise HubError(f"Hub repo {repo}: {reason}") from error
            if isinstance(link, ValueError) and "metadata" in str(link):
                raise HubError(f"Hub repo {repo}: the Hub does not accept the front matter of {CARD}") from error
        raise hub_error(repo, error) from error
    return f"{api.endpoint}/{repo}" + (f"/tree/main/{folder}" if folder else "")


def card_text(title: str, adapters: Sequence[Adapter], root: Path, repo: str, folder: str, licence: str | None) -> str:
    """The model card of a pool in Markdown with the Hub's front matter: its adapters, and how they are used."""
    from huggingface_hub import ModelCard, ModelCardData

    bases = _base_models(adapters)
    base = bases[0] if len(bases) == 1 else None
    on_hub = base if base is not None and is_repo_id(base) else None
    tags = ["lora", "peft", "lora-pool", "logo"]
    data = ModelCardData(
        base_model=on_hub, library_name="peft", pipeline_tag="text-generation", tags=tags, license=licence
    )
    if on_hub is not None:
        data["base_model_relation"] = "adapter"
    many = f"{len(adapters)} LoRA adapters" if len(adapters) != 1 else "One LoRA adapter"
    named = ", ".join(f"`{name}`" for name in bases) or "the base model that they were trained on"
    rows = ["| adapter | rank | targets | parameters |", "| --- | --- | --- | --- |"]
    for adapter in adapters:
        name, ranks = adapter.name.replace("|", "\\|"), "/".join(map(str, adapter.ranks))
        rows.append(f"| `{name}` | {ranks} | {', '.join(adapter.targets)} | {adapter.parameters:,} |")
    below = adapters[0].folder.relative_to(root).as_posix()  # `.` if the pool is this one adapter
    inside = "/".join(part for part in (folder, below) if part not in ("", "."))
    source, shown = "/".join(filter(None, (repo, folder))), base or "BASE_MODEL"
    return str(
        ModelCard(
            f"""---
{data.to_yaml()}
---

# {title}

{many} for {named}, in PEFT's format.

{chr(10).join(rows)}

With [LoGo](https://arxiv.org/abs/2511.07129), which picks and mixes the right adapters for every prompt:

```sh
logo generate "..." --base-model {shown} --adapters {source}
logo serve --base-model {shown} --adapters {source}
```

One of them with PEFT:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{shown}")
model = PeftModel.from_pretrained(model, "{repo}"{f', subfolder="{inside}"' if inside else ""})
```
"""
        )
    )


def _base_models(adapters: Sequence[Adapter]) -> list[str]:
    """The distinct base models that adapters name: Hub ids, or the last parts of local folders."""
    found: dict[str, str] = {}
    for name in sorted({adapter.config.base_model for adapter in adapters if adapter.config.base_model}):
        folder = name.rstrip("/")
        last = folder.rsplit("/", 1)[-1]
        on_hub = is_hub_id(folder) and not folder.startswith(_MODELS)
        if last.casefold() not in found or on_hub:
            found[last.casefold()] = folder if on_hub else last
    return sorted(found.values())


def _official(root: Path, adapters: Sequence[Adapter]) -> str:
    bases = {name.rsplit("/", 1)[-1] for name in _base_models(adapters)}
    if len(bases) != 1:
        found = f"several base models ({', '.join(sorted(bases))})" if bases else "no base model"
        raise UsageError(f"the adapters name {found}; give the folder to write with --path-in-repo ('.' for the top)")
    return f"{bases.pop()}-loras-{own_name(root)}"


def _homes(folder: Path, top: Path) -> list[Path]:
    """The folders from an adapter's up to the pool's that have a `pool.json`, the nearest first."""
    above = (folder, *folder.parents)
    inside = above[: above.index(top) + 1] if top in above else above[:1]
    return [home for home in inside if (home / NOTES).exists()]


# -- sizes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """The size of an adapter: `‖ΔW‖_F` over all modules, and the mean effective rank of the updates that are not 0."""

    norm: float
    effective_rank: float


def size_of(adapter: Adapter) -> Size:
    """Decomposes the updates of an adapter. Raises AdapterError if it cannot be read."""
    spectra = [singular_values(one) for one in adapter.read().values()]
    ranks = [effective_rank(values) for values in spectra if values.norm() > 0]
    return Size(math.hypot(*(float(values.norm()) for values in spectra)), fmean(ranks) if ranks else 0.0)


def singular_values(weights: LoraWeights) -> Tensor:
    """The singular values of an update, descending, float64: `(k,)` with k the smallest side of the factors.

    With `B = Q_B R_B` and `Aᵀ = Q_A R_A`, `ΔW = Q_B (s R_B R_Aᵀ) Q_Aᵀ`, so no matrix of ΔW's size is made.
    """
    import torch

    left = torch.linalg.qr(weights.B.double(), mode="r").R  # (p, r)
    right = torch.linalg.qr(weights.A.double().T, mode="r").R  # (q, r)
    values: Tensor = torch.linalg.svdvals(weights.scaling * left @ right.T)
    return values


def effective_rank(values: Tensor) -> float:
    """`exp(H)` with `H = -Σ q ln q` and `q = σ² / Σ σ²` (Roy and Vetterli, EUSIPCO 2007, use σ instead of σ²).

    It is between 1 and the rank; 0 for an update of zeros.
    """
    import torch

    energy = values.double() ** 2
    total = energy.sum()
    return float(torch.special.entr(energy / total).sum().exp()) if total > 0 else 0.0
