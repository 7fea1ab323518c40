"""Journals: wherever the bytes end, what is read back is the beginning of what was written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logo.errors import StorageError, UsageError
from logo.evaluation.journal import Journal, written

RUN = {"identity": {"base_model": "M", "seed": 0}, "pool": {"a": "00", "b": "11"}}

numbers = st.integers() | st.floats(allow_nan=False)
records = st.lists(st.dictionaries(st.text(max_size=3), numbers | st.text('a\n"{}é\u2028', max_size=6), max_size=3))


def write(path: Path, some: list[dict[str, Any]]) -> bytes:
    with Journal(path, RUN, fresh=True) as journal:
        for record in some:
            journal.append(record)
    return path.read_bytes()


def read(path: Path) -> list[dict[str, Any]]:
    with Journal(path, RUN) as journal:
        return journal.records


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("journals") / "journal"


@settings(deadline=None, max_examples=30)
@given(some=records)
def test_what_is_written_is_read(path: Path, some: list[dict[str, Any]]) -> None:
    write(path, some)
    assert read(path) == some
    found = written(path)
    assert found is not None and (found.run, found.records) == (RUN, some)


@settings(deadline=None, max_examples=60)
@given(data=st.data(), some=st.lists(st.dictionaries(st.text(max_size=3), numbers, max_size=2), max_size=4))
def test_what_is_cut_goes_on_from_the_last_whole_line(
    path: Path, data: st.DataObject, some: list[dict[str, Any]]
) -> None:
    content = write(path, some)
    path.write_bytes(content[: data.draw(st.integers(0, len(content)), label="at")])
    found = read(path)
    assert found == some[: len(found)]
    with Journal(path, RUN) as journal:
        for record in some[len(found) :]:
            journal.append(record)
    assert read(path) == some and path.read_bytes() == content


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
    assert ('other settings, pool or rows (identity.seed is 0, not 1; pool.b is "11" instead of not given)') in str(
        caught.value
    )
    path.write_text("not json\nat all\n")
    with pytest.raises(UsageError, match="expected a JSON object in every line, found something else; delete it"):
        Journal(path, RUN)
    assert path.read_text() == "not json\nat all\n" and before
    path.write_text('{"identity": "00')  # killed before the first line was complete
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
    path.parent.mkdir()
    with Journal(path, RUN) as journal:
        assert [name for name, _ in synced] == [str(path), str(path.parent)]
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
