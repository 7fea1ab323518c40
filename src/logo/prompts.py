"""`Prompt`: from a string, a conversation or token ids to the tokens that are read and those that are probed.

Python, the command line and the server all read prompts here.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from logo.errors import UsageError, closest

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    # A BatchEncoding is a mapping, and messages are a sequence of mappings.
    OnePrompt = str | Sequence[Mapping[str, Any]] | Sequence[int] | Tensor | Mapping[str, Any]

ProbeText = Literal["all", "last_user", "conversation"]
Conversation = Sequence[Mapping[str, Any]]

_SOME_ANSWER = "An answer."
ROLES = ("system", "developer", "user", "assistant", "tool")
_EXPECTED = "a string, a list of messages, token ids or a BatchEncoding"


@dataclass(frozen=True)
class Prompt:
    """The tokens that the model reads, and those that are probed.

    Attributes:
        ids: token ids, special tokens included.
        probe: the token ids that are probed, special tokens included. None: `ids`.
        text: the text of the tokens; None if token ids were given.
    """

    ids: tuple[int, ...]
    probe: tuple[int, ...] | None = None
    text: str | None = None

    @classmethod
    def of(cls, row: Prompt | Sequence[int]) -> Prompt:
        """A prompt as it is, or one of token ids."""
        return row if isinstance(row, Prompt) else cls(tuple(row))

    @property
    def probed(self) -> tuple[int, ...]:
        """The token ids that are probed."""
        return self.ids if self.probe is None else self.probe

    def __len__(self) -> int:
        return len(self.ids)


def several(prompts: Any) -> tuple[list[Any], bool]:
    """A list of prompts, and whether a single prompt was given instead of a list.

    Raises:
        UsageError: it is neither a prompt nor a list of prompts, or an empty list.
    """
    if isinstance(prompts, (str, Prompt)):
        return [prompts], True
    if isinstance(prompts, Mapping):
        return _rows(prompts)
    listed = _listed(prompts)
    if not isinstance(listed, Sequence) or isinstance(listed, (bytes, bytearray)):
        raise UsageError(f"prompt: expected {_EXPECTED}, or a list of these, found {type(prompts).__name__}")
    if not listed:
        raise UsageError("prompt: expected one prompt or more, found an empty list")
    single = _is_number(listed[0]) or _is_message(listed[0])
    return ([listed], True) if single else (list(listed), False)


def read(
    tokenizer: PreTrainedTokenizerBase, prompt: Any, probe_text: ProbeText | None = None, vocabulary: int | None = None
) -> Prompt:
    """Reads one prompt of any kind.

    Args:
        prompt: a string, which gets the tokenizer's special tokens; messages, see `chat`; or token ids as they are.
        probe_text: what of a conversation is probed; see `chat`. Strings and token ids are probed whole.
        vocabulary: the number of tokens that the model knows; None: token ids are not checked.

    Raises:
        UsageError: it is none of these, or cannot be used.
    """
    if isinstance(prompt, Prompt):
        return prompt
    if isinstance(prompt, str):
        return Prompt(tuple(text_ids(tokenizer, prompt)), text=prompt)
    if isinstance(prompt, Mapping):
        rows, _ = _rows(prompt)
        if len(rows) != 1:
            raise UsageError(f"expected a BatchEncoding of one prompt, found one of {len(rows)}; give them one by one")
        [prompt] = rows
    listed = _listed(prompt)
    if not isinstance(listed, Sequence) or isinstance(listed, (bytes, bytearray)):
        raise UsageError(f"expected {_EXPECTED}, found {type(prompt).__name__}")
    if listed and _is_message(listed[0]):
        return chat(tokenizer, listed, probe_text)
    if listed and isinstance(listed[0], str):
        raise UsageError("expected one prompt, found a list of texts; give them one by one")
    ids = tuple(_token(value, vocabulary) for value in listed)
    return Prompt(ids)


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text with the tokenizer's special tokens, but never with a second beginning-of-sequence token.

    A text that begins with that token already, such as that of a chat template, is not changed.
    """
    ids: list[int] = tokenizer(text)["input_ids"]
    bos = tokenizer.bos_token
    if bos and text.startswith(bos) and ids[:2] == [tokenizer.bos_token_id] * 2:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def cut_left(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], limit: int) -> Sequence[int]:
    """The last `limit` tokens; a token that stands in front of every text stays there."""
    if len(ids) <= limit:
        return ids
    kept = 1 if limit > 1 and _begins_texts(tokenizer, ids) else 0
    return [*ids[:kept], *ids[len(ids) - (limit - kept) :]]


