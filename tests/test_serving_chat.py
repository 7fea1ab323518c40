"""Conversations become what the model's template makes of them, or plain text where there is none."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from logo.errors import UsageError
from logo.models import load_base
from logo.serving.chat import chat_ids

MARKED = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
TALK = [{"role": "user", "content": "What is 7 plus 5?"}, {"role": "assistant", "content": "12"}]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_base("demo")[1]


def test_a_template_is_followed_up_to_the_next_answer(tokenizer: Any) -> None:
    templated = copy.deepcopy(tokenizer)
    templated.chat_template = MARKED
    text = f"{tokenizer.bos_token}[user] What is 7 plus 5?\n[assistant] 12\n[assistant]"
    assert chat_ids(templated, TALK) == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_what_a_template_refuses_is_told(tokenizer: Any) -> None:
    templated = copy.deepcopy(tokenizer)
    templated.chat_template = MARKED
    with pytest.raises(UsageError, match="template refuses them: no system here"):
        chat_ids(templated, [{"role": "system", "content": "Be brief."}, *TALK])


def test_without_a_template_one_message_is_its_text_as_it_is(tokenizer: Any) -> None:
    assert tokenizer.chat_template is None
    assert chat_ids(tokenizer, TALK[:1]) == tokenizer(TALK[0]["content"])["input_ids"]
    assert chat_ids(tokenizer, TALK) == tokenizer("What is 7 plus 5?\n12")["input_ids"]
