"""What a repeated command finds for a dataset: a finished result, an unfinished one, or one of another run.

A result belongs to this run if its `run.json` says so (`logo.evaluation.standing`). The journal
(`logo.evaluation.journal`) is a hidden file beside the future result's folder, and is removed when the result is
written. If rows depend on those before them, an interrupted dataset begins again. Answers do not depend on the metric,
so an unfinished run may continue with another one, or with a corrected one.

A result that was finished under other versions or on another kind of device is finished; a run that was begun there is
only continued there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logo.errors import StorageError, UsageError
from logo.evaluation.datasets import Dataset
from logo.evaluation.differences import described, differences
from logo.evaluation.journal import Journal, written
from logo.evaluation.standing import Standing, standing

_KEEP_BOTH = "--run-name NAME keeps both"
_METRIC = ("metric", "metric_plugin")  # the part of an identity that answers do not depend on


@dataclass(frozen=True)
class Plan:
    """What has to be done for one job.

    Attributes:
        job: the dataset.
        folder: of its result.
        identity: what its result depends on (`logo.evaluation.identity`), without the pool.
        pool: SHA-256 by name of the adapters in use.
        environment: the environment of this process.
        replaces: the run was begun with --overwrite, and replaces what is there.
        done: the result is there.
        fresh: an interrupted run is not continued.
        note: what the user should know about an existing result of this run, in words.
    """

    job: Dataset
    folder: Path
    identity: Mapping[str, Any]
    pool: Mapping[str, str]
    environment: Mapping[str, str]
    replaces: bool = False
    done: bool = False
    fresh: bool = False
    note: str = ""

    @property
    def asked(self) -> dict[str, Any]:
        """All that the result depends on, as JSON."""
        plain: dict[str, Any] = json.loads(json.dumps({**self.identity, "pool": dict(self.pool)}, default=str))
        return plain

    @property
    def run(self) -> dict[str, Any]:
        """The first line of the job's journal: all that its answers depend on."""
        answers = {name: value for name, value in self.asked.items() if name not in _METRIC}
        return {**answers, "environment": dict(self.environment), "replaces": self.replaces}


def plan(
    job: Dataset,
    folder: Path,
    identity: Mapping[str, Any],
    pool: Mapping[str, str],
    environment: Mapping[str, str],
    *,
    overwrite: bool = False,
    in_order: bool = False,
) -> Plan:
    """What is to be done about a job.

    Args:
        folder: of its result.
        identity: what its rows depend on, without the pool.
        pool: SHA-256 by name of the adapters in use.
        environment: what this process runs on.
        overwrite: begin again, even if there is a result.
        in_order: rows depend on those before them.

    Raises:
        UsageError: what is there is another run's, was begun in another environment, or is damaged.
        StorageError: what is there cannot be read.
    """
    if overwrite:
        return Plan(job, folder, identity, pool, environment, replaces=True, fresh=True)
    there, file = standing(folder), journal_of(folder)
    begun = written(file)
    begun = begun if begun is not None and begun.records else None  # an empty journal blocks nothing
    replaces = begun is not None and bool(begun.run.get("replaces"))
    made = Plan(job, folder, identity, pool, environment, replaces, fresh=in_order or begun is None)
    found = [] if begun is None else differences(made.run, begun.run)
    if there is not None and not there.missing and there.other(made.asked) is None and (begun is None or found):
        return Plan(job, folder, identity, pool, environment, done=True, note=_under_others(there, environment))
    if found:
        raise UsageError(
            f"dataset {job.name!r}: {file} was left by an unfinished run with other settings, pool or rows, or "
            f"under other versions ({described(found)}); repeat that run to finish it, or begin again with "
            f"--overwrite; {_KEEP_BOTH}"
        )
    check_place(made)
    if there is not None and there.missing:
        note = f"{folder} lacks {', '.join(there.missing)}"
        return Plan(job, folder, identity, pool, environment, replaces, fresh=made.fresh, note=note)
    return made


def check_place(plan: Plan) -> None:
    """Checks that a result may be written: nothing is there, or only what may be replaced.

    Raises:
        UsageError: something else is there; names the differences.
        StorageError: it cannot be read.
    """
    there = None if plan.replaces else standing(plan.folder)
    other = None if there is None else there.other(plan.asked)
    if there is None or other is None:
        return
    judged = ""
    if there.problem is None and {name for name, *_ in differences(plan.asked, there.asked)} <= set(_METRIC):
        judged = f"; its answers are judged anew by `logo eval report {there.folder} --metric {plan.job.metric}`"
    raise UsageError(f"dataset {plan.job.name!r}: {other}{judged}; --overwrite replaces it, {_KEEP_BOTH}")


def open_journal(plan: Plan) -> Journal:
    """The journal of a job that is to be done; its folder is made.

    Raises:
        UsageError: another process is on this job, or the journal is of another run.
        StorageError: it cannot be written.
    """
    file = journal_of(plan.folder)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"journal {str(file)!r}: cannot be made ({error.strerror or error})") from error
    return Journal(file, plan.run, fresh=plan.fresh)


def journal_of(folder: Path) -> Path:
    """The journal of an unfinished result: a hidden file beside its folder."""
    return folder.with_name(f".{folder.name}.journal.jsonl")


def _under_others(there: Standing, environment: Mapping[str, str]) -> str:
    """The versions or the kind of device under which a finished result was answered, if others, in words."""
    found = differences(environment, there.run.get("environment", environment))
    return ", ".join(f"{name} {theirs} (now {ours})" for name, ours, theirs in found)
