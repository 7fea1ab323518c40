"""The method that compares the text of prompts with samples of each adapter's training task."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from logo.baselines.embedding import DEFAULT_MODEL, embed, fetch
from logo.baselines.method import Method, Need, Prepared, Task, check_count, ranked, text_of
from logo.core import Selection
from logo.engine import LoGo
from logo.errors import DataError, UsageError, listed
from logo.prompts import Conversation

Variant = Literal["mixture", "selection"]


@dataclass(frozen=True, kw_only=True)
class LoraRetriever(Method):
    """LoraRetriever (arXiv 2402.09997): for each prompt, the adapters whose samples are most similar to it.

    Attributes:
        samples: adapter name -> inputs of its training task.
        embedding_model: a Hub id or a folder of sentence-transformers.
        instruction: before every text, prompts and samples alike.
        k: adapters that are mixed.
        variant: `mixture` of the k outputs, or `selection` of the best one.
    """

    name: ClassVar[str] = "loraretriever"
    needs: ClassVar[frozenset[Need]] = frozenset({"samples"})

    samples: Mapping[str, Sequence[str]] = field(default_factory=dict)
    embedding_model: str = DEFAULT_MODEL
    instruction: str = ""
    k: int = 3
    variant: Variant = "mixture"

    def __post_init__(self) -> None:
        if self.variant not in ("mixture", "selection"):
            raise UsageError(f"variant: expected 'mixture' or 'selection', found {self.variant!r}")
        check_count("k", self.k)

    @property
    def picks(self) -> int:
        return 1 if self.variant == "selection" else self.k

    def check(self) -> None:
        fetch(self.embedding_model)

    def check_pool(self, names: Sequence[str]) -> None:
        lacking = [name for name in names if not self.samples.get(name)]
        if lacking:
            raise DataError(
                f"method {self.name!r} needs samples of every adapter's inputs, found none for "
                f"{listed(lacking, 5)}: expected a folder (--adapter-samples DIR) with NAME.jsonl for each"
            )

    def as_dict(self) -> dict[str, Any]:
        digest = hashlib.sha256(json.dumps(self.samples, sort_keys=True).encode()).hexdigest()
        return {**super().as_dict(), "samples": {"adapters": len(self.samples), "sha256": digest}}

    def prepare(self, logo: LoGo, task: Task) -> Prepared:
        names = task.candidates(logo)
        self.check_pool(names)
        model, instruction, device = self.embedding_model, self.instruction, str(logo.devices[0])
        vectors = torch.stack([_mean(tuple(self.samples[name]), model, instruction, device) for name in names])

        def select(prompts: Sequence[str | Conversation], batch_size: int) -> list[Selection]:
            texts = [text_of(prompt) for prompt in prompts]
            # The inner product with the unnormalised mean, which is short for an adapter of many kinds of input.
            return [self._closest(names, row) for row in embed(texts, model, instruction, device) @ vectors.T]

        return Prepared(select, {"embedding_model": model})

    def _closest(self, names: Sequence[str], similarities: Tensor) -> Selection:
        """The adapters with the highest similarities (pool,), equally weighted; among ties the earlier name."""
        order = torch.sort(similarities, descending=True, stable=True).indices[: self.picks].tolist()
        chosen = dict.fromkeys((names[i] for i in order), 1 / len(order))
        return ranked(chosen, dict(zip(names, similarities.tolist(), strict=True)))


@functools.lru_cache(maxsize=2048)
def _mean(texts: tuple[str, ...], model: str, instruction: str, device: str) -> Tensor:
    """The mean embedding (d,) of texts; cached, since all datasets of a run use the same groups."""
    return embed(texts, model, instruction, device).mean(dim=0)
