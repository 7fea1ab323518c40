"""Writes adapters as plain PEFT folders; a folder appears complete or not at all."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from logo.adapters.files import CONFIG, SAFETENSORS
from logo.errors import LoGoError, StorageError, UsageError
from logo.folders import make_folder, sync_folder

if TYPE_CHECKING:
    from torch import Tensor

    from logo.adapters.format import LoraWeights


def check_new(folder: Path) -> None:
    """Raises UsageError if a folder cannot be written because something is there."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UsageError(f"{folder} exists already and is not an empty folder; name another one, or remove it")
    if folder.exists() and folder.samefile(os.curdir):
        raise UsageError(f"{folder} is the current folder, which cannot be replaced; name another one")


@contextmanager
def new_folder(folder: Path, what: str) -> Iterator[Path]:
    """A folder to write into; it becomes `folder` at the end of the block, and is removed if the block fails.

    Args:
        what: for messages, such as `the mixture`.

    Raises:
        UsageError: `folder` holds something already, or is the current one.
        StorageError: it cannot be written.
    """
    from safetensors import SafetensorError

    try:
        check_new(folder)
        target = folder.resolve()  # the target of a link is replaced, on its own disk
        make_folder(target.parent)
        part = target.with_name(f".{target.name}.part-{secrets.token_hex(8)}")
        part.mkdir()
        try:
            yield part
            for file in part.iterdir():
                with open(file, "rb+") as stream:
                    os.fsync(stream.fileno())
            sync_folder(part)
            os.replace(part, target)
        finally:
            shutil.rmtree(part, ignore_errors=True)  # it was renamed if all went well
        sync_folder(target.parent)
    except LoGoError:
        raise
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{what} cannot be written to {folder}: {error}") from error


def save_adapter(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, object]) -> None:
    """Writes one PEFT folder in place, which may exist; for use inside `new_folder`."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / SAFETENSORS, {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def plain_tensors(weights: Mapping[str, LoraWeights]) -> dict[str, Tensor]:
    """Factors under PEFT's keys; scales are left to the configuration."""
    return {
        f"base_model.model.{path}.lora_{side}.weight": tensor
        for path, one in weights.items()
        for side, tensor in (("A", one.A), ("B", one.B))
    }


def unscaled(ranks: Mapping[str, int]) -> dict[str, Any]:
    """Settings that give every module the scale 1, for ranks by module path."""
    [(rank, _)] = Counter(ranks.values()).most_common(1)
    others = {re.escape(path): found for path, found in ranks.items() if found != rank}
    return {
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "rank_pattern": others,
        "alpha_pattern": dict(others),
    }
