"""Texts of a batch without padding: they follow each other in one row, kept apart by positions that begin anew.

    ids        The  cat  sat  A  dog  Why        (1, tokens)
    positions    0    1    2  0    1    0

transformers masks attention between such texts. A model for which that is not so gets a padded row for each text.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from logo.models import context_length, device_of, text_config
from logo.prefix_cache import reusable

# The most tokens that are packed into a row. In attention, each is multiplied with each, those of other texts as well.
_MOST_PACKED = 1024
# How far the logits of a text may be apart where only rounding differs, as a share of their size. Positions or texts
# that are not its own make more of it.
_FLOAT32_ROUNDING = 1e-4
_HALF_ROUNDING = 0.1
# How many tokens the two texts have by which a model is tried.
_BEFORE = 40
_TRIED = 24
# Whether a model reads packed texts as if each were alone, by its implementation of attention.
_KEEPS_APART: WeakKeyDictionary[nn.Module, dict[str, bool]] = WeakKeyDictionary()


def packed(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Texts, given as token ids, as one row: its ids and positions, (1, tokens) int64 each, on the CPU."""
    ids = torch.tensor([[token for row in rows for token in row]])
    return ids, _restarting(list(map(len, rows)))


def packs(model: PreTrainedModel, tokens: int) -> bool:
    """Whether texts of so many tokens together are packed for a model."""
    most = min(_MOST_PACKED, context_length(model) or _MOST_PACKED)
    return tokens <= most and keeps_texts_apart(model)


def keeps_texts_apart(model: PreTrainedModel) -> bool:
    """Whether a model reads packed texts as if each were alone, which is tried once."""
    tried = _KEEPS_APART.setdefault(model, {})
    attention = str(getattr(model.config, "_attn_implementation", ""))
    if attention not in tried:
        tried[attention] = _may_keep_apart(model) and _reads_alike(model)
    return tried[attention]


def _may_keep_apart(model: PreTrainedModel) -> bool:
    """Whether a model takes positions and counts nothing else from the beginning of a row: no state, no chunks of
    attention, and no biases of ALiBi, which are rounded the more the farther they are from there."""
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    config = text_config(model)
    has_chunks = getattr(config, "attention_chunk_size", None) is not None
    has_alibi = bool(getattr(config, "alibi", False))
    return takes_positions and reusable(model, longer=False) and not has_chunks and not has_alibi


def _reads_alike(model: PreTrainedModel) -> bool:
    """Whether a text has the same logits behind another one as alone, but for rounding."""
    device = device_of(model.get_input_embeddings())
    ids = 37 * torch.arange(_BEFORE + _TRIED, device=device) % text_config(model).vocab_size
    positions = _restarting([_BEFORE, _TRIED]).to(device)
    try:
        packed = _logits(model, ids, position_ids=positions)[_BEFORE:]
        alone = _logits(model, ids[_BEFORE:])
    except (IndexError, RuntimeError, TypeError, ValueError):
        return False  # it takes other positions, such as those of images
    rounding = _FLOAT32_ROUNDING if model.dtype == torch.float32 else _HALF_ROUNDING
    has_weights = bool(alone.any())
    return has_weights and bool(torch.dist(packed, alone) <= rounding * alone.norm())


@torch.no_grad()
def _logits(model: PreTrainedModel, ids: Tensor, **options: Any) -> Tensor:
    """The logits (tokens, vocabulary) of one row of tokens, float32."""
    logits: Tensor = model(input_ids=ids[None], use_cache=False, **options).logits[0].float()
    return logits


def _restarting(lengths: Sequence[int]) -> Tensor:
    """The positions of the tokens of packed texts: (1, tokens)."""
    return torch.cat([torch.arange(length) for length in lengths])[None]
