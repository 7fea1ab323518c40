"""Rows of conversations: read, answered, scored and stored as what they are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from logo import LoGo
from logo.baselines.fixed import Oracle, OwnSelector, Random
from logo.baselines.learned import LoraHub, each_alone
from logo.baselines.method import Answering, Task, text_of
from logo.cli.run import run
from logo.demo import adapters_dir, heldout, model_dir
from logo.errors import DataError
from logo.evaluation.identity import rows_digest
from logo.models import load_base
from logo.rows import Row, read_rows, row_of
from logo.scoring import encoded
from logo.training.rows import encoded as as_trained
from test_chat import MARKED, with_template

TEXT = st.text(st.characters(max_codepoint=127), min_size=1, max_size=8).filter(str.strip)
TURN = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": TEXT})
SYSTEM = {"role": "system", "content": "Be brief."}


def chats(task: str, count: int = 2) -> list[dict[str, Any]]:
    """Rows of a task of the demo as conversations that end with their answer."""
    return [
        {
            "messages": [
                SYSTEM,
                {"role": "user", "content": row["context"]},
                {"role": "assistant", "content": row["completion"]},
            ]
        }
        for row in heldout()[task][:count]
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's base model with a chat template."""
    folder = tmp_path_factory.mktemp("base") / "model"
    shutil.copytree(model_dir(), folder)
    with_template(load_base("demo")[1], MARKED).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def logo(folder: Path) -> Iterator[LoGo]:
    yield LoGo.from_pretrained(str(folder), str(adapters_dir()), device="cpu", signal="calibrated", k=3)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    folder = tmp_path / "rows"
    folder.mkdir()
    for task in ("antonym", "plural"):
        (folder / f"{task}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in chats(task)))
    return folder


# -- rows --------------------------------------------------------------------------------------------------------------


@given(turns=st.lists(TURN, min_size=1, max_size=4), answer=TEXT, more=st.lists(TEXT, max_size=2))
def test_a_conversation_is_read_and_written_again(turns: list[dict[str, Any]], answer: str, more: list[str]) -> None:
    turns = [*turns, {"role": "user", "content": "And now?"}]
    whole = {"messages": [*turns, {"role": "assistant", "content": answer}], "references": more or None}
    ended = row_of(whole, "here")
    assert (list(ended.messages), ended.completion) == (turns, answer)
    assert row_of({**whole, "completion": answer}, "here") == ended
    assert ended.context == "\n".join(turn["content"] for turn in turns) == text_of(turns)
    assert ended.prompt == ended.messages and list(ended.golds) == list(dict.fromkeys([answer, *more]))
    assert row_of(json.loads(json.dumps(ended.as_dict())), "there") == ended
    assert row_of({"messages": turns, "completion": [answer, "x"]}, "here").completion == (answer, "x")


def test_a_row_of_a_text_is_not_changed() -> None:
    row = row_of({"context": "a", "completion": "b", "messages": None}, "here")
    assert row == Row("a", "b") and row.prompt == "a" and row.as_dict() == {"context": "a", "completion": "b"}


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"messages": []}, "found no messages"),
        ({"messages": "hello"}, 'found "hello"'),
        (
            {"messages": [{"role": "assistant", "content": "w"}]},
            "found 1 message(s), the last one of the assistant, and no completion",
        ),
        (
            {"messages": [SYSTEM, {"role": "user", "content": "w"}]},
            "found 2 message(s), the last one of the user, and no completion",
        ),
        (
            {"messages": [SYSTEM, {"role": "assistant", "content": " "}]},
            "found 2 message(s), the last one of the assistant, and no completion",
        ),
        ({"messages": [SYSTEM, {"role": "boss", "content": "w"}]}, ":2: messages[1]: expected one of the roles"),
        ({"messages": [SYSTEM, "w"]}, ":2: messages[1]: expected {'role', 'content'}, found str; fix"),
        (
            {"messages": [SYSTEM, {"role": "assistant", "content": "w"}], "completion": "x"},
            'found two answers: "w" and "x"',
        ),
        (
            {"messages": [SYSTEM, *[{"role": "assistant", "content": word} for word in "wx"]]},
            'found two answers: "w" and "x"',
        ),
        ({"messages": [{"role": "user", "content": " "}], "completion": "x"}, "found 'context' is empty"),
    ],
)
def test_a_conversation_that_is_no_row_is_named(row: dict[str, Any], found: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"context": "a", "completion": "b"}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(DataError) as error:
        read_rows(file)
    said = str(error.value)
    assert said.startswith((f"{file}:2: expected ", f"{file}:2: messages[1]: expected ")) and found in said


# -- scoring -----------------------------------------------------------------------------------------------------------

