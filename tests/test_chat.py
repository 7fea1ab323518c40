"""Conversations are written by the model's chat template, and the probe reads the user's messages."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import normalizers, processors

from logo import AdapterPool, LoGo, SelectionSettings, UsageError
from logo.core import Prompt
from logo.demo import adapters_dir, heldout
from logo.models import load_base
from logo.prompts import Prompts, Truncation, chat, read, text_ids
from logo.selection.texts import NEUTRAL
from make_adapters import edit_config
from tiny import read_tokens
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
    assert one == replace(Prompt.of_ids(tokenizer(QUESTION)["input_ids"]), text=QUESTION) == read(tokenizer, QUESTION)
    assert list(two.ids) == tokenizer(f"{QUESTION}\n12")["input_ids"]
    assert two.probed == one.ids


# -- what is probed ----------------------------------------------------------------------------------------------------

words = st.text(st.characters(codec="utf-8"), max_size=20)
conversations = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), words), min_size=1, max_size=5)


@given(turns=conversations, template=st.sampled_from([None, MARKED]))
def test_what_is_probed_is_the_prompt_that_the_users_text_would_be(
    tokenizer: Any, templated: Any, turns: list[tuple[str, str]], template: str | None
) -> None:
    asked = templated if template else tokenizer
    messages = [{"role": role, "content": text} for role, text in turns]
    said = [text for role, text in turns if role == "user" and text.strip()]
    last, whole, everything = (chat(asked, messages, probe) for probe in (None, "conversation", "all"))  # type: ignore[arg-type]
    assert last == chat(asked, messages, "last-user")
    assert last.ids == whole.ids == everything.ids == everything.probed
    assert last.probed == (read(asked, said[-1]).ids if said else last.ids)
    assert whole.probed == (read(asked, "\n".join(said)).ids if said else last.ids)


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_what_is_no_conversation_is_refused(templated: Any) -> None:
    for messages, message in (
        ([{"role": "user"}], r"messages\[0\]: expected a 'content' that is a text or a list of text parts, found none"),
        ([{"role": "user", "content": [{"type": "image", "text": "x"}]}], r"messages\[0\]: expected a 'content' "),
        ([{"role": "usr", "content": "x"}], r"messages\[0\]: expected one of the roles .*, found 'usr'.*'user'"),
        ([TALK[0], "x"], r"messages\[1\]: expected \{'role', 'content'\}, found str"),
        ([*TALK, {"role": "tool", "content": "x"}], "the model's chat template refuses them: no tools here"),
    ):
        with pytest.raises(UsageError, match=message):
            read(templated, messages)


def test_the_engine_answers_after_what_it_refused(demo: LoGo) -> None:
    rows = [[3, 4], [3, demo.tokenizer.pad_token_id]]
    for prompts, message in (
        ([], "expected one prompt or more, found an empty list"),
        (3, "expected a string, a list of messages or token ids, or a list of these, found int"),
        ([3, 623], "expected token ids from 0 to 622, which the model knows, found 623"),
        ([3, "x"], "expected token ids, found 'x' among them"),
        *((ids, "expected token ids without padding") for ids in (rows, torch.tensor(rows), torch.tensor(rows[1:]))),
        ([QUESTION, None], "prompt 2: expected a string, a list of messages or token ids, found NoneType"),
        ([QUESTION, []], "prompt 2 is empty"),
        ("a\ud83d", r"prompt 1: text: expected Unicode .*, found half a surrogate pair \('\\ud83d' at character 1\)"),
        ([{"role": "user", "content": "\ud83d"}], "prompt 1: text: .* half a surrogate pair"),
    ):
        before = demo.select(QUESTION)
        for ask in (demo.select, demo.generate):
            with pytest.raises(UsageError, match=message):
                ask(prompts)
        assert demo.select(QUESTION) == before


def test_whether_ids_are_padded_does_not_depend_on_the_batch() -> None:
    """A token that pads and ends texts, as in most models of chats, may end a prompt once."""
    model, tokenizer = load_base("demo")
    tokenizer.pad_token = tokenizer.eos_token
    logo = LoGo(model, tokenizer, AdapterPool.open(adapters_dir()), settings=SelectionSettings("norm"))
    end = tokenizer.eos_token_id
    plain, ended, padded = [3, 4, 5], [3, 4, end], [3, end, end]
    alone = logo.select(ended)
    assert logo.select([plain, ended])[1].scores == same_scores(alone.scores)
    assert logo.select(torch.tensor([plain, ended]))[1].scores == same_scores(alone.scores)
    for prompts in (padded, [plain, padded], torch.tensor([plain, padded]), [[end, end, 3], plain]):
        with pytest.raises(UsageError, match="expected token ids without padding"):
            logo.select(prompts)


# -- the engine --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo() -> LoGo:
    return LoGo.from_pretrained("demo", device="cpu", signal="calibrated")


def test_what_a_caller_sets_for_other_models_changes_no_score(demo: LoGo) -> None:
    plain, activated = (LoGo.from_pretrained("demo", device="cpu", activation="last:2") for _ in range(2))
    expected = [logo.select(QUESTION) for logo in (demo, plain)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        activated.generate(QUESTION, adapters={})
        assert demo.select(QUESTION) == expected[0]
    same_selection(activated.select(QUESTION), expected[1])
    torch.set_default_dtype(torch.bfloat16)
    try:
        opened = LoGo(demo.model, demo.tokenizer, demo.pool, settings=demo.settings)
        assert opened.reselect(opened.select(QUESTION)) == expected[0]
    finally:
        torch.set_default_dtype(torch.float32)


def test_all_ways_of_asking_select_and_answer_alike(demo: LoGo) -> None:
    ids = text_ids(demo.tokenizer, QUESTION)
    kinds: list[Any] = [QUESTION, TALK[:1], ids, torch.tensor(ids)]
    answers = demo.generate(kinds)
    assert {answer.token_ids for answer in answers} == {answers[0].token_ids}
    assert [demo.select(kind) for kind in kinds] == [demo.select(QUESTION)] * len(kinds)
    for kind in kinds:
        assert demo.generate(kind).token_ids == answers[0].token_ids
        assert "".join(demo.stream(kind)) == answers[0].text
        assert demo.score(kind, " 12", [{}]) == demo.score(QUESTION, " 12", [{}])


def system_prompt(tokenizer: Any, tokens: int) -> dict[str, str]:
    ids = tokenizer(" ".join(NEUTRAL) * 3, add_special_tokens=False)["input_ids"]
    return {"role": "system", "content": tokenizer.decode(ids[:tokens])}


@pytest.mark.parametrize("template", [None, MARKED], ids=["plain", "template"])
def test_a_system_prompt_of_150_tokens_selects_nothing(demo: LoGo, template: str | None) -> None:
    asked = [(name, row["context"]) for name, rows in heldout().items() for row in rows[:6]]
    system = system_prompt(demo.tokenizer, 150)
    demo.tokenizer.chat_template = template
    try:
        found = demo.select([[system, {"role": "user", "content": text}] for _, text in asked])
    finally:
        demo.tokenizer.chat_template = None
    assert found == demo.select([text for _, text in asked])
    assert sum(one.adapters[0] == name for one, (name, _) in zip(found, asked, strict=True)) > 0.8 * len(asked)


# -- adapters that act from where the assistant's turn begins ----------------------------------------------------------


def opening(tokenizer: Any) -> list[int]:
    ids: list[int] = tokenizer("[assistant]", add_special_tokens=False)["input_ids"]
    return ids


def test_texts_that_end_with_an_invocation_are_chats_if_the_template_writes_it(tokenizer: Any, templated: Any) -> None:
    ending = opening(tokenizer)
    plain, asked = text_ids(tokenizer, QUESTION), list(chat(templated, TALK[:1]).ids)
    assert asked[-len(ending) :] == ending
    assert Prompts(templated, None, Truncation()).texts([QUESTION, ""], ending) == [asked]
    assert Prompts(templated, None, Truncation()).texts([QUESTION], [5, 6]) == [[*plain, 5, 6]]
    assert Prompts(tokenizer, None, Truncation()).texts([QUESTION], ending) == [[*plain, *ending]]
    alone, system, later = Prompts(templated, None, Truncation()).texts(["one", "two", "three"], ending, True)
    one, two, three = ({"role": "user", "content": text} for text in ("one", "two", "three"))
    assert alone == list(chat(templated, [one]).ids)
    assert system == list(chat(templated, [{"role": "system", "content": "three"}, two]).ids)
    assert later == list(chat(templated, [one, {"role": "assistant", "content": "one"}, three]).ids)
    for role, place, lone in (("system", 1, two), ("assistant", 2, three)):
        strict = with_template(tokenizer, MARKED.replace("'tool'", f"'{role}'"))
        found = Prompts(strict, None, Truncation()).texts(["one", "two", "three"], ending, True)
        assert found[place] == list(chat(strict, [lone]).ids)
    refusing = with_template(tokenizer, MARKED.replace("'tool'", "'user'"))
    assert Prompts(refusing, None, Truncation()).texts([QUESTION], ending) == [[*plain, *ending]]
    for made in (tokenizer, templated):
        [row] = Prompts(made, len(ending) + 3, Truncation(side="right")).texts([QUESTION], ending)
        assert len(row) == len(ending) + 3 and row[-len(ending) :] == ending


def test_a_template_that_writes_the_date_gives_the_same_calibration_on_every_day(tokenizer: Any) -> None:
    """And at every moment, as this one shows, which writes more than the date."""
    dated = with_template(tokenizer, "{{ strftime_now('%Y-%m-%d %H:%M:%S.%f') }}" + MARKED)
    ending = opening(tokenizer)
    prompts = Prompts(dated, None, Truncation())
    assert prompts.texts([QUESTION], ending) == prompts.texts([QUESTION], ending)
    assert chat(dated, TALK).ids != chat(dated, TALK).ids  # what is answered has the time


@pytest.mark.slow
def test_a_chat_is_read_whole_if_no_adapter_acts_everywhere(templated: Any, tmp_path: Path) -> None:
    shutil.copytree(adapters_dir(), tmp_path / "pool")
    ending = opening(templated)
    for config in (tmp_path / "pool").glob("*/adapter_config.json"):
        edit_config(config.parent, alora_invocation_tokens=ending)
    model, _ = load_base("demo")
    for chosen, same in ((None, True), ("all", True), ("last-user", False)):
        settings = SelectionSettings.of(signal="calibrated", probe_text=chosen)
        logo = LoGo(model, templated, AdapterPool.open(tmp_path / "pool"), settings=settings)
        turns = [SYSTEM, *TALK, {"role": "user", "content": "What is the plural of mouse?"}]
        whole = logo.select(list(chat(templated, turns).ids))
        # Up to rounding, since the second one finds the first one's keys and values.
        assert (logo.select(turns).scores == same_scores(whole.scores)) is same
        first, second, third, *_ = logo.scorer.reading.texts.neutral
        assert [bool(row[-len(ending) :] == ending) for row in (first, second, third)] == [True] * 3
        assert templated.decode(first).count("[user]") == templated.decode(second).count("[system]") == 1
        assert templated.decode(third).count("[assistant]") == 2
    with read_tokens(model) as seen:
        logo = LoGo(model, templated, AdapterPool.open(tmp_path / "pool"), settings=SelectionSettings())
        logo.calibrate()
        seen.clear()
        logo.generate(turns, max_new_tokens=1)
    assert seen == [len(chat(templated, turns)), len(ending)]


def test_a_message_without_tokens_is_no_message(tokenizer: Any) -> None:
    made = copy.deepcopy(tokenizer)
    made.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    made.bos_token, made.backend_tokenizer.post_processor = None, processors.ByteLevel()
    empty = {"role": "user", "content": "\u200b"}
    assert text_ids(made, empty["content"]) == []
    prompt = chat(made, [SYSTEM, empty])
    assert prompt.probed == prompt.ids != ()


@pytest.mark.slow
def test_a_chat_is_probed_by_its_last_message_if_adapters_act_on_last_tokens(templated: Any, tmp_path: Path) -> None:
    shutil.copytree(adapters_dir(), tmp_path / "pool")
    (tmp_path / "pool" / "pool.json").write_text(json.dumps({"activation": "last:4"}))
    logo = LoGo(load_base("demo")[0], templated, AdapterPool.open(tmp_path / "pool"))
    turns = [SYSTEM, *TALK, {"role": "user", "content": "What is the plural of mouse?"}]
    found, alone = logo.select(turns), logo.select("What is the plural of mouse?")
    assert logo.fitted.read_once and found.scores == same_scores(alone.scores)
