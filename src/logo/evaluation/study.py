"""A study: which signal or method finds the right adapters of a pool, and what that is worth.

The rows of `DIR/NAME.jsonl` belong to the adapter of that name, the *target adapter* of the task, or to none. There are
three protocols, those of the literature:

    in-pool       the target adapter is in the pool
    removed       the same rows, with that adapter left out
    out-of-pool   tasks that never had an adapter

On each row every arm, a signal of the engine or a method, selects a mixture. Where the row has a gold text, it is
scored under each mixture, teacher-forced, and answers are generated if asked. A row is one line of `rows.jsonl`.
"""

from __future__ import annotations

import functools
import itertools
import json
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from logo.baselines.method import Method, Prepared
from logo.errors import DataError, UsageError, closest
from logo.evaluation.answer import Answerer, Facts, dataset_identity, front_of, task_of
from logo.evaluation.metrics import answer_in, by_measure, measure, measures
from logo.evaluation.results import ROWS, RUN, Partial, differences, is_done, read_run
from logo.evaluation.run import warn_of_copies
from logo.evaluation.statistics import DRAWS, FEWEST, auroc, calibration_error, over_tasks
from logo.rows import Row
from logo.scoring import encoded
from logo.selection.selector import UNSURE

if TYPE_CHECKING:
    from logo.core import Selection
    from logo.evaluation.datasets import Dataset

IN_POOL, REMOVED, OUT_OF_POOL = "in-pool", "removed", "out-of-pool"
PROTOCOLS = (IN_POOL, REMOVED, OUT_OF_POOL)
ALWAYS = ("target", "uniform", "base")  # methods that every study of gold texts has
SIGNALS = ("calibrated", "norm", "entropy")
Mixture = Mapping[str, float]


@dataclass(frozen=True)
class Contest:
    """What is compared on every row, and how.

    Attributes:
        signals: of the engine, the first of which methods may use.
        methods: label -> method; those of `ALWAYS` are added.
        protocols: some of `PROTOCOLS`.
        new_tokens: length of generated answers; None: gold texts are only scored.
    """

    signals: tuple[str, ...] = SIGNALS
    methods: Mapping[str, Method] = field(default_factory=dict)
    protocols: tuple[str, ...] = PROTOCOLS
    new_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in self.protocols:
            if name not in PROTOCOLS:
                raise UsageError(f"protocol {name!r}{closest(name, PROTOCOLS)}; known: {', '.join(PROTOCOLS)}")
        if not (self.signals and self.protocols):
            raise UsageError("study: expected at least one signal and one protocol, found none")

    def of(self, task: str, names: Sequence[str]) -> tuple[str, ...]:
        """The protocols of a task's rows, with a pool of these adapters."""
        mine = (IN_POOL, *((REMOVED,) if len(names) > 1 else ())) if task in names else (OUT_OF_POOL,)
        return tuple(one for one in mine if one in self.protocols)

    def as_dict(self) -> dict[str, Any]:
        """The contest as JSON."""
        methods = {label: method.as_dict() for label, method in self.methods.items()}
        return {**vars(self), "methods": methods}


