"""What a method is: how adapters are chosen for the prompts of a dataset, as a function with a decorator.

    @logo.register_method(needs="train")
    def mine(logo: LoGo, task: Task, *, rows: int = 5, seed: int = 0) -> Prepared: ...

The function finds out what has to be known about a dataset before its first prompt. Its keyword arguments are the
method's options; `k`, the most adapters of a prompt, and `seed`, of everything random, are given if it has them.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

from logo.core import Selection
from logo.errors import PluginError, UsageError, closest
from logo.plugins import Registry, running
from logo.prompts import checked_turns, plain
from logo.recorded import identified

if TYPE_CHECKING:
    from logo.engine import LoGo
    from logo.prompts import Conversation

Need = Literal["train", "examples", "target", ""]
Picks = int | Literal["pool"] | None  # adapters per prompt at most; "pool": all of them; None: the engine decides
# (prompts, batch size) -> one selection each, which does not depend on the other prompts of the call.
Select = Callable[[Sequence[Any], int], list[Selection]]


class Example(Protocol):
    """A labelled row; of several gold texts the first is used. `prompt` is what a model is given: the text of
    `context`, or the messages of a conversation."""

    @property
    def context(self) -> str: ...
    @property
    def completion(self) -> str | tuple[str, ...]: ...
    @property
    def prompt(self) -> Any: ...


@dataclass(frozen=True)
class Task:
    """One dataset, as far as a method may look at it.

    Attributes:
        name: of the dataset.
        prompts: the texts of all test rows' prompts, in dataset order.
        train: returns labelled rows that are not among them; DataError if there are none.
        targets: the adapter that each test row names as its own, parallel to `prompts`.
        among: a method chooses among these adapters only; empty: among the whole pool.
    """

    name: str
    prompts: Sequence[str] = ()
    train: Callable[[], Sequence[Example]] = tuple
    targets: Sequence[str | None] = ()
    among: Sequence[str] = ()

    def candidates(self, logo: LoGo) -> tuple[str, ...]:
        """The adapters that a method chooses among, in pool order."""
        among = set(self.among)
        return tuple(name for name in logo.names if name in among) if among else logo.names


@dataclass(frozen=True)
class Prepared:
    """A method that knows its dataset.

    Attributes:
        select: returns a selection for each prompt (`text_of` makes a text of any); None: the engine selects.
        record: what the method found out, for JSON: weights, tables, seeds.
        engine: answers instead of the engine that was given; of a method that changes the model.
        routed: the adapters that such a model mixes by itself, with weights that nobody knows.
    """

    select: Select | None
    record: Mapping[str, Any] = field(default_factory=dict)
    engine: LoGo | None = None
    routed: Sequence[str] = ()


@dataclass(frozen=True)
class Described:
    """A registered function, what it `needs` of a dataset or pool, and the adapters per prompt at most, if that is
    fixed."""

    function: Callable[..., Prepared]
    needs: Need
    picks: Picks


METHODS: Registry[Described] = Registry("method")
# By the type of an option's default: what its values are.
_KINDS: tuple[tuple[type, Callable[[Any], bool], str], ...] = (
    (bool, lambda value: isinstance(value, bool), "true or false"),
    (int, lambda value: type(value) is int and value >= 1, "a whole number of 1 or more"),
    (float, lambda value: type(value) in (int, float) and math.isfinite(value), "a number"),
    (str, lambda value: isinstance(value, str), "a text"),
)


def register_method(
    *, needs: Need = "", picks: Picks = None, name: str = ""
) -> Callable[[Callable[..., Prepared]], Callable[..., Prepared]]:
    """Registers a function as the method of its name, with `-` for `_`; a decorator.

    Args:
        needs: `"train"`: labelled rows; `"examples"`: example prompts of every adapter; `"target"`: the target adapter
            of every row, as an oracle knows it.
        picks: adapters per prompt at most; `"pool"`: all of them; None: its option `k`, or else the engine decides.
        name: another name.

    Raises:
        UsageError: the name is taken.
    """

    def add(function: Callable[..., Prepared]) -> Callable[..., Prepared]:
        described = Described(function, needs, picks)
        METHODS.add(name or function.__name__.replace("_", "-"), described, function)
        return function

    return add


@dataclass(frozen=True)
class Method:
    """A method with its options."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def needs(self) -> Need:
        """What it looks at beside the prompt."""
        return METHODS[self.name].needs

    @property
    def picks(self) -> Picks:
        """Adapters per prompt at most; `"pool"`: all of them; None: the engine decides."""
        k: int | None = self.options.get("k")
        return METHODS[self.name].picks if k is None else k

    def as_dict(self) -> dict[str, Any]:
        """Name and options for JSON, with digests of secrets, and the plugin that it comes from."""
        facts = {"method": self.name, **identified(self.options)}
        plugin = METHODS.definition(self.name)
        return facts if plugin is None else {**facts, "plugin": plugin}

    def prepare(self, logo: LoGo, task: Task) -> Prepared:
        """Finds out what has to be known about a dataset before its first prompt.

        Raises:
            UsageError, DataError: the task or the pool lacks what the method needs.
            PluginError, RuntimeError: a plugin has returned something else than it should, or has failed.
        """
        function = METHODS[self.name].function
        if METHODS.definition(self.name) is None:
            return function(logo, task, **self.options)
        with running(f"method {self.name!r}"):
            prepared: object = function(logo, task, **self.options)
        if not isinstance(prepared, Prepared):
            raise PluginError(f"method {self.name!r}: expected it to return Prepared, found {prepared!r:.60}")
        select_of_plugin = prepared.select
        if select_of_plugin is None:
            return prepared

        def select(prompts: Sequence[Any], batch_size: int) -> list[Selection]:
            with running(f"method {self.name!r}"):
                selections = list(select_of_plugin(prompts, batch_size))
            if len(selections) != len(prompts):
                expected = f"one selection for each of {len(prompts)} prompts, found {len(selections)}"
                raise PluginError(f"method {self.name!r}: expected {expected}")
            return selections

        return replace(prepared, select=select)


