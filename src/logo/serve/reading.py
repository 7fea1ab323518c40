"""`PromptReader`: the prompts of requests as token ids, and how long their answers may be. What takes long, runs in a
thread beside the event loop."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Sequence
from typing import TypeVar

from logo.api import bodies
from logo.api.errors import bad_request, too_long
from logo.core import Prompt
from logo.engine import LoGo
from logo.prompts import MAX_NEW_TOKENS, chat, read

_T = TypeVar("_T")
_Answered = bodies.CompletionRequest | bodies.ChatRequest | bodies.SelectRequest
_Body = _Answered | bodies.ClassifyRequest
_LONG = 10_000  # bytes of a body that takes a few milliseconds to parse, or to render and tokenize
_COMPLETION = 16  # tokens of a completion without 'max_tokens', as in OpenAI's API


async def beside_the_loop(size: int, work: Callable[[], _T]) -> _T:
    """Runs the work on a body of so many bytes, in a thread for long ones, so that other requests are answered
    meanwhile."""
    return await asyncio.to_thread(work) if size > _LONG else work()


class PromptReader:
    """Reads the prompts of one server's requests.

    `context` is the most tokens of a prompt and its answer (None: there is no limit), which memory for keys and values
    may limit (`by_memory`).
    """

    def __init__(self, logo: LoGo, context: int | None, by_memory: bool = False) -> None:
        self._tokenizer = logo.tokenizer
        self._prompts = logo.prompts
        self._probe_text = logo.settings.probe_text
        self.context = context
        self._by_memory = by_memory
        self._vocabulary = len(logo.model.get_input_embeddings().weight)

    async def prompts(self, body: _Body, size: int) -> list[Prompt]:
        """Reads the prompts, or the conversation, of a body of so many bytes.

        ApiError or UsageError: one has no tokens, or an id that the model does not know; the model's template refuses
        the conversation, or a variable for it has the name of an argument of `apply_chat_template`.
        """
        prompts = await beside_the_loop(size, lambda: self._read(body))
        field = "messages" if _is_chat(body) else "prompt"
        if not all(prompts):
            raise bad_request(f"{field}: expected a text, found an empty one", field)
        for prompt in prompts:
            self._prompts.check_known(field, (*prompt.ids, *prompt.probed))
        return prompts

    def _read(self, body: _Body) -> list[Prompt]:
        if isinstance(body, bodies.ClassifyRequest):
            return self._read_texts([body.inputs])
        if isinstance(body, bodies.CompletionRequest):
            return self._read_texts(body.prompts)
        if body.messages is None:
            return self._read_texts([body.prompt or ""])
        variables = body.chat_template_kwargs or {}
        for name in variables.keys() & inspect.signature(self._tokenizer.apply_chat_template).parameters:
            expected = f"expected variables of the chat template, found {name!r}; leave it out"
            raise bad_request(f"chat_template_kwargs: {expected}", "chat_template_kwargs")
        turns = [message.turn for message in body.messages]
        return [chat(self._tokenizer, turns, self._probe_text, variables)]

    def _read_texts(self, prompts: Sequence[str | Sequence[int]]) -> list[Prompt]:
        for prompt in prompts:
            ends = () if isinstance(prompt, str) else (min(prompt), max(prompt))
            for token in ends:
                if not 0 <= token < self._vocabulary:
                    expected = f"expected token ids from 0 to {self._vocabulary - 1}, found {token}"
                    raise bad_request(f"prompt: {expected}", "prompt")
        return [read(self._tokenizer, prompt) for prompt in prompts]

    def most_tokens(self, body: _Answered, prompts: Sequence[Prompt]) -> int:
        """The most new tokens of the answers: what the request asks for; else the usual number, or as many as there is
        room for. ApiError: they do not fit behind the longest prompt."""
        longest = max(map(len, prompts))
        is_chat = _is_chat(body)
        usual = MAX_NEW_TOKENS if is_chat else _COMPLETION
        if self.context is not None:
            usual = min(usual, self.context - longest)
        tokens, blamed = bodies.asked_tokens(body) or (max(1, usual), "messages" if is_chat else "prompt")
        self._check_room(longest, tokens, blamed)
        return tokens

    def check_length(self, prompts: Sequence[Prompt]) -> None:
        """Raises ApiError if a text is longer than the context, of which a token of an answer is a part."""
        self._check_room(max(map(len, prompts)), 1, "inputs")

    def _check_room(self, longest: int, tokens: int, blamed: str) -> None:
        if self.context is not None and longest + tokens > self.context:
            holder = "the memory for keys and values (--kv-cache-gb)" if self._by_memory else "this model's context"
            raise too_long(self.context, longest, tokens, blamed, holder)


def _is_chat(body: _Body) -> bool:
    return isinstance(body, (bodies.ChatRequest, bodies.SelectRequest)) and body.messages is not None
