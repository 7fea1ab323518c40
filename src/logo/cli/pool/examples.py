"""`logo pool examples`: example prompts of the adapters of a pool."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from logo.adapters.examples import MOST, is_learned, read_examples, write_examples
from logo.adapters.format import Adapter
from logo.adapters.gathering import gather
from logo.adapters.manifest import give_examples
from logo.adapters.options import Fetching
from logo.adapters.places import Place, parse_places
from logo.adapters.pool import AdapterPool
from logo.adapters.upkeep.dataset_prompts import dataset_prompts, datasets_of
from logo.cache import default_cache
from logo.cli.choices import OnBad
from logo.cli.options import Json, argument, usual
from logo.cli.output import out, print_json, verbatim
from logo.cli.pool.common import AllowPickle, OnBadAdapter, opened, steps, tell_refused
from logo.errors import DataError, UsageError, listed

_AT_ONCE = 8  # datasets that are read at the same time

Store = Callable[[Mapping[str, Sequence[str]]], None]


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
        "the first of messages, conversations, prompt, context, instruction, inputs, input, question, text",
        metavar="NAME",
    ),
    split: str = usual("train", "The split of the dataset.", metavar="NAME"),
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
    pool, store = _opened(place, allow_pickle, on_bad_adapter)
    if from_datasets:
        _from_datasets(pool if name is None else [pool[name]], store, column, split, json)
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
        store({name: kept})
    if json:
        print_json({name: list(kept)})
        return
    if file is not None:
        more = f" (the first of {len(prompts)})" if len(prompts) > len(kept) else ""
        out.print(f"{name}: {len(kept)} examples{more}", markup=False, highlight=False)
        return
    for prompt in kept:
        verbatim(prompt)


def _opened(text: str, allow_pickle: bool, on_bad: OnBad) -> tuple[AdapterPool, Store]:
    """The pool at a place, and what stores examples of its adapters."""
    places = parse_places(text)
    [only, *more] = places
    if more or not only.plain or only.kind not in ("folder", "manifest"):
        raise UsageError(
            f"{text}: expected one folder or one manifest, in which the examples are stored; make a manifest of it: "
            f"`logo pool lock {text} --out pool.yaml`"
        )
    if only.kind == "folder":
        pool = opened(Path(only.source), allow_pickle, on_bad)

        def store(found: Mapping[str, Sequence[str]]) -> None:
            for name, prompts in found.items():
                write_examples(pool[name].folder, prompts)

        return pool, store
    pool = _of_manifest(only, allow_pickle, on_bad)
    return pool, lambda found: give_examples(Path(only.source), found)


def _of_manifest(place: Place, allow_pickle: bool, on_bad: OnBad) -> AdapterPool:
    found = gather([place], Fetching(allow_pickle=allow_pickle), skip=on_bad == "skip", cache=default_cache())
    pool = AdapterPool.from_survey(place.source, found.adapters, found.refused, on_bad_adapter=on_bad)
    tell_refused(pool.refused)
    return pool


def _from_datasets(
    adapters: Sequence[Adapter] | AdapterPool, store: Store, column: str | None, split: str, json: bool
) -> None:
    wanted = {adapter.name: datasets_of(adapter.folder) for adapter in adapters if not adapter.examples}
    found, left = _read({name: repos for name, repos in wanted.items() if repos}, column, split, store)
    left |= {name: "its model card names no dataset on the Hub" for name, repos in wanted.items() if not repos}
    if json:
        print_json({"examples": found, "left": left})
    else:
        for name, prompts in found.items():
            out.print(f"{len(prompts):4} {name}, from {listed(wanted[name])}", markup=False, highlight=False)
        for name, why in left.items():
            out.print(f"none {name}: {why}", markup=False, highlight=False)
        kept = sum(1 for _ in adapters) - len(wanted)
        out.print(f"examples for {len(found)} adapters; {kept} have some already; none for {len(left)}")
    if left and not found:
        raise DataError(f"no examples for {listed(list(left))}")


def _read(
    wanted: Mapping[str, Sequence[str]], column: str | None, split: str, store: Store
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Reads the datasets, and stores the prompts; also those that were read before an error or Ctrl-C.

    Returns:
        The prompts of each adapter, and why others have none.
    """
    found: dict[str, list[str]] = {}
    left: dict[str, str] = {}
    with ThreadPoolExecutor(_AT_ONCE) as pool, steps("datasets", len(wanted)) as step:
        jobs = {pool.submit(dataset_prompts, repos, column=column, split=split): name for name, repos in wanted.items()}
        try:
            for job in as_completed(jobs):
                try:
                    found[jobs[job]] = job.result()
                except DataError as error:
                    left[jobs[job]] = str(error)
                step()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            store(found)
    order = [*wanted]
    return {name: found[name] for name in order if name in found}, left
