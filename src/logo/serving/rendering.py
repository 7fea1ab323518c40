"""Pieces of answers as OpenAI's objects, whole or in chunks, for both endpoints."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from logo.api.replies import Mixture, Reply
from logo.endings import FinishReason
from logo.protocol import TokenLogprob
from logo.serving import replies
from logo.serving.answers import Asked, Piece

Spelled = Callable[[int], str]  # a token as text


@dataclass
class Collected:
    """One answer, as far as it is generated."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason = "length"

    def add(self, piece: Piece) -> None:
        """Appends a piece."""
        self.text += piece.text
        self.tokens += piece.tokens
        self.logprobs += piece.logprobs
        self.finish_reason = piece.finish_reason or self.finish_reason


@dataclass(frozen=True)
class Options:
    """The format that a request asks for.

    Attributes:
        model: the model's name in the request.
        token_ids: whether choices carry them.
        logprobs: whether they carry log probabilities.
        usage: whether a stream ends with the token counts.
    """

    model: str
    token_ids: bool
    logprobs: bool
    usage: bool


class Rendering(ABC):
    """The format of the answers of one request; subclasses add the differences of the endpoints.

    Args:
        options: the requested format.
        spelled: a token as text.
        prefix: of the answer's id.
    """

    def __init__(self, options: Options, spelled: Spelled, prefix: Literal["cmpl", "chatcmpl"]) -> None:
        self.options = options
        self._spelled = spelled
        self._head: dict[str, Any] = {"id": replies.new_id(prefix), "created": replies.now(), "model": options.model}

    @abstractmethod
    def whole(self, answers: Sequence[Collected], asked: Asked) -> Reply:
        """The answer of a request that is not streamed."""

    @abstractmethod
    def first(self, asked: Asked) -> Reply:
        """The chunk that begins every answer, before any token."""

    @abstractmethod
    def chunk(self, piece: Piece) -> Reply:
        """A piece."""

    @abstractmethod
    def last(self, asked: Asked, tokens: int) -> Reply:
        """The chunk with the counts."""

    def _ids(self, tokens: Sequence[int]) -> list[int] | None:
        return list(tokens) if self.options.token_ids else None


class CompletionRendering(Rendering):
    """`/v1/completions`."""

    def __init__(self, options: Options, spelled: Spelled) -> None:
        super().__init__(options, spelled, "cmpl")
        self._offsets: dict[int, int] = {}  # characters of each answer so far

    def whole(self, answers: Sequence[Collected], asked: Asked) -> Reply:
        """See `Rendering`."""
        choices = [self._choice(i, a.text, a.tokens, a.logprobs, a.finish_reason) for i, a in enumerate(answers)]
        return replies.Completion(**self._head, choices=choices, usage=usage(asked, answers), logo=mixtures(asked))

    def first(self, asked: Asked) -> Reply:
        """See `Rendering`."""
        choices = [replies.CompletionChoice(index=i, text="") for i in range(len(asked.prompts) * asked.n)]
        return replies.CompletionChunk(**self._head, choices=choices, logo=mixtures(asked))

    def chunk(self, piece: Piece) -> Reply:
        """See `Rendering`."""
        choice = self._choice(piece.index, piece.text, piece.tokens, piece.logprobs, piece.finish_reason)
        return replies.CompletionChunk(**self._head, choices=[choice])

    def last(self, asked: Asked, tokens: int) -> Reply:
        """See `Rendering`."""
        return replies.CompletionChunk(**self._head, choices=[], usage=_usage(asked, tokens))

    def _choice(
        self,
        index: int,
        text: str,
        tokens: Sequence[int],
        logprobs: Sequence[TokenLogprob],
        reason: FinishReason | None,
    ) -> replies.CompletionChoice:
        return replies.CompletionChoice(
            index=index,
            text=text,
            finish_reason=reason,
            token_ids=self._ids(tokens),
            logprobs=self._logprobs(index, logprobs) if self.options.logprobs else None,
        )

    def _logprobs(self, index: int, logprobs: Sequence[TokenLogprob]) -> replies.CompletionLogprobs:
        texts = [self._spelled(entry.token) for entry in logprobs]
        at, offsets = self._offsets.get(index, 0), []
        for text in texts:
            offsets.append(at)
            at += len(text)
        self._offsets[index] = at
        return replies.CompletionLogprobs(
            tokens=texts,
            token_logprobs=[entry.logprob for entry in logprobs],
            top_logprobs=[{self._spelled(token): value for token, value in entry.top} for entry in logprobs],
            text_offset=offsets,
        )


class ChatRendering(Rendering):
    """`/v1/chat/completions`."""

    def __init__(self, options: Options, spelled: Spelled) -> None:
        super().__init__(options, spelled, "chatcmpl")

    def whole(self, answers: Sequence[Collected], asked: Asked) -> Reply:
        """See `Rendering`."""
        choices = [
            replies.ChatChoice(
                index=i,
                message=replies.ReplyMessage(content=answer.text),
                finish_reason=answer.finish_reason,
                token_ids=self._ids(answer.tokens),
                logprobs=self._logprobs(answer.logprobs),
            )
            for i, answer in enumerate(answers)
        ]
        return replies.ChatCompletion(**self._head, choices=choices, usage=usage(asked, answers), logo=mixtures(asked))

    def first(self, asked: Asked) -> Reply:
        """See `Rendering`."""
        begin = replies.Delta(role="assistant", content="")
        choices = [replies.ChatChunkChoice(index=i, delta=begin) for i in range(asked.n)]
        return replies.ChatCompletionChunk(**self._head, choices=choices, logo=mixtures(asked))

    def chunk(self, piece: Piece) -> Reply:
        """See `Rendering`."""
        choice = replies.ChatChunkChoice(
            index=piece.index,
            delta=replies.Delta(content=piece.text),
            finish_reason=piece.finish_reason,
            token_ids=self._ids(piece.tokens),
            logprobs=self._logprobs(piece.logprobs),
        )
        return replies.ChatCompletionChunk(**self._head, choices=[choice])

    def last(self, asked: Asked, tokens: int) -> Reply:
        """See `Rendering`."""
        return replies.ChatCompletionChunk(**self._head, choices=[], usage=_usage(asked, tokens))

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> replies.ChatLogprobs | None:
        if not self.options.logprobs:
            return None
        return replies.ChatLogprobs(
            content=[
                replies.TokenLogprob(
                    **self._token(entry.token, entry.logprob),
                    top_logprobs=[replies.TopLogprob(**self._token(*other)) for other in entry.top],
                )
                for entry in logprobs
            ]
        )

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._spelled(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8"))}


def mixtures(asked: Asked) -> Mixture | list[Mixture]:
    """One for the only prompt, or a list."""
    found = [Mixture.of(chosen) for chosen in asked.chosen]
    return found[0] if len(found) == 1 else found


def usage(asked: Asked, answers: Sequence[Collected]) -> replies.Usage:
    """The counts of a whole answer."""
    return _usage(asked, sum(len(answer.tokens) for answer in answers))


def _usage(asked: Asked, tokens: int) -> replies.Usage:
    return replies.Usage.of(sum(map(len, asked.prompts)), tokens)
