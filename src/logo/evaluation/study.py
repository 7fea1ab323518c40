"""A study: which signal or method finds the right adapters of a pool, and what that is worth.

The rows of `DIR/NAME.jsonl` belong to the adapter of that name, the *target adapter* of the task, or to none. On each
row every arm of a contest (`logo.evaluation.contest`), a signal of the engine, some of its evidence, or a method,
selects a mixture under each protocol. Where the row has a gold text, it is scored under each mixture, teacher-forced,
and answers are generated if asked. A row is one line of `rows.jsonl`, and `logo.evaluation.study_summary` makes a
report of them. Several folders have the same tasks in several wordings.
"""

from __future__ import annotations

import functools
import itertools
import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from logo.adapters.peft import RECORD
from logo.baselines.method import Method, Prepared
from logo.errors import DataError, LoGoError, UsageError, listed
from logo.evaluation.answer import Answerer, Facts, around_answers_to, dataset_identity, method_identity, task_of
from logo.evaluation.contest import ALWAYS, IN_POOL, OF_EVIDENCE, REMOVED, Contest, evidence_in
from logo.evaluation.metrics import answer_in, by_measure, measure, measures
from logo.evaluation.results import ROWS, RUN, Partial, differences, is_done, read_run
from logo.evaluation.run import warn_of_copies
from logo.evaluation.study_summary import summary
from logo.prompts import no_warnings_of_cuts
from logo.rows import Row, training_rows
from logo.scoring import encoded

if TYPE_CHECKING:
    from logo.adapters.adapter import Adapter
    from logo.core import Selection
    from logo.evaluation.datasets import Dataset


@dataclass(frozen=True)
class Trial:
    """A protocol for the rows of a task, and the adapters that may be selected there; None: all of the pool."""

    task: Dataset
    protocol: str
    candidates: tuple[str, ...] | None


MixtureKey = tuple[tuple[str, float], ...]  # names and weights


