"""The pool in vLLM's processes: fitted to the base model, with each adapter under the key of its content."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from logo.adapters.adapter import Adapter, open_adapter
from logo.adapters.layout import BaseLayout
from logo.adapters.pool import AdapterPool, open_pool
from logo.backends.vllm.options import VllmOptions
from logo.backends.vllm.recipe import Recipe
from logo.core import Selection
from logo.errors import LoGoError, PoolError, UsageError
from logo.identity import pool_digest
from logo.selection.points import plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


log = logging.getLogger("vllm.logo")  # below vLLM's own, so that its lines look like theirs

# What is done to a pool, the adapter's name, and its folder: `("add", name, folder)`, `("replace", name, folder)` or
# `("remove", name, "")`.
Change = tuple[str, str, str]

# The largest weight of an adapter in a request, in absolute value; far above any that makes sense, and far below those
# with which sound adapters overflow.
MOST_WEIGHT = 16.0


@dataclass(frozen=True)
class KeyedPool:
    """Adapters that fit one base model.

    Attributes:
        adapters: the pool.
        keys: name -> key, in pool order.
        forced: the user's setting of where adapters act, see `logo.adapters.activation.acting`.
    """

    adapters: AdapterPool
    keys: Mapping[str, str]
    forced: str | None = None

    @classmethod
    def of(cls, adapters: AdapterPool, forced: str | None = None) -> KeyedPool:
        """Reads every adapter's file once, for its digest."""
        keys = {adapter.name: adapter.key for adapter in adapters}
        return cls(adapters.acting(forced), keys, forced)

    @classmethod
    def open(cls, options: VllmOptions, model: PreTrainedModel) -> KeyedPool:
        """The pool that the options name, fitted to a model (a skeleton will do).

        Raises:
            LoGoError: it cannot be opened, or does not fit.
        """
        how, settings = options.on_bad_adapter, options.settings
        opened = open_pool(
            options.pool,
            str(model.config.name_or_path),
            on_bad_adapter=how,
            examples=settings.examples,
        )
        return cls.of(opened.fit(BaseLayout.of(model), on_bad_adapter=how), settings.activation)

    @property
    def digest(self) -> str:
        """The digest of the pool's names and contents, which is equal in all processes with the same pool."""
        return pool_digest(self.keys.items())

    @property
    def by_key(self) -> dict[str, Adapter]:
        """Key -> adapter."""
        return {key: self.adapters[name] for name, key in self.keys.items()}

    def changed(self, change: Change, layout: BaseLayout) -> KeyedPool:
        """The pool after a change; this one stays as it is.

        Raises:
            AdapterError: the adapter cannot be used, or does not fit.
            PoolError: there is one of that name, or there is none.
        """
        kind, name, folder = change
        adapters = {adapter.name: adapter for adapter in self.adapters}
        keys = dict(self.keys)
        if kind == "remove":
            del adapters[self.adapters[name].name], keys[name]
            if not adapters:
                raise PoolError(f"adapter {name!r} is the last one of the pool and cannot be removed")
        else:
            if kind == "add" and name in adapters:
                raise PoolError(f"the pool has an adapter {name!r} already")
            adapters[name] = open_adapter(folder, name).fit(layout)
            adapters[name].verify()  # finds what is not finite, also in layers that no signal reads
            keys[name] = adapters[name].key
        pool = AdapterPool(adapters.values(), self.adapters.refused, default_k=self.adapters.default_k)
        pool = pool.acting(self.forced)
        return replace(self, adapters=pool, keys={name: keys[name] for name in pool.names})

    def recipe(self, selection: Selection) -> Recipe:
        """The recipe of a selection; without adapters, it is the base model's and has no parts.

        Raises:
            UsageError: a weight is too large.
        """
        for name, weight in selection.mixture.items():
            if not abs(weight) <= MOST_WEIGHT:
                raise UsageError(
                    f"adapter {name!r}: expected a weight from {-MOST_WEIGHT:g} to {MOST_WEIGHT:g}, found {weight:g}"
                )
        where = {self.keys[name]: self.adapters[name].activation for name in selection.mixture}
        return Recipe.of(((self.keys[name], weight) for name, weight in selection.mixture.items() if weight), where)


def scoring_signals(options: VllmOptions, model: PreTrainedModel, pool: AdapterPool) -> tuple[str, ...]:
    """The signals of the options that can score a pool, the settings' own first. Other signals are dropped without
    refusing the pool.

    Raises:
        LoGoError: the settings' own signal cannot score it.
    """
    own, *others = options.all_signals
    plan(model, pool, options.settings, own)
    usable = [own]
    for signal in others:
        try:
            plan(model, pool, options.settings, signal)
        except LoGoError as error:
            log.warning("LoGo: requests cannot ask for the signal %r: %s", signal, error)
        else:
            usable.append(signal)
    return tuple(usable)


def head_adapter(pool: Iterable[Adapter]) -> str | None:
    """The name of an adapter that acts on the output head; None if there is none."""
    return next((adapter.name for adapter in pool if any(path.endswith("lm_head") for path in adapter.modules)), None)


def described(pool: KeyedPool) -> dict[str, Any]:
    """The pool in a form that vLLM can send to other processes."""
    return {"digest": pool.digest, "names": list(pool.keys)}


def check_alike(described: Sequence[Mapping[str, Any]], own: KeyedPool) -> None:
    """Raises PoolError unless all workers have this process's pool."""
    for number, found in enumerate(described):
        if found["digest"] != own.digest:
            raise PoolError(
                f"worker {number} has another pool than this process ({found['digest']}, not {own.digest}; "
                f"{len(found['names'])} adapters, not {len(own.keys)}): put the same files on every machine and start "
                "again"
            )
