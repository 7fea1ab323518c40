"""A journal: one line for every finished piece of a long run, so that a killed run can be continued.

The first line identifies the run by everything that its results depend on. A journal of another run is refused with the
differences, and is neither mixed in nor overwritten. Every record is on the disk before the next piece begins; a last
line that was cut off is dropped.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from logo.errors import StorageError, UsageError
from logo.evaluation.differences import described, differences
from logo.files import sync_folder


@dataclass(frozen=True)
class Written:
    """The content of a journal: the `run` that it belongs to, its `records`, and the bytes of its whole lines."""

    run: dict[str, Any]
    records: list[dict[str, Any]]
    size: int


def written(path: Path) -> Written | None:
    """Reads a journal without taking part in its run; None if there is none, or its first line is unfinished.

    Raises:
        UsageError: it is no journal.
        StorageError: it cannot be read.
    """
    try:
        return _read(path, path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unusable(path, error) from error


class Journal:
    """The records of a run so far, in a file that grows with each new one; closed at the end of a `with` block.

    Args:
        path: the file; created if it is missing.
        run: the identity of this run as JSON, with names that a user understands.
        fresh: drop the existing content, of whatever run, and begin again.

    Attributes:
        records: records of earlier processes.

    Raises:
        UsageError: the file is the journal of another run or no journal, or another process has it.
        StorageError: it cannot be read or written.
    """

    def __init__(self, path: Path, run: Mapping[str, Any], *, fresh: bool = False) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []
        try:
            # For reading and appending; created if it is missing, never truncated. Unbuffered, so that closing it does
            # not try again what could not be written.
            self._file: FileIO = open(path, "a+b", buffering=0)  # noqa: SIM115 - closed by the with block
        except OSError as error:
            raise _unusable(path, error) from error
        try:
            self._lock()
            self._begin(json.loads(json.dumps(run, default=str)), fresh)
        except OSError as error:
            self._file.close()
            raise error if isinstance(error, StorageError) else _unusable(path, error) from error
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Releases the file for other processes."""
        self._file.close()

    def append(self, record: Mapping[str, object]) -> None:
        """Writes a record, and returns when it is on the disk.

        Raises:
            StorageError: it cannot be written.
        """
        try:
            rest = memoryview(json.dumps(record).encode() + b"\n")
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise _unusable(self.path, error) from error

    def _begin(self, run: dict[str, Any], fresh: bool) -> None:
        self._file.seek(0)
        found = None if fresh else _read(self.path, self._file.readall())
        if found is not None and found.run != run and found.records:  # one without records does not block another run
            raise UsageError(
                f"journal {self.path}: left by a run with other settings, pool or rows "
                f"({described(differences(run, found.run))}); repeat that run to finish it, delete the file, or name "
                "another result file"
            )
        if found is not None and found.run == run:
            self.records = found.records
            self._file.truncate(found.size)
            return
        self._file.truncate(0)
        self.append(run)
        sync_folder(self.path.parent)

    def _lock(self) -> None:
        """Keeps two processes from writing every record twice. Closing the file releases the lock."""
        if sys.platform == "win32":
            return
        import fcntl

        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"journal {self.path}: another process is working on this run; wait for it or end it"
            ) from None
        except OSError:
            return  # some network drives have no locks


def _read(path: Path, content: bytes) -> Written | None:
    *lines, cut = content.split(b"\n")  # the last one was cut, or is empty
    try:
        found: list[Any] = [json.loads(line) for line in lines]
    except ValueError:
        found = [None]
    if not all(isinstance(one, dict) for one in found):
        raise UsageError(f"journal {path}: expected a JSON object in every line, found something else; delete it")
    return Written(found[0], found[1:], len(content) - len(cut)) if found else None


def _unusable(path: Path, error: OSError) -> StorageError:
    return StorageError(f"journal {os.fspath(path)!r}: cannot be used ({error.strerror or error})")
