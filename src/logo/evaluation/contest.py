"""What a study compares on every row: protocols, methods beside the signals, and the judgement of answers.

The protocols are those of the literature: a row's *own* adapter is in the pool, it is *left out*, or the task is
*unseen* and never had one. What methods have to learn before their first row is divided into lessons, whose results are
stored separately.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from logo.baselines.method import Learned, Method, Task, key_of
from logo.errors import UsageError, closest
from logo.evaluation.metrics import METRICS, Kind
from logo.identity import fingerprint

OWN, LEFT_OUT, UNSEEN = "own", "left-out", "unseen"
PROTOCOLS = (OWN, LEFT_OUT, UNSEEN)


class Lesson(NamedTuple):
    """Something that a method learns once.

    Attributes:
        method: label of the method.
        of: the task.
        about: `own`: with the whole pool; `left-out`: without the task's own adapter.
    """

    method: str
    of: str
    about: str


Lessons = Mapping[Lesson, Mapping[str, Any]]


@dataclass(frozen=True)
class Contest:
    """What is compared, and how.

    Attributes:
        protocols: some of `PROTOCOLS`.
        new_tokens: length of generated answers; None: answers are only scored, teacher-forced.
        methods: label -> method, beside the signals.
        tasks: by name, as far as methods may use them.
        metrics: task -> metric of generated answers; exact match for other tasks.
    """

    protocols: tuple[str, ...] = PROTOCOLS
    new_tokens: int | None = None
    methods: Mapping[str, Method] = field(default_factory=dict)
    tasks: Mapping[str, Task] = field(default_factory=dict)
    metrics: Mapping[str, Kind] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.protocols:
            raise UsageError(f"protocol: expected one or more of {', '.join(PROTOCOLS)}, found none")
        for name in self.protocols:
            if name not in PROTOCOLS:
                raise UsageError(f"protocol {name!r}{closest(name, PROTOCOLS)}; known: {', '.join(PROTOCOLS)}")
        if self.new_tokens is not None and self.new_tokens < 1:
            raise UsageError(f"generate {self.new_tokens}: expected 1 new token or more")

    def asks(self, task: str, names: Collection[str]) -> bool:
        """Whether the rows of a task are measured, with a pool of these adapters."""
        wanted = (OWN, LEFT_OUT) if task in names else (UNSEEN,)
        return any(name in self.protocols for name in wanted)

    def lessons(self, tasks: Sequence[str], names: Collection[str]) -> list[Lesson]:
        """All lessons that have to be learnt before the rows of these tasks are measured."""
        found: list[Lesson] = []
        for label, method in self.methods.items():
            if isinstance(method, Learned):
                found += [Lesson(label, task, about) for task in tasks for about in self.abouts(task, names)]
        return found

    def abouts(self, task: str, names: Collection[str]) -> list[str]:
        """With which pools methods are measured on a task, as in `Lesson.about`."""
        found = [OWN] if task not in names or OWN in self.protocols else []
        if task in names and LEFT_OUT in self.protocols and len(names) > 1:
            found.append(LEFT_OUT)
        return found

    def as_dict(self) -> dict[str, Any]:
        """The contest as JSON, as far as it differs from a study without options."""
        said: dict[str, Any] = {}
        if self.protocols != PROTOCOLS:
            said["protocols"] = list(self.protocols)
        if self.methods:
            said["methods"] = {label: method.as_dict() for label, method in self.methods.items()}
        if any(isinstance(method, Learned) for method in self.methods.values()):
            rows = {name: [[key_of(row), row.completion] for row in task.train] for name, task in self.tasks.items()}
            said["train_sha256"] = fingerprint(rows)
        if self.new_tokens is not None:
            said["generate"] = self.new_tokens
            said["metrics"] = dict(self.metrics)
            plugins = {kind: METRICS.source(kind) for kind in self.metrics.values() if kind in METRICS.sources}
            said |= {"metric_plugins": plugins} if plugins else {}
        return said
