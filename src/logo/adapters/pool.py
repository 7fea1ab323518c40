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
from logo.adapters.format import Adapter, open_adapter
from logo.adapters.gathering import gather
from logo.adapters.hub import download_adapters
from logo.adapters.layout import BaseLayout
from logo.adapters.options import ExamplesUse, Fetching, OnBadAdapter, OpeningOptions, PoolOptions, split_options
from logo.adapters.places import Place, parse_places, places_text
from logo.errors import AdapterError, LeftOut, PoolError, UsageError, closest
from logo.hub import clean_subfolder, is_hub_spec, split_hub_spec

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

        Raises:
            StorageError: `path` is not a readable folder.
            PoolError: there is no usable adapter in it, or one is bad and `on_bad_adapter` is `"error"`.
        """
        how = Fetching(allow_pickle=allow_pickle)
        opening: OpeningOptions = {"on_bad_adapter": on_bad_adapter, "verify": verify, "examples": examples}
        return cls._gathered((Place("folder", str(path)),), how, opening)

    @classmethod
    def from_survey(
        cls,
        root: str | Path,
        adapters: Sequence[Adapter],
        refused: list[AdapterError],
        *,
        on_bad_adapter: OnBadAdapter,
        k: int | None = None,
    ) -> AdapterPool:
        """Makes a pool of the adapters that were found at `root`.

        Raises:
            PoolError: there is no usable adapter, or one is bad and `on_bad_adapter` is `"error"`.
        """
        _refuse(refused, on_bad_adapter, where=str(root))
        if not adapters:
            raise PoolError(_empty(root, refused))
        return cls(adapters, refused, default_k=k or DEFAULT_K)

    @classmethod
    def from_hub(
        cls,
        repo_id: str,
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        **options: Unpack[PoolOptions],
    ) -> AdapterPool:
        """Downloads (or finds in the cache) every adapter below `subfolder` of a Hub repository, and opens them.

        What exists is listed from the Hub. Downloads run in parallel; after an interruption only what is missing is
        downloaded. With `local_files_only` or `HF_HUB_OFFLINE=1` the cache is used as it is.

        Args:
            repo_id: `namespace/name`, whose adapters are named relative to `subfolder`. An adapter that is the whole
                repository is named after it.
            **options: see `PoolOptions`.

        Raises:
            UsageError: a repository or a folder that could not exist.
            HubError: the repository is gated, missing or unreachable, or holds no adapters there.
            PoolError: as `from_directory`.
        """
        place = Place("repo", repo_id, clean_subfolder(repo_id, subfolder), revision)
        return cls._gathered((place,), *split_options(options))

    @classmethod
    def open(cls, places: str | Path | Sequence[str | Path], **options: Unpack[PoolOptions]) -> AdapterPool:
        """Opens a pool by name, as `--adapters` does: docs/adapter-pools.md.

        Args:
            places: a folder, a Hub repository `org/name[/folder][@revision]`, a manifest (`pool.yaml`), or several of
                these, in a list or separated by commas.
            **options: see `PoolOptions`.

        Raises:
            UsageError: a place that could not exist.
            HubError: as `from_hub`.
            StorageError, PoolError: as `from_directory`.
        """
        return cls._gathered(parse_places(places), *split_options(options))

    @classmethod
    def _gathered(cls, places: Sequence[Place], how: Fetching, opening: OpeningOptions) -> AdapterPool:
        bad = opening.get("on_bad_adapter", "error")
        found = gather(places, how, skip=bad == "skip", verify=opening.get("verify"))
        where = places_text(places) if len(places) > 1 or places[0].on_hub else places[0].source
        pool = cls.from_survey(where, found.adapters, found.refused, on_bad_adapter=bad, k=found.k)
        pool._warn_about_unknown_keys()
        return pool.without_examples() if opening.get("examples") == "ignore" else pool

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
            fetching = Fetching(allow_pickle=allow_pickle)
            folder = download_adapters(repo, [below or ""], fetching, revision=revision) / (below or "")
            adapter = open_adapter(folder, name or adapter.partition("@")[0], allow_pickle=allow_pickle)
        elif not isinstance(adapter, Adapter):
            adapter = open_adapter(adapter, name, allow_pickle=allow_pickle)
        elif name is not None:
            adapter = replace(adapter, name=name)
        with _CHANGING:
            if adapter.name in self._adapters:
                raise _taken(adapter.name)
            self.refused = tuple(error for error in self.refused if error.name != adapter.name)
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

    def leave_out(self, refused: Iterable[AdapterError], version: int) -> int:
        """Takes the adapters out that a base model refused, so that a pool holds what can be selected.

        Args:
            refused: the errors of all adapters that are left out; those that the pool knows come first.
            version: of the pool that was fitted. Nothing happens if it has changed since, and is to be fitted again.

        Returns:
            The version that was fitted, as it is now.
        """
        with _CHANGING:
            if version == self.version:
                new = tuple(refused)[len(self.refused) :]
                self.refused += new
                gone = {error.name for error in new} & self._adapters.keys()
                if gone:
                    self._change({name: one for name, one in self._adapters.items() if name not in gone})
                    return self.version
        return version

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
            warnings.warn(f"{CONFIG}: unknown settings ignored: {', '.join(unknown)}", UserWarning, stacklevel=4)


def _taken(name: str) -> PoolError:
    return PoolError(f"the pool already has an adapter {name!r}; remove it first or choose another name")


def warn_of_bad(refused: Iterable[AdapterError]) -> None:
    """Warns of bad adapters that are left out of a pool, with the reasons of the first three.

    Adapters that are left out although nothing is wrong with them (`LeftOut`) are not bad.
    """
    if bad := [error for error in refused if not isinstance(error, LeftOut)]:
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
