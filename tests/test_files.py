"""A folder of files is whole or unchanged, whatever fails; so is a new adapter folder."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
from collections.abc import Collection, Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logo.cli.output import check_writable
from logo.errors import StorageError, UsageError
from logo.files import new_folder

OLD = {"a.json": "[1]", "b.json": "[2]"}
NEW = {"a.json": "[10]", "c.json": "[30]"}


def replace_folder(folder: Path, files: Mapping[str, str], owned: Collection[str] = ()) -> None:
    with new_folder(folder, replaced=owned) as new:
        for name, text in files.items():
            (new / name).write_text(text)


def content(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text(encoding="utf-8") for file in folder.iterdir()}


def python(code: str, *args: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=check)


@settings(max_examples=15, deadline=None)  # every one of them waits for the disk
@given(
    first=st.none() | st.dictionaries(st.sampled_from("abc"), st.text("é\n1", max_size=3)),
    second=st.dictionaries(st.sampled_from("abc"), st.text("é\n1", max_size=3)),
    foreign=st.dictionaries(st.sampled_from("xy"), st.text("2", max_size=3)),
)
def test_the_new_files_and_what_is_not_ours(
    tmp_path_factory: pytest.TempPathFactory,
    first: dict[str, str] | None,
    second: dict[str, str],
    foreign: dict[str, str],
) -> None:
    parent = tmp_path_factory.mktemp("results") / "model"
    folder = parent / "bbh.navigate"
    if first is not None:
        replace_folder(folder, first, owned="abc")
        for name, text in foreign.items():
            (folder / name).write_text(text)
    replace_folder(folder, second, owned="abc")
    assert content(folder) == second | (foreign if first is not None else {})
    assert [path.name for path in parent.iterdir()] == ["bbh.navigate"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    (tmp_path / "r").symlink_to("big")
    replace_folder(tmp_path / "r", NEW)
    assert (tmp_path / "r").is_symlink()
    assert content(tmp_path / "big") == NEW


@pytest.mark.parametrize("broken", ["fsync", "rename"])
@pytest.mark.parametrize("nth", range(3))
@pytest.mark.parametrize("earlier", [True, False])
def test_nothing_changes_when_a_call_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str, nth: int, earlier: bool
) -> None:
    folder = tmp_path / "m" / "r"
    if earlier:
        replace_folder(folder, OLD)
    calls = 0
    real = getattr(os, broken)

    def full(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == nth + 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args, **kwargs)

    monkeypatch.setattr(os, broken, full)
    try:
        replace_folder(folder, NEW, owned=OLD)
    except StorageError as error:
        assert f"folder {str(folder)!r}: cannot be written (No space left on device)" in str(error)
        expected = OLD if earlier else {}
    else:
        expected = NEW
    monkeypatch.undo()
    assert (content(folder) if folder.exists() else {}) == expected
    assert [path.name for path in tmp_path.glob("m/*")] == (["r"] if expected else [])


LIMITED = """
    import resource, sys
    from pathlib import Path
    from logo.errors import StorageError
    from logo.cli.output import check_writable
    from logo.files import new_folder

    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # no file may grow beyond this
    try:
        if sys.argv[2] == "check":
            check_writable(sys.argv[1])
        else:
            with new_folder(Path(sys.argv[1]), replaced=()) as new:
                (new / "a.json").write_text("[10]")
                (new / "c.json").write_text("x" * 5000)
    except StorageError as error:
        print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are a POSIX thing")
def test_a_real_limit_on_the_size_of_files(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    replace_folder(folder, OLD)
    done = python(LIMITED, folder, "write")
    assert done.stdout.startswith(f"folder {str(folder)!r}: cannot be written (File too large)")
    assert len(done.stdout.splitlines()) == 1
    assert content(folder) == OLD
    assert list(tmp_path.iterdir()) == [folder]
    assert "cannot be written (File too large)" in python(LIMITED, tmp_path, "check").stdout


@pytest.mark.skipif(sys.platform == "win32", reason="no locks there")
def test_writers_at_the_same_time_do_not_mix(tmp_path: Path) -> None:
    code = """
        import sys
        from pathlib import Path
        from logo.files import new_folder
        for _ in range(8):
            with new_folder(Path(sys.argv[1]), replaced=()) as new:
                for name in "abc":
                    (new / name).write_text(sys.argv[2])
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "r")]
    running = [subprocess.Popen([*command, text]) for text in ("1", "2", "3")]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert len(set(content(tmp_path / "r").values())) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["r"]


@pytest.mark.parametrize("below", ["file", "file/deeper", "file/deeper/still"])
def test_below_a_regular_file(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("mine")
    for call in (check_writable, lambda folder: replace_folder(folder, NEW)):
        with pytest.raises(StorageError, match=r"cannot be written \((File exists|Not a directory)\)"):
            call(tmp_path / below)
    assert (tmp_path / "file").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_check_sees_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="Disk quota exceeded"):
        check_writable(tmp_path)


# ---- new folders, of an adapter that is written ---------------------------------------------------------------------


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_two_writers_of_a_new_folder_do_not_meet(tmp_path: Path) -> None:
    """The place belongs to who is done first."""
    place = tmp_path / "mix"
    with pytest.raises(StorageError, match="Directory not empty"), new_folder(place) as slow:
        (slow / "a").write_text("slow")
        with new_folder(place) as quick:
            (quick / "b").write_text("quick")
        assert (slow / "a").read_text() == "slow"
    assert names(tmp_path) == ["mix"] and names(place) == ["b"]


def test_a_writer_that_fails_removes_what_it_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, "I/O error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(StorageError, match="I/O error"), new_folder(tmp_path / "mix") as part:
        (part / "a").write_text("1")
    assert names(tmp_path) == []


@pytest.mark.parametrize("there", [True, False])
def test_a_new_folder_may_be_a_link(tmp_path: Path, there: bool) -> None:
    (tmp_path / "disk").mkdir()
    if there:
        (tmp_path / "disk" / "mix").mkdir()
    (tmp_path / "link").symlink_to(Path("disk", "mix"))
    with new_folder(tmp_path / "link") as part:
        (part / "a").write_text("1")
    assert (tmp_path / "link").is_symlink() and names(tmp_path / "disk" / "mix") == ["a"]
    assert names(tmp_path) == ["disk", "link"] and names(tmp_path / "disk") == ["mix"]


def test_a_new_folder_is_neither_in_use_nor_the_current_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "a").write_text("mine")
    monkeypatch.chdir(tmp_path / "here")
    for place, message in ((".", "is the current folder"), ("../here", "is the current folder"), ("../used", "exists")):
        with pytest.raises(UsageError, match=message), new_folder(Path(place)):
            pass
    assert names(tmp_path / "used") == ["a"]