class Measurer:
    """Measures rows on one engine.

    Args:
        answerer: the engine; its method is not used.
        contest: what is compared.
    """

    def __init__(self, answerer: Answerer, contest: Contest) -> None:
        self._answerer, self.contest, self._logo = answerer, contest, answerer.logo
        self._methods = {name: Method(name) for name in ALWAYS} | dict(contest.methods)
        # Prompts are selected for as they are scored and answered: not cut for a longer answer.
        self._room = {"max_new_tokens": contest.new_tokens or 1}
        self._prepared: dict[tuple[str, str, str], Prepared] = {}  # by method, task and protocol

    @cached_property
    def facts(self) -> Facts:
        """What a study records of the engine and the contest."""
        facts = self._answerer.facts
        identity = {name: value for name, value in facts.identity.items() if name not in ("method", "max_new_tokens")}
        contest = json.loads(json.dumps(self.contest.as_dict()))
        return replace(facts, identity={**identity, "contest": contest})

    def close(self) -> None:
        """Ends the engine's processes, if it has some."""
        self._logo.close()

    def measure(self, task: Dataset, index: int) -> dict[str, Any]:
        """The record of a row of a task that `check` takes."""
        row, names, arms = task.rows[index], self._logo.names, list[dict[str, Any]]()
        seconds: dict[str, float] = {}
        for protocol in self.contest.of(task.name, names):
            among = [name for name in names if name != task.name] if protocol == REMOVED else None
            for label in self._labels(protocol, row):
                select = self._selecting(label, protocol, task, among)
                began = time.perf_counter()
                chosen = select(row.prompt)
                seconds[label] = seconds.get(label, 0.0) + time.perf_counter() - began
                if among is not None and (others := [name for name in chosen.adapters if name not in among]):
                    found = f"method {label!r} chose {others[0]!r}"
                    raise UsageError(f"{found}: use task.candidates(logo), which leaves it out")
                arm: dict[str, Any] = {"protocol": protocol, "arm": label, "selected": list(chosen.adapters)}
                arm |= {"weights": list(chosen.weights), "confidence": chosen.confidence}
                if chosen.scores:
                    arm["first"] = max(chosen.scores, key=chosen.scores.__getitem__)
                    arm["rank"] = rank(chosen.scores, task.name) if protocol == IN_POOL else None
                arms.append(arm)
        if row.completion:
            self._judge(arms, task, row)
        return {"task": task.name, "row": index, "prompt": row.prompt, "arms": arms, "seconds": seconds}

    def check(self, task: Dataset) -> None:
        """Raises DataError, which names the file and the line, for a gold text that cannot be scored, and for a row
        whose target adapter is another one of the pool than that of the file's name."""
        for number, row in enumerate(task.rows, start=1):
            if row.adapter not in (None, task.name) and row.adapter in self._logo.names:
                found = f"expected a row of the adapter that the file is named after, found one of {row.adapter!r}"
                raise DataError(f"{task.file}:{number}: {found}; put it into {row.adapter}.jsonl")
            if row.completion:
                try:
                    for gold in row.golds:
                        encoded(self._logo.prompts, row.prompt, gold)
                except UsageError as error:
                    raise DataError(f"{task.file}:{number}: {error}") from error

    def _labels(self, protocol: str, row: Row) -> list[str]:
        """What selects for a row: without a gold text, only what looks at the prompt is of interest."""
        methods = [*self._methods] if row.completion else [*self.contest.methods]
        return [*self.contest.signals, *(name for name in methods if name != "target" or protocol == IN_POOL)]

    def _selecting(
        self, label: str, protocol: str, task: Dataset, among: Sequence[str] | None
    ) -> Callable[[Any], Selection]:
        """Selects for a prompt of a task; a method is prepared before its first one."""
        if label in self.contest.signals:
            return functools.partial(self._logo.select, signal=label, candidates=among, **self._room)
        key = label, task.name, protocol
        if key not in self._prepared:
            unnamed = replace(task_of(task, among or ()), targets=(None,) * len(task.rows))
            self._prepared[key] = self._methods[label].prepare(self._logo, unnamed)
            if self._prepared[key].engine is not None:
                raise UsageError(f"method {label!r} answers with a model of its own: compare it by `logo eval run`")
        select = self._prepared[key].select
        if select is None:
            return functools.partial(self._logo.select, candidates=among, **self._room)
        return lambda prompt: select([prompt], 1)[0]

    def _judge(self, arms: Sequence[dict[str, Any]], task: Dataset, row: Row) -> None:
        """Scores every arm, and generates its answer if asked; equal mixtures share one. Of several gold texts, any
        may be matched exactly, and the likeliest gives the negative log-likelihood."""
        mixtures = {tuple(zip(arm["selected"], arm["weights"], strict=True)): arm for arm in arms}
        keys = list(mixtures)
        each = [self._logo.score(row.prompt, gold, [dict(key) for key in keys]) for gold in row.golds]
        scored = dict(zip(keys, zip(*each, strict=True), strict=True))
        texts: dict[Any, str] = {}
        if self.contest.new_tokens is not None:
            front = front_of(self._logo, row)
            lines = row.whole or "\n" in front
            how: dict[str, Any] = {"max_new_tokens": self.contest.new_tokens, "stop_at_newline": not lines}
            made = self._logo.generate([row.prompt] * len(keys), adapters=[dict(key) for key in keys], **how)
            texts = {key: answer_in(one.text, row.whole, front) for key, one in zip(keys, made, strict=True)}
        for arm in arms:
            key = tuple(zip(arm["selected"], arm["weights"], strict=True))
            arm["exact_match"] = float(any(one.exact_match for one in scored[key]))
            arm["nll"] = min(one.nll for one in scored[key])
            if texts:
                value = measure(task.metric, texts[key], row.completion)
                [score] = by_measure(task.metric, [value])[measures(task.metric)[-1]]
                arm |= {"prediction": texts[key], "score": score}


