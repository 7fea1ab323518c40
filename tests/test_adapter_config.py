"""`adapter_config.json`: PEFT's own ranks and scales, and one line about whatever cannot be used."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from logo.adapters.adapter import open_adapter
from logo.adapters.peft import LoraConfig, Refusal, parse_config, read_raw
from logo.errors import AdapterError
from make_adapters import CONFIG, calm, edit_config, load_peft, lora_layers, settings, write_peft

FIELDS = [field.name for field in dataclasses.fields(peft.LoraConfig)]

MODULES = [
    *(f"model.layers.{i}.{name}" for i in (0, 1, 2, 10) for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up")),
    "lm_head",
]
# Overlapping on purpose: which of two matching keys wins depends on their order.
KEYS = st.sampled_from(
    [
        *("q_proj", "v_proj", "proj", "self_attn.q_proj", "layers.0.self_attn.q_proj", "layers.1.self_attn.v_proj"),
        *("model.layers.1.self_attn.q_proj", ".*", r".*\.v_proj", "q_proj|v_proj", "(q|v)_proj", ".*_proj"),
        *(
            r"layers\.[01]\..*",
            r"layers\.\d+\.self_attn\.(q|v)_proj",
            "^model.layers.1.*",
            "^layers.0.*",
            "1.*",
            "lm_head",
        ),
    ]
)


def patterns(values: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Objects of up to four keys, in any order."""
    return st.lists(st.tuples(KEYS, values), max_size=4, unique_by=lambda item: item[0]).map(dict)


RANKS, ALPHAS = patterns(st.integers(1, 6)), patterns(st.integers(1, 64) | st.floats(0.5, 64))

# Anything JSON can say.
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def one_line(error: BaseException) -> str:
    text = str(error)
    assert text and len(text.splitlines()) == 1, text
    return text


# ---- patterns -------------------------------------------------------------------------------------------------------


@calm
@given(RANKS, ALPHAS, st.sampled_from(MODULES), st.booleans())
def test_patterns_are_looked_up_as_peft_does(
    ranks: dict[str, int], alphas: dict[str, float], module: str, rslora: bool
) -> None:
    config = parse_config(settings(rank_pattern=ranks, alpha_pattern=alphas, use_rslora=rslora))
    rank = ranks.get(get_pattern_key(list(ranks), module), 4)
    alpha = alphas.get(get_pattern_key(list(alphas), module), 8)
    assert config.rank(module) == rank
    assert config.scaling(module, rank) == (alpha / math.sqrt(rank) if rslora else alpha / rank)


@budget(calm, max_examples=20)
@given(RANKS, ALPHAS, st.integers(1, 5), st.integers(1, 20), st.booleans())
def test_ranks_and_scales_are_those_of_the_loaded_peft_model(
    tmp_path_factory: pytest.TempPathFactory,
    ranks: dict[str, int],
    alphas: dict[str, float],
    r: int,
    alpha: int,
    rslora: bool,
) -> None:
    folder = tmp_path_factory.mktemp("patterns") / "adapter"
    write_peft(folder, r=r, lora_alpha=alpha, rank_pattern=ranks, alpha_pattern=alphas, use_rslora=rslora)
    edit_config(folder, rank_pattern=ranks, alpha_pattern=alphas)  # PEFT saves them sorted by key
    expected = {p: (m.r["default"], m.scaling["default"]) for p, m in lora_layers(load_peft(folder)).items()}
    assert {p: (m.rank, m.scaling) for p, m in open_adapter(folder).modules.items()} == expected
    assert len(expected) == 6


def test_a_rank_pattern_that_lost_its_order_when_peft_saved_it_is_refused(tmp_path: Path) -> None:
    write_peft(tmp_path, rank_pattern={"q_proj": 3, ".*": 2})  # on disk: ".*" first, so PEFT cannot load it either
    with pytest.raises(AdapterError, match=r"gives rank 2 to module .*q_proj, but its tensors have rank 3"):
        open_adapter(tmp_path)
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_peft(tmp_path)
    edit_config(tmp_path, rank_pattern={"q_proj": 3, ".*": 2})
    assert open_adapter(tmp_path).ranks == (2, 3)


# ---- which settings are known ---------------------------------------------------------------------------------------


def test_every_setting_of_the_installed_peft_is_known() -> None:
    assert parse_config(dict.fromkeys(FIELDS) | settings(bias="none")).unknown == ()


