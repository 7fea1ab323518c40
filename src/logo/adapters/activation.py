"""`Activation`: where an adapter acts, on every token or from a position of the prompt on (aLoRA, arXiv 2504.12397).

    everywhere      plain adapters
    invocation      from the beginning of the last occurrence of its invocation tokens (`alora_invocation_tokens`)
    last:N          from the last N tokens of the prompt on (`activation` in `pool.json`)

Tokens before that position are read by the base model alone, so they do not depend on the adapter.

Of the notes in `pool.json` (training config, losses, ...), only `activation` and `k`, the adapters per prompt, have an
effect on answers. A file that cannot be read gives a warning and counts as empty.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from logo.adapters.peft import NOTES
from logo.errors import StorageError, UsageError, listed
from logo.identity import content_stamp

# What an adapter may do in a prompt that lacks its invocation tokens.
OFF, ERROR = "off", "error"

_LAST = re.compile(r"last:([1-9]\d{0,8})")  # with 0, no adapter would act on the token that gives the first answer
_SHOWN = 5  # names of adapters in a message


@dataclass(frozen=True)
class Activation:
    """Where one adapter acts.

    Attributes:
        tokens: its invocation tokens; empty: it has none.
        last: N of `last:N`: it acts on the last N tokens of a prompt and on the answer; None: it is not of this kind.
        without: what an adapter does in a prompt that lacks its invocation tokens: `"off"`, nothing, as in PEFT;
            `"error"`; or `"last:N"`.
    """

    tokens: tuple[int, ...] = ()
    last: int | None = None
    without: str = OFF

    @classmethod
    def parse(cls, text: str) -> Activation:
        """Parses `"everywhere"` or `"last:N"`.

        Raises:
            UsageError: it is neither.
        """
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
        """The first position of a prompt at which the adapter acts; None: it acts neither there nor on the answer.

        Raises:
            UsageError: the prompt lacks the invocation tokens, and `without` is `"error"`.
        """
        if self.tokens:
            found = last_occurrence(prompt, self.tokens)
            if found is not None or self.without == OFF:
                return found
            if self.without == ERROR:
                raise UsageError(
                    f"the prompt does not contain the invocation tokens {list(self.tokens)} that activate an adapter: "
                    "put them where the answer begins, or set --when-not-invoked to off or last:N"
                )
            return Activation.parse(self.without).begin(prompt)
        return 0 if self.last is None else max(0, len(prompt) - self.last)


EVERYWHERE = Activation()


def warn_of_silent(names: Iterable[str], told: set[str]) -> None:
    """Warns of adapters whose invocation tokens a prompt lacks, of each once: not of those in `told`, which grows."""
    found = [name for name in dict.fromkeys(names) if name not in told]
    told.update(found)
    if found:
        shown = listed(list(map(repr, found)), _SHOWN)
        who, whose = (f"adapter {shown}", "its") if len(found) == 1 else (f"adapters {shown}", "their")
        warnings.warn(
            f"{who}: a prompt lacks {whose} invocation tokens, so its answer is not adapted, as in PEFT; if they open "
            "the assistant's turn, give prompts as chats (--chat); else see --when-not-invoked",
            UserWarning,
            stacklevel=2,
        )


def last_occurrence(prompt: Sequence[int], tokens: Sequence[int]) -> int | None:
    """The position of the last occurrence of these tokens in a prompt, as PEFT's `calculate_alora_offsets`; or None."""
    wanted = list(tokens)
    for start in range(len(prompt) - len(wanted), -1, -1):
        if prompt[start] == wanted[0] and list(prompt[start : start + len(wanted)]) == wanted:
            return start
    return None


def check_without(value: str) -> str:
    """Raises UsageError unless `value` is `"off"`, `"error"` or `"last:N"`."""
    if value not in (OFF, ERROR) and not (isinstance(value, str) and _LAST.fullmatch(value)):
        raise UsageError(f"when_not_invoked: expected off, error or last:N, found {value!r}")
    return value


def acting(activation: Activation, forced: str | None, without: str | None = None) -> Activation:
    """An adapter's activation, changed as a user wants it for all adapters of a pool.

    Args:
        forced: `"everywhere"` or `"last:N"` for every adapter; `"invocation"`: unchanged, but invocation tokens are
            required. None: unchanged.
        without: see `Activation.without`; None: unchanged.

    Raises:
        UsageError: `"invocation"` for an adapter without invocation tokens.
    """
    if forced == "invocation":
        if not activation.tokens:
            raise UsageError(
                "activation invocation: an adapter has no invocation tokens (alora_invocation_tokens in its "
                "configuration); use last:N, or leave the option out"
            )
    elif forced is not None:
        activation = Activation.parse(forced)
    return replace(activation, without=without) if activation.tokens and without is not None else activation


def check_forced(forced: str | None) -> str | None:
    """Raises UsageError unless it is an activation that a user may force."""
    if forced is not None and forced != "invocation":
        Activation.parse(forced)
    return forced


def earliest(activations: Iterable[Activation], prompt: Sequence[int]) -> int:
    """The first position of a prompt at which any adapter acts; the last position if none acts.

    It is the number of tokens that the base model alone reads, which is never the whole prompt.

    Args:
        activations: of the adapters of a pool.
    """
    lenient = {replace(one, without=OFF) if one.without == ERROR else one for one in activations}
    begins = [begin for one in lenient if (begin := one.begin(prompt)) is not None]
    return min(begins, default=len(prompt) - 1)


def read_notes(root: Path) -> dict[str, Any]:
    """The notes of a pool; empty if there are none."""
    file = root / NOTES
    try:
        notes = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        warnings.warn(f"{file} is ignored, since it cannot be read: {error}", UserWarning, stacklevel=2)
        return {}
    if not isinstance(notes, dict):
        warnings.warn(f"{file} is ignored: it must hold an object", UserWarning, stacklevel=2)
        return {}
    return notes


def noted_k(root: Path) -> int | None:
    """Adapters per prompt, if the notes of a pool say so.

    Raises:
        StorageError: they say something else than a number.
    """
    try:
        return checked_k(read_notes(root), str(root / NOTES))
    except UsageError as error:
        raise StorageError(str(error)) from None


def checked_k(said: Mapping[Any, Any], where: str) -> int | None:
    """The entry `k`; None if there is none. Raises UsageError for anything but a number of adapters."""
    k = said.get("k")
    if k is not None and (type(k) is not int or k < 1):
        raise UsageError(f"{where}: k: expected a number of adapters, found {k!r}")
    return k


def noted(folder: Path, own: Activation, top: Path | None = None) -> Activation:
    """The activation of an adapter: its own, or that of the nearest `pool.json` between its folder and the pool's.

    Args:
        own: the activation that its configuration gives.
        top: the pool's folder; None: the one above the adapter's, since it was opened by its own.

    Raises:
        StorageError: a `pool.json` names an activation that does not exist.
    """
    if not own.everywhere:
        return own
    if top is None:
        folder = folder.absolute()
        top = folder.parent
    for above in (folder, *folder.parents):
        try:
            stamp = content_stamp(above / NOTES)
        except OSError:
            if above == top:
                break
        else:
            return _noted(above, *stamp)
    return own


@lru_cache(maxsize=64)  # one file holds for all adapters of a pool
def _noted(root: Path, *stamp: int) -> Activation:
    said = read_notes(root).get("activation")
    try:
        return EVERYWHERE if said is None or said == "invocation" else Activation.parse(said)
    except UsageError as error:
        raise StorageError(f"{root / NOTES}: {error}") from error
