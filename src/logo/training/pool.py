"""The files that training writes: adapters in PEFT's format, and a record of what each was made from.

POOL/<task>/adapter_config.json, adapter_model.safetensors     in PEFT's format
POOL/<task>/training.json     recipe, digests of rows and base model, losses: what the adapter was made from
POOL/pool.json                the records of all adapters, and versions
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save
from torch import Tensor

from logo.adapters.activation import Activation
from logo.adapters.config import Refusal, read_config
from logo.adapters.examples import examples_sha256, write_examples
from logo.adapters.files import CONFIG, EXAMPLES, NOTES, RECORD, SAFETENSORS
from logo.adapters.notes import ADAPTERS, BEFORE, CHANGES, noted, read_notes
from logo.adapters.weights import file_sha256
from logo.errors import StorageError, UsageError
from logo.folders import replace_file, replace_folder
from logo.training.learner import DIVERGED, Course

if TYPE_CHECKING:
    from peft import LoraConfig

WRITTEN = "examples_sha256"  # in an adapter's record: the digest of the example prompts that training wrote beside it
TOKENS = "invocation_tokens"  # in an adapter's record: the tokens from which on it acts


def write_adapter(folder: Path, factors: Mapping[str, Tensor], config: LoraConfig, record: Mapping[str, Any]) -> None:
    """Writes an adapter, completely or not at all. Example prompts that an earlier training wrote are removed.

    Args:
        factors: by PEFT's names.
        config: the PEFT configuration.
        record: the record of what it was made from.

    Raises:
        StorageError: it cannot be written.
    """
    tensors = {name: tensor.contiguous().cpu() for name, tensor in factors.items()}
    replace_folder(
        folder,
        {
            CONFIG: _written(config),
            SAFETENSORS: save(tensors, {"format": "pt"}),
            RECORD: json.dumps(record, indent=2) + "\n",
        },
        owned=(EXAMPLES,) if _wrote_examples(folder) else (),
        option="--out",
    )


def _wrote_examples(folder: Path) -> bool:
    """Whether the example prompts in the folder of an adapter are those that its training wrote, not a user's own."""
    record = record_of(folder)
    if record is None or not (folder / EXAMPLES).is_file():
        return False
    return file_sha256(folder / EXAMPLES) == record.get(WRITTEN)


def leave_examples(folder: Path, prompts: Sequence[str]) -> None:
    """Writes example prompts beside an adapter, and notes in its record that training wrote them.

    Raises:
        StorageError: they cannot be written.
    """
    write_examples(folder, prompts)
    record, digest = record_of(folder), examples_sha256(prompts)
    if record is not None and record.get(WRITTEN) != digest:
        replace_file(folder / RECORD, (json.dumps({**record, WRITTEN: digest}, indent=2) + "\n").encode())


def record_of(folder: Path) -> dict[str, Any] | None:
    """The record of what an adapter was made from; None if there is no complete adapter that was trained here.

    Raises:
        StorageError: it cannot be read.
    """
    try:
        if not (folder / CONFIG).is_file() or not (folder / SAFETENSORS).is_file():
            return None
        found = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise StorageError(
            f"{folder / RECORD}: cannot be read ({error}); remove the adapter to train it anew"
        ) from error
    return found if isinstance(found, dict) else None


def course_record(course: Course) -> dict[str, Any]:
    """The progress that is stored with an adapter."""
    best = next((one for one in course.measured if one.step == course.best), None)
    return {
        "status": course.status,
        "reason": course.reason,
        "steps": course.step,
        "best_step": course.best,
        "train_loss": None if best is None else round(best.train, 6),
        "held_out_loss": None if best is None or best.held_out is None else round(best.held_out, 6),
        "tokens": course.tokens,
        "measured": [asdict(one) for one in course.measured],
    }


def write_pool(root: Path, facts: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """Writes `pool.json`: common facts, and the record of every adapter in the folder. Earlier changes to the pool stay
    recorded.

    Args:
        facts: base model, versions, recipe.
        names: task -> why it failed.

    Raises:
        StorageError: it cannot be written.
    """
    records = {path.parent.relative_to(root).as_posix(): record_of(path.parent) for path in _records(root)}
    adapters = {name: record for name, record in sorted(records.items()) if record is not None}
    kept = {key: value for key, value in read_notes(root).items() if key in (CHANGES, BEFORE)}
    whole = {**facts, ADAPTERS: adapters, "failed": dict(names), **kept}
    replace_file(root / NOTES, (json.dumps(whole, indent=2) + "\n").encode())


def diverged(record: Mapping[str, Any]) -> str | None:
    """Why training diverged, in words; None if it did not."""
    course = record.get("course", {})
    return str(course.get("reason")) if course.get("status") == DIVERGED else None


def check_base(root: Path, base: Mapping[str, Any]) -> None:
    """Raises UsageError where the folder holds an adapter that was made here for another base model.

    Args:
        base: digests of the base model, see `logo.training.trainer.Trainer.facts`.
    """
    for path in _records(root):
        found = (record_of(path.parent) or {}).get("base")
        if isinstance(found, dict) and found.get("weights") != base.get("weights"):
            raise UsageError(
                f"{path.parent}: was trained on another base model, or in another dtype; name another --out"
            )


def check_activation(root: Path, activation: Activation) -> None:
    """Raises UsageError where the folder holds an adapter that acts on other tokens: a pool has one activation."""
    for config in _files(root, CONFIG):
        found = _activation(config.parent, root)
        if found is not None and found != activation:
            was, now = (_named(one) for one in (found, activation))
            raise UsageError(f"{config.parent}: has activation {was}, and {now} is asked for; name another --out")


def _activation(folder: Path, root: Path) -> Activation | None:
    """Where the adapter in a folder acts; None if it cannot be used."""
    record = record_of(folder)
    if record is None:
        try:
            return noted(folder, root, Activation(read_config(folder).invocation))
        except Refusal:
            return None
    if record.get(TOKENS):
        return Activation(tuple(record[TOKENS]))
    return Activation.parse(record.get("recipe", {}).get("activation"))


def _named(activation: Activation) -> str:
    return f"invocation (tokens {list(activation.tokens)})" if activation.tokens else str(activation)


def _records(root: Path) -> list[Path]:
    return _files(root, RECORD)


def _files(root: Path, name: str) -> list[Path]:
    found = []
    for folder, folders, files in os.walk(root):  # ignores folders that other processes remove
        folders[:] = sorted(below for below in folders if not below.startswith("."))
        if name in files:
            found.append(Path(folder) / name)
    return found


def _written(config: LoraConfig) -> str:
    """A configuration as PEFT writes it, with its sets in one order in every process."""
    with tempfile.TemporaryDirectory() as scratch:
        config.save_pretrained(scratch)
        values = json.loads((Path(scratch) / CONFIG).read_text(encoding="utf-8"))
    if isinstance(values["target_modules"], list):
        values["target_modules"].sort()
    return json.dumps(values, indent=2, sort_keys=True)
