"""From a selection to the mixture of one sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from logo.adapters.activation import earliest
from logo.adapters.pool import AdapterPool
from logo.errors import UsageError
from logo.mixing import NEVER, begins
from logo.mixing.packed import Mixture
from logo.mixing.store import AdapterStore
from logo.selection import Selection


@dataclass(frozen=True)
class Chosen:
    """A mixture that is ready for generation.

    Attributes:
        selection: names, weights, scores.
        mixture: the columns of its adapters in the store.
        queue_ms: time that the prompt waited for its probe.
        probe_ms: duration of the probe, together with others; 0 without a selection.
        release: to be called when the mixture is no longer needed. Until then its adapters stay in the store. The
            garbage collector releases forgotten ones.
    """

    selection: Selection
    mixture: Mixture
    queue_ms: float
    probe_ms: float
    release: Callable[[], object] = field(repr=False)


def mixed(store: AdapterStore, pool: AdapterPool, selection: Selection, prompt: Sequence[int]) -> tuple[Mixture, int]:
    """The mixture, and how many adapters of the selection do nothing, since the prompt does not invoke them.

    The adapters are held; who asked has to release `Mixture.hold`.

    Args:
        pool: fitted to the model.
        prompt: token ids.

    Raises:
        UsageError: see `logo.mixing.activated.begins`; or an adapter that answers alone only.
        LoGoError: an adapter that cannot be read, or no room for it.
    """
    weights = {name: weight for name, weight in selection.mixture.items() if weight}
    for name in weights:
        if pool[name].alone:
            raise UsageError(f"adapter {name!r} is a DoRA adapter, which cannot be mixed into a batch of requests")
    places = begins(pool, weights, prompt)
    used = [(pool[name], weights[name], begin) for name, begin in places.items() if begin != NEVER]
    hold = store.hold([store.source(adapter) for adapter, *_ in used])
    mixture = Mixture(
        hold,
        tuple(weight for _, weight, _ in used),
        tuple(begin for *_, begin in used),
        earliest(pool.activations, prompt),
    )
    return mixture, len(places) - len(used)
