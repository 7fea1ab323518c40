"""Prompts to padded batches of token ids, generation configs and streaming, by transformers' means.

Nothing here is about adapters.
"""

from __future__ import annotations

import itertools
import threading
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria, TextIteratorStreamer

from logo.errors import NotFinite, UsageError, check_type
from logo.generation import call_config
from logo.prompts import ProbeText, Prompt, chat, cut_left, read, text_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_NEW_TOKENS = 256

# How far a calibration's texts are apart that make up one conversation; neighbours in the list are alike.
_BEFORE, _ANSWER = 7, 13

OVERFLOW = (
    "the model's output is not finite with this mixture of adapters, so nothing can be generated from it: an adapter "
    "is damaged, or too large for the model's dtype; leave that adapter out, or use float32"
)


@dataclass(frozen=True)
class Truncation:
    """How long prompts are cut.

    Attributes:
        limit: the most tokens of a prompt; None: as many as the model's context leaves.
        side: `"left"` keeps the end of the prompt, `"right"` its beginning (the official code, at 2048).

    Raises:
        UsageError: no tokens would be left, or another side.
    """

    limit: int | None = None
    side: Literal["left", "right"] = "left"

    def __post_init__(self) -> None:
        if self.limit is not None:
            check_type("truncation", self.limit, Integral, "a whole number")
            if self.limit < 1:
                raise UsageError(f"truncation: expected at least 1 token to be kept, found {self.limit}")
        if self.side not in ("left", "right"):
            raise UsageError(f"truncation: expected the side 'left' or 'right', found {self.side!r}")


