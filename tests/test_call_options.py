"""Options of selection in one call: they act as in an engine that was made with them, on the same model and index."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import GenerationConfig

import tiny
from logo import AdapterPool, LoGo, PoolError, Selection, SelectionSettings, UsageError
from logo.core import AnswerOptions, Prompt
from logo.errors import LoGoError, NotFinite
from logo.opening import LOCAL_OPTIONS
from logo.selection.selector import RESPONSES
from logo.selection.settings import OPTIONS
from test_calibrated import PROMPTS, tokenizer
from test_engine import ids_of, write_adapter
from tiny import LONG
from tolerances import same_scores, same_selection

NAMES = tuple(f"t{i}" for i in range(6))
SIGNALS = ["norm", "entropy", "calibrated"]
SHAPE = {"num_hidden_layers": 6, **LONG}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("pool")
    model = tiny.model("llama", **SHAPE)
    for i, name in enumerate(NAMES):
        write_adapter(made / name, model, ("q_proj", "v_proj") if i % 2 else ("q_proj", "o_proj"), rank=1 + i, seed=i)
    return made


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny.model("llama", **SHAPE)


def engine(model: nn.Module, folder: Path, names: Any = NAMES, **chosen: Any) -> LoGo:
    pool = AdapterPool.open(folder).subset(names)
    own = {name: chosen.pop(name) for name in LOCAL_OPTIONS if name in chosen}
    settings = SelectionSettings.of(**{"signal": "norm", "cache": "", **chosen})
    return LoGo(model, tokenizer(), pool, settings=settings, **own)


@pytest.fixture(scope="module")
def logo(model: nn.Module, folder: Path) -> LoGo:
    """One engine for all tests of this file, asked for whatever they like in whatever order."""
    return engine(model, folder, k=3)


LINEAR = {"signal": "calibrated", "weighting": "linear", "k": 6}
UNSURE = {"signal": "calibrated", "prior": 0.001, "when_unsure": "base"}


@pytest.mark.slow
@pytest.mark.parametrize("options", [*({"signal": signal} for signal in SIGNALS), {"k": 1}, LINEAR, UNSURE], ids=str)
@pytest.mark.parametrize("own", ["norm", "calibrated"])
def test_a_call_is_answered_as_by_an_engine_made_so(
    own: str, options: dict[str, Any], logo: LoGo, model: nn.Module, folder: Path
) -> None:
    asked = logo if own == "norm" else engine(model, folder, k=3, signal=own)
    wanted = {"signal": own, **options}
    made = engine(model, folder, **{"k": 3, **wanted})
    usual = asked.select(PROMPTS)
    for found, expected in zip(asked.select(PROMPTS, **options), made.select(PROMPTS), strict=True):
        same_selection(found, expected)
    assert asked.select(PROMPTS) == usual  # and nothing of it stays
    answer, expected_answer = (e.generate(PROMPTS[0], max_new_tokens=6, **o) for e, o in ((asked, options), (made, {})))
    assert answer.token_ids == expected_answer.token_ids
    streams = [list(e.stream(PROMPTS[0], max_new_tokens=6, **o)) for e, o in ((asked, options), (made, {}))]
    assert streams[0] == streams[1] != []
    [scored] = asked.score(PROMPTS[0], " w5 w6", [None], **options)
    [expected_scored] = made.score(PROMPTS[0], " w5 w6", [expected_answer.selection])
    assert scored.nll == same_scores(expected_scored.nll)


@pytest.mark.slow
@settings(max_examples=40)
@given(
    names=st.sets(st.sampled_from(NAMES), min_size=1),
    signal=st.sampled_from(["norm", "entropy"]),
    k=st.integers(1, 6),
    prompt=st.sampled_from(PROMPTS),
)
def test_candidates_are_a_pool_of_their_own(
    logo: LoGo, model: nn.Module, folder: Path, names: set[str], signal: str, k: int, prompt: str
) -> None:
    """For signals that compare no adapter with another; a k above their number means all of them."""
    k = min(k, len(names))
    alone = engine(model, folder, names, signal=signal, k=k)
    same_selection(logo.select(prompt, signal=signal, k=k, candidates=names), alone.select(prompt))
    few = min(3, len(names))
    assert len(logo.select(prompt, signal=signal, candidates=list(names)).adapters) == few


@pytest.mark.slow
@settings(max_examples=20)
@given(names=st.sets(st.sampled_from(NAMES), min_size=1), prompt=st.sampled_from(PROMPTS))
def test_calibrated_candidates_keep_their_scores(logo: LoGo, names: set[str], prompt: str) -> None:
    """Points, least spread, excess and trust are those of the whole pool; choice and confidence are theirs alone."""
    every = logo.select(prompt, signal="calibrated").scores
    found = logo.select(prompt, signal="calibrated", candidates=names)
    assert found.scores == same_scores({name: every[name] for name in every if name in names})
    same_selection(found, logo.reselect(every, signal="calibrated", candidates=names))
    best = sorted(names, key=lambda name: (-every[name], name))
    assert list(found.adapters) == best[: len(found.adapters)] and len(found.adapters) <= 3
    assert found.confidence == pytest.approx(RESPONSES.confidence([every[name] for name in best]), rel=1e-4)


def test_default_k_is_of_the_candidates(model: nn.Module, folder: Path) -> None:
    logo = engine(model, folder)
    assert len(logo.select(PROMPTS[0]).adapters) == 6
    assert len(logo.select(PROMPTS[0], candidates="t4").adapters) == 1
    with pytest.warns(UserWarning, match="k is 4 but the pool has 2 adapters"):
        assert len(logo.select(PROMPTS[0], k=4, candidates=["t1", "t5"]).adapters) == 2


def test_each_row_may_ask_for_its_own(logo: LoGo) -> None:
    rows = ids_of(logo, PROMPTS)
    options: list[dict[str, Any]] = [
        {},
        {"signal": "calibrated"},
        {"k": 1, "candidates": ["t0", "t3"]},
        {"signal": "calibrated", "candidates": ["t2"]},
        {"signal": "entropy", "weighting": "linear"},
    ]
    prompts = [Prompt.of_ids(row) for row in rows]
    together = logo.outcomes(prompts, [logo.options(**one) for one in options])
    for row, one, found in zip(rows, options, together, strict=True):
        assert isinstance(found, Selection)
        same_selection(found, logo.select(row, **one))


def test_forced_adapters_have_to_be_candidates(logo: LoGo) -> None:
    forced = {"t1": 0.5, "t2": 1.0}
    allowed = logo.generate(PROMPTS[0], adapters=forced, candidates=["t1", "t2", "t5"], max_new_tokens=4)
    assert allowed.token_ids == logo.generate(PROMPTS[0], adapters=forced, max_new_tokens=4).token_ids
    for call in (
        lambda: logo.generate(PROMPTS[0], adapters=forced, candidates=["t1", "t5"]),
        lambda: logo.generate(PROMPTS[:2], adapters=[None, forced], candidates=["t1", "t5"]),
        lambda: list(logo.stream(PROMPTS[0], adapters=forced, candidates=["t1", "t5"])),
        lambda: logo.score(PROMPTS[0], " w5", [forced], candidates=["t1", "t5"]),
    ):
        with pytest.raises(PoolError, match="no adapter 't2' among the 2 candidates") as caught:
            call()
        assert not any(name in str(caught.value) for name in ("t0", "t3", "t4"))


def test_an_overflow_of_others_is_none_of_a_candidates_business(model: nn.Module, folder: Path) -> None:
    logo = engine(model, folder, k=2)
    logo.calibrate()
    [index] = logo.scorer.indices
    index.stacked[index.rows[NAMES.index("t3")]] = torch.inf
    with pytest.raises(NotFinite, match="'t3'"):
        logo.select(PROMPTS[0])
    with pytest.raises(NotFinite, match="'t3'"):
        logo.select(PROMPTS[0], candidates=["t3", "t4"])
    expected = engine(model, folder, k=2).select(PROMPTS[0], candidates=["t1", "t4"])
    same_selection(logo.select(PROMPTS[0], candidates=["t1", "t4"]), expected)


def test_unscorable_candidates(model: nn.Module, folder: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "odd", model, ("down_proj",), rank=2, seed=3)
    logo = engine(model, folder, k=2, unscorable="skip")
    logo.pool.add(tmp_path / "odd")
    assert set(logo.select(PROMPTS[0], candidates=["odd", "t1"]).scores) == {"t1"}
    with pytest.raises(PoolError, match="none of the 1 candidates touches what the signal 'norm' reads"):
        logo.select(PROMPTS[0], candidates=["odd"])
    assert "odd" in logo.select(PROMPTS[0], signal="calibrated", candidates=["odd"]).scores
    strict = replace(logo.settings, unscorable="error", signal="calibrated")
    other = LoGo(model, tokenizer(), logo.pool, settings=strict)
    expected = other.select(PROMPTS[0])
    with pytest.raises(PoolError, match="cannot be scored: odd"):
        other.select(PROMPTS[0], signal="norm")
    assert other.select(PROMPTS[0]) == expected


WHOLE = "expected a whole number, found"
FORCED = r"expected \{name: weight\}"


def test_options_that_cannot_be_used_are_told_in_a_line(logo: LoGo) -> None:
    for options, error, message in (
        ({"signal": "nrom"}, UsageError, "unknown signal 'nrom' .did you mean 'norm'"),
        ({"signal": ["norm"]}, UsageError, "signal: expected the name of a s"),
        ({"k": 0}, UsageError, r"\(k\): expected 1 or more, found 0"),
        ({"k": True}, UsageError, f"k: {WHOLE} True"),
        ({"weighting": "sharp"}, UsageError, "weighting: expected one of linear, adaptive"),
        ({"weighting": "adaptive"}, UsageError, "the signal 'norm' has no scale of its own"),
        ({"prior": 1}, UsageError, "prior: expected a probability between 0 and 1, found 1"),
        ({"when_unsure": "ask"}, UsageError, "when_unsure: expected one of mix, base, refuse, found 'ask'"),
        ({"when_unsure": "base"}, UsageError, "when_unsure 'base': the signal 'norm' does not say how sure it is"),
        ({"candidates": []}, UsageError, "candidates: expected one adapter or more, found none"),
        ({"candidates": 5}, UsageError, "candidates: expected names of ada"),
        ({"candidates": ["t1", "t7"]}, PoolError, "no adapter 't7' in the pool of 6"),
    ):
        expected = logo.select(PROMPTS[0])
        for call in (logo.select, logo.generate, logo.stream, lambda p, **o: logo.score(p, " w5", [None], **o)):
            with pytest.raises(error, match=message) as found:
                call(PROMPTS[0], **options)
            assert "\n" not in str(found.value)
        assert logo.select(PROMPTS[0]) == expected


def test_arguments_that_cannot_be_used_are_told_in_a_line(logo: LoGo) -> None:
    for call, arguments, options, message in (
        *((call, (5,), {}, "expected a string, a list of messages") for call in ("select", "generate", "stream")),
        ("stream", ("w3",), {"max_new_tokens": "5"}, f"max_new_tokens: {WHOLE} '5'"),
        ("select", ("w3",), {"batch_size": "8"}, "batch_size: expected a whole number, 1 or more, found '8'"),
        ("select", ("w3",), {"max_new_tokens": 0}, "max_new_tokens: expected 1 or more, found 0"),
        ("select", ("w3",), {"candidate": ["t1"]}, r"unknown option 'candidate' .did you mean 'candidates'"),
        (
            "generate",
            ("w3",),
            {"candidate": ["t1"]},
            r"unknown generation option 'candidate' .did you mean 'candidates'",
        ),
        (
            "stream",
            ("w3",),
            {"stop_at_newlines": True},
            r"unknown .* 'stop_at_newlines' .did you mean 'stop_at_newline'",
        ),
        ("generate", ("w3",), {"adapters": "t1"}, f"adapters: {FORCED}, a Selection, or a list .*, found 't1'"),
        ("generate", (["w3"],), {"adapters": ["t1"]}, f"adapters: {FORCED} or a Selection, found 't1'"),
        ("generate", ("w3",), {"adapters": {"t1": float("nan")}}, "expected a number between -1e6 and 1e6"),
        ("generate", (["w3", "w4"],), {"adapters": [{}]}, "expected one entry for each of 2 prompts, found 1"),
        ("generate", ("w3",), {"adapters": {5: 1.0}}, "no adapter 5 in the pool"),
        ("generate", ("w3",), {"adapters": {"t1": 1.0}, "k": 2}, "k selects adapters, but"),
        ("generate", ("w3",), {"adapters": {"t1": 1.0}, "prior": 0.5}, "prior selects adapters, but"),
        ("generate", (Prompt((1, 5), ()),), {}, "prompt 1: expected a token or more to be probed, found none; Prompt"),
        ("select", (Prompt((1, -5), (1,)),), {}, "prompt 1: expected token ids from 0 to 95, which the .*, found -5"),
        ("generate", ("w3",), {"stop": 5}, "stop: expected a text or a list of texts, found 5"),
        ("generate", ("w3",), {"generation_config": {"top_k": 3}}, "generation_config: expected a transf"),
        ("score", (["w3"], "w4", [{}]), {}, "expected one prompt, found a list of texts"),
        ("score", ("w3", "w4", {"t1": 1.0}), {}, r"mixtures: expected a list of mixtures, found \{'t1': 1.0\}"),
        ("save_mixture", ("t1", "nowhere"), {}, f"adapters: {FORCED} or a Selection, found 't1'"),
        ("from_pretrained", ("demo",), {"k": "3"}, f"k: {WHOLE} '3'"),
        ("from_pretrained", (5,), {}, "base_model: expected a Hub id, a folder or a short name, found 5"),
        ("from_pretrained", ("demo", ["x", 5]), {}, "pool: expected a folder, a manifest or a Hub .* found 5"),
        ("from_pretrained", ("demo",), {"device": None}, "device None: expected 'auto', 'cpu'"),
        ("from_pretrained", ("demo",), {"device": "cpu", "prefix_cache_gb": -1}, "prefix_cache_gb: expected gigabytes"),
        ("from_pretrained", ("demo",), {"device": "cpu", "adapter_memory_gb": "1"}, "adapter_memory_gb: expected a nu"),
    ):
        with pytest.raises(LoGoError, match=message) as found:
            getattr(logo, call)(*arguments, **options)
        assert "\n" not in str(found.value)


def test_a_pool_is_opened_before_an_engine_is_made_of_it(logo: LoGo) -> None:
    with pytest.raises(UsageError, match=r"pool: expected an AdapterPool, .* found 'adapter"):
        LoGo(logo.model, logo.tokenizer, "adapters/")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"settings: expected a SelectionSettings, such as .*, found \{'k': 3\}"):
        LoGo(logo.model, logo.tokenizer, logo.pool, settings={"k": 3})  # type: ignore[arg-type]


def test_signatures_list_the_options_of_a_call() -> None:
    for call in (LoGo.generate, LoGo.stream):
        assert inspect.signature(call).parameters["options"].annotation == "Unpack[AnswerOptions]"
    ours = {*OPTIONS, "generation_config", "stop", "stop_at_newline"}
    assert all(f"`{name}`" in (LoGo.generate.__doc__ or "") for name in {*ours, "max_new_tokens"})
    assert ours < AnswerOptions.__optional_keys__
    assert AnswerOptions.__optional_keys__ - ours <= vars(GenerationConfig()).keys()
    for call in (LoGo.select, LoGo.score, LoGo.reselect, LoGo.options):
        assert inspect.signature(call).parameters["options"].annotation == "Unpack[CallOptions]"


def test_a_selection_is_chosen_again_from_its_own_signals_scores(logo: LoGo) -> None:
    """The engine's own is another, so what it makes of these scores would not be theirs."""
    for signal in ("calibrated", "norm"):
        made = logo.select(PROMPTS[0], signal=signal)
        assert made.signal == signal
        for named in ({}, {"signal": signal}):
            assert logo.reselect(made, **named) == made
            fewer = logo.reselect(made, k=1, candidates=NAMES[:4], **named)
            assert fewer == logo.select(PROMPTS[0], signal=signal, k=1, candidates=NAMES[:4])
        assert logo.reselect(made.scores, signal=signal) == made  # scores alone do not say whose they are
        with pytest.raises(UsageError, match=f"signal 'entropy': the selection has the scores of '{signal}'"):
            logo.reselect(made, signal="entropy")
    three = logo.select(PROMPTS[0], candidates=NAMES[:3])
    with pytest.raises(PoolError, match=r"expected the score of a candidate, found those of 3 .*: select again"):
        logo.reselect(three, candidates=NAMES[3:])
    with pytest.raises(UsageError, match="adapters: expected names with a number as the weight of each, found"):
        Selection.forced(["t1"])  # type: ignore[arg-type]
    # Adapters that are not there were selected as if they were.
    scores = {"nope": 3.0, "nada": 1.0}
    for unknown in (scores, Selection(("t1",), (1.0,), {**scores, "t1": 2.0}, None, "norm")):
        with pytest.raises(PoolError, match="expected scores of adapters in the pool, found those of 'nope', 'nada'"):
            logo.reselect(unknown)
    for nothing in (Selection.forced({"t1": 1.0}), {}):
        with pytest.raises(UsageError, match="expected the scores of a selection, found none; a forced selection has"):
            logo.reselect(nothing)


