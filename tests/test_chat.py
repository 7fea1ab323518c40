"""Conversations become what the model's template makes of them, and what is probed is what the user said."""

from __future__ import annotations

import copy
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from logo import LoGo, Selection, UsageError
from logo.cli.run import run
from logo.demo import model_dir
from logo.models import demo_folder, load_base
from logo.prompts import ROLES, Prompt, chat, read, several, text_ids
from serving import served
from tolerances import same_scores, same_selection

MARKED = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "[{{ m.role }}] {{ m.content | trim }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
QUESTION = "What is 7 plus 5?"
TALK = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "12"}]
SYSTEM = {"role": "system", "content": "Be brief. The user may ask: What is 7 plus 5?"}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_base("demo")[1]


@pytest.fixture(scope="module")
def templated(tokenizer: Any) -> Any:
    return with_template(tokenizer, MARKED)


def with_template(tokenizer: Any, template: str) -> Any:
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


def probed(tokenizer: Any, prompt: Prompt) -> str:
    """The tokens that are probed, decoded."""
    assert prompt.probed is not None and len(prompt.probed) == len(prompt.ids)
    text: str = tokenizer.decode(list(itertools.compress(prompt.ids, prompt.probed)))
    return text.strip()


# -- tokens ------------------------------------------------------------------------------------------------------------


def test_a_template_is_followed_up_to_the_next_answer(tokenizer: Any, templated: Any) -> None:
    text = f"{tokenizer.bos_token}[user] {QUESTION}\n[assistant] 12\n[assistant]"
    found = chat(templated, TALK)
    assert list(found.ids) == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert list(found.ids) == templated.apply_chat_template(TALK, add_generation_prompt=True, return_dict=False)
    assert found.ids.count(tokenizer.bos_token_id) == 1


def test_without_a_template_one_message_is_its_text_as_it_is(tokenizer: Any) -> None:
    assert tokenizer.chat_template is None
    one, two = chat(tokenizer, TALK[:1]), chat(tokenizer, TALK)
    assert one == Prompt(tuple(tokenizer(QUESTION)["input_ids"]), None, QUESTION) == read(tokenizer, QUESTION)
    assert list(two.ids) == tokenizer(f"{QUESTION}\n12")["input_ids"]
    assert probed(tokenizer, two) == QUESTION


def test_every_kind_of_prompt_is_read_alike(tokenizer: Any) -> None:
    ids = text_ids(tokenizer, QUESTION)
    kinds = [ids, tuple(ids), torch.tensor(ids), tokenizer(QUESTION), tokenizer([QUESTION], return_tensors="pt")]
    for kind in kinds:
        assert read(tokenizer, kind).ids == tuple(ids)
    padded = tokenizer([QUESTION, "Hi"], padding=True, return_tensors="pt")
    rows, single = several(padded)
    assert not single and [list(row) for row in rows] == [ids, text_ids(tokenizer, "Hi")]


def test_one_prompt_and_several_are_told_apart(tokenizer: Any) -> None:
    ids = text_ids(tokenizer, QUESTION)
    for one in (QUESTION, TALK, ids, torch.tensor(ids), tokenizer(QUESTION), Prompt(tuple(ids))):
        assert several(one)[1]
        given, single = several([one, one])
        assert len(given) == 2 and not single
    assert several([QUESTION, TALK, ids])[1] is False


# -- what is probed ----------------------------------------------------------------------------------------------------


def test_the_last_message_of_the_user_is_probed(templated: Any) -> None:
    turns = [SYSTEM, *TALK, {"role": "user", "content": "  And 8 plus 1? \n"}]
    assert probed(templated, chat(templated, turns)) == "And 8 plus 1?"
    assert chat(templated, turns, "last_user") == chat(templated, turns)
    assert probed(templated, chat(templated, [SYSTEM, *TALK])) == QUESTION  # not where the system prompt says it
    both = chat(templated, turns, "conversation")
    assert sum(both.probed or ()) == sum(
        sum(chat(templated, [SYSTEM, turn]).probed or ()) for turn in (turns[1], turns[3])
    )
    assert chat(templated, turns, "all").probed is None
    assert chat(templated, [SYSTEM]).probed is None  # nobody asked anything


def test_a_template_may_change_what_the_user_says(tokenizer: Any) -> None:
    shouting = with_template(tokenizer, MARKED.replace("m.content | trim", "(m.content | trim) + ' ok'"))
    assert probed(shouting, chat(shouting, [SYSTEM, *TALK])) == f"{QUESTION}"


def test_what_cannot_be_found_is_probed_with_the_rest_and_said(tokenizer: Any) -> None:
    twice = with_template(tokenizer, "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}")
    with pytest.warns(UserWarning, match="cannot be found in the prompt, because the chat template changes it"):
        assert chat(twice, [SYSTEM, *TALK]).probed is None


words = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Co"]), max_size=20)


