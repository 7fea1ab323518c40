"""The values between a server's app and what selects and generates.

MixtureRequest -> SelectedMixture -> Delta, Delta, ...
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from logo.adapters.adapter import Adapter
from logo.core import Selection
from logo.errors import LoGoError

if TYPE_CHECKING:
    from logo.core import FinishReason

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
        options: those of `LoGo.options`, in place of the server's.
        usable: the adapters to which the request's API key is bound; None: the whole pool.
    """

    adapters: Mapping[str, float] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    usable: Patterns | None = None


@dataclass(frozen=True)
class Sampling:
    """How one answer is decoded.

    Attributes:
        max_tokens: the most new tokens.
        temperature: 0 is greedy.
        top_p: the share of the probability mass that is sampled from.
        seed: of this answer's draws; None: random.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature < _GREEDY


@dataclass(frozen=True)
class Delta:
    """The tokens that one or more steps have added to an answer.

    Attributes:
        tokens: new token ids.
        finish_reason: None until the answer ends.
    """

    tokens: tuple[int, ...]
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
    """The state of a server in numbers, for metrics.

    Attributes:
        running, waiting: answers that are being generated; requests that are not yet.
        kv_used, kv_total: tokens whose keys and values are in memory, padding included; the most.
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