class Measurer:
    """Measures rows on one engine.

    Args:
        answerer: the engine; its method is not used.
        contest: what is compared.

    Raises UsageError: evidence that the pool or the engine does not have.
    """

    def __init__(self, answerer: Answerer, contest: Contest) -> None:
        self.contest = contest
        self._answerer = answerer
        self._logo = answerer.logo
        self._methods = {name: Method(name) for name in ALWAYS} | dict(contest.methods)
        # Prompts are selected for as they are scored and answered: not cut for a longer answer.
        self._new_tokens = contest.new_tokens or 1
        self._prepared: dict[tuple[str, Path, str], Prepared] = {}  # by method, file of the task, and protocol
        kinds = {name: evidence_in(name) for name in contest.signals}
        self._of_evidence = {name: self._logo.only(kinds[name]) for name in contest.signals if kinds[name]}
        for engine in self._of_evidence.values():
            engine.calibrate(OF_EVIDENCE)

    @cached_property
    def facts(self) -> Facts:
        """What a study records of the engine and the contest."""
        facts = self._answerer.facts
        identity = {name: value for name, value in facts.identity.items() if name not in ("method", "max_new_tokens")}
        contest = json.loads(json.dumps(self.contest.as_dict()))
        contest["methods"] = {label: method_identity(method) for label, method in self.contest.methods.items()}
        return replace(facts, identity={**identity, "contest": contest})

    def close(self) -> None:
        """Ends the engine's processes, if it has some."""
        self._logo.close()

    @no_warnings_of_cuts()
    def measure(self, task: Dataset, index: int) -> dict[str, Any]:
        """The record of a row of a task that `check` takes."""
        row = task.rows[index]
        [prompt] = self._logo.prompts.read([row.prompt], self._new_tokens)
        arms: list[dict[str, Any]] = []
        seconds: dict[str, float] = {}
        for trial in self._trials(task):
            for label in self._labels(trial.protocol, row):
                select = self._selecting(label, trial)
                began = time.perf_counter()
                selection = select(row.prompt)
                seconds[label] = seconds.get(label, 0.0) + time.perf_counter() - began
                arms.append(_arm(label, trial, selection))
        if row.completion:
            self._judge(arms, task, row)
        record = {"task": task.name, "row": index, "prompt": row.prompt, "cut": prompt.cut}
        if task.wording:
            record["wording"] = task.wording
        return {**record, "arms": arms, "seconds": seconds}

    def tasks_of_protocols(self, tasks: Sequence[Dataset]) -> list[Dataset]:
        """The tasks that a protocol asks for; UsageError if there are none."""
        names = self._logo.names
        of_protocols = [task for task in tasks if self.contest.of(task.name, names)]
        if not of_protocols:
            of_tasks = {task.name for task in tasks}
            raise UsageError(
                f"protocols {', '.join(self.contest.protocols)}: they ask for none of these rows: "
                f"{len(of_tasks.intersection(names))} of {len(of_tasks)} tasks have an adapter of their name"
            )
        return of_protocols

    @no_warnings_of_cuts()
    def check(self, task: Dataset) -> None:
        """Raises DataError, which names the file and the line, for a prompt that cannot be read, for a gold text that
        cannot be scored, and for a row
        whose target adapter is another one of the pool than that of the file's name."""
        for number, row in enumerate(task.rows, start=1):
            if row.adapter not in (None, task.name) and row.adapter in self._logo.names:
                raise DataError(
                    f"{task.file}:{number}: expected a row of the adapter that the file is named after, found one of "
                    f"{row.adapter!r}; put it into {row.adapter}.jsonl"
                )
            golds = row.golds if row.completion else ()
            try:
                self._logo.prompts.read([row.prompt], room=None)
                for gold in golds:
                    encoded(self._logo.prompts, row.prompt, gold)
            except UsageError as error:
                raise DataError(f"{task.file}:{number}: {error}") from error

    def warn_of_known_prompts(self, tasks: Sequence[Dataset]) -> None:
        """Warns of rows whose prompts adapters of the pool have as example prompts, or were trained on."""
        pool = [self._logo.pool[name] for name in self._logo.names]
        prompts = [row.context for task in tasks for row in task.rows]
        for kind, prompts_of in (("example prompts", attrgetter("examples")), ("training rows", _training_prompts)):
            counts: dict[str, int] = {}
            known_prompts: set[str] = set()
            for adapter in pool:
                its_prompts = frozenset(prompts_of(adapter))
                count = sum(prompt in its_prompts for prompt in prompts)
                if count:
                    counts[adapter.name] = count
                    known_prompts |= its_prompts
            if counts:
                rows = sum(prompt in known_prompts for prompt in prompts)
                of_adapters = listed([f"{count} of {name}" for name, count in counts.items()], 10)
                warnings.warn(
                    f"{rows} rows are {kind} of adapters in the pool ({of_adapters}): these are found more easily for "
                    "them than for other prompts",
                    UserWarning,
                    stacklevel=2,
                )

    def _trials(self, task: Dataset) -> list[Trial]:
        """The protocols of a task's rows."""
        names = self._logo.names
        without_target = tuple(name for name in names if name != task.name)
        return [
            Trial(task, protocol, without_target if protocol == REMOVED else None)
            for protocol in self.contest.of(task.name, names)
        ]

    def _labels(self, protocol: str, row: Row) -> list[str]:
        """What selects for a row: without a gold text, only what looks at the prompt is of interest."""
        methods = [*self._methods] if row.completion else [*self.contest.methods]
        return [*self.contest.signals, *(name for name in methods if name != "target" or protocol == IN_POOL)]

    def _selecting(self, label: str, trial: Trial) -> Callable[[Any], Selection]:
        """Selects for a prompt of a task; a method is prepared before its first one."""
        among = {"candidates": trial.candidates, "max_new_tokens": self._new_tokens}
        own = functools.partial(self._logo.select, **among)
        if label in self._of_evidence:
            return functools.partial(self._of_evidence[label].select, signal=OF_EVIDENCE, **among)
        if label in self.contest.signals:
            return functools.partial(own, signal=label)
        select = self._prepared_for(label, trial).select
        return own if select is None else lambda prompt: select([prompt], 1)[0]

    def _prepared_for(self, label: str, trial: Trial) -> Prepared:
        """A method that knows the task."""
        key = label, trial.task.file, trial.protocol
        if key not in self._prepared:
            unnamed = replace(task_of(trial.task, trial.candidates or ()), targets=(None,) * len(trial.task.rows))
            self._prepared[key] = self._methods[label].prepare(self._logo, unnamed)
            if self._prepared[key].engine is not None:
                raise UsageError(f"method {label!r} answers with a model of its own: compare it by `logo eval run`")
        return self._prepared[key]

    def _judge(self, arms: Sequence[dict[str, Any]], task: Dataset, row: Row) -> None:
        """Scores every arm, and generates its answer if asked; equal mixtures share one. Of several gold texts, any
        may be matched exactly, and the likeliest gives the negative log-likelihood."""
        mixtures = list(dict.fromkeys(_mixture(arm) for arm in arms))
        scores_of_golds = [self._logo.score(row.prompt, gold, [dict(key) for key in mixtures]) for gold in row.golds]
        scores = dict(zip(mixtures, zip(*scores_of_golds, strict=True), strict=True))
        answers = {} if self.contest.new_tokens is None else self._answers(row, mixtures)
        for arm in arms:
            mixture = _mixture(arm)
            arm["exact_match"] = float(any(score.exact_match for score in scores[mixture]))
            arm["nll"] = min(score.nll for score in scores[mixture])
            if answers:
                value = measure(task.metric, answers[mixture], row.completion)
                [score] = by_measure(task.metric, [value])[measures(task.metric)[-1]]
                arm |= {"prediction": answers[mixture], "score": score}

    def _answers(self, row: Row, mixtures: Sequence[MixtureKey]) -> dict[MixtureKey, str]:
        """The answer to a row under each mixture."""
        front, end = around_answers_to(self._logo, row)
        generations = self._logo.generate(
            [row.prompt] * len(mixtures),
            adapters=[dict(key) for key in mixtures],
            max_new_tokens=self._new_tokens,
            stop_at_newline=not (row.whole or "\n" in front),
        )
        texts = [answer_in(generation.text, row.whole, front, end) for generation in generations]
        return dict(zip(mixtures, texts, strict=True))


