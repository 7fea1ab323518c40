"""`loraretriever` (arXiv 2402.09997): the adapters whose example prompts are most similar to a prompt, as texts."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from logo.baselines.method import Prepared, Task, ranked, register_method, text_of
from logo.core import Selection
from logo.errors import DataError, listed
from logo.selection.encoder import DEFAULT_MODEL, embed

if TYPE_CHECKING:
    from torch import Tensor

    from logo.engine import LoGo


@register_method(needs="examples")
def loraretriever(
    logo: LoGo, task: Task, *, k: int = 3, embedding_model: str = DEFAULT_MODEL, instruction: str = ""
) -> Prepared:
    """The `k` adapters whose example prompts' mean embedding has the largest inner product with the prompt's, with
    equal weights; k=1 is LoraRetriever's selection of one. The mean is not normalised: it is short for an adapter of
    many kinds of prompts.

    Args:
        embedding_model: a Hub id or a folder of sentence-transformers.
        instruction: before every text, prompts and examples alike.

    Raises:
        DataError: an adapter has no example prompts.
        MissingLibrary, HubError, ModelError: as `embed`.
    """
    import torch

    names = task.candidates(logo)
    lacking = [name for name in names if not logo.pool[name].examples]
    if lacking:
        raise DataError(
            f"method 'loraretriever' compares prompts with the example prompts of every adapter, found none of "
            f"{listed(lacking, 5)}; give them some with `logo pool examples`"
        )
    device = str(logo.devices[0])
    means = [_mean(tuple(logo.pool[name].examples), embedding_model, instruction, device) for name in names]
    vectors = torch.stack(means)  # (pool, d)

    def select(prompts: Sequence[Any], batch_size: int) -> list[Selection]:
        texts = [text_of(prompt) for prompt in prompts]
        return [closest(row) for row in embed(texts, embedding_model, instruction, device) @ vectors.T]

    def closest(similarities: Tensor) -> Selection:
        order = torch.sort(similarities, descending=True, stable=True).indices[:k].tolist()
        scores = dict(zip(names, similarities.tolist(), strict=True))
        return ranked(dict.fromkeys((names[i] for i in order), 1 / len(order)), scores)

    return Prepared(select, {"embedding_model": embedding_model})


@functools.lru_cache(maxsize=2048)
def _mean(texts: tuple[str, ...], model: str, instruction: str, device: str) -> Tensor:
    """The mean embedding (d,) of texts; cached, since all datasets of a run use the same groups."""
    return embed(texts, model, instruction, device).mean(dim=0)
