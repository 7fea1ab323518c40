"""Whether a dataset is done, half done or another run's: what a command that is given again finds, and goes on from.

A result is this run's if its `run.json` says so; a journal (`logo.evaluation.journal`) lies hidden beside the folder in
which the result will appear, and goes when it has. Where a row depends on those before it there is no going on in the
middle, and an interrupted dataset begins again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logo.errors import StorageError, UsageError
from logo.evaluation.jobs import Job
from logo.evaluation.journal import Journal, fingerprint
from logo.evaluation.results import RESULT_FILES


@dataclass(frozen=True)
class Plan:
    """What is to be done about one job.

    Attributes:
        job: the job.
        identity: what its rows depend on, see `logo.evaluation.identity`; the pool included.
        done: the result is there.
        fresh: nothing is taken over from an interrupted run.
    """

    job: Job
    identity: Mapping[str, Any]
    done: bool
    fresh: bool


def plan(job: Job, identity: Mapping[str, Any], *, overwrite: bool = False, in_order: bool = False) -> Plan:
    """What is to be done about a job.

    Args:
        identity: what its rows depend on, the pool included.
        overwrite: begin again whatever is there.
        in_order: rows depend on those before them.

    Raises:
        UsageError: a journal of another run lies there, or is damaged.
    """
    if overwrite:
        return Plan(job, identity, done=False, fresh=True)
    file = journal_of(job.folder)
    lines = _lines(file)
    begun = len(lines) > 1  # a run that got nowhere stands in nobody's way
    own = begun and _is_header(lines[0], _run(identity, job))
    if not own and is_done(job.folder, fingerprint(identity), part_of(job)):
        return Plan(job, identity, done=True, fresh=False)
    if begun and not own:
        raise UsageError(
            f"dataset {job.dataset!r}: {file} was left by an unfinished run with other settings, pool or rows; repeat "
            "that run to finish it, or begin again with --overwrite"
        )
    return Plan(job, identity, done=False, fresh=in_order or not begun)


def open_journal(plan: Plan) -> Journal:
    """The journal of a job that is to be done; its folder is made.

    Raises:
        UsageError: another process is on this job.
        StorageError: it cannot be written.
    """
    file = journal_of(plan.job.folder)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"journal {str(file)!r}: cannot be made ({error.strerror or error})") from error
    return Journal(file, _run(plan.identity, plan.job), fresh=plan.fresh)


def journal_of(folder: Path) -> Path:
    """Where the rows of an unfinished result are kept: beside its folder, hidden."""
    return folder.with_name(f".{folder.name}.journal.jsonl")


def part_of(job: Job) -> dict[str, Any] | None:
    """Which shard of which cut a job is; None for a whole dataset."""
    if job.shard is None:
        return None
    return {"index": job.shard.index, "count": job.shard.count, "block": job.block, "rows": len(job.rows)}


def is_done(folder: Path, run: str, part: Mapping[str, Any] | None = None) -> bool:
    """Whether a folder holds the whole result of the run with this fingerprint."""
    try:
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if not isinstance(record, dict) or (record.get("fingerprint"), record.get("shard")) != (run, part):
        return False
    return all((folder / name).is_file() for name in RESULT_FILES)


def _run(identity: Mapping[str, Any], job: Job) -> str:
    return fingerprint({"run": fingerprint(identity), "shard": part_of(job)})


def _lines(file: Path) -> list[bytes]:
    """The whole lines of a journal; none if there is no such file."""
    try:
        with open(file, "rb") as stream:
            # A record of a large pool is long: two lines tell all there is to know.
            return [line for line in (stream.readline(), stream.readline()) if line.endswith(b"\n")]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError(f"journal {str(file)!r}: cannot be used ({error.strerror or error})") from error


def _is_header(line: bytes, run: str) -> bool:
    try:
        header = json.loads(line)
    except ValueError:
        return False
    return isinstance(header, dict) and header.get("run") == run
