"""A new folder is complete or absent, even if other processes write to the same place or die while writing."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from logo.adapters.writing import new_folder
from logo.cli.run import run
from logo.errors import StorageError, UsageError
from make_adapters import write

KILLED = """
import os, signal, sys
from pathlib import Path
from logo.adapters.writing import new_folder
with new_folder(Path(sys.argv[1]), "the pool") as part:
    (part / "half").write_text("1")
    os.kill(os.getpid(), signal.SIGTERM)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_two_writers_with_one_pid_do_not_meet(tmp_path: Path) -> None:
    """As in two containers on one disk; the place belongs to who is done first."""
    place = tmp_path / "pool"
    with pytest.raises(StorageError, match="the pool cannot be written"), new_folder(place, "the pool") as slow:
        (slow / "a").write_text("slow")
        with new_folder(place, "the pool") as quick:
            (quick / "b").write_text("quick")
        assert (slow / "a").read_text() == "slow"
        (slow / "c").write_text("slow")
    assert names(tmp_path) == ["pool"] and names(place) == ["b"]


def test_a_writer_that_fails_removes_what_it_made_and_nothing_else(tmp_path: Path) -> None:
    place = tmp_path / "pool"
    with new_folder(place, "the pool") as slow:
        (slow / "a").write_text("slow")
        with pytest.raises(UsageError), new_folder(place, "the pool") as other:
            (other / "b").write_text("x")
            raise UsageError("no")
    assert names(tmp_path) == ["pool"] and names(place) == ["a"]


def test_what_a_killed_writer_leaves_goes_with_the_next_one(tmp_path: Path) -> None:
    place = tmp_path / "pool"
    (tmp_path / ".pool.part").write_text("somebody else's")
    ended = subprocess.run([sys.executable, "-c", KILLED, str(place)], env={**os.environ, "PYTHONPATH": _path()})
    assert ended.returncode == -signal.SIGTERM
    assert len([name for name in names(tmp_path) if name.startswith(".pool.part-")]) == 1 and not place.exists()
    with new_folder(tmp_path / "pool2", "the pool"):
        pass
    assert len(names(tmp_path)) == 3  # that was another place
    with new_folder(place, "the pool") as part:
        (part / "a").write_text("1")
    assert names(tmp_path) == [".pool.part", "pool", "pool2"] and names(place) == ["a"]


def _path() -> str:
    return str(Path(__file__).parent.parent / "src")


def test_a_disk_that_does_not_keep_it_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, "I/O error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(StorageError, match="I/O error"), new_folder(tmp_path / "pool", "the pool") as part:
        (part / "a").write_text("1")
    assert names(tmp_path) == []


@pytest.mark.parametrize("there", [True, False])
def test_a_link_keeps_its_targets_place(tmp_path: Path, there: bool) -> None:
    (tmp_path / "disk").mkdir()
    if there:
        (tmp_path / "disk" / "pool").mkdir()
    (tmp_path / "link").symlink_to(Path("disk", "pool"))
    with new_folder(tmp_path / "link", "the pool") as part:
        (part / "a").write_text("1")
        assert part.parent == (tmp_path / "disk").resolve()
    assert (tmp_path / "link").is_symlink() and names(tmp_path / "disk" / "pool") == ["a"]
    assert names(tmp_path) == ["disk", "link"] and names(tmp_path / "disk") == ["pool"]


def test_the_current_folder_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "pool" / "a")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for out in (".", "../here"):
        assert run(["pool", "prune", "../pool", "--rank", "1", "--out", out]) == 2
        assert "is the current folder" in capsys.readouterr().err
    assert run(["pool", "prune", "../pool", "--rank", "1", "--out", "below/../new"]) == 0
    assert names(tmp_path / "here" / "new") == ["a", "pool.json"]
