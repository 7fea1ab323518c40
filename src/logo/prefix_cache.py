"""A cache of the beginnings of prompts: keys and values that the base model alone computed, in pages of tokens.

If adapters act only from a position on, keys and values before it do not depend on the mixture. One pass of the base
model is then the probe and the prefill, and its pages serve every mixture and every prompt with the same beginning. The
last page of a prompt ends where adapters begin to act; all others are whole.
"""

from __future__ import annotations

import hashlib
import inspect
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from logo.models import PassEnded, device_of, text_config

# Tokens of a whole page. Prompts share whole pages, so up to so many tokens of a common beginning are read again.
PAGE = 16
# The layers of a cache that hold nothing but keys and values, or nothing: those of an earlier layer are used again.
_PLAIN = (DynamicLayer, DynamicSlidingWindowLayer, getattr(cache_utils, "DummyLayer", DynamicLayer))

# Runs the base model over ids (rows, width) with a mask of the cached and the new tokens, so that the cache grows by
# the keys and values of all layers; the last argument has further arguments of the model's forward pass.
Forward = Callable[[Tensor, Tensor, DynamicCache, dict[str, Any]], Any]


def _stop(*args: Any) -> None:
    raise PassEnded


@dataclass(frozen=True)
class Page:
    """Consecutive tokens of one beginning: the keys and values of each layer, (heads, tokens, size) each."""

    keys_values: Sequence[tuple[Tensor, Tensor]]

    @property
    def tokens(self) -> int:
        return self.keys_values[0][0].shape[1]

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for pair in self.keys_values for tensor in pair)


class PrefixCache:
    """A cache of pages for one base model, which drops the least recently used pages when it exceeds its budget.

    Args:
        model: a causal LM that keeps nothing but keys and values of earlier tokens; see `reusable`.
        budget: bytes that the pages may take; inside `held` they may take more.

    Attributes:
        bytes: what the pages take now.
    """

    def __init__(self, model: PreTrainedModel, budget: int) -> None:
        self.model = model
        self.budget = budget
        self.bytes = 0
        self._pages: OrderedDict[bytes, Page] = OrderedDict()
        self._holding = 0
        self._positions = "position_ids" in inspect.signature(model.forward).parameters

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside the block no page is dropped, so that the pages of a batch are there when it is answered."""
        self._holding += 1
        try:
            yield
        finally:
            self._holding -= 1
            while not self._holding and self.bytes > self.budget:
                self.bytes -= self._pages.popitem(last=False)[1].bytes

    def clear(self) -> None:
        """Drops all pages, after the base model has changed."""
        self._pages.clear()
        self.bytes = 0

    def find(self, row: Sequence[int], end: int) -> list[Page]:
        """The cached pages of the first `end` tokens of a row, without a gap from the first token on."""
        pages = dict[bytes, Page]()
        for key in _keys(row, end):
            page = self._pages.get(key)
            if page is None:
                break
            pages[key] = page
        for key in reversed(pages):  # the first of them was used last, since without it no other is found
            if key in self._pages:
                self._pages.move_to_end(key)
        return list(pages.values())

    def extend(self, rows: Sequence[Sequence[int]], ends: Sequence[int], forward: Forward | None = None) -> Any:
        """Runs the base model over the tokens of each row that are not in the cache, and keeps their keys and values.

        A beginning that all rows share is read once, before the rest. Returns what `forward` returns.

        Args:
            rows: token ids; of each row at least one token is not in the cache.
            ends: how many tokens of each row are kept.
            forward: runs the model on the rest, each row's from the first column on; None: for keys and values alone.
        """
        with self.held():
            shared = 0 if len(rows) == 1 else _shared(rows, ends)
            if shared and any(_count(self.find(row, shared)) < shared for row in rows):
                self.extend([rows[0][:shared]], [shared])
            cached = list(map(self.find, rows, ends))
            counts = list(map(_count, cached))
            ids, mask = _behind(rows, counts)
            device = device_of(self.model.get_input_embeddings())
            cache = laid_out(cached, counts) if any(counts) else DynamicCache()
            options: dict[str, Any] = {}
            if self._positions:
                # The padding behind a row must not have positions beyond those that the model knows.
                last = torch.tensor([len(row) - 1 for row in rows])[:, None]
                positions = torch.tensor(counts)[:, None] + torch.arange(ids.shape[1])
                options["position_ids"] = positions.minimum(last).to(device)
            returned = (forward or self.forward)(ids.to(device), mask.to(device), cache, options)
            self._keep(rows, ends, cached, cache)
            return returned

    def _keep(
        self, rows: Sequence[Sequence[int]], ends: Sequence[int], cached: Sequence[list[Page]], cache: DynamicCache
    ) -> None:
        """Makes pages of what the model has read of rows behind their `cached` pages."""
        counts = list(map(_count, cached))
        for i, (row, end) in enumerate(zip(rows, ends, strict=True)):
            pad = max(counts) - counts[i]  # columns in front of the row
            pages = list(cached[i])
            for start in range(len(pages) * PAGE, end, PAGE):
                columns = slice(pad + start, pad + min(end, start + PAGE))
                layers = [(layer.keys[i, :, columns], layer.values[i, :, columns]) for layer in cache.layers]
                pages.append(Page([(keys.clone(), values.clone()) for keys, values in layers]))
            for key, page in zip(_keys(row, end), pages, strict=True):
                if key not in self._pages:
                    self._pages[key] = page
                    self.bytes += page.bytes
            self.find(row, end)  # marks them as used

    def cache(self, rows: Sequence[Sequence[int]], ends: Sequence[int], counts: Sequence[int]) -> DynamicCache:
        """Keys and values of the first `counts` tokens of each row, padded on the left; its last page ends at `ends`.

        The base model reads what is not in the cache, so no mixture may be active.
        """
        with self.held():
            cut = [tuple(row[:end]) for row, end in zip(rows, ends, strict=True)]
            lacking = [row for row, count in zip(cut, counts, strict=True) if _count(self.find(row, len(row))) < count]
            if lacking:
                distinct = list(dict.fromkeys(lacking))
                self.extend(distinct, list(map(len, distinct)))
            return laid_out([self.find(row, len(row)) for row in cut], counts)

    @torch.no_grad()
    def forward(self, ids: Tensor, mask: Tensor, cache: DynamicCache, options: dict[str, Any]) -> None:
        """Runs the base model up to its head, which has nothing to add to keys and values; see `Forward`."""
        head = self.model.get_output_embeddings()
        options = {"use_cache": True, cache_argument(self.model) or "": cache, **options}
        with suppress(PassEnded), ExitStack() as stack:
            if head is not None:
                stack.callback(head.register_forward_pre_hook(_stop).remove)
            self.model(input_ids=ids, attention_mask=mask, **options)


def reusable(model: nn.Module, *, longer: bool = True) -> bool:
    """Whether a model keeps only keys and values of earlier tokens (not all recurrent models say that they do not), and
    the same ones if the prompt gets `longer`."""
    if cache_argument(model) is None or getattr(model, "_is_stateful", False):
        return False
    if longer and any(hasattr(module, "rope_deltas") for module in model.modules()):
        return False  # what follows a cached prefix would have positions as behind the images of the last call
    # With these, keys are turned by other angles once a prompt is longer than the model's first context.
    if longer and any(
        kind in str(getattr(text_config(model), "rope_parameters", "")) for kind in ("dynamic", "longrope")
    ):
        return False
    own = not model._supports_default_dynamic_cache()  # type: ignore[operator]  # it has a cache class of its own
    return not own and all(type(layer) in _PLAIN for layer in DynamicCache(config=model.config).layers)


def cache_argument(model: nn.Module) -> str | None:
    """The argument of a model's forward pass that takes the cache of keys and values; None if there is none."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in parameters), None)


