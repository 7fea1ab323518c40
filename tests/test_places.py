"""What `--adapters` takes, read as places: words only."""

from __future__ import annotations

from pathlib import Path

import pytest

from logo.adapters.places import Place, parse_places, places_text
from logo.errors import UsageError


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ("org/repo", [Place("repo", "org/repo")]),
        ("org/repo/tasks/a@refs/pr/4", [Place("repo", "org/repo", "tasks/a", "refs/pr/4")]),
        ("here", [Place("folder", "here")]),
        ("gone", [Place("folder", "gone")]),
        ("pool.yaml", [Place("manifest", "pool.yaml")]),
        ("here, org/a,org/b@v1", [Place("folder", "here"), Place("repo", "org/a"), Place("repo", "org/b", "", "v1")]),
        ("org/a,org/a", [Place("repo", "org/a")]),
        ("a,b", [Place("folder", "a,b")]),  # a folder is called so
        ("gone,a,b, here", [Place("folder", "gone"), Place("folder", "a,b"), Place("folder", "here")]),
    ],
)
def test_places(text: str, places: list[Place], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "a,b").mkdir()
    (tmp_path / "pool.yaml").write_text("adapters: [here]")
    found = parse_places(text)
    assert list(found) == places
    text = places_text(found)
    monkeypatch.chdir(tmp_path / "here")  # where it means the same
    (tmp_path / "here" / "here").mkdir()
    again = parse_places(text)
    assert [(p.kind, p.below, p.revision) for p in again] == [(p.kind, p.below, p.revision) for p in found]
    assert [p.source for p in again] == [p.source if p.on_hub else str(tmp_path / Path(p.source)) for p in found]


def test_several_places_may_come_as_a_list(tmp_path: Path) -> None:
    assert parse_places(["org/a", tmp_path]) == (Place("repo", "org/a"), Place("folder", str(tmp_path)))
    assert parse_places(tmp_path) == (Place("folder", str(tmp_path)),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no place with adapters"),
        ("a,,b", "no place with adapters"),
        ("org/prefix-*", r"`logo pool lock 'org/prefix-\*'` lists those of an owner in a manifest"),
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
        parse_places(text)
    assert "\n" not in str(caught.value)
