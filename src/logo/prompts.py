"""From a string, a conversation or token ids to the tokens that are read and those that are probed.

Python, the command line, the servers and training all read prompts here.
"""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal

from logo.core import ProbeText, Prompt
from logo.errors import PromptCut, UsageError, check_choice, check_type, closest

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    OnePrompt = str | Sequence[Mapping[str, Any]] | Sequence[int] | Tensor | Prompt

Conversation = Sequence[Mapping[str, Any]]

MAX_NEW_TOKENS = 256
ROLES = ("system", "developer", "user", "assistant", "tool")
# How far a calibration's texts are apart that make up one conversation; neighbours in the list are alike.
_BEFORE, _ANSWER = 7, 13
# What `plain` does, as a chat template. The line break is an expression: templates lose one that is behind a block.
PLAIN_CHAT = '{% for m in messages %}{{ m.content or "" }}{% if not loop.last %}{{ "\\n" }}{% endif %}{% endfor %}'
_SOME_ANSWER = "An answer."
# The date that chat templates write into texts of a calibration, which would be another calibration on every day. The
# name is that of the function by which transformers' templates ask for it.
_DATED = {"strftime_now": datetime(2024, 7, 26).strftime}
_TEXTS = ("text", "input_text", "output_text")  # types of parts that are texts
_PADDED = "expected token ids without padding, found the padding {}; leave it out"
_EXPECTED = "a string, a list of messages or token ids"
# Not a filter of `warnings`: where filters change, Python tells every other warning again.
_warns_of_cuts: ContextVar[bool] = ContextVar("warns_of_cuts", default=True)


@contextmanager
def no_warnings_of_cuts() -> Iterator[None]:
    """Within the block, prompts are cut without a warning, which names them by their place in a call; for callers that
    tell of `Prompt.cut` themselves."""
    before = _warns_of_cuts.set(False)
    try:
        yield
    finally:
        _warns_of_cuts.reset(before)


@dataclass(frozen=True)
class Truncation:
    """How long prompts are cut.

    Attributes:
        limit: the most tokens of a prompt; None: as many as the model's context leaves.
        side: `"left"` keeps the end of the prompt, `"right"` its beginning (the official code, at 2048).

    Raises:
        UsageError: no tokens would be left, or another side.
    """

    limit: int | None = None
    side: Literal["left", "right"] = "left"

    def __post_init__(self) -> None:
        if self.limit is not None:
            check_type("truncation", self.limit, numbers.Integral, "a whole number")
            if self.limit < 1:
                raise UsageError(f"truncation: expected at least 1 token to be kept, found {self.limit}")
        if self.side not in ("left", "right"):
            raise UsageError(f"truncation: expected the side 'left' or 'right', found {self.side!r}")


