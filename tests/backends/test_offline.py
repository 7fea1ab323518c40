"""`LoGo.from_pretrained(..., engine="vllm")`: the same selections, tokens and errors as the local engine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, TextStreamer

from http_server import eventually
from logo import AdapterPool, LoGo, UsageError, plugins
from logo.adapters.peft import EXAMPLES
from logo.errors import LoGoError, ModelError, PoolError
from logo.evaluation.answer import Answerer, engine_identity
from logo.models import DEMO_FOLDER, load_base
from logo.vllm import offline
from test_engine import write_adapter
from tolerances import same_scores, same_selection

pytest.importorskip("vllm.lora", reason="needs vLLM: make test-vllm")

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
CONTEXT = 160
VLLM = {"enforce_eager": True, "max_model_len": CONTEXT}

pytestmark = pytest.mark.usefixtures("settings_of_vllm")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with a shorter context, so that both engines read as much, and with a chat template."""
    folder = tmp_path_factory.mktemp("base")
    shutil.copytree(DEMO_FOLDER / "model", folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": CONTEXT}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def pool(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters of different ranks on different modules, the demo's beside ours, half of them without examples."""
    folder = tmp_path_factory.mktemp("pool")
    without = sorted((DEMO_FOLDER / "adapters").rglob(EXAMPLES))[::2]
    shutil.copytree(DEMO_FOLDER / "adapters", folder, dirs_exist_ok=True)
    for file in without:
        (folder / file.relative_to(DEMO_FOLDER / "adapters")).unlink()
    model, _ = load_base(str(base), device="cpu")
    every = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    write_adapter(folder / "ours" / "small", model, ("q_proj", "v_proj"), rank=3, seed=1, scale=0.02)
    write_adapter(folder / "ours" / "large", model, every, rank=11, seed=2, scale=0.02)
    return folder


@pytest.fixture(scope="module")
def local(base: Path, pool: Path) -> LoGo:
    return LoGo.from_pretrained(str(base), pool, device="cpu", k=4)


@pytest.fixture(scope="module")
def inside(base: Path, pool: Path) -> Iterator[Any]:
    """The engine inside vLLM."""
    made: Any = LoGo.from_pretrained(str(base), pool, engine="vllm", k=4, model_kwargs=VLLM)
    yield made
    made.close()


@pytest.fixture(scope="module")
def rows(rows: list[str]) -> list[str]:
    """Two held-out prompts of each of the demo's tasks."""
    return rows[::4]


CHATS = [
    [{"role": "user", "content": "What is the plural of cat?"}],
    [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": [{"type": "text", "text": "What is the "}, {"type": "text", "text": "capital?"}]},
        {"role": "assistant", "content": "Paris"},
        {"role": "user", "content": "Spell it backwards."},
    ],
]


def same_answers(found: Any, expected: Any) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        same_selection(one.selection, other.selection)
        assert (one.token_ids, one.text, one.finish_reason) == (other.token_ids, other.text, other.finish_reason)
        assert one.form == ("gated" if any(one.selection.weights) else "none")
        assert set(one.seconds) == set(other.seconds)


# -- what it is --------------------------------------------------------------------------------------------------------


def test_it_is_the_same_engine_to_whoever_asks(inside: Any, local: LoGo) -> None:
    for name in ("names", "k", "points", "settings"):
        assert getattr(inside, name) == getattr(local, name), name
    assert inside.fitted.names == inside.pool.names == local.fitted.names
    assert inside.prompts.context == local.prompts.context == CONTEXT
    assert inside.tokenizer("cats")["input_ids"] == local.tokenizer("cats")["input_ids"]


def test_a_run_has_the_same_identity_and_says_in_which_environment_it_ran(inside: Any, local: LoGo) -> None:
    found, expected = (engine_identity(one, "base", {"stop_at_newline": True}) for one in (inside, local))
    assert found.pop("engine_options") == {"max_model_len": 160}
    assert found == expected
    here, there = (Answerer(one, "base").facts.environment for one in (local, inside))
    assert there == {**here, "vllm": there["vllm"]}
    assert "vllm" not in here


# -- selecting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signal", ["calibrated", "norm", "entropy"])
def test_selections_are_those_of_the_local_engine(inside: Any, local: LoGo, rows: list[str], signal: str) -> None:
    for found, expected in zip(inside.select(rows, signal=signal), local.select(rows, signal=signal), strict=True):
        same_selection(found, expected)
        assert found.confidence == pytest.approx(expected.confidence, abs=1e-4)


OPTIONS: list[dict[str, Any]] = [{"k": 2}, {"weighting": "linear"}, {"candidates": ["ours/small", "ours/large"]}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_call_may_ask_for_more(inside: Any, local: LoGo, rows: list[str], options: dict[str, Any]) -> None:
    for found, expected in zip(inside.select(rows[:4], **options), local.select(rows[:4], **options), strict=True):
        same_selection(found, expected)
    scores = local.select(rows[0]).scores
    assert inside.reselect(scores, **options) == local.reselect(scores, **options)


def test_a_probe_is_a_short_request_of_its_own(
    inside: Any, local: LoGo, rows: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler, lengths = inside.llm.llm_engine.engine_core.engine_core.scheduler, []
    add = scheduler.add_request

    def added(request: Any) -> None:
        lengths.append(request.num_prompt_tokens)
        add(request)

    monkeypatch.setattr(scheduler, "add_request", added)
    long = local.tokenizer(" ".join(rows))["input_ids"][:140]
    for last in (long[-1], long[0]):  # the second time, all other tokens are in the cache
        long[-1] = last
        for signal, read in (("calibrated", 64), ("norm", 140)):
            expected = local.select(long, signal=signal, max_new_tokens=6)
            for requests in ([read], []):  # what was read a moment ago is known
                lengths.clear()
                same_selection(inside.select(long, signal=signal, max_new_tokens=6), expected)
                assert lengths == requests
        same_answers([inside.generate(long, max_new_tokens=6)], [local.generate(long, max_new_tokens=6)])


# -- generating --------------------------------------------------------------------------------------------------------


def test_many_prompts_are_answered_at_once_as_by_the_local_engine(inside: Any, local: LoGo, rows: list[str]) -> None:
    names = local.names
    mixed: list[Any] = [None, {}, {names[0]: 0.7, "ours/large": 0.3}, {"ours/small": 1.0}]
    adapters = [mixed[i % len(mixed)] for i in range(len(rows))]
    options: dict[str, Any] = {"adapters": adapters, "max_new_tokens": 12, "batch_size": 16}
    same_answers(inside.generate(rows, **options), local.generate(rows, **options))
    assert len(rows) == 32


@pytest.mark.parametrize("signal", ["calibrated", "norm"])
def test_each_prompt_is_answered_by_its_own_mixture(inside: Any, local: LoGo, rows: list[str], signal: str) -> None:
    options: dict[str, Any] = {"signal": signal, "max_new_tokens": 12}
    found = inside.generate([*rows, *CHATS], **options)
    same_answers(found, local.generate([*rows, *CHATS], **options))
    assert len({one.selection.adapters for one in found}) > 4


@pytest.mark.parametrize(
    "options",
    [
        {"stop_at_newline": True},
        {"stop_at_newline": "official"},
        {"stop": ["e", "\n"]},
        {"stop": "a"},
        {"stop_strings": ["o", "e"]},
        {"min_new_tokens": 9},
        {"repetition_penalty": 1.5},
        {"eos_token_id": [5, 6, 7, 8, 9, 10, 11, 12, 13, 14]},
        {"generation_config": GenerationConfig(do_sample=False, max_new_tokens=5)},
        {"do_sample": True, "top_k": 1},
    ],
    ids=str,
)
def test_answers_end_where_those_of_the_local_engine_do(
    inside: Any, local: LoGo, rows: list[str], options: dict[str, Any]
) -> None:
    given = {"adapters": {"ours/large": 1.0}, **options}
    given |= {} if "generation_config" in options else {"max_new_tokens": 10}
    expected = local.generate(rows[:8], batch_size=1, **given)
    same_answers(inside.generate(rows[:8], **given), expected)


def test_sampling_follows_the_seed_of_pytorch(inside: Any, rows: list[str]) -> None:
    options: dict[str, Any] = {"do_sample": True, "temperature": 2.0, "top_p": 0.99, "top_k": 300, "min_p": 0.001}

    def sampled(seed: int, prompts: list[str]) -> list[Any]:
        torch.manual_seed(seed)
        return [one.token_ids for one in inside.generate(prompts, adapters={}, max_new_tokens=8, **options)]

    assert sampled(1, rows[:4]) == sampled(1, rows[:4])
    assert sampled(1, rows[:4])[:2] == sampled(1, rows[:2])  # whatever runs beside it
    assert sampled(1, rows[:4]) != sampled(2, rows[:4])


def test_a_stream_has_one_piece(inside: Any, rows: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    whole = inside.generate(rows[0], max_new_tokens=10)
    assert list(inside.stream(rows[0], max_new_tokens=10)) == [whole.text]
    shown = TextStreamer(inside.tokenizer, skip_prompt=True, skip_special_tokens=True)
    inside.generate(rows[0], max_new_tokens=10, streamer=shown)
    assert capsys.readouterr().out.strip() == whole.text.strip()


def test_weights_that_would_overflow_are_refused(inside: Any, rows: list[str]) -> None:
    for weight in (17.0, -1e5):
        with pytest.raises(UsageError, match="adapter 'ours/small': expected a weight from -16 to 16"):
            inside.generate(rows[0], adapters={"ours/small": weight}, max_new_tokens=4)


# -- scoring -----------------------------------------------------------------------------------------------------------


def test_completions_are_worth_the_same(inside: Any, local: LoGo, rows: list[str]) -> None:
    mixtures: list[Any] = [{}, {"ours/large": 1.0}, {"ours/small": 0.5, "ours/large": 0.5}, {}]
    for prompt in (rows[0], rows[5], CHATS[1]):
        answer = local.generate(prompt, adapters=mixtures[1], max_new_tokens=6).text
        for gold in (answer, "cats", "c", "a longer one, of several words"):
            if not gold.strip():
                continue
            found, expected = inside.score(prompt, gold, mixtures), local.score(prompt, gold, mixtures)
            assert [one.nll for one in found] == same_scores([one.nll for one in expected])
            assert [(one.exact_match, one.tokens) for one in found] == [
                (one.exact_match, one.tokens) for one in expected
            ]
    pairs = [(local.tokenizer(row)["input_ids"], [7, 8, 9]) for row in rows[:5]]
    whole = ([5] * (CONTEXT - 3), [7, 8, 9])  # the last is predicted, never read
    adapters = [{"ours/large": 0.1 * i} for i in range(6)]
    found, expected = (engine.score_pairs([*pairs, whole], adapters) for engine in (inside, local))
    assert [one.nll for one in found] == same_scores([one.nll for one in expected])


def test_scoring_leaves_room_for_the_token_that_vllm_wants_to_write(inside: Any) -> None:
    with pytest.raises(UsageError, match=f"pair 1 has {CONTEXT + 1} tokens, but the model reads {CONTEXT - 1} and"):
        inside.score_pairs([([5] * (CONTEXT - 1), [7, 8])], [{}])


def test_what_vllm_itself_refuses_is_said_in_a_line(inside: Any) -> None:
    with pytest.raises(UsageError, match="vLLM refuses these options: temperature must be in") as found:
        inside.generate("x", adapters={}, do_sample=True, temperature=9.0)
    assert "\n" not in str(found.value)
    assert inside.llm.llm_engine.get_num_unfinished_requests() == 0


# -- bad input ---------------------------------------------------------------------------------------------------------

BAD: list[Callable[[Any], Any]] = [
    lambda logo: logo.select([]),
    lambda logo: logo.select([{"role": "users", "content": "x"}]),
    lambda logo: logo.select([1, 10**6]),
    lambda logo: logo.select("x", k=0),
    lambda logo: logo.select("x", max_new_tokens=CONTEXT),
    lambda logo: logo.select("x", signal="norms"),
    lambda logo: logo.select("x", candidates=["ours/smal"]),
    lambda logo: logo.reselect({"a": 1.0}, candidates=["ours/smal"]),
    lambda logo: logo.generate("x", adapters={"ours/small": float("nan")}),
    lambda logo: logo.generate("x", adapters={"ours/small": 1.0}, k=2),
    lambda logo: logo.generate(["x", "y"], adapters=[{}]),
    lambda logo: logo.generate("x", temprature=3),
    lambda logo: logo.generate("x", generation_config=GenerationConfig(do_sample=True, num_return_sequences=2)),
    lambda logo: logo.stream("x", max_new_tokens=-1),
    lambda logo: logo.score("x", "", [{}]),
    lambda logo: logo.score_pairs([([1], [1])], [{}, {}]),
]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_bad_input_is_refused_in_the_same_words(inside: Any, local: LoGo, number: int) -> None:
    with pytest.raises(LoGoError) as expected:
        BAD[number](local)
    with pytest.raises(LoGoError) as found:
        BAD[number](inside)
    assert (type(found.value), str(found.value)) == (type(expected.value), str(expected.value))


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 2}, {"no_repeat_ngram_size": 2}, {"bad_words_ids": [[1]]}, {"typical_p": 0.5}, {"max_time": 1.0}],
    ids=str,
)
def test_what_vllm_cannot_decode_is_refused_in_a_line(inside: Any, options: dict[str, Any]) -> None:
    [name] = options
    for call in (inside.generate, inside.stream):
        with pytest.raises(
            UsageError, match=rf"^generation option '{name}' .*: the engine 'vllm' cannot do that.*local"
        ):
            call("x", **options)


def test_a_pool_that_changes_is_refused(inside: Any, pool: Path) -> None:
    before = inside.pool.value
    inside.pool.remove("ours/small")
    try:
        with pytest.raises(UsageError, match="the pool of the engine 'vllm' cannot change"):
            inside.select("x")
    finally:
        inside.pool.value = before


# -- opening -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"engine": "vlm"}, r"engine: expected one of local, vllm, found 'vlm' \(did you mean 'vllm'\?\)"),
        ({"probe_context": "pool", "signal": "norm"}, "inside vLLM prompts are probed by the base model alone"),
        ({"device": "cpu"}, "device: the engine 'vllm' has no such option"),
        ({"adapter_memory_gb": 1.0}, "adapter_memory_gb: the engine 'vllm' has no such option"),
        ({"preset": "official"}, "preset 'official' probes as the authors' script does: use the engine 'local'"),
        ({"model_kwargs": {"trust_remote_code": True}}, "trust_remote_code cannot be set"),
        ({"model_kwargs": {"max_lora": 4}}, "model_kwargs: vllm.LLM refuses them: .*max_lora"),
        ({"model_kwargs": {"additional_config": {"logo": 1}}}, "expected 'logo' to be an object, found int"),
        ({"model_kwargs": {"additional_config": {"logo": {"pols": "x"}}}}, "unknown option 'pols' of LoGo"),
        ({"model_kwargs": {"max_lora_rank": 8}}, "--max-lora-rank is 8, but adapter 'ours/large' has rank 11"),
        (
            {"model_kwargs": {"max_loras": 2, "max_lora_rank": 16}, "k": 4},
            "--max-loras is 2, but up to 4 adapters answer",
        ),
        ({"model_kwargs": {"lora_target_modules": ["o_proj"]}}, "has no layer there that takes"),
        ({"dtype": "int8"}, "dtype 'int8': expected"),
        ({"signals": "norm"}, r"unknown setting 'signals' \(did you mean 'signal'"),
    ],
    ids=str,
)
def test_what_cannot_be_opened_is_refused_in_a_line(base: Path, pool: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(LoGoError, match=said) as found:
        LoGo.from_pretrained(str(base), pool, **{"engine": "vllm", **options})
    assert "\n" not in str(found.value)


def test_a_pool_in_memory_has_to_be_a_folder(base: Path, pool: Path) -> None:
    whole = AdapterPool.open(pool)
    with pytest.raises(PoolError, match="expected all adapters in one folder"):
        LoGo.from_pretrained(str(base), whole.subset("ours/*"), engine="vllm")


def test_the_demo_opens_with_its_own_pool_and_number_of_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads no examples if it is told so, keeps its calibration where the library does, and takes as much memory
    for keys and values as a server."""
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE")
    monkeypatch.setattr(offline, "CPU_CACHE_GB", 0.5)  # which is 2 elsewhere: filling that takes long
    chosen: dict[str, Any] = {"examples": "ignore", "cache": str(tmp_path)}
    made: Any = LoGo.from_pretrained("demo", engine="vllm", model_kwargs={"enforce_eager": True}, **chosen)
    with closing(made):
        assert made.llm.llm_engine.vllm_config.cache_config.kv_cache_memory_bytes == 500_000_000
        assert (made.k, made.settings.k, len(made.names)) == (3, None, 16)
        local = LoGo.from_pretrained("demo", device="cpu", **chosen)
        found, expected = (engine.select("What is 7 plus 5?") for engine in (made, local))
        same_selection(found, expected)
        assert len(found.adapters) <= 3
        calibration = local.calibrate()
        assert calibration is not None and calibration.measured == 0


SIGNAL = """
from logo import register_signal

@register_signal("quiet", layers="early", input="projection", token="each", scale="zscore", weighting="linear")
def quiet(index, hidden):
    return index.norms(hidden).sqrt()
"""


def test_vllms_processes_find_a_signal_of_a_plugin_through_their_environment(
    plugins_forgotten: None, tmp_path: Path, rows: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And if they end, a line says so."""
    (tmp_path / "plug_vllm.py").write_text(SIGNAL)
    plugins.load("plug_vllm:quiet", str(tmp_path))
    local = LoGo.from_pretrained("demo", device="cpu", signal="quiet", k=3)
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # a process that knows nothing of this one
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv(plugins.VARIABLE, "")
    options = {"enforce_eager": True, "max_model_len": 128}
    made: Any = LoGo.from_pretrained("demo", engine="vllm", signal="quiet", k=3, model_kwargs=options)
    with closing(made):
        same_answers(made.generate(rows[:2], max_new_tokens=8), local.generate(rows[:2], max_new_tokens=8))
        resources = made.llm.llm_engine.engine_core.resources
        for process in resources.engine_manager.processes:
            process.kill()
        eventually(lambda: resources.engine_dead)
        with pytest.raises(ModelError, match="vLLM's engine has ended, for the reason that it wrote before: close"):
            made.generate(rows[:2], max_new_tokens=8)
