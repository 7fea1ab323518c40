"""A task: a file of rows, and its rows as tokens: the prompt as at inference, and the completion to learn.

A row is `{"context": ..., "completion": ...}`, or `{"messages": [...]}` that end with the assistant's answer; a CSV
file has the columns `context` and `completion`. If a row cannot be used, its task is refused, with file and row.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from logo.adapters.activation import Activation, last_occurrence
from logo.errors import DataError, LoGoError, UsageError, closest, listed
from logo.identity import fingerprint
from logo.prompts import answer_ids, asked_text, chat, conversation_text, cut_left, text_ids, written_answer
from logo.rows import Row, passed_over, requested, row_files, training_rows, unread, why_passed_over
from logo.scoring import spaced
from logo.training.config import ASSISTANT, TrainingConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SUFFIXES = (".jsonl", ".csv")


@dataclass(frozen=True)
class TokenizedRow:
    """One row as tokens.

    Attributes:
        ids: tokens of the prompt and of the completion.
        prompt: number of prompt tokens. The loss covers the tokens after them.
        begin: the first token on which the adapter acts; a prompt token.
    """

    ids: tuple[int, ...]
    prompt: int
    begin: int = 0

    @property
    def completion(self) -> int:
        """Number of tokens that the loss covers."""
        return len(self.ids) - self.prompt

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class TaskRows:
    """The rows of one adapter, ready to be trained on.

    Attributes:
        name: of the task and of its adapter.
        learned, held_out: its rows. Copies of held-out rows are not learned from, since their loss would say how well
            the rows are known by heart.
        copies: number of those copies.
        cut: number of prompts that lost their beginning.
        invocation: tokens from which its adapter acts; empty: it has none.
        prompts: example prompts, which are stored beside the adapter.
    """

    name: str
    learned: tuple[TokenizedRow, ...]
    held_out: tuple[TokenizedRow, ...] = ()
    copies: int = 0
    cut: int = 0
    invocation: tuple[int, ...] = ()
    prompts: tuple[str, ...] = ()

    @property
    def sha256(self) -> str:
        """Digest of its rows as tokens, so also of what the tokenizer and its chat template made of them."""
        parts = (("learned", self.learned), ("held_out", self.held_out))
        return fingerprint({name: [[row.prompt, row.begin, *row.ids] for row in rows] for name, rows in parts})

    def batch(self, step: int, config: TrainingConfig) -> list[TokenizedRow]:
        """The rows of a step, from 0: each epoch has all of them in another order."""
        epoch, batch = divmod(step, math.ceil(len(self.learned) / config.batch_size))
        order = _shuffled(len(self.learned), f"{config.seed} {self.name} {epoch}")
        start = batch * config.batch_size
        return [self.learned[row] for row in order[start : start + config.batch_size]]


@lru_cache(1)
def _shuffled(count: int, seed: str) -> list[int]:
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


def task_files(folder: Path, only: str = "") -> dict[str, Path]:
    """Name -> file of the tasks below a folder, in the order of their paths.

    Args:
        only: names or patterns of tasks, separated by commas; empty: all.

    Raises:
        DataError: no such folder, no task in it, or two files of one name.
        UsageError: a requested task does not exist.
    """
    if not folder.is_dir():
        kind = "a file" if folder.exists() else "nothing"
        raise DataError(f"tasks folder {str(folder)!r}: expected a folder with TASK.jsonl files, found {kind}")
    paths = [path.relative_to(folder) for path in row_files(folder)]
    files: dict[str, Path] = {}
    for path in paths:
        if path.suffix not in SUFFIXES:
            continue
        file = folder / path
        first = files.setdefault(path.with_suffix("").as_posix(), file)
        if first != file:
            raise DataError(f"{first} and {file} are two files of one task; rename or merge them")
    skipped = passed_over(folder, SUFFIXES)
    why = f": {why_passed_over(folder, skipped)}" if skipped else ""
    if not files:
        names = listed(list(map(str, paths))) or "none"
        raise DataError(f"tasks folder {str(folder)!r}: expected files TASK.jsonl or TASK.csv, found {names}{why}")
    if skipped and not only:
        warnings.warn(f"{folder}{why}", UserWarning, stacklevel=2)
    ignored = [] if only else unread(folder, files.values())
    if ignored:
        where = "rows are in files TASK.jsonl or TASK.csv"
        warnings.warn(f"{folder}: {listed(ignored)} not read: {where}", UserWarning, stacklevel=2)
    tasks = requested(only, files, lambda name: UsageError(f"task {name!r}: not found{closest(name, files)}{why}"))
    return {name: file for name, file in files.items() if name in tasks}


def read_task(
    name: str, file: Path, tokenizer: PreTrainedTokenizerBase, config: TrainingConfig, context: int | None = None
) -> TaskRows:
    """Reads the rows of a task.

    Args:
        context: tokens that the base model reads at most; None: any number.

    Raises:
        DataError: a row cannot be used (names the file and the row).
        StorageError: the file cannot be read.
    """
    rows = training_rows(file)
    longest = config.max_length if context is None else min(config.max_length, context)
    tokenized: list[TokenizedRow] = []
    cut = 0
    invocation: tuple[int, ...] = ()
    for number, row in enumerate(rows, start=1):
        try:
            whole = encoded(tokenizer, row)
            short = shortened(tokenizer, whole, longest)
            prompt = short.ids[: short.prompt]
            if config.activation == ASSISTANT:
                invocation = invocation or opening(tokenizer, row)
                begin = last_occurrence(prompt, invocation)
                if begin is None:
                    raise DataError("its chat template opens the assistant's turn in another way than in row 1")
            else:
                begin = Activation.parse(config.activation).begin(prompt) or 0
        except LoGoError as error:
            raise DataError(f"{file}, row {number}: {error}") from error
        cut += len(short) < len(whole)
        tokenized.append(replace(short, begin=begin))
    learned, held_out = split(name, config, tokenized)
    prompts = [asked_text(row.messages) if row.messages else row.context for row in rows[: config.examples]]
    return TaskRows(
        name,
        learned,
        held_out,
        copies=len(rows) - len(learned) - len(held_out),
        cut=cut,
        invocation=invocation,
        prompts=tuple(prompt for prompt in prompts if prompt),
    )


def encoded(tokenizer: PreTrainedTokenizerBase, row: Row) -> TokenizedRow:
    """A row as tokens.

    A text ends with the tokenizer's end token, so that the adapter learns where to stop. An answer in a conversation
    ends as the chat template ends it, and then with that token. The completion is encoded on its own, as
    `logo.scoring` does, because a prompt keeps the tokens that it has when it is asked.

    Raises:
        UsageError: the chat template refuses the conversation.
        DataError: the prompt or the completion has no tokens.
    """
    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    written = None
    if row.messages:
        conversation = chat(tokenizer, row.messages)
        prompt = list(conversation.ids)
        text = conversation.text or ""
        written = written_answer(tokenizer, row.messages, text, row.golds[0])
    else:
        prompt = text_ids(tokenizer, row.context)
        text = row.context
    answer = spaced(text, row.golds[0]) if written is None else written.rstrip()
    completion = answer_ids(tokenizer, answer)
    if written is not None and end and end[0] in completion:
        completion = completion[: len(completion) - completion[::-1].index(end[0])]
    else:
        completion = completion + end
    if not prompt or not completion:
        empty = "completion" if prompt else "prompt"
        raise DataError(f"the {empty} has no tokens; fix or delete the row")
    return TokenizedRow((*prompt, *completion), len(prompt))


def shortened(tokenizer: PreTrainedTokenizerBase, row: TokenizedRow, longest: int) -> TokenizedRow:
    """A row of at most `longest` tokens, whose prompt loses its beginning; DataError if the completion has no room."""
    room = longest - row.completion
    if room < 1:
        raise DataError(
            f"the completion has {row.completion} tokens, and a row may have {longest} with its prompt (--max-length, "
            "and no more than the base model reads); shorten it"
        )
    prompt = cut_left(tokenizer, row.ids[: row.prompt], room)
    return TokenizedRow((*prompt, *row.ids[row.prompt :]), len(prompt))


def opening(tokenizer: PreTrainedTokenizerBase, row: Row) -> tuple[int, ...]:
    """The last tokens of a conversation's prompt, with which the chat template opens the assistant's turn.

    Raises:
        DataError: the row is no conversation, or the template writes nothing there.
    """
    text = ""
    ids: Sequence[int] = ()
    if row.messages and tokenizer.chat_template:
        prompt = chat(tokenizer, row.messages)
        ids = prompt.ids
        conversation = conversation_text(tokenizer, row.messages)
        if prompt.text and prompt.text.startswith(conversation):
            text = prompt.text.removeprefix(conversation).strip()
    if not text:
        raise DataError(
            f"activation {ASSISTANT}: expected a conversation (messages) and a chat template that opens the "
            "assistant's turn, found none; give --activation last:4"
        )
    # The tokens are read from the prompt, because tokenisation depends on the neighbouring text.
    tails = (tuple(ids[-count:]) for count in range(1, len(ids) + 1))
    return next(tail for tail in tails if text in tokenizer.decode(list(tail), clean_up_tokenization_spaces=False))


def split(
    name: str, config: TrainingConfig, rows: Sequence[TokenizedRow]
) -> tuple[tuple[TokenizedRow, ...], tuple[TokenizedRow, ...]]:
    """The rows to learn from, without copies of held-out rows, and those that are held out. Where nothing else
    remained, none is held out."""
    order = _shuffled(len(rows), f"{config.seed} {name} held out")
    count = config.held_out_rows(len(rows))
    held_out = tuple(rows[index] for index in sorted(order[:count]))
    copied = set(held_out)
    learned = tuple(rows[index] for index in sorted(order[count:]) if rows[index] not in copied)
    return (learned, held_out) if learned else (tuple(rows), ())
