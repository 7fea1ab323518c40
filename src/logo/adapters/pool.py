"""`AdapterPool`: the named, ordered adapters that one base model chooses from, as a value that never changes.

Names are free-form; the order is always the sorted order of names. What changes a pool returns another one.
"""

from __future__ import annotations

import fnmatch
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from logo.adapters.activation import Activation
from logo.adapters.adapter import Adapter, open_adapter, own_name
from logo.adapters.layout import BaseLayout
from logo.adapters.peft import CONFIG
from logo.adapters.sources import (
    ExamplesUse,
    OnBadAdapter,
    PoolOptions,
    Source,
    download_adapters,
    gather,
    official_folder,
    parse_sources,
    pool_sources,
    spec_of,
)
from logo.errors import AdapterError, LeftOut, PoolError, UsageError, check_choice, closest, listed
from logo.hub import is_hub_spec
from logo.identity import pool_digest

if TYPE_CHECKING:
    from torch import nn
    from typing_extensions import Unpack

DEFAULT_K = 20  # adapters per prompt of a pool that gives no number


class AdapterPool:
    """Adapters by name, in the sorted order of names, from which a base model selects.

    Attributes:
        default_k: adapters per prompt if the user gives no number.
        refused: the errors of adapters that were left out under `on_bad_adapter="skip"`.
        activations: the distinct activations of its adapters.
    """

    def __init__(
        self, adapters: Iterable[Adapter] = (), refused: Iterable[AdapterError] = (), *, default_k: int = DEFAULT_K
    ) -> None:
        self._adapters: dict[str, Adapter] = {}
        for adapter in sorted(adapters, key=lambda adapter: adapter.name):
            if adapter.name in self._adapters:
                raise PoolError(f"the pool already has an adapter {adapter.name!r}; remove it, or choose another name")
            self._adapters[adapter.name] = adapter
        self.default_k = default_k
        self.refused: tuple[AdapterError, ...] = tuple(refused)
        self.activations: tuple[Activation, ...] = tuple(sorted({adapter.activation for adapter in self}, key=repr))

    @classmethod
    def open(cls, sources: str | Path | Sequence[str | Path], **options: Unpack[PoolOptions]) -> AdapterPool:
        """Opens a pool by name, as `--adapters` does: docs/adapter-pools.md.

        Args:
            sources: a folder, in which every folder at any depth that holds `adapter_config.json` or adapter weights is
                an adapter, named by its relative path; a Hub repository `org/name[/folder][@revision]`; a manifest
                (`pool.yaml`); or several of these, in a list or separated by commas.
            **options: see `PoolOptions`.

        Raises:
            UsageError: an option does not exist or has no such value, or a source could not exist.
            StorageError, HubError: a source cannot be read or downloaded.
            PoolError: there is no usable adapter, or one is bad and `on_bad_adapter` is `"error"`.
        """
        return cls.opened(parse_sources(sources), options)

    @classmethod
    def opened(cls, sources: Sequence[Source], options: PoolOptions) -> AdapterPool:
        """As `open`, for sources that were parsed."""
        remaining: dict[str, Any] = dict(options)
        names = PoolOptions.__optional_keys__
        unknown = sorted(remaining.keys() - names)
        if unknown:
            raise UsageError(f"unknown option of a pool {unknown[0]!r}{closest(unknown[0], names)}")
        on_bad_adapter: OnBadAdapter = remaining.pop("on_bad_adapter", "error")
        examples: ExamplesUse = remaining.pop("examples", "use")
        check_choice("on_bad_adapter", on_bad_adapter, OnBadAdapter)
        check_choice("examples", examples, ExamplesUse)
        adapters, refused, k = gather(sources, skip=on_bad_adapter == "skip", **remaining)
        if examples == "ignore":
            adapters = [adapter.undescribed() for adapter in adapters]
        pool = cls.usable(spec_of(sources), adapters, refused, on_bad_adapter, k)
        ignored = sorted({key for adapter in pool for key in adapter.config.unknown})
        if ignored:
            warnings.warn(f"{CONFIG}: unknown settings ignored: {', '.join(ignored)}", UserWarning, stacklevel=3)
        return pool

    @classmethod
    def usable(
        cls,
        where: str,
        adapters: Iterable[Adapter],
        refused: Sequence[AdapterError],
        on_bad_adapter: OnBadAdapter,
        k: int | None,
    ) -> AdapterPool:
        """The pool of the adapters that were found somewhere; raises PoolError as `open`."""
        _refuse(refused, on_bad_adapter, where)
        pool = cls(adapters, refused, default_k=k or DEFAULT_K)
        if not len(pool):
            first = f": all {len(refused)} are refused; the first: {refused[0]}" if refused else ""
            raise PoolError(f"no usable adapter in {where}{first}")
        return pool

    @cached_property
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
        if name not in self._adapters:
            raise PoolError(f"no adapter {name!r} in the pool of {len(self)}{closest(name, self.names)}")
        return self._adapters[name]

    def __repr__(self) -> str:
        return f"AdapterPool({len(self)} adapters: {listed(self.names)})"

    @cached_property
    def digest(self) -> str:
        """The digest of names, adapters and example prompts, for which every weight file is read once; AdapterError."""
        return pool_digest((adapter.name, adapter.key) for adapter in self)

    def sha256(self) -> dict[str, str]:
        """Name -> digest of the weight file, in pool order."""
        return {adapter.name: adapter.sha256 for adapter in self}

    @cached_property
    def invoked(self) -> bool:
        """Whether any adapter acts from its invocation tokens on."""
        return any(activation.tokens for activation in self.activations)

    def silent(self, prompt: Sequence[int]) -> list[str]:
        """The names of the adapters whose invocation tokens a prompt (token ids) lacks, so that they do not act."""
        if not self.invoked:
            return []
        begins = {activation: activation.begin(prompt) for activation in self.activations}
        return [adapter.name for adapter in self if begins[adapter.activation] is None]

    @cached_property
    def read_once(self) -> bool:
        """Whether prompts are read once, by the base model: no adapter acts everywhere."""
        return bool(self.activations) and not any(activation.everywhere for activation in self.activations)

    def add(self, adapter: Adapter | str | Path, name: str | None = None, *, allow_pickle: bool = False) -> AdapterPool:
        """The pool with one more adapter.

        It may be a folder, or, if there is no such folder, a source on the Hub (`namespace/name[/folder][@revision]`),
        after which it is named by default. Raises AdapterError or HubError if it cannot be used or downloaded, and
        PoolError if the pool has an adapter of that name already.
        """
        if isinstance(adapter, str) and is_hub_spec(adapter):
            [source] = parse_sources([adapter])
            root = download_adapters(source.where, [source.below], allow_pickle, source.revision)
            name = name or adapter.partition("@")[0]
            adapter = open_adapter(root / source.below, name, allow_pickle=allow_pickle, top=root)
        elif not isinstance(adapter, Adapter):
            adapter = open_adapter(adapter, name, allow_pickle=allow_pickle)
        elif name is not None:
            adapter = replace(adapter, name=name)
        return self._with([*self, adapter], (error for error in self.refused if error.name != adapter.name))

    def remove(self, name: str) -> AdapterPool:
        """The pool without an adapter. Raises PoolError if there is none of that name."""
        gone = self[name]
        return self._with(adapter for adapter in self if adapter is not gone)

    def subset(self, names: str | Iterable[str]) -> AdapterPool:
        """The pool of these adapters, by names or patterns (`"flanv2.wmt*"`); PoolError if one matches nothing."""
        chosen: set[str] = set()
        for entry in [names] if isinstance(names, str) else names:
            matches = [entry] if entry in self else fnmatch.filter(self.names, entry)
            if not matches:
                raise PoolError(f"no adapter matches {entry!r} in the pool of {len(self)}{closest(entry, self.names)}")
            chosen.update(matches)
        return self._with((adapter for adapter in self if adapter.name in chosen), ())

    def fit(
        self,
        layout: BaseLayout,
        *,
        model: nn.Module | None = None,
        on_bad_adapter: OnBadAdapter = "error",
        activation: str | None = None,
    ) -> AdapterPool:
        """The pool with its adapters matched to a base model's modules, and acting as the user wants; see `Adapter.fit`
        and `Adapter.acting`.

        Where bad adapters are skipped, so is one with NaN or Inf, on which every call that reads it would fail; each
        weight file is read once for that. Raises PoolError if an adapter does not fit and `on_bad_adapter` is
        `"error"`, or if none is left.
        """
        fitted: list[Adapter] = []
        refused: list[AdapterError] = []
        by_modules: dict[int, Adapter] = {}  # adapters that share their modules fit alike
        for adapter in self:
            alike = None if adapter.copies else by_modules.get(id(adapter.modules))
            try:
                own = adapter.fit(layout, model) if alike is None else replace(adapter, modules=alike.modules)
                own = own.acting(activation)
                if on_bad_adapter == "skip":
                    own.verify()
            except AdapterError as error:
                refused.append(error)
                continue
            fitted.append(own)
            by_modules[id(adapter.modules)] = own
        _refuse(refused, on_bad_adapter, "the pool")
        if not fitted:
            first = f"; the first: {refused[0]}" if refused else ""
            raise PoolError(f"none of the {len(self)} adapters fits the base model{first}")
        dropped = [adapter.name for adapter in fitted if self[adapter.name].copies]
        if dropped:
            equal = "copies of base weights equal those of the base model and are left out"
            warnings.warn(f"adapters {listed(dropped)}: {equal}", UserWarning, stacklevel=2)
        return self._with(fitted, (*self.refused, *refused))

    def without(self, refused: Sequence[AdapterError]) -> AdapterPool:
        """The pool without adapters that a base model refused, as `fit` gives them; itself if it holds none of them."""
        new = refused[len(self.refused) :]  # those that this pool knows come first
        if not new:
            return self
        gone = {error.name for error in new}
        return self._with((adapter for adapter in self if adapter.name not in gone), (*self.refused, *new))

    def _with(self, adapters: Iterable[Adapter], refused: Iterable[AdapterError] | None = None) -> AdapterPool:
        return AdapterPool(adapters, self.refused if refused is None else refused, default_k=self.default_k)


