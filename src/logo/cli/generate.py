"""`logo generate`: answers with the mixture that each prompt selects."""

from __future__ import annotations

import sys
from contextlib import closing
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from logo.cli.opening import open_engine
from logo.cli.options import EngineOptions, in_words, not_negative, positive
from logo.cli.output import note, print_json, selection_line, verbatim
from logo.cli.prompts import PromptOptions, forced, or_demo
from logo.errors import UsageError

if TYPE_CHECKING:
    from logo.engine import LoGo


def generate(
    *prompt: str,
    prompts: PromptOptions = PromptOptions(),
    max_new_tokens: Annotated[int | None, in_words("256, or half of the context", validator=positive)] = None,
    adapter: Annotated[list[str] | None, in_words("selected")] = None,
    base_only: bool = False,
    temperature: Annotated[float, Parameter(validator=not_negative)] = 0.0,
    seed: int = 0,
    json: bool = False,
    engine: EngineOptions = EngineOptions(),
) -> None:
    """Answer prompts, each with the mixture of adapters it selects.

    Example: logo generate "What is 7 plus 5?"

    Args:
        prompt: One or more prompts.
        max_new_tokens: Longest answer, in tokens.
        adapter: Use this adapter, NAME or NAME=WEIGHT (repeatable).
        base_only: Use no adapter at all.
        temperature: Of sampling; 0 is greedy decoding.
        seed: Random seed of sampling.
        json: Print JSON instead.
    """
    if adapter and base_only:
        raise UsageError("--base-only and --adapter exclude each other: give one of them")
    texts, inputs = prompts.read(prompt)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens}
    if temperature > 0:
        options |= {"do_sample": True, "temperature": temperature, "top_k": 0}
    with closing(open_engine(engine, or_demo(engine), prompts.probe_text)) as logo:
        mixture = {} if base_only else forced(adapter, logo.pool) if adapter else None
        if temperature > 0:
            import torch

            torch.manual_seed(seed)
        if len(texts) == 1 and not json and sys.stdout.isatty():
            _stream(logo, inputs[0], mixture, **options)
            return
        answers = logo.generate(inputs, adapters=mixture, **options)
    if json:
        records = [
            {
                "prompt": text,
                "text": answer.text,
                **answer.selection.as_dict(),
                "tokens": len(answer.token_ids),
                "finish_reason": answer.finish_reason,
                "seconds": answer.seconds,
            }
            for text, answer in zip(texts, answers, strict=True)
        ]
        print_json(records[0] if len(records) == 1 else records)
        return
    for answer in answers:
        verbatim(answer.text.strip())
        note(f"  {selection_line(answer.selection)}")


def _stream(logo: LoGo, prompt: Any, mixture: Any, **options: Any) -> None:
    """Prints an answer as it is generated, and then the adapters that gave it."""
    from logo.core import Selection

    if mixture is None:
        selection = mixture = logo.select(prompt, max_new_tokens=options["max_new_tokens"])
    else:
        selection = Selection.forced(mixture)
    for number, piece in enumerate(logo.stream(prompt, adapters=mixture, **options)):
        print(piece if number else piece.lstrip(), end="", flush=True)
    print()
    note(f"  {selection_line(selection)}")
