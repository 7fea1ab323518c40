"""What a study compares: signals and methods, under the protocols of the literature.

    in-pool       the target adapter is in the pool
    removed       the same rows, with that adapter left out
    out-of-pool   tasks that never had an adapter

The rows of a task with an adapter in the pool have the first two, those of other tasks the last.

A signal may be kinds of evidence instead (`logo.selection.evidence`): `responses`, `examples` and `encoder` are the
signal `calibrated` by this evidence alone, and `responses+examples` by the sum of both. All that there is, is
`calibrated` itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from logo.baselines.method import Method
from logo.errors import UsageError, closest
from logo.selection.evidence import KINDS, Kind

IN_POOL = "in-pool"
REMOVED = "removed"
OUT_OF_POOL = "out-of-pool"
PROTOCOLS = (IN_POOL, REMOVED, OUT_OF_POOL)
ALWAYS = ("target", "uniform", "base")  # methods that every study of gold texts has
SIGNALS = ("calibrated", "norm", "entropy")
OF_EVIDENCE = "calibrated"  # the signal that kinds of evidence are of


def evidence_in(name: str) -> tuple[Kind, ...]:
    """The kinds of evidence that a name such as `examples+encoder` asks for; () for a signal. Raises UsageError for a
    sum of something else."""
    parts = name.split("+")
    kinds = tuple(kind for kind in KINDS if kind in parts)
    if len(parts) > max(1, len(kinds)):
        raise UsageError(f"signal {name!r}: expected a sum of different kinds of evidence, {', '.join(KINDS)}")
    return kinds


@dataclass(frozen=True)
class Contest:
    """What is compared on every row, and how.

    Attributes:
        signals: of the engine, the first of which methods may use; or kinds of evidence, see `evidence_in`.
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

    @property
    def signal(self) -> str:
        """The signal of the engine itself."""
        return next((name for name in self.signals if not evidence_in(name)), OF_EVIDENCE)

    def of(self, task: str, names: Sequence[str]) -> tuple[str, ...]:
        """The protocols of a task's rows, with a pool of these adapters."""
        protocols = [OUT_OF_POOL]
        if task in names:
            protocols = [IN_POOL, REMOVED] if len(names) > 1 else [IN_POOL]
        return tuple(protocol for protocol in protocols if protocol in self.protocols)

    def as_dict(self) -> dict[str, Any]:
        """The contest as JSON."""
        methods = {label: method.as_dict() for label, method in self.methods.items()}
        return {**vars(self), "methods": methods}
