"""Where adapters lie, in words: what `--adapters` takes, read as places.

    adapters/                      a folder, with adapters at any depth
    pool.yaml                      a manifest (`manifest.py`)
    org/repo[/folder][@revision]   a Hub repository, or a folder in it
    org/prefix-*[/folder][@...]    every repository of this owner that is called so
    library/*/base/lora            of a folder or a repository, what lies so; `*` stands for a part of one name
    preset:lots-of-loras           a public pool by a short name (`presets.py`)

Several of them are written with commas between. Knows words only: nothing is fetched or opened here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from logo.adapters.presets import PREFIX, preset
from logo.errors import UsageError
from logo.hub.names import clean_subfolder, is_hub_spec, split_hub_spec

Kind = Literal["folder", "manifest", "repo", "repos"]

# A repository's name with `*` in it. It has to begin with the owner's name, which is looked up.
_REPOS = re.compile(r"(?P<owner>[A-Za-z0-9_][A-Za-z0-9_.-]*)/(?P<name>[A-Za-z0-9_.*-]+)")
SUFFIXES = (".yaml", ".yml")  # of manifests


@dataclass(frozen=True)
class Place:
    """One place where adapters lie.

    Attributes:
        kind: what it is; `"repos"`: all repositories whose id matches `source`.
        source: a path, or a repository's id; `*` in an id of `"repos"` only.
        below: a folder in it; may have `*`.
        revision: of a repository; None: its main branch.
    """

    kind: Kind
    source: str
    below: str = ""
    revision: str | None = None

    @property
    def on_hub(self) -> bool:
        """Whether it is not on this disk."""
        return self.kind in ("repo", "repos")

    @property
    def fixed(self) -> str:
        """The part of `below` in front of the first folder with a `*`."""
        parts = self.below.split("/")
        count = next((i for i, part in enumerate(parts) if "*" in part), len(parts))
        return "/".join(parts[:count])

    @property
    def plain(self) -> bool:
        """Whether there is no `*` in it."""
        return "*" not in self.below and self.kind != "repos"

    @property
    def spec(self) -> str:
        """What `parse_places` reads as this place, whatever the working directory is."""
        source = self.source if self.on_hub else str(Path(self.source).absolute())
        below = f"/{self.below}" if self.below else ""
        return f"{source}{below}{f'@{self.revision}' if self.revision else ''}"

    def of(self, repo: str) -> Place:
        """The same place in one of its repositories."""
        return replace(self, kind="repo", source=repo)

    def name(self, repo: str, path: str) -> str | None:
        """What an adapter is called that was found here: the parts of its path for which a `*` stands, and what is
        below the place; empty if that is nothing; None if it lies elsewhere.

        Args:
            repo: the repository in which it was found; for a folder, `source`.
            path: its folder below `repo`.
        """
        asked, found = [self.below], [path]
        if self.on_hub:
            asked, found = [self.source, self.below], [repo, path]
        pattern, whole = "/".join(filter(None, asked)), "/".join(filter(None, found))
        if not pattern:
            return whole
        match = re.fullmatch(re.escape(pattern).replace(r"\*", "([^/]*)") + "(?:/(.+))?", whole)
        return None if match is None else "/".join(filter(None, match.groups()))


def parse_places(texts: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> tuple[Place, ...]:
    """The places that a text means, or several texts.

    Raises:
        UsageError: a text means no place, or there is none.
    """
    if isinstance(texts, (str, os.PathLike)):
        text = os.fspath(texts)
        whole = os.path.exists(text) or not isinstance(texts, str)  # a folder may have a comma in its name
        parts = [text] if whole else [part.strip() for part in text.split(",")]
    else:
        parts = [os.fspath(text) for text in texts]
    if not parts or not all(parts):
        raise UsageError("no place with adapters: expected a folder, a manifest or a Hub repository; see --adapters")
    found = (place for part in parts for place in _places(part))
    return tuple(dict.fromkeys(found))


def places_text(places: Sequence[Place]) -> str:
    """What `parse_places` reads as these, whatever the working directory is."""
    return ",".join(place.spec for place in places)


def _places(text: str) -> Sequence[Place]:
    if text.startswith(PREFIX):
        return [place for one in preset(text.removeprefix(PREFIX)).places for place in _places(one)]
    if os.path.isfile(text):
        if not text.endswith(SUFFIXES):
            raise UsageError(f"{text}: expected a folder of adapters or a manifest (.yaml), found another file")
        return [Place("manifest", text)]
    if "*" in text and not os.path.isdir(text):
        return [_pattern(text)]
    if is_hub_spec(text):
        repo, below, revision = split_hub_spec(text)
        return [Place("repo", repo, below or "", revision)]
    return [Place("folder", text)]


def _pattern(text: str) -> Place:
    """A place with `*`: in a folder, if what is in front of it is one here or is written as a path; else on the Hub."""
    parts = text.split("/")
    count = next(i for i, part in enumerate(parts) if "*" in part)
    front = "/".join(parts[:count]) or ("/" if text.startswith("/") else ".")
    if parts[0] in ("", ".", "..", "~") or (count and os.path.isdir(front)):
        return Place("folder", front, "/".join(parts[count:]))
    place, at, revision = text.partition("@")
    parts = place.split("/")
    head, rest = "/".join(parts[:2]), "/".join(parts[2:])
    if count == 0 or not _REPOS.fullmatch(head) or "@" in revision or (at and not revision):
        raise UsageError(
            f"{text!r}: `*` may stand in the names of an owner's repositories or in folders below a repository "
            "(org/prefix-*[/folder][@revision]), or below a folder that exists (./*/lora)"
        )
    below = clean_subfolder(head, rest)
    if "*" in head:
        split_hub_spec(f"{head.replace('*', 'x')}{at}{revision}")  # refuses names and revisions that cannot be
        return Place("repos", head, below, revision or None)
    repo, _, at_revision = split_hub_spec(f"{head}{at}{revision}")
    return Place("repo", repo, below, at_revision)
