"""Finding results: every finished dataset at or below a folder, its run, and its name.

All commands that read results use this module, so that a folder means the same everywhere, whether it is that of one
dataset, of a run, or one with several runs. A dataset's name may have slashes (`words/antonym`); its folder is then
deeper below the run's. The name is in `run.json`. The official script writes no such file: its datasets are named by
the path below a folder with that script's form of names, or else by the folder's own name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from logo.errors import DataError, StorageError, UsageError
from logo.evaluation.datasets import OFFICIAL
from logo.evaluation.metrics import Kind
from logo.evaluation.stored import MARK, RUN, Result, judged_by, read_object, read_result

_NAME = re.compile(
    r"(?P<base>.+?)_(?:selection|method)_(?P<method>.+?)_n_(?P<k>\d+)_seed_(?P<seed>\d+)(?:_(?P<name>.+))?"
)


@dataclass(frozen=True)
class Place:
    """One dataset's result on the disk.

    Attributes:
        folder: the folder of its files.
        run_folder: the folder of its run.
        dataset: its name.
        run: `run.json`, or empty.
    """

    folder: Path
    run_folder: Path
    dataset: str
    run: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One run folder. `results` by dataset, official names first.

    `base`, `method`, `k` and `seed` are None where neither `run.json` nor the folder's name says. The `method` of a run
    that selects by a signal is that signal; `name` is what the user called the run, if anything.
    """

    folder: Path
    results: Mapping[str, Result]
    base: str | None = None
    method: str | None = None
    k: int | None = None
    seed: int | None = None
    name: str | None = None

    @property
    def options(self) -> Mapping[str, Any]:
        """The first dataset's options."""
        return next(iter(self.results.values())).options

    @property
    def by_plugin(self) -> bool:
        """Whether a plugin's method selected, as far as `run.json` says."""
        identity = next(iter(self.results.values())).run.get("identity")
        method = identity.get("method") if isinstance(identity, dict) else None
        return isinstance(method, dict) and "plugin" in method


def place_of(folder: Path) -> Place:
    """The name and the run of the result in a folder.

    Raises:
        DataError: an invalid `run.json`.
        StorageError: it cannot be read.
    """
    run = read_object(folder / RUN, missing={})
    data = run.get("dataset")
    named = data.get("name") if isinstance(data, dict) else None
    full = Path(os.path.abspath(folder))
    # Paths stay as the user wrote them, unless they lack the parts that are needed.
    above = folder.parents if ".." not in folder.parts else full.parents
    if isinstance(named, str) and named:
        own = named.split("/")
        # If the path does not end with the dataset's name, the result was moved or renamed.
        depth = len(own) if own == list(full.parts[-len(own) :]) else 1
    else:
        found = (number for number, parent in enumerate(full.parents, start=1) if _NAME.fullmatch(parent.name))
        depth = next(found, 1)
        named = "/".join(full.parts[-depth:])
    return Place(folder, (above if len(above) >= depth else full.parents)[depth - 1], named, run)


def find_results(path: Path) -> list[Place]:
    """The results at or below a folder, by path; none if there are none. Hidden folders below it are another process's
    work in progress and left out.

    Raises:
        DataError, StorageError: as `place_of`.
    """
    return [place_of(folder) for folder in _marked(path, set())]


def read_runs(paths: Iterable[Path], data_dir: Path | None = None, metric: Kind | None = None) -> list[Run]:
    """Every run in the folders, in the order they were named, then by path.

    Args:
        paths: run folders, folders that hold several, or folders of single datasets.
        data_dir: where prompts are looked for when a result lacks them and `run.json`'s path leads nowhere.
        metric: by which the stored answers are judged; None: the values are those that the run has written.

    Raises:
        UsageError: a folder without results in it, or no folder.
        DataError: a file that is missing or not what the official script writes (names the file), or two results of
            the same dataset in one run.
        StorageError: a file that cannot be read.
    """
    runs: dict[Path, dict[str, Place]] = {}  # by the resolved folder of the run
    for path in paths:
        found = find_results(path)
        if not found:
            raise UsageError(
                f"results {str(path)!r}: expected a folder with {MARK} in it or below, as `logo eval run` writes, "
                f"found {_kind(path)}"
            )
        for place in found:
            places = runs.setdefault(place.run_folder.resolve(), {})
            other = places.setdefault(place.dataset, place).folder
            if other.resolve() != place.folder.resolve():
                raise DataError(
                    f"dataset {place.dataset!r}: expected one result in the run {str(place.run_folder)!r}, found two, "
                    f"{str(other)!r} and {str(place.folder)!r}; move one of them elsewhere"
                )
    if not runs:
        raise UsageError("no result folder: expected at least one, such as results/")
    return [_run(list(places.values()), data_dir, metric) for places in runs.values()]


def read_run(path: Path, data_dir: Path | None = None) -> Run:
    """The one run in a folder, with the datasets at or below it.

    Raises:
        UsageError: there are several runs.
        UsageError, DataError, StorageError: as `read_runs`.
    """
    runs = read_runs([path], data_dir)
    if len(runs) > 1:
        names = ", ".join(run.folder.name for run in runs[:3]) + (", ..." if len(runs) > 3 else "")
        raise UsageError(f"run {str(path)!r}: expected the results of one run, found {len(runs)}: {names}; name one")
    return runs[0]


def _run(places: list[Place], data_dir: Path | None, metric: Kind | None) -> Run:
    order = {name: number for number, name in enumerate(OFFICIAL)}
    places = sorted(places, key=lambda place: (order.get(place.dataset, len(order)), place.dataset))
    results = {place.dataset: read_result(place.folder, place.dataset, data_dir) for place in places}
    if metric is not None:
        results = {name: judged_by(result, metric) for name, result in results.items()}
    options = next(iter(results.values())).options
    folder = places[0].run_folder
    name = _NAME.fullmatch(folder.resolve().name)
    parts: dict[str, Any] = name.groupdict() if name else {}
    method = options.get("method") or "logo"
    if method == "logo":
        method = options.get("signal") or options.get("selection_strategy") or parts.get("method")
    base = options.get("base_model") or parts.get("base")
    return Run(
        folder=folder,
        results=results,
        base=None if base is None else Path(str(base)).name or str(base),
        method=None if method is None else str(method),
        # The folder's name first: a method may use another number of adapters than was asked for.
        k=_whole(parts.get("k"), options.get("k"), options.get("n_selected_modules")),
        seed=_whole(parts.get("seed"), options.get("seed")),
        name=parts.get("name"),
    )


def _marked(folder: Path, seen: set[Path]) -> Iterator[Path]:
    """Folders with results at or below this one, each once, even if links lead to it. A dataset's folder may hold those
    of others: `a` and `a/b` are two names."""
    try:
        real = folder.resolve()
        if real in seen or not folder.is_dir():
            return
        seen.add(real)
        if (folder / MARK).is_file():
            yield folder
        below = [child for child in folder.iterdir() if not child.name.startswith(".") and child.is_dir()]
        below.sort(key=lambda child: (child.is_symlink(), child.name))  # links last: their targets come first
    except OSError as error:
        raise StorageError(f"results {str(folder)!r}: cannot be read ({error.strerror or error})") from error
    for child in below:
        yield from _marked(child, seen)


def _kind(path: Path) -> str:
    return "none" if path.is_dir() else "a file" if path.exists() else "no such folder"


def _whole(*candidates: object) -> int | None:
    for candidate in candidates:
        if candidate is not None and str(candidate).lstrip("-").isdigit():
            return int(str(candidate))
    return None
