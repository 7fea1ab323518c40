"""`logo generate`: answers with the mixture that each prompt selects."""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from logo.cli.opening import open_any
from logo.cli.options import Candidates, EngineOptions, RunnerOptions, expanded
from logo.cli.output import err, note, out, print_json, selection_line, selection_table
from logo.cli.prompts import Chat, System, as_asked, forced, or_demo, read_prompts
from logo.errors import UsageError

if TYPE_CHECKING:
    from logo.calls import Calls
    from logo.decoder import Generation


@expanded
def generate(
    engine: EngineOptions,
    runner: RunnerOptions,
    prompt: Annotated[list[str] | None, typer.Argument(help="One or more prompts; `-` reads one from stdin.")] = None,
    file: Annotated[Path | None, typer.Option(help="A file with one prompt per line.")] = None,
    chat: Chat = False,
    system: System = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(help="Longest answer, in tokens.", show_default="256, or half of the context"),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Prompts per forward pass.")] = 8,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[=WEIGHT]", help="Use this adapter instead of selecting (repeatable)."),
    ] = None,
    candidate: Candidates = None,
    compare: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Answer one prompt several times: as selected, with each of the best N adapters alone, and with none.",
            min=1,
            show_default="off",
        ),
    ] = None,
    base_only: Annotated[bool, typer.Option("--base-only", help="Use no adapter at all.")] = False,
    generation_early_stop: Annotated[
        bool, typer.Option("--generation-early-stop", help="Stop at the end of the answer's first line.")
    ] = False,
    sample: Annotated[
        bool, typer.Option("--sample", help="Sample instead of greedy decoding (see --temperature).")
    ] = False,
    temperature: Annotated[float | None, typer.Option(help="With --sample.", min=0.0, show_default="1.0")] = None,
    top_p: Annotated[float | None, typer.Option(help="With --sample.", min=0.0, max=1.0, show_default="1.0")] = None,
    seed: Annotated[int, typer.Option(help="For --sample.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print JSON: an object, or a list for several prompts.")] = False,
) -> None:
    """Answer prompts, each with the mixture of adapters it selects.

    Example: `logo generate "What is 7 plus 5?"`
    """
    prompts = read_prompts(prompt, file)
    asked = as_asked(prompts, chat, system)
    mixture: Any = forced(adapter, base_only)
    if compare is not None and (len(prompts) != 1 or mixture is not None):
        raise UsageError("--compare: expected one prompt, without --adapter and --base-only, which say what is mixed")
    options: dict[str, Any] = {**_sampling(sample, temperature, top_p), "candidates": candidate or None}
    engine, base_model = or_demo(engine)
    with closing(open_any(engine, runner, base_model)) as logo:
        if sample:
            import torch

            torch.manual_seed(seed)
        if compare is not None:
            selection = logo.select(asked[0], max_new_tokens=max_new_tokens, candidates=options.pop("candidates"))
            mixture = [selection, *({name: 1.0} for name in selection.adapters[:compare]), {}]
            prompts, asked = prompts * len(mixture), asked * len(mixture)
        elif len(prompts) == 1 and not json and not generation_early_stop and sys.stdout.isatty():
            _stream(logo, asked[0], mixture, max_new_tokens=max_new_tokens, **options)
            return
        answers = logo.generate(
            asked,
            adapters=mixture,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            stop_at_newline=generation_early_stop,
            **options,
        )
    if json:
        records = [_record(p, answer) for p, answer in zip(prompts, answers, strict=True)]
        print_json(records[0] if len(records) == 1 else records)
        return
    for answer in answers:
        out.print(answer.text.strip(), markup=False)
        note(f"  {selection_line(answer.selection)}")


def _stream(logo: Calls, prompt: Any, mixture: Any, *, max_new_tokens: int | None, **options: Any) -> None:
    """Prints an answer as it comes, and then what answered."""
    selection = None
    if mixture is None:
        selection = logo.select(prompt, max_new_tokens=max_new_tokens, candidates=options["candidates"])
    pieces = logo.stream(prompt, adapters=selection or mixture, max_new_tokens=max_new_tokens, **options)
    for number, piece in enumerate(pieces):
        print(piece if number else piece.lstrip(), end="", flush=True)
    print()
    if selection is not None:
        err.print(selection_table(selection, top=5))


def _sampling(sample: bool, temperature: float | None, top_p: float | None) -> dict[str, Any]:
    """The options of `LoGo.generate` that ask for it."""
    given = {"temperature": temperature, "top_p": top_p}
    if sample:
        return {"do_sample": True, **{name: 1.0 if value is None else value for name, value in given.items()}}
    for name, value in given.items():
        if value is not None:
            raise UsageError(f"--{name.replace('_', '-')} {value}: only sampling has it; add --sample or leave it out")
    return {}


def _record(prompt: str, answer: Generation) -> dict[str, object]:
    return {
        "prompt": prompt,
        "text": answer.text,
        **answer.selection.as_dict(),
        "tokens": len(answer.token_ids),
        "finish_reason": answer.finish_reason,
        "seconds": answer.seconds,
    }
