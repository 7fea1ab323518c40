"""Tasks: files and what may be wrong in them, and their rows as tokens. What is trained here on them is what PEFT and
transformers' Trainer train, however rows are cut into passes. And `logo train`: adapters that PEFT and pools open, what
was done, runs that ended too early, tasks that fail."""

from __future__ import annotations

import csv
import itertools
import json
import math
import random
import re
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

import tiny
from logo import AdapterPool
from logo.adapters.activation import Activation
from logo.adapters.examples import examples_text, read_examples, write_examples
from logo.cli.app import run
from logo.errors import DataError, NotFinite, UsageError
from logo.models import load_tokenizer
from logo.rows import Row
from logo.scoring import spaced
from logo.training import loop
from logo.training.config import TrainingConfig
from logo.training.loop import Base, Fitted, fit
from logo.training.rows import TaskRows, TokenizedRow, encoded, read_task, shortened, split, task_files
from test_chat import with_template
from test_engine import tokenizer
from written import write_base, write_rows

pytestmark = pytest.mark.slow

CONFIG = TrainingConfig()
ASSISTANT = TrainingConfig(activation="assistant")
GOOD = b'{"context": "w3", "completion": "w4"}\n'
UNUSED = 95  # a token that is in no example
ATTENTION = {"llama": "q_proj,v_proj", "qwen2": "q_proj,v_proj", "gpt2": "c_attn"}


def examples(count: int, seed: int = 0, longest: int = 14) -> tuple[TokenizedRow, ...]:
    """Random rows of different lengths; a completion repeats a part of its prompt, so there is something to learn."""
    dice = random.Random(seed)
    made = []
    for _ in range(count):
        prompt = [dice.randrange(3, UNUSED) for _ in range(dice.randrange(1, longest))]
        completion = [prompt[-1]] * dice.randrange(1, 4) + [1]
        made.append(TokenizedRow((0, *prompt, *completion), 1 + len(prompt)))
    return tuple(made)


def learn(
    model: nn.Module, config: TrainingConfig, some: Sequence[TokenizedRow], name: str = "task", **how: Any
) -> Fitted:
    """Learns rows, and leaves the model as it was."""
    return fit(Base(model, tokenizer()), TaskRows(name, *split(name, config, some)), config, **how)


