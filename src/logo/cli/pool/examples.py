"""`logo pool examples`: example prompts of the adapters of a pool."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from logo.adapters.examples import MOST, examples_of, is_learned, read_examples, write_examples
from logo.adapters.format import Adapter
from logo.adapters.gathering import gather
from logo.adapters.manifest import check_named, give_examples, read_manifest
from logo.adapters.options import Fetching
from logo.adapters.places import Place, parse_places
from logo.adapters.pool import AdapterPool
from logo.adapters.upkeep.dataset_prompts import datasets_of, on_hub, read_each, shared
from logo.cache import default_cache
from logo.cli.choices import OnBad
from logo.cli.options import Json, argument, usual
from logo.cli.output import out, print_json, verbatim
from logo.cli.pool.common import AllowPickle, OnBadAdapter, opened, steps, tell_refused
from logo.errors import DataError, UsageError, listed
from logo.evaluation.tables import counted

_TOGETHER = 32  # adapters whose examples are written at the same time
_NONE = "its model card names no dataset"

# Stores examples by adapter, and returns the adapters that got theirs; True: only those that have none by now.
Store = Callable[[Mapping[str, Sequence[str]], bool], list[str]]


def examples(
    place: str = argument(..., metavar="PLACE", help="Folder of adapters, at any depth, or a manifest."),
    name: str | None = argument(None, metavar="NAME", help="The adapter.", show_default="counts the examples of all"),
    file: Path | None = argument(
        None,
        metavar="FILE",
        help="The example prompts: a JSON object per line with a `prompt` (or `context`); answers are not "
        "stored. The first 16 replace the adapter's present examples.",
        show_default="prints the present ones",
    ),
    from_datasets: bool = usual(
        False,
        "Give adapters without examples 8 prompts of the dataset that their model card names (`datasets:`), which is "
        "read from the Hub. With NAME: only this adapter.",
    ),
    column: str | None = usual(
        None,
        "The column of the dataset that holds the prompts.",
        "the first of messages, conversations, prompt, context, instruction, inputs, input, question",
        metavar="NAME",
    ),
    split: str = usual("train", "The split of the dataset.", metavar="NAME"),
    subset: str | None = usual(None, "The configuration of the dataset.", "its only one", metavar="NAME"),
    allow_pickle: AllowPickle = False,
    on_bad_adapter: OnBadAdapter = "error",
    json: Json = False,
) -> None:
    """Store example prompts of an adapter, without answers, so that prompts like them select it.

    They are stored beside the adapter, or in the manifest.

    Example: `logo pool examples adapters/ antonyms prompts.jsonl`
    """
    if from_datasets and file is not None:
        raise UsageError("--from-datasets takes the prompts from datasets: leave FILE out")
    if not from_datasets and (column, split, subset) != (None, "train", None):
        raise UsageError("--column, --split and --subset are for --from-datasets: add it, or leave them out")
    pool, store = _opened(place, allow_pickle, on_bad_adapter, name if file or from_datasets else "")
    if from_datasets:
        adapters = list(pool) if name is None else [pool[name]]
        _from_datasets(adapters, store, json, column=column, split=split, subset=subset)
        return
    if name is None:
        counts = {adapter.name: len(adapter.examples) for adapter in pool}
        if json:
            print_json(counts)
            return
        for adapter in pool:
            how = " (learned)" if adapter.given_examples is None and is_learned(adapter.folder) else ""
            out.print(f"{counts[adapter.name]:4} {adapter.name}{how}", markup=False, highlight=False)
        return
    kept = pool[name].examples
    if file is not None:
        try:
            prompts = read_examples(file)
        except FileNotFoundError as error:
            raise UsageError(f"{file}: no such file") from error
        if not prompts:
            raise DataError(f"{file}: expected one prompt or more, found none")
        kept = tuple(prompts[:MOST])
        store({name: kept}, False)
    if json:
        print_json({name: list(kept)})
        return
    if file is not None:
        more = f" (the first of {len(prompts)})" if len(prompts) > len(kept) else ""
        out.print(f"{name}: {len(kept)} examples{more}", markup=False, highlight=False)
        return
    for prompt in kept:
        verbatim(prompt)


def _opened(text: str, allow_pickle: bool, on_bad: OnBad, changes: str | None) -> tuple[AdapterPool, Store]:
    """The pool at a place, and what stores examples of its adapters.

    Args:
        changes: the adapter that will get examples; None: all may; empty: none.
    """
    places = parse_places(text)
    [only, *more] = places
    if more or not only.plain or only.kind not in ("folder", "manifest"):
        missing = "" if more or only.kind != "repo" else " (there is no such folder here)"
        raise UsageError(
            f"{text}: expected one folder or one manifest, in which the examples are stored{missing}; for a pool on "
            f"the Hub, make a manifest first: `logo pool lock {text} --out pool.yaml`"
        )
    if only.kind == "folder":
        pool = opened(Path(only.source), allow_pickle, on_bad)

        def store(found: Mapping[str, Sequence[str]], keep: bool) -> list[str]:
            given = [name for name in found if not (keep and examples_of(pool[name].folder))]
            for name in given:
                write_examples(pool[name].folder, found[name])
            return given

        return pool, store
    pool, file = _of_manifest(only, allow_pickle, on_bad), Path(only.source)
    if changes != "":  # before datasets are read
        check_named(file, read_manifest(file), pool.names if changes is None else [pool[changes].name])
    return pool, lambda found, keep: give_examples(file, found, keep=keep)


def _of_manifest(place: Place, allow_pickle: bool, on_bad: OnBad) -> AdapterPool:
    found = gather([place], Fetching(allow_pickle=allow_pickle), skip=on_bad == "skip", cache=default_cache())
    pool = AdapterPool.from_survey(place.source, found.adapters, found.refused, on_bad_adapter=on_bad)
    tell_refused(pool.refused)
    return pool


def _from_datasets(adapters: Sequence[Adapter], store: Store, json: bool, **options: str | None) -> None:
    """Gives adapters without examples some of the datasets that their cards name; `options` as `read_each`."""
    named = {adapter.name: datasets_of(adapter.folder) for adapter in adapters if not adapter.examples}
    found, left = _read({name: on_hub(names) for name, names in named.items()}, store, **options)
    for name, names in named.items():
        if not on_hub(names):
            left[name] = f"{_NONE}, org/name, on the Hub{f', but {listed(names)}' if names else ''}"
    if json:
        print_json({"examples": found, "left": left})
    else:
        for name, prompts in found.items():
            out.print(f"{len(prompts):4} {name}, from {listed(named[name])}", markup=False, highlight=False)
        for name, why in left.items():
            out.print(f"none {name}: {why}", markup=False, highlight=False)
        kept = len(adapters) - len(named)
        out.print(f"examples for {counted(len(found), 'adapter')}; {kept} had some already; none for {len(left)}")
    if left and not found:
        raise DataError(f"no examples for {listed(list(left))}")


def _read(
    wanted: Mapping[str, Sequence[str]], store: Store, **options: str | None
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Reads the datasets of adapters, each once, and stores the prompts; also what was read before an error or Ctrl-C.

    Returns:
        The prompts of each adapter, and why others have none.
    """
    read: dict[str, list[str] | DataError] = {}
    found: dict[str, list[str]] = {}
    left: dict[str, str] = {}
    waiting: dict[str, list[str]] = {}

    def keep() -> None:
        given = store(waiting, True)
        left.update({name: "it got examples meanwhile, which stay" for name in waiting if name not in given})
        found.update({name: waiting[name] for name in given})
        waiting.clear()

    repos = list(dict.fromkeys(repo for names in wanted.values() for repo in names))
    with steps("datasets", len(repos)) as step:
        try:
            for repo, result in read_each(repos, **options):  # type: ignore[arg-type]
                read[repo] = result
                step()
                for name, names in wanted.items():
                    if repo not in names or any(one not in read for one in names):
                        continue
                    parts = [part for one in names if not isinstance(part := read[one], DataError)]
                    if parts:
                        waiting[name] = shared(parts)
                    else:
                        left[name] = "; ".join(str(read[one]) for one in names)
                if len(waiting) >= _TOGETHER:
                    keep()
        finally:
            keep()
    return {name: found[name] for name in wanted if name in found}, left
