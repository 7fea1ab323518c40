"""`logo pool examples`: example prompts of the adapters of a pool."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from json import loads
from pathlib import Path
from typing import Annotated, Any

from logo.adapters.examples import read_examples, write_examples
from logo.adapters.manifest import read_manifest, write_manifest
from logo.adapters.pool import AdapterPool
from logo.adapters.sources import parse_sources
from logo.cli.options import in_words
from logo.cli.output import note, out, print_json, verbatim
from logo.errors import DataError, StorageError, UsageError
from logo.files import locked
from logo.selection.texts import REQUESTS

FROM_LOG = 8  # examples of an adapter that are taken from a log
LEAST = 3  # fewer prompts may be trials


def examples(
    place: str,
    name: Annotated[str | None, in_words("counts the examples of all")] = None,
    file: Annotated[Path | None, in_words("prints the present ones")] = None,
    /,
    *,
    from_log: list[Path] | None = None,
    json: bool = False,
) -> None:
    """Print or store example prompts of adapters. A prompt that is like an adapter's examples selects the adapter.

    Examples have no answers. They are stored beside the adapter, or in the manifest.

    Example: logo pool examples adapters/ antonyms prompts.jsonl

    Args:
        place: Folder of adapters, at any depth, or a manifest.
        name: The adapter.
        file: The example prompts: a JSON object per line with a `prompt` (or `context`); answers are not stored. They
            replace the adapter's present examples. If your users word their prompts in several ways, give some of each.
        from_log: Give adapters without examples 3 to 8 prompts of requests that named them: a log of `logo serve
            --log prompts`, or a JSON object per line with `prompt` and `adapter` (repeatable).
        json: Print JSON instead.
    """
    if from_log and name is not None:
        raise UsageError("--from-log gives examples to all adapters that a log names: leave NAME out")
    pool, manifest = _opened(place)
    if name is None:
        _count(pool, manifest, _logged(pool, from_log or []), json=json)
        return
    prompts = list(pool[name].examples)
    if file is not None:
        prompts = _prompts_in(file)
        _store(pool, manifest, {name: prompts})
    if json:
        print_json({name: prompts})
    elif file is not None:
        out.print(f"{name}: {len(prompts)} examples", markup=False, highlight=False)
    else:
        for prompt in prompts:
            verbatim(prompt)


def _count(pool: AdapterPool, manifest: Path | None, new: Mapping[str, Sequence[str]], *, json: bool) -> None:
    """Stores new examples by adapter, and prints how many examples each adapter has then."""
    _store(pool, manifest, new)
    counts = {adapter.name: len(new.get(adapter.name, adapter.examples)) for adapter in pool}
    if json:
        print_json(counts)
        return
    for name, count in counts.items():
        remark = " (new)" if name in new else ""
        out.print(f"{count:4} {name}{remark}", markup=False, highlight=False)


def _prompts_in(file: Path) -> list[str]:
    try:
        prompts = read_examples(file)
    except FileNotFoundError as error:
        raise UsageError(f"{file}: no such file") from error
    if not prompts:
        raise DataError(f"{file}: expected one prompt or more, found none")
    return prompts


def _opened(text: str) -> tuple[AdapterPool, Path | None]:
    """A pool, and the manifest in which its examples are stored; None: they are beside each adapter."""
    [only, *more] = parse_sources(text)
    if more or only.on_hub:
        missing = "" if more else " (there is no such folder here)"
        raise UsageError(
            f"{text}: expected one folder or one manifest, in which the examples are stored{missing}; for a pool on "
            f"the Hub, make a manifest first: `logo pool lock {text} --save pool.yaml`"
        )
    return AdapterPool.open([only.where]), Path(only.where) if only.kind == "manifest" else None


def _store(pool: AdapterPool, manifest: Path | None, examples: Mapping[str, Sequence[str]]) -> None:
    """Stores examples by adapter: beside each, or in the manifest, whose comments are lost.

    Raises:
        UsageError: the manifest has no entry with the name of an adapter, since one without a name stands for it.
        StorageError: a file cannot be written.
    """
    if manifest is None:
        for name, prompts in examples.items():
            write_examples(pool[name].folder, prompts)
        return
    with locked(manifest.absolute().parent):  # another process may give examples, too
        content = read_manifest(manifest)
        without_entry = sorted(examples.keys() - {entry.name for entry in content.entries})
        if without_entry:
            raise UsageError(
                f"manifest {manifest}: no entry has the name {without_entry[0]!r}, so it has no place for examples; "
                f"write the names with `logo pool lock {manifest} --save {manifest} --overwrite`"
            )
        entries = list(content.entries)
        for number, entry in enumerate(entries):
            if entry.name is not None and entry.name in examples:
                entries[number] = replace(entry, examples=tuple(examples[entry.name]))
        write_manifest(manifest, replace(content, entries=entries))


def _logged(pool: AdapterPool, files: Sequence[Path]) -> dict[str, list[str]]:
    """Examples for adapters that have none, from requests that named them alone, in the order of the logs."""
    named: dict[str, dict[str, str]] = {}  # a prompt as it is compared -> each adapter that was named -> the prompt
    for file in files:
        rows = _named_prompts(file)
        if not rows:
            raise DataError(
                f'{file}: expected JSON objects with a "prompt" and an "adapter", one per line, or the log of `logo '
                "serve --log prompts`, found no prompt that names its adapter"
            )
        for prompt, adapter in rows:
            named.setdefault(_same(prompt), {})[adapter] = prompt
    for prompt in REQUESTS:  # `logo verify` asks adapters without examples these
        named.pop(_same(prompt), None)
    prompts_of: dict[str, list[str]] = {}
    for adapters in named.values():
        if len(adapters) == 1:
            [(adapter_name, prompt)] = adapters.items()
            prompts_of.setdefault(adapter_name, []).append(prompt)
    unknown = sorted(prompts_of.keys() - set(pool.names))
    if unknown:
        note(f"no adapter of the pool has the name {unknown[0]!r}; write the pool's names")
    return {
        adapter.name: prompts_of[adapter.name][:FROM_LOG]
        for adapter in pool
        if not adapter.examples and len(prompts_of.get(adapter.name, ())) >= LEAST
    }


def _same(prompt: str) -> str:
    """A prompt as it is compared: those that differ in case or blanks only count as one."""
    return " ".join(prompt.split()).casefold()


def _named_prompts(file: Path) -> list[tuple[str, str]]:
    """The prompts in a file whose requests named one adapter, and that adapter."""
    pairs: list[tuple[str, str]] = []
    try:
        with file.open(encoding="utf-8-sig", errors="replace") as lines:
            for line in lines:
                try:
                    pairs += _of_line(loads(line)) if line.strip() else ()
                except (ValueError, RecursionError):  # another program's line
                    continue
    except OSError as error:
        raise StorageError(f"{file}: cannot be read ({error.strerror}); name a file with prompts") from error
    return pairs


def _of_line(line: Any) -> list[tuple[str, str]]:
    match line:
        case {"prompt": str(prompt), "adapter": str(adapter), **more} if prompt.strip() and adapter:
            return [] if more.get("cut") else [(prompt, adapter)]
        case {"logger": str(logger), "selections": [*selections]} if logger.split(".")[0] == "logo":
            return [pair for selection in selections for pair in _of_selection(selection)]
    return []


def _of_selection(selection: Any) -> list[tuple[str, str]]:
    """The prompt of a logged selection whose one adapter was named, with the weight 1."""
    match selection:
        case {"prompt": str(prompt), "cut": False, "adapters": [str(name)], "weights": [1], "named": True}:
            return [(prompt, name)] if prompt.strip() else []
    return []
