"""Declarations of datasets, read from small YAML files: where the rows are, and templates of prompts and gold texts.

Every value in such a file is text or a mapping of texts (`no` is the word no, `1` the character 1), nothing in it can
run code, and a key that is not known is an error. `Declaration` and `DatasetOrigin` describe the keys; the declarations
of this package are beside this module, in `files`.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from logo.errors import DataError, StorageError, UsageError, closest
from logo.evaluation.datasets import OFFICIAL, dataset_file
from logo.evaluation.metrics import Kind, checked_kind, metric_kind

FILES = Path(__file__).parent / "files"
SPLITS = ("test", "train")


@dataclass(frozen=True)
class DatasetOrigin:
    """Where a dataset's rows are: the key `source` of a declaration.

    Attributes:
        repo: a dataset repository on the Hub, or a local folder, which begins with `.` or `/`.
        test: the split whose rows become test rows, or the path of its file; `train` likewise, "": no train rows.
        revision: of the repository.
        config: its configuration.
    """

    repo: str
    test: str
    train: str = ""
    revision: str = "main"
    config: str = "default"

    @property
    def is_local(self) -> bool:
        """Whether it is a folder on this machine."""
        return self.repo.startswith((".", "/"))

    def files(self, split: str) -> tuple[str, ...]:
        """Patterns of a split's files, of which the first that matches is used: its own path, or where `push_to_hub`
        and the Hub's conversion to Parquet put them."""
        name = getattr(self, split)
        if Path(name).suffix:
            return (name,)
        config = self.config
        places = (f"{config}/{name}-*.parquet", f"{config}/{name}/*.parquet", f"{config}/*-{name}.parquet")
        return (*places, f"data/{name}-*.parquet", f"{name}-*.parquet") if config == "default" else places


@dataclass(frozen=True)
class Declaration:
    """One dataset.

    Attributes:
        context, completion: Jinja2 templates of the prompt and the gold text.
        references: a template of further gold texts; "": none.
        draw_by: a template of what the seeded draw looks at, "": the prompt; datasets that share it draw the same rows.
        fields: Jinja2 expressions by the name that templates use; a name that is not here is a column of the row.
        metric: "": by the dataset's name.
        sha256: of the file that it was read from.
    """

    name: str
    licence: str
    source: DatasetOrigin
    context: str
    completion: str
    references: str = ""
    draw_by: str = ""
    fields: Mapping[str, str] = field(default_factory=dict)
    metric: Kind = ""
    group: str = "own"
    homepage: str = ""
    citation: str = ""
    notes: str = ""
    sha256: str = ""


@functools.cache
def packaged() -> Mapping[str, Declaration]:
    """The declarations that are part of the package, official names first."""
    by_name = {declaration.name: declaration for declaration in map(load_declaration, sorted(FILES.glob("*.yaml")))}
    order = [*OFFICIAL, *(name for name in by_name if name not in OFFICIAL)]
    return {name: by_name[name] for name in order}


def load_declaration(file: Path) -> Declaration:
    """Read and check one declaration. Its templates are compiled when rows are made.

    Raises:
        DataError: it is no YAML, or no declaration; the message names the key, what was expected and what was found.
        StorageError: it cannot be read.
    """
    import yaml

    try:
        content = file.read_bytes()
        value = yaml.load(content, yaml.BaseLoader)
    except OSError as error:
        raise StorageError(f"{file}: cannot be read ({error.strerror or error}); check the path") from error
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        problem = f"{getattr(error, 'problem', None)} (line {mark.line + 1})" if mark else type(error).__name__
        raise DataError(f"{file}: expected YAML in UTF-8, found {problem}; fix the file") from None
    try:
        return _declared(value, file.parent, hashlib.sha256(content).hexdigest())
    except (DataError, UsageError) as error:
        raise DataError(f"{file}: {error}; fix the file") from None


def _declared(value: Any, folder: Path, sha256: str) -> Declaration:
    """The declaration in the content of a file in this folder; errors without the file's name."""
    keys = _checked("", value, Declaration)
    origin = DatasetOrigin(**_checked("source.", keys["source"], DatasetOrigin))
    for split in SPLITS:
        path = getattr(origin, split)
        if path.startswith("/"):
            raise DataError(f"source.{split}: expected a split, or a path below source.repo, found {path!r}")
    if origin.is_local:
        origin = replace(origin, repo=str((folder / origin.repo).absolute()))
    dataset_file("", keys["name"])
    metric = checked_kind(keys.get("metric", metric_kind(keys["name"])), "metric")
    usual = {"draw_by": keys["context"]}
    return Declaration(**{**usual, **keys, "source": origin, "metric": metric, "sha256": sha256})


def _checked(where: str, value: Any, kind: type) -> dict[str, Any]:
    """The keys of a mapping as the arguments of a dataclass: all that it needs, none that it does not know, each a text
    except for `source` and `fields`, which are mappings of texts."""
    is_needed = {
        key.name: key.default is key.default_factory is MISSING for key in fields(kind) if key.name != "sha256"
    }
    if not isinstance(value, dict):
        raise DataError(f"{where}expected the keys {', '.join(is_needed)}, found {value!r:.60}")
    for key, inner in value.items():
        if key not in is_needed:
            raise DataError(f"{where}{key}: expected one of {', '.join(is_needed)}{closest(key, is_needed)}")
        nested = key in ("fields", "source")
        texts = inner.values() if nested and isinstance(inner, dict) else [None if nested else inner]
        if not all(isinstance(text, str) and text.strip() for text in texts):
            expected = "a mapping of names to texts" if nested else "text"
            raise DataError(f"{where}{key}: expected {expected}, found {inner!r:.60}")
    missing = [key for key, needed in is_needed.items() if needed and key not in value]
    if missing:
        raise DataError(f"{where}{missing[0]}: expected this key beside {', '.join(value)}, found none")
    return value
