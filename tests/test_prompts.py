"""One prompt, one reading of it: cut in the same place, begun once, and asked for with options that exist."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st
from torch import nn

import tiny
from logo import AdapterPool, LoGo, SelectionSettings, Truncation, UsageError
from logo.baselines.fixed import OwnSelector
from logo.baselines.method import Answering, Task
from logo.cli.run import run
from logo.prompts import chat, cut_left
from test_engine import PROMPTS, engine, tokenizer, write_adapter

pytestmark = pytest.mark.filterwarnings("ignore:prompt 1 has .* tokens, more than the:UserWarning")


def words(count: int) -> str:
    return " ".join(f"w{3 + i * i % 87}" for i in range(count))


@given(
    length=st.integers(1, 140),
    new=st.none() | st.integers(1, 126),
    truncation=st.builds(Truncation, limit=st.none() | st.integers(1, 130), side=st.sampled_from(["left", "right"])),
)
@budget(max_examples=60, deadline=None)
def test_select_reports_what_generate_uses(
    llama: nn.Module, adapters: Path, length: int, new: int | None, truncation: Truncation
) -> None:
    logo = engine(llama, adapters, prefix_cache_gb=0.0)
    logo.prompts.truncation = truncation
    prompt = words(length)
    used = logo.generate(prompt, max_new_tokens=new, eos_token_id=list(range(96))).selection
    assert logo.select(prompt, max_new_tokens=new) == used
    [answer] = Answering(logo, OwnSelector(), Task("x"), eos_token_id=list(range(96))).generate(
        [prompt], max_new_tokens=new or 64, batch_size=1
    )
    assert answer.selection == used  # 64 of 128 are what an answer has where nobody says how many


def test_select_refuses_what_generate_refuses(llama: nn.Module, adapters: Path) -> None:
    logo = engine(llama, adapters)
    for new, message in ((128, "the model's context holds 128 tokens"), (0, "expected 1 or more, found 0")):
        for ask in (logo.select, logo.generate):
            with pytest.raises(UsageError, match=message):
                ask(PROMPTS[0], max_new_tokens=new)


def test_the_commands_cut_long_prompts_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny.model("llama")
    base.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    for i in range(5):
        write_adapter(tmp_path / "pool" / f"t{i}", base, ("q_proj",), rank=2, seed=i)
    ask = [words(120), "--base-model", str(tmp_path / "model"), "--adapters", str(tmp_path / "pool"), "-k", "5"]
    ask += ["--signal", "norm", "--device", "cpu", "--json"]

    def scores(command: str, *options: str) -> dict[str, float]:
        assert run([command, *ask, *options]) == 0
        found: dict[str, float] = json.loads(capsys.readouterr().out)["scores"]
        return found

    for options in ((), ("--max-new-tokens", "100")):
        assert scores("select", *options) == scores("generate", *options)
    assert scores("select") != scores("select", "--max-new-tokens", "100")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperatur": 3}, "unknown generation option 'temperatur' (did you mean 'temperature'?)"),
        ({"max_tokens": 1}, "generation option 'max_tokens' cannot be used here: give 'max_new_tokens' instead"),
        ({"max_length": 9}, "generation option 'max_length' cannot be used here: give 'max_new_tokens'"),
        ({"min_length": 9}, "generation option 'min_length' cannot be used here: give 'min_new_tokens'"),
        ({"input_ids": []}, "unknown generation option 'input_ids'"),
        ({"_from_model_config": True}, "unknown generation option '_from_model_config'"),
        ({"do_sample": True, "temperature": 0.0}, "temperature: expected a number above 0, found 0.0"),
        ({"do_sample": True, "top_p": 2.0}, "top_p: expected a number above 0 and at most 1, found 2.0"),
        ({"do_sample": True, "top_k": -1}, "top_k: expected a whole number above 0, or 0 for all tokens, found -1"),
        ({"do_sample": True, "min_p": 2.0}, "min_p: expected a number from 0 to 1, found 2.0"),
        ({"num_beams": 0}, "num_beams: expected a whole number above 0, found 0"),
        ({"num_beams": 2.5}, "num_beams: expected a whole number above 0, found 2.5"),
        ({"num_return_sequences": 2}, "num_return_sequences: expected 1 (repeat the prompt to get several answers)"),
        ({"eos_token_id": "x"}, "eos_token_id: expected a token id or a list of token ids, found 'x'"),
        ({"cache_implementation": "foo"}, "generation options: transformers refuses them: Invalid `cache_implementat"),
        ({"suppress_tokens": 5}, "generation options: transformers refuses them: 'int' object is not iterable"),
        ({"token_healing": True}, "token_healing: expected False, since prompts are read as they are, found True"),
        ({"prompt_lookup_num_tokens": 0}, "prompt_lookup_num_tokens: expected a whole number above 0, found 0"),
        ({"stop_strings": [5]}, "stop_strings: expected a text or a list of texts, found [5]"),
        ({"stop": [5]}, "stop: expected a text or a list of texts, found [5]"),
        ({"stop_at_newline": "Official"}, "stop_at_newline: expected True, False or 'official', found 'Official'"),
        ({"bad_words_ids": 5}, "bad_words_ids: expected a list of lists of token ids, found 5"),
        ({"bad_words_ids": [5]}, "bad_words_ids: expected a list of lists of token ids, found [5]"),
        ({"guidance_scale": "x"}, "guidance_scale: expected a number, found 'x'"),
        ({"max_time": 0}, "max_time: expected a number of seconds above 0, found 0"),
        ({"repetition_penalty": "1"}, "repetition_penalty: expected a number above 0, found '1'"),
    ],
    ids=lambda value: "".join(value) if isinstance(value, dict) else "",
)
def test_options_that_cannot_be_used_are_refused(
    llama: nn.Module, adapters: Path, options: dict[str, Any], message: str
) -> None:
    logo = engine(llama, adapters)
    for ask in (logo.generate, logo.stream):
        with pytest.raises(UsageError) as refused:
            ask(PROMPTS[0], **options)
        assert message in str(refused.value)


def test_a_stream_refuses_what_generate_refuses(llama: nn.Module, adapters: Path) -> None:
    with pytest.raises(UsageError, match="stop: expected a text or a list of texts"):
        engine(llama, adapters).stream(PROMPTS[0], stop=3)  # type: ignore[arg-type]


def test_prompt_lookup_answers_one_prompt_after_the_other(llama: nn.Module, adapters: Path) -> None:
    logo = engine(llama, adapters)
    found = logo.generate(PROMPTS, max_new_tokens=5, prompt_lookup_num_tokens=2)
    assert [one.token_ids for one in found] == [one.token_ids for one in logo.generate(PROMPTS, max_new_tokens=5)]


def test_every_option_of_transformers_passes(llama: nn.Module, adapters: Path) -> None:
    options = {"do_sample": True, "temperature": 0.5, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.9, "use_cache": True}
    logo = engine(llama, adapters)
    assert len(logo.generate(PROMPTS[0], max_new_tokens=3, min_new_tokens=3, **options).token_ids) == 3
    assert logo.prompts.generation_config(None, 3, {"length_penalty": 2.0}).length_penalty == 2.0


@pytest.mark.parametrize("option", ["--temperature", "--top-p"])
def test_sampling_options_without_sampling_are_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", "hello", option, "0.5"]) == 2
    assert capsys.readouterr().err == (
        f"logo: error: {option} 0.5 is only for sampling; add --sample or leave it out\n"
    )


def test_a_text_that_begins_already_does_not_begin_twice(llama: nn.Module, adapters: Path) -> None:
    logo = engine(llama, adapters)
    plain = logo.prompts.encode([PROMPTS[0]])
    begun = f"<s> {PROMPTS[0]}"
    assert plain[0][0] == 0 and plain[0].count(0) == 1
    assert logo.prompts.encode([begun]) == plain == logo.prompts.texts([begun])
    assert logo.prompts.encode([f"<s> {begun}"]) == [[0, *plain[0]]]  # as it is
    assert logo.select(begun) == logo.select(PROMPTS[0])
    one, other = (logo.generate(prompt, max_new_tokens=6) for prompt in (begun, PROMPTS[0]))
    assert one.token_ids == other.token_ids
    assert logo.score(begun, "w9", [{}]) == logo.score(PROMPTS[0], "w9", [{}])
    assert chat(logo.tokenizer, [{"role": "user", "content": begun}]).ids == tuple(plain[0])
    bare = engine(llama, adapters, bos=False)
    assert bare.prompts.encode([begun]) == plain  # nobody adds anything


def test_only_what_begins_every_text_stays_in_front_of_a_cut_prompt() -> None:
    made = tokenizer()
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    turn = made.convert_tokens_to_ids("<|im_start|>")
    chatted = [turn, 5, 6, turn, 7, 8, 9]
    assert cut_left(made, [0, 5, 6, 7, 8], 3) == [0, 7, 8]
    assert cut_left(made, chatted, 4) == [turn, 7, 8, 9] and cut_left(made, chatted, 3) == [7, 8, 9]
    bare = tokenizer(bos=False)  # adds nothing, but a chat template may
    assert cut_left(bare, [0, 5, 6, 7, 8], 3) == [0, 7, 8]
    bare.bos_token = "w5"  # as in models whose turns begin with it
    five = bare.bos_token_id
    assert cut_left(bare, [five, 6, five, 7, 8, 9], 3) == [7, 8, 9]


def test_calibration_begins_once_too(llama: nn.Module, adapters: Path) -> None:
    """Texts of a calibration are read as prompts are."""
    pool = AdapterPool.from_directory(adapters)
    texts = [f"w{i} w{i + 1}" for i in range(3, 20)]
    one, other = (
        LoGo(
            llama,
            tokenizer(),
            pool,
            settings=SelectionSettings(
                signal="calibrated", k=2, calibration_prompts=[begin + t for t in texts], cache=""
            ),
        ).select(PROMPTS[0])
        for begin in ("", "<s> ")
    )
    assert one == other
