"""Declarations of datasets, read from small YAML files: source, columns, templates, licence.

Every value in such a file is text, a list or a mapping (`no` is the word no, `1` the character 1), nothing in it can
run code, and a key that is not known is an error. `docs/datasets.md` describes the keys; those of the official
datasets are beside this module, in `files`.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from logo.errors import DataError, StorageError, UsageError, closest
from logo.evaluation.datasets import OFFICIAL, dataset_file
from logo.evaluation.metrics import METRICS, checked_kind, metric_kind
from logo.evaluation.sources.declarations import SPLITS, Declaration, Hub, Layout, usual_places

FILES = Path(__file__).parent / "files"


@functools.cache
def packaged() -> Mapping[str, Declaration]:
    """The declarations that are part of the package, official names first."""
    found = {made.name: made for made in map(load_declaration, sorted(FILES.glob("*.yaml")))}
    order = [*OFFICIAL, *(name for name in found if name not in OFFICIAL)]
    return {name: found[name] for name in order}


def load_declaration(file: Path) -> Declaration:
    """Read and check one declaration. Its templates are compiled when rows are made.

    Raises:
        DataError: it is no YAML, or no declaration; the message names the key, what was expected and what was found.
        StorageError: it cannot be read.
    """
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{file}: expected a dataset's YAML file, found none; check the path") from None
    except OSError as error:
        raise StorageError(f"{file}: cannot be read ({error.strerror or error}); check its permissions") from error
    try:
        return _declaration(_checked("", _parsed(content), _SHAPE), hashlib.sha256(content).hexdigest())
    except _Wrong as wrong:
        raise DataError(f"{file}: {wrong}; fix the file") from None


def chosen(requests: Sequence[str], known: Collection[str]) -> list[str]:
    """Resolve names and patterns, also in comma-separated lists; none at all means every known name, in order.

    Raises:
        UsageError: a name or pattern that matches nothing, with the closest name.
    """
    names: dict[str, None] = {}
    for item in [item.strip() for request in requests for item in request.split(",") if item.strip()] or ["*"]:
        found = [name for name in known if fnmatchcase(name, item) or name.partition(".")[0] == item]
        if not found:
            raise UsageError(f"dataset {item!r}: not declared{closest(item, known)}; `logo data list` shows all")
        names |= dict.fromkeys(found)
    return list(names)


def _declaration(top: dict[str, Any], sha256: str) -> Declaration:
    hub, files = None, top.get("raw", {})
    if ("source" in top) == ("raw" in top):
        raise _Wrong("source", "either 'source' (a repository on the Hub) or 'raw' (local files)", None)
    if source := top.get("source"):
        hub = Hub(**{key: source[key] for key in ("repo", "revision", "config") if key in source})
        files = {split: usual_places(hub.config, source[split]) for split in SPLITS if split in source}
        files |= source.get("files", {})
        if "test" not in files:
            raise _Wrong("source.test", "the split whose rows become test rows", None)
    templates = {key: top[key] for key in ("context", "completion", "references") if key in top}
    return Declaration(
        name=top["name"],
        metric=top.get("metric", metric_kind(top["name"])),
        group=top.get("group", "own"),
        **{key: top.get(key, "") for key in ("licence", "homepage", "citation", "notes")},
        hub=hub,
        layout=Layout(files, top.get("fields", {})),
        templates=templates | {"draw_by": top.get("draw_by", top["context"])},
        sha256=sha256,
    )


class _Wrong(ValueError):
    """A declaration has something else than what was expected."""

    def __init__(self, where: str, expected: str, found: Any) -> None:
        kind = "a mapping" if isinstance(found, dict) else "a list" if isinstance(found, list) else None
        shown = kind or (f"{found!r:.60}" if found else "nothing")
        super().__init__(f"{f'{where!r}: ' if where else ''}expected {expected}, found {shown}")


_Check = Callable[[str, Any], Any]


def _checked(where: str, value: Any, shape: dict[str, Any] | _Check) -> Any:
    """A value that has its shape: what a function accepts, or a mapping with these keys ("key!" has to be there)."""
    if not isinstance(shape, dict):
        return shape(where, value)
    shapes = {key.rstrip("!"): inner for key, inner in shape.items()}
    if not isinstance(value, dict):
        raise _Wrong(where, f"the keys {', '.join(shapes)}", value)
    prefix = f"{where}." if where else ""
    for key in value:
        if key not in shapes:
            raise _Wrong(where, f"the keys {', '.join(shapes)}{closest(key, shapes)}", key)
    for key in shape:
        if key.endswith("!") and key.rstrip("!") not in value:
            raise _Wrong(f"{prefix}{key.rstrip('!')}", f"this key beside {', '.join(value)}", None)
    return {key: _checked(f"{prefix}{key}", inner, shapes[key]) for key, inner in value.items()}


def _text(where: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise _Wrong(where, "text", value)
    return value.strip()


def _metric(where: str, value: Any) -> str:
    try:
        return checked_kind(value, where)
    except UsageError:
        raise _Wrong(where, f"one of {', '.join(METRICS)}", value) from None


def _name(where: str, value: Any) -> str:
    try:
        dataset_file("", name := _text(where, value))
    except DataError:
        raise _Wrong(where, "a name like 'mine.questions': folder, dot, sub-folder, no slash", value) from None
    return name


def _template(where: str, value: Any) -> str:
    _text(where, value)
    return str(value)


def _places(where: str, value: Any) -> tuple[str, ...]:
    each = value if isinstance(value, list) else [value]
    for place in each or [None]:
        parts = place.split("/") if isinstance(place, str) else [""]
        if parts[0] == "" or ".." in parts or "\\" in place:
            raise _Wrong(where, "a path or pattern below the source's folder", place)
    return tuple(each)


def _fields(where: str, value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise _Wrong(where, "names and the Jinja2 expressions they stand for", value)
    return {name: _text(f"{where}.{name}", expression) for name, expression in value.items()}


_SHAPE: dict[str, Any] = {
    "name!": _name,
    "metric": _metric,
    "licence!": _text,
    **dict.fromkeys(("group", "homepage", "citation", "notes"), _text),
    "source": {
        **dict.fromkeys(("repo!", "revision", "config", *SPLITS), _text),
        "files": dict.fromkeys(SPLITS, _places),
    },
    "raw": {"test!": _places, "train": _places},
    "fields": _fields,
    **dict.fromkeys(("context!", "completion!", "references", "draw_by"), _template),
}


def _parsed(content: bytes) -> Any:
    import yaml

    class Loader(yaml.BaseLoader):  # type: ignore[misc]
        """Only text, lists and mappings; a repeated key is an error."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [key.value for key, _ in node.value]
            for key in keys:
                if not isinstance(key, str) or keys.count(key) > 1:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key!r} occurs twice", node.start_mark
                    )
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(content.decode("utf-8"), Loader)
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or type(error).__name__
        raise _Wrong("", "YAML in UTF-8", problem + (f" (line {mark.line + 1})" if mark else "")) from None
