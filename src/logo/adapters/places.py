"""`Place`: where adapters are; parses what `--adapters` takes.

    adapters/                      a folder, with adapters at any depth
    pool.yaml                      a manifest (`manifest.py`)
    org/repo[/folder][@revision]   a Hub repository, or a folder in it

Several are separated by commas. Nothing is downloaded or opened here.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from logo.errors import UsageError, check_type
from logo.hub import is_hub_spec, split_hub_spec

Kind = Literal["folder", "manifest", "repo"]

SUFFIXES = (".yaml", ".yml")  # of manifests
_COMMAS = 3  # the most in the name of a folder


@dataclass(frozen=True)
class Place:
    """One place with adapters.

    Attributes:
        kind: what it is.
        source: a path, or the id of a repository.
        below: a folder in a repository; empty: all of it.
        revision: of a repository; None: its main branch.
    """

    kind: Kind
    source: str
    below: str = ""
    revision: str | None = None

    @property
    def on_hub(self) -> bool:
        """Whether the place is on the Hub."""
        return self.kind == "repo"

    @property
    def spec(self) -> str:
        """The text that `parse_places` reads as this place in any working directory."""
        source = self.source if self.on_hub else str(Path(self.source).absolute())
        below = f"/{self.below}" if self.below else ""
        return f"{source}{below}{f'@{self.revision}' if self.revision else ''}"


def parse_places(texts: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> tuple[Place, ...]:
    """Parses one text, which may name several places, or several texts.

    Raises:
        UsageError: a text names no place, or something else is given than texts.
    """
    expected = "a folder, a manifest or a Hub repository, or a list of these"
    check_type("pool", texts, (str, os.PathLike, Iterable), expected)
    if isinstance(texts, (str, os.PathLike)):
        parts = _split(texts) if isinstance(texts, str) else [os.fspath(texts)]
    else:
        parts = []
        for one in texts:
            check_type("pool", one, (str, os.PathLike), expected)
            parts.append(os.fspath(one))
    if not parts or not all(parts):
        raise UsageError("no place with adapters: expected a folder, a manifest or a Hub repository; see --adapters")
    return tuple(dict.fromkeys(map(_place, parts)))


def _split(text: str) -> list[str]:
    """The places in a text, separated by commas, which names of folders and files may have, too."""
    pieces, parts = text.split(","), []
    while pieces:
        counts = range(min(_COMMAS + 1, len(pieces)), 1, -1)
        count = next((n for n in counts if os.path.exists(",".join(pieces[:n]).strip())), 1)
        parts.append(",".join(pieces[:count]).strip())
        pieces = pieces[count:]
    return parts


def places_text(places: Sequence[Place]) -> str:
    """The text that `parse_places` reads as these places in any working directory."""
    return ",".join(place.spec for place in places)


def _place(text: str) -> Place:
    if os.path.isfile(text):
        if not text.endswith(SUFFIXES):
            raise UsageError(f"{text}: expected a folder of adapters or a manifest (.yaml), found another file")
        return Place("manifest", text)
    if "*" in text and not os.path.isdir(text):
        raise UsageError(
            f"{text!r}: a pool is opened from repositories by name; `logo pool lock {text!r}` lists those of an owner "
            "in a manifest, which can be opened"
        )
    if is_hub_spec(text):
        repo, below, revision = split_hub_spec(text)
        return Place("repo", repo, below or "", revision)
    return Place("folder", text)
