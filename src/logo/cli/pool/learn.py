"""`logo pool learn`: example prompts for the adapters of a pool, learned from logged prompts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from json import loads
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from logo.cli.belonging import check_selection_options
from logo.cli.expanded import expanded
from logo.cli.opening import open_base, selection_settings
from logo.cli.options import EngineOptions, Json, argument, usual
from logo.cli.output import err, natural_width, note, one_line, out, plain_table, print_json, progress, screen
from logo.cli.prompts import or_demo
from logo.errors import DataError, StorageError, UsageError, listed
from logo.evaluation.tables import counted

if TYPE_CHECKING:
    from logo.adapters.pool import AdapterPool
    from logo.learning import Example, Learned

SHOWN = 60  # characters of an example
SURE = 0.8  # as `logo.learning.SURE`, which is not imported for the help


@expanded
def learn(
    engine: EngineOptions,
    files: list[Path] = argument(
        ...,
        metavar="FILE...",
        help="A JSON object per line with a `prompt` (or `context`) and, if known, its `adapter`; or logs of servers "
        "(`logo serve --log-json --log-prompts 2> FILE`). Of more than 2000 prompts, a random sample is read.",
    ),
    ignore_names: bool = usual(
        False, "Treat every prompt, also those kept from earlier runs, as if its request had named no adapter."
    ),
    confidence: float = usual(SURE, "The least confidence of a selection from which an example is learned."),
    dry_run: bool = usual(False, "Show what would be learned; write nothing."),
    json: Json = False,
) -> None:
    """Learn example prompts for adapters that have none, from logged prompts.

    Prompts whose requests named an adapter become its examples (3 to 8, in examples.jsonl beside it); so do, for other
    adapters, the prompts that select them with high confidence. Similar prompts then select the adapter with higher
    confidence. Adapters with examples of their own keep them. What was learned without names is read again, and is
    removed if it is no longer sure enough. Look at the examples: a sure selection may be wrong.

    Example: `logo pool learn day.log --base-model Qwen/Qwen2.5-7B --adapters my/adapters`
    """
    from logo.folders import check_writable
    from logo.learning import check_learning, learn_examples, learnable
    from logo.pools import pool_place

    settings = replace(selection_settings(engine), k=1)  # nothing is mixed; see `logo.learning`
    check_selection_options([settings])
    check_learning(settings, confidence)
    base_model = or_demo(engine)
    place = pool_place(engine.adapters, base_model, engine.model_dir)
    if any(one.kind != "folder" for one in place.places):
        raise UsageError(
            f"--adapters {place.spec}: expected a folder, or several, since examples are stored beside the adapters; "
            "copy the pool into one"
        )
    prompts, named = read_prompts(files)

    def check(pool: AdapterPool) -> None:
        for name in learnable(pool):
            if not dry_run:
                check_writable(pool[name].folder, "--adapters")

    with err.status("Loading ..."):
        logo = open_base(engine, base_model, check=check).uncalibrated(engine, settings)
    with progress(disable=not err.is_terminal) as shown:
        bar = shown.add_task("reading, in two rounds", total=None)
        learned = learn_examples(
            logo,
            prompts,
            named,
            ignore_names=ignore_names,
            sure=confidence,
            tell=lambda done, of: shown.update(bar, total=of, completed=done),
        )
    given = given_meanwhile(logo.fitted, learned.examples)
    if given:
        learned = replace(learned, examples={n: e for n, e in learned.examples.items() if n not in given})
        note(f"kept the examples that {listed(list(map(one_line, given)), 8)} got while this ran")
    removed = outdated(logo.fitted, learned.examples) if dry_run else store(logo.fitted, learned.examples)
    if json:
        print_json({**asdict(learned), "removed": removed})
        return
    if any(learned.examples.values()):
        table = _table(learned.examples)
        screen(natural_width(table)).print(table)
    for head, text in _remarks(learned, len(logo.fitted), removed, dry_run):
        out.print(Text.assemble((f"{head} ", "yellow"), text))
    if any(learned.examples.values()) and not dry_run:
        note("`logo pool examples DIR NAME` prints all examples of an adapter.")


def given_meanwhile(pool: AdapterPool, examples: Mapping[str, Sequence[Example]]) -> list[str]:
    """The adapters that may no longer learn, because a user has given them examples since the pool was opened."""
    from logo.adapters.examples import is_learned
    from logo.adapters.files import EXAMPLES

    return [n for n in examples if (pool[n].folder / EXAMPLES).is_file() and not is_learned(pool[n].folder)]


def store(pool: AdapterPool, examples: Mapping[str, Sequence[Example]]) -> list[str]:
    """Writes the examples beside the adapters, and removes earlier ones of those that have none now.

    Returns:
        The adapters whose earlier ones were removed.

    Raises:
        StorageError: a file cannot be written; the message says which adapters have theirs already.
    """
    from logo.adapters.examples import remove_examples, write_examples

    done: list[str] = []
    removed = []
    for name, found in examples.items():
        folder = pool[name].folder
        try:
            if found:
                write_examples(folder, [e.prompt for e in found], [e.named or e.confidence for e in found])
                done.append(name)
            elif remove_examples(folder):
                removed.append(name)
        except StorageError as error:
            raise StorageError(f"{error}; stored before that: {listed(done, 8) or 'nothing'}") from error
    return removed


def outdated(pool: AdapterPool, examples: Mapping[str, Sequence[Example]]) -> list[str]:
    """The adapters whose earlier examples `store` would remove."""
    from logo.adapters.examples import is_learned

    return [name for name, found in examples.items() if not found and is_learned(pool[name].folder)]


def read_prompts(files: Sequence[Path]) -> tuple[list[str], dict[str, list[str]]]:
    """The prompts in these files, in their order: those without an adapter, and by the adapter that they name.

    Raises:
        StorageError: a file cannot be read.
        DataError: there is no prompt in a file.
    """
    from logo.serving.logged import prompts_of

    found: list[tuple[str, str | None]] = []
    bad: list[str] = []
    for file in files:
        before = len(found)
        try:
            with file.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
                for number, line in enumerate(lines, start=1):
                    try:
                        found += prompts_of(loads(line)) if line.strip() else []
                    except (ValueError, RecursionError):
                        bad.append(f"{file}:{number}")
        except OSError as error:
            raise StorageError(f"{file}: cannot be read ({error.strerror}); name a file with prompts") from error
        if len(found) == before:
            raise DataError(
                f'{file}: expected JSON objects with a "prompt" (and an "adapter", if known), one per line, or the log '
                "of `logo serve --log-json --log-prompts`, found no prompt"
            )
    if bad:
        note(f"{counted(len(bad), 'line')} skipped: no JSON object with a prompt; the first is {bad[0]}")
    named = defaultdict[str, list[str]](list)
    for prompt, adapter in found:
        if adapter is not None:
            named[adapter].append(prompt)
    return [prompt for prompt, adapter in found if adapter is None], dict(named)


def _table(found: Mapping[str, Sequence[Example]]) -> Table:
    table = plain_table("adapter", ">examples", ">confidence", "such as")
    for name, examples in found.items():
        if examples:
            mean = "named" if examples[0].named else f"{sum(one.confidence for one in examples) / len(examples):.2f}"
            such = one_line(examples[0].prompt, SHOWN)
            table.add_row(Text(one_line(name)), str(len(examples)), mean, Text(such))
    return table


def _remarks(found: Learned, every: int, removed: Sequence[str], dry_run: bool) -> Iterator[tuple[str, str]]:
    names = len(found.examples)
    taught = sum(map(bool, found.examples.values()))
    read = [f"{counted(found.read, 'prompt')}"] if found.read or not found.named else []
    read += [f"{counted(found.named, 'prompt')} that named adapters"] if found.named else []
    learned = f"examples for {taught} of {counted(names, 'adapter')}; read {' and '.join(read)}"
    yield "not stored" if dry_run else "stored", learned
    if found.left_out:
        yield "left out", f"{counted(found.left_out, 'prompt')} longer than the base model's context"
    if found.unknown:
        shown = [f"{one_line(name)!r} ({counted(count, 'prompt')})" for name, count in found.unknown.items()]
        yield (
            "no adapter of the pool",
            f"has the name {listed(shown, 8)}; these were read without names, so write the pool's names",
        )
    if every > names:
        yield "unchanged", f"{every - names} of {every} adapters, which have examples of their own"
    if missing := [one_line(name) for name, examples in found.examples.items() if not examples]:
        yield "too few sure prompts", f"for {listed(missing, 8)}"
    if removed:
        gone = listed([one_line(name) for name in removed], 8)
        yield "would be removed" if dry_run else "removed", f"earlier examples of {gone}"