@dataclass(frozen=True)
class Prompts:
    """Reads prompts for one base model, the same way for probing and for answering.

    Attributes:
        tokenizer: the base model's.
        context: the model's context length in tokens; None if unknown.
        truncation: how long prompts are cut.
        probe_text: what of a conversation is probed; see `chat`.
        vocabulary: the number of tokens that the model knows; None if unknown.
    """

    tokenizer: PreTrainedTokenizerBase
    context: int | None
    truncation: Truncation = Truncation()
    probe_text: ProbeText | None = None
    vocabulary: int | None = None

    def read(self, prompts: Sequence[Any], room: int | None = 0) -> list[Prompt]:
        """Reads prompts into token ids and those that are probed; long prompts are cut with a warning.

        Args:
            prompts: strings, conversations or token ids; see `read`.
            room: tokens of the context to keep free for the answer; None: nothing is cut.

        Raises:
            UsageError: a prompt cannot be used or has no tokens, or the answer alone would fill the context.
        """
        limits = [] if self.truncation.limit is None else [self.truncation.limit]
        if room is not None and self.context is not None:
            if room >= self.context:
                raise UsageError(
                    f"max_new_tokens is {room}, but the model's context holds {self.context} tokens in all; "
                    "ask for fewer new tokens"
                )
            limits.append(self.context - room)
        limit = None if room is None else min(limits, default=None)
        return [self._read(i, prompt, limit) for i, prompt in enumerate(prompts, start=1)]

    def _read(self, number: int, source: Any, limit: int | None) -> Prompt:
        try:
            prompt = read(self.tokenizer, source, self.probe_text, self.vocabulary)
        except UsageError as error:
            raise UsageError(f"prompt {number}: {error}") from error
        if not prompt.ids:
            raise UsageError(f"prompt {number} is empty, and this tokenizer adds no token: expected some text")
        self.check_known(f"prompt {number}", (*prompt.ids, *prompt.probed))
        if limit is None or len(prompt.ids) <= limit:
            return prompt
        right = self.truncation.side == "right"
        if _warns_of_cuts.get():
            warnings.warn(
                f"prompt {number} has {len(prompt.ids)} tokens, more than the {limit} that fit: "
                f"its {'end' if right else 'beginning'} is cut",
                PromptCut,
                stacklevel=4,
            )
        cut = prompt.cut + len(prompt.ids) - limit
        if right:
            return Prompt(prompt.ids[:limit], prompt.probed[:limit], cut=cut)
        ids = cut_left(self.tokenizer, prompt.ids, limit)
        probed = cut_left(self.tokenizer, prompt.probed, limit)
        return Prompt(tuple(ids), tuple(probed), cut=cut)

    def check_known(self, what: str, ids: Sequence[int]) -> None:
        """Raises UsageError if tokens of a text, which is named by `what`, are beyond those that the model knows."""
        if self.vocabulary is None:
            return
        highest = max(ids, default=0)
        if highest >= self.vocabulary:
            raise UsageError(
                f"{what} has the token {self.tokenizer.convert_ids_to_tokens(highest)!r} ({highest}), but the model "
                f"knows tokens up to {self.vocabulary - 1}: leave it out of the text"
            )

    def room(self, max_new_tokens: int | None) -> int:
        """Tokens of the context that belong to the answer; None: the smaller of 256 and half of the context."""
        if max_new_tokens is None:
            return min(MAX_NEW_TOKENS, (self.context or 2 * MAX_NEW_TOKENS) // 2)
        if type(max_new_tokens) is not int:
            check_type("max_new_tokens", max_new_tokens, numbers.Integral, "a whole number")
        if max_new_tokens <= 0:
            raise UsageError(f"max_new_tokens: expected 1 or more, found {max_new_tokens}")
        return max_new_tokens

    def texts(self, texts: Sequence[str], ending: Sequence[int] = (), varied: bool = False) -> list[list[int]]:
        """Token ids of texts for calibration: long ones are cut, and empty ones left out. They are the same on every
        day, also if the chat template writes the date.

        Args:
            ending: tokens with which every text has to end. If the chat template ends prompts with them, each text is
                the last message of a conversation, as the prompts will be; else they are appended.
            varied: a third of the conversations have a system message before it, and a third an earlier turn, so that
                neither stands out later, unless the template refuses them. Otherwise all have one message.
        """
        if ending and self.tokenizer.chat_template:
            chats: list[Sequence[int]] = []
            with suppress(UsageError):  # the template refuses a single message
                chats = [self._conversation(texts, i, i % 3 if varied else 0) for i, text in enumerate(texts) if text]
            if chats and all(list(row[-len(ending) :]) == list(ending) for row in chats):
                return [list(cut_left(self.tokenizer, row, self.context or len(row))) for row in chats]
        room = None if self.context is None else self.context - len(ending)
        rows = [text_ids(self.tokenizer, text) for text in texts]
        self.check_known("a text for calibration", [token for row in rows for token in row])
        return [[*row[:room], *ending] for row in rows if row]

    def text_of(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def _conversation(self, texts: Sequence[str], number: int, form: int) -> Sequence[int]:
        """Token ids of a conversation that ends with a text: alone (0), after a system message (1), or after an earlier
        turn (2). What stands before it are other texts."""
        before = texts[(number + _BEFORE) % len(texts)]
        answer = texts[(number + _ANSWER) % len(texts)]
        question = {"role": "user", "content": texts[number]}
        earlier_turn = [{"role": "user", "content": before}, {"role": "assistant", "content": answer}]
        turns = ([], [{"role": "system", "content": before}], earlier_turn)[form]
        variables = _DATED if "strftime_now" in str(self.tokenizer.chat_template) else None
        try:
            return chat(self.tokenizer, [*turns, question], variables=variables).ids
        except UsageError:
            if not turns:
                raise
            return chat(self.tokenizer, [question], variables=variables).ids  # some templates refuse system messages


def several(prompts: Any) -> tuple[list[Any], bool]:
    """A list of prompts, and whether a single prompt was given; UsageError for anything else, and an empty list."""
    if isinstance(prompts, (str, Prompt)):
        return [prompts], True
    listed = prompts.tolist() if hasattr(prompts, "tolist") else prompts  # tensors and arrays
    if not isinstance(listed, Sequence) or isinstance(listed, (bytes, bytearray)):
        raise UsageError(f"prompt: expected {_EXPECTED}, or a list of these, found {type(prompts).__name__}")
    if not listed:
        raise UsageError("prompt: expected one prompt or more, found an empty list")
    single = isinstance(listed[0], (numbers.Integral, Mapping))
    return [listed] if single else list(listed), single


def read(
    tokenizer: PreTrainedTokenizerBase, prompt: Any, probe_text: ProbeText | None = None, vocabulary: int | None = None
) -> Prompt:
    """Reads one prompt: a string, which gets the tokenizer's special tokens; messages, see `chat`; or token ids as they
    are, below `vocabulary` if that is known, and without padding. Strings and token ids are probed whole. Raises
    UsageError for everything else."""
    if isinstance(prompt, Prompt):
        return _checked_prompt(prompt, vocabulary)
    if isinstance(prompt, str):
        ids = tuple(text_ids(tokenizer, prompt))
        return Prompt(ids, ids, prompt)
    listed = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    if not isinstance(listed, Sequence) or isinstance(listed, (bytes, bytearray)):
        raise UsageError(f"expected {_EXPECTED}, found {type(prompt).__name__}")
    if listed and isinstance(listed[0], Mapping):
        return chat(tokenizer, listed, probe_text)
    if listed and isinstance(listed[0], str):
        raise UsageError("expected one prompt, found a list of texts; give them one by one")
    ids = tuple(_token(value, vocabulary) for value in listed)
    _check_unpadded(tokenizer, ids)
    return Prompt(ids, ids)


def _checked_prompt(prompt: Prompt, vocabulary: int | None) -> Prompt:
    """A prompt that a caller has made; UsageError unless it has token ids that are probed."""
    for value in {*prompt.ids, *prompt.probed}:
        _token(value, vocabulary)
    if prompt.ids and not prompt.probed:
        raise UsageError("expected a token or more to be probed, found none; Prompt.of_ids(IDS) probes all")
    return prompt


def _check_unpadded(tokenizer: PreTrainedTokenizerBase, ids: tuple[int, ...]) -> None:
    """Raises UsageError for token ids with padding, which would be read as a part of the prompt.

    A token that pads and has another meaning, too, may begin or end a prompt once. What else is in the batch says
    nothing, so that a prompt is read alike in all of them.
    """
    pad = tokenizer.pad_token_id
    if pad is None:
        return
    means_more = pad in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    count = 2 if means_more else 1
    padding = (pad,) * count
    if ids[:count] == padding or ids[-count:] == padding:
        raise UsageError(_PADDED.format(pad))


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text with the tokenizer's special tokens, but never with a second beginning-of-sequence token.

    A text that begins with that token already, such as that of a chat template, is not changed. Raises UsageError for
    half a surrogate pair.
    """
    check_text(text)
    ids: list[int] = tokenizer(text)["input_ids"]
    if begun(tokenizer, text) and ids[:2] == [tokenizer.bos_token_id] * 2:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def begun(tokenizer: PreTrainedTokenizerBase, text: object) -> bool:
    """Whether it is a text that begins with the beginning-of-sequence token."""
    return isinstance(text, str) and bool(tokenizer.bos_token) and text.startswith(str(tokenizer.bos_token))


def check_text(text: str) -> None:
    """Raises UsageError for a text with half a surrogate pair, which no tokenizer accepts."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        place = f"{text[error.start]!r} at character {error.start}"
        raise UsageError(
            f"text: expected Unicode characters, found half a surrogate pair ({place}); leave it out"
        ) from None


def answer_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text that continues another one, without special tokens.

    Some tokenizers put a blank in front of every text that they encode (`▁`, as of Llama 2 and Mistral), which no
    answer has. So the text is encoded behind a line break, unless the two do not come apart again. UsageError as
    `text_ids`.
    """
    check_text(text)
    alone: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    front: list[int] = tokenizer("\n", add_special_tokens=False)["input_ids"]
    whole: list[int] = tokenizer(f"\n{text}", add_special_tokens=False)["input_ids"]
    apart = front and tokenizer.unk_token_id not in front and whole[: len(front)] == front
    return whole[len(front) :] if apart and len(whole) > len(front) else alone


def cut_left(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], limit: int) -> Sequence[int]:
    """The last `limit` tokens; a token that stands in front of every text stays there."""
    if len(ids) <= limit:
        return ids
    front = 1 if limit > 1 and _begins_texts(tokenizer, ids) else 0
    return [*ids[:front], *ids[len(ids) - (limit - front) :]]


def _begins_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> bool:
    """Whether the first token stands in front of every text, and not in front of every turn of a conversation."""
    if ids[0] in tokenizer("")["input_ids"][:1]:
        return True
    return bool(ids[0] == tokenizer.bos_token_id) and ids[0] not in ids[1:]


def chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Conversation,
    probe_text: ProbeText | None = None,
    variables: Mapping[str, Any] | None = None,
) -> Prompt:
    """Reads a conversation up to where the assistant's next answer begins, by the tokenizer's chat template.

    Base models have no template: contents are joined, one per line, so that a single message is read as its text.

    The probed text is read as a prompt of its own. Within the conversation its tokens would attend to a system prompt,
    the template and earlier answers, and would select other adapters; see docs/answering.md.

    Args:
        messages: `{"role", "content"}`, oldest first; further fields are the template's. A content is a text or a list
            of text parts, which are joined by line breaks (as in vLLM for templates that take texts), or None in an
            assistant's turn.
        probe_text: what is probed: `"last-user"`, the last message of the user (the default); `"conversation"`, all
            messages of the user; `"all"`, or if the user has said nothing that has tokens, everything.
        variables: of the template, besides the messages.

    Raises:
        UsageError: a message without content or with an unknown role, or the template refuses the conversation.
    """
    turns = checked_turns(messages)
    text = _rendered(tokenizer, turns, variables=variables) if tokenizer.chat_template else plain(turns)
    templated = bool(tokenizer.chat_template)  # a template adds the special tokens itself
    ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"] if templated else text_ids(tokenizer, text))
    probed_text = _probed_text(turns, probe_text)
    probed = () if probed_text is None else tuple(text_ids(tokenizer, probed_text))  # some characters are no tokens
    return Prompt(ids, probed or ids, text)


def conversation_text(tokenizer: PreTrainedTokenizerBase, messages: Conversation) -> str:
    """A whole conversation, the last answer included, as the chat template writes it; errors as `chat`."""
    return _rendered(tokenizer, checked_turns(messages), answer=False)


def written_answer(tokenizer: PreTrainedTokenizerBase, messages: Conversation, prompt: str, answer: str) -> str | None:
    """What the chat template writes behind a prompt (the text of `chat`) if the assistant gives this answer, end marks
    included; None if there is no template, or if it changes the prompt then. Errors as `chat`."""
    if not tokenizer.chat_template:
        return None
    whole = conversation_text(tokenizer, [*messages, {"role": "assistant", "content": answer}])
    return whole[len(prompt) :] if whole.startswith(prompt) else None


def given_answer(tokenizer: PreTrainedTokenizerBase, prompt: Any, text: str, answer: str) -> str | None:
    """What the chat template writes for an answer to a conversation, whose text this is, without the mark that ends the
    turn. Some templates trim answers, or put an empty thought before those without one. None as in `around_answer`."""
    around = around_answer(tokenizer, prompt, text)
    if around is None:
        return None
    written = written_answer(tokenizer, prompt, text, answer) or ""
    return written.rstrip().removesuffix(around[1].rstrip()) or around[0] + answer.strip()


def around_answer(tokenizer: PreTrainedTokenizerBase, prompt: Any, text: str) -> tuple[str, str] | None:
    """What the chat template writes between a conversation, whose text this is, and an answer, such as an empty thought
    (Qwen3); and the mark behind the answer that ends the turn. None for other prompts, and where the template expects
    the user to have spoken last."""
    if isinstance(prompt, (list, tuple)) and prompt and isinstance(prompt[0], Mapping):
        with suppress(UsageError):
            written = written_answer(tokenizer, prompt, text, _SOME_ANSWER) or ""
            front, answer, end = written.partition(_SOME_ANSWER)
            return (front, end) if answer else None
    return None


def asked_text(messages: Conversation, probe_text: ProbeText | None = None) -> str | None:
    """The text of a conversation that is probed (see `chat`); None if everything is. Raises UsageError if a
    message of the user that belongs to it cannot be read; the others are not looked at."""
    of_user = [turn for turn in enumerate(messages) if isinstance(turn[1], Mapping) and turn[1].get("role") == "user"]
    if probe_text == "conversation":
        return _probed_text([_turn(*turn) for turn in of_user], probe_text)
    return next(filter(None, (_probed_text([_turn(*turn)], probe_text) for turn in reversed(of_user))), None)


def _probed_text(turns: Conversation, probe_text: ProbeText | None) -> str | None:
    """The text of checked messages that is probed; None if everything is."""
    if probe_text is not None:
        check_choice("probe_text", probe_text, ProbeText)
    contents = [turn["content"] for turn in turns if turn["role"] == "user" and turn["content"].strip()]
    if probe_text == "all" or not contents:
        return None
    return "\n".join(contents) if probe_text == "conversation" else contents[-1]


def plain(messages: Sequence[Mapping[str, Any]]) -> str:
    """The contents of messages, one per line, for base models without a template."""
    return "\n".join(message["content"] or "" for message in messages)


def checked_turns(messages: Conversation) -> list[dict[str, Any]]:
    """Messages, each with its content as one text; UsageError if one has no content or an unknown role."""
    return [_turn(number, message) for number, message in enumerate(messages)]


def _turn(number: int, message: Any) -> dict[str, Any]:
    """A message with its content as one text, as templates expect it."""
    where = f"messages[{number}]"
    if not isinstance(message, Mapping):
        raise UsageError(f"{where}: expected {{'role', 'content'}}, found {type(message).__name__}")
    role = message.get("role")
    if role not in ROLES:
        hint = closest(role, ROLES) if isinstance(role, str) else ""
        raise UsageError(f"{where}: expected one of the roles {', '.join(ROLES)}, found {role!r}{hint}")
    content = message.get("content")
    if isinstance(content, Sequence) and not isinstance(content, str):
        parts = [part for part in content if isinstance(part, Mapping) and isinstance(part.get("text"), str)]
        if parts and len(parts) == len(content) and all(part.get("type", "text") in _TEXTS for part in parts):
            content = "\n".join(part["text"] for part in parts)
    if not isinstance(content, str) and (content is not None or role != "assistant"):
        shown = "none" if content is None else f"{content!r:.60}"
        raise UsageError(f"{where}: expected a 'content' that is a text or a list of text parts, found {shown}")
    return {**message, "content": content}


def _rendered(
    tokenizer: PreTrainedTokenizerBase,
    turns: Conversation,
    answer: bool = True,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The text of a conversation; with `answer`, up to where the assistant's next turn begins."""
    try:
        options = {**(variables or {}), "add_generation_prompt": answer, "tokenize": False}
        text = str(tokenizer.apply_chat_template(list(turns), **options))
        text.encode("utf-8")  # half a surrogate pair can come from any field, and no tokenizer accepts it
        return text
    except Exception as error:  # a template is a program and may raise anything
        reason = " ".join(str(error).split())
        raise UsageError(f"messages: the model's chat template refuses them: {reason}") from error


def _token(value: Any, vocabulary: int | None) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise UsageError(f"expected token ids, found {value!r:.60} among them")
    token = int(value)
    if token < 0 or (vocabulary is not None and token >= vocabulary):
        expected = "0 or more" if vocabulary is None else f"from 0 to {vocabulary - 1}, which the model knows"
        raise UsageError(f"expected token ids {expected}, found {token}")
    return token
