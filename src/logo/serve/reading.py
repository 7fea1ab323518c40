"""`PromptReader`: the prompts of requests as token ids, and how long their answers may be. What takes long, runs in a
thread beside the event loop."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from logo.api import bodies
from logo.api.errors import bad_request, too_long
from logo.core import Prompt
from logo.prompts import MAX_NEW_TOKENS, chat, read

if TYPE_CHECKING:
    from logo.serve.service import Service

_T = TypeVar("_T")
_LONG = 10_000  # bytes of a body that takes a few milliseconds to parse, or to render and tokenize
_COMPLETION = 16  # tokens of a completion without 'max_tokens', as in OpenAI's API


async def beside_the_loop(size: int, work: Callable[[], _T]) -> _T:
    """Runs the work on a body of so many bytes, in a thread for long ones, so that other requests are answered
    meanwhile."""
    return await asyncio.to_thread(work) if size > _LONG else work()


class PromptReader:
    """Reads the prompts of one server's requests."""

    def __init__(self, service: Service) -> None:
        self._tokenizer = service.logo.tokenizer
        self._prompts = service.logo.prompts
        self._probe_text = service.logo.settings.probe_text
        self._batching = service.batching
        self._vocabulary = len(service.logo.model.get_input_embeddings().weight)

    async def texts(self, prompts: Sequence[str | Sequence[int]], size: int) -> list[Prompt]:
        """Reads texts or token ids of a body of so many bytes; ApiError: one has no tokens, or an id that the model
        does not know."""

        def work() -> list[Prompt]:
            self._check_ids(prompts)
            return [read(self._tokenizer, prompt) for prompt in prompts]

        rows = await beside_the_loop(size, work)
        if not all(rows):
            raise bad_request("prompt: expected a text, found an empty one", "prompt")
        self._check_known("prompt", rows)
        return rows

    async def conversation(self, body: bodies.ChatRequest | bodies.SelectRequest, size: int) -> list[Prompt]:
        """Reads the conversation of a body of so many bytes; ApiError or UsageError: it has no tokens, the model's
        template refuses it, or a variable for the template has the name of an argument of `apply_chat_template`."""
        variables = body.chat_template_kwargs or {}
        for name in variables.keys() & inspect.signature(self._tokenizer.apply_chat_template).parameters:
            expected = f"expected variables of the chat template, found {name!r}; leave it out"
            raise bad_request(f"chat_template_kwargs: {expected}", "chat_template_kwargs")

        def work() -> Prompt:
            turns = [message.turn for message in body.messages or ()]
            return chat(self._tokenizer, turns, self._probe_text, variables)

        prompt = await beside_the_loop(size, work)
        if not prompt.ids:
            raise bad_request("messages: expected a text, found an empty one", "messages")
        self._check_known("messages", [prompt])
        return [prompt]

    def most_tokens(
        self, body: bodies.CompletionRequest | bodies.ChatRequest | bodies.SelectRequest, prompts: Sequence[Prompt]
    ) -> int:
        """The most new tokens of the answers: what the request asks for; else the usual number, or as many as there is
        room for. ApiError: they do not fit behind the longest prompt."""
        context = self._batching.context
        longest = max(map(len, prompts))
        is_chat = not isinstance(body, bodies.CompletionRequest) and body.messages is not None
        usual = min(MAX_NEW_TOKENS if is_chat else _COMPLETION, context - longest)
        tokens, blamed = bodies.asked_tokens(body) or (max(1, usual), "messages" if is_chat else "prompt")
        if longest + tokens > context:
            is_memory = context == self._batching.kv_tokens[1]
            holder = "the memory for keys and values (--kv-cache-gb)" if is_memory else "this model's context"
            raise too_long(context, longest, tokens, blamed, holder)
        return tokens

    def _check_ids(self, prompts: Sequence[str | Sequence[int]]) -> None:
        """Raises ApiError for ids that the model does not know."""
        for prompt in prompts:
            if isinstance(prompt, str):
                continue
            for token in (min(prompt), max(prompt)):
                if not 0 <= token < self._vocabulary:
                    expected = f"expected token ids from 0 to {self._vocabulary - 1}, found {token}"
                    raise bad_request(f"prompt: {expected}", "prompt")

    def _check_known(self, what: str, prompts: Sequence[Prompt]) -> None:
        """Raises UsageError for a token that the tokenizer has and the model has not."""
        for prompt in prompts:
            self._prompts.check_known(what, (*prompt.ids, *prompt.probed))