@dataclass(eq=False, repr=False)
class CurrentPool:
    """The pool that an engine uses from its next call on; `add` and `remove` put another one in its place.

    It is read like the pool, which is its `value`.
    """

    value: AdapterPool
    _changing: threading.Lock = field(default_factory=threading.Lock, init=False)

    def add(self, adapter: Adapter | str | Path, name: str | None = None, *, allow_pickle: bool = False) -> Adapter:
        """Adds an adapter and returns it; arguments and errors as `AdapterPool.add`."""
        [opened] = AdapterPool().add(adapter, name, allow_pickle=allow_pickle)  # before others have to wait
        with self._changing:
            self.value = self.value.add(opened)
        return opened

    def remove(self, name: str) -> Adapter:
        """Takes an adapter out of the pool and returns it. Raises PoolError if there is none of that name."""
        with self._changing:
            adapter = self.value[name]
            self.value = self.value.remove(name)
        return adapter

    def put(self, value: AdapterPool, instead_of: AdapterPool | None = None) -> None:
        """Uses another pool, unless somebody has changed the one `instead_of` which it is meant."""
        with self._changing:
            if instead_of is None or self.value is instead_of:
                self.value = value

    def __getattr__(self, name: str) -> Any:
        if name == "value":  # of a copy that is not made yet
            raise AttributeError(name)
        return getattr(self.value, name)

    def __len__(self) -> int:
        return len(self.value)

    def __iter__(self) -> Iterator[Adapter]:
        return iter(self.value)

    def __contains__(self, name: object) -> bool:
        return name in self.value

    def __getitem__(self, name: str) -> Adapter:
        return self.value[name]


