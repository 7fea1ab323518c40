"""Declarations of datasets, read from small YAML files: source, columns, templates, licence.

Every value in such a file is text, a list or a mapping (`no` is the word no, `1` the character 1), nothing in it can
run code, and a key that is not known is an error. `docs/datasets.md` describes the keys; those of the official
datasets lie beside this module, in `files`.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from logo.errors import DataError, StorageError, UsageError, closest
from logo.evaluation.datasets import OFFICIAL, dataset_file
from logo.evaluation.metrics import KINDS, Kind, metric_kind
from logo.evaluation.sources.declarations import SPLITS, Declaration, Files, Hub, Layout, usual_places
from logo.evaluation.sources.fields import Field
from logo.evaluation.sources.templates import Template

FILES = Path(__file__).parent / "files"

_KEYS = (
    *("name", "group", "metric", "licence", "homepage", "citation", "notes"),
    *("source", "raw", "fields", "context", "completion", "references", "draw_by"),
)
_SOURCE_KEYS = ("repo", "revision", "config", "test", "train", "files", "rows", "element")
_RAW_KEYS = ("files", "rows", "element", "fields")
_FIELD_KEYS = ("from", "split", "pick", "position_in", "map", "each", "join")


@functools.cache
def packaged() -> Mapping[str, Declaration]:
    """The declarations that are part of the package, official names first."""
    found = {made.name: made for made in map(load_declaration, sorted(FILES.glob("*.yaml")))}
    order = [*OFFICIAL, *(name for name in found if name not in OFFICIAL)]
    return {name: found[name] for name in order}


def load_declaration(file: Path) -> Declaration:
    """Read and check one declaration.

    Raises:
        DataError: it is no YAML, or not such a file; the message names the key, what was expected and what was found.
        StorageError: it cannot be read.
    """
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{file}: expected a dataset's YAML file, found none; check the path") from None
    except OSError as error:
        raise StorageError(f"{file}: cannot be read ({error.strerror or error}); check its permissions") from error
    return _Reader(file).declaration(_parsed(file, content), hashlib.sha256(content).hexdigest())


def chosen(requests: Sequence[str], known: Collection[str]) -> list[str]:
    """Resolve names and patterns, also in comma-separated lists; none at all means every known name, in order.

    Raises:
        UsageError: a name or pattern that matches nothing, with the closest name.
    """
    items = [item.strip() for request in requests for item in request.split(",") if item.strip()]
    names: dict[str, None] = {}
    for item in items or ["*"]:
        found = [name for name in known if fnmatchcase(name, item)] or [
            name for name in known if name.partition(".")[0] == item
        ]
        if not found:
            raise UsageError(f"dataset {item!r}: not declared{closest(item, known)}; `logo data list` shows all")
        names |= dict.fromkeys(found)
    return list(names)


@dataclass(frozen=True)
class _Reader:
    """Reads the parts of one file, whose name every complaint starts with."""

    file: Path

    def declaration(self, values: Any, sha256: str) -> Declaration:
        top = self._keys("", values, _KEYS, needed=("name", "licence", "context", "completion"))
        name = self._text("name", top)
        try:
            dataset_file("", name)
        except DataError:
            raise self._wrong("name", "a name like 'mine.questions': folder, dot, sub-folder, no slash", name) from None
        fields = self._fields("fields", top.get("fields", {}))
        hub, layouts = self._hub(top, fields)
        raw = top.get("raw", [])
        for index, entry in enumerate(raw if isinstance(raw, list) else [raw]):
            layouts.append(self._layout(f"raw[{index}]", entry, fields))
        if not layouts:
            raise self._wrong("source", "'source' (a repository on the Hub), 'raw' (local files) or both", None)
        context = self._template("context", top)
        return Declaration(
            name=name,
            group=self._text("group", top, "own"),
            metric=self._metric(name, top),
            licence=self._text("licence", top),
            homepage=self._text("homepage", top, ""),
            citation=self._text("citation", top, ""),
            notes=self._text("notes", top, ""),
            hub=hub,
            layouts=tuple(layouts),
            context=context,
            completion=self._template("completion", top),
            references=self._template("references", top) if "references" in top else None,
            draw_by=self._template("draw_by", top) if "draw_by" in top else context,
            sha256=sha256,
        )

    def _metric(self, name: str, top: Mapping[str, Any]) -> Kind:
        text = self._text("metric", top, metric_kind(name))
        found = next((kind for kind in KINDS if text == kind), None)
        if found is None:
            raise self._wrong("metric", f"one of {', '.join(KINDS)}", text)
        return found

    def _hub(self, top: Mapping[str, Any], fields: Mapping[str, Field]) -> tuple[Hub | None, list[Layout]]:
        if "source" not in top:
            return None, []
        source = self._keys("source", top["source"], _SOURCE_KEYS, needed=("repo",))
        config = self._text("source.config", source, "default")
        splits = {split: self._text(f"source.{split}", source) for split in SPLITS if split in source}
        files = self._files("source.files", source.get("files", {}))
        files = {split: Files(usual_places(config, name)) for split, name in splits.items()} | files
        if "test" not in files:
            raise self._wrong("source.test", "the split whose rows become test rows", None)
        hub = Hub(self._text("source.repo", source), self._text("source.revision", source, "main"), config, splits)
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", hub.repo, re.ASCII):
            raise self._wrong("source.repo", "a repository on the Hub like 'org/name'", hub.repo)
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", hub.revision, re.ASCII) or ".." in hub.revision:
            raise self._wrong("source.revision", "a branch, tag or commit", hub.revision)
        return hub, [self._shape("source", source, files, fields)]

    def _layout(self, where: str, entry: Any, fields: Mapping[str, Field]) -> Layout:
        raw = self._keys(where, entry, _RAW_KEYS, needed=("files",))
        files = self._files(f"{where}.files", raw["files"])
        if "test" not in files:
            raise self._wrong(f"{where}.files", "the file 'test'", ", ".join(files))
        own = self._fields(f"{where}.fields", raw.get("fields", {}))
        return self._shape(where, raw, files, {**fields, **own})

    def _shape(
        self, where: str, values: Mapping[str, Any], files: Mapping[str, Files], fields: Mapping[str, Field]
    ) -> Layout:
        rows = tuple(self._text(f"{where}.rows", values).split(".")) if "rows" in values else ()
        element = self._text(f"{where}.element", values) if "element" in values else None
        return Layout(files, fields, rows, element)

    def _files(self, where: str, values: Any) -> dict[str, Files]:
        found = {}
        for split, places in self._keys(where, values, SPLITS).items():
            here = f"{where}.{split}"
            if isinstance(places, dict):
                found[split] = Files(columns={column: self._place(here, place) for column, place in places.items()})
            else:
                options = places if isinstance(places, list) else [places]
                found[split] = Files(tuple(self._place(here, place) for place in options))
            if not (found[split].patterns or found[split].columns):
                raise self._wrong(here, "a path or pattern", None)
        return found

    def _place(self, where: str, place: Any) -> str:
        parts = place.split("/") if isinstance(place, str) else []
        if not place or not parts or parts[0] == "" or ".." in parts or "\\" in place:
            raise self._wrong(where, "a path or pattern below the source's folder, like 'data/test-*.parquet'", place)
        return "/".join(parts)

    def _fields(self, where: str, values: Any) -> dict[str, Field]:
        if not isinstance(values, dict):
            raise self._wrong(where, "names and what they stand for", values)
        return {name: self._field(f"{where}.{name}", value) for name, value in values.items()}

    def _field(self, where: str, value: Any) -> Field:
        if isinstance(value, str):
            value = {"from": value}
        steps = self._keys(where, value, _FIELD_KEYS, needed=("from",))
        origin = steps["from"]
        paths = [self._path(f"{where}.from", path) for path in (origin if isinstance(origin, list) else [origin])]
        pick = self._text(f"{where}.pick", steps, "0")
        if not pick.isdigit() or not paths:
            raise self._wrong(f"{where}.pick" if paths else f"{where}.from", "the number of an item from 0", pick)
        words = steps.get("map")
        if words is not None and not (isinstance(words, dict) and all(isinstance(v, str) for v in words.values())):
            raise self._wrong(f"{where}.map", "pairs of a value and the word for it", words)
        return Field(
            paths=tuple(paths),
            split=self._text(f"{where}.split", steps, raw=True) if "split" in steps else None,
            pick=int(pick) if "pick" in steps else None,
            position_in=self._path(f"{where}.position_in", steps["position_in"]) if "position_in" in steps else None,
            map=words,
            each=self._template(f"{where}.each", steps) if "each" in steps else None,
            join=self._text(f"{where}.join", steps, raw=True) if "join" in steps else None,
        )

    def _path(self, where: str, value: Any) -> tuple[str, ...]:
        if not isinstance(value, str) or not all(value.split(".")):
            raise self._wrong(where, "a column, or a path like 'answer.aliases' or 'choices.*.text'", value)
        return tuple(value.split("."))

    def _template(self, where: str, values: Mapping[str, Any]) -> Template:
        text = self._text(where, values, raw=True)
        if not text.strip():
            raise self._wrong(where, "text with {fields} in it", text)
        try:
            return Template.parse(text)
        except ValueError as error:
            raise DataError(f"{self.file}: {where!r}: {error}") from None

    def _text(self, where: str, values: Mapping[str, Any], default: str | None = None, *, raw: bool = False) -> str:
        key = where.rpartition(".")[2]
        value = values.get(key, default)
        if not isinstance(value, str) or (key in values and not raw and not value.strip()):
            raise self._wrong(where, "text", value)
        return value if raw else value.strip()

    def _keys(self, where: str, values: Any, known: Sequence[str], needed: Collection[str] = ()) -> dict[str, Any]:
        if not isinstance(values, dict):
            raise self._wrong(where or "the file", f"the keys {', '.join(known)}", values)
        prefix = f"{where}." if where else ""
        for key in values:
            if key not in known:
                raise DataError(
                    f"{self.file}: {prefix + key!r}: no such key{closest(key, known)}; expected {', '.join(known)}"
                )
        for key in needed:
            if key not in values:
                raise DataError(f"{self.file}: {prefix + key!r}: expected this key, found only {', '.join(values)}")
        return values

    def _wrong(self, where: str, expected: str, found: Any) -> DataError:
        kind = "a mapping" if isinstance(found, dict) else "a list" if isinstance(found, list) else None
        shown = kind or (repr(found)[:60] if found else "nothing")
        return DataError(f"{self.file}: {where!r}: expected {expected}, found {shown}; mend the file")


def _parsed(file: Path, content: bytes) -> Any:
    import yaml

    class Loader(yaml.BaseLoader):  # type: ignore[misc]
        """Only text, lists and mappings; a key that stands twice is an error."""

    def mapping(loader: Any, node: Any) -> dict[str, Any]:
        pairs = [(loader.construct_object(key), loader.construct_object(value, deep=True)) for key, value in node.value]
        keys = [key for key, _ in pairs]
        for key in keys:
            if not isinstance(key, str) or keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", node.start_mark)
        return dict(pairs)

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        return yaml.load(content.decode("utf-8"), Loader)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file}: expected UTF-8, found other bytes at byte {error.start + 1}; save it as UTF-8"
        ) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or "not valid YAML"
        raise DataError(f"{file}{line}: not valid YAML: {problem}; mend the line") from None
    except RecursionError:
        raise DataError(f"{file}: not valid YAML: brackets nested without end; mend it") from None