def rank(scores: Mapping[str, float], target: str) -> int | None:
    """The rank of an adapter by its score, from 1; ties count against it; None: it has no score."""
    return None if target not in scores else sum(score >= scores[target] for score in scores.values())


# -- running -----------------------------------------------------------------------------------------------------------


def study(
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
        tell: called with a task's name after each of its rows, those that were known included.

    Raises:
        UsageError: the study in the folder is another one, or the contest asks for no row.
        DataError: a row cannot be scored (names the file and the line), or a method lacks training rows.
    """
    facts, contest = measurer.facts, measurer.contest
    names = list(facts.identity["pool"])
    asked = [task for task in tasks if contest.of(task.name, names)]
    if not asked:
        own = sum(task.name in names for task in tasks)
        raise UsageError(
            f"protocols {', '.join(contest.protocols)}: they ask for none of these rows: {own} of {len(tasks)} tasks "
            "have an adapter of their name"
        )
    for task, method in itertools.product(asked, contest.methods.values()):
        warn_of_copies(task, method)
    for task in asked:
        measurer.check(task)
    learner = next((one for one in contest.methods.values() if one.needs == "train"), None)
    identity = {**facts.identity, "tasks": {task.name: dataset_identity(task, learner) for task in asked}}
    begun = {**identity, "environment": dict(facts.environment)}
    stands = None if overwrite else functools.partial(is_done, folder, identity, begun, files=(RUN, ROWS))
    # The first rows of all tasks come first, so that an unfinished study is a smaller study of all tasks.
    rows = ((task, row) for task in asked for row in range(len(task.rows)))
    order = sorted(rows, key=lambda one: (one[1], one[0].name))  # whatever order they are asked for in
    began = datetime.now(timezone.utc)
    with closing(Partial(folder, begun, fresh=overwrite or facts.order is not None, stands=stands)) as partial:
        if partial.done:
            found = read_run(folder)
            if other := differences(facts.environment, found["environment"]):
                said = ", ".join(f"{name} {there} (now {here})" for name, here, there in other)
                told = f"{folder} was measured under other versions or on another device: {said}"
                warnings.warn(told, UserWarning, stacklevel=2)
            report: dict[str, Any] = found["report"]
            return report
        for record in partial.records.values():
            tell(record["task"])
        for number, (task, row) in enumerate(order):
            if number not in partial.records:
                partial.add([{"index": number, **measurer.measure(task, row)}])
                tell(task.name)
        report = summary(list(partial.records.values()))
        run = {
            **{"date": began.isoformat(timespec="seconds"), "device": facts.device, "report": report},
            **{"command": dict(command or {}), "settings": dict(facts.settings)},
            **{"identity": identity, "environment": dict(facts.environment)},
        }
        partial.finish({RUN: run})
    return report


# -- numbers -----------------------------------------------------------------------------------------------------------

Tasks = dict[str, list[float]]  # task -> a number of each row


def summary(records: Sequence[Mapping[str, Any]], seed: int = 0) -> dict[str, Any]:
    """The report of measured rows, as JSON: `protocols`, with the metrics of each arm; `confidence` by signal; the most
    frequent `confusions`, and those of rows that no adapter fits and that are not unsure (`mistaken`); the median
    `milliseconds` of a selection by each arm; `tasks` and `rows`.

    A metric's `value` is the mean over tasks of their rows' means, and its 95 % `interval` says how much it would vary
    with other tasks. Metrics are `top1`, `top3` and `mrr` of the target adapter's rank; `exact_match` (teacher-forced)
    and `nll` (nats per token) of gold texts; `score` of generated answers; and `of_target`, the mean of `score`, or
    else of `exact_match`, divided by that of the target adapter alone on the same tasks.
    """
    columns: dict[tuple[str, str], dict[str, Tasks]] = {}
    times: dict[str, list[float]] = {}
    for record in records:
        selections = Counter(arm["arm"] for arm in record["arms"])
        for name, seconds in record["seconds"].items():
            times.setdefault(name, []).append(1000 * seconds / selections[name])
        for arm in record["arms"]:
            own = columns.setdefault((arm["protocol"], arm["arm"]), {})
            for metric, value in _metrics(arm).items():
                own.setdefault(metric, {}).setdefault(record["task"], []).append(value)
    protocols: dict[str, dict[str, Any]] = {}
    quality = "score" if any("score" in own for own in columns.values()) else "exact_match"
    target = columns.get((IN_POOL, "target"), {}).get(quality, {})
    for (protocol, arm), own in columns.items():
        found = {metric: _mean(tasks, seed) for metric, tasks in own.items()}
        if protocol != OUT_OF_POOL and quality in own and target:
            found["of_target"] = _ratio(own[quality], target, seed)
        protocols.setdefault(protocol, {})[arm] = found
    signals = dict.fromkeys(arm for _, arm in columns)
    return {
        "protocols": protocols,
        "confidence": {name: said for name in signals if (said := _confidence(columns, name)) is not None},
        "confusions": confusions(records),
        "mistaken": confusions(records, (REMOVED, OUT_OF_POOL), UNSURE),
        "milliseconds": {name: float(np.median(some)) for name, some in times.items()},
        "tasks": len({record["task"] for record in records}),
        "rows": len(records),
    }


def _metrics(arm: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of one arm on one row."""
    found = {name: arm[name] for name in ("exact_match", "nll", "score", "confidence") if arm.get(name) is not None}
    if arm["protocol"] == IN_POOL and "first" in arm:
        place = arm["rank"] or float("inf")
        found |= {"top1": float(place <= 1), "top3": float(place <= 3), "mrr": 1 / place}
    return found


def _mean(tasks: Tasks, seed: int) -> dict[str, Any]:
    means = [sum(values) / len(values) for values in tasks.values()]
    return {"value": sum(means) / len(means), "interval": over_tasks(means, seed)}


def _ratio(tasks: Tasks, target: Tasks, seed: int) -> dict[str, Any]:
    """The ratio of two means over the same tasks, whose interval draws tasks for both."""
    pairs = np.array([[np.mean(tasks[name]), np.mean(target[name])] for name in tasks])  # (tasks, 2)
    whole = pairs.mean(axis=0)
    if not whole[1]:
        return {"value": None, "interval": None}
    places = np.random.default_rng(seed).integers(len(pairs), size=(DRAWS, len(pairs)))
    drawn = pairs[places].mean(axis=1)  # (draws, 2)
    ratios = drawn[drawn[:, 1] > 0, 0] / drawn[drawn[:, 1] > 0, 1]
    ends = [float(end) for end in np.percentile(ratios, [2.5, 97.5])] if len(pairs) >= FEWEST else None
    return {"value": float(whole[0] / whole[1]), "interval": ends}


def _confidence(columns: Mapping[tuple[str, str], Mapping[str, Tasks]], signal: str) -> dict[str, Any] | None:
    """How well the confidence of a signal tells rows whose target adapter is in the pool from others: its mean by
    protocol, the share that is not unsure, AUROC against each other protocol, and the calibration error; None: none."""
    values = {
        protocol: [one for rows in columns.get((protocol, signal), {}).get("confidence", {}).values() for one in rows]
        for protocol in PROTOCOLS
    }
    own, others = values[IN_POOL], [*values[REMOVED], *values[OUT_OF_POOL]]
    if not own:
        return None
    truth = [True] * len(own) + [False] * len(others)
    return {
        "mean": {protocol: float(np.mean(some)) for protocol, some in values.items() if some},
        "sure": {protocol: float(np.mean(np.array(some) >= UNSURE)) for protocol, some in values.items() if some},
        "auroc": {protocol: auroc(own, values[protocol]) for protocol in (REMOVED, OUT_OF_POOL) if values[protocol]},
        "error": calibration_error([*own, *others], truth) if others else None,
    }


def confusions(
    records: Sequence[Mapping[str, Any]], protocols: Sequence[str] = (IN_POOL,), sure: float = 0.0
) -> dict[str, list[dict[str, Any]]]:
    """By arm, the pairs of a task and another adapter that comes first on its rows, at a confidence of `sure` or more;
    most rows first."""
    counts: dict[str, Counter[tuple[str, str]]] = {}
    rows = Counter(record["task"] for record in records)
    for record in records:
        for arm in record["arms"]:
            wrong = arm["protocol"] in protocols and arm.get("first") not in (None, record["task"])
            if wrong and (arm["confidence"] or 0.0) >= sure:
                counts.setdefault(arm["arm"], Counter())[record["task"], arm["first"]] += 1
    return {
        name: [
            {"task": task, "first": first, "rows": count, "of": rows[task]}
            for (task, first), count in found.most_common()
        ]
        for name, found in counts.items()
    }
