"""`logo generate`: answers with the mixture that each prompt selects."""

from __future__ import annotations

import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from logo.cli.belonging import check_forced_options
from logo.cli.expanded import command_line, expanded, given
from logo.cli.opening import check_batch_size, open_any
from logo.cli.options import Candidates, EngineOptions, Json, RunnerOptions, argument, rare, usual
from logo.cli.output import note, print_json, selection_line, verbatim, write_json
from logo.cli.prompts import Chat, PromptsFile, System, as_asked, forced, or_demo, read_prompts
from logo.errors import UsageError

if TYPE_CHECKING:
    from logo.core import Generation
    from logo.engine import LoGo


@expanded
def generate(
    engine: EngineOptions,
    runner: RunnerOptions,
    prompt: list[str] | None = argument(None, help="One or more prompts; `-` reads one from stdin."),
    prompts: PromptsFile = None,
    chat: Chat = False,
    system: System = None,
    max_new_tokens: int | None = usual(None, "Longest answer, in tokens.", "256, or half of the context"),
    batch_size: int = rare(8, "Prompts per forward pass."),
    adapter: list[str] | None = usual(
        None, "Use this adapter instead of selecting (repeatable).", metavar="NAME[=WEIGHT]"
    ),
    candidate: Candidates = None,
    compare: int | None = usual(
        None, "Also answer with each of the best N adapters alone, and with none.", False, metavar="N", min=1
    ),
    base_only: bool = usual(False, "Use no adapter at all."),
    generation_early_stop: bool = rare(False, "Stop at the end of the answer's first line."),
    sample: bool = usual(False, "Sample instead of greedy decoding."),
    temperature: float | None = rare(None, "Used with --sample.", "1.0", min=0.0),
    top_p: float | None = rare(None, "Used with --sample.", "1.0", min=0.0, max=1.0),
    seed: int = rare(0, "Random seed of --sample."),
    json: Json = False,
    save: Path | None = usual(None, "Write answers and options as JSON, too.", False, metavar="FILE"),
) -> None:
    """Answer prompts, each with the mixture of adapters it selects.

    Example: `logo generate "What is 7 plus 5?"`
    """
    if "seed" in given() and not sample:
        raise UsageError(f"--seed {seed} is only for sampling; add --sample or leave it out")
    check_batch_size(runner)
    texts = read_prompts(prompt, prompts)
    asked = as_asked(texts, chat, system)
    mixture: Any = forced(adapter, base_only)
    if mixture is not None:
        check_forced_options()
    if compare is not None and (len(texts) != 1 or mixture is not None):
        raise UsageError("--compare: expected one prompt, without --adapter and --base-only, which fix the mixture")
    options: dict[str, Any] = {**_sampling(sample, temperature, top_p), "candidates": candidate or None}
    base_model = or_demo(engine)
    with closing(open_any(engine, runner, base_model)) as logo:
        if adapter:
            mixture = forced(adapter, names=logo.pool)
        if sample:
            import torch

            torch.manual_seed(seed)
        started, selecting = time.perf_counter(), None
        if compare is not None:
            selection = logo.select(asked[0], max_new_tokens=max_new_tokens, candidates=options.pop("candidates"))
            selecting = time.perf_counter() - started
            mixture = [selection, *({name: 1.0} for name in selection.adapters[:compare]), {}]
            texts, asked = texts * len(mixture), asked * len(mixture)
        elif len(texts) == 1 and not json and save is None and not generation_early_stop and sys.stdout.isatty():
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
    if selecting is not None:  # it was no part of answering; the other mixtures were not selected
        seconds = [selecting, *[0.0] * (len(answers) - 1)]
        answers = [replace(a, seconds={**a.seconds, "probe": s}) for a, s in zip(answers, seconds, strict=True)]
    records = [_record(p, answer) for p, answer in zip(texts, answers, strict=True)]
    if json:
        print_json(records[0] if len(records) == 1 else records)
    for answer in [] if json else answers:
        verbatim(answer.text.strip())
        note(f"  {selection_line(answer.selection)}")
    if save is not None:
        write_json(save, {"command": command_line(), "answers": records})
        note(f"written: {save}")


def _stream(logo: LoGo, prompt: Any, mixture: Any, *, max_new_tokens: int | None, **options: Any) -> None:
    """Prints an answer as it is generated, and then the adapters that gave it."""
    from logo.core import Selection

    if mixture is None:
        selection = mixture = logo.select(prompt, max_new_tokens=max_new_tokens, candidates=options["candidates"])
    else:
        selection = Selection.forced(mixture)
    pieces = logo.stream(prompt, adapters=mixture, max_new_tokens=max_new_tokens, **options)
    for number, piece in enumerate(pieces):
        print(piece if number else piece.lstrip(), end="", flush=True)
    print()
    note(f"  {selection_line(selection)}")


def _sampling(sample: bool, temperature: float | None, top_p: float | None) -> dict[str, Any]:
    """The options of `LoGo.generate` for sampling; empty without --sample."""
    given = {"temperature": temperature, "top_p": top_p}
    if temperature == 0 and sample:
        raise UsageError("--temperature 0: expected more than 0; leave out --sample for greedy decoding")
    if sample:
        return {"do_sample": True, **{name: 1.0 if value is None else value for name, value in given.items()}}
    for name, value in given.items():
        if value is not None:
            raise UsageError(f"--{name.replace('_', '-')} {value} is only for sampling; add --sample or leave it out")
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
