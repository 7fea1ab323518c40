"""`Method`: how adapters are chosen for the prompts of a dataset, and `Answering`, which answers with what it chooses.

A method holds its options and no other state. What it finds out about a dataset, once and before the first prompt, is
in the `Prepared` that it makes from a `Task`. This module knows datasets only as texts.
"""

from __future__ import annotations

import dataclasses
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from logo.core import Generation, Selection
from logo.engine import LoGo
from logo.errors import PluginError, UsageError
from logo.plugins import Registry, running
from logo.prompts import Conversation, checked_turns, plain

if TYPE_CHECKING:
    from logo.prompts import OnePrompt

Need = Literal["train", "prompts", "samples"]
# (prompts, batch size) -> one selection each. A prompt is a text, or a conversation if the row is one
# (`text_of` makes a text of both).
Select = Callable[[Sequence[Any], int], list[Selection]]


class Example(Protocol):
    """A labelled row; of several gold texts the first is used. A row of a conversation has a `prompt`, too: its
    messages."""

    @property
    def context(self) -> str: ...
    @property
    def completion(self) -> str | tuple[str, ...]: ...


def prompt_of(row: Example) -> str | Conversation:
    """What a model is given of a row: its text, or the messages of a conversation."""
    found: str | Conversation = getattr(row, "prompt", row.context)
    return found


def key_of(row: Example) -> str:
    """The prompt of a row as one text that tells it from others; see `logo.rows.Row.key`."""
    found: str = getattr(row, "key", row.context)
    return found


def tested_too(train: Sequence[Example], tested: Sequence[Example]) -> int:
    """The number of training rows whose context is that of a test row."""
    contexts = {row.context for row in tested}
    return sum(row.context in contexts for row in train)


def overlap(where: str, train: Sequence[Example], tested: Sequence[Example], methods: Sequence[str]) -> str:
    """The warning that training rows are test rows, too; "" if none is.

    Args:
        where: what is tested, such as `dataset 'x'`.
        methods: those that choose adapters by them.
    """
    if not (shared := tested_too(train, tested)):
        return ""
    return (
        f"{where}: {shared} of {len(train)} training rows are test rows too (they have the same context), and "
        f"{'methods' if methods[1:] else 'method'} {', '.join(map(repr, methods))} chose by them: the result may be "
        "too good"
    )


@dataclass(frozen=True)
class Task:
    """One dataset, as far as a method may look at it.

    Attributes:
        name: `main.sub`.
        prompts: the texts of all test rows' prompts, in dataset order; for methods that need `"prompts"`.
        train: labelled rows that are not among them; for methods that need `"train"`.
        adapters: the adapter that each test row names as its own, parallel to `prompts`; empty: none does.
        among: a method chooses among these adapters only; empty: among the whole pool.
    """

    name: str
    prompts: Sequence[str] = ()
    train: Sequence[Example] = ()
    adapters: Sequence[str | None] = ()
    among: Sequence[str] = ()

    def candidates(self, logo: LoGo) -> tuple[str, ...]:
        """The adapters that a method chooses among, in pool order."""
        among = set(self.among)
        return tuple(name for name in logo.names if name in among) if among else logo.names


