"""Commands of the command line: their help is plain text without boxes."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

import typer
from typer.core import TyperCommand

from logo.cli.expanded import declared

_F = TypeVar("_F", bound=Callable[..., Any])


class Command(TyperCommand):
    """A command of `logo`."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **{**settings, "rich_markup_mode": None})

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """The options in groups, one below the other."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                usual = "Arguments" if parameter.param_type_name == "argument" else "Options"
                group = groups.setdefault(getattr(parameter, "rich_help_panel", None) or usual, [])
                group.append((_placeholder(record[0]), _default(record[1])))
        for name, records in groups.items():
            with formatter.section(name):
                formatter.write_dl(records, col_max=32)


def _placeholder(option: str) -> str:
    """`--limit N` in place of `--limit <int range>`."""
    for kind, name in (("int", "N"), ("float", "X"), ("str", "TEXT")):
        option = re.sub(rf"<(list\[)?{kind}( range)?\]?>", name, option)
    return option


def _default(help: str) -> str:
    """`[1]` in place of `[default: (1); x>=1]`, and nothing in place of `[x>=1]`."""
    help = re.sub(r"  \[\S*x[<>]\S*\]$", "", help)
    return re.sub(r"  \[default: \(?(.*?)\)?(; [^\]\s]*)?\]$", r"  [\1]", help)


class Commands(typer.Typer):
    """A group of commands."""

    def command(self, name: str | None = None, **settings: Any) -> Callable[[_F], _F]:
        """As `Typer.command`, with `Command` as the class, for options as `logo.cli.options` makes them."""
        register = super().command(name, **{"cls": Command, **settings})
        return lambda command: register(declared(command))
