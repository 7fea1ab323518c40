"""The functions that the router and the offline engine call on every worker of vLLM through `collective_rpc`.

`logo.backends.vllm.hooks` makes them methods of vLLM's worker class, and returns their errors as text.
"""

from __future__ import annotations

from typing import Any

import torch

from logo.backends.vllm.pool import described
from logo.backends.vllm.worker import Worker
from logo.errors import ModelError


def _of(worker: Any) -> Worker:
    found = getattr(getattr(worker.model_runner, "lora_manager", None), "logo", None)
    if found is None:
        raise ModelError("LoGo is not in this worker: start vLLM with --enable-lora, and name a pool in LOGO_POOL")
    return found  # type: ignore[no-any-return]


def _told(own: Worker, process: str) -> dict[str, Any]:
    """`described` of the current pool, for a process that has not opened it. Adds the key and folder of each adapter,
    what each signal scores, and the keys of removed adapters that this process may still use."""
    assert own.scoring is not None
    more = {"adapters": own.pool.places, "scored": own.scoring.scored, "left": own.processes.held(process)}
    return {**described(own.pool, own.mode, own.reason), **more}


def logo_stage(worker: Any, change: list[str] | None, process: str = "", digest: str = "") -> dict[str, Any]:
    """Begins a change of the pool; see `Worker.stage`. Returns `wait`
    while another process changes the pool, or if the pool is not the one that the caller knows (`digest`). Returns
    `_told` if another process has opened the pool.
    """
    own = _of(worker)
    if not own.processes.begin(process):
        return {"wait": True}
    if change is None and own.scoring is not None:
        own.processes.end(process)
        own.processes.note(process, own.pool.digest)
        return _told(own, process)
    if change is not None and digest != own.pool.digest:
        own.processes.end(process)
        return {"wait": True}
    return own.stage(None if change is None else (change[0], change[1], change[2]))


def logo_abandon(worker: Any, process: str = "") -> None:
    """Drops the change that this process has begun."""
    own = _of(worker)
    if own.processes.end(process):
        own.abandon()


def logo_signal(worker: Any, signal: str) -> dict[str, Any]:
    """See `Scoring.open`; applies to the staged pool if there is one, else to the current pool."""
    return _of(worker).open_signal(signal, None)


def logo_calibrate(worker: Any, signal: str, texts: list[list[int]], keys: list[str]) -> dict[str, Any]:
    """See `Scoring.calibrate`; applies to the same pool as `logo_signal`."""
    return _of(worker).open_signal(signal, (texts, keys))


def logo_commit(worker: Any, process: str = "") -> None:
    """See `Worker.commit`."""
    own = _of(worker)
    before = own.pool.keys.values()
    own.commit()
    own.processes.note(process, own.pool.digest)
    own.processes.changed(before, own.pool.keys.values())
    own.processes.end(process)


def logo_pool(worker: Any, process: str, digest: str) -> dict[str, Any]:
    """Notes the digest of the pool that a process selects from.

    Returns:
        `digest`: of the current pool; `behind`: the number of processes that select from another one; and the entries
        of `_told`, if the caller is one of these.
    """
    own = _of(worker)
    own.processes.note(process, digest)
    now = own.pool.digest
    return {"digest": now, "behind": own.processes.behind(now), **(_told(own, process) if digest != now else {})}


def logo_forget(worker: Any, keys: list[str], process: str = "") -> None:
    """Notes that a process has no more answers with these adapters, and removes those that no process uses."""
    own = _of(worker)
    own.forget(own.processes.release(process, keys))


def logo_take(worker: Any, keys: list[str], among: dict[str, list[str]] | None = None) -> dict[str, Any]:
    """See `Worker.take`."""
    return _of(worker).take(keys, among)


def logo_clean(worker: Any, recipe: str | None, reason: str) -> None:
    """Replaces non-finite numbers in the KV cache by 0, after answers that overflow; marks their recipe as failed, or
    none if the base model alone has answered.

    The next request that gets such a block overwrites only the positions of its own tokens. Attention may multiply the
    positions behind them by 0, which does not remove a NaN. Runner V1 on a CPU zeroes blocks before they are reused
    (`hooks`), so nothing is done there.
    """
    own = _of(worker)
    if recipe is not None:
        own.fail(recipe, reason)
    runner = worker.model_runner
    if runner.device.type == "cpu" and hasattr(runner, "_zero_block_ids"):
        return
    for cache in runner.kv_caches:
        for part in cache if isinstance(cache, (list, tuple)) else (cache,):
            if part.dtype in (torch.float32, torch.bfloat16, torch.float16):
                part.nan_to_num_(0.0, 0.0, 0.0)


CALLS = (
    *(logo_stage, logo_abandon, logo_signal, logo_calibrate, logo_commit),
    *(logo_pool, logo_forget, logo_take, logo_clean),
)
