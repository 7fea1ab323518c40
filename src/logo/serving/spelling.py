"""`Spelling`: the bytes and the names of single tokens, and `Offsets`: where tokens begin in a text.

Decoding a token alone does not give its text: a part of a character becomes U+FFFD, and many tokenizers drop the blank
in front of a word. So tokens are spelled from the pieces of the vocabulary, as the tokenizer's decoder joins them.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE = re.compile("<0x([0-9A-F]{2})>")
# Steps of a decoder that do not change a token, except at the beginning of a text (see `Offsets`).
_BETWEEN = ("Fuse", "Strip")


class Spelling:
    """Spells the tokens of one tokenizer.

    Attributes:
        special: tokens that are no part of a text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        decoder = None if backend is None else backend.decoder
        self._steps = [] if decoder is None else list(_steps(json.loads(decoder.__getstate__())))
        self.special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}

    def encoded(self, token: int) -> bytes:
        """The bytes of a token; a special one has those of its name."""
        piece: str | None = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:  # models may have more rows than there are tokens
            return b""
        for step in self._steps:
            kind = step["type"]
            if kind == "ByteLevel":
                known = _byte_level()
                return bytes(known[c] for c in piece) if known.keys() >= set(piece) else piece.encode("utf-8")
            if kind == "ByteFallback" and (found := _BYTE.fullmatch(piece)):
                return bytes.fromhex(found[1])
            if kind == "Metaspace":
                piece = piece.replace(step["replacement"], " ")
            elif kind == "Replace" and "String" in step["pattern"]:
                piece = piece.replace(step["pattern"]["String"], step["content"])
            elif kind not in ("ByteFallback", *_BETWEEN):
                return self._alone(token)
        return piece.encode("utf-8") if self._steps else self._alone(token)

    def name(self, token: int) -> str:
        """The text of a token; of one that is only a part of a character, its bytes as OpenAI writes them."""
        spelled = self.encoded(token)
        try:
            return spelled.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)

    def shown(self, token: int, *, first: bool) -> bytes:
        """The bytes that a token adds to a text.

        A special token adds none. The first token of a text adds no leading blank if the tokenizer drops it there.
        """
        if token in self.special:
            return b""
        spelled = self.encoded(token)
        return spelled[1:] if first and spelled[:1] == b" " != self._alone(token)[:1] else spelled

    def _alone(self, token: int) -> bytes:
        text: str = self._tokenizer.decode([token])
        return text.encode("utf-8")


class Offsets:
    """Finds where the tokens of one text begin in it, in characters."""

    def __init__(self, spelling: Spelling) -> None:
        self._spelling = spelling
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._at, self._first = 0, True

    def next(self, token: int) -> int:
        """The place of the next token; one that continues a character has the place of the character."""
        at, shown = self._at, self._spelling.shown(token, first=self._first)
        self._at += len(self._decoder.decode(shown))
        self._first = self._first and token in self._spelling.special
        return at


def _steps(decoder: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if decoder["type"] == "Sequence":
        for step in decoder["decoders"]:
            yield from _steps(step)
    else:
        yield decoder


@cache
def _byte_level() -> dict[str, int]:
    """Character -> the byte that it stands for in byte-level vocabularies."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = (byte for byte in range(256) if byte not in plain)
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(others)}
