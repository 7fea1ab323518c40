"""Methods that compare the text of prompts with samples of each adapter's training task."""

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
from logo.baselines.method import Method, Need, Prepared, Task, check_count, ranked, same_for_all
from logo.calls import Calls
from logo.errors import DataError, UsageError, listed
from logo.prompts import Conversation, text_of
from logo.selection import Selection

Variant = Literal["mixture", "fusion", "selection"]


class Embedding(Method):
    """Base of methods that compare embeddings of texts; subclasses are dataclasses that declare its fields.

    Attributes:
        embedding_model: a Hub id or a folder of sentence-transformers.
        instruction: put before every text.
        k: adapters, or tasks, that are mixed.
    """

    embedding_model: str
    instruction: str
    k: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("k", self.k)

    @property
    def picks(self) -> int:
        return self.k

    def check(self) -> None:
        fetch(self.embedding_model)

    def embedded(self, logo: Calls, prompts: Sequence[str | Conversation]) -> Tensor:
        """Embeddings (prompts, d) of the prompts' texts."""
        texts = [text_of(prompt) for prompt in prompts]
        return embed(texts, self.embedding_model, self.instruction, str(logo.devices[0]))

    def means(self, logo: Calls, groups: Sequence[tuple[str, ...]]) -> Tensor:
        """The mean embedding of every group of texts, (groups, d); equal groups are embedded once."""
        device = str(logo.devices[0])
        return torch.stack([_mean(group, self.embedding_model, self.instruction, device) for group in groups])


@dataclass(frozen=True, kw_only=True)
class Retrieval(Embedding):
    """Base of methods that know adapters by samples of their inputs.

    Attributes:
        samples: adapter name -> inputs of its training task.
        embedding_model: a Hub id or a folder of sentence-transformers.
        instruction: before every text, prompts and samples alike.
        k: adapters that are mixed.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"samples"})

    samples: Mapping[str, Sequence[str]] = field(default_factory=dict)
    embedding_model: str = DEFAULT_MODEL
    instruction: str = ""
    k: int = 3

    def as_dict(self) -> dict[str, Any]:
        digest = hashlib.sha256(json.dumps(self.samples, sort_keys=True).encode()).hexdigest()
        return {**super().as_dict(), "samples": {"adapters": len(self.samples), "sha256": digest}}

    def check_pool(self, names: Sequence[str]) -> None:
        lacking = [name for name in names if not self.samples.get(name)]
        if lacking:
            raise DataError(
                f"method {self.name!r} needs samples of every adapter's inputs, found none for "
                f"{listed(lacking, 5)}: expected a folder (--adapter-samples DIR) with NAME.jsonl for each"
            )

    def vectors(self, logo: Calls, names: Sequence[str]) -> Tensor:
        """(names, d): the mean of the embeddings of each adapter's samples.

        Raises:
            DataError: an adapter has no samples.
        """
        self.check_pool(names)
        return self.means(logo, [tuple(self.samples[name]) for name in names])

    def closest(self, names: Sequence[str], similarities: Tensor) -> Selection:
        """The k adapters with the highest similarities (pool,), equally weighted; among ties the earlier name."""
        order = torch.sort(similarities, descending=True, stable=True).indices[: self.picks].tolist()
        chosen = dict.fromkeys((names[i] for i in order), 1 / len(order))
        return ranked(chosen, dict(zip(names, similarities.tolist(), strict=True)))


@dataclass(frozen=True, kw_only=True)
class LoraRetriever(Retrieval):
    """LoraRetriever (arXiv 2402.09997): for each prompt, the adapters whose samples are most similar to it.

    Attributes:
        variant: `mixture` of the k outputs, `fusion` of the k adapters' factors, or `selection` of the best one.
    """

    name: ClassVar[str] = "loraretriever"

    variant: Variant = "mixture"

    def __post_init__(self) -> None:
        if self.variant not in ("mixture", "fusion", "selection"):
            raise UsageError(f"variant: expected 'mixture', 'fusion' or 'selection', found {self.variant!r}")
        own = "fusion" if self.variant == "fusion" else "mixture"
        # With the usual variant, another merge is another way to combine the k closest.
        if self.variant != "mixture" and self.merge not in (None, own):
            raise UsageError(
                f"variant {self.variant!r} combines adapters by the merge {own!r}, found merge {self.merge!r}: leave "
                "out one of the two"
            )
        if self.merge is None and self.variant == "fusion":
            object.__setattr__(self, "merge", "fusion")
        super().__post_init__()

    @property
    def picks(self) -> int:
        return 1 if self.variant == "selection" else self.k

    def prepare(self, logo: Calls, task: Task) -> Prepared:
        names = task.candidates(logo)
        vectors = self.vectors(logo, names)

        def select(prompts: Sequence[str | Conversation], batch_size: int) -> list[Selection]:
            # The inner product with the unnormalised mean, which is short for an adapter of many kinds of input.
            return [self.closest(names, similarities) for similarities in self.embedded(logo, prompts) @ vectors.T]

        return Prepared(select, {"embedding_model": self.embedding_model})


@dataclass(frozen=True, kw_only=True)
class AdapterSoup(Retrieval):
    """AdapterSoup (arXiv 2302.07027), by similarity of text: one set of adapters for all prompts of a dataset.

    The mean embedding of the test prompts is compared with each adapter's by cosine. The parameters of the most similar
    adapters are averaged, as in the paper; `merge="mixture"` averages their outputs instead.
    """

    name: ClassVar[str] = "adaptersoup"
    own_merge: ClassVar[str] = "fusion"
    needs: ClassVar[frozenset[Need]] = frozenset({"prompts", "samples"})

    k: int = 5

    def prepare(self, logo: Calls, task: Task) -> Prepared:
        if not task.prompts:
            raise DataError(f"method {self.name!r}: dataset {task.name!r} has no prompts to compare adapters with")
        names = task.candidates(logo)
        vectors = self.vectors(logo, names)
        wanted = self.embedded(logo, task.prompts).mean(dim=0)
        similarities = torch.nn.functional.cosine_similarity(vectors, wanted[None])
        selection = self.closest(names, similarities)
        record = {"embedding_model": self.embedding_model, "adapters": list(selection.adapters)}
        return Prepared(same_for_all(selection.mixture, selection.scores), record)


@functools.lru_cache(maxsize=2048)
def _mean(texts: tuple[str, ...], model: str, instruction: str, device: str) -> Tensor:
    """The mean embedding (d,) of texts; cached, since all datasets of a run use the same groups."""
    return embed(texts, model, instruction, device).mean(dim=0)
