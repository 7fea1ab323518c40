"""`Service`: holds the adapters that prompts select, and generates with them, while the pool may change.

    ids -> `Selecting` -> held adapters -> generated together with others -> tokens

The model belongs to the thread that generates. The thread that selects pauses it while it needs the model.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from logo.adapters.activation import earliest, warn_of_silent
from logo.api.names import MixtureRequest
from logo.api.replies import Chosen
from logo.core import Prompt
from logo.endings import at_stop_strings
from logo.engine import LoGo
from logo.mixing.mixer import Mixture
from logo.serve.batching import Batching
from logo.serve.entrance import Entrance
from logo.serve.loading import Loading
from logo.serve.memory import Memory
from logo.serve.packed import HeldMixture
from logo.serve.selecting import Selecting


class Service:
    """One base model and its pool, of which prompts select.

    Args:
        logo, signals: as of `Selecting`.
        max_queue: answers that may wait beside the running ones.
    """

    def __init__(self, logo: LoGo, memory: Memory, *, signals: Sequence[str] = (), max_queue: int = 256) -> None:
        prefix_cache = logo.prefix_cache if logo.fitted.read_once else None
        end_rules = at_stop_strings(logo.model.generation_config, logo.tokenizer)
        self.logo = logo
        self.batching = Batching(logo.model, logo.adapter_cache, memory, logo.prompts.context, prefix_cache, end_rules)
        self.selecting = Selecting(logo, lambda: self.batching.paused(), signals)
        self.loading = Loading(logo.adapter_cache, self.batching.schedule)
        self.entrance = Entrance(memory.concurrent + max_queue, lambda: self.batching.alive)
        self._silent = set[str]()  # the adapters of which a warning says that they do not act

    async def close(self) -> None:
        """Ends everything; requests in flight fail."""
        self.entrance.draining = True
        await asyncio.get_running_loop().run_in_executor(None, self.batching.stop)
        self.selecting.close()

    @property
    def waiting(self) -> int:
        """The number of prompts, requests and answers that wait to be probed, for memory, or to be generated."""
        return self.selecting.waiting + self.loading.waiting + self.batching.waiting

    async def select(self, prompts: Sequence[Prompt], request: MixtureRequest) -> list[HeldMixture | BaseException]:
        """For each prompt of a request the mixture that answers it, whose adapters begin to load (`loading` waits for
        them), or the error for it, as `Selecting.choose`."""
        await self.loading.let_pass(request)
        return await self.selecting.choose(prompts, request, self._held)

    def _held(self, chosen: Chosen, prompt: Prompt) -> HeldMixture:
        """The mixture of a selection, whose adapters begin to load; UsageError: see `Mixture.of`."""
        pool = self.logo.fitted
        weights = {name: weight for name, weight in chosen.selection.mixture.items() if weight}
        mixture = Mixture.of(pool, weights, prompt.ids)
        warn_of_silent((name for name in weights if name not in mixture.weights), self._silent)
        cache = self.logo.adapter_cache
        hold = cache.reserve([pool[name] for name in mixture.weights])
        return HeldMixture(chosen, mixture, earliest(pool.activations, prompt.ids), hold, cache)
