"""`logo pool lock`: a pool as a manifest, with revisions and digests."""

from __future__ import annotations

import functools
import os
import re
from fnmatch import fnmatchcase
from pathlib import Path

from logo.adapters.adapter import Adapter
from logo.adapters.examples import examples_sha256
from logo.adapters.manifest import SUFFIXES, Entry, Manifest, is_line, read_manifest, write_manifest
from logo.adapters.pool import AdapterPool
from logo.adapters.sources import OnBadAdapter, Source, gather, parse_sources
from logo.cli.output import out, print_json
from logo.cli.pool.common import divided, fitting, refusals, tell_refused
from logo.errors import AdapterError, HubError, UsageError
from logo.files import locked
from logo.hub import hub_error


def lock(
    *sources: str,
    save: Path = Path("pool.yaml"),
    base_model: str | None = None,
    overwrite: bool = False,
    on_bad_adapter: OnBadAdapter = "error",
    json: bool = False,
) -> None:
    """Write a manifest of a pool: the source, the commit and the digests of each adapter.

    Opening the manifest (`--adapters pool.yaml`) gives the same adapters, or an error that names the change.

    Example: logo pool lock 'org/my-loras-*' --save pool.yaml --on-bad-adapter skip

    Args:
        sources: One or several sources, as `--adapters` takes them, or all repositories `org/prefix*` of an owner.
        save: The manifest to write, `.yaml`.
        base_model: Take only adapters that fit this base model (its configuration is enough).
        overwrite: Replace an existing manifest, but keep its k, where the source gives none, and its example prompts.
        on_bad_adapter: If an adapter cannot be used: refuse the pool, or skip the adapter.
        json: Print JSON instead.
    """
    if not sources:
        raise UsageError("no source: name a folder of adapters, a Hub repository or a manifest")
    if save.suffix not in SUFFIXES:
        raise UsageError(f"--save {save}: expected a name that ends with {' or '.join(SUFFIXES)}")
    if save.exists() and not overwrite:
        raise UsageError(f"--save {save}: exists already; choose another name, or add --overwrite")
    _manifest(save)  # one that cannot be read is refused before adapters are opened
    skip = on_bad_adapter == "skip"
    opened = [source for text in sources for source in _sources(text)]
    adapters, refused, k = gather(opened, skip=skip, verify=True if skip else None)
    good, bad = divided(adapters, functools.partial(_check_lines, manifest=save))
    if base_model is not None:
        good, misfits = divided(good, fitting(base_model))
        bad += misfits
    pool = AdapterPool.usable(",".join(sources), good, [*refused, *bad], on_bad_adapter, k)
    save.absolute().parent.mkdir(parents=True, exist_ok=True)
    with locked(save.absolute().parent):  # another process may have given examples meanwhile
        before = _manifest(save)
        entries = [_entry(adapter, save, before) for adapter in pool]
        write_manifest(save, Manifest(entries, before.k if k is None else k))
    if json:
        print_json({"file": str(save), "adapters": list(map(vars, entries)), "refused": refusals(pool.refused)})
        return
    tell_refused(pool.refused)
    commits = len({entry.revision for entry in entries if entry.revision})
    out.print(f"{save}: {len(entries)} adapters" + (f", {commits} commits" if commits else ""), markup=False)


def _manifest(file: Path) -> Manifest:
    """The manifest that is there; an empty one if there is none."""
    return read_manifest(file) if file.exists() else Manifest(())


def _check_lines(adapter: Adapter, manifest: Path) -> None:
    """Raises AdapterError if a manifest cannot hold the name or the source of an adapter."""
    for text in (adapter.name, _source(adapter, manifest)):
        if not is_line(text):
            raise AdapterError(adapter.name, f"a manifest cannot hold {text!r}: expected one line of printable text")


def _entry(adapter: Adapter, manifest: Path, before: Manifest) -> Entry:
    """The entry of an adapter, with the example prompts and the description that it had in the manifest before."""
    source = _source(adapter, manifest)
    earlier = _earlier(adapter.name, source, before)
    examples = earlier.examples
    if adapter.listed:
        examples = adapter.examples
    beside = examples_sha256(adapter.examples) if examples is None and adapter.examples else None
    return Entry(
        source=source,
        name=adapter.name,
        revision=adapter.revision,
        sha256=adapter.sha256,
        digest=adapter.digest,
        examples_sha256=beside,
        examples=examples,
        description=earlier.description or adapter.description,
    )


def _earlier(name: str, source: str, before: Manifest) -> Entry:
    """The entry of a manifest under a name, or else under a source; one that says nothing if there is none."""
    named = {entry.name or entry.source.removeprefix("./"): entry for entry in before.entries}
    return named.get(name) or named.get(source.removeprefix("./")) or Entry(source)


def _sources(text: str) -> list[Source]:
    if "*" in text and not os.path.exists(text):
        return _repositories(text)
    return list(parse_sources(text))


def _source(adapter: Adapter, file: Path) -> str:
    """The source of an adapter as a manifest writes it; folders are relative to the manifest, to move with it."""
    if adapter.source is not None:
        return adapter.source
    path = os.path.relpath(adapter.folder.absolute(), file.absolute().parent)
    return path if path.startswith(".") else f"./{path}"


def _repositories(text: str) -> list[Source]:
    """The repositories that match `org/prefix-*`, each at the commit of its main branch.

    Raises UsageError if it is no such pattern, and HubError if none matches or the Hub cannot be reached.
    """
    from huggingface_hub import HfApi

    owner, _, name = text.partition("/")
    if not re.fullmatch(r"[A-Za-z0-9_.-]+/[A-Za-z0-9_.*-]+", text):
        raise UsageError(f"{text!r}: `*` stands for a part of the names of an owner's repositories (org/prefix*)")
    try:
        longest = max(name.split("*"), key=len) or None
        models = HfApi(library_name="logo").list_models(author=owner, search=longest, expand=["sha"])
        commits = {model.id: model.sha for model in models if fnmatchcase(model.id, text)}
    except Exception as error:  # the boundary, as in `download_files`
        raise hub_error(text, error) from error
    if not commits:
        raise HubError(f"Hub repos {text}: no repository matches; check the name, and HF_TOKEN if they are private")
    return [Source("repo", repo, "", commits[repo]) for repo in sorted(commits)]
