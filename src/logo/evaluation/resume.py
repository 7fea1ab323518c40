"""What a repeated command finds for a dataset: a finished result, an unfinished one, or one of another run.

A result belongs to this run if its `run.json` says so (`logo.evaluation.standing`). The journal
(`logo.evaluation.journal`) is a hidden file beside the future result's folder, and is removed when the result is
written. If rows depend on those before them, an interrupted dataset begins again. Answers do not depend on the metric,
so an unfinished run may continue with another one, or with a corrected one.

The request and the environment are treated separately. A result that was finished under other versions is finished; a
run that was begun under other versions continues only if the user allows mixing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logo.digests import fingerprint
from logo.errors import StorageError, UsageError
from logo.evaluation.differences import described, differences
from logo.evaluation.jobs import Job
from logo.evaluation.journal import Journal, written
from logo.evaluation.standing import Standing, standing
from logo.folders import make_folder


@dataclass(frozen=True)
class ResumePolicy:
    """What the user allows if something is there already.

    Attributes:
        overwrite: begin again, even if there is a result.
        mix: continue what other versions or another kind of device have begun.
        keep_both: advice for the error message: how to keep both results.
    """

    overwrite: bool = False
    mix: bool = False
    keep_both: str = "--run-name NAME keeps both"


@dataclass(frozen=True)
class Plan:
    """What has to be done for one job.

    Attributes:
        job: the job.
        run: the first line of its journal: the identity (`logo.evaluation.identity`) with pool and shard, the
            environment in which it was begun, and a digest of the result that it may replace.
        environment: the environment of this process.
        policy: what the user allows.
        done: the result is there.
        fresh: an interrupted run is not continued.
        learning: the first line of the journal of what the method learns, which all shards share, if this process
            learns; None if the method does not learn.
        note: what the user should know about an existing result of this run, in words.
        judge: the metric of the first line of the journal, if the run was begun.
    """

    job: Job
    run: Mapping[str, Any]
    environment: Mapping[str, Any]
    policy: ResumePolicy
    done: bool = False
    fresh: bool = True
    learning: Mapping[str, Any] | None = None
    note: str = ""
    judge: Mapping[str, Any] | None = None


def plan(
    job: Job,
    identity: Mapping[str, Any],
    environment: Mapping[str, Any],
    *,
    policy: ResumePolicy | None = None,
    in_order: bool = False,
    learns: bool = False,
) -> Plan:
    """What is to be done about a job.

    Args:
        identity: what its rows depend on, the pool included.
        environment: what this process runs on.
        in_order: rows depend on those before them.
        learns: the method learns from training rows.

    Raises:
        UsageError: what is there is another run's, was begun in another environment, or is damaged.
        StorageError: what is there cannot be read.
    """
    policy = policy or ResumePolicy()
    there = standing(job.folder)
    run = {**identity, "shard": part_of(job), "environment": dict(environment), "replaces": None}
    if policy.overwrite:
        learning = _learning(job, run, policy, begun=False) if learns else None
        return Plan(job, {**run, "replaces": there and there.digest}, environment, policy, learning=learning)
    file = journal_of(job.folder)
    begun = _begun(file)
    found = [] if begun is None else differences(_unjudged(_asked(run)), _unjudged(_asked(begun)))
    judge = None if begun is None else _judge(begun)
    if there is not None and there.other(_asked(run)) is None and not there.missing:
        finished = begun is not None and not found and there.digest != begun["replaces"]
        if finished:  # its run was killed before it could remove the journal
            _remove(job, learns)
        if begun is None or found or finished or judge != _judge(run):
            return Plan(job, run, environment, policy, done=True, note=_under_others(there, environment))
    if begun is not None and found:
        raise UsageError(
            f"dataset {job.dataset!r}: {file} was left by an unfinished run with other settings, pool or rows, or "
            f"written by an earlier version ({described(found)}); repeat that run to finish it, or begin again with "
            f"--overwrite; {policy.keep_both}"
        )
    resumed = begun is not None and not in_order
    learning = _learning(job, run, policy, begun=resumed) if learns else None
    if begun is not None:
        run = {**run, "replaces": begun["replaces"]}
        if resumed:
            run = {**run, "environment": _accepted(job, file, begun, environment, policy, "begun")}
    note = "" if there is None or not there.missing else f"{job.folder} lacks {', '.join(there.missing)}"
    how: dict[str, Any] = {"fresh": not resumed, "judge": judge if resumed else None}
    made = Plan(job, run, environment, policy, learning=learning, note=note, **how)
    check_place(made)
    return made


def check_place(plan: Plan) -> None:
    """Checks that a result may be written: nothing is there, or only what may be replaced.

    Raises:
        UsageError: something else is there; names the differences.
        StorageError: it cannot be read.
    """
    there = standing(plan.job.folder)
    other = None if there is None else there.other(_asked(plan.run))
    if there is not None and other is not None and there.digest != plan.run["replaces"]:
        raise UsageError(f"dataset {plan.job.dataset!r}: {other}; --overwrite replaces it, {plan.policy.keep_both}")


def open_journal(plan: Plan, learnt: Learnt | None = None) -> Journal:
    """The journal of a job that is to be done; its folder is made.

    Args:
        learnt: what its method has learnt; answers that were given with other weights are refused.

    Raises:
        UsageError: another process is on this job, or the journal is of another run.
        StorageError: it cannot be written.
    """
    judge = _judge(plan.run) if plan.judge is None else plan.judge
    run = {**_unjudged(plan.run), **judge, **({} if learnt is None else {"learnt_sha256": learnt.sha256})}
    elsewhere = plan.run["environment"] != plan.environment
    stamp = {"environment": plan.environment} if elsewhere else {}
    return Journal(_placed(journal_of(plan.job.folder)), run, fresh=plan.fresh, stamp=stamp)


@dataclass(frozen=True)
class Learnt:
    """What a method has learnt about a dataset, as JSON, and the environment in which it did."""

    content: dict[str, Any]
    environment: Mapping[str, Any]

    @property
    def sha256(self) -> str:
        """The SHA-256 of the content, in hex."""
        return fingerprint(self.content)


def learn_once(plan: Plan, learn: Callable[[], Mapping[str, Any]]) -> Learnt:
    """What a method has learnt about a dataset: it learns once, even if the run is interrupted or has shards.

    Args:
        learn: learns it and returns it as JSON; called only if it is not stored already.

    Raises:
        UsageError: another run has learnt it, or another environment that may not be mixed with this one.
        StorageError: it cannot be stored.
    """
    job, own, policy = plan.job, plan.learning, plan.policy
    if own is None:
        raise RuntimeError("this plan's method learns nothing")
    wait = f"dataset {job.dataset!r}: another shard is learning; this one waits for what it finds"
    with Journal(
        _placed(learnt_of(job)),
        own,
        # With --overwrite, a shard still uses what this run has learnt, because other shards may have used it.
        fresh=policy.overwrite and job.shard is None,
        other=lambda kept: _taken(job, own, policy, kept),
        wait=None if job.shard is None else wait,
    ) as journal:
        if journal.records:
            return Learnt(journal.records[0], journal.run["environment"])
        found: dict[str, Any] = json.loads(json.dumps(learn()))
        journal.append(found)
        return Learnt(found, plan.environment)


def environments(plan: Plan, journal: Journal, learnt: Learnt | None = None) -> list[dict[str, Any]]:
    """The environments in which the rows of a finished job were answered and its method learnt, each once, in order."""
    found = [] if learnt is None else [learnt.environment]
    found += [record.get("environment", plan.run["environment"]) for record in journal.records]
    if journal.appended or not found:
        found.append(plan.environment)
    return [dict(one) for at, one in enumerate(found) if one not in found[:at]]


def finish(plan: Plan) -> None:
    """Removes files that are no longer needed after a result has been written. Other shards still need the learnt
    state.
    """
    _remove(plan.job, plan.learning is not None)


def journal_of(folder: Path) -> Path:
    """The journal of an unfinished result: a hidden file beside its folder."""
    return folder.with_name(f".{folder.name}.journal.jsonl")


def learnt_of(job: Job) -> Path:
    """The file of what a method has learnt about a dataset: hidden, beside its result's folder, for all shards."""
    return job.whole.with_name(f".{job.whole.name}.learnt.jsonl")


