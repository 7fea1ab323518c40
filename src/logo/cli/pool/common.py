"""What the `logo pool` commands share: options, opening a pool, telling what is left out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from rich.text import Text

from logo.adapters.adapter import Adapter
from logo.adapters.layout import BaseLayout
from logo.cli.opening import MODEL_DIR
from logo.cli.output import err
from logo.errors import AdapterError, LeftOut
from logo.models import load_config, skeleton


def divided(
    adapters: Iterable[Adapter], check: Callable[[Adapter], object]
) -> tuple[list[Adapter], list[AdapterError]]:
    """The adapters that pass a check, and the errors of the others."""
    good: list[Adapter] = []
    bad: list[AdapterError] = []
    for adapter in adapters:
        try:
            check(adapter)
        except AdapterError as error:
            bad.append(error)
        else:
            good.append(adapter)
    return good, bad


def fitting(base_model: str) -> Callable[[Adapter], object]:
    """A check that raises AdapterError for an adapter that does not fit the base model, whose weights are not read."""
    model = skeleton(load_config(base_model, model_dir=MODEL_DIR))
    layout = BaseLayout.of(model)
    return lambda adapter: adapter.fit(layout, model, skeleton=True)


def tell_refused(refused: Iterable[AdapterError]) -> None:
    """Prints the adapters that were left out, with reasons, to stderr."""
    for error in refused:
        err.print(refusal(error))


def refusal(error: AdapterError) -> Text:
    """Which adapter is not in the pool, and why, in a line."""
    verb = ("left out ", "yellow") if isinstance(error, LeftOut) else ("refused ", "red")
    return Text.assemble(verb, (error.name, "bold"), f": {error.reason}")


def refusals(refused: Iterable[AdapterError]) -> list[dict[str, Any]]:
    """Refused adapters and the reasons, for JSON."""
    return [{"name": error.name, "reason": error.reason} for error in refused]
