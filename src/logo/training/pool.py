"""The files that training writes: adapters in PEFT's format, and a record of what each was made from.

POOL/<task>/adapter_config.json, adapter_model.safetensors     in PEFT's format
POOL/<task>/training.json     recipe, digests of rows and base model, losses: what the adapter was made from
POOL/pool.json                the records of all adapters, and versions
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save
from torch import Tensor

from logo.adapters.activation import Activation, noted, read_notes
from logo.adapters.examples import examples_text
from logo.adapters.peft import CONFIG, EXAMPLES, NOTES, RECORD, SAFETENSORS, Refusal, parse_config, read_raw
from logo.errors import StorageError, UsageError
from logo.files import new_folder, replace_file
from logo.identity import file_sha256
from logo.training.learner import DIVERGED, Course

if TYPE_CHECKING:
    from peft import LoraConfig

WRITTEN = "examples_sha256"  # in an adapter's record: the digest of the example prompts that training wrote beside it
TOKENS = "invocation_tokens"  # in an adapter's record: the tokens from which on it acts


def write_adapter(
    folder: Path,
    factors: Mapping[str, Tensor],
    config: LoraConfig,
    record: Mapping[str, Any],
    examples: Sequence[str],
) -> None:
    """Writes an adapter, completely or not at all.

    Args:
        factors: by PEFT's names.
        config: the PEFT configuration.
        record: the record of what it was made from.
        examples: example prompts. They replace those of an earlier training, but not those that a user gave.

    Raises:
        StorageError: it cannot be written.
    """
    files: dict[str, str | bytes] = {
        CONFIG: _written(config),
        SAFETENSORS: save({name: tensor.contiguous().cpu() for name, tensor in factors.items()}, {"format": "pt"}),
        RECORD: json.dumps(record, indent=2) + "\n",
    }
    own = folder / EXAMPLES
    replaced = not own.is_file() or file_sha256(own) == (record_of(folder) or {}).get(WRITTEN)
    if replaced and examples:
        files[EXAMPLES] = examples_text(examples)
    with new_folder(folder, replaced=(EXAMPLES,) if replaced else ()) as new:
        for name, content in files.items():
            (new / name).write_bytes(content.encode() if isinstance(content, str) else content)


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
    """Writes `pool.json`: common facts, and the record of every adapter in the folder. `k` stays as it was.

    Args:
        facts: base model, versions, recipe.
        names: task -> why it failed.

    Raises:
        StorageError: it cannot be written.
    """
    adapters = {path.relative_to(root).as_posix(): record_of(path) for path in _folders(root)}
    adapters = {name: record for name, record in adapters.items() if record is not None}
    k = read_notes(root).get("k")
    whole = {**facts, "adapters": adapters, "failed": dict(names), **({} if k is None else {"k": k})}
    replace_file(root / NOTES, (json.dumps(whole, indent=2) + "\n").encode())


def diverged(record: Mapping[str, Any]) -> str | None:
    """Why training diverged, in words; None if it did not."""
    course = record.get("course", {})
    return str(course.get("reason")) if course.get("status") == DIVERGED else None


def check_pool(root: Path, base: Mapping[str, Any], activation: Activation | None) -> None:
    """Raises UsageError where the folder holds an adapter that was trained on another base model, or that acts on other
    tokens: a pool has one activation.

    Args:
        base: digests of the base model, see `logo.training.trainer.Trainer.facts`.
        activation: of the tasks to train; None: there are none.
    """
    for folder in _folders(root):
        record = record_of(folder)
        if record is not None and record["base"]["weights"] != base["weights"]:
            raise UsageError(f"{folder}: was trained on another base model, or in another dtype; name another --out")
        found = _activation(folder, root, record)
        if found is not None and activation is not None and found != activation:
            was, now = (_named(one) for one in (found, activation))
            raise UsageError(f"{folder}: has activation {was}, and {now} is asked for; name another --out")


def _activation(folder: Path, root: Path, record: Mapping[str, Any] | None) -> Activation | None:
    """Where the adapter in a folder acts; None if it cannot be used."""
    if record is not None:
        return Activation(tuple(record[TOKENS])) if record[TOKENS] else Activation.parse(record["recipe"]["activation"])
    try:
        return noted(folder, Activation(parse_config(read_raw(folder)).invocation), root)
    except Refusal:
        return None


def _named(activation: Activation) -> str:
    return f"invocation (tokens {list(activation.tokens)})" if activation.tokens else str(activation)


def _folders(root: Path) -> list[Path]:
    """The folders with adapters."""
    found = (path.parent for path in sorted(root.rglob(CONFIG)))
    return [path for path in found if not any(part.startswith(".") for part in path.relative_to(root).parts)]


def _written(config: LoraConfig) -> str:
    """A configuration as PEFT writes it, with its sets in one order in every process."""
    values = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    return json.dumps(values, indent=2, sort_keys=True)
