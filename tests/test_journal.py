"""Journals: whatever happens to the bytes, what is read back is the beginning of what was written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logo.errors import StorageError, UsageError
from logo.evaluation.journal import Journal, written
from logo.folders import make_folder

RUN = {"identity": {"base_model": "M", "seed": 0}, "pool": {"a": "00", "b": "11"}}

numbers = st.integers() | st.floats(allow_nan=False)
records = st.lists(st.dictionaries(st.text(max_size=3), numbers | st.text('a\n"{}é\u2028', max_size=6), max_size=3))


def write(path: Path, some: list[dict[str, Any]]) -> bytes:
    with Journal(path, RUN, fresh=True) as journal:
        for record in some:
            journal.append(record)
    return path.read_bytes()


def read(path: Path) -> list[dict[str, Any]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Journal(path, RUN) as journal:
            return journal.records


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("journals") / "journal"


def damaged(content: bytes, data: st.DataObject) -> bytes:
    """One of the things that can happen to a file."""
    lines = content.splitlines(keepends=True)
    at = data.draw(st.integers(0, len(content) - 1), label="at")
    line = data.draw(st.integers(0, len(lines) - 1), label="line")
    other = data.draw(st.integers(0, len(lines) - 1), label="other")
    swapped = list(lines)
    swapped[line], swapped[other] = swapped[other], swapped[line]
    ways: dict[str, Callable[[], bytes]] = {
        "cut": lambda: content[:at],
        "flipped": lambda: content[:at] + bytes([content[at] ^ 1 << data.draw(st.integers(0, 7))]) + content[at + 1 :],
        "overwritten": lambda: content[:at] + data.draw(st.binary(max_size=9)) + content[at + 9 :],
        "inserted": lambda: content[:at] + data.draw(st.binary(max_size=9)) + content[at:],
        "zeros": lambda: content[:at] + bytes(len(content) - at),  # blocks that never reached the disk
        "line lost": lambda: b"".join(lines[:line] + lines[line + 1 :]),
        "line twice": lambda: b"".join(lines[: line + 1] + lines[line:]),
        "lines swapped": lambda: b"".join(swapped),
    }
    return ways[data.draw(st.sampled_from(sorted(ways)))]()


@settings(deadline=None, max_examples=150)  # every record waits for the disk
@given(data=st.data(), some=st.lists(st.dictionaries(st.text(max_size=3), numbers, max_size=2), max_size=4))
def test_any_damage_leaves_a_prefix(path: Path, data: st.DataObject, some: list[dict[str, Any]]) -> None:
    """And the run that goes on from it ends with the same records; a damaged first line is an error."""
    content = write(path, some)
    path.write_bytes(damaged(content, data))
    left = path.read_bytes()
    try:
        found = read(path)
    except UsageError as error:
        assert "its first line, which identifies the run, is damaged" in str(error) and path.read_bytes() == left
        assert left.splitlines(keepends=True)[0] != content.splitlines(keepends=True)[0]
        return
    assert found == some[: len(found)]
    with Journal(path, RUN) as journal:
        assert journal.records == found
        for record in some[len(found) :]:
            journal.append(record)
    assert read(path) == some and path.read_bytes() == content


@settings(deadline=None, max_examples=30)
@given(some=records)
def test_what_is_written_is_read(path: Path, some: list[dict[str, Any]]) -> None:
    write(path, some)
    assert read(path) == some
    found = written(path)
    assert found is not None and (found.run, found.records, found.dropped) == (RUN, some, 0)


def test_a_damaged_line_in_the_middle_is_told(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    content = write(path, [{"row": i} for i in range(5)])
    path.write_bytes(content.replace(b'{"row": 2}', b'{"row": 7}'))
    with (
        pytest.warns(UserWarning, match=r"line 4 is damaged: it and all lines after it are dropped \(3 records\)"),
        Journal(path, RUN) as journal,
    ):
        assert journal.records == [{"row": 0}, {"row": 1}]
    assert read(path) == [{"row": 0}, {"row": 1}] and content.startswith(path.read_bytes())


def test_only_one_run_and_one_process(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    with Journal(path, RUN) as journal:
        assert journal.records == []
        journal.append({"a": 0.1})
        with pytest.raises(UsageError, match="another process is working on this run"):
            Journal(path, RUN)
    before = path.read_bytes()
    with pytest.raises(UsageError) as caught:
        Journal(path, {"identity": {"base_model": "M", "seed": 1}, "pool": {"a": "00"}})
    assert (
        "other settings, pool or rows, or written by an earlier version "
        '(identity.seed is 0, not 1; pool.b is "11" instead of not given)'
    ) in str(caught.value)
    path.write_text("not json\nat all\n")
    with pytest.raises(UsageError, match="not a journal, or its first line, which identifies the run, is damaged"):
        Journal(path, RUN)
    assert path.read_text() == "not json\nat all\n" and before
    path.write_text('{"check": "00')  # killed before the first line was complete
    assert read(path) == []
    with pytest.raises(StorageError, match="cannot be used"):
        Journal(tmp_path / "no" / "journal", RUN)
    assert written(tmp_path / "none") is None


def test_every_record_is_on_the_disk_before_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each fsync of the file, all that was appended so far is in it; its name is synced too."""
    path = tmp_path / "deep" / "journal"
    synced: list[tuple[str, bytes]] = []
    fsync = os.fsync

    def watching(descriptor: int) -> None:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        synced.append((name, path.read_bytes() if path.exists() else b""))
        fsync(descriptor)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc to see which file is synced")
    monkeypatch.setattr(os, "fsync", watching)
    make_folder(path.parent)
    assert [name for name, _ in synced] == [str(tmp_path)]
    with Journal(path, RUN) as journal:
        assert [name for name, _ in synced[1:]] == [str(path), str(path.parent)]
        for count in (1, 2, 3):
            journal.append({"row": count})
            name, content = synced[-1]
            assert name == str(path) and content.count(b"\n") == 1 + count and content == path.read_bytes()


def test_a_full_disk_costs_the_last_record_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal"
    with Journal(path, RUN) as journal:
        journal.append({"row": 0})
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            with pytest.raises(StorageError, match="No space left on device"):
                journal.append({"row": 1})
    assert read(path) in ([{"row": 0}], [{"row": 0}, {"row": 1}])


def test_waiting_for_another_process(tmp_path: Path) -> None:
    """A process that waits reads what the other one has written."""
    path = tmp_path / "journal"
    code = (
        "import sys; from pathlib import Path; from logo.evaluation.journal import Journal\n"
        f"with Journal(Path({str(path)!r}), {RUN!r}, wait='waiting for it') as journal: print(journal.records)"
    )
    with Journal(path, RUN) as journal:
        process = subprocess.Popen(
            [sys.executable, "-W", "always", "-c", code],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None and "waiting for it" in process.stderr.readline()
        journal.append({"learnt": 1})
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert json.loads(out.replace("'", '"')) == [{"learnt": 1}]
