"""Result folders: written whole, continued where a run was interrupted, and read as one table.

    {result_dir}/{base}_selection_{signal}_n_{k}_seed_{seed}/{dataset}/
        eval_results, predictions, selected_loras, weights, metric_dict, time_dict (.json)   as the official script
        run.json      what the answers depend on, every option, scores with intervals, versions
        rows.jsonl    a line per row: index, prompt, completion, references, target (the adapter that it names),
                      prediction, value, error, selected, weights, scores, confidence, form, seconds

An unfinished result is a hidden folder beside its place with `run.json` and the lines so far, in any order.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath, PurePosixPath
from typing import TYPE_CHECKING, Any

from logo.errors import DataError, StorageError, UsageError
from logo.evaluation.metrics import OFFICIAL_KINDS, by_measure, measures, metric_kind
from logo.files import new_folder, replace_file, walked

if TYPE_CHECKING:
    import pandas

OFFICIAL = ("eval_results", "predictions", "selected_loras", "weights", "metric_dict", "time_dict")
RUN, ROWS = "run.json", "rows.jsonl"
FILES = (*(f"{name}.json" for name in OFFICIAL), RUN, ROWS)
MARK = "eval_results.json"  # a folder with this file is the result of one dataset

_FOLDER = re.compile(
    r"(?P<base>.+)_(?:selection|method)_(?P<method>[A-Za-z0-9_-]+)_n_(?P<k>\d+)_seed_(?P<seed>\d+)(?:_(?P<name>.+))?"
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
        self.folder, self._home = folder, partial_of(folder)
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
        return {one["index"]: one for one in map(json.loads, lines)}

    def add(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Writes records, and returns when they are on the disk.

        Raises:
            StorageError: they cannot be written.
        """
        try:
            rest = memoryview(b"".join(json.dumps(one).encode() + b"\n" for one in records))
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise _unusable(self._home, error) from error
        self.records |= {one["index"]: dict(one) for one in records}

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
    if begun and (found := differences(identity, read_run(home)["identity"])):
        raise UsageError(
            f"{home} was left by an unfinished run with other settings, pool, rows or versions "
            f"({described(found)}); repeat that run to finish it, or begin again with --overwrite"
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
    found = differences(identity, read_run(folder)["identity"])
    if found:
        judged = {name for name, *_ in found} <= {"metric", "metric_plugin"}
        judging = f"logo eval report {folder} --metric {identity.get('metric')} --save report.html"
        again = f"; `{judging}` judges its answers anew" if judged else ""
        both = f"another {'--result-dir' if files is FILES else '--save'} keeps both"
        held = f"{folder} holds the result of another run: {described(found)}{again}"
        raise UsageError(f"{held}; --overwrite replaces it, {both}")
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
    for one in records:
        for stage, value in one["seconds"].items():
            seconds[stage] = seconds.get(stage, 0.0) + value
    contents = (
        [one["value"] for one in records],
        [one["prediction"] for one in records],
        [one["selected"] for one in records],
        [one["weights"] for one in records],
        {strategy: [[one["scores"].get(name) for name in columns] for one in records]},
        {"loading": loading, **seconds},
    )
    return {f"{name}.json": content for name, content in zip(OFFICIAL, contents, strict=True)}


# -- reading -----------------------------------------------------------------------------------------------------------


def read(paths: str | Path | Sequence[str | Path], metric: str | None = None) -> pandas.DataFrame:
    """All results at or below some folders as one table, a line per row of a dataset.

    Its columns are those of `rows.jsonl`; `run`, `base`, `method`, `k` and `seed`, from `run.json` and the folder's
    name; `dataset`, `metric`; and `score`, the primary measure of `value` (ROUGE-L of three). What the official script
    has written has no prompts, gold texts and confidences. `attrs["runs"]` has the `run.json` by run and dataset.

    Args:
        metric: judges the stored answers anew; None: the values are those that the run has written.

    Raises:
        UsageError: there is no result.
        DataError, StorageError: a file is not what a run writes, or cannot be read, or a run has a dataset twice.
    """
    import pandas

    from logo.evaluation.metrics import judge

    found: list[dict[str, Any]] = []
    runs: dict[str, dict[str, Any]] = {}
    places: dict[tuple[str, str], Path] = {}
    given = map(Path, [paths] if isinstance(paths, str | Path) else paths)
    folders = {folder: _run_of(folder) for path in given for folder in map(Path.resolve, find(path))}
    names = _names(folders.values())
    for folder, above in folders.items():
        run, about = _about(folder, above, names[above])
        kind = metric or about["metric"]
        if (other := places.setdefault((about["run"], about["dataset"]), folder)) != folder:
            raise DataError(f"{other} and {folder} both hold {about['dataset']!r} of one run; move one elsewhere")
        runs.setdefault(about["run"], {})[about["dataset"]] = run
        for line in lines(folder):
            if metric is not None:
                if "completion" not in line:
                    raise DataError(f"{folder}: expected {ROWS} with gold texts to judge by, found none")
                line["value"] = judge(kind, line["prediction"], line["completion"], failed=bool(line.get("error")))
            primary = by_measure(kind, [line["value"]])[measures(kind)[-1]]
            if not primary:
                raise DataError(f"{folder}: expected values of the metric {kind}, found {line['value']!r:.60}")
            found.append({**about, "metric": kind, **line, "score": primary[0]})
    table = pandas.DataFrame(found)
    table.attrs["runs"] = runs
    return table


def find(path: Path) -> list[Path]:
    """The folders with results at or below a folder, by name; hidden ones are another process's work in progress.

    Raises:
        UsageError: there is none.
    """
    marked = sorted(file.parent for file in walked(path) if file.name == MARK)
    below = [one for one in marked if not any(part.startswith(".") for part in one.relative_to(path).parts)]
    if not below:
        what = "none" if path.is_dir() else "a file" if path.exists() else "no such folder"
        raise UsageError(f"results {str(path)!r}: expected a folder with {MARK} in it or below, found {what}")
    return below


def _run_of(folder: Path) -> Path:
    """The folder of the run that a result is of."""
    full, run = folder.resolve(), read_run(folder) if (folder / RUN).exists() else {}
    named = PurePosixPath(run.get("dataset", {}).get("name") or full.name).parts  # a nested one, unless it was moved
    below = len(named) if full.parts[-len(named) :] == named else 1
    return next((above for above in full.parents if _FOLDER.fullmatch(above.name)), full.parents[below - 1])


def _names(runs: Iterable[Path]) -> dict[Path, str]:
    """The names of runs' folders, with as many folders above as tell them from others that are called the same."""
    distinct, found = list(dict.fromkeys(runs)), {}
    for one in distinct:
        same = [other for other in distinct if other.name == one.name]
        depth = next(n for n in itertools.count(1) if len({other.parts[-n:] for other in same}) == len(same))
        found[one] = "/".join(one.parts[-depth:])
    return found


def _about(folder: Path, above: Path, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The `run.json` of a result, empty if there is none, and the columns that are the same for all of its rows."""
    run = read_run(folder) if (folder / RUN).exists() else {}
    matched = _FOLDER.fullmatch(above.name)
    parts: Mapping[str, Any] = matched.groupdict() if matched else {}
    dataset = run.get("dataset", {}).get("name") or folder.resolve().relative_to(above).as_posix()
    said = run.get("identity", {})
    method = said.get("method", {}).get("method") or parts.get("method")
    signal = said.get("settings", {}).get("signal")
    return run, {
        "run": name,
        "base": said.get("base_model") or parts.get("base"),
        "method": signal if method == "logo" and signal else method,
        "k": int(parts["k"]) if parts else said.get("settings", {}).get("k"),
        "seed": int(parts["seed"]) if parts else said.get("seed"),
        "dataset": dataset,
        "metric": run.get("metric") or OFFICIAL_KINDS.get(kind := metric_kind(dataset), kind),
    }


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
        keys = ("value", "prediction", "selected", "weights")
        rows = zip(*(files[name] for name in OFFICIAL[:4]), scores, strict=True)
        for index, (*fields, row) in enumerate(rows):
            known = dict(zip(columns, row, strict=True))
            yield {"index": index, **dict(zip(keys, fields, strict=True)), "scores": known, "error": None}
    except (AttributeError, TypeError, ValueError) as error:
        raise DataError(
            f"{folder}: expected the files of the official script, of equally many rows: {error}"
        ) from error


def read_run(folder: Path) -> dict[str, Any]:
    """The `run.json` of a result; UsageError if it is none."""
    found = _json(folder / RUN)
    if not isinstance(found, dict) or not isinstance(found.get("identity"), dict):
        raise UsageError(f"{folder / RUN}: expected what a run writes, found something else; --overwrite replaces it")
    return found


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


def differences(one: Mapping[str, object], other: Mapping[str, object]) -> list[Difference]:
    """The entries that differ, by dotted name; None stands for a missing one. If the number of rows differs, their
    digest is left out."""
    found = [pair for pair in _pairs("", one, other) if pair[1] != pair[2]]
    names = {name for name, _, _ in found}
    return [pair for pair in found if not (pair[0].endswith("_sha256") and pair[0].removesuffix("_sha256") in names)]


def described(found: Sequence[Difference], most: int = 5) -> str:
    """The differences in a few words, from the other side: `settings.k is 5, not 2`."""
    named = [
        f"{name} is {_short(theirs)}{' instead of' if ours is None else ', not'} {_short(ours)}"
        for name, ours, theirs in found[:most]
    ]
    return "; ".join([*named, *([f"and {len(found) - most} more"] if len(found) > most else [])])


def _pairs(prefix: str, one: Mapping[str, object], other: Mapping[str, object]) -> Iterator[Difference]:
    for key in dict.fromkeys((*one, *other)):
        ours, theirs = one.get(key), other.get(key)
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            yield from _pairs(f"{prefix}{key}.", ours, theirs)
        else:
            yield f"{prefix}{key}", ours, theirs


def _short(value: object, longest: int = 20) -> str:
    text = "not given" if value is None else json.dumps(value)
    return text if len(text) <= longest else f"{text[:longest]}..."
