"""Files of first stages in the cache folder, one for each index.

<cache>/first-stage/<digest of the index>-<rank>.safetensors
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path, PurePosixPath

from safetensors.torch import load_file, save_file

from logo.cache import read_cached, write_cached
from logo.selection.first_stage import FirstStage
from logo.selection.index import ScoringIndex
from logo.selection.two_stage import FirstStages

# To be raised when the content of the files changes its meaning.
_FORMAT = 1
_MOST_FILES = 16


def first_stage_name(index: str, rank: int) -> str:
    """The name of the file of a first stage, from the name of its index."""
    return f"first-stage/{PurePosixPath(index).stem}-{rank}-{_FORMAT}.safetensors"


def keep_first_stages(folder: Path, name: str, stages: FirstStages) -> None:
    """Writes first stages to the cache folder, and removes the least recently used files of others."""
    tensors = {f"{at}.{key}": value for at, part in enumerate(stages.parts) for key, value in part.tensors.items()}
    if stages.estimated is not None:
        tensors["estimated"] = stages.estimated

    def write(part: str) -> None:
        save_file({key: value.contiguous() for key, value in tensors.items()}, part)

    write_cached(folder, name, write, _MOST_FILES)


def load_first_stages(file: Path, indices: Sequence[ScoringIndex]) -> FirstStages | None:
    """The first stages that a file holds for these indices; None if there is no file or it cannot be used."""

    def read(file: Path) -> FirstStages:
        tensors = load_file(file)
        parts = []
        for at, index in enumerate(indices):
            part = FirstStage(**{field.name: tensors[f"{at}.{field.name}"] for field in fields(FirstStage)})
            if len(part) != len(index):
                raise ValueError(f"{len(part)} adapters where the index has {len(index)}")
            parts.append(part)
        return FirstStages(tuple(parts), tensors.get("estimated"))

    return read_cached(file, read, used=True)
