"""`logo pool export`: a mixture of adapters as one, or an adapter of PiSSA and its relatives as plain LoRA."""

from __future__ import annotations

from pathlib import Path

from logo.cli.expanded import expanded
from logo.cli.opening import open_engine
from logo.cli.options import EngineOptions, argument, usual
from logo.cli.output import note, out, selection_line
from logo.cli.prompts import Chat, System, as_asked, forced, or_demo, read_prompts
from logo.errors import UsageError


@expanded
def export(
    engine: EngineOptions,
    folder: Path = usual(..., "The folder to write; must not exist yet.", True, "--output", "-o", metavar="DIR"),
    prompt: str | None = argument(None, help="Write the mixture that this prompt selects."),
    chat: Chat = False,
    system: System = None,
    adapter: list[str] | None = usual(None, "Write these adapters instead (repeatable).", metavar="NAME[=WEIGHT]"),
    initial: Path | None = usual(
        None,
        "Write the adapter in the folder `--adapters` instead, of PiSSA, OLoRA, CorDA or LoRA-GA, as plain LoRA of "
        "twice the rank: the folder of its state before training.",
        metavar="DIR",
    ),
) -> None:
    """Write a mixture as one plain PEFT adapter, for any tool that reads LoRA adapters.

    Example: `logo pool export "What is 7 plus 5?" --output sums`
    """
    mixture = forced(adapter)
    if [prompt, mixture, initial].count(None) != 2:
        raise UsageError("expected one of: a prompt, which selects; --adapter NAME=WEIGHT; --initial DIR")
    if initial is not None:
        from logo.cli.pool.initial import convert_initial

        if engine.adapters is None:
            raise UsageError("--initial: name the folder of the trained adapter with --adapters")
        convert_initial(Path(engine.adapters), initial, folder, allow_pickle=engine.allow_pickle)
        out.print(f"{folder}: written", markup=False)
        return
    base_model = or_demo(engine)
    logo = open_engine(engine, base_model)
    if prompt is not None:
        [selection] = logo.select(as_asked(read_prompts([prompt], None), chat, system))
        note(f"  {selection_line(selection)}")
        logo.save_mixture(selection, folder)
    else:
        logo.save_mixture(forced(adapter, names=logo.pool) or {}, folder)
    out.print(f"{folder}: written", markup=False)