@dataclass(frozen=True)
class Prepared:
    """A method that knows its dataset.

    Attributes:
        select: returns a selection for each prompt, which does not depend on the other prompts of the call; None: the
            engine selects.
        record: what the method found out, for JSON: weights, tables, seeds.
    """

    select: Select | None
    record: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """How adapters are chosen and weighted. Each kind is a subclass with options of its own.

    Attributes:
        seed: of everything random. The same seed, dataset and pool always give the same selections.

    Raises:
        UsageError: an option that cannot be used.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[Need]] = frozenset()
    """What `prepare` looks at: labelled train rows, all test prompts, samples of what each adapter was made for."""

    seed: int = 0

    @property
    def picks(self) -> int | None:
        """Adapters per prompt at most; None where the pool, the data or the engine decides."""
        return None

    @abstractmethod
    def prepare(self, logo: LoGo, task: Task) -> Prepared:
        """Finds out what has to be known about a dataset before its first prompt.

        Raises:
            UsageError, DataError: the task or an option lacks what the method needs.
        """

    def check(self) -> None:
        """Raises LoGoError if this machine lacks something that the method needs; each process checks it first."""
        return

    def check_pool(self, names: Sequence[str]) -> None:
        """Raises DataError if the method lacks data about one of these adapters, such as samples of its inputs."""
        return

    def as_dict(self) -> dict[str, Any]:
        """Name and options for JSON."""
        source = METHODS.source(self.name)
        said = {"method": self.name, **dataclasses.asdict(self)}
        return said if source is None else {**said, "plugin": source}


METHODS: Registry[type[Method]] = Registry("method")


@dataclass(frozen=True, kw_only=True)
class Learned(Method):
    """A method that learns from labelled rows of the dataset; what it learnt can be kept and used again."""

    needs: ClassVar[frozenset[Need]] = frozenset({"train"})

    @abstractmethod
    def learn(self, logo: LoGo, task: Task) -> dict[str, Any]:
        """Learns about a dataset and returns the result as JSON, to be kept for reuse; errors as in `prepare`."""

    @abstractmethod
    def recall(self, learnt: Mapping[str, Any]) -> Prepared:
        """The prepared method, from the result of an earlier `learn`."""

    def prepare(self, logo: LoGo, task: Task) -> Prepared:
        return self.recall(self.learn(logo, task))


def prepared_by(method: Method, logo: LoGo, task: Task) -> Prepared:
    """`method.prepare(logo, task)`. What a method of a plugin does wrong, now or later, is told with its name.

    Raises:
        PluginError: a plugin has returned something else than `Prepared`, or another number of selections than prompts.
        RuntimeError: a plugin has failed.
    """
    if METHODS.source(method.name) is None:
        return method.prepare(logo, task)
    with running(f"method {method.name!r}"):
        prepared: object = method.prepare(logo, task)
    if not isinstance(prepared, Prepared):
        raise PluginError(f"method {method.name!r}: `prepare` has to return Prepared, found {prepared!r:.60}")
    own = prepared.select
    if own is None:
        return prepared

    def select(prompts: Sequence[str], batch_size: int) -> list[Selection]:
        with running(f"method {method.name!r}"):
            found = list(own(prompts, batch_size))
        if len(found) != len(prompts):
            raise PluginError(
                f"method {method.name!r}: expected one selection for each of {len(prompts)} prompts, found {len(found)}"
            )
        return found

    return dataclasses.replace(prepared, select=select)


class Answering:
    """An engine for one dataset: selects by a method and answers with what it selects.

    Attributes:
        record: what the method found out about the dataset, for JSON.

    Args:
        logo: the engine.
        method: the method, which is prepared for the task unless `prepared` is given.
        prepared: the result of an earlier preparation for the task.
        **options: options of `LoGo.generate`, for every prompt.
    """

    def __init__(
        self, logo: LoGo, method: Method, task: Task, *, prepared: Prepared | None = None, **options: Any
    ) -> None:
        self._logo = logo
        self._prepared = prepared_by(method, logo, task) if prepared is None else prepared
        self._options = options
        self.record = self._prepared.record

    def select(self, prompts: Sequence[OnePrompt], batch_size: int = 8) -> list[Selection]:
        """One selection for each prompt."""
        if self._prepared.select is None:
            return self._logo.select(list(prompts), batch_size=batch_size)
        return self._prepared.select(prompts, batch_size)

    def generate(self, prompts: Sequence[OnePrompt], *, max_new_tokens: int, batch_size: int) -> list[Generation]:
        """One answer for each prompt; its seconds of `"probe"` are its share of the time that selecting took."""
        started = time.perf_counter()
        select = self._prepared.select
        selections = None if select is None else select(prompts, batch_size)
        probe = (time.perf_counter() - started) / max(1, len(prompts))
        answers = self._logo.generate(
            list(prompts), adapters=selections, max_new_tokens=max_new_tokens, batch_size=batch_size, **self._options
        )
        if selections is None:
            return answers
        return [dataclasses.replace(answer, seconds={**answer.seconds, "probe": probe}) for answer in answers]


def same_for_all(weights: dict[str, float], scores: dict[str, float] | None = None) -> Select:
    """A `Select` that returns one selection, best first, for every prompt."""
    selection = ranked(weights, scores)
    return lambda prompts, batch_size: [selection] * len(prompts)


def ranked(weights: dict[str, float], scores: dict[str, float] | None = None) -> Selection:
    """The selection with these weights, highest first, ties in their order."""
    order = sorted(weights, key=lambda name: -weights[name])
    return Selection(tuple(order), tuple(weights[name] for name in order), dict(scores or {}))


def check_count(option: str, value: int) -> None:
    """Raises UsageError unless the value is 1 or more."""
    if value < 1:
        raise UsageError(f"{option}: expected 1 or more, found {value}")


def text_of(prompt: str | Conversation) -> str:
    """The prompt as a text, for methods that compare texts: of a conversation, the contents of its messages."""
    return prompt if isinstance(prompt, str) else plain(checked_turns(prompt))
