"""A journal: one line for every finished piece of a long run, so that a killed run can be continued.

The first line identifies the run by everything that its results depend on. A journal of another run is refused with the
differences, and is neither mixed in nor overwritten. Every record is on the disk before the next piece begins.

Each line has a checksum of itself and of all lines before it, so that what is read is always a prefix of what was
written: a truncated last line is dropped, and if a line is damaged, missing or duplicated, all lines from there on are
dropped with a warning.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from logo.errors import StorageError, UsageError
from logo.evaluation.differences import described, differences
from logo.evaluation.tables import counted
from logo.folders import sync_folder

_LINE = re.compile(rb'\{"check": "([0-9a-f]{64})", "content": (.*)\}\n', re.DOTALL)


@dataclass(frozen=True)
class Written:
    """The valid content of a journal.

    Attributes:
        run: the run that it belongs to; None if the first line is unfinished.
        records: those before the first damage.
        size: bytes up to there; `check`: checksum of the last valid line.
        dropped: number of finished lines from the first damaged one on.
    """

    run: dict[str, Any] | None
    records: list[dict[str, Any]]
    size: int
    check: str
    dropped: int

    @property
    def empty(self) -> bool:
        """Whether there is no record yet."""
        return not self.records and not self.dropped


def written(path: Path) -> Written | None:
    """Reads a journal without taking part in its run; None if there is none.

    Raises:
        UsageError: its first line is damaged, so its run is unknown.
        StorageError: it cannot be read.
    """
    try:
        return _written(path, path.read_bytes())
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
        other: called with the first line of another run's journal; returns whether its records are used, else they are
            dropped. Without it another run's journal is refused.
        stamp: added to every appended record.
        wait: wait for another process that has this journal instead of refusing; the text of the warning.

    Attributes:
        run: the first line of the file.
        records: records of earlier processes; `appended`: number of records of this one.

    Raises:
        UsageError: the file is the journal of another run, its first line is damaged, or another process has it.
        StorageError: it cannot be read or written.
    """

    def __init__(
        self,
        path: Path,
        run: Mapping[str, Any],
        *,
        fresh: bool = False,
        other: Callable[[dict[str, Any]], bool] | None = None,
        stamp: Mapping[str, object] | None = None,
        wait: str | None = None,
    ) -> None:
        self.path = path
        self._stamp = dict(stamp or {})
        self.records: list[dict[str, Any]] = []
        self.appended = 0
        self._check = ""
        try:
            # For reading and appending; created if it is missing, never truncated. Unbuffered, so that closing it does
            # not try again what could not be written.
            self._file: FileIO = open(path, "a+b", buffering=0)  # noqa: SIM115 - closed by the with block
        except OSError as error:
            raise _unusable(path, error) from error
        try:
            self._lock(wait)
            if fresh:
                self._file.truncate(0)
            self.run: dict[str, Any] = json.loads(json.dumps(run, default=str))
            self._read(other)
        except BaseException as error:
            self._file.close()
            if isinstance(error, OSError) and not isinstance(error, StorageError):
                raise _unusable(path, error) from error
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
        self._write({**record, **self._stamp})
        self.appended += 1

    def _write(self, content: Mapping[str, object]) -> None:
        text = json.dumps(content).encode()
        # The checksum covers this content and the checksum before, and so all lines above it.
        check = hashlib.sha256(self._check.encode() + text).hexdigest()
        try:
            rest = memoryview(b'{"check": "%s", "content": %s}\n' % (check.encode(), text))
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise _unusable(self.path, error) from error
        self._check = check

    def _read(self, other: Callable[[dict[str, Any]], bool] | None) -> None:
        self._file.seek(0)
        found = _written(self.path, self._file.readall())
        begun = found.run
        if begun is not None and begun != self.run:
            # A journal without records does not block another run.
            if found.empty or (other is not None and not other(begun)):
                found = Written(None, [], 0, "", 0)
            elif other is not None:
                self.run = begun
            else:
                raise self._of_another(begun)
        if found.dropped:
            warnings.warn(
                f"journal {self.path}: line {len(found.records) + 2} is damaged: it and all lines after it are dropped "
                f"({counted(found.dropped, 'record')}); the run goes on from there",
                UserWarning,
                stacklevel=4,
            )
        self.records, self._check = found.records, found.check
        self._file.truncate(found.size)
        if found.run is None:
            self._write(self.run)
            sync_folder(self.path.parent)

    def _of_another(self, run: dict[str, Any]) -> UsageError:
        return UsageError(
            f"journal {self.path}: left by a run with other settings, pool or rows, or written by an earlier version "
            f"({described(differences(self.run, run))}); repeat that run to finish it, delete the file, or name "
            "another result file"
        )

    def _lock(self, wait: str | None) -> None:
        """Keeps two processes from writing every record twice. Closing the file releases the lock."""
        if sys.platform == "win32":
            return
        import fcntl

        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if wait is None:
                raise UsageError(
                    f"journal {self.path}: another process is working on this run; wait for it or end it"
                ) from None
            warnings.warn(wait, UserWarning, stacklevel=4)
            fcntl.flock(self._file, fcntl.LOCK_EX)
        except OSError:
            return  # some network drives have no locks


def _written(path: Path, content: bytes) -> Written:
    *lines, _ = content.split(b"\n")  # the last one was cut, or is empty
    found: list[dict[str, Any]] = []
    size, check = 0, ""
    for line in lines:
        match = _LINE.fullmatch(line + b"\n")
        if match is None or hashlib.sha256(check.encode() + match[2]).hexdigest() != match[1].decode():
            break
        found.append(json.loads(match[2]))
        size, check = size + len(line) + 1, match[1].decode()
    if lines and not found:
        raise UsageError(
            f"journal {path}: not a journal, or its first line, which identifies the run, is damaged; "
            "delete it to start again"
        )
    return Written(found[0] if found else None, found[1:], size, check, len(lines) - len(found))


def _unusable(path: Path, error: OSError) -> StorageError:
    return StorageError(f"journal {os.fspath(path)!r}: cannot be used ({error.strerror or error})")
