"""Methods by name."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from logo.baselines.fixed import Arrow, Base, Oracle, OwnSelector, Random, Seqr, SpectR, Uniform
from logo.baselines.learned import BestSingle, LoraHub
from logo.baselines.lorauter import LoRAuter
from logo.baselines.method import Method
from logo.baselines.retrieval import AdapterSoup, LoraRetriever
from logo.errors import UsageError, closest

METHODS: dict[str, type[Method]] = {
    kind.name: kind
    for kind in (
        OwnSelector,
        Base,
        Uniform,
        Random,
        Oracle,
        BestSingle,
        LoraHub,
        LoraRetriever,
        AdapterSoup,
        LoRAuter,
        Arrow,
        SpectR,
        Seqr,
    )
}


def methods() -> dict[str, str]:
    """What each method does, in a line."""
    return {name: (kind.__doc__ or "").splitlines()[0] for name, kind in METHODS.items()}


def method_class(name: str) -> type[Method]:
    """The method of this name.

    Raises:
        UsageError: there is none.
    """
    if name not in METHODS:
        raise UsageError(f"unknown method {name!r}{closest(name, METHODS)}; known: {', '.join(METHODS)}")
    return METHODS[name]


def get_method(name: str, **options: Any) -> Method:
    """The method of this name with these options; see its class for what there is.

    Raises:
        UsageError: there is none, it has no such option, or one cannot be used.
    """
    kind = method_class(name)
    known = [field.name for field in fields(kind)]
    for option in options:
        if option not in known:
            raise UsageError(
                f"method {name!r} has no option {option!r}{closest(option, known)}; it has: {', '.join(known)}"
            )
    return kind(**options)
