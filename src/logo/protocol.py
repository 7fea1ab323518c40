"""What a server asks of an engine. Whatever does this can stand behind the same app.

    wanted -> choose -> SelectedMixture -> generate -> Delta, Delta, ...

`logo.serving.service.Service` is the engine of one process. Gates, caches and places are an engine's own affair: the
app sees a `SelectedMixture` only from outside, and hands it back.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from logo.adapters.format import Adapter
from logo.errors import LoGoError
from logo.prompts import ProbeText, Prompt
from logo.selecting import CallOptions
from logo.selection import Selection

if TYPE_CHECKING:
    from logo.endings import FinishReason

Patterns = tuple[str, ...]
"""Names of adapters, or patterns of them such as `team-a/*`."""

# Below this a temperature is greedy decoding, as in vLLM: dividing by it would overflow.
_GREEDY = 1e-5


class Overloaded(LoGoError, RuntimeError):
    """As many requests wait as may."""


class NotReady(LoGoError, RuntimeError):
    """No requests are taken: the server is going down, or cannot generate any more."""


class GenerationFailed(LoGoError, RuntimeError):
    """A sequence that ended without an answer; the cause is its `__cause__`."""


class GenerationTimeout(LoGoError, TimeoutError):
    """A sequence that was not done by its deadline."""


@dataclass(frozen=True)
class MixtureRequest:
    """What a request asks of its mixture.

    Attributes:
        adapters: instead of selecting: name -> weight; `{}` is the base model alone.
        options: how to select, where not as the server was told.
        usable: what the request's API key is bound to; None: the whole pool.
    """

    adapters: Mapping[str, float] | None = None
    options: CallOptions = field(default_factory=CallOptions)
    usable: Patterns | None = None


@dataclass(frozen=True)
class Sampling:
    """How one answer is decoded.

    Attributes:
        max_tokens: new tokens at most.
        temperature: 0 is greedy.
        top_p: of the probability mass, the share that is sampled from.
        seed: of this answer's draws; None: anything.
        logprobs: None, or how many alternatives are reported beside each token's own log probability.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature < _GREEDY


@dataclass(frozen=True)
class TokenLogprob:
    """What the model thought of one token, before temperature and top-p.

    Attributes:
        token: its id.
        logprob: natural logarithm of its probability.
        top: the most likely tokens with theirs, best first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Delta:
    """What one or more steps added to an answer.

    Attributes:
        tokens: new token ids.
        logprobs: one for each, where asked for.
        finish_reason: None while the answer goes on.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason | None


@dataclass(frozen=True)
class Card:
    """What is shown of an adapter.

    Attributes:
        rank: the largest of its modules.
        targets: last parts of the names of its modules, each once.
        size_bytes: of its file.
    """

    name: str
    rank: int
    parameters: int
    modules: int
    targets: tuple[str, ...]
    size_bytes: int

    @classmethod
    def of(cls, adapter: Adapter) -> Card:
        """The card of an adapter; looks at its file."""
        return cls(
            adapter.name,
            max(adapter.ranks),
            adapter.parameters,
            len(adapter.modules),
            tuple(sorted({path.rpartition(".")[2] for path in adapter.modules})),
            adapter.size,
        )


@dataclass(frozen=True)
class Figures:
    """What an engine is doing, and what it holds.

    Attributes:
        running, waiting: answers that are being generated; requests that have not begun to be.
        kv_used, kv_total: blocks of keys and values.
        adapters: those whose tensors are ready to be mixed.
        adapter_bytes, adapter_budget: memory of their columns, and how much there may be.
        steps: forward passes with a mixture and without: `{"gate", "base"}`.
        prefix_tokens: where prompts are read once: tokens of prompts that were `"found"` as the base model had read
            them, and those that were `"missed"`, since they had been dropped.
        prefix_bytes: memory of what is kept of them.
        not_invoked: how often an adapter was to answer a prompt that lacks its invocation tokens.
    """

    running: int
    waiting: int
    kv_used: int
    kv_total: int
    adapters: int
    adapter_bytes: int
    adapter_budget: int
    steps: Mapping[str, int]
    prefix_tokens: Mapping[str, int] = field(default_factory=dict)
    prefix_bytes: int = 0
    not_invoked: int = 0


class SelectedMixture(Protocol):
    """A mixture that is ready to be generated with."""

    @property
    def selection(self) -> Selection:
        """Names, weights, scores."""

    @property
    def queue_ms(self) -> float:
        """How long the prompt waited to be probed."""

    @property
    def probe_ms(self) -> float:
        """How long probing took, together with others; 0 where nothing was selected."""

    def release(self) -> object:
        """The mixture is no longer needed."""


class Engine(Protocol):
    """One base model and its pool, for many requests.

    Attributes:
        tokenizer: the base model's.
        vocabulary: token ids below this are known.
        context: tokens of a prompt and its answer at most.
        k, signal, probe_text: how prompts are selected for where a request does not say.
        signals: those that requests may ask for, the engine's own first.
        adapters: those that requests may use now, by name.
        cards: what is shown of each.
        selected: how many answers each has had a part in.
        draining: takes no new requests.
    """

    draining: bool
    signals: tuple[str, ...]
    selected: dict[str, int]

    @property
    def adapters(self) -> Mapping[str, Any]: ...
    @property
    def cards(self) -> Mapping[str, Card]: ...
    @property
    def tokenizer(self) -> Any: ...
    @property
    def vocabulary(self) -> int: ...
    @property
    def context(self) -> int: ...
    @property
    def k(self) -> int: ...
    @property
    def signal(self) -> str: ...
    @property
    def probe_text(self) -> ProbeText | None: ...

    @property
    def alive(self) -> bool:
        """Whether answers can be generated."""

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""

    @property
    def figures(self) -> Figures:
        """As they are now."""

    def prepare(self) -> None:
        """Before anything else: what fails slowly fails here. `stop` has to follow.

        Raises:
            ModelError: the model cannot be served.
        """

    def stop(self) -> None:
        """Ends what is still being generated."""

    async def start(self) -> None:
        """Begins to serve; inside a running event loop."""

    async def close(self) -> None:
        """Ends everything; requests in flight fail."""

    def admitted(self, count: int = 1) -> AbstractContextManager[None]:
        """Room for so many answers, inside the block.

        Raises:
            Overloaded, NotReady: there is none.
            UsageError: there can never be.
        """

    def usable(self, patterns: Patterns | None) -> Mapping[str, Any]:
        """The adapters that an API key may use now, by name; None: all of them."""

    async def choose(self, prompt: Prompt | Sequence[int], wanted: MixtureRequest) -> SelectedMixture:
        """The mixture for a prompt.

        Raises:
            LoGoError: an adapter or signal that does not exist, a weight or k that cannot be used.
        """

    def generate(
        self, ids: Sequence[int], chosen: Any, sampling: Sampling, deadline: float | None = None
    ) -> AsyncGenerator[Delta, None]:
        """The tokens that continue a prompt under what `choose` gave. Leaving the loop ends the answer.

        Args:
            deadline: by the event loop's clock; None: as long as it takes.

        Raises:
            GenerationFailed, GenerationTimeout: see there.
        """

    async def add(self, folder: Path, name: str, *, replace: bool = False) -> Any:
        """Puts an adapter into the pool; one that fails a check changes nothing."""

    async def remove(self, name: str) -> None:
        """Takes an adapter out of the pool; requests that have selected it are still answered with it."""
