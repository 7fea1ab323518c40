"""What the `logo pool` commands share: options, opening a pool, progress."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from logo.adapters.format import Adapter, own_name
from logo.adapters.gathering import gather
from logo.adapters.layout import BaseLayout
from logo.adapters.options import Fetching
from logo.adapters.places import parse_places
from logo.adapters.pool import AdapterPool
from logo.adapters.survey import survey
from logo.cache import default_cache
from logo.cli.choices import OnBad
from logo.cli.options import option
from logo.cli.output import err, note, progress
from logo.errors import AdapterError
from logo.models import load_skeleton

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of adapters, at any depth.")]
Out = Annotated[
    Path, option("The new pool; must not exist yet. DIR is never changed.", True, "--out", "-o", metavar="DIR2")
]
AllowPickle = Annotated[bool, option("Also read adapter_model.bin (tensors only).")]
OnBadAdapter = Annotated[OnBad, option("If an adapter cannot be used: refuse the pool, or skip the adapter.")]
Threshold = Annotated[
    float,
    option(
        "Two adapters are near-duplicates if the overlap of their column spaces, the cosine of their updates "
        "and the smaller norm's share of the larger one all reach it.",
        min=0.0,
        max=1.0,
    ),
]


def opened(
    folder: Path, allow_pickle: bool, on_bad: OnBad, check: Callable[[Adapter], object] | None = None
) -> AdapterPool:
    """The pool in a folder; adapters that are left out are printed. The cache is neither read nor written.

    Args:
        check: raises AdapterError for an adapter that the command cannot work on, which is then a bad one.
    """
    # To leave damaged adapters out, they have to be found first. Otherwise files are checked as they are read.
    verify = on_bad == "skip"
    pool = AdapterPool.from_directory(folder, on_bad_adapter=on_bad, allow_pickle=allow_pickle, verify=verify, cache="")
    if check is not None:
        pool = checked(pool, str(folder), on_bad, check)
    tell_refused(pool.refused)
    return pool


def checked(pool: AdapterPool, place: str, on_bad: OnBad, check: Callable[[Adapter], object]) -> AdapterPool:
    """The pool with the adapters that fail a check treated as bad ones: refused, or left out.

    Raises:
        PoolError: there is a bad one and `on_bad` is `"error"`, or nothing is left.
    """
    good, bad = divided(pool, check)
    return AdapterPool.from_survey(place, good, [*pool.refused, *bad], on_bad_adapter=on_bad)


def divided(
    adapters: Iterable[Adapter], check: Callable[[Adapter], object]
) -> tuple[list[Adapter], list[AdapterError]]:
    """The adapters that pass a check, and the errors of the others."""
    good, bad = list[Any](), list[AdapterError]()
    for adapter in adapters:
        try:
            check(adapter)
        except AdapterError as error:
            bad.append(error)
        else:
            good.append(adapter)
    return good, bad


def fitting(base_model: str, model_dir: str) -> Callable[[Adapter], object]:
    """A check that raises AdapterError for an adapter that does not fit the base model, whose weights are not read."""
    skeleton = load_skeleton(base_model, model_dir=model_dir)
    layout = BaseLayout.of(skeleton)
    return lambda adapter: adapter.fit(layout, skeleton)


def surveyed(place: str, allow_pickle: bool, verify: bool) -> tuple[list[Adapter], list[AdapterError]]:
    """The adapters of a place, and why others there cannot be used. For a plain folder the cache is not used."""
    [only, *more] = places = parse_places(place)
    if not more and only.kind == "folder" and only.plain:
        return survey(Path(only.source), allow_pickle=allow_pickle, verify=verify)
    found = gather(places, Fetching(allow_pickle=allow_pickle), skip=True, verify=verify, cache=default_cache())
    return list(found.adapters), found.refused


def without_checkpoints(folder: Path, on_bad: OnBad, *, verify: bool) -> tuple[AdapterPool, list[str]]:
    """The pool as it is published, and the names of the checkpoints that are left out; prints what is left out."""
    from logo.adapters.upkeep.publishing import stays_behind

    def is_left_out(name: str) -> bool:  # never the folder that the user named
        return stays_behind(name) and name != own_name(folder)

    good, refused = survey(folder, verify=verify)
    names = [adapter.name for adapter in good] + [error.name for error in refused]
    checkpoints = sorted(filter(is_left_out, names))
    kept = [adapter for adapter in good if not is_left_out(adapter.name)]
    bad = [error for error in refused if not is_left_out(error.name)]
    pool = AdapterPool.from_survey(folder, kept, bad, on_bad_adapter=on_bad)
    tell_refused(pool.refused)
    if checkpoints:
        note(f"left out: {len(checkpoints)} checkpoints, such as {checkpoints[0]}")
    return pool, checkpoints


def tell_refused(refused: Iterable[AdapterError]) -> None:
    """Prints the adapters that were left out, with reasons, to stderr."""
    for bad in refused:
        err.print(refusal(bad))


def refusal(bad: AdapterError) -> Text:
    """Which adapter is left out, and why, in a line."""
    return Text.assemble(("refused ", "red"), (bad.name, "bold"), f": {bad.reason}")


def refusals(refused: Iterable[AdapterError]) -> list[dict[str, Any]]:
    """Refused adapters and the reasons, for JSON."""
    return [{"name": bad.name, "reason": bad.reason} for bad in refused]


@contextmanager
def steps(what: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar of `total` steps on a terminal; yields a function that ends a step."""
    with progress(disable=not err.is_terminal) as shown:
        bar = shown.add_task(what, total=total)
        yield lambda: shown.advance(bar)


def targets(adapter: Adapter) -> list[str]:
    """The names of the modules it adapts, without their layers."""
    return sorted({path.rsplit(".", 1)[-1] for path in adapter.modules})
