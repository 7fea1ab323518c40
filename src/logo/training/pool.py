"""Training of a pool: one adapter per file of rows, those that stand already left alone.

    POOL/<task>/adapter_config.json, adapter_model.safetensors     in PEFT's format
                logo.yaml          what it was made from (config, digests of rows and base model) and its losses
                examples.jsonl     example prompts (.old: of an adapter of something else that was replaced)
                pool.json          where it acts, if its configuration cannot say so

A folder of an adapter is written whole or not at all, so a run that was killed continues with the next task.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from logo.adapters.activation import EVERYWHERE, Activation, noted, read_notes
from logo.adapters.adapter import open_adapter
from logo.adapters.examples import examples_sha256, examples_text, folder_description
from logo.adapters.peft import CONFIG, EXAMPLES, NOTES, RECORD
from logo.adapters.write import activation_note, needs_activation_note, save_adapter
from logo.errors import AdapterError, DataError, NotFinite, StorageError, UsageError, is_out_of_memory, listed
from logo.files import new_folder, walked
from logo.identity import file_sha256, library_versions, weights_digest
from logo.models import context_length
from logo.training.config import TrainingConfig
from logo.training.loop import Base, Fitted, fit
from logo.training.rows import TaskRows, read_task, task_files

EARLIER_PROMPTS = f"{EXAMPLES}.old"  # those of an adapter that was replaced

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
        overwrite: replace adapters that were made from something else. Another number of example prompts needs no
            training: it is only their file that is written again, unless it was changed. Example prompts that were
            given by hand stay; those of an adapter that was not trained for this task are moved aside.
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
    versions = {**library_versions(), "peft": peft.__version__}
    jobs, failed = _jobs(files, base, out, config)
    to_train = [job for job in jobs if not job.is_done]
    _check_places(to_train, overwrite=overwrite)
    done = {job.name: _with_prompts(job, config) for job in jobs if job.is_done}
    planned({job.name: config.length(len(job.task.learned)) for job in to_train}, len(done))
    trained: dict[str, Record] = {}
    for job in to_train:  # those in folders below others first
        moved = _moved_by(job, {out / name for name in trained})
        if moved:  # those that were to be trained, and failed
            failed[job.name] = _moving(job, moved)
            continue
        fitted = _fitted(job, base, config, tell)
        if isinstance(fitted, str):
            failed[job.name] = fitted
            continue
        record = {"base_model": base_model, **job.made_from, "result": _result(fitted), "versions": versions}
        _write(job, base_model, fitted, record)
        trained[job.name] = record
    return Trained(trained, done, failed)


def _fitted(job: Job, base: Base, config: TrainingConfig, tell: Callable[[str, int, float], None]) -> Fitted | str:
    """The trained adapter of a job, or why there is none; other tasks go on."""
    try:
        return fit(base, job.task, config, partial(tell, job.name))
    except NotFinite as error:
        return str(error)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return f"{base.device} has too little memory; give a smaller --max-length or --batch-size"


@dataclass(frozen=True)
class Job:
    """One adapter to make, and what stands in its folder.

    Attributes:
        task: its rows.
        made_from: what its adapter is made from, as `logo.yaml` records it.
        standing: what the adapter that stands there was made from; empty if it was not trained here, None if there is
            none.
        difference: why that is not the adapter that is to be made, in words; empty if it is, or if there is none.
        own_prompts: whether example prompts stand there that training has not written.
    """

    folder: Path
    task: TaskRows
    made_from: Record
    standing: Record | None
    difference: str
    own_prompts: bool

    @property
    def name(self) -> str:
        """Of the task and of its adapter."""
        return self.task.name

    @property
    def activation(self) -> Activation:
        """Where the adapter that is to be made acts."""
        invocation = self.task.invocation
        return Activation(invocation) if invocation else Activation.parse(self.made_from["config"]["activation"])

    @property
    def is_done(self) -> bool:
        """Whether the adapter that is to be made stands there already."""
        return self.standing is not None and not self.difference

    @property
    def prompts_stay(self) -> bool:
        """Whether the example prompts there were given by hand, and are right for the new adapter."""
        return self.own_prompts and self.is_of_this_task

    @property
    def is_of_this_task(self) -> bool:
        """Whether what is said there was said of an adapter of this task, or before there was one. What is said of an
        adapter of another task, or of an unknown one, would select the new adapter for the prompts of the old."""
        if self.standing is None:
            return True
        if not self.standing:
            return False
        return f"/{Path(self.standing['rows']['file']).with_suffix('').as_posix()}".endswith(f"/{self.name}")


def _jobs(files: Mapping[str, Path], base: Base, out: Path, config: TrainingConfig) -> tuple[list[Job], dict[str, str]]:
    """The adapters to make from these files, and why others of the files cannot be read."""
    about_base = {"weights": weights_digest(base.model), "dtype": str(base.model.dtype).removeprefix("torch.")}
    jobs: list[Job] = []
    unreadable: dict[str, str] = {}
    for name, file in files.items():
        try:
            task = read_task(name, file, base.tokenizer, config, context_length(base.model))
        except (DataError, StorageError) as error:
            unreadable[name] = str(error)
            continue
        made_from = {"config": asdict(config), "base": about_base, "rows": _facts(task, file)}
        standing = _standing(out / name)
        prompts = out / name / EXAMPLES
        jobs.append(
            Job(
                out / name,
                task,
                made_from,
                standing,
                difference="" if standing is None else _difference(standing, made_from),
                own_prompts=prompts.exists() and (standing or {}).get("examples_sha256") != file_sha256(prompts),
            )
        )
    return jobs, unreadable


def _check_places(to_train: Sequence[Job], *, overwrite: bool) -> None:
    """Raises UsageError for another adapter in the place of one, unless it is to be replaced, and for one that would
    act elsewhere."""
    for job in to_train:
        if job.difference and not overwrite:
            raise UsageError(f"{job.folder}: {job.difference}; name another --save, or replace it with --overwrite")
    folders = {job.folder for job in to_train}
    for job in to_train:
        moved = _moved_by(job, folders)
        if moved:
            raise UsageError(f"{_moving(job, moved)}; name another --save")


def _moved_by(job: Job, trained: Collection[Path]) -> list[str]:
    """The adapters in folders below a job's that would act on other tokens once it is written, and are not themselves
    trained: a note that says where an adapter acts applies to all below it."""
    if needs_activation_note(job.folder, job.activation):
        activation = job.activation
    else:
        activation = noted(job.folder.absolute().parent, EVERYWHERE)
    moved = []
    for file in sorted(walked(job.folder)):
        folder = file.parent
        below = folder.relative_to(job.folder)
        is_hidden = any(part.startswith(".") for part in below.parts)  # no pool opens it
        if file.name != CONFIG or folder == job.folder or folder in trained or is_hidden:
            continue
        try:
            acts = open_adapter(folder).activation
        except AdapterError:
            continue  # no pool opens it either
        between = itertools.takewhile(lambda above: above != job.folder, (folder, *folder.parents))
        is_noted = any(read_notes(above).get("activation") is not None for above in between)
        if acts != activation and not acts.tokens and not is_noted:
            moved.append(f"{job.name}/{below.as_posix()}")
    return moved


def _moving(job: Job, moved: Sequence[str]) -> str:
    """Why a job's adapter cannot be written, where it would move others."""
    because = "since the `pool.json` that says where an adapter acts applies to all folders below it"
    return f"{job.folder}: {listed(moved)} would act on other tokens than now, {because}"


