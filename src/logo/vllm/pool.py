"""The pool in vLLM's processes: opened and changed alike in all, and fitted to the base model without its weights."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from logo.adapters.adapter import Adapter, open_adapter
from logo.adapters.layout import BaseLayout
from logo.adapters.pool import AdapterPool, open_pool
from logo.errors import LoGoError, PoolError, UsageError
from logo.selection.points import plan
from logo.vllm.options import VllmOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("vllm.logo")

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as `--max-lora-rank`."""


MOST_SLOTS = 64
"""How many slots vLLM is given where the user does not say; each takes memory for an adapter of the largest rank."""


def pool_of(
    options: VllmOptions, model: PreTrainedModel, before: AdapterPool | None = None, change: Sequence[str] = ()
) -> AdapterPool:
    """The pool that the options name, or another one after a change; which stays as it is.

    Args:
        model: the base model, to which it is fitted; a skeleton will do.
        before: the pool that is changed; None: it is opened.
        change: `("add", name, folder)`, `("replace", name, folder)` or `("remove", name)`.

    Raises:
        AdapterError: an adapter cannot be used, or does not fit.
        PoolError: the pool has an adapter of that name already or has none, or it cannot be opened.
    """
    layout, settings = BaseLayout.of(model), options.settings
    if before is None:
        name = str(model.config.name_or_path)
        opened = open_pool(options.pool, name, on_bad_adapter=options.on_bad_adapter, examples=settings.examples)
        return opened.fit(layout, on_bad_adapter=options.on_bad_adapter).acting(settings.activation)
    kind, name, *where = change
    if kind == "add" and name in before:
        raise PoolError(f"the pool has an adapter {name!r} already")
    kept = before.remove(name) if name in before or kind == "remove" else before
    if kind == "remove":
        if not len(kept):
            raise PoolError(f"adapter {name!r} is the last one of the pool and cannot be removed")
        return kept
    made = open_adapter(where[0], name).fit(layout)
    made.verify()  # finds what is not finite, also in layers that no signal reads
    return kept.add(made).acting(settings.activation)


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
            log.info("LoGo: requests cannot ask for the signal %r: %s", signal, error)
        else:
            usable.append(signal)
    return tuple(usable)


def rank_of(pool: AdapterPool) -> int:
    """The `--max-lora-rank` that a pool needs; UsageError if vLLM has none that is large enough."""
    largest = max(pool, key=lambda adapter: max(adapter.ranks))
    rank = next((allowed for allowed in RANKS if allowed >= max(largest.ranks)), None)
    if rank is None:
        raise UsageError(f"adapter {largest.name!r} has rank {max(largest.ranks)}, but vLLM allows at most {RANKS[-1]}")
    return rank


def slots_of(pool: AdapterPool, k: int) -> int:
    """The `--max-loras` for a pool: all of a small one, and of a large one as many as answers in progress may need."""
    return min(len(pool), max(k, MOST_SLOTS))


def targets_of(pool: AdapterPool) -> tuple[str, ...]:
    """The `--lora-target-modules` that a pool needs."""
    return tuple(sorted({path.rpartition(".")[2] for adapter in pool for path in adapter.modules}))


def check_rank(pool: AdapterPool, most: int) -> None:
    """UsageError if an adapter's rank is above vLLM's `--max-lora-rank`; names the number to pass."""
    if (rank := rank_of(pool)) > most:
        largest = max(pool, key=lambda adapter: max(adapter.ranks))
        raise UsageError(
            f"--max-lora-rank is {most}, but adapter {largest.name!r} has rank {max(largest.ranks)}: "
            f"pass --max-lora-rank {rank} or more"
        )


def head_adapter(pool: Iterable[Adapter]) -> str | None:
    """The name of an adapter that acts on the output head; None if there is none."""
    return next((adapter.name for adapter in pool if any(path.endswith("lm_head") for path in adapter.modules)), None)
