"""The cache folder: whole files or none."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import SafetensorError

from logo.cache import read_cached, write_cached
from logo.selection.cache import _numbers


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


@pytest.mark.parametrize("text", ["[1]", "3", '{"a": null}', "{", ""])
def test_damaged_numbers_are_computed_anew(text: str, tmp_path: Path) -> None:
    (tmp_path / "weights.json").write_text(text)
    with pytest.warns(UserWarning, match="is damaged and computed anew"):
        assert read_cached(tmp_path / "weights.json", _numbers) is None
