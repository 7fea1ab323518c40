"""The pool in vLLM's processes: opened and changed alike in all, and fitted to the base model without its weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from logo.adapters.adapter import open_adapter
from logo.adapters.layout import BaseLayout
from logo.adapters.pool import AdapterPool, open_pool
from logo.errors import LoGoError, PoolError, UsageError
from logo.selection.plan import plan
from logo.vllm.options import VllmOptions, log

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What vLLM takes as `--max-lora-rank`.
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# How many slots vLLM is given where the user does not say; each takes memory for an adapter of the largest rank.
_MOST_SLOTS = 64


def pool_of(
    options: VllmOptions, model: PreTrainedModel, before: AdapterPool | None = None, change: Sequence[str] = ()
) -> AdapterPool:
    """The pool that the options name, fitted to the base model (a skeleton will do); or another one after a change.

    Args:
        before: the pool that is changed; None: it is opened.
        change: `("add" or "replace", name, folder)` or `("remove", name, "")`.

    Raises:
        AdapterError: an adapter cannot be used, or does not fit.
        PoolError: the pool has an adapter of that name already or has none, or it cannot be opened.
    """
    layout = BaseLayout.of(model)
    settings = options.settings
    if before is None:
        name = str(model.config.name_or_path)
        opened = open_pool(options.pool, name, on_bad_adapter=options.on_bad_adapter, examples=settings.examples)
        return opened.fit(layout, on_bad_adapter=options.on_bad_adapter, activation=settings.activation)
    kind, name, folder = change
    if kind == "add" and name in before:
        raise PoolError(f"the pool has an adapter {name!r} already")
    others = before.remove(name) if name in before or kind == "remove" else before
    if kind == "remove":
        if not len(others):
            raise PoolError(f"adapter {name!r} is the last one of the pool and cannot be removed")
        return others
    adapter = open_adapter(folder, name).fit(layout).acting(settings.activation)
    adapter.verify()  # finds what is not finite, also in layers that no signal reads
    return others.add(adapter)


def scoring_signals(options: VllmOptions, model: PreTrainedModel, pool: AdapterPool) -> tuple[str, ...]:
    """The signals of the options that can score a pool, the settings' own first; LoGoError: that one cannot."""
    usable = []
    for signal in options.all_signals:
        try:
            plan(model, pool, options.settings, signal)
        except LoGoError as error:
            if signal == options.settings.signal:
                raise
            log.info("LoGo: requests cannot ask for the signal %r: %s", signal, error)
        else:
            usable.append(signal)
    return tuple(usable)


def rank_of(pool: AdapterPool, most: int = _RANKS[-1]) -> int:
    """The `--max-lora-rank` that a pool needs; UsageError if it is above the one that was given."""
    largest = max(pool, key=lambda adapter: max(adapter.ranks))
    needed = max(largest.ranks)
    allowed = next((rank for rank in _RANKS if rank >= needed), None)
    if allowed is None:
        raise UsageError(f"adapter {largest.name!r} has rank {needed}, but vLLM allows at most {_RANKS[-1]}")
    if allowed > most:
        difference = f"--max-lora-rank is {most}, but adapter {largest.name!r} has rank {needed}"
        raise UsageError(f"{difference}: pass --max-lora-rank {allowed} or more")
    return allowed


def slots_of(pool: AdapterPool, k: int, grows: bool = False) -> int:
    """The `--max-loras` for a pool: all of a small one that stays so, else as many as answers in progress may need."""
    return max(k, _MOST_SLOTS) if grows else min(len(pool), max(k, _MOST_SLOTS))


def targets_of(pool: AdapterPool) -> tuple[str, ...]:
    """The `--lora-target-modules` that a pool needs."""
    return tuple(sorted({target for adapter in pool for target in adapter.targets}))


def head_adapter(pool: AdapterPool) -> str | None:
    """The name of an adapter that acts on the output head; None if there is none."""
    return next((adapter.name for adapter in pool if any(path.endswith("lm_head") for path in adapter.modules)), None)
