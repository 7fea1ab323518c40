"""`Arms`: what a study compares on a row, in this process: signals, methods and fixed mixtures, on one model and one
pool.

    row -> each arm's mixture, with the row's own adapter and without it -> scored and answered
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from logo.baselines.method import Learned, Prepared, prepared_by
from logo.baselines.method import Task as MethodTask
from logo.errors import DataError, UsageError
from logo.evaluation.contest import LEFT_OUT, OWN, Contest, Lesson, Lessons
from logo.evaluation.datasets import Dataset
from logo.evaluation.identity import digests, environment, order_dependence, plugins_used, pool_digests, rule_of_weights
from logo.evaluation.metrics import first_line, measure, measures
from logo.evaluation.study import Facts
from logo.evaluation.summary import KINDS, Measured
from logo.rows import Row
from logo.selection.signals import SIGNALS

if TYPE_CHECKING:
    from logo.core import Selection
    from logo.engine import LoGo
    from logo.prompts import OnePrompt

Mixture = Mapping[str, float]
_V = TypeVar("_V")


@dataclass
class Arm:
    """One way to answer one row.

    Attributes:
        part: `answers` or `left_out`; `kind`: `signals`, `methods` or `mixtures`; `name`: its name there.
        mixture: adapter -> weight.
        metrics: its scores; `prediction`: the generated answer; `confidence`: of a signal's selection.
    """

    part: str
    kind: str
    name: str
    mixture: Mixture
    metrics: dict[str, float] = field(default_factory=dict)
    prediction: str = ""
    confidence: float | None = None


class Arms:
    """Engines in this process: one per signal, by name, on one model and one pool. Methods get the first one.

    Args:
        contest: what is compared beside the signals.
        batch_size: answers that are generated at once.
    """

    def __init__(self, engines: Mapping[str, LoGo], contest: Contest | None = None, batch_size: int = 8) -> None:
        self._engines, self._contest, self._batch_size = engines, contest or Contest(), batch_size
        self._logo = next(iter(engines.values()))
        self._prepared: dict[Lesson, Prepared] = {}

    @cached_property
    def facts(self) -> Facts:
        """The facts about the engines that a study records. Calibrates the pools if necessary."""
        return Facts(
            names=self._logo.names,
            pool=pool_digests(self._logo),
            settings=_engine_settings(self._engines),
            digests={key: value for logo in self._engines.values() for key, value in digests(logo).items()},
            environment=environment(self._logo),
            in_order=any(order_dependence(logo, {}) is not None for logo in self._engines.values()),
        )

    def learn(self, lessons: Iterable[Lesson]) -> Iterator[tuple[Lesson, Mapping[str, Any]]]:
        """The results of all lessons, in order.

        Raises:
            DataError: rows are missing or cannot be scored.
        """
        for lesson in lessons:
            yield lesson, self.learnt(lesson)

    def learnt(self, lesson: Lesson) -> Mapping[str, Any]:
        """The result of one lesson, as JSON; errors as in `learn`."""
        method = self._contest.methods[lesson.method]
        if isinstance(method, Learned):
            return method.learn(self._logo, self._task(lesson.of, lesson.about))
        raise RuntimeError(f"method {lesson.method!r} learns nothing")

    def __call__(self, rows: Iterable[tuple[Dataset, int]], lessons: Lessons) -> Iterator[Measured]:
        """Measures rows of tasks, in order.

        Args:
            lessons: the results of all lessons.

        Raises:
            DataError: a row cannot be scored (names the file and the line).
        """
        for task, index in rows:
            yield self.measured(task.name, f"{task.file}:{index + 1}", index, task.rows[index], lessons)

    def measured(self, task: str, where: str, index: int, row: Row, lessons: Lessons) -> Measured:
        """Measures one row; `where` names it in errors, which are those of `__call__`."""
        picked: dict[str, Selection] = {}
        seconds: dict[str, Any] = {"select": {}}
        for signal, logo in self._engines.items():
            started = time.perf_counter()
            picked[signal] = logo.select(row.prompt)
            seconds["select"][signal] = time.perf_counter() - started
        own = task if task in self._logo.names else None
        arms = list(self._arms(picked, own, row.prompt))
        for label in self._contest.methods:
            started = time.perf_counter()
            arms += self._of_method(label, task, row.prompt, lessons)
            seconds["select"][label] = time.perf_counter() - started
        self._judge(arms, task, where, row, seconds)
        for arm in arms:
            if arm.confidence is not None:
                arm.metrics["confidence"] = arm.confidence
            if own is not None and (arm.part, arm.kind) == ("answers", "signals"):
                arm.metrics = rank_metrics(picked[arm.name].scores, own) | arm.metrics
        scores = _by_part(sorted(arms, key=lambda arm: KINDS.index(arm.kind)), lambda arm: arm.metrics)
        return Measured(
            task=task,
            index=index,
            answers=scores["answers"],
            left_out=scores.get("left_out"),
            seconds=seconds,
            predictions={} if self._contest.new_tokens is None else _by_part(arms, lambda arm: arm.prediction),
        )

    # -- what answers -----------------------------------------------------------------------------------------------

    def _arms(self, picked: Mapping[str, Selection], own: str | None, prompt: OnePrompt) -> Iterator[Arm]:
        """The arms of signals and fixed mixtures. If own adapters are in the pool but only rows without them are
        measured, the oracle is still included for comparison.
        """
        names, asked = self._logo.names, self._contest.protocols
        whole = own is None or OWN in asked
        for signal, selection in picked.items() if whole else ():
            yield Arm("answers", "signals", signal, selection.mixture, confidence=selection.confidence)
        if own is not None:
            yield Arm("answers", "mixtures", "oracle", {own: 1.0})
        if whole:
            yield from _fixed("answers", names)
        if own is None or LEFT_OUT not in asked or not self._leaves(picked, own):
            return
        others = [name for name in names if name != own]
        for signal, logo in self._engines.items():
            examples = logo.scorer.examples
            if examples is None or bool(examples.known.all()):
                chosen = logo.reselect(picked[signal].scores, candidates=others)
            else:  # estimates of adapters without examples would still depend on the examples of the own one
                chosen = logo.select(prompt, candidates=others)
            yield Arm("left_out", "signals", signal, chosen.mixture, confidence=chosen.confidence)
        yield from _fixed("left_out", others)

    def _leaves(self, picked: Mapping[str, Selection], own: str) -> bool:
        """Whether adapters remain without a row's own one."""
        return len(self._logo.names) > 1 and not any(set(chosen.scores) <= {own} for chosen in picked.values())

    def _of_method(self, label: str, task: str, prompt: OnePrompt, lessons: Lessons) -> Iterator[Arm]:
        for about in self._contest.abouts(task, self._logo.names):
            select = self._knowing(Lesson(label, task, about), lessons).select
            candidates = self._task(task, about).candidates(self._logo)
            if select is None:
                [selection] = self._logo.select([prompt], candidates=candidates)
            else:
                [selection] = select([prompt], 1)
            if others := [name for name in selection.adapters if name not in candidates]:
                raise UsageError(
                    f"method {label!r} chose {others[0]!r}, which is not among the {len(candidates)} adapters that it "
                    f"may choose: use task.candidates(logo) in its `prepare`"
                )
            part = "answers" if about == OWN else "left_out"
            yield Arm(part, "methods", label, selection.mixture)

    def _knowing(self, which: Lesson, lessons: Lessons) -> Prepared:
        """A method prepared for a task; cached, because every row of the task needs it."""
        if which not in self._prepared:
            method = self._contest.methods[which.method]
            if isinstance(method, Learned):
                self._prepared[which] = method.recall(lessons[which])
            else:
                self._prepared[which] = prepared_by(method, self._logo, self._task(which.of, which.about))
        return self._prepared[which]

    def _task(self, name: str, about: str) -> MethodTask:
        task = self._contest.tasks[name]
        if about != LEFT_OUT:
            return task
        return replace(task, among=tuple(one for one in self._logo.names if one != name))

    # -- what it is worth -------------------------------------------------------------------------------------------

    def _judge(self, arms: Sequence[Arm], task: str, where: str, row: Row, seconds: dict[str, Any]) -> None:
        """Scores every arm, and generates its answer if requested."""
        logo, new_tokens = self._logo, self._contest.new_tokens
        gold = row.completion if isinstance(row.completion, str) else row.completion[0]
        kind = self._contest.metrics.get(task, "em")
        try:
            started = time.perf_counter()
            scored = logo.score(row.prompt, gold, [arm.mixture for arm in arms])
            seconds["score"] = time.perf_counter() - started
            answers = [""] * len(arms) if new_tokens is None else self._answers(row.prompt, arms, new_tokens)
        except UsageError as error:
            raise DataError(f"{where}: {error}") from error
        if new_tokens is not None:
            seconds["generate"] = time.perf_counter() - started - seconds["score"]
        for arm, value, answer in zip(arms, scored, answers, strict=True):
            arm.metrics = {"exact_match": float(value.exact_match), "nll": value.nll}
            if new_tokens is not None:
                arm.prediction = first_line(answer)
                worth = measure(kind, arm.prediction, row.completion)
                arm.metrics["generated"] = float(worth[measures(kind)[-1]] if isinstance(worth, dict) else worth)

    def _answers(self, prompt: OnePrompt, arms: Sequence[Arm], new_tokens: int) -> list[str]:
        """One answer for each arm; equal mixtures share one."""
        keys = [tuple(sorted(arm.mixture.items())) for arm in arms]
        distinct = list(dict.fromkeys(keys))
        made = self._logo.generate(
            [prompt] * len(distinct),
            adapters=[dict(key) for key in distinct],
            max_new_tokens=new_tokens,
            batch_size=self._batch_size,
            stop_at_newline=True,
        )
        texts = dict(zip(distinct, (one.text for one in made), strict=True))
        return [texts[key] for key in keys]


