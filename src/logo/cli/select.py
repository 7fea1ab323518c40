"""`logo select`: which adapters would answer, and why."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from logo.cli.opening import open_any
from logo.cli.options import Candidates, EngineOptions, RunnerOptions, expanded
from logo.cli.output import out, print_json, selection_table
from logo.cli.prompts import Chat, System, as_asked, or_demo, read_prompts


@expanded
def select(
    engine: EngineOptions,
    runner: RunnerOptions,
    prompt: Annotated[list[str] | None, typer.Argument(help="One or more prompts; `-` reads one from stdin.")] = None,
    file: Annotated[Path | None, typer.Option(help="A file with one prompt per line.")] = None,
    chat: Chat = False,
    system: System = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            help="Of the answer that a prompt that is too long makes room for, as in `logo generate`.",
            show_default="256, or half of the context",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Prompts per probe.")] = 8,
    candidate: Candidates = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON: an object, or a list for several prompts.")] = False,
) -> None:
    """Show which adapters a prompt selects, with their weights and scores.

    Example: `logo select "What is 7 plus 5?" -k 5`
    """
    prompts = read_prompts(prompt, file)
    engine, base_model = or_demo(engine)
    with closing(open_any(engine, runner, base_model)) as logo:
        selections = logo.select(
            as_asked(prompts, chat, system),
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            candidates=candidate or None,
        )
    if json:
        records = [{"prompt": p, **selection.as_dict()} for p, selection in zip(prompts, selections, strict=True)]
        print_json(records[0] if len(records) == 1 else records)
        return
    for text, selection in zip(prompts, selections, strict=True):
        if len(prompts) > 1:
            out.print(f"\n{text}", style="bold", markup=False)
        out.print(selection_table(selection))
