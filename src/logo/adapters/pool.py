"""`AdapterPool`: the named, ordered adapters that one base model chooses from.

Opening a pool reads configurations and headers. Names are free-form; the order is always the sorted order of names.
"""

from __future__ import annotations

import fnmatch
import itertools
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from logo.adapters.activation import OFF, acting
from logo.adapters.files import CONFIG, SAFETENSORS
from logo.adapters.format import Adapter, open_adapter, own_name
from logo.adapters.gathering import gather
from logo.adapters.hub import download_adapters
from logo.adapters.layout import BaseLayout
from logo.adapters.options import ExamplesUse, OnBadAdapter, PoolOptions, split_options
from logo.adapters.places import Place, parse_places, places_text
from logo.adapters.survey import survey
from logo.cache import cache_folder
from logo.errors import AdapterError, LeftOut, PoolError, UsageError, closest
from logo.hub.names import is_hub_spec, split_hub_spec

if TYPE_CHECKING:
    from torch import nn
    from typing_extensions import Unpack

DEFAULT_K = 20  # adapters per prompt of a pool that gives no number

# One lock for the changes of all pools: changes are short, and a pool with a lock of its own could not be pickled.
_CHANGING = threading.Lock()


class AdapterPool:
    """Adapters by name, in the sorted order of names, from which a base model selects.

    One thread may change a pool while others read it: a change replaces the dictionary of adapters, so that an
    iteration sees the adapters that were there when it began.

    Attributes:
        default_k: adapters per prompt if the user gives no number.
        activations: the distinct activations of its adapters.
        refused: the errors of adapters that were left out under `on_bad_adapter="skip"`.
        version: grows with every change, so that what was computed from the pool is known to be outdated.
    """

    def __init__(
        self, adapters: Iterable[Adapter] = (), refused: Iterable[AdapterError] = (), *, default_k: int = DEFAULT_K
    ) -> None:
        self._adapters: dict[str, Adapter] = {}
        self.default_k = default_k
        self.refused: tuple[AdapterError, ...] = tuple(refused)
        self.version = 0
        ordered = sorted(adapters, key=lambda a: a.name)
        for before, adapter in itertools.pairwise(ordered):
            if before.name == adapter.name:
                raise _taken(adapter.name)
        self._change({adapter.name: adapter for adapter in ordered})

    @classmethod
    def from_directory(
        cls,
        path: str | Path,
        *,
        on_bad_adapter: OnBadAdapter = "error",
        allow_pickle: bool = False,
        verify: bool | None = None,
        examples: ExamplesUse = "use",
        cache: str | Path | None = None,
    ) -> AdapterPool:
        """Opens every adapter folder below `path`, at any depth.

        Args:
            path: a folder; each folder in it that holds `adapter_config.json` or adapter weights is one adapter,
                named by its relative path. `path` may itself be one adapter.
            on_bad_adapter: `"error"` refuses the pool at the first sight of a bad adapter; `"skip"` leaves bad
                adapters out and keeps the reasons in `refused`.
            allow_pickle: read `adapter_model.bin` if there is no safetensors file.
            verify: read all tensors now and check them for NaN and Inf. Default: if the pool is small (256 MiB).
            examples: under `"ignore"`, the adapters have no example prompts.
            cache: folder for configurations and headers, so that the pool opens faster the next time; `""`: no cache;
                None: the user's cache.

        Raises:
            StorageError: `path` is not a readable folder.
            PoolError: there is no usable adapter in it, or one is bad and `on_bad_adapter` is `"error"`.
        """
        root = Path(path)
        adapters, refused = survey(root, allow_pickle=allow_pickle, verify=verify, cache=cache_folder(cache))
        pool = cls.from_survey(root, adapters, refused, on_bad_adapter=on_bad_adapter)
        pool._warn_about_unknown_keys()
        return pool.without_examples() if examples == "ignore" else pool

    @classmethod
    def from_survey(
        cls, root: str | Path, adapters: Sequence[Adapter], refused: list[AdapterError], *, on_bad_adapter: OnBadAdapter
    ) -> AdapterPool:
        """Makes a pool of the adapters that a survey of `root` found.

        Raises:
            PoolError: there is no usable adapter, or one is bad and `on_bad_adapter` is `"error"`.
        """
        _refuse(refused, on_bad_adapter, where=str(root))
        if not adapters:
            raise PoolError(_empty(root, refused))
        return cls(adapters, refused)

    @classmethod
    def from_hub(
        cls,
        repo_id: str | Sequence[str],
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        **options: Unpack[PoolOptions],
    ) -> AdapterPool:
        """Downloads (or finds in the cache) every adapter below `subfolder` of a Hub repository, and opens them.

        What exists is listed from the Hub. Downloads run in parallel; after an interruption only what is missing is
        downloaded. With `local_files_only` or `HF_HUB_OFFLINE=1` the cache is used as it is.

        Args:
            repo_id: `namespace/name`, whose adapters are named relative to `subfolder`; or several places
                `namespace/name[/folder][@revision]`, which are put in front of the names of their adapters. An adapter
                that is a place itself is named after it.
            **options: see `PoolOptions`.

        Raises:
            UsageError: no place, or one that could not exist.
            HubError: a repository is gated, missing or unreachable, or holds no adapters there.
            PoolError: as `from_directory`.
        """
        if isinstance(repo_id, str):
            how, opening = split_options(options)
            folder = download_adapters(repo_id, subfolder=subfolder, revision=revision, **vars(how))
            pool = cls.from_directory(folder, allow_pickle=how.allow_pickle, **opening)
            return pool if subfolder else pool._placed(folder, repo_id)
        if not repo_id or subfolder is not None or revision is not None:
            raise UsageError(
                "repo_id: expected one repository or a list of places namespace/name[/folder][@revision], each with "
                "its own folder and revision"
            )
        split = map(split_hub_spec, dict.fromkeys(repo_id))
        places = tuple(Place("repo", repo, below or "", at) for repo, below, at in split)
        return cls._gathered(places, options, full_names=True)

    @classmethod
    def open(cls, places: str | Path | Sequence[str | Path], **options: Unpack[PoolOptions]) -> AdapterPool:
        """Opens a pool by name, as `--adapters` does: docs/open-any-pool.md.

        Args:
            places: a folder, a Hub repository `org/name[/folder][@revision]`, every repository of an owner that is
                called `org/prefix-*`, a manifest (`pool.yaml`), `preset:name`; or several of these, in a list or
                separated by commas.
            **options: see `PoolOptions`.

        Raises:
            UsageError: a place that could not exist.
            HubError: as `from_hub`.
            StorageError, PoolError: as `from_directory`.
        """
        found = parse_places(places)
        [only, *more] = found
        if not more and only.plain and only.kind == "folder":
            how, opening = split_options(options)
            return cls.from_directory(only.source, allow_pickle=how.allow_pickle, **opening)
        if not more and only.plain and only.kind == "repo":
            return cls.from_hub(only.source, subfolder=only.below or None, revision=only.revision, **options)
        return cls._gathered(found, options)

    @classmethod
    def _gathered(cls, places: Sequence[Place], options: PoolOptions, *, full_names: bool | None = None) -> AdapterPool:
        how, opening = split_options(options)
        bad = opening.get("on_bad_adapter", "error")
        cache, verify = cache_folder(opening.get("cache")), opening.get("verify")
        examples = opening.get("examples", "use")
        found = gather(
            places, how, skip=bad == "skip", full_names=full_names, verify=verify, cache=cache, examples=examples
        )
        pool = cls.from_survey(places_text(places), found.adapters, found.refused, on_bad_adapter=bad)
        pool._warn_about_unknown_keys()
        return pool.without_examples() if examples == "ignore" else pool

    def _placed(self, folder: Path, place: str) -> AdapterPool:
        """The same adapters, but one that is the whole folder is named after the place."""
        own = own_name(folder)
        renamed = [replace(adapter, name=place) if Path(adapter.folder) == folder else adapter for adapter in self]
        refused = [AdapterError(place, error.reason) if error.name == own else error for error in self.refused]
        return AdapterPool(renamed, refused, default_k=self.default_k)

    @property
    def names(self) -> tuple[str, ...]:
        """All names in pool order."""
        return tuple(self._adapters)

    def __len__(self) -> int:
        return len(self._adapters)

    def __iter__(self) -> Iterator[Adapter]:
        return iter(self._adapters.values())

    def __contains__(self, name: object) -> bool:
        return name in self._adapters

    def __getitem__(self, name: str) -> Adapter:
        try:
            return self._adapters[name]
        except KeyError:
            raise PoolError(f"no adapter {name!r} in the pool of {len(self)}{closest(name, self.names)}") from None

    def __repr__(self) -> str:
        head = ", ".join(self.names[:3]) + (", ..." if len(self) > 3 else "")
        return f"AdapterPool({len(self)} adapters: {head})"

    def add(self, adapter: Adapter | str | Path, name: str | None = None, *, allow_pickle: bool = False) -> Adapter:
        """Adds an opened adapter, or opens the PEFT folder given.

        Args:
            adapter: an adapter, a folder, or, if there is no such folder, a place on the Hub
                (`namespace/name[/folder][@revision]`).
            name: default: that of the adapter, the folder or the place.

        Raises:
            AdapterError: the folder cannot be used.
            HubError: it cannot be downloaded.
            PoolError: the pool has an adapter of that name already.
        """
        if isinstance(adapter, str) and is_hub_spec(adapter):
            repo, below, revision = split_hub_spec(adapter)
            folder = download_adapters(repo, subfolder=below, revision=revision, allow_pickle=allow_pickle)
            adapter = open_adapter(folder, name or adapter.partition("@")[0], allow_pickle=allow_pickle)
        elif not isinstance(adapter, Adapter):
            adapter = open_adapter(adapter, name, allow_pickle=allow_pickle)
        elif name is not None:
            adapter = replace(adapter, name=name)
        with _CHANGING:
            if adapter.name in self._adapters:
                raise _taken(adapter.name)
            self._change(dict(sorted({**self._adapters, adapter.name: adapter}.items())))
        return adapter

    def remove(self, name: str) -> Adapter:
        """Takes an adapter out of the pool and returns it.

        Raises:
            PoolError: there is none of that name.
        """
        with _CHANGING:
            adapter = self[name]
            self._change({other: kept for other, kept in self._adapters.items() if other != name})
        return adapter

    def _change(self, adapters: dict[str, Adapter]) -> None:
        self.activations = tuple(sorted({adapter.activation for adapter in adapters.values()}, key=repr))
        # The version changes last, so a reader that sees the new version also sees the new adapters.
        self._adapters = adapters
        self.version += 1

    def subset(self, names: str | Iterable[str]) -> AdapterPool:
        """A new pool of these adapters; each entry is a name or a pattern such as `"flanv2.wmt*"`.

        Raises:
            PoolError: an entry matches nothing.
        """
        adapters, chosen = self._adapters, dict[str, Adapter]()
        for entry in [names] if isinstance(names, str) else names:
            matches = [entry] if entry in adapters else fnmatch.filter(adapters, entry)
            if not matches:
                hint = closest(entry, adapters)
                raise PoolError(f"no adapter matches {entry!r} in the pool of {len(adapters)}{hint}")
            chosen |= {name: adapters[name] for name in matches}
        return AdapterPool(chosen.values(), default_k=self.default_k)

    def below(self, folder: str) -> AdapterPool:
        """A new pool of the same adapters under the names `{folder}/{name}`."""
        renamed = (replace(adapter, name=f"{folder}/{adapter.name}") for adapter in self)
        return AdapterPool(renamed, self.refused, default_k=self.default_k)

    def fit(
        self, layout: BaseLayout, *, model: nn.Module | None = None, on_bad_adapter: OnBadAdapter = "error"
    ) -> AdapterPool:
        """A new pool whose adapters are matched to a base model's modules.

        Args:
            model: the base model. Adapters that hold copies of its weights do not fit without.

        Raises:
            PoolError: an adapter does not fit and `on_bad_adapter` is `"error"`, none fits at all, or there is none.
        """
        adapters = tuple(self)
        if not adapters:
            raise PoolError("the pool is empty: there is no adapter to fit to the base model")
        fitted, refused = [], []
        recipes: dict[int, Adapter] = {}  # adapters that share their modules fit alike
        for adapter in adapters:
            alike = None if adapter.copies else recipes.get(id(adapter.modules))
            try:
                fit = adapter.fit(layout, model) if alike is None else replace(adapter, modules=alike.modules)
            except AdapterError as error:
                refused.append(error)
            else:
                recipes[id(adapter.modules)] = fit
                fitted.append(fit)
        _refuse(refused, on_bad_adapter, where="the pool")
        copies = {adapter.name: list(adapter.copies.values()) for adapter in adapters if adapter.copies}
        dropped = [name for name in copies if name not in {error.name for error in refused}]
        if dropped:
            more = f" and {len(dropped) - 1} more adapters" if len(dropped) > 1 else ""
            warnings.warn(
                f"adapter {dropped[0]!r}{more}: copies of base weights ({', '.join(copies[dropped[0]][:3])}) equal "
                "those of the base model and are left out",
                UserWarning,
                stacklevel=2,
            )
        if not fitted:
            raise PoolError(f"none of the {len(adapters)} adapters fits the base model; the first: {refused[0]}")
        return AdapterPool(fitted, self.refused + tuple(refused), default_k=self.default_k)

    def acting(self, forced: str | None, without: str | None = None) -> AdapterPool:
        """A new pool with the activation that a user wants; see `logo.adapters.activation.acting`."""
        if forced is None and without in (None, OFF):
            return self
        made = []
        for adapter in self:
            try:
                made.append(replace(adapter, activation=acting(adapter.activation, forced, without)))
            except UsageError as error:
                raise UsageError(f"adapter {adapter.name!r}: {error}") from None
        return AdapterPool(made, self.refused, default_k=self.default_k)

    def without_examples(self) -> AdapterPool:
        """A new pool of the same adapters without their example prompts."""
        adapters = (replace(adapter, given_examples=()) for adapter in self)
        return AdapterPool(adapters, self.refused, default_k=self.default_k)

    @property
    def read_once(self) -> bool:
        """Whether prompts are read once, by the base model: no adapter acts everywhere."""
        return bool(self.activations) and not any(activation.everywhere for activation in self.activations)

    def sha256(self) -> dict[str, str]:
        """Name -> digest of the weight file, in pool order. Reads all files once."""
        return {adapter.name: adapter.sha256 for adapter in self}

    def _warn_about_unknown_keys(self) -> None:
        unknown = sorted({key for adapter in self for key in adapter.config.unknown})
        if unknown:
            warnings.warn(f"{CONFIG}: unknown settings ignored: {', '.join(unknown)}", UserWarning, stacklevel=3)