def test_a_context_that_is_not_the_bases_goes_with_raw_signals_only(model: nn.Module, folder: Path) -> None:
    logo = engine(model, folder, k=2, probe_context="carry")
    with pytest.raises(UsageError, match="the signal 'calibrated' compares with neutral text"):
        logo.select(PROMPTS[0], signal="calibrated")
    found = logo.select(PROMPTS, candidates=["t0", "t1", "t2"])
    assert all(set(one.adapters) <= {"t0", "t1", "t2"} for one in found)


def test_a_batch_that_fails_leaves_nothing_for_the_next_probe(model: nn.Module, folder: Path) -> None:
    """Each row is probed with the adapters of the one before, whether its batch is tried again in halves or in ones."""
    logo = engine(model, folder, k=1, probe_context="carry")
    prompts = [f"w{i} w{i + 3} w{2 * i}" for i in range(3, 9)]
    expected = [one.selection for one in logo.generate(prompts, max_new_tokens=2)]
    logo.restart()
    assert logo.generate(prompts[:3], max_new_tokens=2)[-1].selection == expected[2]

    def fail(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if len(inputs[0]) > 1:
            raise RuntimeError("not so many")

    hook = model.get_input_embeddings().register_forward_pre_hook(fail)  # type: ignore[operator]
    with pytest.raises(RuntimeError, match="not so many"):
        logo.generate(prompts[3:], max_new_tokens=2)
    hook.remove()
    assert [logo.generate(one, max_new_tokens=2).selection for one in prompts[3:]] == expected[3:]
