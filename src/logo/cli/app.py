"""The `logo` command and what its subcommands are called."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from logo import __version__, plugins
from logo.cli import datasets, demo, evaluate, evaluations, generate, pool, select, serve, train, verify
from logo.cli.commands import Commands
from logo.cli.expanded import expanded
from logo.cli.options import EVALUATING

EPILOG = (
    "Errors are one line; add --debug anywhere for the traceback, and --plugin module:Object for code of your own. "
    "Options may be written --like-this or --like_this."
)


def _dashed(name: str) -> str:
    return name.replace("_", "-")


app = Commands(
    name="logo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    epilog=EPILOG,
    context_settings={"token_normalize_func": _dashed, "help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"logo {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit.", callback=_print_version, is_eager=True, show_default=False
        ),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", show_default=False)] = False,
    plugin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODULE:OBJECT",
            help="Import a signal, method or metric of your own, from an installed module or from this folder "
            "(repeatable; docs/extend.md). It runs that module's code.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """LoGo: many LoRA adapters on one language model, selected and mixed for every prompt."""
    # --debug is taken off the command line in logo.cli.run, wherever it is; here it is only documented. --plugin is
    # put before the command there.
    for one in plugin or ():
        plugins.load(one, os.getcwd())
    plugins.load_installed()


ANSWER = "Answer prompts"
ADAPTERS = "Make and keep adapters"
MEASURE = "Measure"

app.command("demo", rich_help_panel=ANSWER)(demo.demo)
app.command("generate", rich_help_panel=ANSWER)(generate.generate)
app.command("select", rich_help_panel=ANSWER)(select.select)
app.command("serve", rich_help_panel=ANSWER)(serve.serve)
app.command("verify", rich_help_panel=ANSWER)(verify.verify)
app.command("train", rich_help_panel=ADAPTERS)(train.train)
app.add_typer(pool.app, name="pool", rich_help_panel=ADAPTERS)
app.add_typer(evaluations.app, name="eval", rich_help_panel=MEASURE)
app.add_typer(datasets.app, name="data", rich_help_panel=MEASURE)
app.command("evaluate", help=evaluate.OFFICIAL, rich_help_panel=MEASURE)(
    expanded(evaluate.evaluate, official=True, defaults=EVALUATING)
)