def _taken(name: str) -> PoolError:
    return PoolError(f"the pool already has an adapter {name!r}; remove it first or choose another name")


def warn_of_bad(pool: AdapterPool) -> None:
    """Warns of bad adapters that were left out of a pool, with the reasons of the first three.

    Adapters that are left out although nothing is wrong with them (`LeftOut`) are not bad.
    """
    if bad := [error for error in pool.refused if not isinstance(error, LeftOut)]:
        more = f"; and {len(bad) - 3} more" if len(bad) > 3 else ""
        warnings.warn(
            f"{len(bad)} bad adapter{'s are' if len(bad) > 1 else ' is'} left out of the pool: "
            f"{'; '.join(map(str, bad[:3]))}{more}",
            UserWarning,
            stacklevel=3,
        )


def _refuse(refused: list[AdapterError], on_bad_adapter: OnBadAdapter, where: str) -> None:
    refused = [error for error in refused if not isinstance(error, LeftOut)]
    if refused and on_bad_adapter == "error":
        more = f" ({len(refused) - 1} more bad in {where})" if len(refused) > 1 else ""
        hint = "leave bad ones out with --on-bad-adapter skip (on_bad_adapter='skip'), or see `logo pool inspect`"
        raise PoolError(f"{refused[0]}{more}; {hint}")


def _empty(root: str | Path, refused: list[AdapterError]) -> str:
    if refused:
        return f"no usable adapter in {root}: all {len(refused)} are refused; the first: {refused[0]}"
    return f"no adapters in {root}: expected folders that hold {CONFIG} and {SAFETENSORS}, at any depth"
