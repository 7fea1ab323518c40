"""Opens pools by name: what `--adapters` takes (`logo.adapters.places`), or the pool of a base model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from logo.adapters.manifest import read_manifest
from logo.adapters.notes import noted_k
from logo.adapters.places import Place, parse_places, places_text
from logo.adapters.pool import DEFAULT_K, AdapterPool
from logo.errors import UsageError
from logo.models import DEMO, OFFICIAL_MODELS, demo_folder

DEMO_K = 3  # adapters per prompt of the embedded pool, which has fewer than 20; its `pool.json` says so, too
OFFICIAL_ADAPTERS = "archon159/LoGo-loras-collection"


def default_pool(base_model: str, model_dir: str | Path | None = None, **options: Any) -> AdapterPool:
    """The pool of a base model: that of the demo, or the authors' published one.

    Args:
        model_dir: searched for the published adapters before the Hub.
        **options: as `AdapterPool.open`.

    Raises:
        UsageError: the base model has no pool, so the user has to name one.
        PoolError, HubError: the pool cannot be opened.
    """
    return AdapterPool.open(_own_place(base_model, model_dir).spec, **options)


def official_folder(base_model: str) -> str | None:
    """The folder of a base model's published adapters, on the Hub and in `--model_dir`; None if it is not official."""
    short = {full: name for name, full in OFFICIAL_MODELS.items()}.get(base_model, base_model)
    return f"{short}-loras-flanv2" if short in OFFICIAL_MODELS else None


def officially_named(pool: AdapterPool, base_model: str, adapters: str | None = None) -> AdapterPool:
    """The published pool with the official script's names (`Llama-3.1-8B-loras-flanv2/flanv2.aeslc`).

    Any other pool is returned as it is.

    Args:
        adapters: the argument of `open_pool`.
    """
    folder = official_folder(base_model)
    if folder is None:
        return pool
    places = () if adapters is None else parse_places(adapters)
    published = adapters is None or [PurePath(one.below or one.source).name for one in places] == [folder]
    return pool.below(folder) if published else pool


def default_k(base_model: str, adapters: str | None = None) -> int:
    """`AdapterPool.default_k` of the pool that `open_pool` would open; of a pool on the Hub, `DEFAULT_K`."""
    [only, *more] = pool_place(adapters, base_model).places
    if more or only.on_hub:
        return DEFAULT_K
    source = Path(only.source)
    return (read_manifest(source).k if only.kind == "manifest" else noted_k(source)) or DEFAULT_K


def open_pool(
    adapters: str | Path | Sequence[str | Path] | None,
    base_model: str,
    model_dir: str | Path | None = None,
    **options: Any,
) -> AdapterPool:
    """Opens a pool by name, as `AdapterPool.open`.

    Args:
        adapters: None: the pool of the base model, see `default_pool`.
        model_dir: searched for published adapters before the Hub.
        **options: as `AdapterPool.open`.

    Raises:
        UsageError: no pool is named, and the base model has none.
        PoolError, HubError: the pool cannot be opened.
    """
    if adapters is None:
        return default_pool(base_model, model_dir, **options)
    return AdapterPool.open(adapters, **options)


@dataclass(frozen=True)
class PoolPlace:
    """The places of a pool."""

    places: tuple[Place, ...]

    @property
    def spec(self) -> str:
        """The text that `pool_place` reads as these places in any working directory."""
        return places_text(self.places)

    @property
    def on_hub(self) -> bool:
        """Whether a place is on the Hub."""
        return any(place.on_hub for place in self.places)


def pool_place(
    adapters: str | Path | Sequence[str | Path] | None, base_model: str, model_dir: str | Path | None = None
) -> PoolPlace:
    """The places of the pool that `open_pool` opens.

    Raises:
        UsageError: as `open_pool`.
    """
    return _own_place(base_model, model_dir) if adapters is None else PoolPlace(parse_places(adapters))


def _own_place(base_model: str, model_dir: str | Path | None) -> PoolPlace:
    if base_model == DEMO:
        return PoolPlace((Place("folder", str(demo_folder() / "adapters")),))
    folder = official_folder(base_model)
    if folder is None:
        raise UsageError(f"base model {base_model!r} has no adapters of its own: name a pool (--adapters)")
    if model_dir is not None and (Path(model_dir) / folder).is_dir():
        return PoolPlace((Place("folder", str(Path(model_dir) / folder)),))
    return PoolPlace((Place("repo", OFFICIAL_ADAPTERS, folder),))
