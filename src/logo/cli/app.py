"""The `logo` command: its subcommands, `--config`, and what it says when something is wrong.

A command is a function; its parameters, and the fields of dataclasses among them, are its options (cyclopts).
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cyclopts import App, CycloptsError, Group, Parameter, convert
from cyclopts.config import Dict
from cyclopts.help import DefaultFormatter, PanelSpec
from rich.box import Box
from rich.console import Console

from logo import __version__, plugins
from logo.cli import compare, datasets, demo, evaluate, generate, lm_eval, report, select, serve, study, train, verify
from logo.cli.pool import calibrate, examples, export, inspect, lock, push
from logo.errors import EXTRAS, DataError, LoGoError, StorageError, UsageError, is_out_of_memory, missing

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
    if kind in (int, int | None) and "." in (text := tokens[-1].value):
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
    made = App(name, help=help, help_epilogue="", group=group, version_flags=(), **_SETTINGS)
    app.command(made)
    return made


_pool = _group("pool", "Inspect, prepare, list and publish pools of adapters.", _ADAPTERS)
_eval = _group("eval", "Evaluate on datasets; compare and report results.", _MEASURE)
_data = _group("data", "List datasets, and prepare them.", _MEASURE)
_command: Any
for _command in (demo.demo, generate.generate, select.select, serve.serve, verify.verify):
    app.command(_command, group=_ANSWER, help_epilogue="")
app.command(train.train, group=_ADAPTERS, help_epilogue="")
app.command(evaluate.evaluate, group=_MEASURE, help_epilogue="")
for _command in (inspect.inspect, calibrate.calibrate, examples.examples, lock.lock, export.export, push.push):
    _pool.command(_command)
for _command in (evaluate.run, compare.compare, report.report, study.study):
    _eval.command(_command)
_eval.command(lm_eval.lm_eval, help_flags=())
_data.command(datasets.listed, name="list")
_data.command(datasets.prepare)

ANYWHERE = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
ANYWHERE.add_argument("--debug", action="store_true")
ANYWHERE.add_argument("--plugin", action="append", default=[])
ANYWHERE.add_argument("--config", type=Path)
# Lists in one text, of which a user may expect to give them one by one; of other options, the last value counts.
_LISTS = ("--dataset", "--tasks", "--signals", "--methods", "--protocols", "--targets")


def run(argv: Sequence[str]) -> int:
    """Runs a command and returns its exit code."""
    argv = list(argv)
    end = argv.index("--") if "--" in argv else len(argv)  # what follows is for another program
    end = 0 if argv[:2] == ["eval", "lm-eval"] else end  # likewise
    anywhere, own = ANYWHERE.parse_known_args(argv[:end])
    warnings.showwarning = _show_warning
    for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show a character shows '?'
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        for one in anywhere.plugin:
            plugins.load(one, os.getcwd())
        plugins.load_installed()
        given = [word.partition("=")[0] for word in own]
        for name in (one for one in _LISTS if given.count(one) > 1):
            raise UsageError(f"{name} is given {given.count(name)} times: separate several values with commas")
        tokens = [*own, *argv[end:]]
        app.config = [] if anywhere.config is None else [_options_in(anywhere.config, app.parse_commands(tokens)[0])]
        console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
        how: dict[str, Any] = {"exit_on_error": False, "print_error": False, "result_action": "return_value"}
        result = app(tokens, console=console, **how)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except BaseException as error:
        if anywhere.debug:
            traceback.print_exc()
        return _explain(error)
    finally:
        app.config = []


def _options_in(file: Path, command: Sequence[str]) -> Dict:
    """The options in a file, which a user or a run wrote, by name.

    Raises:
        StorageError, DataError: it cannot be read, or holds something else.
        UsageError: another command wrote it, or its plugins are not loaded.
    """
    import yaml

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"--config {file}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise DataError(f"--config {file}: expected YAML or JSON: {' '.join(str(error).split())}") from error
    wrote = content.get("command") if isinstance(content, dict) else None
    if isinstance(wrote, dict):  # a run's
        if wrote.get("name") != (here := " ".join(command)):
            raise UsageError(f"--config {file}: `logo {wrote.get('name')}` wrote it; expected a file for `logo {here}`")
        for one in wrote.get("plugins") or ():
            if one not in plugins.named():
                raise UsageError(f"--config {file}: its run used the plugin {one}; add --plugin {one}")
        content = wrote.get("options")
    if not isinstance(content, dict):
        raise DataError(f"--config {file}: expected options by name, found {type(content).__name__}")
    # The permission of a run to replace results was for that one command.
    once = ("overwrite",) if isinstance(wrote, dict) else ()
    kept = {name: value for name, value in content.items() if value is not None and name not in once}
    for name in reversed(command):  # below its command, an option may be called as another command is
        kept = {name: kept}
    return Dict(kept, source=f"--config {file}")


def _explain(error: BaseException) -> int:
    """Prints what went wrong as one line and returns the exit code."""
    if isinstance(error, KeyboardInterrupt):
        return _fail("interrupted", INTERRUPTED)
    if isinstance(error, CycloptsError):
        command = " ".join(("logo", *(error.command_chain or ())))
        error.verbose = False
        return _fail(f"{str(error).rstrip('.')} (see `{command} --help`)", 2)
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


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, UserWarning):
        print(f"logo: warning: {' '.join(str(message).split())}", file=sys.stderr)