def joined_pages(pages: Sequence[Page]) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys and values of pages that follow each other, layer by layer: (heads, tokens, size) each."""
    for layer in zip(*(page.keys_values for page in pages), strict=True):
        yield torch.cat([keys for keys, _ in layer], dim=1), torch.cat([values for _, values in layer], dim=1)


def laid_out(pages: Sequence[Sequence[Page]], counts: Sequence[int]) -> DynamicCache:
    """The cache of a batch whose rows begin with these pages, cut to `counts` tokens and padded on the left."""
    length = max(counts)
    any_page = next(page for row in pages for page in row)
    zeros = [(torch.zeros_like(keys[:, :1]), torch.zeros_like(values[:, :1])) for keys, values in any_page.keys_values]
    rows = []
    for row, count in zip(pages, counts, strict=True):
        pads = length - count
        padding = Page([(keys.expand(-1, pads, -1), values.expand(-1, pads, -1)) for keys, values in zeros])
        rows.append(joined_pages([padding, *row]))
    cache = DynamicCache()
    for number, layer in enumerate(zip(*rows, strict=True)):
        keys = torch.stack([row_keys[:, :length] for row_keys, _ in layer])
        values = torch.stack([row_values[:, :length] for _, row_values in layer])
        cache.update(keys, values, number)
    return cache


def _behind(rows: Sequence[Sequence[int]], counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Ids (rows, width) of what stands behind the first `counts` tokens of each row, padded on the right, and the mask
    (rows, columns of the cache + width), in which these tokens stand on the right of the cache."""
    length = max(counts)
    width = max(len(row) - count for row, count in zip(rows, counts, strict=True))
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros(len(rows), length + width, dtype=torch.int64)
    for i, (row, count) in enumerate(zip(rows, counts, strict=True)):
        ids[i, : len(row) - count] = torch.tensor(row[count:])
        mask[i, length - count : length - count + len(row)] = 1
    return ids, mask


def _count(pages: Sequence[Page]) -> int:
    return sum(page.tokens for page in pages)


def _shared(rows: Sequence[Sequence[int]], ends: Sequence[int]) -> int:
    """The number of tokens in whole pages that all rows begin with."""
    shortest = min(ends)
    count = next((i for i in range(shortest) if any(row[i] != rows[0][i] for row in rows)), shortest)
    return count // PAGE * PAGE


def _keys(row: Sequence[int], end: int) -> list[bytes]:
    """The key of each page of the first `end` tokens of a row: a digest of all tokens up to the end of the page."""
    digest = hashlib.blake2b(digest_size=16)
    keys = []
    for start, stop in pairwise([*range(0, end, PAGE), end]):
        digest.update(array("q", row[start:stop]))
        keys.append(digest.digest())
    return keys
