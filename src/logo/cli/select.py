"""`logo select`: which adapters would answer, and why."""

from __future__ import annotations

from contextlib import closing

from rich.text import Text

from logo.cli.expanded import expanded
from logo.cli.opening import check_batch_size, open_any
from logo.cli.options import Candidates, EngineOptions, Json, RunnerOptions, argument, rare
from logo.cli.output import out, print_json, selection_table
from logo.cli.prompts import Chat, PromptsFile, System, as_asked, or_demo, read_prompts


@expanded
def select(
    engine: EngineOptions,
    runner: RunnerOptions,
    prompt: list[str] | None = argument(None, help="One or more prompts; `-` reads one from stdin."),
    prompts: PromptsFile = None,
    chat: Chat = False,
    system: System = None,
    max_new_tokens: int | None = rare(
        None,
        "Tokens to keep free for the answer; a prompt that is too long is cut as in `logo generate`.",
        "256, or half of the context",
    ),
    batch_size: int = rare(8, "Prompts per probe."),
    candidate: Candidates = None,
    json: Json = False,
) -> None:
    """Show which adapters a prompt selects, with their weights and scores.

    If fewer than k adapters are selected, those with the next highest scores follow without a weight.

    Example: `logo select "What is 7 plus 5?" -k 5`
    """
    check_batch_size(runner)
    texts = read_prompts(prompt, prompts)
    base_model = or_demo(engine)
    with closing(open_any(engine, runner, base_model)) as logo:
        selections = logo.select(
            as_asked(texts, chat, system),
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            candidates=candidate or None,
        )
        k, unsure_below = logo.k, logo.settings.unsure_below
    if json:
        records = [{"prompt": p, **selection.as_dict()} for p, selection in zip(texts, selections, strict=True)]
        print_json(records[0] if len(records) == 1 else records)
        return
    for text, selection in zip(texts, selections, strict=True):
        if len(texts) > 1:
            out.print(Text(f"\n{text}", "bold"))
        out.print(selection_table(selection, others=k - len(selection.adapters)))
        if selection.confidence is not None:
            unsure = " (unsure)" if selection.confidence < unsure_below else ""
            out.print(Text(f"confidence {selection.confidence:.2f}{unsure}", "dim"))
