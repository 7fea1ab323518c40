"""`logo pool examples`: example prompts of the adapters of a pool."""

from __future__ import annotations

from pathlib import Path

from logo.cli.options import Json, argument
from logo.cli.output import out, print_json, verbatim
from logo.cli.pool.common import AllowPickle, Folder, OnBadAdapter, opened
from logo.errors import DataError, UsageError


def examples(
    folder: Folder,
    name: str | None = argument(None, metavar="NAME", help="The adapter.", show_default="counts the examples of all"),
    file: Path | None = argument(
        None,
        metavar="FILE",
        help="The example prompts: a JSON object per line with a `prompt` (or `context`); answers are not "
        "stored. The first 16 replace the adapter's present examples.",
        show_default="prints the present ones",
    ),
    allow_pickle: AllowPickle = False,
    on_bad_adapter: OnBadAdapter = "error",
    json: Json = False,
) -> None:
    """Store example prompts beside an adapter, without answers, so that prompts like them select it.

    Example: `logo pool examples adapters/ antonyms prompts.jsonl`
    """
    from logo.adapters.examples import MOST, examples_of, is_learned, read_examples, write_examples

    pool = opened(folder, allow_pickle, on_bad_adapter)
    if name is None:
        counts = {adapter.name: len(examples_of(adapter.folder)) for adapter in pool}
        if json:
            print_json(counts)
            return
        for adapter in pool:
            how = " (learned)" if is_learned(adapter.folder) else ""
            out.print(f"{counts[adapter.name]:4} {adapter.name}{how}", markup=False, highlight=False)
        return
    adapter = pool[name]
    if file is not None:
        try:
            prompts = read_examples(file)
        except FileNotFoundError as error:
            raise UsageError(f"{file}: no such file") from error
        if not prompts:
            raise DataError(f"{file}: expected one prompt or more, found none")
        write_examples(adapter.folder, prompts[:MOST])
    kept = examples_of(adapter.folder)
    if json:
        print_json({name: list(kept)})
        return
    if file is not None:
        more = f" (the first of {len(prompts)})" if len(prompts) > len(kept) else ""
        out.print(f"{adapter.name}: {len(kept)} examples{more}", markup=False, highlight=False)
        return
    for prompt in kept:
        verbatim(prompt)
