"""What a request is to LoGo inside vLLM: a mixture of adapters, or a probe. The path of its `LoRARequest` says so.

    {"mix": [["d1f0a3…", 0.25, [], null], ["77b2c9…", 0.75, [], 4]]}    key of an adapter, weight, where it acts
    {"probe": ["5f…", "a3…", "calibrated", null, false, false, null]}   see `ProbeRequest`

vLLM keys cached keys and values by this path. It holds digests of adapters instead of their names, so an adapter that
is replaced under its name never meets keys and values of the old one. Clients cannot write such paths.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, replace
from functools import lru_cache
from typing import Any

from logo.adapters.activation import Activation

# The name of every `LoRARequest` of ours: vLLM's metrics have a label for each name, which mixtures must not have.
NAME = "logo"


@dataclass(frozen=True)
class Mix:
    """A mixture."""

    parts: tuple[tuple[str, float, Activation], ...]  # key of an adapter, weight, where it acts; the highest first
    prompt: int | None = None  # the number of tokens of the prompt, if a completion that is scored follows it

    @classmethod
    def of(cls, weights: Iterable[tuple[str, float, Activation]], prompt: int | None = None) -> Mix:
        """The mixture of these adapters; weights of adapters with equal content are added."""
        summed: dict[tuple[str, Activation], float] = {}
        for key, weight, where in weights:
            summed[key, where] = summed.get((key, where), 0.0) + weight
        # Nine digits, as in the path, represent every float32 exactly.
        parts = [(key, float(f"{weight:.9g}"), where) for (key, where), weight in summed.items() if weight]
        return cls(tuple(sorted(parts, key=lambda part: (-part[1], part[0]))), prompt)

    @property
    def keys(self) -> tuple[str, ...]:
        """Of its adapters."""
        return tuple(key for key, _, _ in self.parts)

    @property
    def path(self) -> str:
        """The path that `parse` reads."""
        parts = [[key, weight, where.tokens, where.last] for key, weight, where in self.parts]
        return json.dumps({"mix": parts} if self.prompt is None else {"mix": parts, "prompt": self.prompt})

    def begins(self, prompt: Sequence[int]) -> tuple[int | None, ...]:
        """The position of a prompt from which each adapter acts; None: it acts nowhere."""
        prompt = prompt[: self.prompt]
        return tuple(where.begin(prompt) for _, _, where in self.parts)


@dataclass(frozen=True)
class ProbeRequest:
    """A prompt whose hidden vectors are read, and which no adapter acts on."""

    key: str  # under which its scores are kept until they are taken
    pool: str  # the digest of the pool that is scored
    signal: str  # that scores it; empty: its hidden vectors are kept, to calibrate
    among: tuple[str, ...] | None = None  # the adapters that may be selected, others may have no score (-inf)
    without_examples: bool = False  # whether example prompts do not count
    alone: bool = False  # whether nobody may find its keys and values in vLLM's cache
    encoded: tuple[float | None, ...] | None = None  # what a text encoder says of the adapters, in pool order

    @property
    def path(self) -> str:
        """The path that `parse` reads."""
        return json.dumps({"probe": astuple(self)})


@lru_cache(maxsize=4096)
def parse(path: str) -> Mix | ProbeRequest | None:
    """What the path of a `LoRARequest` says; None: the request is not ours."""
    content: Any = json.loads(path) if path.startswith("{") else {}
    if "probe" in content:
        probe = ProbeRequest(*content["probe"])
        among = None if probe.among is None else tuple(probe.among)
        encoded = None if probe.encoded is None else tuple(probe.encoded)
        return replace(probe, among=among, encoded=encoded)
    if "mix" in content:
        parts = ((key, weight, Activation(tuple(tokens), last)) for key, weight, tokens, last in content["mix"])
        return Mix(tuple(parts), content.get("prompt"))
    return None


def lora_request(content: Mix | ProbeRequest) -> Any:
    """The `LoRARequest` by which vLLM's engine gets it.

    All have the same id, by which vLLM's scheduler limits the adapters of a batch: slots are ours to count. Workers
    give each request an id of its own.
    """
    from vllm.lora.request import LoRARequest

    return LoRARequest(NAME, 1, content.path)


def prompt_number(request_id: str) -> int:
    """The number of a prompt among those of its request: vLLM writes it behind the last hyphen of the ids that it gives
    to the prompts of a completion, such as `cmpl-8f3a-2`."""
    return int(request_id.rpartition("-")[2])


def cached_as(path: str, begins: Sequence[int | None], end: int) -> str | None:
    """The path by which vLLM keys a cached block, which ends before the token `end`, of a request for whose prompt
    `Mix.begins` says `begins`; None: the block is the base model's, which has computed all tokens before any adapter
    acts. Keys and values behind depend on where adapters begin to act, too."""
    if end <= min((begin for begin in begins if begin is not None), default=end):
        return None
    return f"{path} {begins}"