TEMPLATES = {
    "joined": MARKED,
    "new line": MARKED.replace("[assistant]{% endif %}", "[assistant]\n{% endif %}").replace("}}] {{", "}}]\n{{"),
    "none": "",
    "thinking": MARKED.replace("}}] {{", "}}] {% if m.role == 'assistant' %}thinking. {% endif %}{{"),
    "rewritten": "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}?{% endif %}",
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_completion_is_scored_as_it_was_trained(logo: LoGo, template: str) -> None:
    """The scored tokens are those that `logo train` learns from, without what ends the answer."""
    row = row_of({"messages": chats("antonym")[0]["messages"][:2], "completion": "in"}, "here")
    known = logo.tokenizer.chat_template
    logo.tokenizer.chat_template = template or None
    try:
        prompt, gold = encoded(logo.prompts, row.prompt, str(row.completion))
        trained = as_trained(logo.tokenizer, row)
    finally:
        logo.tokenizer.chat_template = known
    assert list(trained.ids[: trained.prompt]) == list(prompt.ids)
    assert list(trained.ids[trained.prompt :])[: len(gold)] == gold
    assert len(gold) < len(trained.ids) - trained.prompt
    assert logo.tokenizer.decode(gold).strip().endswith(str(row.completion))


def test_methods_answer_conversations(logo: LoGo) -> None:
    """Those that score, and those that look at the text of a prompt."""
    found = [row_of(row, "here") for row in chats("antonym", 3)]
    prompts, texts = [row.prompt for row in found], [row.context for row in found]
    names = ["antonym", "plural", "antonym"]
    task = Task("mine", texts, found, names)
    assert Answering(logo, OwnSelector(), task).select(prompts) == logo.select(prompts)
    assert [one.adapters for one in Answering(logo, Oracle(), task).select(prompts)] == [(name,) for name in names]
    assert Answering(logo, Random(k=2), task).select(prompts) == Answering(logo, Random(k=2), task).select(texts)
    table = each_alone(logo, task, found, ["antonym"])
    alone = [
        logo.score(prompt, str(row.completion), [{"antonym": 1.0}])[0]
        for prompt, row in zip(prompts, found, strict=True)
    ]
    assert table["antonym"]["nll"] == sum(one.nll for one in alone) / 3
    learnt = LoraHub(k=2, rows=2, budget=2).learn(logo, task)
    assert learnt["rows"] == 2 and set(learnt["drawn"]) == set(learnt["weights"])


# -- commands ----------------------------------------------------------------------------------------------------------


def test_a_run_answers_conversations(folder: Path, logo: LoGo, rows: Path, tmp_path: Path) -> None:
    place = ["--base-model", str(folder), "--device", "cpu", "--adapters", str(adapters_dir()), "-k", "3"]
    asked = [*place, "--rows", str(rows), "--dataset", "antonym", "--max-new-tokens", "8", "--signal", "calibrated"]
    assert run(["eval", "run", *asked, "--result-dir", str(tmp_path / "whole")]) == 0
    [said] = (tmp_path / "whole").rglob("predictions.json")
    prompts = [row.prompt for row in read_rows(rows / "antonym.jsonl")]
    answers = logo.generate(prompts, max_new_tokens=8)
    assert json.loads(said.read_text()) == [answer.text.strip().split("\n")[0] for answer in answers]
    # The template leaves the probe alone, but not the answer: texts are other prompts.
    assert [one.text for one in answers] != [
        one.text for one in logo.generate([text_of(p) for p in prompts], max_new_tokens=8)
    ]
    assert json.loads(said.with_name("rows.json").read_text())[0]["messages"][0] == SYSTEM
    page = tmp_path / "page.html"
    assert run(["eval", "report", str(tmp_path / "whole"), "--output", str(page)]) == 0
    assert page.stat().st_size > 10_000


def test_a_study_measures_conversations(
    folder: Path, logo: LoGo, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = ["--base-model", str(folder), "--device", "cpu", "--adapters", str(adapters_dir()), "-k", "3"]
    saved = tmp_path / "study.json"
    assert run(["eval", "study", *place, "--rows", str(rows), "--signals", "calibrated", "--save", str(saved)]) == 0
    found = json.loads(saved.read_text())["tasks"]["plural"]["signals"]["calibrated"]["nll"]
    own = read_rows(rows / "plural.jsonl")
    nll = [logo.score(row.prompt, str(row.completion), [None])[0].nll for row in own]
    assert found == pytest.approx(sum(nll) / len(nll), rel=1e-4)


def test_conversations_with_other_roles_are_other_rows(logo: LoGo, tmp_path: Path) -> None:
    """Results and lessons are kept under digests of the rows, and compared by their prompts."""
    first, second = ([{"role": role, "content": "Say no."}] for role in ("user", "system"))
    rows = [row_of({"messages": messages, "completion": "no"}, "here") for messages in (first, second)]
    assert rows[0].context == rows[1].context == "Say no."
    assert len({row.key for row in (*rows, Row("Say no.", "no"))}) == 3
    assert len({rows_digest([row]) for row in (*rows, Row("Say no.", "no"))}) == 3


def test_a_template_that_takes_no_answer_is_no_error(logo: LoGo) -> None:
    """A prompt may end with an answer of the assistant, although the template wants the user's next."""
    known = logo.tokenizer.chat_template
    logo.tokenizer.chat_template = MARKED.replace(
        "{% for m in messages %}",
        "{% for m in messages %}{% if loop.index > 2 and m.role == messages[loop.index0 - 1].role %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}",
    )
    try:
        turns = [SYSTEM, {"role": "user", "content": "w"}, {"role": "assistant", "content": "x"}]
        [scored] = logo.score(turns, "more", [{}])
    finally:
        logo.tokenizer.chat_template = known
    assert scored.tokens > 0
