"""Result folders: written whole, continued where a run was interrupted, and read as one table.

    {result_dir}/{base}_selection_{signal}_n_{k}_seed_{seed}/{dataset}/
        eval_results, predictions, selected_loras, weights, metric_dict, time_dict (.json)   as the official script
        run.json      what the answers depend on, every option, scores with intervals, versions
        rows.jsonl    a line per row: index, prompt, completion, references, target (the adapter that it names),
                      cut (tokens of the prompt that did not fit), prediction, value, error, selected, weights, scores,
                      confidence, form, seconds

An unfinished result is a hidden folder beside its place with `run.json` and the lines so far, in any order.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from typing import TYPE_CHECKING, Any

from logo.errors import DataError, StorageError, UsageError
from logo.evaluation.datasets import chosen_metrics
from logo.evaluation.metrics import OFFICIAL_KINDS, Kind, by_measure, judge, measures, metric_kind, scale_of
from logo.files import new_folder, replace_file, walked

if TYPE_CHECKING:
    import pandas

OFFICIAL = ("eval_results", "predictions", "selected_loras", "weights", "metric_dict", "time_dict")
RUN = "run.json"
ROWS = "rows.jsonl"
FILES = (*(f"{name}.json" for name in OFFICIAL), RUN, ROWS)
MARK = "eval_results.json"  # a folder with this file is the result of one dataset

_FOLDER = re.compile(
    r"(?P<base>.+)_(?:selection|method)_(?P<method>[A-Za-z0-9_-]+?)_n_(?P<k>\d+)_seed_(?P<seed>\d+)(?:_(?P<name>.+))?"
)
_NAME = re.compile(r"[^\W_]([\w.+=-]{0,62}[^\W_])?")


def run_folder(
    result_dir: str | Path, base_model: str, strategy: str, k: int, seed: int, method: str = "logo", name: str = ""
) -> Path:
    """The folder of a run: `{base}_selection_{strategy}_n_{k}_seed_{seed}`, base being the last part of the model's
    name, or `{base}_method_{method}_...`; a run's own name follows after `_`.

    Raises:
        UsageError: the run's name cannot be part of a folder's name.
    """
    if name and not _NAME.fullmatch(name):
        allowed = "letters, digits and any of . _ - + = , beginning and ending with a letter or a digit"
        raise UsageError(f"--run-name {name!r}: expected up to 64 {allowed}")
    base = PurePath(base_model).name
    if base in ("", ".."):  # '.', '..', 'models/..': the folder's own name says more
        base = Path(base_model).resolve().name or "model"
    chosen = f"selection_{strategy}" if method == "logo" else f"method_{method}"
    return Path(result_dir) / f"{base}_{chosen}_n_{k}_seed_{seed}{f'_{name}' if name else ''}"


# -- writing -----------------------------------------------------------------------------------------------------------


class Partial:
    """The unfinished result of one dataset; held by one process at a time.

    Args:
        folder: where the result will be.
        identity: all that it depends on, as JSON.
        fresh: forget what an earlier process has done.
        stands: whether the result is there already, which is asked when no other process can write it any more.

    Attributes:
        records: of rows, by index, as far as they are done.
        done: whether the result `stands`; then nothing is written.

    Raises:
        UsageError: what is there was left by another run, or another process works on it; or as `stands`.
        StorageError: it cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, Any],
        *,
        fresh: bool = False,
        stands: Callable[[], bool] | None = None,
    ) -> None:
        self.folder = folder
        self._home = partial_of(folder)
        try:
            self._home.mkdir(parents=True, exist_ok=True)
            # Unbuffered, so that closing does not try again what could not be written.
            self._file = open(self._home / ROWS, "a+b", buffering=0)  # noqa: SIM115 - closed by `close`
        except OSError as error:
            raise _unusable(self._home, error) from error
        try:
            _lock(self._file.fileno(), self._home)
            try:
                self.done = stands is not None and stands()
                self.records: dict[int, dict[str, Any]] = {} if self.done else self._resumed(identity, fresh)
            finally:
                if not (self._home / RUN).exists():  # nothing has begun
                    shutil.rmtree(self._home, ignore_errors=True)
        except BaseException:
            self._file.close()
            raise

    def _resumed(self, identity: Mapping[str, Any], fresh: bool) -> dict[int, dict[str, Any]]:
        """The records that are there, none if it begins."""
        self._file.seek(0)
        *lines, _ = self._file.readall().split(b"\n")  # the last one was cut off, or is empty
        if fresh or not lines:
            lines = []
            self._file.truncate(0)  # first: an older run's rows must never stand beside this identity
            replace_file(self._home / RUN, json.dumps({"identity": identity}, indent=2).encode())
        else:
            check_begun(self.folder, identity)
        self._file.truncate(sum(len(line) + 1 for line in lines))
        return {record["index"]: record for record in map(json.loads, lines)}

    def add(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Writes records, and returns when they are on the disk.

        Raises:
            StorageError: they cannot be written.
        """
        try:
            unwritten = memoryview(b"".join(json.dumps(record).encode() + b"\n" for record in records))
            while unwritten:
                unwritten = unwritten[self._file.write(unwritten) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise _unusable(self._home, error) from error
        self.records |= {record["index"]: dict(record) for record in records}

    def finish(self, contents: Mapping[str, object]) -> None:
        """Writes the result, all or nothing, in the place of an earlier one; files of other names are kept there.

        Raises:
            StorageError: the folder cannot be written or the disk is full; nothing has changed then.
        """
        with new_folder(self.folder, replaced=FILES) as new:
            for name, content in contents.items():
                (new / name).write_text(json.dumps(content, indent=2 if name == RUN else None), encoding="utf-8")
            lines = (json.dumps(self.records[index]) for index in sorted(self.records))
            (new / ROWS).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        shutil.rmtree(self._home, ignore_errors=True)  # while this process still holds it

    def close(self) -> None:
        """Releases the folder for other processes."""
        self._file.close()


def partial_of(folder: Path) -> Path:
    """The folder of an unfinished result."""
    return folder.with_name(f".{folder.name}.partial")


def check_begun(folder: Path, identity: Mapping[str, Any]) -> None:
    """Raises UsageError if rows of an unfinished result are there that another run has left."""
    home = partial_of(folder)
    begun = (home / RUN).exists() and (home / ROWS).exists() and b"\n" in (home / ROWS).read_bytes()
    different = differences(identity, read_run(home)["identity"]) if begun else []
    if different:
        raise UsageError(
            f"{home} was left by an unfinished run with other settings, pool, rows or versions "
            f"({described(different)}); repeat that run to finish it, or begin again with --overwrite"
        )


def is_done(
    folder: Path, identity: Mapping[str, Any], partial: Mapping[str, Any], files: Sequence[str] = FILES
) -> bool:
    """Whether the result of this run is there already.

    Args:
        partial: its identity while it is unfinished, which has the environment, too.
        files: that a result of its kind has; any of `FILES` says that there is a result.

    Raises:
        UsageError: the result of another run is there, or something that cannot be read.
        StorageError: it cannot be read.
    """
    home = partial_of(folder)
    if (home / RUN).exists() and not differences(partial, read_run(home)["identity"]):
        return False  # begun, perhaps to replace what is there
    if not any((folder / name).exists() for name in FILES):
        return False
    if not (folder / RUN).exists():
        raise UsageError(
            f"{folder} holds a result without a {RUN} that says which run it is of; --overwrite replaces it"
        )
    different = differences(identity, read_run(folder)["identity"])
    if different:
        hints = [f"{folder} holds the result of another run: {described(different)}"]
        if {name for name, *_ in different} <= {"metric", "metric_plugin"}:
            judging = f"logo eval report {folder} --metric {identity.get('metric')} --save report.html"
            hints.append(f"`{judging}` judges its answers anew")
        option = "--result-dir" if files is FILES else "--save"
        hints.append(f"--overwrite replaces it, another {option} keeps both")
        raise UsageError("; ".join(hints))
    return all((folder / name).exists() for name in files)


def official_files(
    records: Sequence[Mapping[str, Any]], strategy: str, loading: float, columns: Sequence[str]
) -> dict[str, object]:
    """The content of the six files that the official script writes.

    Args:
        records: of all rows, in order.
        strategy: the signal's name, the one key of `metric_dict.json`.
        loading: wall seconds of loading model and pool.
        columns: names of the adapters that any row scored, in pool order: the columns of `metric_dict.json`.
    """
    seconds: dict[str, float] = {}
    for record in records:
        for stage, duration in record["seconds"].items():
            seconds[stage] = seconds.get(stage, 0.0) + duration
    return {
        "eval_results.json": [record["value"] for record in records],
        "predictions.json": [record["prediction"] for record in records],
        "selected_loras.json": [record["selected"] for record in records],
        "weights.json": [record["weights"] for record in records],
        "metric_dict.json": {strategy: [[record["scores"].get(name) for name in columns] for record in records]},
        "time_dict.json": {"loading": loading, **seconds},
    }


# -- reading -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredResult:
    """The result of one dataset, as its folder has it.

    Attributes:
        folder: of the result; `run_folder`: of the run that it is of.
        about: its `run.json`; empty if there is none, as of the official script's.
    """

    folder: Path
    run_folder: Path
    about: Mapping[str, Any]

    @classmethod
    def of(cls, folder: Path) -> StoredResult:
        """The result in a folder."""
        full = folder.resolve()
        about = read_run(folder) if (folder / RUN).exists() else {}
        dataset = PurePosixPath(about.get("dataset", {}).get("name") or full.name).parts
        # A dataset with a nested name has as many folders, unless its result was moved.
        depth = len(dataset) if full.parts[-len(dataset) :] == dataset else 1
        named = (above for above in full.parents if _FOLDER.fullmatch(above.name))
        return cls(folder, next(named, full.parents[depth - 1]), about)

    @property
    def dataset(self) -> str:
        """The dataset's name."""
        name: str | None = self.about.get("dataset", {}).get("name")
        return name or self.folder.resolve().relative_to(self.run_folder).as_posix()

    @property
    def metric(self) -> Kind:
        """The metric of the stored values."""
        metric: Kind | None = self.about.get("metric")
        by_name = metric_kind(self.dataset)
        return metric or OFFICIAL_KINDS.get(by_name, by_name)

    def columns(self, run: str) -> dict[str, Any]:
        """What is the same for all of its rows, of a run that is called so."""
        matched = _FOLDER.fullmatch(self.run_folder.name)
        parts: Mapping[str, Any] = matched.groupdict() if matched else {}
        identity = self.about.get("identity", {})
        settings = identity.get("settings", {})
        method = identity.get("method", {}).get("method") or parts.get("method")
        return {
            "run": run,
            "base": identity.get("base_model") or parts.get("base"),
            "method": settings.get("signal") or method if method == "logo" else method,
            "k": int(parts["k"]) if parts else settings.get("k"),
            "seed": int(parts["seed"]) if parts else identity.get("seed"),
            "dataset": self.dataset,
        }


def read(paths: str | Path | Sequence[str | Path], metrics: Mapping[str, Kind] | None = None) -> pandas.DataFrame:
    """All results at or below some folders as one table, a line per row of a dataset.

    Its columns are those of `rows.jsonl`; `run`, `base`, `method`, `k` and `seed`, from `run.json` and the folder's
    name; `dataset`, `metric` and its `scale`; and `score`, the primary measure of `value` (ROUGE-L of three). What the
    official script has written has no prompts, gold texts and confidences. `attrs["runs"]` has the `run.json` by run
    and dataset.

    Args:
        metrics: judge the stored answers anew, by dataset (`datasets.chosen_metrics`); the values of other datasets are
            those that the run has written.

    Raises:
        UsageError: there is no result, or a metric for a dataset that is not there.
        DataError, StorageError: a file is not what a run writes, or cannot be read, or a run has a dataset twice.
    """
    import pandas

    roots = [paths] if isinstance(paths, str | Path) else paths
    folders = dict.fromkeys(folder.resolve() for root in roots for folder in find(Path(root)))
    results = [StoredResult.of(folder) for folder in folders]
    names = _names(result.run_folder for result in results)
    chosen = chosen_metrics(list(dict.fromkeys(result.dataset for result in results)), metrics or {})
    rows: list[dict[str, Any]] = []
    runs: dict[str, dict[str, Any]] = {}
    places: dict[tuple[str, str], Path] = {}
    for result in results:
        run = names[result.run_folder]
        first_place = places.setdefault((run, result.dataset), result.folder)
        if first_place != result.folder:
            both = f"{first_place} and {result.folder} both hold {result.dataset!r} of one run"
            raise DataError(f"{both}; move one elsewhere")
        runs.setdefault(run, {})[result.dataset] = result.about
        rows += _table_lines(result, run, chosen.get(result.dataset))
    table = pandas.DataFrame(rows)
    table.attrs["runs"] = runs
    return table


def _table_lines(result: StoredResult, run: str, chosen: Kind | None) -> Iterator[dict[str, Any]]:
    """The rows of a result as lines of a table, judged anew if a metric is chosen. The values of a result without gold
    texts, as the official script's, stand for its own metric."""
    metric = chosen or result.metric
    scale = None if chosen else result.about.get("scale")
    columns = {**result.columns(run), "metric": metric, "scale": scale or scale_of(metric)}
    for line in lines(result.folder):
        if chosen and "completion" in line:
            line["value"] = judge(metric, line["prediction"], line["completion"], failed=bool(line.get("error")))
        elif metric != result.metric:
            raise DataError(f"{result.folder}: expected {ROWS} with gold texts to judge by, found none")
        primary = by_measure(metric, [line["value"]])[measures(metric)[-1]]
        if not primary:
            raise DataError(f"{result.folder}: expected values of the metric {metric}, found {line['value']!r:.60}")
        yield {**columns, **line, "score": primary[0]}


def find(path: Path) -> list[Path]:
    """The folders with results at or below a folder, by name; hidden ones are another process's work in progress.

    Raises:
        UsageError: there is none.
    """
    marked = sorted(file.parent for file in walked(path) if file.name == MARK)
    shown = [folder for folder in marked if not any(part.startswith(".") for part in folder.relative_to(path).parts)]
    if not shown:
        what = "none" if path.is_dir() else "a file" if path.exists() else "no such folder"
        raise UsageError(f"results {str(path)!r}: expected a folder with {MARK} in it or below, found {what}")
    return shown


def _names(folders: Iterable[Path]) -> dict[Path, str]:
    """The names of runs' folders, with as many folders above as tell them from others that are called the same."""
    distinct = list(dict.fromkeys(folders))
    names = {}
    for folder in distinct:
        namesakes = [path for path in distinct if path.name == folder.name]
        depth = 1
        while len({path.parts[-depth:] for path in namesakes}) < len(namesakes):
            depth += 1
        names[folder] = "/".join(folder.parts[-depth:])
    return names


def lines(folder: Path) -> Iterator[dict[str, Any]]:
    """The lines of `rows.jsonl`, or as much as the official files say of rows."""
    if (folder / ROWS).exists():
        for number, line in enumerate(_text(folder / ROWS).splitlines(), start=1):
            try:
                yield json.loads(line)
            except ValueError as error:
                raise DataError(f"{folder / ROWS}:{number}: expected a JSON object, found {error}") from error
        return
    files = {name: _json(folder / f"{name}.json") for name in OFFICIAL}
    about = read_run(folder) if (folder / RUN).exists() else {}
    try:
        [scores] = files["metric_dict"].values()
        columns = about.get("score_columns") or [str(place) for place in range(len(scores[0]) if scores else 0)]
        rows = zip(*(files[name] for name in OFFICIAL[:4]), scores, strict=True)
        for index, (value, prediction, selected, weights, scores_of_row) in enumerate(rows):
            yield {
                "index": index,
                "value": value,
                "prediction": prediction,
                "selected": selected,
                "weights": weights,
                "scores": dict(zip(columns, scores_of_row, strict=True)),
                "error": None,
            }
    except (AttributeError, TypeError, ValueError) as error:
        raise DataError(
            f"{folder}: expected the files of the official script, of equally many rows: {error}"
        ) from error


def read_run(folder: Path) -> dict[str, Any]:
    """The `run.json` of a result; UsageError if it is none."""
    about = _json(folder / RUN)
    if not isinstance(about, dict) or not isinstance(about.get("identity"), dict):
        raise UsageError(f"{folder / RUN}: expected what a run writes, found something else; --overwrite replaces it")
    return about


def _json(file: Path) -> Any:
    try:
        return json.loads(_text(file))
    except ValueError as error:
        raise DataError(f"{file}: expected JSON, found {error}") from error


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{file}: expected the file, found none; answer the dataset again with --overwrite") from None
    except OSError as error:
        raise StorageError(f"{file}: cannot be read ({error.strerror or error})") from error


def _unusable(folder: Path, error: OSError) -> StorageError:
    return StorageError(f"result folder {str(folder)!r}: cannot be written ({error.strerror or error})")


def _lock(descriptor: int, home: Path) -> None:
    """Keeps two processes from answering every row twice; closing the file releases the lock."""
    if sys.platform == "win32":
        return
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(f"{home}: another process works on this run; wait for it or end it") from None
    except OSError:
        return  # some network drives have no locks


# -- differences of two runs, in words ---------------------------------------------------------------------------------

Difference = tuple[str, object, object]  # name, value on the one side and on the other


def differences(ours: Mapping[str, object], theirs: Mapping[str, object]) -> list[Difference]:
    """The entries that differ, by dotted name; None stands for a missing one. If the number of rows differs, their
    digest is left out."""
    different = [entry for entry in _entries("", ours, theirs) if entry[1] != entry[2]]
    names = {name for name, _, _ in different}
    digests_of_others = {f"{name}_sha256" for name in names}
    return [entry for entry in different if entry[0] not in digests_of_others]


def described(different: Sequence[Difference], most: int = 5) -> str:
    """The differences in a few words, from the other side: `settings.k is 5, not 2`."""
    words = []
    for name, ours, theirs in different[:most]:
        instead = " instead of" if ours is None else ", not"
        words.append(f"{name} is {_short(theirs)}{instead} {_short(ours)}")
    if len(different) > most:
        words.append(f"and {len(different) - most} more")
    return "; ".join(words)


def _entries(prefix: str, ours: Mapping[str, object], theirs: Mapping[str, object]) -> Iterator[Difference]:
    """Every entry of two mappings and of the mappings in them, by dotted name."""
    for key in dict.fromkeys((*ours, *theirs)):
        our_value = ours.get(key)
        their_value = theirs.get(key)
        if isinstance(our_value, Mapping) and isinstance(their_value, Mapping):
            yield from _entries(f"{prefix}{key}.", our_value, their_value)
        else:
            yield f"{prefix}{key}", our_value, their_value


def _short(value: object, longest: int = 20) -> str:
    text = "not given" if value is None else json.dumps(value)
    return text if len(text) <= longest else f"{text[:longest]}..."
