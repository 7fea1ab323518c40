"""The cache folder: whole files or none."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from logo.cache import read_cached, write_cached
from logo.selection.cache import _numbers
from logo.selection.mapped import mapped


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt(), OSError("full"), SafetensorError("full")])
def test_what_fails_leaves_no_part_behind(error: BaseException, tmp_path: Path) -> None:
    def write(part: str) -> None:
        Path(part).write_text("half")
        raise error

    if isinstance(error, (OSError, SafetensorError)):
        with pytest.warns(UserWarning, match="nothing can be kept in .*: full; it is computed anew each time"):
            assert write_cached(tmp_path, "folder/one.json", write) is None
    else:
        with pytest.raises(type(error)):
            write_cached(tmp_path, "folder/one.json", write)
    assert not list((tmp_path / "folder").iterdir())
    file = write_cached(tmp_path, "folder/one.json", lambda part: Path(part).write_text("whole"))
    assert file is not None and [path.name for path in file.parent.iterdir()] == ["one.json"]


@pytest.mark.skipif(sys.platform == "win32", reason="no locks there")
def test_what_killed_processes_left_is_removed_and_what_others_write_is_not(tmp_path: Path) -> None:
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / ".dead.safetensors-1-2").write_bytes(b"half")  # of an earlier version
    (tmp_path / "index" / ".dead.safetensors-3-4").mkdir()
    (tmp_path / "index" / ".dead.safetensors-3-4" / "dead.safetensors").write_bytes(b"half")

    def write(part: str) -> None:
        mapped(part, {"a": (3,)}, {})
        write_cached(tmp_path, "index/other.safetensors", lambda part: save_file({"b": torch.ones(2)}, part), 4)
        assert Path(part).is_file()
        save_file({"a": torch.zeros(3)}, part)
        write_cached(tmp_path, "index/other.safetensors", lambda part: save_file({"b": torch.ones(2)}, part), 4)
        assert Path(part).is_file()

    assert write_cached(tmp_path, "index/one.safetensors", write, 4) is not None
    assert {path.name for path in (tmp_path / "index").iterdir()} == {"one.safetensors", "other.safetensors"}


@pytest.mark.parametrize("text", ["[1]", "3", '{"a": null}', "{", ""])
def test_damaged_numbers_are_computed_anew(text: str, tmp_path: Path) -> None:
    (tmp_path / "weights.json").write_text(text)
    with pytest.warns(UserWarning, match="is damaged and computed anew"):
        assert read_cached(tmp_path / "weights.json", _numbers) is None
