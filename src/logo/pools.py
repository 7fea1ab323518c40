"""Pools by name: a folder, a Hub repository, or the one that belongs to a base model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from logo.adapters.hub import is_hub_spec, split_hub_spec
from logo.adapters.pool import DEFAULT_K, AdapterPool
from logo.errors import UsageError
from logo.models import DEMO, OFFICIAL_MODELS, demo_folder

DEMO_K = 3  # adapters per prompt of the embedded pool, of which twenty would be all
OFFICIAL_ADAPTERS = "archon159/LoGo-loras-collection"


def default_pool(base_model: str, model_dir: str | Path | None = None, **options: Any) -> AdapterPool:
    """The pool that belongs to a base model by name: the demo's own, or the authors' published one.

    Args:
        model_dir: looked in for the published adapters before the Hub.
        **options: as `AdapterPool.from_directory`.

    Raises:
        UsageError: the base model has none, and the user has to say.
        PoolError, HubError: the pool cannot be opened.
    """
    if base_model == DEMO:
        pool = AdapterPool.from_directory(demo_folder() / "adapters", **options)
        pool.default_k = DEMO_K
        return pool
    return _opened(_own_place(base_model, model_dir), options)


def official_folder(base_model: str) -> str | None:
    """The folder that holds the published adapters of a base model, on the Hub and in the official script's
    `--model_dir`; None for any base model but the official ones."""
    short = {full: name for name, full in OFFICIAL_MODELS.items()}.get(base_model, base_model)
    return f"{short}-loras-flanv2" if short in OFFICIAL_MODELS else None


def officially_named(pool: AdapterPool, base_model: str, adapters: str | None = None) -> AdapterPool:
    """The pool with its adapters called as in the official script, whose names keep the folder
    (`Llama-3.1-8B-loras-flanv2/flanv2.aeslc`); the pool itself where it is not the published one.

    Args:
        adapters: what `open_pool` was given.
    """
    folder = official_folder(base_model)
    published = adapters is None or PurePath(adapters.partition("@")[0]).name == folder
    return pool if folder is None or not published else pool.below(folder)


def default_k(base_model: str, adapters: str | None = None) -> int:
    """`AdapterPool.default_k` of the pool that `open_pool` would open."""
    return DEMO_K if base_model == DEMO and adapters is None else DEFAULT_K


def open_pool(
    adapters: str | None, base_model: str, model_dir: str | Path | None = None, **options: Any
) -> AdapterPool:
    """The pool that is called so: a folder, or a Hub repository `org/name[/folder][@revision]`.

    Args:
        adapters: None: the base model's own, see `default_pool`.
        model_dir: looked in for published adapters before the Hub.
        **options: as `AdapterPool.from_directory`.

    Raises:
        UsageError: nothing is named, and the base model has no pool of its own.
        PoolError, HubError: the pool cannot be opened.
    """
    if adapters is None:
        return default_pool(base_model, model_dir, **options)
    return _opened(pool_place(adapters, base_model, model_dir), options)


@dataclass(frozen=True)
class PoolPlace:
    """Where a pool is: a folder, or a Hub repository with a folder in it and a revision."""

    source: str
    subfolder: str = ""
    revision: str | None = None
    on_hub: bool = False

    @property
    def spec(self) -> str:
        """What `pool_place` reads as this place, whatever the working directory is."""
        if not self.on_hub:
            return str(Path(self.source).absolute())
        folder = f"/{self.subfolder}" if self.subfolder else ""
        return f"{self.source}{folder}{f'@{self.revision}' if self.revision else ''}"


def pool_place(adapters: str | None, base_model: str, model_dir: str | Path | None = None) -> PoolPlace:
    """Where the pool is that `open_pool` opens.

    Raises:
        UsageError: as `open_pool`.
    """
    if adapters is None:
        return _own_place(base_model, model_dir)
    if not is_hub_spec(adapters):
        return PoolPlace(adapters)
    repo, subfolder, revision = split_hub_spec(adapters)
    return PoolPlace(repo, subfolder or "", revision, on_hub=True)


def _own_place(base_model: str, model_dir: str | Path | None) -> PoolPlace:
    if base_model == DEMO:
        return PoolPlace(str(demo_folder() / "adapters"))
    folder = official_folder(base_model)
    if folder is None:
        raise UsageError(f"base model {base_model!r} has no adapters of its own: name a pool (--adapters)")
    if model_dir is not None and (Path(model_dir) / folder).is_dir():
        return PoolPlace(str(Path(model_dir) / folder))
    return PoolPlace(OFFICIAL_ADAPTERS, folder, on_hub=True)


def _opened(place: PoolPlace, options: dict[str, Any]) -> AdapterPool:
    if not place.on_hub:
        return AdapterPool.from_directory(place.source, **options)
    return AdapterPool.from_hub(place.source, subfolder=place.subfolder or None, revision=place.revision, **options)
