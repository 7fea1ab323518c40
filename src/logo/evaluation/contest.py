"""What a study asks of every row: by which protocols, of which methods beside the signals, and how answers are judged.

The protocols are the literature's: a row's *own* adapter is in the pool, it is *left out*, or the task is *unseen* and
never had one. What methods have to learn before their first row is cut into lessons, each of which is kept by itself.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from logo.baselines.lorauter import LoRAuter
from logo.baselines.method import Learned, Method, Task
from logo.digests import fingerprint
from logo.errors import UsageError, closest
from logo.evaluation.metrics import Kind

OWN, LEFT_OUT, UNSEEN = "own", "left-out", "unseen"
PROTOCOLS = (OWN, LEFT_OUT, UNSEEN)
POOL = "pool"


class Lesson(NamedTuple):
    """Something that a method learns, once.

    Attributes:
        method: its label.
        of: the task, or what the method learns about the whole pool from.
        about: `own`, what it learns about a task with the whole pool; `left-out`, without the task's own adapter;
            `pool`, what it learns about the pool.
    """

    method: str
    of: str
    about: str


Lessons = Mapping[Lesson, Mapping[str, Any]]


@dataclass(frozen=True)
class Contest:
    """What is compared, and how.

    Attributes:
        protocols: of `PROTOCOLS`.
        new_tokens: of generated answers; None: answers are scored teacher-forced only.
        methods: label -> method; they stand beside the signals.
        tasks: by name, as methods may look at them.
        metrics: task -> what generated answers are worth; exact match, where it is not said.
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
        """Whether the rows of a task are measured, in a pool of these adapters."""
        wanted = (OWN, LEFT_OUT) if task in names else (UNSEEN,)
        return any(name in self.protocols for name in wanted)

    def lessons(self, tasks: Sequence[str], names: Collection[str]) -> list[Lesson]:
        """All that has to be learnt before the rows of these tasks are measured."""
        found: list[Lesson] = []
        for label, method in self.methods.items():
            if isinstance(method, LoRAuter):
                found += [Lesson(label, task, POOL) for task in method.validation]
            if not isinstance(method, Learned):
                continue
            for task in tasks:
                if task not in names or OWN in self.protocols:
                    found.append(Lesson(label, task, OWN))
                if task in names and LEFT_OUT in self.protocols and len(names) > 1:
                    found.append(Lesson(label, task, LEFT_OUT))
        return found

    def as_dict(self) -> dict[str, Any]:
        """For JSON, as far as it differs from what a study asks without being told."""
        said: dict[str, Any] = {}
        if self.protocols != PROTOCOLS:
            said["protocols"] = list(self.protocols)
        if self.methods:
            said["methods"] = {label: method.as_dict() for label, method in self.methods.items()}
        if any(isinstance(method, Learned) for method in self.methods.values()):
            rows = {name: [[row.context, row.completion] for row in task.train] for name, task in self.tasks.items()}
            said["train_sha256"] = fingerprint(rows)
        if self.new_tokens is not None:
            said["generate"] = self.new_tokens
            said["metrics"] = dict(self.metrics)
        return said
