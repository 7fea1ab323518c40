"""`logo pool learn`: example prompts for the adapters of a pool, learned from prompts without labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from json import loads
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from logo.cli.belonging import check_selection_options
from logo.cli.expanded import expanded
from logo.cli.opening import open_engine, selection_settings
from logo.cli.options import EngineOptions, Json, argument, usual
from logo.cli.output import err, natural_width, note, one_line, out, plain_table, print_json, progress, screen
from logo.cli.prompts import or_demo
from logo.errors import DataError, StorageError, UsageError, listed

if TYPE_CHECKING:
    from logo.learning import Example

SHOWN = 60  # characters of an example
SURE = 0.8


@expanded
def learn(
    engine: EngineOptions,
    files: list[Path] = argument(
        ...,
        metavar="FILE...",
        help="Prompts without labels: a JSON object per line with a `prompt` (or `context`), or logs of servers (`logo "
        "serve --log-json --log-prompts 2> FILE`).",
    ),
    confidence: float = usual(SURE, "The least confidence of a selection from which an example is learned."),
    dry_run: bool = usual(False, "Show what would be learned; write nothing."),
    json: Json = False,
) -> None:
    """Learn example prompts for adapters that have none, from prompts without labels.

    The prompts that select an adapter with high confidence become its examples (at most 8, in examples.jsonl beside
    it), so that prompts like them select it more surely. Adapters with examples of their own keep them; examples that
    were learned before are replaced. Look at the list: a sure selection may be wrong.

    Example: `logo pool learn day.log --base-model Qwen/Qwen2.5-7B --adapters my/adapters`
    """
    from logo.adapters.examples import write_examples
    from logo.learning import learn_examples, learnable

    if engine.adapters is not None and not Path(engine.adapters).is_dir():
        raise UsageError(
            f"--adapters {engine.adapters}: expected a folder, since examples are stored beside the adapters"
        )
    check_selection_options([selection_settings(engine)])
    prompts = read_prompts(files)
    base_model = or_demo(engine)
    with err.status("Loading and calibrating ..."):
        logo = open_engine(engine, base_model)
    names = learnable(logo.fitted)
    with progress(disable=not err.is_terminal) as shown:
        bar = shown.add_task("prompts read", total=None)
        found = learn_examples(
            logo, prompts, sure=confidence, tell=lambda done, of: shown.update(bar, total=of, completed=done)
        )
    if not dry_run:
        for name, examples in found.items():
            write_examples(logo.fitted[name].folder, [e.prompt for e in examples], [e.confidence for e in examples])
    if json:
        print_json({name: [asdict(example) for example in found.get(name, [])] for name in names})
        return
    table = _table(found)
    screen(natural_width(table)).print(table)
    for head, text in _remarks(found, names, len(logo.fitted), len(prompts), dry_run):
        out.print(Text.assemble((f"{head} ", "yellow"), text))


def read_prompts(files: Sequence[Path]) -> list[str]:
    """The prompts in these files, in their order.

    Raises:
        StorageError: a file cannot be read.
        DataError: there is no prompt in a file.
    """
    from logo.serving.logged import prompts_of

    prompts: list[str] = []
    bad: list[str] = []
    for file in files:
        before = len(prompts)
        try:
            with file.open(encoding="utf-8", errors="replace") as lines:
                for number, line in enumerate(lines, start=1):
                    try:
                        prompts += prompts_of(loads(line)) if line.strip() else []
                    except ValueError:
                        bad.append(f"{file}:{number}")
        except OSError as error:
            raise StorageError(
                f"{file}: expected a file with prompts, found none that can be read: {error.strerror}"
            ) from error
        if len(prompts) == before:
            raise DataError(
                f'{file}: expected JSON objects with a "prompt", one per line, or the log of `logo serve --log-json '
                "--log-prompts`, found no prompt"
            )
    if bad:
        note(f"skipped lines that are no JSON objects with prompts: {len(bad)}, the first at {bad[0]}")
    return prompts


def _table(found: Mapping[str, Sequence[Example]]) -> Table:
    table = plain_table("adapter", ">examples", ">confidence", "such as")
    for name, examples in found.items():
        mean = sum(one.confidence for one in examples) / len(examples)
        table.add_row(
            Text(one_line(name)), str(len(examples)), f"{mean:.2f}", Text(one_line(examples[0].prompt, SHOWN))
        )
    return table


def _remarks(
    found: Mapping[str, Sequence[Example]], names: Sequence[str], every: int, prompts: int, dry_run: bool
) -> Iterator[tuple[str, str]]:
    done = "would be stored" if dry_run else "stored"
    yield done, f"examples for {len(found)} of {len(names)} adapters, learned from {prompts} prompts"
    if every > len(names):
        yield "unchanged", f"{every - len(names)} of {every} adapters, which have examples of their own"
    if missing := [name for name in names if name not in found]:
        yield "no sure prompt", f"for {listed([one_line(name) for name in missing], 8)}"