def gap(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest distance of two tensors of one name, relative to the norm of the expected one."""
    assert found.keys() == expected.keys()
    apart = {key: (found[key] - expected[key]).detach().norm() / expected[key].detach().norm() for key in expected}
    return max(map(float, apart.values()))


def read(file: Path, config: TrainingConfig = CONFIG, tokens: Any = None) -> TaskRows:
    return read_task(file.stem, file, tokens or tokenizer(), config)


def test_rows_of_csv_files_are_texts(tmp_path: Path) -> None:
    """The same rows as those of a JSONL file, whose digest says whether an adapter stands already."""
    tokens = load_tokenizer("demo")
    rows = [("007", "0.10"), ("NA", "true"), (' a "quoted",\ncontext', "1e5"), ("long " * 40_000, "end")]
    with (tmp_path / "bond.csv").open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([("context", "completion"), *rows])
    (tmp_path / "marked.csv").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "bond.csv").read_bytes())  # as Excel saves it
    write_rows(tmp_path / "lines.jsonl", [{"context": a, "completion": b} for a, b in rows])
    found = [read(tmp_path / name, tokens=tokens) for name in ("bond.csv", "marked.csv", "lines.jsonl")]
    assert len({task.sha256 for task in found}) == 1
    assert found[0].learned == found[2].learned and len(found[0].learned) == 4 and found[0].cut == 1
    assert found[0].prompts == tuple(row[0] for row in rows)
    write_rows(tmp_path / "other.jsonl", [{"context": a, "completion": b + "x"} for a, b in rows])
    assert read(tmp_path / "other.jsonl", tokens=tokens).sha256 != found[0].sha256


def test_a_bad_row_is_refused_by_file_and_line(tmp_path: Path) -> None:
    head = b"context,completion\n"
    for name, content, message in (
        ("t.jsonl", GOOD + b'{"context": "a"\n', "t.jsonl:2: expected {"),
        ("t.jsonl", b'{"messages": []}\n', 't.jsonl:1: expected a prompt in "messages", and its gold answer'),
        ("t.csv", head, "found no rows"),
        ("t.csv", b"completion," + head + b"a,b,c\n", "t.csv:1: expected one column each"),
        ("t.csv", head + b"a,b\nc\n", "t.csv:3: expected as many as in line 1, found another number"),
        ("t.csv", head + b"a,\xff\n", "t.csv:1: is not valid CSV in UTF-8"),
        ("t.csv", head + b'a,b\na,"b', "t.csv:2: is not valid CSV in UTF-8"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError) as error:
            read(tmp_path / name)
        assert message in str(error.value) and str(tmp_path / name) in str(error.value)


def test_names(tmp_path: Path) -> None:
    for name in ("a.csv", "deep/b.jsonl", ".hidden/c.jsonl", ".d.jsonl", "notes.txt", "x.y.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(GOOD)
    (tmp_path / ".hidden" / "empty").mkdir()
    assert list(task_files(tmp_path)) == ["a", "deep/b", "x.y"]
    assert task_files(tmp_path, "deep/*,a") == {"a": tmp_path / "a.csv", "deep/b": tmp_path / "deep" / "b.jsonl"}
    with pytest.raises(UsageError, match=r"task 'x\.yy': not found \(did you mean 'x\.y'\?\)"):
        task_files(tmp_path, "x.yy")
    (tmp_path / "plural.CSV").touch()
    with pytest.warns(UserWarning, match=r": plural\.CSV not read: rows are in files TASK\.jsonl or TASK\.csv"):
        task_files(tmp_path)
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    for where, message in [
        (tmp_path, r"a\.csv and .*a\.jsonl are two files of one task"),
        (tmp_path / "none", "expected a folder with TASK.jsonl files, found nothing"),
        (tmp_path / "a.csv", "expected a folder with TASK.jsonl files, found a file"),
        (tmp_path / ".hidden" / "empty", r"expected files TASK\.jsonl or TASK\.csv, found none"),
    ]:
        with pytest.raises(DataError, match=message):
            task_files(where)


def test_rows_beside_a_result_or_an_adapter_are_named(tmp_path: Path) -> None:
    for name in ("a.jsonl", "done/b.csv", "pool/a/examples.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(GOOD)
    (tmp_path / "done/run.json").touch()
    (tmp_path / "pool/a/adapter_config.json").touch()
    passed_over = r"b\.csv not read: (done/)?run\.json beside it says that the folder holds a result"
    with pytest.warns(UserWarning, match=passed_over) as warned:
        assert list(task_files(tmp_path)) == ["a"]
    assert len(warned) == 1
    with pytest.raises(UsageError, match=rf"task 'done/b': not found: done/{passed_over}"):
        task_files(tmp_path, "done/b")
    with pytest.raises(DataError, match=rf"expected files TASK\.jsonl or TASK\.csv, found none: {passed_over}"):
        task_files(tmp_path / "done")


# -- as tokens ---------------------------------------------------------------------------------------------------------

words = st.lists(st.integers(3, 89).map("w{}".format), min_size=1, max_size=9).map(" ".join)
MESSAGES = ({"role": "system", "content": "w9"}, {"role": "user", "content": "w4 w5"})


def tokens_of(row: Row, tokens: Any = None) -> tuple[list[int], list[int]]:
    """The tokens of the prompt and of the completion."""
    found = encoded(tokens or tokenizer(), row)
    return list(found.ids[: found.prompt]), list(found.ids[found.prompt :])


@given(context=words, completion=words, most=st.integers(2, 24))
def test_a_text_and_its_completion(context: str, completion: str, most: int) -> None:
    """Prompts over the limit lose their beginning, but not the token that opens every text; answers lose nothing."""
    made = tokenizer()
    prompt, answer = tokens_of(Row(context, completion))
    assert prompt == made(context)["input_ids"]
    assert answer == [*made(spaced(context, completion), add_special_tokens=False)["input_ids"], made.eos_token_id]
    room = most - len(answer)
    if room < 1:
        with pytest.raises(DataError, match=rf"the completion has {len(answer)} tokens, and a row may have {most} "):
            shortened(made, encoded(made, Row(context, completion)), most)
        return
    found = shortened(made, encoded(made, Row(context, completion)), most)
    assert list(found.ids[found.prompt :]) == answer and len(found) <= most
    kept = list(found.ids[: found.prompt])
    if len(prompt) <= room:
        assert kept == prompt
    else:
        assert kept == (prompt[-1:] if room == 1 else [made.bos_token_id, *prompt[1:][-(room - 1) :]])


def test_a_conversation_is_what_the_template_makes_of_it() -> None:
    text = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    made = with_template(tokenizer(), text + "{% if add_generation_prompt %}assistant {% endif %}")
    prompt, answer = tokens_of(Row("", "w7", messages=MESSAGES), made)
    whole = made.apply_chat_template([*MESSAGES, {"role": "assistant", "content": "w7"}], return_dict=False)
    assert prompt == made.apply_chat_template(list(MESSAGES), add_generation_prompt=True, return_dict=False)
    assert prompt + answer == [*whole, made.eos_token_id]  # as the template ends it, and where generation stops
    prompt, answer = tokens_of(Row("", "w7", messages=MESSAGES))  # without a template it is its texts
    assert prompt == tokenizer()("w9\nw4 w5")["input_ids"]
    assert answer == [*made("w7", add_special_tokens=False)["input_ids"], made.eos_token_id]


def chats(file: Path, *prompts: str) -> Path:
    answer = {"role": "assistant", "content": "w5"}
    return write_rows(file, [{"messages": [{"role": "user", "content": text}, answer]} for text in prompts])


def test_the_assistants_turn_begins_where_the_template_opens_it(tmp_path: Path) -> None:
    """Also with a tokenizer that splits what opens it by what stands before it."""
    tokens = load_tokenizer("demo")
    text = "{% for m in messages %}{{ m.content }} {% endfor %}"
    tokens.chat_template = text + "{% if add_generation_prompt %}Answer:{% endif %}"
    found = read(chats(tmp_path / "t.jsonl", "One?", "Answer: or not? Two?"), ASSISTANT, tokens)
    assert tokens.convert_ids_to_tokens(list(found.invocation)) == ["\u0120Answer", ":"]
    assert [row.begin for row in found.learned] == [row.prompt - 2 for row in found.learned]
    last = read(tmp_path / "t.jsonl", replace(CONFIG, activation="last:3"), tokens)
    assert not last.invocation and [row.begin for row in last.learned] == [row.prompt - 3 for row in last.learned]
    assert len({found.sha256, last.sha256, read(tmp_path / "t.jsonl", tokens=tokens).sha256}) == 3


def test_what_opens_no_turn(tmp_path: Path) -> None:
    file = chats(tmp_path / "t.jsonl", "w4", "w6")
    text = "{% for m in messages %}{{ m.content }} {% endfor %}"
    asks = "{% if add_generation_prompt %}{% if messages[0].content == 'w6' %}w8{% else %}w9{% endif %}{% endif %}"
    none = "row 1: activation assistant: expected a conversation .* give --activation last:4"
    for tokens, message in (
        (tokenizer(), none),
        (with_template(tokenizer(), text), none),
        (with_template(tokenizer(), text + asks), r"row 2: its chat template opens the assistant's turn in another"),
    ):
        with pytest.raises(DataError, match=rf"t\.jsonl, {message}"):
            read(file, ASSISTANT, tokens)
    write_rows(file, [{"context": "w3", "completion": "w4"}])
    with pytest.raises(DataError, match=none):
        read(file, ASSISTANT, with_template(tokenizer(), text + asks))


def test_copies_of_held_out_rows_are_not_learned_from() -> None:
    some = examples(20, 5)
    learned, held_out = split("a", CONFIG, (*some, *some))
    assert len(held_out) == 4 and not set(learned) & set(held_out)
    assert set(learned) | set(held_out) == set(some) and len(learned) == 40 - 2 * len(set(held_out))
    assert split("a", replace(CONFIG, held_out=0.0), (*some, *some)) == ((*some, *some), ())
    plain = split("a", CONFIG, some)
    assert len(plain[0]) == 18 and len(plain[1]) == 2  # nothing is lost where there are no copies
    assert split("a", CONFIG, some[:1] * 12) == (some[:1] * 12, ())  # nothing would be left to learn


def test_every_epoch_has_every_row_once_in_another_order() -> None:
    config, task = TrainingConfig(batch_size=5), TaskRows("a", examples(18))
    epochs = [[row for step in range(at, at + 4) for row in task.batch(step, config)] for at in (0, 4)]
    assert all(sorted(map(id, rows)) == sorted(map(id, task.learned)) for rows in epochs) and epochs[0] != epochs[1]
    lengths = [replace(config, epochs=epochs).length(18) for epochs in (0.1, 2.0, 2.5)]
    assert lengths == [1, 8, 10] and replace(config, steps=7).length(18) == 7
    assert [config.held_out_rows(rows) for rows in (9, 10, 600, 6000)] == [0, 1, 60, 64]


def test_what_no_config_has() -> None:
    last = r"expected everywhere, last:N \(N is 1 or more\) or assistant, found 'last:0'"
    for values, message in (
        ({"r": 0}, "r: expected 1 or more, found 0"),
        ({"lr": math.nan}, "lr: expected a number above 0, found nan"),
        ({"targets": ","}, "targets: expected names of modules or all-linear, found ','"),
        ({"activation": "last:0"}, f"activation: {last}"),
    ):
        with pytest.raises(UsageError, match=message):
            TrainingConfig(**values)


# -- training ----------------------------------------------------------------------------------------------------------

STEPS = 20
KINDS = ("llama", "gpt2", "qwen2")  # gpt2 keeps weights transposed (Conv1D); qwen2 ties its output head to the input
USUAL = TrainingConfig(r=3, alpha=6, lr=3e-3, steps=STEPS, batch_size=4, held_out=0.0)


def collated(rows: Sequence[TokenizedRow], late: bool) -> dict[str, Any]:
    """A batch with the loss of completions; PEFT is told how many tokens of each padded row are activated if `late`."""
    ids, mask = tiny.padded([list(row.ids) for row in rows])
    labels, _ = tiny.padded([[-100] * row.prompt + list(row.ids[row.prompt :]) for row in rows])
    made = {"input_ids": ids, "attention_mask": mask, "labels": labels.masked_fill(mask == 0, -100)}
    return made | {"alora_offsets": [ids.shape[1] - row.begin for row in rows]} if late else made


def check_equal(
    kind: str, config: TrainingConfig, rows: Sequence[TokenizedRow], folder: Path, invocation: Sequence[int] = ()
) -> None:
    """Asserts that our loop makes the factors and losses to which PEFT and the Trainer come from the same beginning.
    PEFT finds the invocation itself, but for `UNUSED`, with which it is told where rows are activated."""
    begun = learn(tiny.model(kind), replace(config, steps=1, lr=1e-35), rows).tensors  # before anything is learned
    lora = config.lora(tiny.model(kind))
    lora.alora_invocation_tokens = list(invocation) or None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice about Conv1D and tied weights
        wrapped = peft.get_peft_model(tiny.model(kind).train(), lora, autocast_adapter_dtype=False)
    for module in wrapped.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    peft.set_peft_model_state_dict(wrapped, dict(begun))
    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.lr,
        lr_scheduler_type="cosine",
        warmup_steps=round(0.03 * STEPS),
        max_grad_norm=1.0,
        logging_steps=1,
        train_sampling_strategy="sequential",
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    task = TaskRows("task", tuple(rows))
    collate = partial(collated, late=list(invocation) == [UNUSED])
    ordered: Any = [row for step in range(STEPS) for row in task.batch(step, config)]
    trainer = transformers.Trainer(wrapped, arguments, train_dataset=ordered, data_collator=collate)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    expected = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    losses: list[float] = []
    found = learn(tiny.model(kind), config, rows, tell=lambda step, loss: losses.append(loss))
    assert found.steps == found.best.step == STEPS
    assert gap(found.tensors, peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False)) < 1e-4
    assert losses == pytest.approx(expected, rel=1e-4, abs=1e-4)  # the Trainer rounds its losses
    # Nothing here is equal because nothing was learned.
    assert all(float((found.tensors[name] - begun[name]).norm()) > 1e-3 for name in begun)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_the_one_that_peft_and_the_trainer_make(kind: str, wide: bool, tmp_path: Path) -> None:
    """The same rows in the same order, AdamW, the same schedule and clipping, in float32. Batches divide the rows."""
    config = replace(USUAL, targets="all-linear" if wide else ATTENTION[kind], rslora=wide)
    check_equal(kind, config, examples(24, seed=3), tmp_path)


@pytest.mark.parametrize("activation", [Activation((UNUSED, 7)), Activation(last=3)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_an_activated_adapter_is_the_one_of_peft_too(kind: str, activation: Activation, tmp_path: Path) -> None:
    """From the last occurrence of an invocation on, or on the last tokens of the prompt."""
    config, dice, rows = replace(USUAL, targets=ATTENTION[kind]), random.Random(0), []
    for row in examples(24, seed=3):
        prompt = list(row.ids[: row.prompt])
        place = dice.randrange(1, len(prompt) + 1)
        prompt[place:place] = activation.tokens
        rows.append(TokenizedRow((*prompt, *row.ids[row.prompt :]), len(prompt), activation.begin(prompt) or 0))
    check_equal(kind, config, rows, tmp_path, activation.tokens or (UNUSED,))
    plain = learn(tiny.model(kind), config, [replace(row, begin=0) for row in rows])
    assert gap(plain.tensors, learn(tiny.model(kind), config, rows).tensors) > 1e-2  # where it acts does matter


@settings(max_examples=6)
@given(seed=st.integers(0, 99), tokens=st.sampled_from([1, 30, 70]), late=st.booleans())
def test_however_passes_are_cut(llama: nn.Module, seed: int, tokens: int, late: bool) -> None:
    """Any limit of a pass, from any place of a prompt on."""
    config = TrainingConfig(r=4, targets="all-linear", lr=2e-3, batch_size=5, steps=8, held_out=0.0)
    rows = [replace(row, begin=late * (row.prompt - 1)) for row in examples(18, seed)]
    expected = learn(llama, config, rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "PASS_TOKENS", tokens)
        found = learn(llama, config, rows)
    # AdamW divides by the size of gradients, so that rounding in small ones shows: 1.4e-4 for the rows of seed 88.
    assert gap(found.tensors, expected.tensors) < 1e-3 and found.best.step == expected.best.step


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_model_is_the_same_afterwards(kind: str) -> None:
    """So the next adapter is the one that it would be alone; and adapters of other names begin elsewhere."""
    model = tiny.model(kind)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    config = TrainingConfig(r=2, targets=ATTENTION[kind], lr=5e-3, steps=4, batch_size=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        first, second = (learn(model, config, examples(18, 7), name).tensors for name in ("a", "b"))
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in after.values())
    assert not any(module.training for module in model.modules())
    assert gap(second, learn(tiny.model(kind), config, examples(18, 7), "b").tensors) < 1e-6
    assert gap(first, second) > 0.1


def test_the_best_step_by_the_held_out_rows_is_kept(llama: nn.Module) -> None:
    """Whose held-out loss is that of PEFT with the kept factors."""
    config = TrainingConfig(r=8, targets="all-linear", lr=2e-2, epochs=6, batch_size=6, patience=0)
    rows = examples(60, 1)
    found = learn(llama, config, rows)
    losses = [one.held_out or 0.0 for one in found.measured]
    assert len(losses) == 10 and 0 < min(losses) < 0.95 * losses[0]  # it learned something
    assert found.best == found.measured[losses.index(min(losses))] != found.measured[-1]
    assert not found.early and found.steps == found.measured[-1].step == 54
    wrapped = peft.get_peft_model(tiny.model("llama"), config.lora(llama)).eval()
    peft.set_peft_model_state_dict(wrapped, dict(found.tensors))
    total, tokens = 0.0, 0
    for row in split("task", config, rows)[1]:
        logits = wrapped(input_ids=torch.tensor([row.ids])).logits[0, row.prompt - 1 : -1].detach()
        total += float(nn.functional.cross_entropy(logits, torch.tensor(row.ids[row.prompt :]), reduction="sum"))
        tokens += row.completion
    assert total / tokens == pytest.approx(found.best.held_out, rel=1e-4)
    hasty = learn(llama, replace(config, lr=0.1, epochs=40, batch_size=4, patience=2), examples(20, 3))
    assert hasty.early and len([one for one in hasty.measured if one.step > hasty.best.step]) == 2
    assert hasty.steps < 200


def test_what_is_not_finite_ends_the_task(llama: nn.Module) -> None:
    """A loss, a gradient or factors; and the next task is what it would be."""
    config = TrainingConfig(r=2, lr=3e-3, steps=4, batch_size=4)
    expected = learn(llama, config, examples(16, 1))
    for steps, what in ((4, "held-out loss"), (40, "loss")):
        with pytest.raises(NotFinite, match=rf"at step \d its {what} is nan; give a lower --lr"):
            learn(llama, replace(config, lr=3e38, steps=steps), examples(16, 1))
    with pytest.raises(NotFinite, match="at step 1 its sum of factors is nan"):
        learn(llama, replace(config, lr=3e38, steps=1, held_out=0.0), examples(16, 1))

    def overflowing(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * torch.inf)
        return output

    handle = llama.get_submodule("model.layers.1.mlp").register_forward_hook(overflowing)
    with pytest.raises(NotFinite, match=r"at step 1 its gradient is (nan|inf)"):
        learn(llama, config, examples(16, 1))
    handle.remove()
    assert gap(learn(llama, config, examples(16, 1)).tensors, expected.tensors) == 0


def test_targets_that_cannot_be_trained() -> None:
    """And the model is as it was."""
    model = tiny.model("llama")
    for targets, message in {
        "q_prj": "targets q_prj: .*q_prj",
        "q_proj,v_prj": "no module of the base model is called v_prj; leave it out",
        "lm_head": "lm_head is the output head, which cannot be trained here; leave it out",
        "embed_tokens": "embed_tokens is not a linear module",
    }.items():
        with pytest.raises(UsageError, match=message):
            learn(model, replace(USUAL, targets=targets), examples(12))
    assert learn(model, USUAL, examples(12)).steps == STEPS


# -- `logo train` ------------------------------------------------------------------------------------------------------


def rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows of a file: a few words, and one of them again."""
    dice = random.Random(seed)
    made = []
    for _ in range(count):
        words = [f"w{dice.randrange(3, 90)}" for _ in range(dice.randrange(1, 9))]
        made.append({"context": " ".join(words), "completion": words[-1]})
    return made


def command(base_model: Path, tasks: Path, pool: Path, *more: str) -> list[str]:
    """A short training."""
    where = ["--base-model", str(base_model), "--rows", str(tasks), "--out", str(pool), "--device", "cpu"]
    config = ["--r", "2", "--lr", "5e-3", "--steps", "6", "--batch-size", "4"]
    return ["train", *where, *config, *more]


def contents(root: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(file.relative_to(root)): file.read_bytes() for file in sorted(root.rglob("*")) if file.is_file()}


CONFIGS: dict[str, list[str]] = {
    "llama": ["--targets", "q_proj,v_proj"],
    "llama-all": ["--targets", "all-linear", "--rslora", "--alpha", "3"],
    "gpt2": ["--targets", "c_attn"],
    "gpt2-all": ["--targets", "all-linear"],
}
Given = tuple[Path, Path]
TASKS = ("a", "b", "d/e")
FILES = ("adapter_config.json", "adapter_model.safetensors", "examples.jsonl", "logo.yaml")


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    """A base model, and a folder of tasks."""
    folder = tmp_path_factory.mktemp("tasks")
    for number, name in enumerate(TASKS):
        write_rows(folder / f"{name}.jsonl", rows(10 + number, number))
    return write_base(tmp_path_factory.mktemp("base")), folder


@pytest.fixture(scope="module")
def whole(given: Given, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pool whose training nobody stopped."""
    pool = tmp_path_factory.mktemp("whole") / "pool"
    assert run(command(*given, pool)) == 0
    return pool


def stepping(monkeypatch: pytest.MonkeyPatch, happens: Callable[[int, Any], None]) -> None:
    """Calls a function with the number of each step that is made from now on, after it, and its optimizer."""
    steps, step = itertools.count(1), torch.optim.AdamW.step

    def stepped(optimizer: Any, *given: Any) -> Any:
        found = step(optimizer, *given)
        happens(next(steps), optimizer)
        return found

    monkeypatch.setattr(torch.optim.AdamW, "step", stepped)


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "copy")
    return tmp_path / "copy"


def test_an_adapter_moves_no_other_one_below_it(
    given: Given, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where it acts is noted in its folder, and such a note applies to all folders below."""
    base_model, tasks = given
    rows_above = tmp_path / "rows"
    shutil.copytree(tasks, rows_above)
    write_rows(rows_above / "d.jsonl", rows(10))
    pool = tmp_path / "pool"
    assert run(command(base_model, rows_above, pool, "--tasks", "d/e")) == 0
    before = contents(pool)
    last = ("--activation", "last:2")
    assert run(command(base_model, rows_above, pool, "--tasks", "d", *last)) == 2
    assert "d/e would act on other tokens than now" in capsys.readouterr().err and contents(pool) == before
    assert run(command(base_model, rows_above, pool, "--tasks", "d,d/e", *last, "--overwrite")) == 0
    assert {str(adapter.activation) for adapter in AdapterPool.open(pool)} == {"last:2"}
    elsewhere = tmp_path / "elsewhere"  # a pool may have linked folders
    (pool / "d" / "e").rename(elsewhere)
    (pool / "d" / "e").symlink_to(elsewhere)
    (elsewhere / "pool.json").unlink()  # so it acts where the note above says
    assert run(command(base_model, rows_above, pool, "--tasks", "d", "--overwrite")) == 2
    assert "d/e would act on other tokens than now" in capsys.readouterr().err


def test_what_else_a_pool_says_beside_an_adapter_stays(given: Given, tmp_path: Path) -> None:
    base_model, tasks = given
    pool = tmp_path / "pool"
    (pool / "a").mkdir(parents=True)
    notes = pool / "a" / "pool.json"
    notes.write_text('{"k": 2, "activation": "last:5"}')
    for where, noted in ((("--activation", "last:3"), {"k": 2, "activation": "last:3"}), ((), {"k": 2})):
        assert run(command(base_model, tasks, pool, "--tasks", "a", *where, "--overwrite")) == 0
        assert json.loads(notes.read_text()) == noted
        [adapter] = AdapterPool.open(pool)
        assert str(adapter.activation) == noted.get("activation", "everywhere")


@pytest.mark.parametrize("name", CONFIGS)
def test_peft_and_pools_open_the_adapters(name: str, given: Given, tmp_path: Path) -> None:
    """Without a word; and PEFT writes the same configuration."""
    kind = name.partition("-")[0]
    base_model, pool = write_base(tmp_path / "base", kind), tmp_path / "pool"
    ids, mask = tiny.padded(tiny.prompts([7, 4], seed=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert run(command(base_model, given[1], pool, *CONFIGS[name], "--tasks", "d/e,a")) == 0
        opened = AdapterPool.open(pool, on_bad_adapter="error")
        wrapped = peft.PeftModel.from_pretrained(tiny.model(kind), pool / "d/e").eval()
    assert opened.names == ("a", "d/e") and [one.activation.everywhere for one in opened] == [True, True]
    file, theirs = load_file(pool / "d/e" / FILES[1]), peft.get_peft_model_state_dict(wrapped)
    assert file.keys() == theirs.keys() and all(torch.equal(file[key], theirs[key]) for key in file)
    logits = wrapped(input_ids=ids, attention_mask=mask).logits
    assert float((logits - tiny.model(kind)(input_ids=ids, attention_mask=mask).logits)[mask.bool()].abs().max()) > 1e-3
    wrapped.save_pretrained(tmp_path / "theirs")
    theirs, ours = (json.loads((at / FILES[0]).read_text()) for at in (tmp_path / "theirs", pool / "d/e"))
    theirs["target_modules"].sort()
    assert ours == theirs and ours["base_model_name_or_path"] == str(base_model)


def test_logo_yaml_says_what_was_done(whole: Path, given: Given) -> None:
    assert set(contents(whole)) == {f"{name}/{file}" for name in TASKS for file in FILES}
    number, name = 2, "d/e"
    found = yaml.safe_load((whole / name / "logo.yaml").read_text())
    assert found["base_model"] == str(given[0]) and found["base"]["dtype"] == "float32"
    config = {"r": 2, "lr": 0.005, "steps": 6, "batch_size": 4, "activation": "everywhere"}
    assert config.items() <= found["config"].items()
    counts = {"file": str(given[1] / f"{name}.jsonl"), "learned": 9 + number, "held_out": 1, "copies": 0, "cut": 0}
    assert counts.items() <= found["rows"].items()
    result = found["result"]
    assert result["steps"] == 6 and [at["step"] for at in result["measured"]] == [1, 2, 3, 4, 5, 6]
    best = min(result["measured"], key=lambda at: at["held_out"])
    assert result["best_step"] == best["step"] and not result["early"]
    assert result["held_out_loss"] == pytest.approx(best["held_out"], abs=1e-6)
    assert {"logo", "torch", "transformers", "peft"} == set(found["versions"])
    prompts = [json.loads(line)["prompt"] for line in (whole / name / FILES[2]).read_text().splitlines()]
    assert prompts == [row["context"] for row in rows(10 + number, number)[:4]]


def test_an_interrupted_run_goes_on(whole: Path, given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the second task: exit code 130. That task begins again, and all adapters are those of a whole run."""
    pool = tmp_path / "pool"

    def interrupted(step: int, optimizer: Any) -> None:
        if step == 9:
            raise KeyboardInterrupt

    stepping(monkeypatch, interrupted)
    assert run(command(*given, pool)) == 130
    assert set(contents(pool)) == {f"a/{file}" for file in FILES}
    assert run(command(*given, pool)) == 0 and contents(pool) == contents(whole)
    assert run(command(*given, tmp_path / "other", "--seed", "1", "--tasks", "a")) == 0
    first, other = (load_file(root / "a" / FILES[1]) for root in (whole, tmp_path / "other"))
    assert not any(torch.equal(first[key], other[key]) for key in first)


def test_a_task_that_is_added_touches_nothing_of_the_others(
    copied: Path, given: Given, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def times() -> dict[Path, tuple[int, int]]:
        return {file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in copied.rglob("*") if file.is_file()}

    more, stood = tmp_path / "tasks", times()
    shutil.copytree(given[1], more)
    write_rows(more / "bb.jsonl", rows(11, 9))
    assert run(command(given[0], more, copied)) == 0
    told = capsys.readouterr()
    assert "adapters to train: 1, 3 trained already" in told.err
    assert told.out.splitlines()[-1] == f"{copied}: 1 adapters trained, 3 stood already, 0 failed"
    assert stood.items() <= times().items() and len(times()) == len(stood) + len(FILES)
    stood = times()
    assert run(command(given[0], more, copied)) == 0 and times() == stood  # nothing is left


@pytest.mark.filterwarnings("always")
def test_another_number_of_example_prompts_needs_no_training(
    copied: Path, given: Given, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those that were given by hand stay."""
    weights = {name: content for name, content in contents(copied).items() if name.endswith(FILES[:2])}
    for count in (2, 0, 3):
        assert run([*command(*given, copied), "--examples", str(count)]) == 0
        found = contents(copied)
        assert weights.items() <= found.items()
        for name in TASKS:
            prompts = found.get(f"{name}/{FILES[2]}", b"").splitlines()
            assert len(prompts) == count == yaml.safe_load(found[f"{name}/{FILES[3]}"])["config"]["examples"]
    (copied / "a" / FILES[2]).write_text('{"prompt": "mine"}')
    before = contents(copied / "a")
    assert "warning" not in capsys.readouterr().err
    assert run([*command(*given, copied), "--examples", "1"]) == 0
    assert f"{copied / 'a' / FILES[2]}: expected the 3 prompts that training wrote" in capsys.readouterr().err
    assert contents(copied / "a") == before and len(contents(copied)[f"b/{FILES[2]}"].splitlines()) == 1
    (copied / "a" / FILES[0]).unlink()  # so that only these prompts are there before the adapter
    assert run(command(*given, copied)) == 0
    assert (copied / "a" / FILES[2]).read_text() == '{"prompt": "mine"}' and (copied / "a" / FILES[0]).exists()


@pytest.mark.filterwarnings("always")
def test_an_adapter_of_something_else_is_refused(
    copied: Path, given: Given, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(copied)

    def refused(*more: str, base: Path = given[0], folder: Path = given[1]) -> str:
        capsys.readouterr()
        assert run([*command(base, folder, copied), *more]) == 2
        assert contents(copied) == before
        return capsys.readouterr().err.splitlines()[-1]

    end = "; name another --save, or replace it with --overwrite"
    line = refused("--lr", "0.001")
    assert line == f"logo: error: {copied / 'a'}: was trained with lr 0.005, and 0.001 is asked for{end}"
    assert f"{copied / 'b'}: was trained with r 2, and 3 is asked for" in refused("--r", "3", "--tasks", "b")
    base = write_base(tmp_path / "base", num_hidden_layers=2)
    assert "was trained on another base model, or in another dtype" in refused(base=base)
    shutil.copytree(given[1], tmp_path / "tasks")
    write_rows(tmp_path / "tasks" / "b.jsonl", rows(12, 77))
    assert refused(folder=tmp_path / "tasks") == f"logo: error: {copied / 'b'}: was trained from other rows{end}"
    (copied / "b" / "logo.yaml").unlink()
    before = contents(copied)
    assert "holds an adapter that was not trained here" in refused()
    assert run([*command(given[0], tmp_path / "tasks", copied), "--overwrite"]) == 0
    assert "adapters to train: 1, 2 trained already" in capsys.readouterr().err
    changed = {name for name, content in contents(copied).items() if before.get(name) != content}
    assert changed == {f"b/{file}" for file in (*FILES[1:], f"{FILES[2]}.old")}
    write_examples(copied / "b", ["mine"])
    for more in ("--steps", "3"), ("--steps", "2", "--examples", "1"):
        assert run([*command(given[0], tmp_path / "tasks", copied), *more, "--overwrite"]) == 0
    assert [read_examples(copied / name / "examples.jsonl") for name in "ab"][1] == ["mine"]
    assert len(read_examples(copied / "a" / "examples.jsonl")) == 1


@pytest.mark.filterwarnings("always")
@pytest.mark.parametrize("recorded", [True, False])
def test_example_prompts_of_another_adapter_do_not_become_those_of_a_new_one(
    recorded: bool, copied: Path, given: Given, capsys: pytest.CaptureFixture[str]
) -> None:
    """They would select it for prompts of the adapter that it has replaced. They are kept beside it, unused."""
    folder = copied / "b"
    shutil.rmtree(folder)
    shutil.copytree(copied / "a", folder)
    write_examples(folder, ["a prompt of a"])
    (folder / f"{FILES[2]}.old").write_bytes(examples_text(["an earlier one"]))
    if not recorded:  # an adapter from elsewhere
        (folder / FILES[3]).unlink()
    assert run([*command(*given, copied), "--tasks", "b", "--overwrite"]) == 0
    assert f"{folder}: the example prompts there were those of the adapter that is replaced" in capsys.readouterr().err
    assert read_examples(folder / FILES[2]) == [row["context"] for row in rows(11, 1)[:4]]
    assert AdapterPool.open(copied)["b"].examples == tuple(read_examples(folder / FILES[2]))
    assert read_examples(folder / f"{FILES[2]}.old") == ["an earlier one", "a prompt of a"]


def test_a_description_stays_with_an_adapter_of_the_same_task(copied: Path, given: Given, tmp_path: Path) -> None:
    record = copied / "b" / FILES[3]
    record.write_text(f"{record.read_text()}description: Counts words.\n")
    tasks = shutil.copytree(given[1], tmp_path / "tasks")
    write_rows(tasks / "b.jsonl", rows(12, 77))
    assert run([*command(given[0], tasks, copied), "--tasks", "b", "--overwrite"]) == 0
    assert AdapterPool.open(copied)["b"].description == "Counts words."
    shutil.rmtree(copied / "a")
    shutil.copytree(copied / "b", copied / "a")
    assert run([*command(given[0], tasks, copied), "--tasks", "a", "--overwrite"]) == 0
    assert AdapterPool.open(copied)["a"].description is None  # it was said of the adapter that is replaced


@pytest.mark.filterwarnings("always")
def test_example_prompts_that_were_given_by_hand_stay_and_that_is_said_if_rows_are_others(
    copied: Path, given: Given, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_examples(copied / "b", ["mine"])
    tasks = shutil.copytree(given[1], tmp_path / "tasks")
    write_rows(tasks / "b.jsonl", rows(12, 77))
    assert run([*command(given[0], tasks, copied), "--tasks", "b", "--overwrite"]) == 0
    assert f"{copied / 'b'}: the example prompts there stay, as they were given by hand" in capsys.readouterr().err
    assert read_examples(copied / "b" / FILES[2]) == ["mine"]
    assert run([*command(given[0], tasks, copied), "--tasks", "b", "--overwrite", "--steps", "3"]) == 0
    assert "warning" not in capsys.readouterr().err


def test_a_list_at_the_end_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With exit code 1, also when the same command finds everything done that can be."""
    tasks, pool = tmp_path / "tasks", tmp_path / "pool"
    long, endless = {"context": "w3 " * 50, "completion": "w4"}, {"context": "w3", "completion": "w4 " * 50}
    made = {
        "few": rows(3, 7),
        "twice": rows(12, 9) * 2,
        "long": [*rows(11, 8), long],
        "endless": [*rows(2, 8), endless],
    }
    for name, some in {**made, "empty": []}.items():
        write_rows(tasks / f"{name}.jsonl", some)
    base_model = write_base(tmp_path / "base", "gpt2", n_positions=32)
    asked = command(base_model, tasks, pool, "--targets", "c_attn")
    assert run(asked) == 1
    lines = " ".join(capsys.readouterr().out.split())
    assert "long: 1 prompts were longer than --max-length or the model's context and lost their beginning" in lines
    assert "twice: 2 rows are copies of held-out rows and were not trained on" in lines
    assert "endless.jsonl, row 3: the completion has 51 tokens, and a row may have 32 with its prompt" in lines
    assert "failed empty: " in lines and "empty.jsonl: expected one JSON object per line" in lines
    assert lines.endswith(f"{pool}: 3 adapters trained, 2 failed")
    few = yaml.safe_load((pool / "few" / "logo.yaml").read_text())
    assert few["result"]["held_out_loss"] is None  # too few rows to hold any out
    assert AdapterPool.open(pool).names == ("few", "long", "twice")
    assert run([*asked, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert list(found["done"]) == ["few", "long", "twice"] and found["trained"] == {} and len(found["failed"]) == 2


def test_a_task_that_diverges_or_has_no_memory_does_not_stop_the_others(
    given: Given, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(step: int, optimizer: Any) -> None:
        if step == 2:
            raise torch.OutOfMemoryError("out of memory")
        if step == 3:
            optimizer.param_groups[0]["params"][0].data.fill_(torch.nan)

    stepping(monkeypatch, failing)
    assert run(command(*given, tmp_path / "pool")) == 1
    lines = " ".join(capsys.readouterr().out.split())
    assert "failed a: cpu has too little memory; give a smaller --max-length or --batch-size" in lines
    # With some kernels of attention on CPUs, logits stay finite where a query is not.
    assert re.search("failed b: at step 1 its (held-out loss|sum of factors) is nan; give a lower --lr", lines)
    assert AdapterPool.open(tmp_path / "pool").names == ("d/e",)
    assert run(command(*given, tmp_path / "none", "--targets", "q_prj")) == 2  # which no task survives
    assert capsys.readouterr().err.splitlines()[-1].startswith("logo: error: targets q_prj: ")


def test_adapters_of_one_pool_act_where_each_was_trained_to(tmp_path: Path) -> None:
    """Whatever the pool's own note says of others."""
    # Opens the assistant's turn with two tokens.
    turn = "{{ m.role | replace('user', 'w80 w81') | replace('assistant', 'w82 w83') }} {{ m.content }} "
    template = f"{{% for m in messages %}}{turn}{{% endfor %}}{{% if add_generation_prompt %}}w82 w83{{% endif %}}"
    base_model, pool = write_base(tmp_path / "base", template=template), tmp_path / "pool"
    roles = (("user", "context"), ("assistant", "completion"))
    some = [{"messages": [{"role": role, "content": row[key]} for role, key in roles]} for row in rows(12, 3)]
    for name in ("last", "opening", "plain"):
        write_rows(tmp_path / "chats" / f"{name}.jsonl", some)

    def trained(name: str, activation: str, *more: str) -> dict[str, Activation]:
        asked = command(base_model, tmp_path / "chats", pool, "--tasks", name, "--activation", activation, *more)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            assert run(asked) == 0
        return {one.name: one.activation for one in AdapterPool.open(pool, on_bad_adapter="error")}

    trained("opening", "assistant")
    trained("last", "last:4")
    expected = {"last": Activation(last=4), "opening": Activation((82, 83)), "plain": Activation()}
    assert trained("plain", "everywhere") == expected
    assert json.loads((pool / "opening" / FILES[0]).read_text())["alora_invocation_tokens"] == [82, 83]
    (pool / "pool.json").write_text('{"activation": "last:2", "k": 2}')
    expected |= {"last": Activation(), "plain": Activation(last=2)}
    assert trained("last", "everywhere", "--overwrite") == expected