class Prompts:
    """Turns text into token ids the same way for probing and for generating.

    Args:
        tokenizer: the base model's.
        context: the model's context length in tokens; None if unknown.
        truncation: how long prompts are cut.
        checkpoint: the model's own generation config, for end tokens and stop texts of configs that name none.
        default: the config of calls that give none; None: greedy.
        probe_text: what of a conversation is probed; see `logo.prompts.chat`.
        vocabulary: the number of tokens that the model knows; None if unknown.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        context: int | None,
        truncation: Truncation,
        checkpoint: GenerationConfig | None = None,
        default: GenerationConfig | None = None,
        probe_text: ProbeText | None = None,
        vocabulary: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.probe_text = probe_text
        self._vocabulary = vocabulary
        self._checkpoint, self._default = checkpoint, default
        self.context = context
        self.truncation = truncation

    @property
    def pad_id(self) -> int:
        """The token that pads rows; any will do where the tokenizer has none, since a mask hides it."""
        known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        return next((int(one) for one in known if one is not None), 0)

    def encode(self, prompts: Sequence[Any], room: int = 0) -> list[list[int]]:
        """The token ids of `read`."""
        return [list(prompt.ids) for prompt in self.read(prompts, room)]

    def read(self, prompts: Sequence[Any], room: int | None = 0) -> list[Prompt]:
        """Reads prompts into token ids and those that are probed; long prompts are cut with a warning.

        Args:
            prompts: strings, conversations or token ids; see `logo.prompts.read`.
            room: tokens of the context to keep free for the answer; None: nothing is cut.

        Raises:
            UsageError: a prompt cannot be used or has no tokens, or the answer alone would fill the context.
        """
        limit = None if room is None else self._limit(room)
        return [self._read(i, prompt, limit) for i, prompt in enumerate(prompts, start=1)]

    def _read(self, number: int, given: Any, limit: int | None) -> Prompt:
        try:
            prompt = read(self.tokenizer, given, self.probe_text, self._vocabulary)
        except UsageError as error:
            raise UsageError(f"prompt {number}: {error}") from error
        if not len(prompt):
            raise UsageError(f"prompt {number} is empty, and this tokenizer adds no token: expected some text")
        if limit is None or len(prompt) <= limit:
            return prompt
        warnings.warn(
            f"prompt {number} has {len(prompt)} tokens, more than the {limit} that fit: "
            f"its {'beginning' if self.truncation.side == 'left' else 'end'} is cut",
            UserWarning,
            stacklevel=4,
        )
        probe = None if prompt.probe is None else self._cut(prompt.probe, limit)
        return Prompt(self._cut(prompt.ids, limit), probe, prompt.text)

    def texts(self, texts: Sequence[str], ending: Sequence[int] = (), varied: bool = False) -> list[list[int]]:
        """Token ids of texts for calibration: long ones are cut, and empty ones left out.

        Args:
            ending: tokens with which every text has to end. If the chat template ends prompts with them, each text is
                the last message of a conversation, as the prompts will be; else they are appended.
            varied: a third of the conversations have a system message before it, and a third an earlier turn, so that
                neither stands out later, unless the template refuses them. Otherwise all have one message.
        """
        if ending and self.tokenizer.chat_template:
            chats: list[Sequence[int]] = []
            with suppress(UsageError):  # the template refuses a single message
                chats = [self._conversation(texts, i, i % 3 if varied else 0) for i, text in enumerate(texts) if text]
            if chats and all(list(row[-len(ending) :]) == list(ending) for row in chats):
                return [list(cut_left(self.tokenizer, row, self.context or len(row))) for row in chats]
        room = None if self.context is None else self.context - len(ending)
        rows = [text_ids(self.tokenizer, text) for text in texts]
        return [[*row[:room], *ending] for row in rows if row]

    def _conversation(self, texts: Sequence[str], number: int, form: int) -> Sequence[int]:
        """Token ids of a conversation that ends with a text: alone (0), after a system message (1), or after an earlier
        turn (2). What stands before it are other texts."""
        before, answer = texts[(number + _BEFORE) % len(texts)], texts[(number + _ANSWER) % len(texts)]
        asked = {"role": "user", "content": texts[number]}
        turn = [{"role": "user", "content": before}, {"role": "assistant", "content": answer}]
        turns = ([], [{"role": "system", "content": before}], turn)[form]
        try:
            return chat(self.tokenizer, [*turns, asked]).ids
        except UsageError:
            if not turns:
                raise
            return chat(self.tokenizer, [asked]).ids  # some templates refuse system messages

    def room(self, max_new_tokens: int | None) -> int:
        """Tokens of the context that belong to the answer.

        Args:
            max_new_tokens: given by the caller; None: the smaller of 256 and half of the context.

        Raises:
            UsageError: no new tokens.
        """
        if max_new_tokens is None:
            return min(MAX_NEW_TOKENS, (self.context or 2 * MAX_NEW_TOKENS) // 2)
        check_type("max_new_tokens", max_new_tokens, Integral, "a whole number")
        if max_new_tokens <= 0:
            raise UsageError(f"max_new_tokens: expected 1 or more, found {max_new_tokens}")
        return max_new_tokens

    def generation_config(
        self, config: GenerationConfig | None, max_new_tokens: int | None, options: dict[str, Any]
    ) -> GenerationConfig:
        """The config of one call: the given one, the default or a greedy one, with the options applied.

        Raises:
            UsageError: no new tokens, a config whose length counts the prompt's tokens, or an option that cannot be
                used; see `logo.generation.call_config`.
        """
        config = call_config(config or self._default, options, self._checkpoint)
        wanted = config.max_new_tokens if max_new_tokens is None else max_new_tokens
        if wanted is None and config.max_length is not None:
            raise UsageError(
                f"generation_config: max_length {config.max_length} counts the prompt's tokens, too, which differ from "
                "row to row: give max_new_tokens instead"
            )
        if config.pad_token_id is None:
            config.pad_token_id = self.pad_id
        config.max_new_tokens, config.max_length = self.room(wanted), None
        return config

    def _limit(self, room: int) -> int | None:
        limits = [] if self.truncation.limit is None else [self.truncation.limit]
        if self.context is not None:
            if room >= self.context:
                raise UsageError(
                    f"max_new_tokens is {room}, but the model's context holds {self.context} tokens in all; "
                    "ask for fewer new tokens"
                )
            limits.append(self.context - room)
        return min(limits, default=None)

    def _cut(self, ids: tuple[int, ...], limit: int) -> tuple[int, ...]:
        return ids[:limit] if self.truncation.side == "right" else tuple(cut_left(self.tokenizer, ids, limit))

    def pad(
        self, rows: Sequence[Sequence[int]], side: Literal["left", "right"], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """(rows, length) ids and attention mask. Probing pads on the right, generating on the left."""
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), self.pad_id)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        for i, row in enumerate(rows):
            place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
            ids[i, place] = torch.tensor(row)
            mask[i, place] = 1
        return ids.to(device), mask.to(device)


def batches_by_length(
    lengths: Sequence[int], size: int, *, padded: bool = True, tokens: int | None = None
) -> Iterator[list[int]]:
    """Indices in batches of at most `size`, longest first, so that rows of one batch need little padding.

    Args:
        padded: False: all rows of a batch have the same length.
        tokens: the most tokens of a batch of several rows, with padding; None: any number.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    alike = [order] if padded else [list(rows) for _, rows in itertools.groupby(order, key=lambda i: lengths[i])]
    for rows in alike:
        start = 0
        while start < len(rows):
            count = size if tokens is None else max(1, min(size, tokens // max(1, lengths[rows[start]])))
            yield rows[start : start + count]
            start += count


def reads_prompts(config: GenerationConfig) -> bool:
    """Whether decoding depends on the tokens of prompts, as some logits processors do.

    Transformers gives them the padding, too, so that a row's answer would depend on the other rows of its batch.
    """
    penalties = (config.repetition_penalty, config.encoder_repetition_penalty)
    counts = (config.no_repeat_ngram_size, config.encoder_no_repeat_ngram_size, config.min_length)
    return any(value not in (None, 1.0) for value in penalties) or any(counts)


def input_device(model: PreTrainedModel) -> torch.device:
    """The device of a model's input."""
    weight: Tensor = model.get_input_embeddings().weight
    return weight.device


def check_batch_size(batch_size: int) -> None:
    """Raises UsageError unless it is a number of rows."""
    check_type("batch_size", batch_size, Integral, "a whole number")
    if batch_size <= 0:
        raise UsageError(f"batch_size: expected 1 or more, found {batch_size}")


def check_streamable(rows: int, config: GenerationConfig) -> None:
    """Raises UsageError unless an answer can be streamed: there is one, and it is made without beams."""
    if rows != 1:
        raise UsageError(f"streaming: expected a single prompt, found {rows}; ask for them one by one")
    if (config.num_beams or 1) != 1:
        raise UsageError(f"streaming: beam search changes sent tokens; leave out num_beams={config.num_beams}")


class Finite(LogitsProcessor):  # type: ignore[misc]
    """Finds rows with a step whose largest logit is not finite, where argmax would silently return token 0.

    Findings stay on the device until `rows` is called. Such logits become zeros, since sampling from NaN crashes a GPU.

    Args:
        stop: raise at the first such step, for streams.
    """

    def __init__(self, *, stop: bool = False) -> None:
        self._stop = stop
        self._finite: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        finite = scores.max(dim=-1).values.isfinite()  # (rows,)
        self._finite = finite if self._finite is None else self._finite & finite
        if self._stop and self.rows:
            raise NotFinite(OVERFLOW)
        return scores.masked_fill(~finite[:, None], 0.0)

    @property
    def count(self) -> int:
        """The number of rows."""
        return 0 if self._finite is None else len(self._finite)

    @property
    def rows(self) -> list[int]:
        """The rows, or beams of rows, with such a step."""
        return [] if self._finite is None else (~self._finite).nonzero()[:, 0].tolist()


class Cancelled(StoppingCriteria):  # type: ignore[misc]
    """Ends a generation once its reader has left."""

    def __init__(self) -> None:
        self.requested = False

    def __call__(self, input_ids: Tensor, scores: Tensor | None = None, **kwargs: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), self.requested, device=input_ids.device)


def streamed(tokenizer: PreTrainedTokenizerBase, generate: Callable[[Any, Cancelled], None]) -> Generator[str]:
    """Yields the text of a generation in pieces, while it runs in another thread.

    Args:
        generate: generates with a streamer and a stopping criterion that ends it when the reader has left.
    """
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    cancelled = Cancelled()
    failure: list[BaseException] = []

    def work() -> None:
        try:
            generate(streamer, cancelled)
        except BaseException as error:  # raised in the reader's thread
            failure.append(error)
            streamer.end()

    worker = threading.Thread(target=work, name="logo-stream", daemon=True)
    worker.start()
    try:
        yield from (piece for piece in streamer if piece)
    finally:
        cancelled.requested = True
        worker.join()
    if failure:
        raise failure[0]
