"""Where an adapter acts: on every token, or only from a position of the prompt on (activated LoRA, arXiv 2504.12397).

    everywhere      plain adapters
    invocation      from the beginning of the last occurrence of its invocation tokens (`alora_invocation_tokens`)
    last:N          from the last N tokens of the prompt on (`activation` in `pool.json`)

What comes before that position is the base model's, whatever adapter answers.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from logo.errors import UsageError

# What the settings may say about a prompt that lacks an adapter's invocation tokens.
OFF, ERROR = "off", "error"


@dataclass(frozen=True)
class Activation:
    """Where one adapter acts.

    Attributes:
        tokens: its invocation tokens; empty: it has none.
        last: it acts from the last so many tokens of a prompt on; None: it does not count from the end.
        without: what an adapter does in a prompt that lacks its invocation tokens: `"off"`, nothing, as in PEFT;
            `"error"`; or `"last:N"`.
    """

    tokens: tuple[int, ...] = ()
    last: int | None = None
    without: str = OFF

    @classmethod
    def parse(cls, text: str) -> Activation:
        """`"everywhere"` or `"last:N"`.

        Raises:
            UsageError: it is neither.
        """
        match = re.fullmatch(r"last:(\d{1,9})", text) if isinstance(text, str) else None
        if text == "everywhere":
            return EVERYWHERE
        if match is None:
            raise UsageError(f"activation: expected everywhere, invocation or last:N, found {text!r}")
        if int(match[1]) == 0:
            raise UsageError(
                "activation last:0 leaves the prompt's last token, from which the answer's first token is drawn, to "
                "the base model: expected last:1 or more"
            )
        return cls(last=int(match[1]))

    @property
    def everywhere(self) -> bool:
        """Whether it is a plain adapter's."""
        return not self.tokens and self.last is None

    def __str__(self) -> str:
        return "everywhere" if self.everywhere else "invocation" if self.tokens else f"last:{self.last}"

    def begin(self, prompt: Sequence[int]) -> int | None:
        """The first position of a prompt at which the adapter acts; None: it acts neither there nor on the answer.

        Raises:
            UsageError: the prompt lacks the invocation tokens, and that is an error.
        """
        if self.tokens:
            found = last_occurrence(prompt, self.tokens)
            if found is not None or self.without == OFF:
                return found
            if self.without == ERROR:
                raise UsageError(
                    f"the prompt does not contain the invocation tokens {list(self.tokens)} that activate an adapter: "
                    "write them where the answer is to begin, or say what to do without them (--when-not-invoked off "
                    "or last:N)"
                )
            return Activation.parse(self.without).begin(prompt)
        return 0 if self.last is None else max(0, len(prompt) - self.last)


EVERYWHERE = Activation()


class NotInvoked(Counter[str]):
    """Adapter -> how often it was to answer a prompt that lacks its invocation tokens, and did nothing."""

    def note(self, names: Iterable[str]) -> None:
        """Counts these, and warns of those that are new."""
        for text in self.new(names):
            warnings.warn(text, UserWarning, stacklevel=2)

    def new(self, names: Iterable[str]) -> list[str]:
        """Counts these, and returns what there is to say of those that are new."""
        found = []
        for name in names:
            if name not in self:
                found.append(
                    f"adapter {name!r}: a prompt lacks its invocation tokens, so it does nothing there "
                    "(--when-not-invoked says what else it may do)"
                )
            self[name] += 1
        return found


def last_occurrence(prompt: Sequence[int], tokens: Sequence[int]) -> int | None:
    """Where these tokens stand last in a prompt; None: nowhere. PEFT counts from there (`calculate_alora_offsets`)."""
    wanted = list(tokens)
    for start in range(len(prompt) - len(wanted), -1, -1):
        if prompt[start] == wanted[0] and list(prompt[start : start + len(wanted)]) == wanted:
            return start
    return None


def check_without(value: str) -> str:
    """Raises UsageError unless it says what an adapter does that is not invoked."""
    if value not in (OFF, ERROR):
        try:
            if Activation.parse(value).everywhere:
                raise UsageError("")
        except UsageError:
            raise UsageError(f"when_not_invoked: expected off, error or last:N, found {value!r}") from None
    return value


def acting(activation: Activation, forced: str | None, without: str | None = None) -> Activation:
    """An adapter's activation with what a user says about all of a pool's.

    Args:
        forced: `"everywhere"` or `"last:N"` for every adapter, or `"invocation"`: as each adapter says itself, which
            has to have invocation tokens. None: as each adapter says itself.
        without: see `Activation.without`; None: as it is.

    Raises:
        UsageError: an adapter without invocation tokens is to wait for them.
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
    """Raises UsageError unless it is an activation that a user may ask for."""
    if forced is not None and forced != "invocation":
        Activation.parse(forced)
    return forced


def of_notes(said: Any) -> Activation:
    """What `pool.json` says about all adapters of a pool that have no invocation tokens of their own; None: nothing.

    Raises:
        UsageError: something that is no activation.
    """
    return EVERYWHERE if said is None or said == "invocation" else Activation.parse(said)


def earliest(activations: Iterable[Activation], prompt: Sequence[int]) -> int:
    """The first position of a prompt at which any adapter acts; where none does, its last token. So it is the number of
    tokens that the base model reads for all adapters alike, and never all of them.

    Args:
        activations: of the adapters of a pool.
    """
    lenient = {replace(one, without=OFF) if one.without == ERROR else one for one in activations}
    begins = [begin for one in lenient if (begin := one.begin(prompt)) is not None]
    return min(begins, default=len(prompt) - 1)
