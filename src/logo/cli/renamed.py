"""Names that the command line had before; each works for one version and says what it is called now."""

from __future__ import annotations

import sys
from typing import Any

from typer.core import TyperGroup

# Old command: where it is now. They are not in the help.
COMMANDS: dict[str, tuple[str, ...]] = {
    "sweep": ("eval", "sweep"),
    "compare": ("eval", "compare"),
    "report": ("eval", "report"),
    "merge-results": ("eval", "merge"),
    "study": ("eval", "study"),
    "lm-eval": ("eval", "lm-eval"),
    "calibrate": ("pool", "calibrate"),
    "datasets": ("data",),
}


class Renaming(TyperGroup):
    """The `logo` command, which also knows the old names of its commands."""

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


def say_renamed(old: str, new: str) -> None:
    """One line on stderr that tells the user what to type from now on."""
    print(f"logo: note: {old} is called {new} now; the old name stops working with the next version", file=sys.stderr)