def rank_metrics(scores: Mapping[str, float], own: str) -> dict[str, float]:
    """`top1`, `top3` and the reciprocal rank `mrr` of one adapter; ties and a missing score count against it."""
    if own not in scores:
        return {"top1": 0.0, "top3": 0.0, "mrr": 0.0}
    rank = sum(score >= scores[own] for score in scores.values())
    return {"top1": float(rank <= 1), "top3": float(rank <= 3), "mrr": 1 / rank}


def _fixed(part: str, names: Sequence[str]) -> Iterator[Arm]:
    yield Arm(part, "mixtures", "uniform", dict.fromkeys(names, 1 / len(names)))
    yield Arm(part, "mixtures", "base", {})


def _by_part(arms: Sequence[Arm], value: Callable[[Arm], _V]) -> dict[str, dict[str, dict[str, _V]]]:
    """A value of each arm, by part, kind and name."""
    found: dict[str, dict[str, dict[str, _V]]] = {}
    for arm in arms:
        found.setdefault(arm.part, {}).setdefault(arm.kind, {})[arm.name] = value(arm)
    return found


def _reads(logo: LoGo) -> str:
    """In words, what is read of a prompt to score adapters."""
    scorer = logo.scorer
    acts = " and ".join(map(str, logo.fitted.activations))
    what = {
        "last": "the last token",
        "mean": "the mean of all tokens",
        "each": "each token",
        "tail": f"the tokens on which the adapters act ({acts})",
    }[scorer.signal.token]
    return f"{what}, at {len(scorer.points)} points" + (", once" if scorer.prefix_cache is not None else "")


def _engine_settings(engines: Mapping[str, LoGo]) -> dict[str, Any]:
    first = next(iter(engines.values()))
    model, merge = first.model, first.merge
    signals = {
        name: {
            # `rule_of_weights` has the threshold where it matters.
            **{setting: value for setting, value in asdict(logo.settings).items() if setting != "unsure_below"},
            "probe_context": logo.probe_context,
            **plugins_used(SIGNALS.source(name)),
            **rule_of_weights(logo),
            "k": logo.k,
            "points": [point.module for point in logo.scorer.points],
            "activations": [str(one) for one in logo.fitted.activations if logo.fitted.read_once],
            "reads": _reads(logo),
        }
        for name, logo in engines.items()
    }
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        **({} if merge is None else {"merge": merge}),
        "signals": signals,
    }
