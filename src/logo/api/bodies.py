"""The bodies of requests, checked without knowledge of models or the pool.

They have OpenAI's fields, vLLM's `return_token_ids`, and our `logo`. What is wrong is said in pydantic's words. A field
that is null counts as missing, as OpenAI's clients expect. A field that would change the answer but is not supported is
refused by name (`UNSUPPORTED`); any other unknown one is kept in `model_extra`, as in vLLM.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from logo.api.errors import bad_request, plain
from logo.core import Weighting, WhenUnsure

_T = TypeVar("_T")
Name = Annotated[str, Field(min_length=1, max_length=200)]
Count = Annotated[int, Field(ge=1, lt=2**31)]  # above any vocabulary and context
Number = Annotated[float, Field(allow_inf_nan=False)]
# A list of at least one. It is read up to its first fault: thousands of them would keep the event loop for seconds.
Listed = Annotated[list[_T], Field(min_length=1, fail_fast=True)]
TokenIds = Listed[Annotated[int, Field(strict=True)]]
# Each once: every name is looked for in the pool, and a body has room for a hundred thousand.
Distinct = Annotated[Listed[str], AfterValidator(lambda names: list(dict.fromkeys(names)))]
_Stops = Annotated[
    tuple[Annotated[str, Field(min_length=1, max_length=1000)], ...], Field(max_length=4, fail_fast=True)
]
_MOST_FIELDS = 1000  # of an object whose every field may be wrong, which pydantic reads to the end


def read_json(raw: bytes) -> Any:
    """Parses a body; ApiError: it is no JSON, or holds what only Python's parser takes: NaN, infinity, half a surrogate
    pair."""
    try:
        body = json.loads(raw)
        json.dumps(body, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise bad_request(f"the body is not JSON that can be read: {plain(str(error), 200)}") from None
    return body


class Body(BaseModel):
    """Base of all objects in requests."""

    model_config = ConfigDict(extra="allow")

    @model_validator(mode="before")
    @classmethod
    def _null_is_left_out(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        return {name: value for name, value in fields.items() if value is not None or name not in cls.model_fields}


_B = TypeVar("_B", bound=Body)


def checked(kind: type[_B], body: Any) -> _B:
    """The request that a parsed body is; ApiError: it is not valid, in pydantic's words, such as `messages[0].role:
    Field required`. Of several errors it is that of the branch of a union that came furthest."""
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_input=False)
    furthest = max(errors, key=_depth)
    steps = list(furthest["loc"])
    if "field" in furthest.get("ctx", {}) and furthest["ctx"]["field"] is not None:
        steps.append(furthest["ctx"]["field"])
    path = _path(body, steps, furthest["type"] == "missing")
    raise bad_request(f"{path or 'body'}: {furthest['msg']}", path or None)


def _depth(error: ErrorDetails) -> tuple[int, list[int]]:
    """How far pydantic came before an error: the steps to its place, and the numbers of list entries among them."""
    return len(error["loc"]), [step for step in error["loc"] if isinstance(step, int)]


def _path(body: Any, steps: Sequence[int | str], is_missing: bool) -> str:
    """The place in a body as clients write it: `messages[0].role`; empty: the body itself. Of pydantic's steps those
    that name the branch of a union are left out."""
    path = ""
    place = body
    for step in steps:
        if isinstance(step, int) and isinstance(place, list):
            path += f"[{step}]"
            place = place[step] if step < len(place) else None
        elif isinstance(place, dict) and (step in place or is_missing):
            path += f".{plain(str(step))}" if path else plain(str(step))
            place = place.get(step)
    return path


def _refused(message: str, field: str | None = None) -> PydanticCustomError:
    """A validation error about the checked object or one `field` of it."""
    return PydanticCustomError("logo", "{message}", {"message": message, "field": field})


def _few(fields: Any) -> Any:
    """Refuses an object of so many fields that saying of each what is wrong would take long."""
    if isinstance(fields, dict) and len(fields) > _MOST_FIELDS:
        raise _refused(f"expected at most {_MOST_FIELDS} fields, found {len(fields)}")
    return fields


Weights = Annotated[dict[str, Annotated[Number, Field(gt=-1e6, lt=1e6)]], BeforeValidator(_few)]


class LogoOptions(Body):
    """Field `logo` of a request: a mixture of the client's own, or other settings of the selection. Unknown fields are
    refused here: they can only be slips, and would mean another mixture than the one wanted."""

    model_config = ConfigDict(extra="forbid")

    adapters: Weights | None = None  # {}: the base model alone
    k: Count | None = None
    signal: str | None = None
    weighting: Weighting | None = None
    candidates: Distinct | None = None
    prior: Annotated[Number, Field(gt=0, lt=1)] | None = None
    when_unsure: WhenUnsure | None = None
    shadow: bool = True  # whether a server's shadow may have a line about this request

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, fields: Any) -> Any:
        return _few(fields)

    @model_validator(mode="after")
    def _one_way(self) -> LogoOptions:
        if self.adapters is not None and self.selecting:
            option = next(iter(self.selecting))
            raise _refused(f"expected either 'adapters' (this mixture) or {option!r} (select), found both")
        return self

    @property
    def selecting(self) -> dict[str, Any]:
        """The given fields that set the selection, which are all except `adapters` and `shadow`."""
        return {name: value for name, value in self if name not in ("adapters", "shadow") and value is not None}


class ModelRequest(Body):
    """What LoGo reads of any request: `model` is `logo`, an adapter's or the base model's name, or weighted adapters
    such as `a:0.7+b:0.3`."""

    model: str
    logo: LogoOptions | None = None

    @model_validator(mode="after")
    def _options_in_their_place(self) -> ModelRequest:
        """Refuses options of `logo` beside it, since a client that sends these wants them to have an effect."""
        for name, value in (self.model_extra or {}).items():
            if value is not None and name in LogoOptions.model_fields:
                raise _refused(f'expected inside the field \'logo\': write "logo": {{"{name}": ...}}', name)
        return self


class TextPart(Body):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class Message(Body):
    """One turn of a conversation; unknown fields (`tool_calls`, ...) are kept for the chat template."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Listed[TextPart] | None = None

    @property
    def turn(self) -> dict[str, Any]:
        """The message for the chat template; the parts of its content are joined by line breaks, as in vLLM."""
        content = self.content
        if isinstance(content, list):
            content = "\n".join(part.text for part in content)
        return {**(self.model_extra or {}), "role": self.role, "content": content}


class SelectRequest(ModelRequest):
    """Body of `POST /v1/logo/select`: one prompt, or one conversation, and how long its answer would be."""

    model: str = "logo"
    prompt: str | TokenIds | None = None
    messages: Listed[Message] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None

    @model_validator(mode="after")
    def _one_input(self) -> SelectRequest:
        if (self.prompt is None) == (self.messages is None):
            given = "none" if self.prompt is None else "both"
            raise _refused(f"expected either 'prompt' or 'messages', found {given}")
        return self


class ClassifyRequest(Body):
    """Body of `POST /classify`, as text classifiers of Hugging Face and vllm-project/semantic-router have it."""

    inputs: Annotated[str, Field(min_length=1)]


def asked_tokens(body: SelectRequest | CompletionRequest | ChatRequest) -> tuple[int, str] | None:
    """The most tokens of an answer that a request asks for, and the field that does; None: it leaves that open."""
    for name in ("max_completion_tokens", "max_tokens"):  # the newer name counts, if both are given
        tokens = getattr(body, name)
        if tokens is not None:
            return tokens, name
    return None


class UnloadAdapter(Body):
    """Body of `POST /v1/unload_lora_adapter`."""

    lora_name: Name


class LoadAdapter(UnloadAdapter):
    """Body of `POST /v1/load_lora_adapter`: a folder inside the server's folder for this, and whether the adapter may
    replace one of its name."""

    lora_path: Annotated[str, Field(max_length=4096, pattern=r"^[^\x00]+$")]
    load_inplace: bool = False

    @model_validator(mode="after")
    def _safe(self) -> LoadAdapter:
        parts = self.lora_name.split("/")
        if not self.lora_name.isprintable() or "\\" in self.lora_name or not all(parts) or {".", ".."} & set(parts):
            expected = "expected printable characters, '/' only between them and no '..'"
            raise _refused(f"{expected}, found others", "lora_name")
        return self


# Field -> the values that have no effect, so that they are accepted.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("frequency_penalty", "presence_penalty", "min_p", "min_tokens"), (0,)),
    **dict.fromkeys(("best_of", "repetition_penalty", "length_penalty"), (1,)),
    **dict.fromkeys(("tools", "functions", "stop_token_ids", "bad_words", "documents"), ([],)),
    **dict.fromkeys(("tool_choice", "function_call"), ("none", "auto")),
    **dict.fromkeys(("echo", "logprobs", "use_beam_search", "include_stop_str_in_output"), (False,)),
    **dict.fromkeys(("return_tokens_as_token_ids", "continue_final_message"), (False,)),
    **dict.fromkeys(("skip_special_tokens", "add_generation_prompt"), (True,)),
    **dict.fromkeys(("audio", "web_search_options", "reasoning_effort", "top_logprobs", "prompt_logprobs"), ()),
    **dict.fromkeys(("allowed_token_ids", "truncate_prompt_tokens", "structured_outputs", "lora_request"), ()),
    **dict.fromkeys(("prompt_embeds", "thinking_token_budget", "repetition_detection", "vllm_xargs"), ()),
    **dict.fromkeys(("guided_json", "guided_regex", "guided_choice", "guided_grammar", "chat_template"), ()),
    "logit_bias": ({}, []),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "top_k": (0, -1),
    "verbosity": ("medium",),
}


class StreamOptions(Body):
    """Field `stream_options` of a request: whether a stream ends with a chunk that has the counts of tokens."""

    include_usage: bool = False


class _TextRequest(ModelRequest):
    """The fields that both endpoints share."""

    temperature: Annotated[Number, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[Number, Field(gt=0, le=1)] = 1.0
    n: Annotated[int, Field(ge=1, le=16)] = 1
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    # The texts before which an answer ends.
    stop: Annotated[_Stops, BeforeValidator(lambda stop: (stop,) if isinstance(stop, str) else stop)] = ()
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    return_token_ids: bool = False
    ignore_eos: bool = False  # vLLM's: an answer has all of its tokens, so that servers can be compared
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None  # the same, by its newer name

    @model_validator(mode="after")
    def _nothing_unsupported(self) -> _TextRequest:
        for name, value in (self.model_extra or {}).items():
            harmless = (None, *UNSUPPORTED.get(name, (value,)))
            if not any(value == own and isinstance(value, bool) == isinstance(own, bool) for own in harmless):
                raise _refused("not supported by this server; use --engine vllm, or leave it out", name)
        return self


class CompletionRequest(_TextRequest):
    """Body of `POST /v1/completions`; `prompt` is a text, several, the token ids of one, or of several."""

    prompt: str | Listed[str] | TokenIds | Listed[TokenIds]
    add_special_tokens: Literal[True] = True

    @model_validator(mode="after")
    def _not_too_many(self) -> CompletionRequest:
        if len(self.prompts) > 64:
            raise _refused(f"expected at most 64 prompts, found {len(self.prompts)}", "prompt")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts as a list of texts or token ids."""
        return self.prompt if self.several else [self.prompt]  # type: ignore[return-value]

    @property
    def several(self) -> bool:
        """Whether they were given as a list of prompts, as a list of one may be."""
        return not isinstance(self.prompt, str) and not isinstance(self.prompt[0], int)


class ChatRequest(_TextRequest):
    """Body of `POST /v1/chat/completions`."""

    messages: Listed[Message]
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: Literal[False] = False  # a template writes them itself
