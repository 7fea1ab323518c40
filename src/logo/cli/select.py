"""`logo select`: which adapters would answer, and why."""

from __future__ import annotations

from contextlib import closing

from rich.text import Text

from logo.cli.opening import open_engine
from logo.cli.options import EngineOptions
from logo.cli.output import out, print_json, selection_table
from logo.cli.prompts import PromptOptions, or_demo


def select(
    *prompt: str,
    prompts: PromptOptions = PromptOptions(),
    json: bool = False,
    engine: EngineOptions = EngineOptions(),
) -> None:
    """Show which adapters a prompt selects, with their weights and scores.

    If fewer than k adapters are selected, those with the next highest scores follow without a weight.

    Example: logo select "What is 7 plus 5?" -k 5

    Args:
        prompt: One or more prompts.
        json: Print JSON instead.
    """
    texts, inputs = prompts.read(prompt)
    with closing(open_engine(engine, or_demo(engine), prompts.probe_text)) as logo:
        selections = logo.select(inputs)
        k = logo.k
        unsure_below = logo.settings.unsure_below
    if json:
        records = [{"prompt": text, **selection.as_dict()} for text, selection in zip(texts, selections, strict=True)]
        print_json(records[0] if len(records) == 1 else records)
        return
    for text, selection in zip(texts, selections, strict=True):
        if len(texts) > 1:
            out.print(Text(f"\n{text}", "bold"))
        out.print(selection_table(selection, others=k - len(selection.adapters)))
        if selection.confidence is not None:
            unsure = " (unsure)" if selection.confidence < unsure_below else ""
            out.print(Text(f"confidence {selection.confidence:.2f}{unsure}", "dim"))
