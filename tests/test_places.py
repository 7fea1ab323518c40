"""What `--adapters` takes, read as places: words only."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from logo.adapters.places import Place, parse_places, places_text
from logo.adapters.presets import PRESETS
from logo.errors import UsageError


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ("org/repo", [Place("repo", "org/repo")]),
        ("org/repo/tasks/a@refs/pr/4", [Place("repo", "org/repo", "tasks/a", "refs/pr/4")]),
        ("org/prefix-*", [Place("repos", "org/prefix-*")]),
        ("org/*-lora/default@v2", [Place("repos", "org/*-lora", "default", "v2")]),
        ("org/library/*/base/lora", [Place("repo", "org/library", "*/base/lora")]),
        ("here/*/lora", [Place("folder", "here", "*/lora")]),
        ("./gone/*", [Place("folder", "./gone", "*")]),
        ("here", [Place("folder", "here")]),
        ("gone", [Place("folder", "gone")]),
        ("pool.yaml", [Place("manifest", "pool.yaml")]),
        ("here, org/a,org/b-*", [Place("folder", "here"), Place("repo", "org/a"), Place("repos", "org/b-*")]),
        ("org/a,org/a", [Place("repo", "org/a")]),
        ("a,b", [Place("folder", "a,b")]),  # a folder is called so
        ("gone,a,b, here", [Place("folder", "gone"), Place("folder", "a,b"), Place("folder", "here")]),
        ("here/*/x,a,b/*", [Place("folder", "here", "*/x"), Place("folder", "a,b", "*")]),
        ("preset:lots-of-loras", [Place("repos", "Lots-of-LoRAs/Mistral-7B-Instruct-v0.2-4b-r16-task*")]),
        ("preset:granite-rag,here", [Place("repo", "ibm-granite/granitelib-rag-r1.0"), Place("folder", "here")]),
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
        ("x-*", "below a folder that exists"),
        ("*/repo", "below a folder that exists"),
        ("org/a*@v1@v2", "below a folder that exists"),
        ("org/a*@", "below a folder that exists"),
        ("org/a b*", "below a folder that exists"),
        ("org/..*", "neither a folder"),
        ("org/a*/../b", "is not a folder inside it"),
        ("org/a*@../x", "is not a branch"),
        ("notes.txt", "found another file"),
        ("preset:lotsofloras", "did you mean 'lots-of-loras'"),
        ("preset:lorahub", "encoder-decoder"),
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


def test_every_preset_is_a_place_on_the_hub() -> None:
    for name, preset in PRESETS.items():
        for text in preset.places:
            assert all(place.on_hub for place in parse_places(text)), name


WORD = st.text("abc-", min_size=1, max_size=4).filter(lambda text: text.strip("-") == text and "--" not in text)


@given(st.lists(st.tuples(WORD, st.booleans()), min_size=1, max_size=4), st.lists(WORD, max_size=2))
def test_an_adapter_is_called_after_what_the_stars_stand_for(parts: list[tuple[str, bool]], below: list[str]) -> None:
    pattern = "/".join("*" if star else word for word, star in parts)
    path = "/".join([*(word for word, _ in parts), *below])
    place = Place("repo", "org/repo", pattern)
    assert place.name("org/repo", path) == "/".join([*(word for word, star in parts if star), *below])
    assert place.name("org/another", path) is None


@given(st.lists(WORD, min_size=2, max_size=8, unique=True))
def test_no_two_repositories_of_one_place_have_one_name(words: list[str]) -> None:
    place = Place("repos", "org/a-*")
    names = [place.name(f"org/a-{word}", "") for word in words]
    assert names == words
    assert place.name("org/b-x", "") is None
