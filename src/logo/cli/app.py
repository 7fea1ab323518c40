"""The `logo` command: its subcommands, `--config`, and what it says when something is wrong.

A command is a function; its parameters, and the fields of dataclasses among them, are its options (cyclopts).
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cyclopts import App, CycloptsError, Group, Parameter, convert
from cyclopts.help import DefaultFormatter, PanelSpec
from rich.box import Box
from rich.console import Console

from logo import plugins
from logo.cli import (
    compare,
    datasets,
    demo,
    evaluate,
    generate,
    lm_eval,
    report,
    select,
    serve,
    shadow,
    study,
    train,
    verify,
)
from logo.cli.config import options_in
from logo.cli.output import warn_in_one_line
from logo.cli.pool import calibrate, examples, export, inspect, lock, push
from logo.errors import EXTRAS, LoGoError, Unsure, UsageError, is_out_of_memory, missing
from logo.version import __version__

EPILOGUE = (
    "Anywhere on the line: --config FILE reads options from YAML, or from the run.json of a run; --plugin "
    "MODULE:OBJECT imports a signal, method or metric of your own; --debug shows the traceback of an error. Options "
    "may be written --like-this or --like_this."
)
WIDTH = 120  # of a help text that is not on a terminal
INTERRUPTED = 130


def _shown(default: Any) -> Any:
    """The default in the help; that of a flag is not shown."""
    return None if default is False else default


def _converted(kind: Any, tokens: Any) -> Any:
    """The value of an option, where cyclopts itself would round a number that is not whole."""
    text = tokens[-1].value
    if kind in (int, int | None) and "." in text:
        raise ValueError(f"expected a whole number, found {text!r}")
    return convert(kind, tokens)


_SETTINGS: dict[str, Any] = {
    "help_format": "markdown",
    "help_formatter": DefaultFormatter(panel_spec=PanelSpec(box=Box("    \n" * 8), padding=(0, 0))),  # without frames
    "suppress_keyboard_interrupt": False,
    "default_parameter": Parameter(negative=(), show_default=_shown, allow_repeating=True, converter=_converted),
}
app = App(
    "logo",
    help="LoGo: many LoRA adapters on one language model, selected and mixed for every prompt.",
    help_epilogue=EPILOGUE,
    version=f"logo {__version__}",
    version_flags="--version",
    **_SETTINGS,
)
_ANSWER, _ADAPTERS, _MEASURE = (Group(name, sort_key=n) for n, name in enumerate(("Answer", "Adapters", "Measure")))
app.register_install_completion_command()


def _group(name: str, help: str, group: Group) -> App:
    """A group of commands of that name."""
    commands = App(name, help=help, help_epilogue="", group=group, version_flags=(), **_SETTINGS)
    app.command(commands)
    return commands


_pool = _group("pool", "Inspect, prepare, list and publish pools of adapters.", _ADAPTERS)
_eval = _group(
    "eval", "Score answers on rows (run), measure selection on your pool (study), compare, report.", _MEASURE
)
_data = _group("data", "List the paper's datasets, and make rows of them.", _MEASURE)
_command: Any
for _command in (demo.demo, generate.generate, select.select, serve.serve, verify.verify):
    app.command(_command, group=_ANSWER, help_epilogue="")
app.command(train.train, group=_ADAPTERS, help_epilogue="")
app.command(evaluate.evaluate, group=_MEASURE, help_epilogue="")
for _command in (inspect.inspect, calibrate.calibrate, examples.examples, lock.lock, export.export, push.push):
    _pool.command(_command)
for _command in (evaluate.run, compare.compare, report.report, study.study, shadow.shadow):
    _eval.command(_command)
_eval.command(lm_eval.lm_eval, help_flags=())
_data.command(datasets.listed, name="list")
_data.command(datasets.prepare)

ANYWHERE = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
ANYWHERE.add_argument("--debug", action="store_true")
ANYWHERE.add_argument("--plugin", action="append", default=[])
ANYWHERE.add_argument("--config", action="append", default=[], type=Path)
# Lists in one text, of which a user may expect to give them one by one; of other options, the last value counts.
_LISTS = (
    ("--tasks", "--dataset"),
    ("--signals",),
    ("--methods",),
    ("--protocols",),
    ("--targets",),
    ("--method-args",),
    ("--engine-args",),
)
HARNESS = ["eval", "lm-eval"]  # whose arguments are another program's


def run(argv: Sequence[str]) -> int:
    """Runs a command and returns its exit code."""
    words = list(argv)
    end = words.index("--") if "--" in words else len(words)  # what follows is for another program
    if words[:2] == HARNESS:
        end = 0
    anywhere, own_words = ANYWHERE.parse_known_args(words[:end])
    warn_in_one_line("logo")
    for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show a character shows '?'
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        for plugin in anywhere.plugin:
            plugins.load(plugin, os.getcwd())
        plugins.load_installed()
        _check_lists(own_words)
        return _called([*own_words, *words[end:]], anywhere.config)
    except BaseException as error:
        if anywhere.debug:
            traceback.print_exc()
        return _explain(error)
    finally:
        app.config = []


def _check_lists(words: Sequence[str]) -> None:
    """Raises UsageError if an option that takes several values with commas is given several times."""
    flags = [word.partition("=")[0] for word in words]
    for names in _LISTS:
        given = [flag for flag in flags if flag in names]
        if len(given) > 1:
            raise UsageError(f"{given[0]} is given {len(given)} times: separate several values with commas")


def _called(tokens: Sequence[str], config_files: Sequence[Path]) -> int:
    """Calls the command that these tokens name, and returns its exit code."""
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    if tokens[:2] == HARNESS and tokens[2:3] in ([], ["-h"], ["--help"]):
        app.help_print(HARNESS, console=console)
        return 0
    names, apps, _ = app.parse_commands(tokens)
    configs = [options_in(file, names, apps[-1]) for file in config_files]
    app.config = configs[::-1]  # the first that has an option counts: the last file of the line
    code = app(tokens, console=console, exit_on_error=False, print_error=False, result_action="return_value")
    sys.stdout.flush()
    return code if isinstance(code, int) else 0


def _explain(error: BaseException) -> int:
    """Prints what went wrong as one line and returns the exit code."""
    if isinstance(error, KeyboardInterrupt):
        return _fail("interrupted", INTERRUPTED)
    if isinstance(error, CycloptsError):
        command = " ".join(("logo", *(error.command_chain or ())))
        error.verbose = False
        line = str(error)
        if not line.endswith("..."):
            line = line.removesuffix(".")
        return _fail(f"{line} (see `{command} --help`)", 2)
    if isinstance(error, Unsure):
        return _fail(f"{error.reason}; --when-unsure base lets the base model answer, mix a broad mixture", 1)
    if isinstance(error, LoGoError):
        return _fail(str(error), 2 if isinstance(error, UsageError) else 1)
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, ModuleNotFoundError) and error.name is not None and error.name in EXTRAS:
        return _fail(missing("this command", error.name), 1)
    kind = "out of memory" if is_out_of_memory(error) else f"unexpected {type(error).__name__}"
    return _fail(f"{kind}: {error} (run again with --debug for the traceback)", 1)


def _fail(message: str, code: int) -> int:
    print(f"logo: error: {' '.join(message.split())}", file=sys.stderr)
    return code
