"""The repositories of an owner on the Hub, for `logo pool lock ORG/PREFIX*`."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase

from logo.adapters.places import Place
from logo.errors import HubError, UsageError
from logo.hub import hub_error, split_hub_spec

# The owner's name has no `*`, since it is looked up.
_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*/[A-Za-z0-9_.*-]+")


def list_repos(text: str) -> list[Place]:
    """The repositories that match `org/prefix-*[/folder]`, each at the commit of its main branch.

    Raises:
        UsageError: it is no such pattern.
        HubError: no repository matches, or the Hub cannot be reached.
    """
    from huggingface_hub import HfApi, constants

    parts = text.split("/")
    pattern, below = "/".join(parts[:2]), "/".join(parts[2:])
    if not _PATTERN.fullmatch(pattern) or "*" in below or "@" in text:
        raise UsageError(f"{text!r}: `*` stands for a part of the names of an owner's repositories (org/prefix*)")
    owner, _, name = pattern.partition("/")
    longest = max(name.split("*"), key=len)
    try:
        models = HfApi(library_name="logo").list_models(author=owner, search=longest or None, expand=["sha"])
        found = {one.id: one.sha for one in models if fnmatchcase(one.id, pattern)}
    except Exception as error:  # the boundary, as in `download_files`
        raise hub_error(pattern, error) from error
    if not found:
        raise HubError(
            f"Hub repos {pattern}: no repository at {constants.ENDPOINT} matches; check the name, and HF_TOKEN if they "
            "are private"
        )
    specs = (
        "/".join(filter(None, (repo, below))) + (f"@{found[repo]}" if found[repo] else "") for repo in sorted(found)
    )
    places = []
    for spec in specs:
        repo, folder, revision = split_hub_spec(spec)
        places.append(Place("repo", repo, folder or "", revision))
    return places
