"""One prompt, one reading of it: cut in the same place, begun once, and asked for with options that exist."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st
from torch import nn

import tiny
from logo import Truncation, UsageError
from logo.cli.app import run
from logo.decoding import call_config
from logo.prompts import chat, cut_left
from test_engine import PROMPTS, engine, ids_of, tokenizer, write_adapter

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
    logo = engine(llama, adapters, truncation=truncation)
    prompt = words(length)
    used = logo.generate(prompt, max_new_tokens=new, eos_token_id=list(range(96))).selection
    assert logo.select(prompt, max_new_tokens=new) == used
    assert logo.select(prompt, max_new_tokens=new or 64) == used  # half of the context where nobody says how many


def test_select_and_generate_cut_long_prompts_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny.model("llama")
    base.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    for i in range(5):
        write_adapter(tmp_path / "pool" / f"t{i}", base, ("q_proj",), rank=2, seed=i)
    ask = [words(120), "--base-model", str(tmp_path / "model"), "--adapters", str(tmp_path / "pool"), "-k", "5"]
    ask += ["--signal", "norm", "--device", "cpu", "--json"]

    def scores(command: str) -> dict[str, float]:
        assert run([command, *ask]) == 0
        found: dict[str, float] = json.loads(capsys.readouterr().out)["scores"]
        return found

    assert scores("select") == scores("generate")


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
        ({"num_beams": 0}, "num_beams: expected a number above 0, found 0"),
        ({"num_beams": 2, "num_return_sequences": 2}, "with one answer per prompt, found beam_search with 2"),
        ({"prompt_lookup_num_tokens": 3}, "greedy decoding, sampling or beam search .* found assisted_generation"),
        ({"cache_implementation": "foo"}, "generation options: transformers refuses them: Invalid `cache_implementat"),
        ({"suppress_tokens": 5}, "generation options: transformers refuses them: 'int' object is not iterable"),
        ({"stop": [5]}, "stop: expected a text or a list of texts, found [5]"),
        ({"stop_at_newline": "Official"}, "stop_at_newline: expected True, False or 'official', found 'Official'"),
        ({"max_time": 0}, "max_time: expected a number above 0, found 0"),
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
        assert message in str(refused.value) or re.search(message, str(refused.value))


def test_every_option_of_transformers_passes(llama: nn.Module, adapters: Path) -> None:
    options = {"do_sample": True, "temperature": 0.5, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.9, "use_cache": True}
    logo = engine(llama, adapters)
    assert len(logo.generate(PROMPTS[0], max_new_tokens=3, min_new_tokens=3, **options).token_ids) == 3
    assert call_config(logo.prompts, None, {"length_penalty": 2.0}).length_penalty == 2.0


def test_a_text_that_begins_already_does_not_begin_twice(llama: nn.Module, adapters: Path) -> None:
    logo = engine(llama, adapters)
    plain = ids_of(logo, [PROMPTS[0]])
    begun = f"<s> {PROMPTS[0]}"
    assert plain[0][0] == 0 and plain[0].count(0) == 1
    assert ids_of(logo, [begun]) == plain == logo.prompts.texts([begun])
    assert ids_of(logo, [f"<s> {begun}"]) == [[0, *plain[0]]]  # as it is
    assert logo.select(begun) == logo.select(PROMPTS[0])
    one, other = (logo.generate(prompt, max_new_tokens=6) for prompt in (begun, PROMPTS[0]))
    assert one.token_ids == other.token_ids
    assert logo.score(begun, "w9", [{}]) == logo.score(PROMPTS[0], "w9", [{}])
    assert chat(logo.tokenizer, [{"role": "user", "content": begun}]).ids == tuple(plain[0])
    bare = engine(llama, adapters, bos=False)
    assert ids_of(bare, [begun]) == plain  # nobody adds anything


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
