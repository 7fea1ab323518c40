"""Token ids in, token ids out: tokenizing and truncating prompts, padding batches, stopping, cutting the answers.

Knows tokenizers and transformers' generate; knows nothing about adapters.
"""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, TextIteratorStreamer

from logo.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_NEW_TOKENS = 256

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Truncation:
    """How prompts longer than the limit are cut.

    Attributes:
        limit: most prompt tokens, or None for as many as the model's context leaves.
        side: `"left"` keeps the end of the prompt, `"right"` its beginning (the official code, at 2048).
    """

    limit: int | None = None
    side: Literal["left", "right"] = "left"


class Prompts:
    """Turns text into token ids the same way for probing and for generating.

    Args:
        tokenizer: the base model's.
        context: the model's context length in tokens, or None if unknown.
        truncation: what to do with long prompts.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context: int | None, truncation: Truncation) -> None:
        self.tokenizer = tokenizer
        self.context = context
        self.truncation = truncation

    def encode(self, prompts: Sequence[str], room: int = 0) -> list[list[int]]:
        """Token ids of each prompt, special tokens included; too long ones are cut, with a warning.

        Args:
            room: tokens of the context to keep free for the answer.

        Raises:
            UsageError: a prompt has no tokens, or the answer alone would fill the context.
        """
        limit = self._limit(room)
        encoded = []
        for i, prompt in enumerate(prompts):
            if not isinstance(prompt, str):
                raise UsageError(f"prompt {i + 1}: expected a string, found {type(prompt).__name__}")
            ids: list[int] = self.tokenizer(prompt)["input_ids"]
            if not ids:
                raise UsageError(f"prompt {i + 1} is empty: this tokenizer adds no token of its own; write something")
            if limit is not None and len(ids) > limit:
                warnings.warn(
                    f"prompt {i + 1} has {len(ids)} tokens, more than the {limit} that fit: "
                    f"its {'beginning' if self.truncation.side == 'left' else 'end'} is cut",
                    UserWarning,
                    stacklevel=3,
                )
                ids = self._cut(ids, limit)
            encoded.append(ids)
        return encoded

    def texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts that nobody asked about: cut where they are too long, left out where nothing remains."""
        ids: list[list[int]] = self.tokenizer(list(texts))["input_ids"]
        return [row[: self.context] for row in ids if row]

    def generation_config(
        self, config: GenerationConfig | None, max_new_tokens: int | None, options: dict[str, Any]
    ) -> GenerationConfig:
        """What one call generates with: the config given, or a greedy one, with the options on top.

        Raises:
            UsageError: no new tokens, or several answers per prompt.
        """
        if config is None:
            config = greedy_config(**options)
        else:
            config = copy.deepcopy(config)
            config.update(**options)
        limit = max_new_tokens if max_new_tokens is not None else config.max_new_tokens
        if limit is None:  # nobody asked: leave half of a short context to the prompt
            limit = min(MAX_NEW_TOKENS, (self.context or 2 * MAX_NEW_TOKENS) // 2)
        if limit <= 0:
            raise UsageError(f"max_new_tokens: expected 1 or more, found {limit}")
        if (config.num_return_sequences or 1) != 1:
            raise UsageError("num_return_sequences: one answer per prompt; repeat the prompt to get several")
        config.max_new_tokens = limit
        if config.pad_token_id is None:
            config.pad_token_id = self.tokenizer.pad_token_id
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

    def _cut(self, ids: list[int], limit: int) -> list[int]:
        if self.truncation.side == "right":
            return ids[:limit]
        # What the tokenizer puts in front of every text (a bos token) stays in front.
        special = set(self.tokenizer.all_special_ids)
        front = ids[:1] if ids[0] in special and limit > 1 else []
        return front + ids[len(ids) - (limit - len(front)) :]

    def pad(
        self, rows: Sequence[Sequence[int]], side: Literal["left", "right"], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """(rows, length) ids and attention mask. Probing pads on the right, generating on the left."""
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), int(self.tokenizer.pad_token_id))
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        for i, row in enumerate(rows):
            place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
            ids[i, place] = torch.tensor(row)
            mask[i, place] = 1
        return ids.to(device), mask.to(device)