@given(st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), words), min_size=1, max_size=5))
def test_exactly_the_tokens_of_the_user_are_probed(templated: Any, turns: list[tuple[str, str]]) -> None:
    messages = [{"role": role, "content": text} for role, text in turns]
    prompt = chat(templated, messages, "conversation")
    text = prompt.text or ""
    assert list(prompt.ids) == templated(text, add_special_tokens=False)["input_ids"]
    wanted, place = set(), len(templated.bos_token)
    for role, said in turns:
        place += len(f"[{role}] ")
        if role == "user":
            wanted |= set(range(place, place + len(said.strip())))
        place += len(said.strip()) + 1
    offsets = templated(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    expected = tuple(not wanted.isdisjoint(range(begin, end)) for begin, end in offsets)
    assert prompt.probed == (expected if any(expected) else None)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "user"}], r"messages\[0\]: expected a 'content' that is a text or a list of text parts, found none"),
        ([*TALK, {"role": "user", "content": 3}], r"messages\[2\]: expected a 'content' .*, found 3"),
        ([{"role": "user", "content": [{"type": "image"}]}], r"messages\[0\]: expected a 'content' "),
        ([{"role": "usr", "content": "x"}], r"messages\[0\]: expected one of the roles .*, found 'usr'.*'user'"),
        ([{"content": "x"}], r"messages\[0\]: expected one of the roles system, .*, found None"),
        ([TALK[0], "x"], r"messages\[1\]: expected \{'role', 'content'\}, found str"),
        ([*TALK, {"role": "tool", "content": "x"}], "the model's chat template refuses them: no tools here"),
    ],
)
def test_what_is_no_conversation_is_refused(templated: Any, messages: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read(templated, messages)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "expected one prompt or more, found an empty list"),
        (torch.tensor([]), "expected one prompt or more, found an empty list"),
        ({"input_ids": []}, "found a BatchEncoding of none"),
        ({"role": "user", "content": "x"}, "expected 'input_ids' .*; put a message into a list"),
        (3, "expected a string, a list of messages, token ids or a BatchEncoding, or a list of these, found int"),
        ([3, -1], "expected token ids from 0 to 622, which the model knows, found -1"),
        ([3, 623], "expected token ids from 0 to 622, which the model knows, found 623"),
        ([3, "x"], "expected token ids, found 'x' among them"),
        ([QUESTION, None], "prompt 2: expected a string, a list of messages, .*, found NoneType"),
        ([QUESTION, []], "prompt 2 is empty"),
        ([QUESTION, [{"role": "user"}]], r"prompt 2: messages\[0\]: expected a 'content'"),
    ],
)
def test_the_engine_answers_after_what_it_refused(demo: LoGo, prompts: Any, message: str) -> None:
    before = demo.select(QUESTION)
    for ask in (demo.select, demo.generate):
        with pytest.raises(UsageError, match=message):
            ask(prompts)
    assert demo.select(QUESTION) == before


def test_roles_are_those_of_the_server() -> None:
    from typing import get_args

    from logo.serving.protocol import Role

    assert get_args(Role) == ROLES


# -- the engine --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo() -> LoGo:
    return LoGo.from_pretrained("demo", device="cpu", signal="calibrated")


def test_all_ways_of_asking_select_and_answer_alike(demo: LoGo) -> None:
    ids = text_ids(demo.tokenizer, QUESTION)
    kinds: list[Any] = [QUESTION, TALK[:1], ids, torch.tensor(ids), demo.tokenizer(QUESTION)]
    answers = demo.generate(kinds)
    assert {answer.token_ids for answer in answers} == {answers[0].token_ids}
    assert [demo.select(kind) for kind in kinds] == [demo.select(QUESTION)] * len(kinds)
    for kind in kinds:
        assert demo.generate(kind).token_ids == answers[0].token_ids
        assert "".join(demo.stream(kind)) == answers[0].text
        assert demo.score(kind, " 12", [{}]) == demo.score(QUESTION, " 12", [{}])


@pytest.mark.slow
def test_a_chat_is_one_prompt_through_python_the_command_line_and_the_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tokenizer: Any
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_dir(), folder)
    with_template(tokenizer, MARKED).save_pretrained(folder)
    pool = str(demo_folder() / "adapters")
    place = ["--base-model", str(folder), "--adapters", pool, "-k", "3", "--gpu", "-1"]
    messages = [SYSTEM, TALK[0]]
    logo = LoGo.from_pretrained(str(folder), pool, device="cpu", signal="calibrated", k=3)
    answer = logo.generate(messages, max_new_tokens=20)
    assert answer.selection.scores != logo.select(QUESTION).scores  # the template's own tokens are read

    def command(name: str) -> dict[str, Any]:
        assert run([name, QUESTION, "--system", SYSTEM["content"], *place, "--max-new-tokens", "20", "--json"]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    generated, selected = command("generate"), command("select")
    assert (generated["text"], generated["tokens"]) == (answer.text, len(answer.token_ids))
    with served(*place) as server:
        chosen = server.post("/v1/logo/select", {"messages": messages})
        body = {"model": "logo", "messages": messages, "temperature": 0, "max_tokens": 20, "return_token_ids": True}
        [choice] = server.post("/v1/chat/completions", body)["choices"]
    assert tuple(choice["token_ids"]) == answer.token_ids
    assert choice["message"]["content"] == answer.text
    for found in (generated, selected, chosen):
        same_selection(Selection(tuple(found["adapters"]), tuple(found["weights"]), found["scores"]), answer.selection)


def test_chat_options_of_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    """The demo has no template: a message alone is its text, and one after a system message stands on a line."""

    def ask(*options: str) -> dict[str, Any]:
        assert run(["select", *options, "--base-model", "demo", "--gpu", "-1", "--json"]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    assert ask(QUESTION, "--chat") == ask(QUESTION)
    everything = ask(QUESTION, "--system", "Be brief.", "--probe-text", "all")["scores"]
    assert everything == same_scores(ask(f"Be brief.\n{QUESTION}")["scores"])
    assert ask(QUESTION, "--system", "Be brief.")["scores"] != everything
