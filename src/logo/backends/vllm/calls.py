"""The functions that the router and the offline engine call on every worker of vLLM through `collective_rpc`.

`logo.backends.vllm.hooks` makes them methods of vLLM's worker class, and returns their errors as text.
"""

from __future__ import annotations

from typing import Any

from logo.backends.vllm.pool import described
from logo.backends.vllm.worker import Worker
from logo.errors import ModelError


def _of(worker: Any) -> Worker:
    found = getattr(getattr(worker.model_runner, "lora_manager", None), "logo", None)
    if found is None:
        raise ModelError("LoGo is not in this worker: start vLLM with --enable-lora, and name a pool in LOGO_POOL")
    return found  # type: ignore[no-any-return]


def logo_stage(worker: Any, change: list[str] | None, process: str = "") -> dict[str, Any]:
    """Begins to open or to change the pool; see `Worker.stage`. While another process opens the pool, it returns
    `wait`; if one has opened it, `described` of the pool and, as `scored`, what each signal scores.
    """
    own = _of(worker)
    if change is None:
        if own.opener not in (None, process):
            return {"wait": True}
        if own.scoring is not None:
            return {**described(own.pool), "scored": own.scoring.scored}
        own.opener = process
    return own.stage(None if change is None else (change[0], change[1], change[2]))


def logo_abandon(worker: Any, process: str = "") -> None:
    """Drops the pool that this process has staged."""
    own = _of(worker)
    if own.opener in (None, process):
        own.opener = None
        own.abandon()


def logo_signal(worker: Any, signal: str) -> dict[str, Any]:
    """See `Scoring.open`; applies to the staged pool if there is one, else to the current pool."""
    return _of(worker).open_signal(signal, None)


def logo_calibrate(worker: Any, signal: str, texts: list[list[int]], keys: list[str]) -> dict[str, Any]:
    """See `Scoring.calibrate`; applies to the same pool as `logo_signal`."""
    return _of(worker).open_signal(signal, (texts, keys))


def logo_commit(worker: Any) -> None:
    """See `Worker.commit`."""
    own = _of(worker)
    own.commit()
    own.opener = None


def logo_forget(worker: Any, keys: list[str]) -> None:
    """See `Worker.forget`."""
    _of(worker).forget(keys)


def logo_scores(worker: Any, keys: list[str]) -> dict[str, Any]:
    """See `Worker.scores`."""
    return _of(worker).scores(keys)


def logo_failures(worker: Any, keys: list[str]) -> dict[str, str | None]:
    """See `Worker.failures`."""
    return _of(worker).failures(keys)


CALLS = (
    *(logo_stage, logo_abandon, logo_signal, logo_calibrate, logo_commit),
    *(logo_forget, logo_scores, logo_failures),
)