def batches_by_length(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Indices in batches of at most `size`, longest first, so that rows of one batch need little padding."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def check_batch_size(batch_size: int) -> None:
    """Raises UsageError unless it is a number of rows."""
    if batch_size <= 0:
        raise UsageError(f"batch_size: expected 1 or more, found {batch_size}")


def greedy_config(**options: Any) -> GenerationConfig:
    """Plain greedy decoding, whatever sampling the checkpoint's own generation config asks for.

    Any `GenerationConfig` option may be overridden; asking for sampling (`do_sample=True`) drops the greedy defaults.
    """
    if options.get("do_sample"):
        return GenerationConfig(**options)
    plain = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "temperature": 1.0, "top_p": 1.0}
    return GenerationConfig(**{**plain, "top_k": 50, "no_repeat_ngram_size": 0, **options})


def end_tokens(config: GenerationConfig, model_config: GenerationConfig) -> set[int]:
    """Token ids that end a row: the call's, else the checkpoint's."""
    ends = config.eos_token_id if config.eos_token_id is not None else model_config.eos_token_id
    if ends is None:
        return set()
    return set(ends) if isinstance(ends, (list, tuple)) else {int(ends)}


class StopAtNewline(StoppingCriteria):  # type: ignore[misc]
    """Ends a row once its answer, the first line that is not blank, is complete.

    Args:
        tokenizer: to see newlines inside merged tokens.
        prompt_length: padded length of the prompts, where continuations start.
        official: end on the single token of "\\n" as the official code does, wherever it stands; merged tokens such
            as "\\n\\n" then do not end a row, and a leading newline gives an empty answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_length: int, *, official: bool = False) -> None:
        self.tokenizer = tokenizer
        self.prompt_length = prompt_length
        self.newline = tokenizer.encode("\n", add_special_tokens=False)[0] if official else None

    def __call__(self, input_ids: Tensor, scores: Tensor | None = None, **kwargs: Any) -> Tensor:
        if self.newline is not None:
            return torch.eq(input_ids[:, -1], self.newline)
        done = [self._complete(row) for row in input_ids]
        return torch.tensor(done, device=input_ids.device)

    def _complete(self, row: Tensor) -> bool:
        if "\n" not in self.tokenizer.decode(row[-1:]):  # almost every step ends here
            return False
        return "\n" in self.tokenizer.decode(row[self.prompt_length :], skip_special_tokens=True).lstrip()


class StopAt(StoppingCriteria):  # type: ignore[misc]
    """Ends a row once its answer holds one of some texts, wherever tokens begin and end.

    Args:
        tokenizer: to see the texts.
        prompt_length: padded length of the prompts, where continuations start; what stands before ends nothing.
        stops: the texts, none of them empty.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_length: int, stops: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.prompt_length = prompt_length
        self.stops = tuple(stops)
        # A token is a byte or more, special ones apart; a few more, because some decoders drop a blank in front.
        self.tail = max(len(stop.encode()) for stop in stops) + 4

    def __call__(self, input_ids: Tensor, scores: Tensor | None = None, **kwargs: Any) -> Tensor:
        start = max(self.prompt_length, input_ids.shape[1] - self.tail)
        texts = self.tokenizer.batch_decode(input_ids[:, start:])  # special tokens may be asked for too
        return torch.tensor([any(stop in text for stop in self.stops) for text in texts], device=input_ids.device)


def cut_at(text: str, stops: Sequence[str]) -> str:
    """What stands before the first of the texts, whichever that is; all of it if there is none."""
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=None)]


class Cancelled(StoppingCriteria):  # type: ignore[misc]
    """Ends generation as soon as nobody listens any more."""

    def __init__(self) -> None:
        self.requested = False

    def __call__(self, input_ids: Tensor, scores: Tensor | None = None, **kwargs: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), self.requested, device=input_ids.device)


def streamed(tokenizer: PreTrainedTokenizerBase, generate: Callable[[Any, Cancelled], None]) -> Iterator[str]:
    """The text of a generation piece by piece, while it runs in another thread.

    Args:
        generate: generates, given a streamer and a stopping criterion that is met when the reader has left.
    """
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    cancelled = Cancelled()
    failure: list[BaseException] = []

    def work() -> None:
        try:
            generate(streamer, cancelled)
        except BaseException as error:  # handed to the reader, who is waiting in another thread
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


def cut_after_end(
    ids: list[int], end: set[int], limit: int, padding: int | None = None
) -> tuple[list[int], FinishReason]:
    """A row's continuation up to and including its end token, and why it ended.

    Args:
        ids: new tokens, with whatever padding `generate` put behind the end.
        end: token ids that end a row.
        limit: the most new tokens that were allowed.
        padding: the pad token, where rows may have been ended by something other than an end token.
    """
    for i, token in enumerate(ids):
        if token in end:
            return ids[: i + 1], "stop"
    while padding is not None and ids and ids[-1] == padding:
        ids = ids[:-1]
    return ids, "length" if len(ids) >= limit else "stop"
