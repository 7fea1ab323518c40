"""A result folder is whole or unchanged, whatever fails: the disk, a permission, or the process itself."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logo.adapters.examples import write_examples
from logo.errors import StorageError
from logo.folders import check_writable, held, replace_file, replace_folder

OLD = {"a.json": "[1]", "b.json": "[2]"}
NEW = {"a.json": "[10]", "c.json": "[30]"}


def content(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text(encoding="utf-8") for file in folder.iterdir()}


def broken_disk(descriptor: int) -> None:
    raise OSError(errno.EIO, "I/O error")


def python(code: str, *args: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=check)


@settings(max_examples=30)  # every one of them waits for the disk
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


def test_folders_of_the_user_stay(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    replace_folder(folder, OLD)
    (folder / "plots").mkdir()
    (folder / "plots" / "p.svg").write_text("<svg/>")
    replace_folder(folder, NEW, owned=OLD)
    assert sorted(path.name for path in folder.iterdir()) == ["a.json", "c.json", "plots"]
    assert (folder / "plots" / "p.svg").read_text() == "<svg/>"


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    (tmp_path / "r").symlink_to("big")
    replace_folder(tmp_path / "r", NEW)
    assert (tmp_path / "r").is_symlink()
    assert content(tmp_path / "big") == NEW


@pytest.mark.parametrize("broken", ["fsync", "rename", "mkdir"])
@pytest.mark.parametrize("nth", range(4))
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
        if (broken, nth) == ("fsync", 3):  # the last one, of the parent: the new files are in place by then
            expected = NEW
    else:
        expected = NEW
    monkeypatch.undo()
    assert (content(folder) if folder.exists() else {}) == expected
    assert [path.name for path in tmp_path.glob("m/*")] == (["r"] if expected else [])


def test_an_interrupt_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "r"
    replace_folder(folder, OLD)

    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        replace_folder(folder, NEW)
    assert content(folder) == OLD
    assert list(tmp_path.iterdir()) == [folder]


LIMITED = """
    import resource, sys
    from pathlib import Path
    from logo.errors import StorageError
    from logo.folders import check_writable, held, replace_file, replace_folder

    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # no file may grow beyond this
    try:
        if sys.argv[2] == "check":
            check_writable(sys.argv[1])
        else:
            replace_folder(Path(sys.argv[1]), {"a.json": "[10]", "c.json": "x" * 5000})
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


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from logo import folders

    real, calls = getattr(os, sys.argv[2]), 0

    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(os, sys.argv[2], call)
    folders.replace_folder(Path(sys.argv[1]), {"a.json": "[10]", "c.json": "[30]"}, owned=("a.json", "b.json"))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is a POSIX thing")
@pytest.mark.parametrize(
    ("call", "nth", "left"),
    [
        ("fsync", 2, OLD),  # in the middle of writing
        ("rename", 1, OLD),  # all written, nothing moved
        ("rename", 2, {}),  # the old folder has stepped aside
        ("rename", 3, NEW),  # the new one is in place, the user's file not yet moved into it
    ],
)
def test_a_killed_writer_leaves_no_mixture_and_the_next_one_cleans(
    tmp_path: Path, call: str, nth: int, left: dict[str, str]
) -> None:
    folder = tmp_path / "r"
    replace_folder(folder, OLD)
    (folder / "notes.txt").write_text("mine")
    assert python(KILLED, folder, call, nth, check=False).returncode == -9
    found = content(folder) if folder.exists() else {}
    assert found in (left, left | {"notes.txt": "mine"})
    assert len(list(tmp_path.iterdir())) >= 2

    with pytest.MonkeyPatch.context() as patch:  # a next writer that fails as well still mends what it found
        patch.setattr(os, "fsync", broken_disk)
        with pytest.raises(StorageError, match="I/O error"):
            replace_folder(folder, NEW, owned=OLD)
    assert content(folder) == (left or OLD) | {"notes.txt": "mine"}
    assert list(tmp_path.iterdir()) == [folder]

    replace_folder(folder, {"a.json": "[100]"}, owned={**OLD, **NEW})
    assert content(folder) == {"a.json": "[100]", "notes.txt": "mine"}
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is a POSIX thing")
def test_what_a_killed_writer_of_a_file_left_is_removed_by_the_next(tmp_path: Path) -> None:
    killed = """
        import os, signal, sys
        from pathlib import Path
        from logo import folders
        folders.os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        folders.replace_file(Path(sys.argv[1]), b"secret")
    """
    assert python(killed, tmp_path / "a.json", check=False).returncode == -9
    assert len(list(tmp_path.iterdir())) == 1
    replace_file(tmp_path / "b.json", b"1")
    with held(tmp_path / ".a.json.new-1234"):  # of a writer that lives
        replace_file(tmp_path / "a.json", b"2")
        assert {path.name for path in tmp_path.iterdir()} == {"a.json", "b.json", ".a.json.new-1234"}
    replace_file(tmp_path / "a.json", b"3")
    assert content(tmp_path) == {"a.json": "3", "b.json": "1"}


def test_several_writers_of_examples_replace_a_link_and_not_its_target(tmp_path: Path) -> None:
    """In the cache of the Hub, equal files of several adapters are links to one file."""
    blob, folder = tmp_path / "blob", tmp_path / "a"
    blob.write_text("{}")
    folder.mkdir()

    def write(number: int) -> None:
        for turn in range(20):
            link = folder / f"link-{number}"
            link.symlink_to(blob)
            link.replace(folder / "examples.jsonl")
            write_examples(folder, [f"prompt {number} {turn}"])

    with ThreadPoolExecutor(4) as several:
        list(several.map(write, range(4)))
    write_examples(folder, ["last"])
    assert content(folder) == {"examples.jsonl": '{"prompt": "last"}\n'}
    assert not (folder / "examples.jsonl").is_symlink() and blob.read_text() == "{}"


def test_without_a_lock_nothing_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    other = tmp_path / ".r.new-1234"  # perhaps of a writer that lives
    other.mkdir()
    replace_folder(tmp_path / "r", NEW)
    assert content(tmp_path / "r") == NEW
    assert other.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="no locks there")
def test_writers_at_the_same_time_do_not_mix(tmp_path: Path) -> None:
    code = """
        import sys
        from pathlib import Path
        from logo.folders import replace_folder
        for _ in range(8):
            replace_folder(Path(sys.argv[1]), {name: sys.argv[2] for name in "abc"})
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
        with pytest.raises(StorageError, match=r"cannot be written \(a file is where a folder should be\)"):
            call(tmp_path / below)
    assert (tmp_path / "file").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    for call in (check_writable, lambda folder: replace_folder(folder, NEW)):
        with pytest.raises(StorageError, match=r"cannot be written \(Permission denied\)"):
            call(tmp_path / "r")


def test_a_check_leaves_nothing_but_the_folder(tmp_path: Path) -> None:
    check_writable(tmp_path / "results" / "m")
    check_writable(str(tmp_path / "results" / "m"))
    assert list((tmp_path / "results" / "m").iterdir()) == []


def test_a_check_sees_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="Disk quota exceeded"):
        check_writable(tmp_path)
