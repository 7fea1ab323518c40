"""Training of a pool: one adapter per file of rows, those that stand already left alone.

    POOL/<task>/adapter_config.json, adapter_model.safetensors     in PEFT's format
                logo.yaml          what it was made from (config, digests of rows and base model) and its losses
                examples.jsonl     example prompts
                pool.json          where it acts, if its configuration cannot say so

A folder of an adapter is written whole or not at all, so a run that was killed continues with the next task.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from logo.adapters.activation import Activation
from logo.adapters.examples import examples_sha256, examples_text
from logo.adapters.peft import CONFIG, EXAMPLES, NOTES, RECORD
from logo.adapters.write import activation_note, save_adapter
from logo.errors import DataError, NotFinite, StorageError, UsageError, is_out_of_memory
from logo.files import new_folder
from logo.identity import file_sha256, library_versions, weights_digest
from logo.models import context_length
from logo.training.config import TrainingConfig
from logo.training.loop import Base, Fitted, fit
from logo.training.rows import Task, read_task, task_files

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Trained:
    """What a run did.

    Attributes:
        trained: task -> what its `logo.yaml` says, of the adapters that were trained now.
        done: the same of those that stood already.
        failed: task -> why it has no adapter.
    """

    trained: Mapping[str, Record]
    done: Mapping[str, Record]
    failed: Mapping[str, str]


def train(
    rows: Path,
    base_model: str,
    out: Path,
    config: TrainingConfig | None = None,
    *,
    tasks: str = "",
    overwrite: bool = False,
    device: str = "auto",
    model_dir: str | None = None,
    planned: Callable[[Mapping[str, int], int], None] = lambda steps, done: None,
    tell: Callable[[str, int, float], None] = lambda task, step, loss: None,
) -> Trained:
    """Trains an adapter for every file of rows that has none in the pool yet. Tasks that fail do not stop the others.

    Args:
        rows: folder of TASK.jsonl and TASK.csv, at any depth.
        base_model, device, model_dir: as `logo.models.load_base`.
        out: folder of the pool.
        tasks: names or patterns of tasks, separated by commas; empty: all.
        overwrite: replace adapters that were made from something else, with all that stands beside them. Another number
            of example prompts needs no training: it is only their file that is written again, unless it was changed.
        planned: called with the tasks to train and their steps at most, and the number of adapters that stand already.
        tell: called with a task, its steps so far and the loss, after each step.

    Raises:
        UsageError, DataError: nothing can be trained, or another adapter stands in the place of one.
        StorageError: something cannot be read or written. Adapters that were written stay.
        ModelError, HubError: the base model cannot be loaded.
    """
    import peft

    config = config or TrainingConfig()
    files = task_files(rows, tasks)
    base = Base.load(base_model, device, model_dir)
    of_base = {"weights": weights_digest(base.model), "dtype": str(base.model.dtype).removeprefix("torch.")}
    versions = {**library_versions(), "peft": peft.__version__}
    trained: dict[str, Record] = {}
    done: dict[str, Record] = {}
    failed: dict[str, str] = {}
    todo: dict[str, tuple[Task, dict[str, Any]]] = {}
    other_prompts: dict[str, Sequence[str]] = {}
    own: set[str] = set()  # whose example prompts are others than training has written, and stay
    for name, file in files.items():
        try:
            task = read_task(name, file, base.tokenizer, config, context_length(base.model))
        except (DataError, StorageError) as error:
            failed[name] = str(error)
            continue
        made_from = {"config": asdict(config), "base": of_base, "rows": _facts(task, file)}
        standing = _standing(out / name)
        difference, there = "" if standing is None else _difference(standing, made_from), out / name / EXAMPLES
        if there.exists() and (standing or {}).get("examples_sha256") != file_sha256(there):
            own.add(name)
        if difference and not overwrite:
            raise UsageError(f"{out / name}: {difference}; name another --out, or replace it with --overwrite")
        if standing is None or difference:
            todo[name] = task, made_from
        else:
            done[name] = standing
            before = standing["config"].get("examples", 0)
            if before == config.examples:
                continue
            if name in own:
                warnings.warn(
                    f"{there}: expected the {before} prompts that training wrote, found others, which stay; remove "
                    f"the file to have {config.examples} of the rows' prompts",
                    UserWarning,
                    stacklevel=2,
                )
            else:
                done[name] = {**standing, "config": {**standing["config"], "examples": config.examples}}
                other_prompts[name] = task.prompts
    for name, prompts in other_prompts.items():
        with new_folder(out / name, replaced=(EXAMPLES,)) as new:
            _write_notes(new, done[name], prompts)
    planned({name: config.length(len(task.learned)) for name, (task, _) in todo.items()}, len(done))
    for name, (task, made_from) in todo.items():
        try:
            fitted = fit(base, task, config, partial(tell, name))
        except NotFinite as error:
            failed[name] = str(error)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            failed[name] = f"{base.device} has too little memory; give a smaller --max-length or --batch-size"
        else:
            trained[name] = {"base_model": base_model, **made_from, "result": _result(fitted), "versions": versions}
            _write(out / name, base_model, task, fitted, trained[name], None if name in own else task.prompts)
    return Trained(trained, done, failed)


def _facts(task: Task, file: Path) -> dict[str, Any]:
    counts = {"learned": len(task.learned), "held_out": len(task.held_out), "copies": task.copies, "cut": task.cut}
    return {"file": str(file), "sha256": task.sha256, **counts}


def _result(fitted: Fitted) -> dict[str, Any]:
    best = fitted.best
    return {
        "steps": fitted.steps,
        "early": fitted.early,
        "best_step": best.step,
        "train_loss": round(best.train, 6),
        "held_out_loss": None if best.held_out is None else round(best.held_out, 6),
        "measured": [asdict(one) for one in fitted.measured],
    }


def _standing(folder: Path) -> Record | None:
    """What an adapter in a folder was made from; empty if it was not trained here, None if there is none."""
    if not (folder / CONFIG).is_file():
        return None
    try:
        found = yaml.safe_load((folder / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        said = " ".join(str(error).split())
        raise StorageError(f"{folder / RECORD}: cannot be read ({said}); remove it, and give --overwrite") from error
    return found if isinstance(found, dict) and {"config", "base", "rows"} <= found.keys() else {}


def _difference(standing: Record, wanted: Record) -> str:
    """Why a standing adapter is not the one that is wanted, in words; empty if it is."""
    if not standing:
        return "holds an adapter that was not trained here"
    for name, value in wanted["config"].items():
        was = standing["config"].get(name)
        if was != value and name != "examples":
            return f"was trained with {name} {was}, and {value} is asked for"
    if standing["base"] != wanted["base"]:
        return "was trained on another base model, or in another dtype"
    return "was trained from other rows" if standing["rows"]["sha256"] != wanted["rows"]["sha256"] else ""


def _write(
    folder: Path, base_model: str, task: Task, fitted: Fitted, record: Record, prompts: Sequence[str] | None
) -> None:
    """Writes an adapter, its record and its example prompts (None: others stay), completely or not at all."""
    fitted.config.base_model_name_or_path, fitted.config.inference_mode = base_model, True
    fitted.config.alora_invocation_tokens = list(task.invocation) or None
    # Sets in one order in every process.
    values = {
        name: sorted(value) if isinstance(value, set) else value for name, value in fitted.config.to_dict().items()
    }
    activation = record["config"]["activation"]
    note = activation_note(folder, Activation(task.invocation) if task.invocation else Activation.parse(activation))
    with new_folder(folder, replaced=(NOTES,) if prompts is None else (EXAMPLES, NOTES)) as new:
        save_adapter(new, {name: tensor.cpu() for name, tensor in fitted.tensors.items()}, values, note)
        _write_notes(new, record, prompts or ())


def _write_notes(folder: Path, record: Record, prompts: Sequence[str]) -> None:
    """Writes what an adapter was made from, and its example prompts, if it has some."""
    found = {**record, "examples_sha256": examples_sha256(prompts) if prompts else None}
    (folder / RECORD).write_text(yaml.safe_dump(found, sort_keys=False), encoding="utf-8")
    if prompts:
        (folder / EXAMPLES).write_bytes(examples_text(prompts))
