"""What the router, or the offline engine, calls on every worker of vLLM, through `collective_rpc`.

`logo.backends.vllm.hooks` puts them on vLLM's worker class, and turns errors that a user can mend into answers.
"""

from __future__ import annotations

from typing import Any

import torch

from logo.backends.vllm.worker import Worker
from logo.errors import ModelError


def _of(worker: Any) -> Worker:
    found = getattr(getattr(worker.model_runner, "lora_manager", None), "logo", None)
    if found is None:
        raise ModelError("LoGo is not in this worker: start vLLM with --enable-lora, and name a pool in LOGO_POOL")
    return found  # type: ignore[no-any-return]


def logo_stage(worker: Any, change: list[str] | None) -> dict[str, Any]:
    """See `Worker.stage`."""
    return _of(worker).stage(None if change is None else (change[0], change[1], change[2]))


def logo_signal(worker: Any, signal: str) -> dict[str, Any]:
    """See `Scoring.open`: of the pool that `logo_stage` has begun, else of the one there is."""
    return _of(worker).open_signal(signal, None)


def logo_calibrate(worker: Any, signal: str, keys: list[str]) -> dict[str, Any]:
    """See `Scoring.calibrate`: likewise."""
    return _of(worker).open_signal(signal, keys)


def logo_commit(worker: Any) -> None:
    """See `Worker.commit`."""
    _of(worker).commit()


def logo_forget(worker: Any, keys: list[str]) -> None:
    """See `Worker.forget`."""
    _of(worker).forget(keys)


def logo_take(worker: Any, keys: list[str]) -> dict[str, Any]:
    """See `Worker.take`."""
    return _of(worker).take(keys)


def logo_clean(worker: Any, recipe: str, reason: str) -> None:
    """Notes that answers with a recipe overflow, and takes numbers that are not finite out of the cache of keys and
    values.

    Whoever is given a block next writes its own tokens there, and attention may multiply the places behind them by 0,
    to which what is not a number does not yield. On a CPU it does, so that blocks are emptied before they are given
    (`hooks`), and there is nothing left to do.
    """
    _of(worker).fail(recipe, reason)
    for cache in worker.model_runner.kv_caches:
        for part in cache if isinstance(cache, (list, tuple)) else (cache,):
            if part.dtype in (torch.float32, torch.bfloat16, torch.float16) and part.device.type != "cpu":
                part.nan_to_num_(0.0, 0.0, 0.0)


CALLS = (logo_stage, logo_signal, logo_calibrate, logo_commit, logo_forget, logo_take, logo_clean)