def part_of(job: Job) -> dict[str, Any] | None:
    """The number of a job's shard and of all shards; None for a whole dataset."""
    if job.shard is None:
        return None
    return {"index": job.shard.index, "count": job.shard.count, "block": job.block, "rows": len(job.rows)}


def _remove(job: Job, learns: bool) -> None:
    journal_of(job.folder).unlink(missing_ok=True)
    if learns and job.shard is None and not _in_shards(job):
        learnt_of(job).unlink(missing_ok=True)


def _in_shards(job: Job) -> bool:
    """Whether shards of a job's dataset are beside its result, finished or not."""
    beginnings = (f"{job.whole.name}.shard-", f".{job.whole.name}.shard-")
    return any(path.name.startswith(beginnings) for path in job.whole.parent.iterdir())


def _asked(run: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a journal's first line that the rows depend on."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(run), default=str))
    return {key: value for key, value in plain.items() if key not in ("environment", "replaces", "learnt_sha256")}


# The metric of a run. Neither its answers nor what its method learns depend on it.
_METRIC = ("metric", "metric_plugin")


def _judge(run: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in run.items() if key in _METRIC}


def _unjudged(run: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in run.items() if key not in _METRIC}


def _begun(file: Path) -> dict[str, Any] | None:
    """The first line of a journal; None without records, since an empty journal blocks nothing."""
    found = written(file)
    return None if found is None or found.empty else found.run


def _accepted(
    job: Job, file: Path, begun: Mapping[str, Any], environment: Mapping[str, Any], policy: ResumePolicy, what: str
) -> dict[str, Any]:
    """The environment in which something was begun; it may be continued there."""
    found = differences(environment, begun["environment"])
    if found and not policy.mix:
        raise UsageError(
            f"dataset {job.dataset!r}: {file} was {what} under other versions or on another kind of device: "
            f"{described(found)}; continue there, or here with --mix-environments (answers may differ in their last "
            "digits, and run.json says so), or begin again with --overwrite"
        )
    return dict(begun["environment"])


def _learning(job: Job, run: Mapping[str, Any], policy: ResumePolicy, *, begun: bool) -> dict[str, Any]:
    """`Plan.learning`; what was learnt before is checked before anything is answered.

    Args:
        run: this process's, as `Plan.run`.
        begun: rows have been answered with it already.
    """
    own = {**_asked(run), "shard": None, "environment": run["environment"]}
    if not policy.overwrite:
        kept = _begun(learnt_of(job))
        if kept is not None:
            _taken(job, own, policy, kept)
        elif begun:
            raise UsageError(
                f"dataset {job.dataset!r}: the rows so far depend on what the method learnt, but its file "
                f"{learnt_of(job)} is missing; put it back, or begin again with --overwrite"
            )
    return own


def _taken(job: Job, own: Mapping[str, Any], policy: ResumePolicy, kept: Mapping[str, Any]) -> bool:
    """Whether the learnt state of another process is used; if not, it is dropped.

    Args:
        own: the first line that this process would write; `kept`: the one that is there.

    Raises:
        UsageError: neither is allowed.
    """
    found = differences(_unjudged(_asked(own)), _unjudged(_asked(kept)))
    if policy.overwrite:
        return not found and (policy.mix or not differences(own["environment"], kept["environment"]))
    if found:
        raise UsageError(
            f"dataset {job.dataset!r}: {learnt_of(job)} holds what another run learnt ({described(found)}); begin "
            f"again with --overwrite; {policy.keep_both}"
        )
    _accepted(job, learnt_of(job), kept, own["environment"], policy, "learnt")
    return True


def _under_others(there: Standing, environment: Mapping[str, Any]) -> str:
    """The versions or the kind of device under which a finished result was answered, if others, in words."""
    found = [pair for one in there.run.get("environments", []) for pair in differences(environment, one)]
    return ", ".join(dict.fromkeys(f"{name} {theirs} (now {ours})" for name, ours, theirs in found))


def _placed(file: Path) -> Path:
    """The file, after its folder has been created."""
    try:
        make_folder(file.parent)
    except OSError as error:
        raise StorageError(f"journal {str(file)!r}: cannot be made ({error.strerror or error})") from error
    return file
