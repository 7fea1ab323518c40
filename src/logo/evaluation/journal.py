"""A journal: one line for every finished piece of a long run, so that a run that was killed goes on where it stopped.

The first line is a fingerprint of everything the results depend on. A journal with another fingerprint belongs to
another run and is refused, never mixed in and never overwritten. A last line that was cut in the middle is dropped.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from io import BufferedRandom
from pathlib import Path
from types import TracebackType
from typing import Any

from logo.errors import StorageError, UsageError


def fingerprint(content: Mapping[str, object]) -> str:
    """The SHA-256 of a run's settings and data, in hex; values that JSON does not know count as text."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


class Journal:
    """The records of a run so far, and a file that grows with each new one. Closed at the end of a `with` block.

    Args:
        path: the file; made if it is missing.
        run: the run's `fingerprint`.
        fresh: drop what is there, of whatever run it is, and begin again.

    Attributes:
        records: what earlier processes of this run have written.

    Raises:
        UsageError: the file is the journal of another run, or another process is writing it.
        StorageError: it cannot be read or written.
    """

    def __init__(self, path: Path, run: str, *, fresh: bool = False) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []
        try:
            # For reading and appending; created if it is missing, never truncated.
            self._file: BufferedRandom = open(path, "a+b")  # noqa: SIM115 - closed by the with block
        except OSError as error:
            raise _unusable(path, error) from error
        try:
            self._lock()
            if fresh:
                self._file.truncate(0)
            self._read(run)
        except BaseException as error:
            self._file.close()
            if isinstance(error, OSError) and not isinstance(error, StorageError):
                raise _unusable(path, error) from error
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, record: Mapping[str, object]) -> None:
        """Writes a record through to the file.

        Raises:
            StorageError: it cannot be written.
        """
        try:
            self._file.write(json.dumps(record).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise _unusable(self.path, error) from error

    def _read(self, run: str) -> None:
        self._file.seek(0)
        *whole, cut = self._file.read().splitlines(keepends=True) or [b""]
        if cut.endswith(b"\n"):
            whole.append(cut)
        if whole:
            self.records = _records(self.path, whole, run)
        self._file.truncate(sum(map(len, whole)))
        if not whole:
            self.append({"run": run})

    def _lock(self) -> None:
        """Two processes would write every record twice. Freed by the system when the file is closed."""
        if sys.platform == "win32":
            return
        import fcntl

        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"journal {self.path}: another process is on this run; wait for it or end it") from None
        except OSError:
            return  # some network drives have no locks


def _records(path: Path, lines: Sequence[bytes], run: str) -> list[dict[str, Any]]:
    """The records in the lines of a journal of this run."""
    try:
        header, *records = [json.loads(line) for line in lines]
    except ValueError:
        raise UsageError(f"journal {path}: not a journal, or damaged; delete it to start again") from None
    if not isinstance(header, dict) or header.get("run") != run:
        raise UsageError(
            f"journal {path}: left by a run with other settings, pool or rows; repeat that run to finish it, delete "
            "the file, or name another result file"
        )
    return records


def _unusable(path: Path, error: OSError) -> StorageError:
    return StorageError(f"journal {os.fspath(path)!r}: cannot be used ({error.strerror or error})")