def plain_value(text: str) -> Any:
    """What a text means as YAML, such as a number; if it is none, the text."""
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _value(value: Any, default: Any) -> Any:
    """The value of an option, which may be written as a text, as the kind of its default."""
    if not isinstance(value, str) or isinstance(default, str):
        return value
    try:
        return type(default)(value) if type(default) in (int, float) else plain_value(value)
    except ValueError:
        return value


def _defaults(name: str) -> dict[str, Any]:
    """The options of a method, with their defaults; UsageError if there is no such method."""
    parameters = inspect.signature(METHODS[name].function).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}


def get_method(name: str, /, *, k: int | None = None, seed: int = 0, **options: Any) -> Method:
    """The method of this name with these options. Texts may stand for numbers, as on the command line.

    Raises:
        UsageError: there is no such method or option, or an option is of another kind.
    """
    defaults = _defaults(name)
    if k is not None:
        if "k" not in defaults:
            raise UsageError(f"method {name!r} has no number of adapters; leave out -k")
        options["k"] = k
    for option in options:
        if option not in defaults:
            has = f"it has: {', '.join(defaults)}" if defaults else "it has none"
            raise UsageError(f"method {name!r} has no option {option!r}{closest(option, defaults)}; {has}")
    options = {option: _value(value, defaults[option]) for option, value in options.items()}
    for option, value in options.items():
        for kind, is_right, expected in _KINDS:
            if type(defaults[option]) is kind and not is_right(value):
                raise UsageError(f"method {name!r}: {option}: expected {expected}, found {value!r}")
    if "seed" in defaults:
        options.setdefault("seed", seed)
    return Method(name, {**defaults, **options})


def get_methods(
    names: Sequence[str], options: Mapping[str, Any], *, k: int | None = None, seed: int = 0
) -> dict[str, Method]:
    """Several methods by name, each with those of the options that it has, of which `k` is one unless they name it;
    errors as `get_method`, also for an option that none of them has."""
    defaults = {name: _defaults(name) for name in names}
    for option in options:
        if not any(option in of_method for of_method in defaults.values()):
            raise UsageError(f"method option {option!r}: none of {', '.join(names) or 'the methods'} has it")
    given = options if k is None else {"k": k, **options}
    return {
        name: get_method(name, seed=seed, **{option: value for option, value in given.items() if option in of_method})
        for name, of_method in defaults.items()
    }


def ranked(weights: Mapping[str, float], scores: Mapping[str, float] | None = None) -> Selection:
    """The selection with these weights, highest first, ties in their order."""
    order = sorted(weights, key=lambda name: -weights[name])
    return Selection(tuple(order), tuple(weights[name] for name in order), dict(scores or {}))


def same_for_all(weights: Mapping[str, float]) -> Select:
    """Selects the same for every prompt."""
    selection = ranked(weights)
    return lambda prompts, batch_size: [selection] * len(prompts)


def text_of(prompt: str | Conversation) -> str:
    """The prompt as a text: of a conversation, the contents of its messages."""
    return prompt if isinstance(prompt, str) else plain(checked_turns(prompt))
