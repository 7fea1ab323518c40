"""The pool in vLLM's processes: fitted to the base model, with each adapter under the key of its content."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from logo.adapters.activation import OFF
from logo.adapters.digests import key_of, pool_digest
from logo.adapters.format import Adapter, open_adapter
from logo.adapters.layout import BaseLayout
from logo.adapters.pool import AdapterPool
from logo.backends.plan import slot_rank
from logo.backends.vllm.options import Mode, Options
from logo.backends.vllm.recipe import Recipe
from logo.errors import LoGoError, PoolError, UsageError
from logo.pools import open_pool
from logo.selection.plan import plan
from logo.selection.selector import Selection

if TYPE_CHECKING:
    from transformers import PreTrainedModel


log = logging.getLogger("vllm.logo")  # below vLLM's own, so that its lines look like theirs

# What is done to a pool, the adapter's name, and its folder: `("add", name, folder)`, `("replace", name, folder)` or
# `("remove", name, "")`.
Change = tuple[str, str, str]


@dataclass(frozen=True)
class KeyedPool:
    """Adapters that fit one base model.

    Attributes:
        adapters: the pool.
        keys: name -> key, in pool order.
        forced, without: the user's settings of where adapters act, see `logo.adapters.activation.acting`.
    """

    adapters: AdapterPool
    keys: Mapping[str, str]
    forced: str | None = None
    without: str = OFF

    @classmethod
    def of(cls, adapters: AdapterPool, forced: str | None = None, without: str = OFF) -> KeyedPool:
        """Reads every adapter's file once, for its digest."""
        keys = {adapter.name: key_of(adapter) for adapter in adapters}
        return cls(adapters.acting(forced, without), keys, forced, without)

    @classmethod
    def open(cls, options: Options, model: PreTrainedModel) -> KeyedPool:
        """The pool that the options name, fitted to a model (a skeleton will do).

        Raises:
            LoGoError: it cannot be opened, or does not fit.
        """
        return cls.of(fitted_pool(options, model), options.settings.activation, options.settings.when_not_invoked)

    @property
    def digest(self) -> str:
        """The digest of the pool's names and contents, which is equal in all processes with the same pool."""
        return pool_digest(self.keys)

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
            keys[name] = key_of(adapters[name])
        return self._of(adapters.values(), keys)

    @property
    def places(self) -> dict[str, tuple[str, str]]:
        """Adapter name -> (key, folder), from which another process opens the same pool."""
        return {name: (key, str(self.adapters[name].folder)) for name, key in self.keys.items()}

    def following(self, places: Mapping[str, Sequence[str]], layout: BaseLayout) -> KeyedPool:
        """The pool of another process, from its `places`; adapters that are the same here are not opened again.

        Raises:
            AdapterError: an adapter that is new here cannot be opened.
        """
        adapters, keys = {}, {}
        for name, (key, folder) in places.items():
            if self.keys.get(name) == key:
                adapters[name], keys[name] = self.adapters[name], key
            else:
                adapters[name] = open_adapter(folder, name).fit(layout)
                keys[name] = key_of(adapters[name])
        return self._of(adapters.values(), keys)

    def _of(self, adapters: Iterable[Adapter], keys: Mapping[str, str]) -> KeyedPool:
        pool = AdapterPool(adapters, self.adapters.refused, default_k=self.adapters.default_k)
        pool = pool.acting(self.forced, self.without)
        return replace(self, adapters=pool, keys={name: keys[name] for name in pool.names})

    def recipe(self, selection: Selection, forced: str | None = None) -> Recipe:
        """The recipe of a selection; without adapters, it is the base model's and has no parts.

        Args:
            forced: where all adapters act; None: each acts where the pool says.

        Raises:
            UsageError: see `logo.adapters.activation.acting`.
        """
        pool = self.adapters.acting(forced)
        where = {self.keys[name]: pool[name].activation for name in selection.mixture}
        return Recipe.of(((self.keys[name], weight) for name, weight in selection.mixture.items() if weight), where)


def fitted_pool(options: Options, model: PreTrainedModel) -> AdapterPool:
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
    return opened.fit(BaseLayout.of(model), on_bad_adapter=how)