def _begins_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> bool:
    """Whether the first token stands in front of every text, and not in front of every turn of a conversation."""
    if ids[0] in tokenizer("")["input_ids"][:1]:
        return True
    return bool(ids[0] == tokenizer.bos_token_id) and ids[0] not in ids[1:]


# -- conversations -----------------------------------------------------------------------------------------------------


def chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Conversation,
    probe_text: ProbeText | None = None,
    variables: Mapping[str, Any] | None = None,
) -> Prompt:
    """Reads a conversation up to where the assistant's next answer begins, by the tokenizer's chat template.

    Base models have no template. For them the contents are joined, one per line, so that a single message is the same
    prompt as its text.

    The probed text is read as a prompt of its own. Within the conversation its tokens would attend to a system prompt,
    the template and earlier answers, and would select other adapters; see docs/chats.md.

    Args:
        messages: `{"role", "content"}`, oldest first; further fields are the template's. A content is a text or a list
            of text parts, or None in an assistant's turn.
        probe_text: what is probed: `"last_user"`, the last message of the user (the default); `"conversation"`, all
            messages of the user; `"all"`, everything. Without a message of the user, everything is probed.
        variables: of the template, besides the messages.

    Raises:
        UsageError: a message without content or with an unknown role, or the template refuses the conversation.
    """
    turns = checked_turns(messages)
    text = _rendered(tokenizer, turns, variables=variables) if tokenizer.chat_template else plain(turns)
    # A template adds the special tokens itself.
    ids = (
        tokenizer(text, add_special_tokens=False)["input_ids"] if tokenizer.chat_template else text_ids(tokenizer, text)
    )
    asked = _asked(turns, probe_text)
    probe = None if asked is None else tuple(text_ids(tokenizer, asked))
    return Prompt(tuple(ids), None if probe == tuple(ids) else probe, text)


def conversation_text(tokenizer: PreTrainedTokenizerBase, messages: Conversation) -> str:
    """A whole conversation, the last answer included, as the tokenizer's chat template writes it.

    Raises:
        UsageError: as `chat`.
    """
    return _rendered(tokenizer, checked_turns(messages), answer=False)


def written_answer(tokenizer: PreTrainedTokenizerBase, messages: Conversation, prompt: str, answer: str) -> str | None:
    """What the chat template writes behind a prompt if the assistant gives this answer, end marks included.

    Args:
        prompt: the text of `chat` for the messages.

    Returns:
        None if there is no template, or if it writes the prompt differently once there is an answer.

    Raises:
        UsageError: as `chat`.
    """
    if not tokenizer.chat_template:
        return None
    whole = conversation_text(tokenizer, [*messages, {"role": "assistant", "content": answer}])
    return whole[len(prompt) :] if whole.startswith(prompt) else None


def answer_lead(tokenizer: PreTrainedTokenizerBase, messages: Conversation, prompt: str) -> str | None:
    """The text that the chat template writes between a prompt and the assistant's answer, often none or a space.

    Args:
        prompt: the text of `chat` for the messages.

    Returns:
        None if there is no template, if it accepts no answer here, or if it changes the prompt or the answer.
    """
    try:
        written = written_answer(tokenizer, messages, prompt, _SOME_ANSWER)
    except UsageError:  # such as one that expects the user to have spoken last
        return None
    return written.partition(_SOME_ANSWER)[0] if written is not None and _SOME_ANSWER in written else None


def is_conversation(prompt: Any) -> bool:
    """Whether a prompt is a list of messages."""
    return isinstance(prompt, (list, tuple)) and bool(prompt) and _is_message(prompt[0])


def asked_text(messages: Conversation, probe_text: ProbeText | None = None) -> str | None:
    """The text of a conversation that is probed (see `chat`); None if everything is.

    Raises:
        UsageError: a message without content or with an unknown role.
    """
    return _asked(checked_turns(messages), probe_text)


def _asked(turns: Conversation, probe_text: ProbeText | None) -> str | None:
    said = [turn["content"] for turn in turns if turn["role"] == "user" and turn["content"].strip()]
    if check_probe_text(probe_text) != "conversation":
        said = said[-1:]
    return None if probe_text == "all" or not said else "\n".join(said)


