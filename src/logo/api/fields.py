"""The types of request fields, which check the type of a value but not its meaning.

As in JSON Schema, whole numbers are valid fractions and 16.0 is a whole number; `true` and `"1"` are no numbers. A
field that is null counts as missing (`Body`), as OpenAI's clients expect.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Strict,
    StringConstraints,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

MAX_PROMPTS = 64
MAX_STOPS = 4  # OpenAI's
MAX_STOP_LENGTH = 1000
MAX_CHOICES = 16
MAX_TOKEN = 2**31 - 1  # the largest token id or count, above any vocabulary and context

TAGS = ("<text>", "<texts>", "<tokens>", "<token lists>", "<parts>")
"""Names of union branches; pydantic adds them to an error's path, from which `validation.path` removes them."""


def refused(message: str, field: str | None = None) -> PydanticCustomError:
    """A validation error with our own message, about the checked object or one `field` of it."""
    context = {"message": message} if field is None else {"message": message, "field": field}
    return PydanticCustomError("logo", "{message}", context)


def _encodable(text: str) -> str:
    """Refuses half a surrogate pair, which JSON can write but no tokenizer accepts."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise refused(f"expected Unicode text, found half a surrogate pair at character {error.start}") from None
    return text


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and abs(value) < 2**63 and value.is_integer() else value


Text = Annotated[str, Strict(), AfterValidator(_encodable)]
Flag = Annotated[bool, Strict()]
Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]
# The bound stands before the validator that accepts 16.0, so that pydantic writes it into the OpenAPI document.
Seed = Annotated[int, Strict(), Field(ge=-(2**63), le=2**63 - 1), BeforeValidator(_whole)]
Count = Annotated[int, Strict(), Field(ge=1, le=MAX_TOKEN), BeforeValidator(_whole)]
Choices = Annotated[int, Strict(), Field(ge=1, le=MAX_CHOICES), BeforeValidator(_whole)]
Token = Annotated[int, Strict(), Field(ge=0, le=MAX_TOKEN), BeforeValidator(_whole)]
Tokens = Annotated[list[Token], Field(min_length=1)]
StopText = Annotated[
    str, Strict(), StringConstraints(min_length=1, max_length=MAX_STOP_LENGTH), AfterValidator(_encodable)
]
Name = Annotated[str, Strict(), StringConstraints(min_length=1, max_length=200), AfterValidator(_encodable)]
Path = Annotated[str, Strict(), StringConstraints(min_length=1, max_length=4096), AfterValidator(_encodable)]


def _kind_of_prompt(value: Any) -> str | None:
    """The branch of the union that a prompt belongs to, so that errors are about this branch alone."""
    if isinstance(value, str):
        return "<text>"
    if not isinstance(value, list):
        return None
    if value and isinstance(value[0], list):
        return "<token lists>"
    return "<tokens>" if value and isinstance(value[0], (int, float)) else "<texts>"


def _kind_of_one_prompt(value: Any) -> str | None:
    kind = _kind_of_prompt(value)
    return kind if kind in ("<text>", "<tokens>") else None


def _kind_of_stop(value: Any) -> str | None:
    return "<text>" if isinstance(value, str) else "<texts>" if isinstance(value, list) else None


def branches(kind: Callable[[Any], str | None], expected: str) -> Discriminator:
    """Discriminates the branches of a union; `expected` is the message for a value that fits none."""
    return Discriminator(kind, custom_error_type="logo_kind", custom_error_message=f"Input should be {expected}")


Prompt = Annotated[
    Annotated[Text, Tag("<text>")]
    | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS), Tag("<texts>")]
    | Annotated[Tokens, Tag("<tokens>")]
    | Annotated[list[Tokens], Field(min_length=1, max_length=MAX_PROMPTS), Tag("<token lists>")],
    branches(_kind_of_prompt, "a string, a list of strings, or token ids"),
]
OnePrompt = Annotated[
    Annotated[Text, Tag("<text>")] | Annotated[Tokens, Tag("<tokens>")],
    branches(_kind_of_one_prompt, "a string or token ids"),
]
Stop = Annotated[
    Annotated[StopText, Tag("<text>")] | Annotated[list[StopText], Field(max_length=MAX_STOPS), Tag("<texts>")],
    branches(_kind_of_stop, "a string or a list of strings"),
]


def _nullable(schema: dict[str, Any]) -> None:
    """Documents in OpenAPI that null is the same as leaving a field out."""
    required = schema.get("required", ())
    for name, field in schema.get("properties", {}).items():
        if name not in required and {"type": "null"} not in field.get("anyOf", ()):
            kept = {key: field.pop(key) for key in ("title", "description", "default") if key in field}
            schema["properties"][name] = {"anyOf": [field, {"type": "null"}], **kept}


class Body(BaseModel):
    """Base of all objects in requests: null counts as missing, and unknown fields are kept, as in vLLM."""

    model_config = ConfigDict(extra="allow", json_schema_extra=_nullable)

    @model_validator(mode="before")
    @classmethod
    def _null_is_left_out(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if value is not None or name not in cls.model_fields}

    @model_validator(mode="after")
    def _unknown_fields_are_json(self) -> Body:
        for name, value in (self.model_extra or {}).items():
            if not is_json(value):
                raise refused("expected JSON, found NaN or Infinity, which JSON does not have", name)
        return self


def is_json(value: Any) -> bool:
    """Whether a value has no NaN or infinite number, which Python's parser accepts."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, float) and not math.isfinite(value):
            return False
        if isinstance(value, (dict, list)):
            waiting.extend(value.values() if isinstance(value, dict) else value)
    return True
