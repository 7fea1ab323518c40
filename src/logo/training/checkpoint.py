"""Checkpoints of a group of learners. A checkpoint is replaced as a whole: after a crash, the old or the new one is
there.

    <folder>/state.json            the tasks, recipes and rows, and the progress of each task
    <folder>/tensors.safetensors   factors, moments of the optimisers, the best factors; by number of the learner
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from logo.errors import StorageError
from logo.folders import replace_folder

STATE, TENSORS = "state.json", "tensors.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """The state of a group at one step.

    Attributes:
        members: task name -> digest of everything that the adapter is made from (recipe, rows, base model).
        courses: task name -> progress, see `logo.training.learner.Course`.
        tensors: task name -> tensors, see `Learner.tensors`.
    """

    members: Mapping[str, str]
    courses: Mapping[str, Mapping[str, Any]]
    tensors: Mapping[str, Mapping[str, Tensor]]

    def without(self, names: Collection[str]) -> Checkpoint | None:
        """The checkpoint without some members; None if no member remains."""
        left = {name: digest for name, digest in self.members.items() if name not in names}
        return Checkpoint(left, self.courses, self.tensors) if left else None

    def joined(self, other: Checkpoint) -> Checkpoint:
        """A checkpoint with the members of both."""
        return Checkpoint(
            {**self.members, **other.members}, {**self.courses, **other.courses}, {**self.tensors, **other.tensors}
        )

    def write(self, folder: Path) -> None:
        """Replaces the checkpoint in the folder by this one.

        Raises:
            StorageError: it cannot be written; the earlier checkpoint is still there.
        """
        names = list(self.members)
        tensors = {
            f"{number}.{key}": tensor.contiguous().cpu()
            for number, name in enumerate(names)
            for key, tensor in self.tensors.get(name, {}).items()
        }
        state = {"members": dict(self.members), "courses": {name: dict(self.courses[name]) for name in names}}
        replace_folder(folder, {STATE: json.dumps(state, indent=1) + "\n", TENSORS: save(tensors)}, option="--out")


def forget(folder: Path) -> None:
    """Removes a checkpoint. The state file goes first, so that an interrupted removal leaves no valid checkpoint."""
    (folder / STATE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Reads the checkpoint in a folder.

    Raises:
        StorageError: it cannot be read.
    """
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        flat = load_file(folder / TENSORS)
        members = dict(state["members"])
        tensors: dict[str, dict[str, Tensor]] = {name: {} for name in members}
        names: Sequence[str] = list(members)
        for key, tensor in flat.items():
            number, _, rest = key.partition(".")
            tensors[names[int(number)]][rest] = tensor
        return Checkpoint(members, {name: state["courses"][name] for name in names}, tensors)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, IndexError) as error:
        reason = " ".join(str(error).split())
        raise StorageError(
            f"checkpoint {folder}: cannot be read ({reason}); remove it, and its tasks begin again"
        ) from error
