"""Running one command line: errors and warnings as single lines, exit codes, `--debug`."""

from __future__ import annotations

import io
import os
import sys
import traceback
import warnings
from typing import Any

import typer

from logo.cli.app import app
from logo.errors import EXTRAS, LoGoError, UsageError, is_out_of_memory, missing

DEBUG = "--debug"
PLUGIN = "--plugin"
INTERRUPTED = 130

# Typer ships its parser's error classes without exporting them all: BadParameter -> UsageError -> ClickException.
PARSER_USAGE_ERROR: type[Any] = typer.BadParameter.__mro__[1]
PARSER_ERROR: type[Any] = typer.BadParameter.__mro__[2]


def run(argv: list[str]) -> int:
    """Runs the command and returns its exit code."""
    own = argv.index("--") if "--" in argv else len(argv)  # what follows is for another program
    debug = DEBUG in argv[:own]
    argv = [*(argument for argument in argv[:own] if argument != DEBUG), *argv[own:]]
    warnings.showwarning = _show_warning
    for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show a character shows '?'
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        result = app(args=plugins_first(argv), prog_name="logo", standalone_mode=False)
        sys.stdout.flush()
        if result == INTERRUPTED:  # typer turns Ctrl-C into an exit code
            return _fail("interrupted", INTERRUPTED)
        return result if isinstance(result, int) else 0
    except BaseException as error:
        if debug:
            traceback.print_exc()
        return _explain(error)


def plugins_first(argv: list[str]) -> list[str]:
    """The same command line with `--plugin` moved before the command; arguments after `--` are left alone."""
    end = argv.index("--") if "--" in argv else len(argv)
    first: list[str] = []
    rest: list[str] = []
    for argument in argv[:end]:
        is_value = bool(first) and first[-1] == PLUGIN
        (first if is_value or argument == PLUGIN or argument.startswith(f"{PLUGIN}=") else rest).append(argument)
    return [*first, *rest, *argv[end:]]


def _explain(error: BaseException) -> int:
    """Prints what went wrong as one line and returns the exit code."""
    if isinstance(error, typer.Exit):
        return error.exit_code
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        return _fail("interrupted", INTERRUPTED)
    if isinstance(error, PARSER_USAGE_ERROR):
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
            return 2
        command = error.ctx.command_path if error.ctx else "logo"
        message = error.format_message().replace("Value error, ", "")  # as Typer's own parser of types says it
        return _fail(f"{message} (see `{command} --help`)", 2)
    if isinstance(error, PARSER_ERROR):
        return _fail(error.format_message(), 1)
    if isinstance(error, LoGoError):
        return _fail(str(error), 2 if isinstance(error, UsageError) else 1)
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, ModuleNotFoundError) and error.name is not None and error.name in EXTRAS:
        return _fail(missing("this command", error.name), 1)
    kind = "out of memory" if is_out_of_memory(error) else f"unexpected {type(error).__name__}"
    return _fail(f"{kind}: {error} (run again with {DEBUG} for the traceback)", 1)


def _fail(message: str, code: int) -> int:
    print(f"logo: error: {' '.join(message.split())}", file=sys.stderr)
    return code


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, UserWarning):
        print(f"logo: warning: {' '.join(str(message).split())}", file=sys.stderr)
