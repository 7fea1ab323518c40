"""What people are told of a pool: its model card and upload to the Hub, and the sizes of its updates.

Only safetensors adapters, their configurations and training records, `pool.json` and a model card are uploaded: no
pickles, no example prompts, no checkpoints, and no other files of the folder. Uploading, retries and tokens are
`huggingface_hub`'s.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from statistics import fmean
from typing import Any

from logo.adapters.activation import Activation, noted
from logo.adapters.adapter import Adapter, own_name
from logo.adapters.peft import CONFIG, NOTES, RECORD, SAFETENSORS
from logo.errors import HubError, UsageError
from logo.hub import clean_subfolder, hub_error, is_hub_id, is_repo_id

CARD = "README.md"
_MADE = "which picks and mixes the right adapters for every prompt:"  # tells our cards from others
_CARD = """---
{front}
---

# {title}

LoRA adapters for {bases}, in PEFT's format.

| adapter | rank | targets | parameters |
| --- | --- | --- | --- |
{rows}

With [LoGo](https://arxiv.org/abs/2511.07129), which picks and mixes the right adapters for every prompt:

```sh
logo generate "..." --base-model {base} --adapters {source}
```

One of them with PEFT:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(model, "{repo}", subfolder="{inside}")
```
"""


def contents_of(
    root: Path, adapters: Sequence[Adapter], repo: str, folder: str | None = None
) -> dict[str, Path | bytes]:
    """What is uploaded of a pool: path in the repository -> the file, or what is to be in it.

    Args:
        root: the folder of the pool. A card is made if it has no `README.md`.
        adapters: read from safetensors files.
        folder: in the repository; None: `{base}-loras-{name of the pool}`, as in the official collection.

    Raises:
        UsageError: the repository or the folder is not valid; no base model is known for the folder's name; a file
            beside adapters is a link out of the pool; or a `pool.json` that applies to an adapter is outside of it.
    """
    if not is_repo_id(repo):
        raise UsageError(f"{repo!r} is not a Hub repo id; expected namespace/name")
    bases = sorted({_base_model(adapter) for adapter in adapters} - {""})
    if folder is None:
        names = sorted({base.rsplit("/", 1)[-1] for base in bases})
        if len(names) != 1:
            several = f"several base models ({', '.join(names)})" if names else "no base model"
            raise UsageError(
                f"the adapters name {several}; give the folder to write with --path-in-repo ('.': the top)"
            )
        folder = f"{names[0]}-loras-{own_name(root)}"
    folder = clean_subfolder(repo, folder.strip("/"))
    read: list[Path] = []  # as an adapter
    beside = [root / CARD]  # what may be a link to anything
    for adapter in adapters:
        above = [home for home in (adapter.folder, *adapter.folder.parents) if home.is_relative_to(root)]
        notes = [home / NOTES for home in above if (home / NOTES).is_file()]
        if noted(adapter.folder, Activation(adapter.config.invocation), root) != adapter.activation:
            why = f"because of a {NOTES} in the folder above it, which is not uploaded: push that, or copy it here"
            raise UsageError(f"{adapter.folder} acts on {adapter.activation} {why}")
        read += [adapter.folder / CONFIG, adapter.folder / SAFETENSORS]
        beside += [*notes, adapter.folder / RECORD]
    homes = [root.resolve(), *(adapter.folder.resolve() for adapter in adapters)]
    # Links of the Hub's cache lead to its `blobs`.
    homes += [above.parent / "blobs" for home in homes for above in home.parents if above.name == "snapshots"]
    beside = [file for file in beside if file.is_file()]
    for file in beside:
        if not any(file.resolve().is_relative_to(home) for home in homes):
            raise UsageError(f"{file} is a link out of the pool; put the file itself there, or remove the link")
    files: dict[str, Path | bytes] = {file.relative_to(root).as_posix(): file for file in (*read, *beside)}
    if CARD not in files:
        files[CARD] = _card(adapters, root, repo, folder, bases).encode()
    return {"/".join(filter(None, (folder, file))): files[file] for file in sorted(files)}


def push(
    repo: str, contents: Mapping[str, Path | bytes], *, message: str, private: bool = False
) -> tuple[str, list[str]]:
    """Creates the repository if there is none, uploads what has changed, and returns the address and what was deleted.

    A `pool.json` that the pool does not have is deleted beside its adapters and in the folders above them: it says
    where they act. Other adapters stay as they are. The card is also uploaded to the top of the repository, where the
    Hub shows it, unless there is one. A `private` repository is made so, or has to be. Raises HubError if the Hub
    refuses or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(library_name="logo")
    [card] = [path for path in contents if PurePosixPath(path).name == CARD]
    folder = card.removesuffix(CARD).strip("/")
    try:
        api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.repo_info(repo).private:
            raise HubError(f"Hub repo {repo}: it exists and is public, but --private was given; nothing was sent")
        there = api.list_repo_files(repo)
        sent = dict(contents)
        if CARD not in there:
            sent[CARD] = contents[card]
        if card in there and isinstance(contents[card], bytes):  # a card that we have made replaces only its like
            with open(api.hf_hub_download(repo, card), encoding="utf-8") as file:
                if _MADE not in file.read():
                    del sent[card]
        notes = {str(home / NOTES) for path in contents for home in PurePosixPath(path).parents} - sent.keys()
        stale = [path for path in there if path in notes and PurePosixPath(path).is_relative_to(folder)]
        # Not `upload_folder`, which lists the folder itself and does not follow links.
        added = [CommitOperationAdd(path, content) for path, content in sent.items()]
        deleted = [CommitOperationDelete(path) for path in stale]
        api.create_commit(repo, [*added, *deleted], commit_message=message)
    except HubError:
        raise
    except Exception as error:  # the boundary: httpx, xet and the file system each raise their own kinds
        raise hub_error(repo, error) from error
    return f"{api.endpoint}/{repo}" + (f"/tree/main/{folder}" if folder else ""), stale


def _card(adapters: Sequence[Adapter], root: Path, repo: str, folder: str, bases: Sequence[str]) -> str:
    """The model card of a pool in Markdown with the Hub's front matter."""
    from huggingface_hub import ModelCardData

    base = bases[0] if len(bases) == 1 else "BASE_MODEL"
    relation: dict[str, Any] = {"base_model": base, "base_model_relation": "adapter"} if is_repo_id(base) else {}
    tags = ["lora", "peft", "lora-pool", "logo"]
    front = ModelCardData(library_name="peft", pipeline_tag="text-generation", tags=tags, **relation)
    rows = []
    for adapter in adapters:
        name = adapter.name.replace("|", "\\|")
        ranks = "/".join(map(str, adapter.ranks))
        rows.append(f"| `{name}` | {ranks} | {', '.join(adapter.targets)} | {adapter.parameters:,} |")
    inside = Path(folder, adapters[0].folder.relative_to(root)).as_posix()
    return _CARD.format(
        front=front.to_yaml(),
        title=own_name(root),
        bases=", ".join(f"`{name}`" for name in bases) or "the base model that they were trained on",
        rows="\n".join(rows),
        base=base,
        source="/".join(filter(None, (repo, folder))),
        repo=repo,
        inside="" if inside == "." else inside,
    )


def _base_model(adapter: Adapter) -> str:
    """The base model that an adapter names: a Hub id, or the last part of a local folder; may be empty."""
    named = (adapter.config.base_model or "").rstrip("/")
    # `hf_models`, the default folder of base models, makes paths that look like Hub ids.
    return named if is_hub_id(named) and not named.startswith("hf_models/") else named.rsplit("/", 1)[-1]


@dataclass(frozen=True)
class Size:
    """The size of an adapter: `‖ΔW‖_F` over all modules, and the mean effective rank of the updates that are not 0."""

    norm: float
    effective_rank: float


def size_of(adapter: Adapter) -> Size:
    """Decomposes the updates of an adapter. Raises AdapterError if it cannot be read.

    With `B = Q_B R_B` and `Aᵀ = Q_A R_A`, `ΔW = Q_B (s R_B R_Aᵀ) Q_Aᵀ`, so no matrix of ΔW's size is made. The
    effective rank of singular values σ is `exp(H)` with `H = -Σ q ln q` and `q = σ² / Σ σ²` (Roy and Vetterli, EUSIPCO
    2007, use σ instead of σ²), between 1 and the rank.
    """
    import torch

    energies: list[float] = []
    ranks: list[float] = []
    for weights in replace(adapter, copies={}).read().values():
        left = torch.linalg.qr(weights.B.double(), mode="r").R  # (p, r)
        right = torch.linalg.qr(weights.A.double().T, mode="r").R  # (q, r)
        squares = torch.linalg.svdvals(weights.scaling * left @ right.T) ** 2  # (min(p, q),)
        energy = float(squares.sum())
        energies.append(energy)
        if energy > 0:
            ranks.append(float(torch.special.entr(squares / energy).sum().exp()))
    return Size(math.sqrt(sum(energies)), fmean(ranks) if ranks else 0.0)
