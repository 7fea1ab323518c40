"""What `--adapters` takes, read as places: words only."""

from __future__ import annotations

from pathlib import Path

import pytest

from logo.adapters.sources import Source, parse_sources, spec_of
from logo.errors import UsageError


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ("org/repo", [Source("repo", "org/repo")]),
        ("org/repo/tasks/a@refs/pr/4", [Source("repo", "org/repo", "tasks/a", "refs/pr/4")]),
        ("here", [Source("folder", "here")]),
        ("gone", [Source("folder", "gone")]),
        ("pool.yaml", [Source("manifest", "pool.yaml")]),
        (
            "here, org/a,org/b@v1",
            [Source("folder", "here"), Source("repo", "org/a"), Source("repo", "org/b", "", "v1")],
        ),
        ("org/a,org/a", [Source("repo", "org/a")]),
        ("a,b", [Source("folder", "a,b")]),  # a folder is called so
    ],
)
def test_places(text: str, places: list[Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "a,b").mkdir()
    (tmp_path / "pool.yaml").write_text("adapters: [here]")
    found = parse_sources(text)
    assert list(found) == places
    text = spec_of(found)
    monkeypatch.chdir(tmp_path / "here")  # where it means the same
    (tmp_path / "here" / "here").mkdir()
    again = parse_sources(text)
    assert [(p.kind, p.below, p.revision) for p in again] == [(p.kind, p.below, p.revision) for p in found]
    assert [p.where for p in again] == [p.where if p.on_hub else str(tmp_path / Path(p.where)) for p in found]


def test_several_places_may_come_as_a_list(tmp_path: Path) -> None:
    assert parse_sources(["org/a", tmp_path]) == (Source("repo", "org/a"), Source("folder", str(tmp_path)))
    assert parse_sources(tmp_path) == (Source("folder", str(tmp_path)),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no source of adapters"),
        ("a,,b", "no source of adapters"),
        ("org/prefix-*", r"`logo pool lock 'org/prefix-\*'` lists the repositories of an owner"),
        ("org/a@../x", "is not a branch"),
        ("notes.txt", "found another file"),
    ],
)
def test_what_is_no_place_is_said_in_a_line(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("adapters")
    with pytest.raises(UsageError, match=message) as caught:
        parse_sources(text)
    assert "\n" not in str(caught.value)
