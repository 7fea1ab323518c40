"""`HeldMixture`: the mixture of one sequence, whose adapters are held in the cache."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from logo.adapters.activation import earliest
from logo.adapters.pool import AdapterPool
from logo.core import Selection
from logo.mixing.cache import AdapterCache
from logo.mixing.mixer import Mixture
from logo.serving.packed import PackedMixture


@dataclass(frozen=True)
class HeldMixture:
    """A `logo.protocol.SelectedMixture` whose adapters are held, and loaded once `loaded` has returned.

    Attributes:
        selection: names, weights, scores.
        mixture: the held adapters.
        queue_ms: how long the prompt waited to be probed.
        probe_ms: how long the probe took, which prompts may share; 0 if nothing was selected.
        release: to be called when the mixture is no longer needed, so that its adapters may be evicted. The garbage
            collector does so otherwise.
    """

    selection: Selection
    mixture: PackedMixture
    queue_ms: float
    probe_ms: float
    release: Callable[[], object] = field(repr=False)

    async def loaded(self) -> None:
        """Waits until the adapters are loaded; after an error or a cancellation they are not held any more.

        Raises:
            LoGoError: an adapter that cannot be read, or no room for it.
        """
        loop, waited = asyncio.get_running_loop(), self.mixture.hold
        try:
            for ready in (resident.ready for resident in waited if not resident.ready.done()):
                arrived = asyncio.Event()
                # Not `wrap_future`, which passes a cancellation of this request on to all that wait for the adapter.
                ready.add_done_callback(partial(_tell, loop, arrived))
                await arrived.wait()
            for error in (resident.ready.exception() for resident in waited):
                if error is not None:
                    raise error.with_traceback(None)  # one object, for all requests with the adapter
        except BaseException:
            self.release()
            raise


def _tell(loop: asyncio.AbstractEventLoop, arrived: asyncio.Event, ready: Future[None]) -> None:
    with suppress(RuntimeError):  # the loop has ended, and nobody waits
        loop.call_soon_threadsafe(arrived.set)


def mixed(
    cache: AdapterCache, pool: AdapterPool, selection: Selection, prompt: Sequence[int]
) -> tuple[PackedMixture, int]:
    """Holds the adapters of a selection, which begin to load; also returns how many the prompt does not invoke.

    The caller has to release `PackedMixture.hold`.

    Args:
        pool: fitted to the model.
        prompt: token ids.

    Raises:
        UsageError: see `Mixture.of`.
    """
    weights = {name: weight for name, weight in selection.mixture.items() if weight}
    mixture = Mixture.of(pool, weights, prompt)
    hold = cache.reserve([pool[name] for name in mixture.weights])
    return PackedMixture(hold, mixture, earliest(pool.activations, prompt)), len(weights) - len(mixture.weights)