def scoring_signals(options: Options, model: PreTrainedModel, pool: AdapterPool) -> tuple[str, ...]:
    """The signals of the options that can score a pool, the settings' own first. Other signals are dropped without
    refusing the pool.

    Raises:
        LoGoError: the settings' own signal cannot score it.
    """
    own, *others = options.all_signals
    plan(model, pool, options.settings)
    usable = [own]
    for signal in others:
        try:
            plan(model, pool, options.settings.for_call(signal=signal))
        except LoGoError as error:
            log.warning("LoGo: requests cannot ask for the signal %r: %s", signal, error)
        else:
            usable.append(signal)
    return tuple(usable)


def mode_of(options: Options, lora: Any, pool: AdapterPool) -> tuple[Mode, str]:
    """`choose_mode` for an engine.

    Args:
        lora: vLLM's `LoRAConfig`.
        pool: fitted to the base model.
    """
    k = min(options.settings.k or pool.default_k, len(pool))
    return choose_mode(options.mode, pool, k, lora.max_loras, lora.max_lora_rank)


def rank_of(adapter: Adapter) -> int:
    """The largest rank of an adapter."""
    return max(adapter.ranks)


def head_adapter(pool: Iterable[Adapter]) -> str | None:
    """The name of an adapter that acts on the output head; None if there is none."""
    return next((adapter.name for adapter in pool if any(path.endswith("lm_head") for path in adapter.modules)), None)


def merged_rank(adapters: Iterable[Adapter]) -> int:
    """The rank of these adapters merged into one: that of the module where theirs have the largest sum."""
    ranks: Counter[str] = Counter()
    for adapter in adapters:
        ranks.update({path: module.rank for path, module in adapter.modules.items()})
    return max(ranks.values(), default=0)


def choose_mode(asked: Mode, pool: AdapterPool, k: int, max_loras: int, max_rank: int) -> tuple[Mode, str]:
    """How mixtures are made, and why.

    Args:
        asked: the user's choice.
        k: adapters per mixture.
        max_loras, max_rank: vLLM's `--max-loras` and `--max-lora-rank`.

    Raises:
        UsageError: vLLM has too few slots, or too small ones; names the adapter and the number to pass.
    """
    largest = max(pool, key=rank_of)
    ranks = sorted((rank_of(adapter) for adapter in pool), reverse=True)
    summed = sum(ranks[:k])
    gates = len(pool) <= max_loras and rank_of(largest) <= max_rank
    if asked != "merge" and gates:
        return "gate", f"{len(pool)} adapters fit into {max_loras} slots of rank {max_rank}"
    if asked != "gate" and summed <= max_rank:
        return "merge", f"{k} adapters have rank {summed} together, and a slot has {max_rank}"
    if rank_of(largest) > max_rank:
        raise UsageError(
            f"--max-lora-rank is {max_rank}, but adapter {largest.name!r} has rank {rank_of(largest)}: pass "
            f"--max-lora-rank {slot_rank(rank_of(largest))} or more"
        )
    if asked == "merge":
        raise UsageError(
            f"--max-lora-rank is {max_rank}, but {k} adapters of this pool have rank {summed} together: pass "
            + (f"--max-lora-rank {slot_rank(summed)} or more, or a smaller k" if slot_rank(summed) else "a smaller k")
        )
    merging = None if asked == "gate" else slot_rank(summed)
    raise UsageError(
        f"--max-loras is {max_loras}, but the pool has {len(pool)} adapters, each of which needs a slot: pass "
        f"--max-loras {len(pool)}"
        + ("" if merging is None else f", or --max-lora-rank {merging} to merge {k} adapters for every request")
    )


def described(pool: KeyedPool, mode: Mode, reason: str) -> dict[str, Any]:
    """The pool in a form that vLLM can send to other processes."""
    return {"digest": pool.digest, "names": list(pool.keys), "mode": mode, "reason": reason}


def check_alike(described: Sequence[Mapping[str, Any]], own: KeyedPool) -> None:
    """Raises PoolError unless all workers have this process's pool."""
    for number, found in enumerate(described):
        if found["digest"] != own.digest:
            raise PoolError(
                f"worker {number} has another pool than this process ({found['digest']}, not {own.digest}; "
                f"{len(found['names'])} adapters, not {len(own.keys)}): put the same files on every machine and start "
                "again"
            )
