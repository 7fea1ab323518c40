"""The bodies of requests for text, checked without knowledge of models or the pool.

They have OpenAI's fields, vLLM's `return_token_ids`, and our `logo` (`logo.api.requests`). A field that would change
the answer but is not supported is refused by name (`UNSUPPORTED`); any other unknown field is kept in `model_extra`.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

from logo.api.fields import Body, Choices, Count, Flag, Number, Prompt, Seed, Stop, Text, refused
from logo.api.requests import Messages, ModelRequest, TemplateVariables

# Field -> the values that have no effect, so that they are accepted.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("frequency_penalty", "presence_penalty", "min_p", "min_tokens"), (0,)),
    **dict.fromkeys(("best_of", "repetition_penalty", "length_penalty"), (1,)),
    **dict.fromkeys(("tools", "functions", "stop_token_ids", "bad_words", "documents"), ([],)),
    **dict.fromkeys(("tool_choice", "function_call"), ("none", "auto")),
    **dict.fromkeys(("echo", "logprobs", "use_beam_search", "ignore_eos", "include_stop_str_in_output"), (False,)),
    **dict.fromkeys(("return_tokens_as_token_ids", "continue_final_message"), (False,)),
    **dict.fromkeys(("skip_special_tokens", "add_generation_prompt"), (True,)),
    **dict.fromkeys(("audio", "web_search_options", "reasoning_effort", "top_logprobs", "prompt_logprobs"), ()),
    **dict.fromkeys(("allowed_token_ids", "truncate_prompt_tokens", "structured_outputs", "lora_request"), ()),
    **dict.fromkeys(("guided_json", "guided_regex", "guided_choice", "guided_grammar", "chat_template"), ()),
    "logit_bias": ({}, []),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "top_k": (0, -1),
    "verbosity": ("medium",),
}

LOGPROBS = ("logprobs", "top_logprobs", "prompt_logprobs")
"""Unsupported fields that vLLM's server knows, which the refusal names."""


def _among(value: Any, values: tuple[Any, ...]) -> bool:
    """Whether it is one of these; true and false are no numbers."""
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in values)


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
        known = {**UNSUPPORTED, "add_special_tokens": (self.adds_special_tokens,)}
        for name, value in (self.model_extra or {}).items():
            if value is not None and name in known and not _among(value, known[name]):
                way = "use --engine vllm, or leave it out" if name in LOGPROBS else "leave it out"
                raise refused(f"not supported by this server; {way}", name)
        return self

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
