"""`Rendering`: makes OpenAI's objects of answers, whole or in chunks, for both endpoints."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from logo.api.replies import Mixture, Reply
from logo.core import FinishReason
from logo.serving import openai
from logo.serving.answers import AnswerChunk, PreparedRequest


@dataclass
class Collected:
    """One answer so far."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish_reason: FinishReason = "length"

    def add(self, chunk: AnswerChunk) -> None:
        """Appends a chunk."""
        self.text += chunk.text
        self.tokens += chunk.tokens
        self.finish_reason = chunk.finish_reason or self.finish_reason


@dataclass(frozen=True)
class Options:
    """What a request wants in its answer.

    Attributes:
        model: the name that it used.
        token_ids: whether choices have token ids.
        usage: whether a stream ends with token counts.
    """

    model: str
    token_ids: bool
    usage: bool


class Rendering(ABC):
    """Makes the objects of one request's answers; subclasses are for the endpoints.

    Args:
        options: what the request wants.

    Attributes:
        prefix: of the answers' ids.
    """

    prefix: ClassVar[Literal["cmpl", "chatcmpl"]]

    def __init__(self, options: Options) -> None:
        self.options = options
        self._head: dict[str, Any] = {"id": openai.new_id(self.prefix), "created": openai.now(), "model": options.model}

    @abstractmethod
    def whole(self, answers: Sequence[Collected], request: PreparedRequest) -> Reply:
        """The answer of a request that is not streamed."""

    @abstractmethod
    def first(self, request: PreparedRequest) -> Reply:
        """The chunk that begins every answer, before any token."""

    @abstractmethod
    def chunk(self, chunk: AnswerChunk) -> Reply:
        """The object of a chunk."""

    @abstractmethod
    def last(self, request: PreparedRequest, tokens: int) -> Reply:
        """The chunk with the token counts."""

    def _ids(self, tokens: Sequence[int]) -> list[int] | None:
        return list(tokens) if self.options.token_ids else None


class CompletionRendering(Rendering):
    """`/v1/completions`."""

    prefix = "cmpl"

    def whole(self, answers: Sequence[Collected], request: PreparedRequest) -> Reply:
        """See `Rendering`."""
        choices = [self._choice(i, a.text, a.tokens, a.finish_reason) for i, a in enumerate(answers)]
        return openai.Completion(**self._head, choices=choices, usage=usage(request, answers), logo=mixtures(request))

    def first(self, request: PreparedRequest) -> Reply:
        """See `Rendering`."""
        choices = [openai.CompletionChoice(index=i, text="") for i in range(len(request.prompts) * request.n)]
        return openai.CompletionChunk(**self._head, choices=choices, logo=mixtures(request))

    def chunk(self, chunk: AnswerChunk) -> Reply:
        """See `Rendering`."""
        choice = self._choice(chunk.index, chunk.text, chunk.tokens, chunk.finish_reason)
        return openai.CompletionChunk(**self._head, choices=[choice])

    def last(self, request: PreparedRequest, tokens: int) -> Reply:
        """See `Rendering`."""
        return openai.CompletionChunk(**self._head, choices=[], usage=_usage(request, tokens))

    def _choice(
        self, index: int, text: str, tokens: Sequence[int], reason: FinishReason | None
    ) -> openai.CompletionChoice:
        return openai.CompletionChoice(index=index, text=text, finish_reason=reason, token_ids=self._ids(tokens))


class ChatRendering(Rendering):
    """`/v1/chat/completions`."""

    prefix = "chatcmpl"

    def whole(self, answers: Sequence[Collected], request: PreparedRequest) -> Reply:
        """See `Rendering`."""
        choices = [
            openai.ChatChoice(
                index=i,
                message=openai.ReplyMessage(content=answer.text),
                finish_reason=answer.finish_reason,
                token_ids=self._ids(answer.tokens),
            )
            for i, answer in enumerate(answers)
        ]
        return openai.ChatCompletion(
            **self._head, choices=choices, usage=usage(request, answers), logo=mixtures(request)
        )

    def first(self, request: PreparedRequest) -> Reply:
        """See `Rendering`."""
        begin = openai.Delta(role="assistant", content="")
        choices = [openai.ChatChunkChoice(index=i, delta=begin) for i in range(request.n)]
        return openai.ChatCompletionChunk(**self._head, choices=choices, logo=mixtures(request))

    def chunk(self, chunk: AnswerChunk) -> Reply:
        """See `Rendering`."""
        choice = openai.ChatChunkChoice(
            index=chunk.index,
            delta=openai.Delta(content=chunk.text),
            finish_reason=chunk.finish_reason,
            token_ids=self._ids(chunk.tokens),
        )
        return openai.ChatCompletionChunk(**self._head, choices=[choice])

    def last(self, request: PreparedRequest, tokens: int) -> Reply:
        """See `Rendering`."""
        return openai.ChatCompletionChunk(**self._head, choices=[], usage=_usage(request, tokens))


def mixtures(request: PreparedRequest) -> Mixture | list[Mixture]:
    """The mixture of a single prompt, or a list for several."""
    found = [Mixture.of(chosen) for chosen in request.chosen]
    return found[0] if len(found) == 1 else found


def usage(request: PreparedRequest, answers: Sequence[Collected]) -> openai.Usage:
    """The token counts of a whole answer."""
    return _usage(request, sum(len(answer.tokens) for answer in answers))


def _usage(request: PreparedRequest, tokens: int) -> openai.Usage:
    return openai.Usage.of(sum(map(len, request.prompts)), tokens)
