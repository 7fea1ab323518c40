"""The bodies of requests for text, checked without knowledge of models or the pool.

They have OpenAI's fields, vLLM's `return_token_ids`, and our `logo` (`logo.api.requests`). A field that would change
the answer but is not supported is refused by name (`UNSUPPORTED`); any other unknown field is kept in `model_extra`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

from logo.api.fields import Body, Choices, Count, Flag, Number, Prompt, Seed, Stop, Text, refused
from logo.api.requests import Messages, ModelRequest, TemplateVariables

# Field -> whether its value has no effect, so that it is accepted.
UNSUPPORTED: dict[str, Callable[[Any], bool]] = {
    # OpenAI's
    "frequency_penalty": lambda v: _is(v, 0),
    "presence_penalty": lambda v: _is(v, 0),
    "logit_bias": lambda v: not v,
    "best_of": lambda v: _is(v, 1),
    "suffix": lambda v: v == "",
    "echo": lambda v: v is False,
    "response_format": lambda v: v == {"type": "text"},
    "tools": lambda v: v == [],
    "tool_choice": lambda v: v in ("none", "auto"),
    "functions": lambda v: v == [],
    "function_call": lambda v: v in ("none", "auto"),
    "modalities": lambda v: v == ["text"],
    "audio": lambda v: False,
    "logprobs": lambda v: v is False,
    "top_logprobs": lambda v: False,
    "web_search_options": lambda v: False,
    "reasoning_effort": lambda v: False,
    "verbosity": lambda v: v == "medium",
    # vLLM's
    "prompt_logprobs": lambda v: False,
    "top_k": lambda v: _is(v, 0) or _is(v, -1),
    "min_p": lambda v: _is(v, 0),
    "min_tokens": lambda v: _is(v, 0),
    "repetition_penalty": lambda v: _is(v, 1),
    "length_penalty": lambda v: _is(v, 1),
    "use_beam_search": lambda v: v is False,
    "ignore_eos": lambda v: v is False,
    "stop_token_ids": lambda v: v == [],
    "bad_words": lambda v: v == [],
    "allowed_token_ids": lambda v: False,
    "truncate_prompt_tokens": lambda v: False,
    "structured_outputs": lambda v: False,
    "guided_json": lambda v: False,
    "guided_regex": lambda v: False,
    "guided_choice": lambda v: False,
    "guided_grammar": lambda v: False,
    "skip_special_tokens": lambda v: v is True,
    "include_stop_str_in_output": lambda v: v is False,
    "return_tokens_as_token_ids": lambda v: v is False,
    "chat_template": lambda v: False,
    "add_generation_prompt": lambda v: v is True,
    "continue_final_message": lambda v: v is False,
    "documents": lambda v: v == [],
    "lora_request": lambda v: False,
}

LOGPROBS = ("logprobs", "top_logprobs", "prompt_logprobs")
"""Unsupported fields that vLLM's server knows, which the refusal names."""


def _is(value: Any, number: int) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == number


class StreamOptions(Body):
    """Field `stream_options` of a request."""

    include_usage: Flag = Field(False, description="End a stream with a chunk that has the counts of tokens.")


class _Generation(ModelRequest):
    """The fields that both endpoints share."""

    temperature: Annotated[Number, Field(ge=0, le=2)] = Field(1.0, description="0 decodes greedily.")
    top_p: Annotated[Number, Field(gt=0, le=1)] = 1.0
    n: Choices = Field(1, description="Answers per prompt.")
    seed: Seed | None = None
    stop: Stop | None = None
    stream: Flag = False
    stream_options: StreamOptions | None = Field(None, description="Without 'stream' it has no effect.")
    return_token_ids: Flag = Field(False, description="Every choice carries its 'token_ids' too.")
    user: Text | None = Field(None, description="Has no effect.")

    adds_special_tokens: ClassVar[bool]  # the only value that vLLM's 'add_special_tokens' may have

    @model_validator(mode="after")
    def _nothing_unsupported(self) -> _Generation:
        known = {**UNSUPPORTED, "add_special_tokens": self._adds_as_usual}
        for name, value in (self.model_extra or {}).items():
            if value is not None and name in known and not known[name](value):
                way = "use --engine vllm, or leave it out" if name in LOGPROBS else "leave it out"
                raise refused(f"not supported by this server; {way}", name)
        return self

    def _adds_as_usual(self, value: Any) -> bool:
        return value is self.adds_special_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts before which an answer ends."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of token counts."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(_Generation):
    """Body of `POST /v1/completions`."""

    adds_special_tokens = True

    prompt: Prompt = Field(
        description="A text, several, the token ids of one, or of several.", examples=["What is 7 plus 5?"]
    )
    max_tokens: Count | None = Field(None, description="Default: 16, or as many as the context has room for.")

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts as a list of texts or token ids."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if isinstance(prompt[0], int):
            return [prompt]
        return prompt


class ChatRequest(_Generation):
    """Body of `POST /v1/chat/completions`."""

    adds_special_tokens = False  # a template writes them itself

    messages: Messages
    chat_template_kwargs: TemplateVariables | None = None
    max_tokens: Count | None = Field(None, description="The old name of 'max_completion_tokens'.")
    max_completion_tokens: Count | None = Field(
        None, description="Default: 256, or as many as the context has room for."
    )

    @model_validator(mode="after")
    def _one_meaning(self) -> ChatRequest:
        old, new = self.max_tokens, self.max_completion_tokens
        if old is not None and new is not None and old != new:
            raise refused("expected this or 'max_completion_tokens', found both and different", "max_tokens")
        return self

    @property
    def max_new_tokens(self) -> int | None:
        """The most new tokens, under either name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
