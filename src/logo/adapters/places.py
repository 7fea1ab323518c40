"""`Place`: where adapters are; parses what `--adapters` takes.

    adapters/                      a folder, with adapters at any depth
    pool.yaml                      a manifest (`manifest.py`)
    org/repo[/folder][@revision]   a Hub repository, or a folder in it
    org/prefix-*[/folder][@...]    every repository of this owner with such a name
    library/*/base/lora            matching folders below a folder or in a repository; `*` stands for part of one name
    preset:lots-of-loras           a public pool by a short name (`presets.py`)

Several are separated by commas. Nothing is downloaded or opened here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from logo.adapters.presets import PREFIX, preset
from logo.errors import UsageError, check_type
from logo.hub.names import clean_subfolder, is_hub_spec, split_hub_spec

Kind = Literal["folder", "manifest", "repo", "repos"]

# A repository's name with `*` in it. The owner's name has no `*`, since it is looked up.
_REPOS = re.compile(r"(?P<owner>[A-Za-z0-9_][A-Za-z0-9_.-]*)/(?P<name>[A-Za-z0-9_.*-]+)")
SUFFIXES = (".yaml", ".yml")  # of manifests


@dataclass(frozen=True)
class Place:
    """One place with adapters.

    Attributes:
        kind: `"repos"` stands for all repositories whose id matches `source`.
        source: a path, or the id of a repository, which has a `*` for `"repos"` only.
        below: a folder in it, which may have a `*`.
        revision: of a repository; None: its main branch.
    """

    kind: Kind
    source: str
    below: str = ""
    revision: str | None = None

    @property
    def on_hub(self) -> bool:
        """Whether the place is on the Hub."""
        return self.kind in ("repo", "repos")

    @property
    def fixed(self) -> str:
        """The part of `below` before the first folder with a `*`."""
        parts = self.below.split("/")
        count = next((i for i, part in enumerate(parts) if "*" in part), len(parts))
        return "/".join(parts[:count])

    @property
    def plain(self) -> bool:
        """Whether the place has no `*`."""
        return "*" not in self.below and self.kind != "repos"

    @property
    def spec(self) -> str:
        """The text that `parse_places` reads as this place in any working directory."""
        source = self.source if self.on_hub else str(Path(self.source).absolute())
        below = f"/{self.below}" if self.below else ""
        return f"{source}{below}{f'@{self.revision}' if self.revision else ''}"

    def of(self, repo: str) -> Place:
        """The same place in one of its repositories."""
        return replace(self, kind="repo", source=repo)

    def name(self, repo: str, path: str) -> str | None:
        """The name of an adapter that was found here: the parts of its path for which a `*` stands, and the path below
        the place. It may be empty; None if the adapter is not in this place.

        Args:
            repo: the repository of the adapter; for a folder, `source`.
            path: the adapter's folder below `repo`.
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
    """Parses one text, which may name several places, or several texts.

    Raises:
        UsageError: a text names no place, or something else is given than texts.
    """
    expected = "a folder, a manifest or a Hub repository, or a list of these"
    check_type("pool", texts, (str, os.PathLike, Iterable), expected)
    if isinstance(texts, (str, os.PathLike)):
        text = os.fspath(texts)
        parts = _split(text) if isinstance(texts, str) else [text]
    else:
        parts = []
        for one in texts:
            check_type("pool", one, (str, os.PathLike), expected)
            parts.append(os.fspath(one))
    if not parts or not all(parts):
        raise UsageError("no place with adapters: expected a folder, a manifest or a Hub repository; see --adapters")
    found = (place for part in parts for place in _places(part))
    return tuple(dict.fromkeys(found))


def _split(text: str) -> list[str]:
    """The places in a text, separated by commas, which names of folders and files may have, too."""
    pieces, parts = text.split(","), []
    while pieces:
        most = len(pieces) if _has_comma(pieces[0]) else 1
        count = next((n for n in range(most, 1, -1) if _is_here(",".join(pieces[:n]))), 1)
        parts.append(",".join(pieces[:count]).strip())
        pieces = pieces[count:]
    return parts


def _has_comma(beginning: str) -> bool:
    """Whether the name of a folder or file goes on with a comma after this beginning of a place."""
    folder, name = os.path.split(beginning.lstrip())
    try:
        return any(found.startswith(f"{name},") for found in os.listdir(folder or os.curdir))
    except OSError:
        return False


def _is_here(text: str) -> bool:
    """Whether a text is a path, or one followed by folders with a `*`, that exists."""
    front, star, rest = text.strip().partition("*")
    return os.path.exists(os.path.dirname(front) if star and "," not in rest else text.strip())


def places_text(places: Sequence[Place]) -> str:
    """The text that `parse_places` reads as these places in any working directory."""
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
    """A place with a `*`: below a folder, if the part before it is one or is written as a path; else on the Hub."""
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
            f"{text!r}: `*` may be in the names of an owner's repositories or in folders below a repository "
            "(org/prefix-*[/folder][@revision]), or below a folder that exists (./*/lora)"
        )
    below = clean_subfolder(head, rest)
    if "*" in head:
        split_hub_spec(f"{head.replace('*', 'x')}{at}{revision}")  # refuses names and revisions that cannot be
        return Place("repos", head, below, revision or None)
    repo, _, at_revision = split_hub_spec(f"{head}{at}{revision}")
    return Place("repo", repo, below, at_revision)