@calm
@given(st.dictionaries(st.text(max_size=8), JSON, max_size=4))
def test_unknown_settings_are_listed_and_change_nothing(extra: dict[str, Any]) -> None:
    extra = {key: value for key, value in extra.items() if key not in FIELDS}
    config = parse_config(extra | settings())
    assert config.unknown == tuple(sorted(extra))
    assert dataclasses.replace(config, unknown=()) == parse_config(settings())


@pytest.mark.parametrize(
    "key",
    ["use_qalora", "target_parameters", "trainable_token_indices", "layer_replication", "kasa_config", "lora_bias"],
)
@pytest.mark.parametrize("off", [None, False, []])
def test_a_setting_that_is_off_is_no_reason_to_refuse(key: str, off: object) -> None:
    assert parse_config(settings(**{key: off})) == parse_config(settings())


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "PiSSA", "olora", "corda", "lora_ga"])
def test_initialisations_that_change_the_base_are_refused_with_the_way_out(init: str) -> None:
    with pytest.raises(Refusal, match=f"{init}.*path_initial_model_for_weight_conversion"):
        parse_config(settings(init_lora_weights=init))


@pytest.mark.parametrize("unconverted", [False, True])
def test_loftq_is_refused_also_for_a_conversion(unconverted: bool) -> None:
    with pytest.raises(Refusal, match=r'init_lora_weights is "loftq".*quantised') as refusal:
        parse_config(settings(init_lora_weights="loftq"), unconverted=unconverted)
    assert "--initial" not in one_line(refusal.value)


# ---- odd values -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"r": "4"}, 'r must be a positive whole number, found "4"'),
        ({"r": True}, "r must be a positive whole number, found true"),
        ({"r": 4.5}, "r must be a positive whole number, found 4.5"),
        ({"lora_alpha": "16"}, 'lora_alpha must be a finite number, found "16"'),
        ({"lora_alpha": math.nan}, "lora_alpha must be a finite number, found NaN"),
        ({"lora_alpha": 10**400}, "lora_alpha must be a finite number, found 1000"),
        ({"rank_pattern": ["q_proj"]}, 'rank_pattern must be an object of pattern: number, found ["q_proj"]'),
        ({"rank_pattern": {"q_proj": -1}}, "rank_pattern must be a positive whole number, found -1"),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern must be a finite number, found null"),
        ({"rank_pattern": {"q_(proj": 2}}, 'rank_pattern has the key "q_(proj", which is no regular expression'),
        ({"alpha_pattern": {"(?i)q_proj": 2}}, 'alpha_pattern has the key "(?i)q_proj", which is no regular'),
        ({"use_rslora": "false"}, 'use_rslora must be true or false, found "false"'),
        ({"peft_type": None}, 'peft_type is null; only "LORA"'),
        ({"peft_type": "lora"}, 'peft_type is "lora"; only "LORA"'),
        ({"bias": ["x" * 1000]}, "bias is"),
    ],
)
def test_a_value_that_cannot_be_used_is_shown_with_what_was_expected(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(Refusal) as refusal:
        parse_config(settings(**changes))
    assert one_line(refusal.value).startswith(reason)
    assert len(str(refusal.value)) < 250


@pytest.mark.parametrize(
    "changes",
    [
        {"rank_pattern": None, "alpha_pattern": None},
        {"target_modules": None},
        {"use_rslora": None},
        {"base_model_name_or_path": {"no": "name"}},
    ],
)
def test_what_says_nothing_about_the_mixture_may_be_anything(changes: dict[str, Any]) -> None:
    assert parse_config(settings(**changes)) == LoraConfig(r=4, alpha=8.0)


@budget(calm, max_examples=300)
@given(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4))
def test_any_values_give_a_config_or_one_line(changes: dict[str, Any]) -> None:
    try:
        config = parse_config(settings() | changes)
    except Refusal as refusal:
        one_line(refusal)
    else:
        assert config.rank("model.layers.0.self_attn.q_proj") > 0
        assert math.isfinite(config.scaling("model.layers.0.self_attn.q_proj", 4))


# ---- the file -------------------------------------------------------------------------------------------------------


@calm
@given(content=st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_file_gives_a_config_or_one_line(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.getbasetemp() / "any_config"
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_bytes(content)
    with pytest.raises(Refusal) as refusal:  # none of these says "LORA"
        parse_config(read_raw(folder))
    one_line(refusal.value)


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"r": ' + "9" * 5000 + "}", "[" * 100_000],
    ids=["empty", "list", "endless number", "endless nesting"],
)
def test_a_malformed_file_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / CONFIG).write_text(text)
    with pytest.raises(Refusal, match=r"is not valid JSON|must hold an object") as refusal:
        parse_config(read_raw(tmp_path))
    assert CONFIG in one_line(refusal.value)
