"""`Engine`: the interface between a server's app and what generates.

    MixtureRequest -> choose -> SelectedMixture -> generate -> Delta, Delta, ...

`logo.serving.service.Service` is the engine of one process. The engine alone decides how a mixture is held: the app
only passes the `SelectedMixture` back.
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

# A lower temperature is greedy decoding, as in vLLM, since dividing by it would overflow.
_GREEDY = 1e-5


class Overloaded(LoGoError, RuntimeError):
    """The queue of requests is full."""


class NotReady(LoGoError, RuntimeError):
    """No requests are accepted: the server is shutting down, or cannot generate any more."""


class GenerationFailed(LoGoError, RuntimeError):
    """A sequence that ended without an answer; the cause is its `__cause__`."""


class GenerationTimeout(LoGoError, TimeoutError):
    """A sequence that was not done by its deadline."""


@dataclass(frozen=True)
class MixtureRequest:
    """The mixture that a request wants: forced, or to be selected.

    Attributes:
        adapters: forced: name -> weight, `{}` is the base model alone; None: select.
        options: options of the selection in place of the server's.
        usable: the adapters to which the request's API key is bound; None: the whole pool.
    """

    adapters: Mapping[str, float] | None = None
    options: CallOptions = field(default_factory=CallOptions)
    usable: Patterns | None = None


@dataclass(frozen=True)
class Sampling:
    """How one answer is decoded.

    Attributes:
        max_tokens: the most new tokens.
        temperature: 0 is greedy.
        top_p: the share of the probability mass that is sampled from.
        seed: of this answer's draws; None: random.
        logprobs: how many alternatives are reported beside each token's own log probability; None: no log
            probabilities.
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
    """The log probability of one token, before temperature and top-p.

    Attributes:
        token: its id.
        logprob: natural logarithm of its probability.
        top: the most likely tokens with their log probabilities, best first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Delta:
    """The tokens that one or more steps have added to an answer.

    Attributes:
        tokens: new token ids.
        logprobs: one for each token, if requested.
        finish_reason: None until the answer ends.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason | None


@dataclass(frozen=True)
class Card:
    """What users see of an adapter.

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
        """The card of an adapter; reads the size of its file."""
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
    """The state of an engine in numbers, for metrics.

    Attributes:
        running, waiting: answers that are being generated; requests that are not yet.
        kv_used, kv_total: blocks of keys and values.
        adapters: loaded adapters.
        adapter_bytes, adapter_budget: memory of their columns, and the most that they may have.
        steps: forward passes with and without a mixture: `{"gate", "base"}`.
        prefix_tokens: if prompts are read once: tokens of prompts whose cached keys and values were `"found"` when the
            answer began, or `"missed"` because they had been dropped.
        prefix_bytes: memory of cached prompts.
        not_invoked: how many prompts lacked the invocation tokens of an adapter.
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
    """The mixture of one prompt, ready for generation."""

    @property
    def selection(self) -> Selection:
        """Names, weights, scores."""

    @property
    def queue_ms(self) -> float:
        """How long the prompt waited to be probed."""

    @property
    def probe_ms(self) -> float:
        """How long the probe took, which prompts may share; 0 if nothing was selected."""

    def release(self) -> object:
        """Says that the mixture is no longer needed."""


class Engine(Protocol):
    """One base model and its pool, for many requests.

    Attributes:
        tokenizer: the base model's.
        vocabulary: token ids below this are known.
        context: the most tokens of a prompt and its answer.
        k, signal, probe_text: defaults of the selection.
        unsure_below: the confidence below which a selection counts as unsure.
        signals: the signals that requests may use, the engine's own first.
        adapters: the adapters that requests may use now, by name.
        cards: the card of each adapter.
        selected: the number of answers to which each adapter has contributed.
        draining: whether new requests are refused.
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
    def unsure_below(self) -> float: ...

    @property
    def alive(self) -> bool:
        """Whether answers can be generated."""

    @property
    def ready(self) -> bool:
        """Whether requests are accepted."""

    @property
    def figures(self) -> Figures:
        """The present figures."""

    def prepare(self) -> None:
        """Loads and checks everything before the server starts; `stop` has to follow.

        Raises:
            ModelError: the model cannot be served.
        """

    def stop(self) -> None:
        """Ends all generation."""

    async def start(self) -> None:
        """Begins to serve, inside a running event loop."""

    async def close(self) -> None:
        """Ends everything; requests in flight fail."""

    def admitted(self, count: int = 1) -> AbstractContextManager[None]:
        """Reserves places for so many answers inside the block.

        Raises:
            Overloaded, NotReady: there are none now.
            UsageError: there can never be so many.
        """

    def usable(self, patterns: Patterns | None) -> Mapping[str, Any]:
        """The adapters that match an API key's patterns, by name; None: all."""

    async def choose(self, prompt: Prompt | Sequence[int], wanted: MixtureRequest) -> SelectedMixture:
        """Selects the mixture of a prompt.

        Raises:
            LoGoError: an adapter or signal that does not exist, a weight or k that cannot be used.
        """

    def generate(
        self, ids: Sequence[int], chosen: Any, sampling: Sampling, deadline: float | None = None
    ) -> AsyncGenerator[Delta, None]:
        """Generates the answer to a prompt under its mixture. Leaving the loop ends the generation.

        Args:
            deadline: on the event loop's clock; None: no deadline.

        Raises:
            GenerationFailed, GenerationTimeout: see there.
        """

    async def add(self, folder: Path, name: str, *, replace: bool = False) -> Any:
        """Adds an adapter to the pool; if a check fails, nothing changes."""

    async def remove(self, name: str) -> None:
        """Removes an adapter from the pool; requests that have selected it are still answered with it."""
