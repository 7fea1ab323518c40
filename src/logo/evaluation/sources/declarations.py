"""Declarations of datasets: where the rows are, in which form, and how prompt and gold text are made from a row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from logo.evaluation.metrics import Kind

SPLITS = ("test", "train")

Files = tuple[str, ...]
"""The files of a split below a root: patterns, of which the first that matches is used."""


@dataclass(frozen=True)
class Layout:
    """How a source ships its rows.

    Attributes:
        files: by split, "test" and perhaps "train".
        fields: Jinja2 expressions by the name that templates use; a name that is not here is a column of the row.
    """

    files: Mapping[str, Files]
    fields: Mapping[str, str]


@dataclass(frozen=True)
class Hub:
    """A dataset repository on the Hub, with the revision and the configuration that are used."""

    repo: str
    revision: str = "main"
    config: str = "default"


@dataclass(frozen=True)
class Declaration:
    """One dataset.

    Attributes:
        hub: where its files are; None: only in local folders.
        layout: how its rows are shipped.
        templates: Jinja2 templates: "context", "completion", "draw_by" (what the seeded draw looks at; datasets that
            share it draw the same instances) and perhaps "references".
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
    layout: Layout
    templates: Mapping[str, str]
    sha256: str

    @property
    def source(self) -> str:
        """Where its rows come from, in short."""
        return self.hub.repo if self.hub is not None else self.homepage or "local files"


def usual_places(config: str, split: str) -> tuple[str, ...]:
    """Where Parquet files of a split are in a repository: as `push_to_hub` writes them, or as the Hub converts them."""
    places = (f"{config}/{split}-*.parquet", f"{config}/{split}/*.parquet", f"{config}/*-{split}.parquet")
    return (*places, f"data/{split}-*.parquet", f"{split}-*.parquet") if config == "default" else places
