"""Example prompts from the datasets that an adapter's model card names (`datasets:` in its metadata).

Few public adapters come with example prompts, but many name the dataset that they were trained on. A few prompts of its
training split serve as well; answers are not kept. Rows are streamed, so that a large dataset is not downloaded whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from logo.adapters.examples import card_metadata
from logo.errors import DataError, listed
from logo.extras import need
from logo.hub.failures import hub_error
from logo.hub.names import is_repo_id

COUNT = 8  # prompts of an adapter
MOST_DATASETS = 4  # of a card; others are left out
_READ = 1_000  # rows of a dataset, of which the prompts are drawn
_CHATS = ("messages", "conversations")
_TEXTS = ("prompt", "context", "instruction", "inputs", "input", "question", "text")


def datasets_of(folder: Path) -> tuple[str, ...]:
    """The datasets on the Hub that the model card in an adapter's folder names; empty if it names none."""
    named = card_metadata(folder).get("datasets")
    names = [named] if isinstance(named, str) else named if isinstance(named, list) else []
    repos = dict.fromkeys(name for name in names if isinstance(name, str) and is_repo_id(name))
    return tuple(repos)[:MOST_DATASETS]


def dataset_prompts(repos: Sequence[str], *, column: str | None = None, split: str = "train") -> list[str]:
    """Prompts of these datasets, the same in each call: `COUNT` of them, shared evenly among the datasets.

    Args:
        repos: at least one.
        column: that holds the prompts; None: see `prompt_of`.

    Raises:
        DataError: a dataset cannot be read, or has no prompt.
        MissingLibrary: `datasets` is not installed.
    """
    share = -(-COUNT // len(repos))
    return [prompt for repo in repos for prompt in _prompts(repo, column, split, share)][:COUNT]


def prompt_of(row: Mapping[str, Any], column: str | None = None) -> str | None:
    """The prompt of a row, None if it has none.

    Args:
        column: a text, or a conversation, of which the first message of the user is taken. None: the first of
            `messages`, `conversations`, `prompt`, `context`, `instruction` (followed by `input`, if there is one),
            `inputs`, `input`, `question` and `text` that the row has.
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


def _prompts(repo: str, column: str | None, split: str, count: int) -> list[str]:
    need("the dataset of a model card", "datasets")
    import datasets

    found: dict[str, None] = {}
    columns: list[str] = []
    try:
        rows = datasets.load_dataset(repo, split=split, streaming=True).shuffle(seed=0, buffer_size=_READ)
        for row in islice(rows, _READ):
            columns = columns or list(map(str, row))
            if (prompt := prompt_of(row, column)) is not None:
                found[prompt] = None
            if len(found) == count:
                break
    except Exception as error:  # of datasets, of its readers and of the connection
        raise DataError(f"dataset {repo}: {_reason(repo, error)}") from error
    if not found:
        wanted = f"texts in a column {column!r}" if column is not None else f"texts in {listed((*_CHATS, *_TEXTS), 9)}"
        raise DataError(f"dataset {repo}: expected {wanted}; its columns are {listed(columns, 12) or 'none'}")
    return list(found)


def _reason(repo: str, error: Exception) -> str:
    """Why a dataset cannot be read, without the secrets that a message of a server may hold."""
    from datasets.exceptions import DatasetsError

    if isinstance(error, (DatasetsError, ValueError, TypeError)):  # no such dataset or split, several configurations
        return " ".join(str(error).split())[:300]
    return str(hub_error(f"datasets/{repo}", error))
