"""`logo pool examples`: example prompts of the adapters of a pool."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from logo.adapters.examples import MOST, examples_of, is_learned, read_examples, write_examples
from logo.adapters.format import Adapter
from logo.adapters.gathering import gather
from logo.adapters.manifest import check_named, give_examples, read_manifest
from logo.adapters.options import Fetching
from logo.adapters.places import parse_places
from logo.adapters.pool import AdapterPool
from logo.adapters.upkeep.dataset_prompts import Part, datasets_of, on_hub, read_each, shared
from logo.cache import default_cache
from logo.cli.choices import OnBad
from logo.cli.options import Json, argument, usual
from logo.cli.output import out, print_json, verbatim
from logo.cli.pool.common import AllowPickle, OnBadAdapter, opened, steps, tell_refused
from logo.errors import DataError, UsageError, listed
from logo.evaluation.tables import counted

_TOGETHER = 32  # adapters whose examples are written at the same time


@dataclass(frozen=True)
class _Home:
    """A pool, and where the examples of its adapters are stored: beside each, or in the manifest."""

    pool: AdapterPool
    manifest: Path | None = None

    def check(self, names: Collection[str]) -> None:
        """Raises UsageError if the manifest has no place for examples of these adapters."""
        if self.manifest is not None:
            check_named(self.manifest, read_manifest(self.manifest), names)

    def store(self, examples: Mapping[str, Sequence[str]], *, keep: bool = False) -> list[str]:
        """Stores examples by adapter, and returns the adapters that got theirs.

        Args:
            keep: leave adapters alone that have examples by now.
        """
        if self.manifest is not None:
            return give_examples(self.manifest, examples, keep=keep)
        given = [name for name in examples if not (keep and examples_of(self.pool[name].folder))]
        for name in given:
            write_examples(self.pool[name].folder, examples[name])
        return given


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
        "Give each adapter without examples 8 prompts of the dataset that its model card names (`datasets:`). The "
        "dataset is read from the Hub. With NAME: only this adapter.",
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
    """Print or store example prompts of adapters. A prompt that is like an adapter's examples selects the adapter.

    Examples have no answers. They are stored beside the adapter, or in the manifest.

    Example: `logo pool examples adapters/ antonyms prompts.jsonl`
    """
    if from_datasets and file is not None:
        raise UsageError("--from-datasets takes the prompts from datasets: leave FILE out")
    if not from_datasets and (column, split, subset) != (None, "train", None):
        raise UsageError("--column, --split and --subset are for --from-datasets: add it, or leave them out")
    home = _opened(place, allow_pickle, on_bad_adapter)
    pool = home.pool
    if from_datasets:
        adapters = list(pool) if name is None else [pool[name]]
        _from_datasets(adapters, home, Part(column, split, subset), json)
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
        home.store({name: kept})
    if json:
        print_json({name: list(kept)})
        return
    if file is not None:
        more = f" (the first of {len(prompts)})" if len(prompts) > len(kept) else ""
        out.print(f"{name}: {len(kept)} examples{more}", markup=False, highlight=False)
        return
    for prompt in kept:
        verbatim(prompt)


def _opened(text: str, allow_pickle: bool, on_bad: OnBad) -> _Home:
    places = parse_places(text)
    [only, *more] = places
    if more or not only.plain or only.kind not in ("folder", "manifest"):
        missing = "" if more or only.kind != "repo" else " (there is no such folder here)"
        raise UsageError(
            f"{text}: expected one folder or one manifest, in which the examples are stored{missing}; for a pool on "
            f"the Hub, make a manifest first: `logo pool lock {text} --out pool.yaml`"
        )
    if only.kind == "folder":
        return _Home(opened(Path(only.source), allow_pickle, on_bad))
    found = gather([only], Fetching(allow_pickle=allow_pickle), skip=on_bad == "skip", cache=default_cache())
    pool = AdapterPool.from_survey(only.source, found.adapters, found.refused, on_bad_adapter=on_bad)
    tell_refused(pool.refused)
    return _Home(pool, Path(only.source))


def _from_datasets(adapters: Sequence[Adapter], home: _Home, part: Part, json: bool) -> None:
    """Gives those of the adapters that have no examples some of the datasets that their model cards name."""
    named = {adapter.name: datasets_of(adapter.folder) for adapter in adapters if not adapter.examples}
    home.check(named)  # before anything is read
    found, left = _read({name: repos for name, names in named.items() if (repos := on_hub(names))}, home, part)
    for name, names in named.items():
        if not names:
            left[name] = "its model card names no dataset"
        elif not on_hub(names):
            left[name] = f"its model card names {listed(names)}, expected a dataset on the Hub, org/name"
    if json:
        print_json({"examples": found, "left": left})
    else:
        for name, prompts in found.items():
            out.print(f"{len(prompts):4} {name}, from {listed(on_hub(named[name]))}", markup=False, highlight=False)
        for name, why in left.items():
            out.print(f"none {name}: {why}", markup=False, highlight=False)
        had = len(adapters) - len(named)
        out.print(f"examples for {counted(len(found), 'adapter')}; {had} had some already; none for {len(left)}")
    if left and not found:
        raise DataError(
            f"no examples for {listed(list(left))}; give them prompts of your own: `logo pool examples PLACE NAME FILE`"
        )


def _read(wanted: Mapping[str, Sequence[str]], home: _Home, part: Part) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Reads the datasets of adapters, each once, and stores the prompts; also what was read before an error or Ctrl-C.

    Returns:
        The prompts of each adapter, and why others have none.
    """
    read: dict[str, list[str] | DataError] = {}
    ready: dict[str, list[str]] = {}  # not stored yet
    found: dict[str, list[str]] = {}
    left: dict[str, str] = {}

    def store() -> None:
        given = home.store(ready, keep=True)
        found.update({name: ready[name] for name in given})
        left.update({name: "it got examples meanwhile, which stay" for name in ready.keys() - given})
        ready.clear()

    repos = list(dict.fromkeys(repo for names in wanted.values() for repo in names))
    with steps("datasets", len(repos)) as step:
        try:
            for repo, result in read_each(repos, part):
                read[repo] = result
                step()
                for name, names in wanted.items():
                    if repo not in names or any(one not in read for one in names):
                        continue
                    prompts = [some for one in names if not isinstance(some := read[one], DataError)]
                    if prompts:
                        ready[name] = shared(prompts)
                    else:
                        left[name] = "; ".join(str(read[one]) for one in names)
                if len(ready) >= _TOGETHER:
                    store()
        finally:
            store()
    return {name: found[name] for name in wanted if name in found}, left