def _mixture(arm: Mapping[str, Any]) -> MixtureKey:
    """What an arm has selected."""
    return tuple(zip(arm["selected"], arm["weights"], strict=True))


def _arm(label: str, trial: Trial, selection: Selection) -> dict[str, Any]:
    """What a record says of a selection; UsageError for one of adapters that may not be selected."""
    if trial.candidates is not None:
        forbidden = [name for name in selection.adapters if name not in trial.candidates]
        if forbidden:
            raise UsageError(f"method {label!r} chose {forbidden[0]!r}: use task.candidates(logo), which leaves it out")
    arm: dict[str, Any] = {
        "protocol": trial.protocol,
        "arm": label,
        "selected": list(selection.adapters),
        "weights": list(selection.weights),
        "confidence": selection.confidence,
    }
    if selection.scores:
        arm["first"] = max(selection.scores, key=selection.scores.__getitem__)
        arm["rank"] = rank(selection.scores, trial.task.name) if trial.protocol == IN_POOL else None
    return arm


def rank(scores: Mapping[str, float], target: str) -> int | None:
    """The rank of an adapter by its score, from 1; ties count against it; None: it has no score."""
    return None if target not in scores else sum(score >= scores[target] for score in scores.values())


def _training_prompts(adapter: Adapter) -> list[str]:
    """The prompts of the rows that `logo train` has made an adapter from; none if they are not there any more, or if
    nobody knows what it was made from."""
    import yaml

    try:
        record = yaml.safe_load((adapter.folder / RECORD).read_text(encoding="utf-8"))
        rows = training_rows(Path(record["rows"]["file"]), answers=False)
    except (OSError, ValueError, TypeError, LookupError, yaml.YAMLError, LoGoError):
        return []
    return [row.context for row in rows]


