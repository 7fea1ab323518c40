"""Methods by name."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, TypeVar

from logo.baselines.fixed import Base, Oracle, OwnSelector, Random, Uniform
from logo.baselines.learned import BestSingle, LoraHub
from logo.baselines.method import METHODS as METHODS
from logo.baselines.method import Method
from logo.baselines.retrieval import LoraRetriever
from logo.errors import UsageError, closest

_K = TypeVar("_K", bound=type[Method])


def register_method(kind: _K) -> _K:
    """Registers a subclass of `logo.Method` under its `name`; a decorator of the class.

    Raises:
        UsageError: it has no name, or the name is taken.
    """
    METHODS.add(getattr(kind, "name", ""), kind, kind)
    return kind


for _kind in (OwnSelector, Base, Uniform, Random, Oracle, BestSingle, LoraHub, LoraRetriever):
    register_method(_kind)


def method_class(name: str) -> type[Method]:
    """The class of the method of this name, ours or a plugin's.

    Raises:
        UsageError: there is none.
        PluginError: it is a plugin's, which cannot be imported.
    """
    return METHODS[name]


def may_select_by_signal(method: Method) -> bool:
    """Whether the engine's signal may decide what a method chooses: LoGo's own, or a plugin's, of which it is not
    known."""
    return isinstance(method, OwnSelector) or method.name in METHODS.sources


def get_method(name: str, **options: Any) -> Method:
    """The method of this name with these options, which its class documents.

    Raises:
        UsageError: there is no such method or option, or an option cannot be used.
    """
    kind = method_class(name)
    known = [field.name for field in fields(kind)]
    for option in options:
        if option not in known:
            raise UsageError(
                f"method {name!r} has no option {option!r}{closest(option, known)}; it has: {', '.join(known)}"
            )
    return kind(**options)
