"""The `logo` command and what its subcommands are called."""

from __future__ import annotations

from typing import Annotated

import typer

from logo import __version__
from logo.cli import (
    bench,
    calibrate,
    compare,
    datasets,
    demo,
    evaluate,
    generate,
    lm_eval,
    merge_results,
    plan,
    pool,
    report,
    select,
    serve,
    study,
    sweep,
    train,
)

EPILOG = (
    "Errors are one line; add --debug anywhere for the traceback. Options may be written --like-this or --like_this."
)


def _dashed(name: str) -> str:
    return name.replace("_", "-")


app = typer.Typer(
    name="logo",
    no_args_is_help=True,
    add_completion=False,
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
            "--version",
            help="Print the version and exit.",
            callback=_print_version,
            is_eager=True,
            show_default=False,
        ),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", show_default=False)] = False,
) -> None:
    """LoGo: many LoRA adapters on one language model, picked and mixed for every single input."""
    # --debug is taken off the command line in logo.cli.run, wherever it stands; here it is only documented.


app.command("demo")(demo.demo)
app.command("generate")(generate.generate)
app.command("select")(select.select)
app.command("serve")(serve.serve)
app.command("plan")(plan.plan)
app.command("train")(train.train)
app.command("evaluate")(evaluate.evaluate)
app.command("merge-results")(merge_results.merge_results)
app.command("compare")(compare.compare)
app.command("lm-eval", context_settings=lm_eval.CONTEXT)(lm_eval.lm_eval)
app.command("calibrate")(calibrate.calibrate)
app.command("study")(study.study)
app.command("sweep")(sweep.sweep)
app.command("report")(report.report)
app.add_typer(pool.app, name="pool")
app.add_typer(datasets.app, name="datasets")
app.add_typer(bench.app, name="bench")
