"""What a caller may say about how a pool is downloaded and opened."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

from logo.hub import DownloadOptions

OnBadAdapter = Literal["error", "skip"]
ExamplesUse = Literal["use", "ignore"]


@dataclass(frozen=True)
class Fetching:
    """How files are downloaded from the Hub; see `logo.adapters.hub.download_adapters`."""

    token: str | bool | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False
    max_workers: int = 8
    progress: bool = True
    allow_pickle: bool = False


class OpeningOptions(TypedDict, total=False):
    """How adapters that are here are opened; see `logo.adapters.pool.AdapterPool.from_directory`."""

    on_bad_adapter: OnBadAdapter
    verify: bool | None
    examples: ExamplesUse


class PoolOptions(DownloadOptions, OpeningOptions, total=False):
    """How a pool is downloaded and opened: see `logo.hub.DownloadOptions` and `OpeningOptions`.

    Attributes:
        allow_pickle: also download and read pickled weights (`adapter_model.bin`).
    """

    allow_pickle: bool


def split_options(options: PoolOptions) -> tuple[Fetching, OpeningOptions]:
    """The options of a download and those of opening what is there.

    Raises:
        TypeError: an option that does not exist.
    """
    given: dict[str, Any] = {**options}
    opening: Any = {name: given.pop(name) for name in OpeningOptions.__annotations__ if name in given}
    return Fetching(**given), opening