def plain(messages: Sequence[Mapping[str, Any]]) -> str:
    """The contents of messages, one per line, for base models without a template."""
    return "\n".join(message["content"] or "" for message in messages)


def check_probe_text(probe_text: ProbeText | None) -> ProbeText | None:
    """Raises UsageError unless it is one of the choices or None."""
    if probe_text is not None and probe_text not in get_args(ProbeText):
        raise UsageError(f"probe_text: expected one of {', '.join(get_args(ProbeText))}, found {probe_text!r}")
    return probe_text


def text_of(prompt: str | Conversation) -> str:
    """The prompt as a text, for methods that compare texts: of a conversation, the contents of its messages."""
    return prompt if isinstance(prompt, str) else plain(checked_turns(prompt))


def checked_turns(messages: Conversation) -> list[dict[str, Any]]:
    """Messages, each with its content as one text.

    Raises:
        UsageError: a message without content or with an unknown role.
    """
    return [_turn(number, message) for number, message in enumerate(messages)]


def _turn(number: int, message: Any) -> dict[str, Any]:
    """A message with its content as one text, as templates expect it."""
    where = f"messages[{number}]"
    if not isinstance(message, Mapping):
        raise UsageError(f"{where}: expected {{'role', 'content'}}, found {type(message).__name__}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        hint = closest(role, ROLES) if isinstance(role, str) else ""
        raise UsageError(f"{where}: expected one of the roles {', '.join(ROLES)}, found {role!r}{hint}")
    if isinstance(content, Sequence) and not isinstance(content, str):
        parts = [part["text"] for part in content if isinstance(part, Mapping) and isinstance(part.get("text"), str)]
        content = "".join(parts) if parts and len(parts) == len(content) else content
    if not isinstance(content, str) and (content is not None or role != "assistant"):
        found = "none" if content is None else f"{content!r:.60}"
        raise UsageError(f"{where}: expected a 'content' that is a text or a list of text parts, found {found}")
    return {**message, "content": content}


def _rendered(
    tokenizer: PreTrainedTokenizerBase,
    turns: Conversation,
    answer: bool = True,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The text of a conversation; with `answer`, up to where the assistant's next turn begins."""
    try:
        text = str(
            tokenizer.apply_chat_template(
                list(turns), add_generation_prompt=answer, tokenize=False, **(variables or {})
            )
        )
        text.encode("utf-8")  # half a surrogate pair can come from any field, and no tokenizer accepts it
        return text
    except Exception as error:  # a template is a program and may raise anything
        reason = " ".join(str(error).split())
        raise UsageError(f"messages: the model's chat template refuses them: {reason}") from error


# -- tokens ------------------------------------------------------------------------------------------------------------


def _rows(encoding: Mapping[str, Any]) -> tuple[list[Any], bool]:
    """The prompts of a BatchEncoding without padding, and whether it holds a single text."""
    if "input_ids" not in encoding:
        hint = "; put a message into a list" if "role" in encoding else ""
        found = ", ".join(map(str, encoding))
        raise UsageError(f"prompt: expected 'input_ids' in a BatchEncoding, found {found}{hint}")
    ids, mask = _listed(encoding["input_ids"]), _listed(encoding.get("attention_mask"))
    if not ids:
        raise UsageError("prompt: expected one prompt or more, found an empty BatchEncoding")
    if _is_number(ids[0]):
        return [_kept(ids, mask)], True
    masks = [None] * len(ids) if mask is None else mask
    return [_kept(_listed(row), _listed(kept)) for row, kept in zip(ids, masks, strict=True)], False


def _kept(ids: Sequence[Any], mask: Sequence[int] | None) -> list[Any]:
    return list(ids) if mask is None else [i for i, kept in zip(ids, mask, strict=True) if kept]


def _listed(value: Any) -> Any:
    """Turns tensors and arrays into lists; anything else stays as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def _token(value: Any, vocabulary: int | None) -> int:
    if not _is_number(value):
        raise UsageError(f"expected token ids, found {value!r:.60} among them")
    token = int(value)
    if token < 0 or (vocabulary is not None and token >= vocabulary):
        known = "0 or more" if vocabulary is None else f"from 0 to {vocabulary - 1}, which the model knows"
        raise UsageError(f"expected token ids {known}, found {token}")
    return token


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and "input_ids" not in value
