"""Example prompts from the datasets that an adapter's model card names (`datasets:` in its metadata).

Few public adapters come with example prompts, but many name the dataset that they were trained on. A few prompts of its
training split serve as well; answers are not kept. Rows are streamed, so that a large dataset is not downloaded whole.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from logo.adapters.examples import card_metadata
from logo.errors import DataError, listed
from logo.extras import need
from logo.hub.failures import hub_error
from logo.hub.names import is_repo_id

COUNT = 8  # prompts of an adapter
LONGEST = 4_000  # characters of a prompt; the base model reads each once, and a manifest holds it
_READ = 1_000  # rows of a dataset, of which the prompts are drawn
_AT_ONCE = 8  # datasets that are read at the same time
_CHATS = ("messages", "conversations")
_TEXTS = ("prompt", "context", "instruction", "inputs", "input", "question")


@dataclass(frozen=True)
class Part:
    """What is read of a dataset.

    Attributes:
        column: that holds the prompts; None: see `prompt_of`.
        split: such as `train`.
        subset: the configuration; None: the only one.
    """

    column: str | None = None
    split: str = "train"
    subset: str | None = None


def datasets_of(folder: Path) -> tuple[str, ...]:
    """The datasets that the model card in an adapter's folder names; empty if it names none."""
    named = card_metadata(folder).get("datasets")
    names = [named] if isinstance(named, str) else named if isinstance(named, list) else []
    return tuple(dict.fromkeys(name for name in names if isinstance(name, str) and name.strip()))


def on_hub(names: Sequence[str]) -> tuple[str, ...]:
    """The names that are repositories on the Hub, `org/name`; others are files or words of the tool that trained."""
    return tuple(filter(is_repo_id, names))


def read_each(repos: Sequence[str], part: Part) -> Iterator[tuple[str, list[str] | DataError]]:
    """Yields each dataset with its prompts, or with the reason why it gives none, as soon as it has been read.

    Several datasets are read at the same time. Ctrl-C does not wait for them.

    Args:
        repos: of the Hub, different ones.

    Raises:
        MissingLibrary: `datasets` is not installed.
    """
    need("the dataset of a model card", "datasets")
    asked: queue.SimpleQueue[str] = queue.SimpleQueue()
    read: queue.SimpleQueue[tuple[str, list[str] | BaseException]] = queue.SimpleQueue()
    for repo in repos:
        asked.put(repo)

    def work() -> None:
        while True:
            try:
                repo = asked.get_nowait()
            except queue.Empty:
                return
            try:
                read.put((repo, dataset_prompts(repo, part)))
            except BaseException as error:  # raised below, in the thread that waits
                read.put((repo, error))

    for _ in range(min(_AT_ONCE, len(repos))):
        threading.Thread(target=work, daemon=True).start()
    for _ in repos:
        repo, found = read.get()
        if isinstance(found, BaseException) and not isinstance(found, DataError):
            raise found
        yield repo, found


def dataset_prompts(repo: str, part: Part) -> list[str]:
    """Up to `COUNT` different prompts of a dataset, the same ones in each call.

    Raises:
        DataError: it cannot be read, or has no prompt.
    """
    import datasets

    found: dict[str, None] = {}
    columns: list[str] = []
    long = 0
    try:
        rows = datasets.load_dataset(repo, part.subset, split=part.split, streaming=True)
        for row in islice(rows.shuffle(seed=0, buffer_size=_READ), _READ):
            columns = columns or list(map(str, row))
            prompt = prompt_of(row, part.column)
            if prompt is not None and len(prompt) > LONGEST:
                long += 1
            elif prompt is not None:
                found[prompt] = None
            if len(found) == COUNT:
                break
    except Exception as error:  # of datasets, of its readers and of the connection
        raise DataError(f"dataset {repo}: {_reason(repo, error)}") from error
    if not found and long:
        raise DataError(f"dataset {repo}: expected prompts of at most {LONGEST:,} characters, found longer ones only")
    if not found:
        names = (part.column,) if part.column is not None else (*_CHATS, *_TEXTS)
        wanted = f"texts in {'a column' if len(names) == 1 else 'one of'} {listed(list(map(repr, names)), len(names))}"
        raise DataError(
            f"dataset {repo}: expected {wanted}; its columns are {listed(columns, 12) or 'none'}; "
            "name one with --column"
        )
    return list(found)


def shared(found: Sequence[Sequence[str]]) -> list[str]:
    """`COUNT` prompts of several datasets, taken in turn."""
    turns = (prompt for turn in zip_longest(*found) for prompt in turn if prompt is not None)
    return list(dict.fromkeys(turns))[:COUNT]


def prompt_of(row: Mapping[str, Any], column: str | None = None) -> str | None:
    """The prompt of a row, None if it has none.

    Args:
        column: a text, or a conversation, of which the first message of the user is taken. None: the first of
            `messages`, `conversations`, `prompt`, `context`, `instruction` (followed by `input`, if there is one),
            `inputs`, `input` and `question` that the row has. A column `text` often holds the answer, too.
    """
    for name in (column,) if column is not None else (*_CHATS, *_TEXTS):
        said = row.get(name)
        text = _asked(said) if isinstance(said, (list, tuple)) else said
        if isinstance(text, str) and text.strip():
            more = row.get("input") if column is None and name == "instruction" else None
            return f"{text}\n\n{more}" if isinstance(more, str) and more.strip() else text
    return None


def _asked(messages: Sequence[Any]) -> str | None:
    """The first message of the user, in the keys of OpenAI or of ShareGPT."""
    for message in messages:
        if isinstance(message, Mapping) and message.get("role", message.get("from")) in ("user", "human"):
            text = message.get("content", message.get("value"))
            return text if isinstance(text, str) else None
    return None


def _reason(repo: str, error: Exception) -> str:
    """Why a dataset cannot be read, without the secrets that a message of a server may hold."""
    from datasets.exceptions import DatasetsError

    if isinstance(error, (DatasetsError, ValueError, TypeError)):  # no such dataset or split, several configurations
        text = " ".join(str(error).split())
        return text if len(text) <= 300 else f"{text[:300]}..."
    return str(hub_error(f"datasets/{repo}", error))
