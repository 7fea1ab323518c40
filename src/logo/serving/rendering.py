"""`Rendering`: makes OpenAI's objects of answers, whole or in chunks, for both endpoints."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from logo.api.replies import Mixture, Reply
from logo.endings import FinishReason
from logo.protocol import TokenLogprob
from logo.serving import openai
from logo.serving.answers import AnswerChunk, PreparedRequest
from logo.serving.spelling import Offsets, Spelling


@dataclass
class Collected:
    """One answer so far."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason = "length"

    def add(self, chunk: AnswerChunk) -> None:
        """Appends a chunk."""
        self.text += chunk.text
        self.tokens += chunk.tokens
        self.logprobs += chunk.logprobs
        self.finish_reason = chunk.finish_reason or self.finish_reason


@dataclass(frozen=True)
class Options:
    """What a request wants in its answer.

    Attributes:
        model: the name that it used.
        token_ids: whether choices have token ids.
        logprobs: whether choices have log probabilities.
        usage: whether a stream ends with token counts.
    """

    model: str
    token_ids: bool
    logprobs: bool
    usage: bool


class Rendering(ABC):
    """Makes the objects of one request's answers; subclasses are for the endpoints.

    Args:
        options: what the request wants.
        spelling: of tokens.
        prefix: of the answer's id.
    """

    def __init__(self, options: Options, spelling: Spelling, prefix: Literal["cmpl", "chatcmpl"]) -> None:
        self.options = options
        self._spelling = spelling
        self._head: dict[str, Any] = {"id": openai.new_id(prefix), "created": openai.now(), "model": options.model}

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

    def __init__(self, options: Options, spelling: Spelling) -> None:
        super().__init__(options, spelling, "cmpl")
        self._offsets: dict[int, Offsets] = {}  # of each answer

    def whole(self, answers: Sequence[Collected], request: PreparedRequest) -> Reply:
        """See `Rendering`."""
        choices = [self._choice(i, a.text, a.tokens, a.logprobs, a.finish_reason) for i, a in enumerate(answers)]
        return openai.Completion(**self._head, choices=choices, usage=usage(request, answers), logo=mixtures(request))

    def first(self, request: PreparedRequest) -> Reply:
        """See `Rendering`."""
        choices = [openai.CompletionChoice(index=i, text="") for i in range(len(request.prompts) * request.n)]
        return openai.CompletionChunk(**self._head, choices=choices, logo=mixtures(request))

    def chunk(self, chunk: AnswerChunk) -> Reply:
        """See `Rendering`."""
        choice = self._choice(chunk.index, chunk.text, chunk.tokens, chunk.logprobs, chunk.finish_reason)
        return openai.CompletionChunk(**self._head, choices=[choice])

    def last(self, request: PreparedRequest, tokens: int) -> Reply:
        """See `Rendering`."""
        return openai.CompletionChunk(**self._head, choices=[], usage=_usage(request, tokens))

    def _choice(
        self,
        index: int,
        text: str,
        tokens: Sequence[int],
        logprobs: Sequence[TokenLogprob],
        reason: FinishReason | None,
    ) -> openai.CompletionChoice:
        return openai.CompletionChoice(
            index=index,
            text=text,
            finish_reason=reason,
            token_ids=self._ids(tokens),
            logprobs=self._logprobs(index, logprobs) if self.options.logprobs else None,
        )

    def _logprobs(self, index: int, logprobs: Sequence[TokenLogprob]) -> openai.CompletionLogprobs:
        offsets = self._offsets.setdefault(index, Offsets(self._spelling))
        return openai.CompletionLogprobs(
            tokens=[self._spelling.name(entry.token) for entry in logprobs],
            token_logprobs=[entry.logprob for entry in logprobs],
            top_logprobs=[self._top(entry) for entry in logprobs],
            text_offset=[offsets.next(entry.token) for entry in logprobs],
        )

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        """The most likely tokens by their names; of two with one name, the likelier."""
        found: dict[str, float] = {}
        for token, logprob in entry.top:
            found.setdefault(self._spelling.name(token), logprob)
        return found


class ChatRendering(Rendering):
    """`/v1/chat/completions`."""

    def __init__(self, options: Options, spelling: Spelling) -> None:
        super().__init__(options, spelling, "chatcmpl")

    def whole(self, answers: Sequence[Collected], request: PreparedRequest) -> Reply:
        """See `Rendering`."""
        choices = [
            openai.ChatChoice(
                index=i,
                message=openai.ReplyMessage(content=answer.text),
                finish_reason=answer.finish_reason,
                token_ids=self._ids(answer.tokens),
                logprobs=self._logprobs(answer.logprobs),
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
            logprobs=self._logprobs(chunk.logprobs),
        )
        return openai.ChatCompletionChunk(**self._head, choices=[choice])

    def last(self, request: PreparedRequest, tokens: int) -> Reply:
        """See `Rendering`."""
        return openai.ChatCompletionChunk(**self._head, choices=[], usage=_usage(request, tokens))

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> openai.ChatLogprobs | None:
        if not self.options.logprobs:
            return None
        return openai.ChatLogprobs(
            content=[
                openai.TokenLogprob(
                    **self._token(entry.token, entry.logprob),
                    top_logprobs=[openai.TopLogprob(**self._token(*other)) for other in entry.top],
                )
                for entry in logprobs
            ]
        )

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        spelling = self._spelling
        return {"token": spelling.name(token), "logprob": logprob, "bytes": list(spelling.encoded(token))}


def mixtures(request: PreparedRequest) -> Mixture | list[Mixture]:
    """The mixture of a single prompt, or a list for several."""
    found = [Mixture.of(chosen) for chosen in request.chosen]
    return found[0] if len(found) == 1 else found


def usage(request: PreparedRequest, answers: Sequence[Collected]) -> openai.Usage:
    """The token counts of a whole answer."""
    return _usage(request, sum(len(answer.tokens) for answer in answers))


def _usage(request: PreparedRequest, tokens: int) -> openai.Usage:
    return openai.Usage.of(sum(map(len, request.prompts)), tokens)
