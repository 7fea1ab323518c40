"""What vLLM's server reads of a request: its prompts, as vLLM will read them, and the part of each that is probed.

Nothing here tokenizes on the event loop, where it would hold up every other request: vLLM renders in threads of its
own, and texts that only the probe reads are tokenized in another one. What is too long for the model is refused before.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.openai.responses.utils import construct_input_messages
from vllm.entrypoints.serve.engine.protocol import ErrorResponse

from logo.api.errors import ApiError, not_found
from logo.core import ProbeText, Prompt
from logo.errors import UsageError
from logo.prompts import PLAIN_CHAT, asked_text, begun, read

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Probing:
    """How much of a conversation is probed."""

    text: ProbeText | None  # see `SelectionSettings.probe_text`
    whole: bool  # whether the whole conversation decides, too, which adapters can act


@dataclass(frozen=True)
class History:
    """What a request of `/v1/responses` goes on from: the messages of before, and what the model has said to them."""

    messages: Sequence[Any] = ()
    outputs: Sequence[Any] = ()


async def text_prompt(state: Any, text: str, params: Any = None) -> Prompt:
    """A text as the library reads it; `state`: of vLLM's app, `params`: vLLM's of the request, by which it refuses what
    is too long."""
    renderer = state.engine_client.renderer
    params = params or renderer.default_cmpl_tok_params
    params.apply_pre_tokenization(renderer.tokenizer, {"prompt": text})
    return await asyncio.to_thread(read, renderer.tokenizer, text)


async def completion_prompts(state: Any, request: CompletionRequest) -> list[Prompt]:
    """Each prompt of a completion as vLLM will read it: cut, and with a suffix."""
    rendered = await state.online_renderer.render_completion(copy.copy(request))
    return [Prompt.of_ids(prompt["prompt_token_ids"]) for prompt in _checked(rendered)]


async def begin_once(state: Any, request: CompletionRequest) -> None:
    """Replaces texts that begin with the tokenizer's first special token by their ids, so that vLLM does not add a
    second one; as in the library."""
    tokenizer = state.engine_client.renderer.tokenizer
    prompts = request.prompt if isinstance(request.prompt, list) else [request.prompt]
    if not request.add_special_tokens or not any(begun(tokenizer, prompt) for prompt in prompts):
        return
    params = request.build_tok_params(state.engine_client.model_config)
    ids = [list((await text_prompt(state, text, params)).ids) for text in prompts]
    request.prompt = ids if isinstance(request.prompt, list) else ids[0]


@dataclass(frozen=True)
class Conversation:
    """A conversation that vLLM answers.

    Attributes:
        state: of vLLM's app.
        request: as vLLM has parsed it.
        messages: the conversation as vLLM puts it together.
        whole: reads all of it, as vLLM will.
    """

    state: Any
    request: Any
    messages: Messages
    whole: Callable[[], Awaitable[Prompt]]

    @classmethod
    def of_chat(cls, state: Any, request: ChatCompletionRequest) -> Conversation:
        """The conversation of a chat."""

        async def whole() -> Prompt:
            _, [prompt] = _checked(await state.online_renderer.render_chat(copy.copy(request)))
            return Prompt.of_ids(prompt["prompt_token_ids"])

        return cls(state, request, [dict(message) for message in request.messages], whole)

    @classmethod
    def of_response(cls, state: Any, request: ResponsesRequest, history: History) -> Conversation:
        """The conversation of a request of `/v1/responses`."""
        messages = construct_input_messages(
            request_instructions=request.instructions,
            request_input=request.input,
            # Those of gpt-oss are of another kind, which only vLLM reads.
            prev_msg=[message for message in history.messages if isinstance(message, Mapping)],
            prev_response_output=history.outputs,
        )

        async def whole() -> Prompt:
            rendered = await state.online_renderer.render_responses(
                copy.copy(request),
                previous_messages=history.messages or None,
                previous_response_outputs=history.outputs or None,
                tool_server=state.openai_serving_responses.tool_server,
            )
            return Prompt.of_ids(_checked(rendered).engine_input["prompt_token_ids"])

        return cls(state, request, [_joined(dict(message)) for message in messages], whole)

    def write_special_tokens(self) -> None:
        """Has vLLM add special tokens where our own template writes the conversation, which writes none: some
        tokenizers read a text that stands behind one otherwise."""
        first = self.messages[0].get("content") if self.messages else None
        tokenizer = self.state.engine_client.renderer.tokenizer
        self.request.add_special_tokens |= self.state.args.chat_template == PLAIN_CHAT and not begun(tokenizer, first)

    async def prompt(self, probing: Probing) -> Prompt:
        """The prompt of the conversation, of which less than all may be probed."""
        try:
            text = asked_text(self.messages, probing.text)
        except UsageError:  # such as pictures, or parts that we do not know: vLLM reads or refuses these
            text = None
        if text is None:
            return await self.whole()
        params = self.request.build_tok_params(self.state.engine_client.model_config)
        prompt = await text_prompt(self.state, text, params)
        return Prompt((await self.whole()).ids, prompt.ids) if probing.whole else prompt


async def history_of(handler: Any, request: ResponsesRequest) -> History:
    """What vLLM's serving object of `/v1/responses` has stored of the response that a request goes on from; ApiError:
    nothing."""
    name = request.previous_response_id
    if name is None or handler is None:  # a model may have none
        return History()
    async with handler.response_store_lock:
        response = handler.response_store.get(name)
    if response is None:
        advice = "start the server with VLLM_ENABLE_RESPONSES_API_STORE=1, which stores responses"
        raise not_found(f"previous_response_id: there is no response {name!r}; {advice}", "previous_response_id")
    return History(list(handler.msg_store.get(response.id, ())), list(response.output))


def _joined(message: dict[str, Any]) -> dict[str, Any]:
    """A message of which the parts that are texts are joined, as in chats, and all others are left out."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    texts = [part["text"] for part in content if isinstance(part, Mapping) and isinstance(part.get("text"), str)]
    return {**message, "content": "\n".join(texts)}


def _checked(rendered: Any) -> Any:
    """What vLLM has rendered; ApiError: it has refused to."""
    if isinstance(rendered, ErrorResponse):
        raise ApiError(rendered.error.code, rendered.error.message, "invalid_request_error", rendered.error.param)
    return rendered