def _with_prompts(job: Job, config: TrainingConfig) -> Record:
    """The record of an adapter that is done, with as many example prompts beside it as the config says, unless others
    than training has written are there."""
    record: Record = job.standing or {}
    before = record["config"].get("examples", 0)
    if before == config.examples:
        return record
    if job.own_prompts:
        warnings.warn(
            f"{job.folder / EXAMPLES}: expected the {before} prompts that training wrote, found others, which stay; "
            f"remove the file to have {config.examples} of the rows' prompts",
            UserWarning,
            stacklevel=3,
        )
        return record
    changed = {**record, "config": {**record["config"], "examples": config.examples}}
    with new_folder(job.folder, replaced=(EXAMPLES,)) as new:
        _write_notes(new, changed, job.task.prompts)
    return changed


def _facts(task: TaskRows, file: Path) -> dict[str, Any]:
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
        "measured": [asdict(measurement) for measurement in fitted.measured],
    }


def _standing(folder: Path) -> Record | None:
    """What an adapter in a folder was made from; empty if it was not trained here, None if there is none."""
    if not (folder / CONFIG).is_file():
        return None
    try:
        record = yaml.safe_load((folder / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise StorageError(f"{folder / RECORD}: cannot be read ({reason}); remove it, and give --overwrite") from error
    match record:
        case {"config": dict(), "base": dict(), "rows": {"file": str(), "sha256": str()}}:
            return dict(record)
    return {}


def _difference(standing: Record, made_from: Record) -> str:
    """Why a standing adapter is not the one that would be made, in words; empty if it is."""
    if not standing:
        return "holds an adapter that was not trained here"
    for name, value in made_from["config"].items():
        before = standing["config"].get(name)
        if before != value and name != "examples":
            return f"was trained with {name} {before}, and {value} is asked for"
    if standing["base"] != made_from["base"]:
        return "was trained on another base model, or in another dtype"
    return "was trained from other rows" if standing["rows"]["sha256"] != made_from["rows"]["sha256"] else ""


def _write(job: Job, base_model: str, fitted: Fitted, record: Record) -> None:
    """Writes an adapter, its record and its example prompts, completely or not at all. Prompts of an adapter of
    something else are kept under another name."""
    folder = job.folder
    task = job.task
    fitted.config.base_model_name_or_path = base_model
    fitted.config.inference_mode = True
    fitted.config.alora_invocation_tokens = list(task.invocation) or None
    # Sets in one order in every process.
    values = {
        name: sorted(value) if isinstance(value, set) else value for name, value in fitted.config.to_dict().items()
    }
    note = activation_note(folder, job.activation)
    replaced = [NOTES] if job.prompts_stay else [NOTES, EXAMPLES]
    with new_folder(folder, replaced=replaced) as new:
        save_adapter(new, {name: tensor.cpu() for name, tensor in fitted.tensors.items()}, values, note)
        description = folder_description(folder) if job.is_of_this_task else None
        if description is not None:
            record = {**record, "description": description}
        _write_notes(new, record, () if job.prompts_stay else task.prompts)
        if job.own_prompts and not job.prompts_stay:
            files = [folder / name for name in (EARLIER_PROMPTS, EXAMPLES)]
            earlier = b"".join(file.read_bytes().rstrip(b"\n") + b"\n" for file in files if file.exists())
            (new / EARLIER_PROMPTS).write_bytes(earlier)
    if job.own_prompts:
        _tell_of_prompts(job)


def _tell_of_prompts(job: Job) -> None:
    """Warns of example prompts that training has not written and that may be those of another adapter."""
    if not job.prompts_stay:
        remark = f"were those of the adapter that is replaced; they are kept in {EARLIER_PROMPTS}, which is not used"
    elif job.standing and job.standing["rows"]["sha256"] != job.made_from["rows"]["sha256"]:
        remark = (
            f"stay, as they were given by hand, though the rows are others; remove {EXAMPLES} if they are wrong now"
        )
    else:
        return
    warnings.warn(f"{job.folder}: the example prompts there {remark}", UserWarning, stacklevel=4)


def _write_notes(folder: Path, record: Record, prompts: Sequence[str]) -> None:
    """Writes what an adapter was made from, and its example prompts, if it has some."""
    content = {**record, "examples_sha256": examples_sha256(prompts) if prompts else None}
    (folder / RECORD).write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    if prompts:
        (folder / EXAMPLES).write_bytes(examples_text(prompts))
