"""What a dataset is: where its rows are shipped, in which shape, and what prompt and gold text are made of one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from logo.evaluation.metrics import Kind
from logo.evaluation.sources.fields import Field
from logo.evaluation.sources.templates import Template

SPLITS = ("test", "train")


@dataclass(frozen=True)
class Files:
    """Where the rows of one split lie below a root: the first of some patterns that matches, or a file per column."""

    patterns: tuple[str, ...] = ()
    columns: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return " or ".join(self.patterns) or ", ".join(self.columns.values())


@dataclass(frozen=True)
class Layout:
    """One shape in which a source ships its rows.

    Attributes:
        files: by split, "test" and perhaps "train".
        fields: by the name that templates use; a name that is not here is a column of the row.
        rows: the member of a JSON document that holds the list of rows, as a path.
        element: the XML element that is a row.
    """

    files: Mapping[str, Files]
    fields: Mapping[str, Field]
    rows: tuple[str, ...] = ()
    element: str | None = None


@dataclass(frozen=True)
class Hub:
    """A dataset repository on the Hub and what of it is used."""

    repo: str
    revision: str = "main"
    config: str = "default"
    splits: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Declaration:
    """One dataset.

    Attributes:
        layouts: how its rows are shipped, that of the Hub first.
        draw_by: what the seeded draw looks at; sets that share it draw the same instances.
        sha256: of the file it was read from.
    """

    name: str
    group: str
    metric: Kind
    licence: str
    homepage: str
    citation: str
    notes: str
    hub: Hub | None
    layouts: tuple[Layout, ...]
    context: Template
    completion: Template
    references: Template | None
    draw_by: Template
    sha256: str

    @property
    def source(self) -> str:
        """Where its rows come from, in short."""
        return self.hub.repo if self.hub is not None else self.homepage or "local files"


def usual_places(config: str, split: str) -> tuple[str, ...]:
    """Where Parquet files of a split lie in a repository: as `push_to_hub` writes them, or as the Hub converts them."""
    places = [f"{config}/{split}-*.parquet", f"{config}/{split}/*.parquet", f"{config}/*-{split}.parquet"]
    return (*places, f"data/{split}-*.parquet", f"{split}-*.parquet") if config == "default" else tuple(places)
