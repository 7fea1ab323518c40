"""New blocks of vLLM's cache of keys and values are cleared before they are used.

A request that overflows leaves NaN in its blocks, which others get when it has ended. Attention weights what stands
behind the last token of a block by 0, but 0 times NaN is NaN, so that it would spoil their answers. vLLM's model
runners clear the blocks that a step names; its scheduler names them only for models with a state (such as Mamba). On
CPUs they clear full attention alone, and nothing of a model whose layers all have a window: there it is done here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def clearing(runner: Any) -> tuple[int, ...] | None:
    """Prepares a model runner of vLLM for clearing blocks, and returns the number of tokens in a block of each group of
    its cache; None if the scheduler names all new blocks by itself."""
    config = runner.kv_cache_config
    if config.needs_kv_cache_zeroing:
        return None
    if _clears_all(runner):
        runner._init_kv_zero_meta()
    ranks = runner.vllm_config.parallel_config.decode_context_parallel_size
    specs = [group.kv_cache_spec for group in config.kv_cache_groups]
    return tuple(spec.block_size * (ranks if spec.dcp_sharded else 1) for spec in specs)


def clear(runner: Any, scheduled: Any, sizes: Sequence[int]) -> None:
    """Clears the blocks that are new in a step, or has the runner do so; arguments as `new_blocks`."""
    numbers = new_blocks(scheduled, sizes)
    if _clears_all(runner):
        scheduled.new_block_ids_to_zero = numbers
        return
    for cache in _caches(runner):
        for number in numbers:
            cache[number].zero_()


def _caches(runner: Any) -> list[Tensor]:
    """The memory of all layers; layers of several groups of the cache share theirs."""
    layers = runner.compilation_config.static_forward_context
    caches: dict[int, Tensor] = {}
    for group in runner.kv_cache_config.kv_cache_groups:
        for name in group.layer_names:
            cache = getattr(layers.get(name), "kv_cache", None)
            if isinstance(cache, Tensor):
                caches[cache.data_ptr()] = cache
    return list(caches.values())


def _clears_all(runner: Any) -> bool:
    """Whether a model runner clears the blocks of every layer: vLLM's first one for CPUs does not."""
    return runner.device.type != "cpu" or hasattr(runner, "kv_block_zeroer")


def new_blocks(scheduled: Any, sizes: Sequence[int]) -> list[int]:
    """The numbers of the blocks that the requests of a step (vLLM's `SchedulerOutput`) have got for it, and that hold
    nothing of theirs; `sizes`: the number of tokens in a block of each group."""
    numbers: list[int] = []
    for request in scheduled.scheduled_new_reqs:
        numbers += _behind(request.num_computed_tokens, request.block_ids, sizes)
    running = scheduled.scheduled_cached_reqs
    resumed = getattr(running, "resumed_req_ids", ())  # from 0.34 on, those that were put back are new requests
    for name, computed, blocks in zip(running.req_ids, running.num_computed_tokens, running.new_block_ids, strict=True):
        if blocks is not None:
            whole = name in resumed  # all of its blocks are named
            numbers += _behind(computed if whole else 0, blocks, sizes)
    return numbers


def _behind(computed: int, blocks: Sequence[Sequence[int]], sizes: Sequence[int]) -> list[int]:
    """The blocks of a request, of each group, behind those that hold its computed tokens."""
    return [number for part, size in zip(blocks, sizes, strict=True) for number in part[-(-computed // size) :]]
