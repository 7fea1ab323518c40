"""Request bodies of LoGo: the field `logo`, and the bodies of LoGo's own routes.

Types of values are checked here; `logo.api.names` checks them against the pool.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import ConfigDict, Field, Tag, ValidationError, model_validator

from logo.api.errors import bad_request
from logo.api.fields import Body, Count, Flag, Name, Number, OnePrompt, Path, Text, branches, refused
from logo.api.validation import validation_message
from logo.core import Weighting

Role = Literal["system", "developer", "user", "assistant", "tool"]

_B = TypeVar("_B", bound=Body)


def checked(kind: type[_B], body: Any) -> _B:
    """Parses a request's JSON.

    Raises:
        ApiError: it is not valid.
    """
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise bad_request(*validation_message(error.errors())) from None


class LogoOptions(Body):
    """Field `logo` of a request: a mixture of the client's own, or other settings of the selection.

    Unknown fields are refused here: they can only be slips, and would mean another mixture than the one wanted.
    """

    model_config = ConfigDict(extra="forbid")

    adapters: dict[Text, Annotated[Number, Field(gt=-1e6, lt=1e6)]] | None = Field(
        None, description="Adapter -> weight: exactly this mixture. An empty object: the base model alone."
    )
    k: Count | None = Field(None, description="How many adapters are mixed.")
    signal: Text | None = Field(None, description="The signal that scores adapters.")
    weighting: Weighting | None = Field(None, description="How scores become weights.")
    candidates: Annotated[list[Text], Field(min_length=1)] | None = Field(
        None, description="Choose among these adapters only."
    )

    @model_validator(mode="after")
    def _one_way(self) -> LogoOptions:
        if self.adapters is not None and self.selecting:
            raise refused(f"expected either 'adapters' (this mixture) or {self.selecting[0]!r} (select), found both")
        return self

    @property
    def selecting(self) -> list[str]:
        """The names of the given fields that set the selection, which are all except `adapters`."""
        return [name for name, value in self if name != "adapters" and value is not None]


class _WithOptions(Body):
    """A body with the field `logo`."""

    logo: LogoOptions | None = None

    @model_validator(mode="after")
    def _options_in_their_place(self) -> _WithOptions:
        """Refuses options of `logo` beside it. Other unknown fields are accepted, since clients of other servers send
        them, but a client that sends these wants them to have an effect."""
        for name, value in (self.model_extra or {}).items():
            if value is not None and name in LogoOptions.model_fields:
                raise refused(f'expected inside the field \'logo\': write "logo": {{"{name}": ...}}', name)
        return self


class ModelRequest(_WithOptions):
    """What LoGo reads of any request for text."""

    model: Text = Field(
        description="'logo' selects adapters by itself; an adapter's name; or the base model's.", examples=["logo"]
    )


class TextPart(Body):
    """A piece of a message."""

    type: Literal["text"]
    text: Text


def _kind_of_content(value: Any) -> str | None:
    return "<text>" if isinstance(value, str) else "<parts>" if isinstance(value, list) else None


Content = Annotated[
    Annotated[Text, Tag("<text>")] | Annotated[list[TextPart], Field(min_length=1), Tag("<parts>")],
    branches(_kind_of_content, "a string or a list of text parts"),
]


class Message(Body):
    """One turn of a conversation; unknown fields (`tool_calls`, ...) are kept for the chat template."""

    role: Role
    content: Content | None = Field(None, description="Only an assistant's may be null.")
    name: Text | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise refused(f"expected a value in a message of role {self.role!r}, found none", "content")
        return self

    @property
    def further(self) -> dict[str, Any]:
        """The fields besides role and content that the request gives, for the chat template."""
        return {**(self.model_extra or {}), **({} if self.name is None else {"name": self.name})}

    @property
    def text(self) -> str:
        """The content as one text; its parts follow each other as they are."""
        if self.content is None:
            return ""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


Messages = Annotated[list[Message], Field(min_length=1)]
TemplateVariables = Annotated[dict[str, Any], Field(description="Variables of the chat template.")]


class SelectRequest(_WithOptions):
    """Body of `POST /v1/logo/select`: one prompt, or one conversation."""

    model: Text = Field("logo", description="As in requests for text.")
    prompt: OnePrompt | None = None
    messages: Messages | None = None
    chat_template_kwargs: TemplateVariables | None = None

    @model_validator(mode="after")
    def _one_input(self) -> SelectRequest:
        if (self.prompt is None) == (self.messages is None):
            found = "none" if self.prompt is None else "both"
            raise refused(f"expected either 'prompt' or 'messages', found {found}")
        return self


class UnloadAdapter(Body):
    """Body of `POST /v1/unload_lora_adapter`."""

    lora_name: Name


class LoadAdapter(UnloadAdapter):
    """Body of `POST /v1/load_lora_adapter`."""

    lora_path: Path = Field(description="Inside the server's folder for this.")
    load_inplace: Flag = Field(False, description="Replace an adapter of this name.")

    @model_validator(mode="after")
    def _safe(self) -> LoadAdapter:
        parts = self.lora_name.split("/")
        if not self.lora_name.isprintable() or "\\" in self.lora_name or not all(parts) or {".", ".."} & set(parts):
            raise refused("expected printable characters, '/' only between them and no '..', found others", "lora_name")
        if "\0" in self.lora_path:
            raise refused("expected a path, found one with a zero byte", "lora_path")
        return self
