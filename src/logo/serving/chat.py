"""Messages to the prompt a model expects: the tokenizer's own chat template, or a plain one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from logo.decoding import text_ids
from logo.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def chat_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Token ids of a conversation, up to where the assistant's next answer begins.

    Args:
        messages: `{"role", "content"}`, oldest first.

    Raises:
        UsageError: the template refuses these messages (roles out of turn, say).
    """
    if not tokenizer.chat_template:
        return text_ids(tokenizer, plain(messages))
    import jinja2

    try:
        found: list[int] = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=True, return_dict=False
        )
    except (jinja2.TemplateError, TypeError, KeyError) as error:
        raise UsageError(f"messages: the model's chat template refuses them: {error}") from error
    return found


def plain(messages: Sequence[Mapping[str, str]]) -> str:
    """For base models, which were never taught roles: what was said, one after the other.

    A single message is the prompt as it is, so that it selects and answers as a completion of the same text does.
    """
    return "\n".join(message["content"] for message in messages)
