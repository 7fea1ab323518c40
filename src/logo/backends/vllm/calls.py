"""What the router, or the offline engine, calls on every worker of vLLM, through `collective_rpc`.

`logo.backends.vllm.hooks` puts them on vLLM's worker class, and turns errors that a user can fix into answers.
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
    """`described` of the pool there is, for a process that has not opened it: with the folder of each adapter, what
    each signal scores, and those that have left, which this process may still use."""
    assert own.scoring is not None
    more = {"adapters": own.pool.places, "scored": own.scoring.scored, "left": own.processes.held(process)}
    return {**described(own.pool, own.mode, own.reason), **more}


def logo_stage(worker: Any, change: list[str] | None, process: str = "", digest: str = "") -> dict[str, Any]:
    """Begins a change, see `Worker.stage`; or says `wait` where another process changes the pool, or has changed it
    since this one has looked (`digest`). If another process has opened a pool, that is returned as by `logo_pool`.
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
    """The process gives up the change that it has begun."""
    own = _of(worker)
    if own.processes.end(process):
        own.abandon()


def logo_signal(worker: Any, signal: str) -> dict[str, Any]:
    """See `Scoring.open`: of the pool that `logo_stage` has begun, else of the one there is."""
    return _of(worker).open_signal(signal, None)


def logo_calibrate(worker: Any, signal: str, texts: list[list[int]], keys: list[str]) -> dict[str, Any]:
    """See `Scoring.calibrate`: likewise."""
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
    """Notes which pool a process selects from.

    Returns:
        `digest` of the pool there is; `behind`: how many processes select from another one; for a process that does,
        what `_told` says of it.
    """
    own = _of(worker)
    own.processes.note(process, digest)
    now = own.pool.digest
    return {"digest": now, "behind": own.processes.behind(now), **(_told(own, process) if digest != now else {})}


def logo_forget(worker: Any, keys: list[str], process: str = "") -> None:
    """See `Worker.forget`, once no process has answers with these adapters."""
    own = _of(worker)
    own.forget(own.processes.release(process, keys))


def logo_take(worker: Any, keys: list[str]) -> dict[str, Any]:
    """See `Worker.take`."""
    return _of(worker).take(keys)


def logo_clean(worker: Any, recipe: str, reason: str) -> None:
    """Notes that answers with a recipe overflow, and takes numbers that are not finite out of the cache of keys and
    values.

    Whoever is given a block next writes its own tokens there, and attention may multiply the places behind them by 0,
    to which what is not a number does not yield. Runner V1 on a CPU empties blocks before it gives them (`hooks`).
    """
    _of(worker).fail(recipe, reason)
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
