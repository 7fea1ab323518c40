"""Commands and groups of the command line: they know old names, and their help is plain text that fits a screen."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

from logo.cli.expanded import declared
from logo.cli.renamed import COMMANDS, modernised, say_renamed

_F = TypeVar("_F", bound=Callable[..., Any])


class _Ours:
    """Mixin of commands and groups: options keep their old names, too, and the help is plain text without boxes."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **{**settings, "rich_markup_mode": None})

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parses the arguments after old spellings have been replaced by the current ones."""
        parameters = self.get_params(ctx)  # type: ignore[attr-defined]
        known = {name for parameter in parameters for name in (*parameter.opts, *parameter.secondary_opts)}
        modern = list(modernised(args, known, ctx.info_name or ""))
        return super().parse_args(ctx, modern)  # type: ignore[misc, no-any-return]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """The options in groups, one below the other."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):  # type: ignore[attr-defined]
            record = parameter.get_help_record(ctx)
            if record is not None:
                usual = "Arguments" if parameter.param_type_name == "argument" else "Options"
                group = groups.setdefault(getattr(parameter, "rich_help_panel", None) or usual, [])
                group.append((_placeholder(record[0]), _default(record[1])))
        for name, records in groups.items():
            with formatter.section(name):
                formatter.write_dl(records, col_max=32)


class Command(_Ours, TyperCommand):
    """A command of `logo`."""


class Group(_Ours, TyperGroup):
    """A group with options of its own."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """The options, and the commands below them."""
        super().format_options(ctx, formatter)
        self.format_commands(ctx, formatter)


def _placeholder(option: str) -> str:
    """`--limit N` in place of `--limit <int range>`."""
    for kind, name in (("int", "N"), ("float", "X"), ("str", "TEXT")):
        option = re.sub(rf"<(list\[)?{kind}( range)?\]?>", name, option)
    return option


def _default(help: str) -> str:
    """`[1]` in place of `[default: (1); x>=1]`, and nothing in place of `[x>=1]`."""
    help = re.sub(r"  \[\S*x[<>]\S*\]$", "", help)
    return re.sub(r"  \[default: \(?(.*?)\)?(; [^\]\s]*)?\]$", r"  [\1]", help)


class Root(TyperGroup):
    """The `logo` command, which knows the old names of its commands."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[Any, Any, list[str]]:
        """The command that these arguments begin with, and the arguments that are left for it."""
        old = args[0].replace("_", "-") if args else ""
        if old not in COMMANDS:
            return super().resolve_command(ctx, args)
        new = " ".join(COMMANDS[old])
        say_renamed(f"`logo {old}`", f"`logo {new}`")
        command: Any = self
        for name in COMMANDS[old]:
            command = command.commands[name]
        return new, command, args[1:]


class Commands(typer.Typer):
    """A group whose commands know the old names of their options."""

    def command(self, name: str | None = None, **settings: Any) -> Callable[[_F], _F]:
        """As `Typer.command`, with `Command` as the class, for options as `logo.cli.options` makes them."""
        register = super().command(name, **{"cls": Command, **settings})
        return lambda command: register(declared(command))
