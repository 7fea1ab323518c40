"""`logo pool export`: a mixture of adapters as one, or an adapter of PiSSA and its relatives as plain LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from logo.cli.opening import open_engine
from logo.cli.options import ModelOptions, in_words
from logo.cli.output import note, out, selection_line
from logo.cli.prompts import PromptOptions, forced, or_demo
from logo.errors import UsageError


def export(
    prompt: str | None = None,
    /,
    *,
    save: Path,
    adapter: Annotated[list[str] | None, in_words("selected")] = None,
    initial: Path | None = None,
    allow_pickle: bool = False,
    pool: ModelOptions = ModelOptions(),
) -> None:
    """Write a mixture as one plain PEFT adapter, for any tool that reads LoRA adapters.

    Example: logo pool export "What is 7 plus 5?" --save sums

    Args:
        prompt: Write the mixture that this prompt selects.
        save: The folder to write; must not exist yet.
        adapter: Write these adapters instead, NAME or NAME=WEIGHT (repeatable).
        initial: Write the adapter in the folder `--adapters` instead, of PiSSA, OLoRA, CorDA or LoRA-GA, as plain LoRA
            of twice the rank: the folder of its state before training.
        allow_pickle: Also read adapter_model.bin (tensors only).
    """
    if [prompt, adapter, initial].count(None) != 2:
        raise UsageError("expected one of: a prompt, which selects; --adapter NAME=WEIGHT; --initial DIR")
    if initial is not None:
        from logo.cli.pool.initial import convert_initial

        if pool.sources is None:
            raise UsageError("--initial: name the folder of the trained adapter with --adapters")
        convert_initial(Path(pool.sources), initial, save, allow_pickle=allow_pickle)
    else:
        logo = open_engine(pool, or_demo(pool), allow_pickle=allow_pickle)
        if prompt is not None:
            [text], _ = PromptOptions().read([prompt])
            mixture: Any = logo.select(text)
            note(f"  {selection_line(mixture)}")
        else:
            mixture = forced(adapter or (), logo.pool)
        logo.save_mixture(mixture, save)
    out.print(f"{save}: written", markup=False)