def open_pool(
    adapters: str | Path | Sequence[str | Path] | None,
    base_model: str,
    model_dir: str | Path | None = None,
    **options: Unpack[PoolOptions],
) -> AdapterPool:
    """Opens a pool by name, or that of a base model; arguments as `pool_sources` and `AdapterPool.open`."""
    return AdapterPool.opened(pool_sources(adapters, base_model, model_dir), options)


def officially_named(pool: AdapterPool, base_model: str, sources: Sequence[Source] | None = None) -> AdapterPool:
    """A published pool with the official script's names (`Llama-3.1-8B-loras-flanv2/flanv2.aeslc`), others as they are;
    `sources` are those of the pool, None if they are not known."""
    folder = official_folder(base_model)
    if folder is None:
        return pool
    if sources is not None and [own_name(Path(source.below or source.where)) for source in sources] != [folder]:
        return pool
    renamed = (replace(adapter, name=f"{folder}/{adapter.name}") for adapter in pool)
    return AdapterPool(renamed, pool.refused, default_k=pool.default_k)


def warn_of_bad(refused: Iterable[AdapterError]) -> None:
    """Warns of bad adapters that are left out of a pool, with the reasons of the first three."""
    bad = [str(error) for error in refused if not isinstance(error, LeftOut)]
    if bad:
        count = f"{len(bad)} bad adapter{'s are' if len(bad) > 1 else ' is'}"
        warnings.warn(f"{count} left out of the pool: {listed(bad)}", UserWarning, stacklevel=3)


def _refuse(refused: Sequence[AdapterError], on_bad_adapter: OnBadAdapter, where: str) -> None:
    """Raises PoolError if an adapter is bad and none may be; those that are only left out are not."""
    bad = [error for error in refused if not isinstance(error, LeftOut)]
    if bad and on_bad_adapter == "error":
        more = f" ({len(bad) - 1} more bad in {where})" if len(bad) > 1 else ""
        lock = "logo pool lock --on-bad-adapter skip" + (" --base-model M" if where == "the pool" else "")
        hint = f"`{lock}` leaves bad ones out (Python: on_bad_adapter='skip')"
        raise PoolError(f"{bad[0]}{more}; {hint}")
