"""`Activation`: where an adapter acts, on every token or from a position of the prompt on (aLoRA, arXiv 2504.12397).

    everywhere      plain adapters
    invocation      from the beginning of the last occurrence of its invocation tokens (`alora_invocation_tokens`)
    last:N          from the last N tokens of the prompt on (`activation` in `pool.json`)

Tokens before that position are read by the base model alone, so they do not depend on the adapter. Of the notes in
`pool.json`, only `activation` and `k`, the adapters per prompt, have an effect on answers.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from logo.adapters.peft import NOTES
from logo.errors import StorageError, UsageError, listed
from logo.identity import content_stamp

_LAST = re.compile(r"last:([1-9]\d{0,8})")  # with 0, no adapter would act on the token that gives the first answer


@dataclass(frozen=True)
class Activation:
    """Where one adapter acts.

    Attributes:
        tokens: its invocation tokens; empty: it has none.
        last: N of `last:N`: it acts on the last N tokens of a prompt and on the answer; None: it is not of this kind.
    """

    tokens: tuple[int, ...] = ()
    last: int | None = None

    @classmethod
    def parse(cls, text: str) -> Activation:
        """Parses `"everywhere"` or `"last:N"`. Raises UsageError if it is neither."""
        match = _LAST.fullmatch(text) if isinstance(text, str) else None
        if text == "everywhere":
            return EVERYWHERE
        if match is None:
            raise UsageError(f"activation: expected everywhere, invocation or last:N, found {text!r}; N is 1 or more")
        return cls(last=int(match[1]))

    @property
    def everywhere(self) -> bool:
        """Whether the adapter acts on every token."""
        return not self.tokens and self.last is None

    def __str__(self) -> str:
        return "everywhere" if self.everywhere else "invocation" if self.tokens else f"last:{self.last}"

    def begin(self, prompt: Sequence[int]) -> int | None:
        """The first position of a prompt at which the adapter acts; None: it acts neither there nor on the answer, as
        in PEFT, since the prompt lacks its invocation tokens."""
        if self.tokens:
            return last_occurrence(prompt, self.tokens)
        return 0 if self.last is None else max(0, len(prompt) - self.last)


EVERYWHERE = Activation()


def warn_of_silent(names: Iterable[str], told: set[str]) -> None:
    """Warns of adapters whose invocation tokens a prompt lacks, of each once: not of those in `told`, which grows."""
    new = [name for name in dict.fromkeys(names) if name not in told]
    told.update(new)
    if new:
        lacks = f"a prompt lacks the invocation tokens of {listed(list(map(repr, new)), 5)}"
        hint = "if they open the assistant's turn, give chats (--chat)"
        warnings.warn(f"{lacks}, so its answer is not adapted, as in PEFT; {hint}", UserWarning, stacklevel=2)


def last_occurrence(prompt: Sequence[int], tokens: Sequence[int]) -> int | None:
    """The position of the last occurrence of these tokens in a prompt, as PEFT's `calculate_alora_offsets`; or None."""
    sequence = list(tokens)
    for start in range(len(prompt) - len(sequence), -1, -1):
        if prompt[start] == sequence[0] and list(prompt[start : start + len(sequence)]) == sequence:
            return start
    return None


def check_forced(forced: str | None) -> None:
    """Raises UsageError unless it is an activation that a user may force, or None."""
    if forced not in (None, "invocation"):
        Activation.parse(forced)


def earliest(activations: Iterable[Activation], prompt: Sequence[int]) -> int:
    """The first position of a prompt at which any adapter of a pool acts, before which the base model alone reads; the
    last position if none acts."""
    begins = [activation.begin(prompt) for activation in activations]
    return min((begin for begin in begins if begin is not None), default=len(prompt) - 1)


def read_notes(root: Path) -> dict[str, Any]:
    """The notes of a pool; empty if there are none, or, with a warning, if they are no JSON object.

    Raises StorageError if they cannot be read, name an activation that does not exist, or a `k` that is no number.
    """
    file = root / NOTES
    return _read_notes(file, *content_stamp(file)) if os.path.isfile(file) else {}


@lru_cache(maxsize=64)  # one file holds for all adapters of a pool
def _read_notes(file: Path, *stamp: int) -> dict[str, Any]:
    try:
        notes = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:  # without them, adapters would act on other tokens
        raise StorageError(f"{file}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        notes = error
    if not isinstance(notes, dict):
        warnings.warn(f"{file} is ignored: expected a JSON object, found {notes!r}", UserWarning, stacklevel=3)
        return {}
    try:
        checked_k(notes)
        check_forced(notes.get("activation"))
    except UsageError as error:
        raise StorageError(f"{file}: {error}") from error
    return notes


def checked_k(notes: Mapping[Any, Any]) -> int | None:
    """The entry `k`; None if there is none. Raises UsageError for anything but a number of adapters."""
    k = notes.get("k")
    if k is not None and (type(k) is not int or k < 1):
        raise UsageError(f"k: expected a number of adapters, found {k!r}")
    return k


def noted(folder: Path, own: Activation, top: Path | None = None) -> Activation:
    """The activation of an adapter: its own, or that of the nearest `pool.json` that names one, in its folder or above.

    So it does not depend on where a pool was opened. `own` is that of its configuration; notes above `top` do not
    apply, such as those above a repository (None: all do). Errors as `read_notes`.
    """
    if not own.everywhere:
        return own
    folder = Path(os.path.abspath(folder))
    last = None if top is None else Path(os.path.abspath(top))
    for above in (folder, *folder.parents):
        activation = read_notes(above).get("activation")
        if activation is not None:
            return own if activation == "invocation" else Activation.parse(activation)
        if above == last:
            break
    return own
