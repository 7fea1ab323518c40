"""A folder of files is whole or unchanged, whatever fails; so is a new adapter folder, and a file of the cache. What is
computed from files that have changed is computed again."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from logo.cli.output import check_writable
from logo.errors import AdapterError, StorageError, UsageError
from logo.files import Store, new_folder, write_cached
from logo.identity import content_stamp
from test_engine import engine, write_adapter
from tolerances import same_scores

OLD = {"a.json": "[1]", "b.json": "[2]"}
NEW = {"a.json": "[10]", "c.json": "[30]"}


def replace_folder(folder: Path, files: Mapping[str, str], owned: Collection[str] = ()) -> None:
    with new_folder(folder, replaced=owned) as new:
        for name, text in files.items():
            (new / name).write_text(text)


def content(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text(encoding="utf-8") for file in folder.iterdir()}


Files = dict[str, str]
OURS = st.dictionaries(st.sampled_from("abc"), st.text("é\n1", max_size=3))


@settings(max_examples=15)  # every one of them waits for the disk
@given(st.none() | OURS, OURS, st.dictionaries(st.sampled_from("xy"), st.text("2", max_size=3)))
def test_the_new_files_and_what_is_not_ours(
    tmp_path_factory: pytest.TempPathFactory, first: Files | None, second: Files, foreign: Files
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
    for place, what in ((folder, "write"), (tmp_path, "check")):
        command = [sys.executable, "-c", LIMITED, str(place), what]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert said.startswith(f"folder {str(place)!r}: cannot be written (File too large)")
        assert len(said.splitlines()) == 1
        assert content(folder) == OLD and list(tmp_path.iterdir()) == [folder]


WRITER = """
import sys
from pathlib import Path
from logo.files import new_folder

for _ in range(8):
    with new_folder(Path(sys.argv[1]), replaced=()) as new:
        for name in "abc":
            (new / name).write_text(sys.argv[2])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no locks there")
def test_writers_at_the_same_time_do_not_mix(tmp_path: Path) -> None:
    running = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path / "r"), text]) for text in "123"]
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


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("replaced", [None, ()])
def test_a_new_folder_may_be_a_link(tmp_path: Path, there: bool, replaced: tuple[()] | None) -> None:
    (tmp_path / "disk").mkdir()
    if there:
        (tmp_path / "disk" / "mix").mkdir()
    (tmp_path / "link").symlink_to(Path("disk", "mix"))
    with new_folder(tmp_path / "link", replaced=replaced) as part:
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


def test_a_file_that_cannot_be_written_leaves_no_part_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.warns(UserWarning, match="nothing can be kept in .*: full; it is computed anew each time"):
            assert not write_cached(tmp_path, "folder/one.json", b"[1]")
    assert not list((tmp_path / "folder").iterdir())
    assert write_cached(tmp_path, "folder/one.json", b"[1]")
    assert {path.name: path.read_bytes() for path in (tmp_path / "folder").iterdir()} == {"one.json": b"[1]"}


def touched(file: Path, content: bytes | None) -> None:
    """Writes to a file in place (None: only changes its mode) until its change time is another one, and sets its
    modification time back."""
    before = file.stat()
    while file.stat().st_ctime_ns == before.st_ctime_ns:
        if content is None:
            file.chmod(0o600)
        else:
            with file.open("r+b") as open_file:
                open_file.write(content)
            os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert content_stamp(file)[:3] == (before.st_size, before.st_mtime_ns, before.st_ino)


@pytest.mark.parametrize("signal", ["norm", "calibrated"])
def test_weights_rewritten_in_place_with_size_and_time_kept_are_noticed(signal: str, tmp_path: Path) -> None:
    model = tiny.model("llama", num_hidden_layers=6)
    for i in range(3):
        write_adapter(tmp_path / "pool" / f"t{i}", model, ("q_proj", "v_proj"), rank=2, seed=i)
    write_adapter(tmp_path / "other", model, ("q_proj", "v_proj"), rank=2, seed=9, scale=30)
    file = tmp_path / "pool" / "t1" / "adapter_model.safetensors"
    opened = partial(engine, model, tmp_path / "pool", signal=signal, k=1)
    logo = opened(cache=str(tmp_path / "cache"))
    before = logo.select("w3 w4 w5")
    if signal == "calibrated":  # its digest is known then, so that a new mode is no change of weights
        touched(file.parent.parent / "t0" / file.name, None)
        assert logo.generate("w3", adapters={"t0": 1.0}, max_new_tokens=1).token_ids
    touched(file, (tmp_path / "other" / "adapter_model.safetensors").read_bytes())
    with pytest.raises(AdapterError, match=r"'t1'.*it has changed since it was opened; open the pool again"):
        logo.generate("w3", adapters={"t1": 1.0}, max_new_tokens=1)
    again = opened(cache=str(tmp_path / "cache")).select("w3 w4 w5")
    assert again.scores == same_scores(opened(cache="").select("w3 w4 w5").scores)
    assert abs(again.scores["t1"] - before.scores["t1"]) > 1e-3


def test_what_a_store_holds_stays_whatever_happens_to_its_file(tmp_path: Path) -> None:
    """A view of the file would change with it, or end the process."""
    Store(tmp_path).put("responses", {"a": torch.ones(1000)})
    store = Store(tmp_path)
    tensors = store.get("responses")
    with open(tmp_path / "responses.safetensors", "r+b") as file:
        file.seek(-2000, os.SEEK_END)
        file.write(bytes(2000))
    assert tensors["a"].equal(torch.ones(1000)) and store.get("responses")["a"].equal(torch.ones(1000))
    os.truncate(tmp_path / "responses.safetensors", 0)
    assert tensors["a"].equal(torch.ones(1000))


ASKED = """
import sys
from logo.identity import of_content

def find():
    print("asked", end=" ")
    return open(sys.argv[1]).read().strip()

print(*(of_content(sys.argv[1], "says", find) for _ in range(2)))
"""


def asked(file: Path, cache: Path) -> str:
    """What a new process says of a file's content, and whether it had to read it."""
    env = {**os.environ, "LOGO_CACHE": str(cache)}
    found = subprocess.run([sys.executable, "-c", ASKED, file], env=env, capture_output=True, text=True, check=True)
    return found.stdout.strip() + (" (warned)" if "is damaged and computed anew" in found.stderr else "")


@pytest.mark.slow
def test_what_a_file_holds_is_found_out_once_by_all_processes(tmp_path: Path) -> None:
    file, cache = tmp_path / "file", tmp_path / "cache"
    file.write_text("one")
    assert [asked(file, cache) for _ in range(2)] == ["asked asked one one"] * 2  # it may change without another stamp
    while time.time_ns() - file.stat().st_ctime_ns < 2.1e9:
        time.sleep(0.1)
    assert [asked(file, cache) for _ in range(2)] == ["asked one one", "one one"]
    [kept] = (cache / "files").iterdir()
    kept.write_bytes(b"\0" * 8)  # as a power cut leaves it
    assert [asked(file, cache) for _ in range(2)] == ["asked one one (warned)", "one one"]
    touched(file, b"two")
    assert asked(file, cache) == "asked asked two two"