# -- running -----------------------------------------------------------------------------------------------------------


def run_study(
    tasks: Sequence[Dataset],
    folder: Path,
    measurer: Measurer,
    *,
    overwrite: bool = False,
    command: Mapping[str, Any] | None = None,
    tell: Callable[[str], None] = lambda task: None,
) -> dict[str, Any]:
    """Measures the rows that are not measured yet, writes `run.json` and `rows.jsonl`, and returns the report.

    Args:
        tasks: of several folders, those of each have its `wording`.
        tell: called with a task's name after each of its rows, those that were measured before included.

    Raises:
        UsageError: the study in the folder is another one, or the contest asks for no row.
        DataError: a row cannot be scored (names the file and the line), or a method lacks training rows.
    """
    facts = measurer.facts
    methods = list(measurer.contest.methods.values())
    tasks = measurer.tasks_of_protocols(tasks)
    for task, method in itertools.product(tasks, methods):
        warn_of_copies(task, method)
    for task in tasks:
        measurer.check(task)
    measurer.warn_of_known_prompts(tasks)
    learner = next((method for method in methods if method.needs == "train"), None)
    identity = {**facts.identity, "tasks": {_label(task): dataset_identity(task, learner) for task in tasks}}
    begun = {**identity, "environment": dict(facts.environment)}
    stands = None if overwrite else functools.partial(is_done, folder, identity, begun, files=(RUN, ROWS))
    started = datetime.now(timezone.utc)
    with closing(Partial(folder, begun, fresh=overwrite or facts.order is not None, stands=stands)) as partial:
        if partial.done:
            return _stored_report(folder, facts)
        _measure_missing(tasks, measurer, partial, tell)
        report = summary(list(partial.records.values()))
        about = {
            "date": started.isoformat(timespec="seconds"),
            "device": facts.device,
            "report": report,
            "command": dict(command or {}),
            "settings": dict(facts.settings),
            "identity": identity,
            "environment": dict(facts.environment),
        }
        partial.finish({RUN: about})
    return report


def _label(task: Dataset) -> str:
    """The name of a task, with its wording if there are several."""
    return f"{task.wording}/{task.name}" if task.wording else task.name


def _stored_report(folder: Path, facts: Facts) -> dict[str, Any]:
    """The report of a finished study; warns if it was measured in another environment."""
    about = read_run(folder)
    different = differences(facts.environment, about["environment"])
    if different:
        changes = ", ".join(f"{name} {was} (now {now})" for name, now, was in different)
        warnings.warn(
            f"{folder} was measured under other versions or on another device: {changes}", UserWarning, stacklevel=3
        )
    report: dict[str, Any] = about["report"]
    return report


def _measure_missing(
    tasks: Sequence[Dataset], measurer: Measurer, partial: Partial, tell: Callable[[str], None]
) -> None:
    """Measures the rows that have no record. The first rows of all tasks come first, so that an unfinished study is a
    smaller study of all tasks."""
    rows = [(task, row) for task in tasks for row in range(len(task.rows))]
    rows.sort(key=lambda place: (place[1], place[0].name, place[0].wording))  # in whatever order they are asked for
    for record in partial.records.values():
        tell(record["task"])
    for number, (task, row) in enumerate(rows):
        if number not in partial.records:
            partial.add([{"index": number, **measurer.measure(task, row)}])
            tell(task.name)
