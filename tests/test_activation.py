"""Adapters that act from a position of the prompt on: as PEFT's aLoRA does, and as a mask on the gates would."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import test_serve_engine as serving
import tiny
from logo import AdapterPool, LoGo, SelectionSettings
from logo.adapters.activation import EVERYWHERE, Activation, earliest, last_occurrence
from logo.adapters.adapter import open_adapter
from logo.adapters.layout import BaseLayout
from logo.api.names import MixtureRequest
from logo.demo import heldout
from logo.errors import AdapterError, PoolError, StorageError, UsageError
from logo.prefix_cache import PrefixCache, reusable
from logo.selection import base_reader
from logo.serve.memory import Memory
from logo.serve.sampling import Sampling
from logo.serve.service import Service
from make_adapters import edit_config, load_peft, write, write_peft
from test_engine import Caller, write_adapter
from test_engine import engine as opened
from tiny import read_tokens, words
from tolerances import same_scores, same_selection

pytestmark = pytest.mark.slow
INVOKE = [7, 8]
QUERY = {"llama": "q_proj", "qwen2": "q_proj", "gemma3": "q_proj", "gpt2": "c_attn", "gpt_neox": "query_key_value"}
NAMES = ("t0", "t1", "t2")


def notes(folder: Path, activation: Any) -> Path:
    (folder / "pool.json").write_text(json.dumps({"activation": activation}))
    return folder


def pool_of(folder: Path, model: nn.Module, modules: tuple[str, ...] = ("q_proj", "v_proj"), **config: Any) -> Path:
    for number, name in enumerate(NAMES):
        write_adapter(folder / name, model, modules, rank=2, seed=number)
        if config:
            edit_config(folder / name, **config)
    return folder


def engine(model: nn.Module, folder: Path, **chosen: Any) -> LoGo:
    return opened(model, folder, bos=False, **{"k": 2, "cache": "", **chosen})


def invoked(lengths: Sequence[int], tail: Sequence[int] = (11, 12)) -> list[list[int]]:
    """Prompts with the invocation tokens near their end."""
    return [[*row, *INVOKE, *tail] for row in tiny.prompts(list(lengths))]


# -- where it begins ---------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 3), max_size=12), st.lists(st.integers(0, 3), min_size=1, max_size=3))
def test_the_last_occurrence_is_the_last(prompt: list[int], tokens: list[int]) -> None:
    found = last_occurrence(prompt, tokens)
    places = [i for i in range(len(prompt)) if prompt[i : i + len(tokens)] == tokens]
    assert found == (places[-1] if places else None)


def test_counting_from_the_end() -> None:
    for text, length, begin in (("last:4", 10, 6), ("last:4", 3, 0), ("everywhere", 3, 0)):
        assert Activation.parse(text).begin(range(length)) == begin and str(Activation.parse(text)) == text
    assert earliest([Activation(last=2), Activation(last=4)], range(10)) == 6  # type: ignore[arg-type]
    assert earliest([Activation(tokens=(99,))], range(10)) == 9  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["last", "last:", "last:-1", "first:2", "", None, 4, "last:1.5", "last:0"])
def test_what_is_no_activation(text: Any) -> None:
    with pytest.raises(UsageError, match=r"expected everywhere, invocation or last:N|last:0: no adapter would act"):
        Activation.parse(text)


def test_what_a_user_forces(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", alora_invocation_tokens=[1])
    trained = open_adapter(folder)
    assert trained.acting("last:2").activation == Activation(last=2)
    assert trained.acting("everywhere").activation == EVERYWHERE
    assert trained.acting("invocation").activation == trained.acting(None).activation == Activation((1,))
    with pytest.raises(AdapterError, match="no invocation tokens"):
        trained.acting("everywhere").acting("invocation")


# -- opening -----------------------------------------------------------------------------------------------------------


def test_a_pool_is_read_once_if_no_adapter_acts_everywhere(tmp_path: Path) -> None:
    write(tmp_path / "plain")
    write(tmp_path / "invoked", alora_invocation_tokens=INVOKE)
    for said in ("everywhere", "last:4", "last:4"):  # the last time from the cache
        pool = AdapterPool.open(notes(tmp_path, said))
        assert [str(one.activation) for one in pool] == ["invocation", said]
        assert pool.read_once == (said == "last:4") and pool["invoked"].activation.tokens == tuple(INVOKE)
    [alone] = AdapterPool().add(tmp_path / "plain")
    assert str(alone.activation) == "last:4"  # its pool's notes lie above it


@pytest.mark.parametrize("tokens", [[], ["a"], [-1], "x", [1.5], [True]])
def test_invocation_tokens_that_cannot_be(tmp_path: Path, tokens: Any) -> None:
    write(tmp_path / "a", alora_invocation_tokens=tokens)
    with pytest.raises(AdapterError, match="alora_invocation_tokens must be a list of one token id or more"):
        AdapterPool().add(tmp_path / "a")


def test_notes_that_name_no_activation(tmp_path: Path) -> None:
    write(tmp_path / "a")
    notes(tmp_path, "last:x")
    with pytest.raises(StorageError, match=r"pool\.json: activation: expected everywhere"):
        AdapterPool.open(tmp_path)


# -- as PEFT answers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(QUERY))
def test_one_alone_answers_as_in_peft(name: str, tmp_path: Path) -> None:
    write_peft(tmp_path / "pool" / "a", tiny.model(name), target_modules=[QUERY[name]], alora_invocation_tokens=INVOKE)
    reference: Any = load_peft(tmp_path / "pool" / "a", tiny.model(name))
    logo = engine(tiny.model(name), tmp_path / "pool", k=1)
    prompts = [*invoked((9, 30, 70)), [*INVOKE, 5], [*INVOKE, 1, *INVOKE, 3], *tiny.prompts([8])]  # never, in the last
    with pytest.warns(UserWarning, match="lacks the invocation tokens of"):
        together = logo.generate(prompts, adapters={"a": 1.0}, max_new_tokens=8, batch_size=8)
    for prompt, answer in zip(prompts, together, strict=True):
        ids = torch.tensor([prompt])
        want = reference.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        assert list(answer.token_ids) == want[0, len(prompt) :].tolist()
        assert logo.generate(prompt, adapters={"a": 1.0}, max_new_tokens=8).token_ids == answer.token_ids


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "lm_head"]])
def test_likelihoods_are_those_of_peft(targets: list[str], tmp_path: Path) -> None:
    """Also where an adapter acts on the output head, which gets the positions of completions only."""
    save = {"save_embedding_layers": False}
    write_peft(tmp_path / "pool" / "a", alora_invocation_tokens=INVOKE, target_modules=targets, save=save)
    reference: Any = load_peft(tmp_path / "pool" / "a")
    logo = engine(tiny.model("llama"), tmp_path / "pool", k=1)
    prompts, gold = invoked((9, 30, 70)), [20, 21, 22]
    pairs = logo.score_pairs([(prompt, gold) for prompt in prompts], [{"a": 1.0}] * 3)
    for prompt, one in zip(prompts, pairs, strict=True):
        ids = torch.tensor([[*prompt, *gold]])
        offset = len(prompt) + 3 - last_occurrence(prompt, INVOKE)  # type: ignore[operator]
        with torch.no_grad():
            logits = reference(input_ids=ids, alora_offsets=[offset]).logits[0, len(prompt) - 1 : -1]
        want = float(torch.nn.functional.cross_entropy(logits, torch.tensor(gold)))
        text = " ".join(f"w{i}" for i in gold)
        [scored] = logo.score(prompt, text, [{"a": 1.0}])
        assert one.nll == pytest.approx(want, abs=1e-4) and scored.nll == pytest.approx(want, abs=1e-4)


# -- mixtures, against a mask ------------------------------------------------------------------------------------------


def masked(model: nn.Module, pool: AdapterPool, prompt: list[int], mixture: dict[str, float], steps: int) -> list[int]:
    """Greedy answers without any cache: each adapter's product is added where it acts, and nowhere else."""
    begins = {name: pool[name].activation.begin(prompt) for name in mixture}
    handles = []
    for path, module in model.named_modules():
        found = [
            (weight, pool[name].read([path])[path], begins[name])
            for name, weight in mixture.items()
            if path in pool[name].modules and begins[name] is not None
        ]
        if found:

            def add(module: nn.Module, args: Any, output: torch.Tensor, found: Any = found) -> torch.Tensor:
                for weight, factors, begin in found:
                    more = args[0] @ factors.A.T @ factors.scaled_b().T
                    more[:, :begin] = 0
                    output = output + weight * more
                return output

            handles.append(module.register_forward_hook(add))
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(steps):
            logits: torch.Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits
            ids.append(int(logits[0, -1].argmax()))
    for handle in handles:
        handle.remove()
    return ids[len(prompt) :]


MIXTURES: list[dict[str, float]] = [{"t0": 0.7, "t1": 0.5}, {"t1": 0.4, "t2": 0.9}, {"t2": 1.0}, {}]


def test_points_that_every_text_reaches_alike_do_not_count(tmp_path: Path) -> None:
    """Behind an invocation, the first layer reads the same in every text: only rounding errors differ there."""
    demo = LoGo.from_pretrained("demo")
    for adapter in demo.fitted:
        shutil.copytree(adapter.folder, tmp_path / adapter.name)
        file = tmp_path / adapter.name / "adapter_config.json"
        ends = demo.tokenizer(":", add_special_tokens=False)["input_ids"]
        file.write_text(json.dumps(json.loads(file.read_text()) | {"alora_invocation_tokens": ends}))
    settings = SelectionSettings.of(examples="ignore")
    one, other = (LoGo(demo.model, demo.tokenizer, AdapterPool.open(tmp_path), settings=settings) for _ in range(2))
    prompts = [f"{text}:" for text in ("Translate to French: the cat", "What is 3 plus 5?", "Sort: 5 2 9 1")]
    for alone, together in zip(map(one.select, prompts), other.select(prompts), strict=True):
        assert alone.scores == pytest.approx(together.scores, abs=1e-3)


@pytest.mark.parametrize("examples", ["use", "ignore"])
def test_adapters_of_other_invocations_change_nothing(examples: Any, tmp_path: Path) -> None:
    """The texts that an adapter is calibrated on end as prompts do on which it acts, whatever the pool's others do."""
    demo = LoGo.from_pretrained("demo")
    answers = ("\nResult:", "\n=>")
    names = [adapter.name for adapter in demo.fitted]
    for number, adapter in enumerate(demo.fitted):
        for pool in ("all", ("even", "odd")[number % 2]):
            folder = tmp_path / pool / adapter.name
            shutil.copytree(adapter.folder, folder)
            ends = demo.tokenizer(answers[number % 2], add_special_tokens=False)["input_ids"]
            edit_config(folder, alora_invocation_tokens=ends)
    settings = SelectionSettings.of(examples=examples)
    right = {}
    for pool in ("all", "odd"):
        logo = LoGo(demo.model, demo.tokenizer, AdapterPool.open(tmp_path / pool), settings=settings)
        rows = [(name, row["context"]) for name in names[1::2] for row in heldout()[name][:8]]
        selections = logo.select([prompt + answers[1] for _, prompt in rows], candidates=names[1::2])
        right[pool] = sum(one.adapters[0] == name for one, (name, _) in zip(selections, rows, strict=True))
    assert right["all"] >= 0.9 * right["odd"]


@pytest.mark.parametrize("kind", ["default", "longrope", "dynamic"])
def test_keys_whose_angles_depend_on_the_length_are_not_kept(kind: str, tmp_path: Path) -> None:
    """And the longest row of a batch does not turn those of the others."""
    parts: dict[str, Any] = {"rope_type": kind, "rope_theta": 10000.0}
    if kind != "default":
        parts |= {"factor": 4.0, "original_max_position_embeddings": 32}
    parts |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4} if kind == "longrope" else {}
    model = tiny.model("llama", rope_parameters=parts)
    assert reusable(model) == (kind == "default")
    vars(model)["rope_deltas"] = None  # of models that read images
    assert not reusable(model)
    del model.rope_deltas
    logo, prompts = engine(model, pool_of(tmp_path, model), signal="norm"), tiny.prompts([12, 60, 20, 50])
    for ask in (
        lambda rows: [one.token_ids for one in logo.generate(rows, adapters={}, max_new_tokens=8)],
        lambda rows: [one.nll for one in logo.score_pairs([(row, [5, 6]) for row in rows], [{}] * len(rows))],
        lambda rows: [one.scores for one in logo.select(rows)],
    ):
        assert ask(prompts) == [pytest.approx(one, rel=1e-3) for prompt in prompts for one in ask([prompt])]


@pytest.mark.parametrize("kind", ["last:4", "last:70", "invocation", "mixed"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_mixtures_are_those_of_a_mask(name: str, kind: str, tmp_path: Path) -> None:
    model = tiny.model(name, eos_token_id=None)
    modules = ("q_proj", "v_proj") if name != "gpt2" else ("c_attn",)
    folder = pool_of(tmp_path, model, modules, **({"alora_invocation_tokens": INVOKE} if kind == "invocation" else {}))
    if kind == "mixed":
        edit_config(folder / "t0", alora_invocation_tokens=INVOKE)
        (folder / "late").mkdir()
        (folder / "t1").rename(folder / "late" / "t1")
        notes(folder / "late", "last:3")
        mixtures = [{name.replace("t1", "late/t1"): w for name, w in mixture.items()} for mixture in MIXTURES]
        with pytest.warns(UserWarning, match="1 of 3 adapters act on every token"):
            logo = engine(model, folder)
    else:
        notes(folder, None if kind == "invocation" else kind)
        logo, mixtures = engine(model, folder), MIXTURES
        assert logo.fitted.read_once
    prompts = invoked((20, 5, 80, 40))
    for one in (logo, engine(model, folder, activation="last:2")):
        found = one.generate(prompts, adapters=mixtures, max_new_tokens=6, batch_size=4)
        for prompt, mixture, answer in zip(prompts, mixtures, found, strict=True):
            assert list(answer.token_ids) == masked(model, one.fitted, prompt, mixture, 6)


# -- reading once ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signal", ["norm", "calibrated"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "opt", "mistral"])
def test_a_prompt_is_read_once(name: str, signal: str, tmp_path: Path) -> None:
    model = tiny.model(name, eos_token_id=None)
    modules = ("q_proj", "v_proj") if name != "gpt2" else ("c_attn",)
    folder = notes(pool_of(tmp_path, model, modules), "last:4")
    logo, other = engine(model, folder, signal=signal), engine(model, folder, signal=signal, prefix_cache_gb=0)
    logo.calibrate(), other.calibrate()
    prompt = tiny.prompts([100])[0]
    with read_tokens(model) as seen:
        first = logo.generate(prompt, max_new_tokens=3)
    assert seen == [100, 4, 1, 1]  # read once, and its last four tokens again
    with read_tokens(model) as seen:
        again = logo.generate(prompt, max_new_tokens=3, k=1)
    assert seen == [4, 4, 1, 1]
    with read_tokens(model) as seen:
        chosen = logo.generate(prompt, adapters=first.selection, max_new_tokens=3)
    assert seen == [4, 1, 1]
    assert chosen.token_ids == first.token_ids and again.selection.adapters == first.selection.adapters[:1]
    with read_tokens(model) as seen:  # a budget of nothing keeps a prompt as long as it is answered
        without = other.generate(prompt, max_new_tokens=3)
    assert seen == [100, 4, 1, 1] and without.token_ids == first.token_ids
    assert other.prefix_cache is not None and other.prefix_cache.bytes == 0


def test_a_stream_reads_its_prompt_once(tmp_path: Path) -> None:
    model = tiny.model("llama", eos_token_id=None)
    logo = engine(model, notes(pool_of(tmp_path, model), "last:4"))
    prompt, other = tiny.prompts([100, 90])
    want = engine(model, tmp_path).generate(prompt, max_new_tokens=3)
    with read_tokens(model) as seen:
        stream = logo.stream(prompt, max_new_tokens=3)
        logo.stream(other, max_new_tokens=3)  # nobody reads it
        assert "".join(stream) == want.text
    assert seen == [100, 90, 4, 1, 1]


@pytest.mark.parametrize("changed", ["weights", "weights and pool"])
def test_what_was_read_before_weights_changed_is_read_again(changed: str, tmp_path: Path) -> None:
    model, later = (tiny.model("llama", seed=seed, eos_token_id=None) for seed in (0, 7))
    folder = notes(pool_of(tmp_path, model), "last:4")
    logo, [prompt] = engine(model, folder), tiny.prompts([60])
    logo.generate(prompt, adapters={"t0": 1.0}, max_new_tokens=6)
    stream = logo.stream(prompt, adapters={"t0": 1.0}, max_new_tokens=6)
    model.load_state_dict(later.state_dict())
    if changed == "weights and pool":
        logo.pool.remove("t2")
    expected = engine(later, folder).generate(prompt, adapters={"t0": 1.0}, max_new_tokens=6)
    assert logo.generate(prompt, adapters={"t0": 1.0}, max_new_tokens=6).token_ids == expected.token_ids
    list(stream)
    assert logo.generate(prompt, adapters={"t0": 1.0}, max_new_tokens=6).token_ids == expected.token_ids


def test_nothing_is_cached_while_a_mixture_is_active(tmp_path: Path) -> None:
    model = tiny.model("llama", eos_token_id=None)
    folder = notes(pool_of(tmp_path, model), "last:4")
    logo, clean = engine(model, folder), engine(model, folder)
    first, second = tiny.prompts([10, 60])
    again = partial(logo.generate, second, adapters={"t0": 1.0}, max_new_tokens=3)
    with pytest.raises(UsageError, match="call this once the answer is complete"):
        logo.generate(first, adapters={"t1": 3.0}, max_new_tokens=4, streamer=cast(Any, Caller(again)))
    with pytest.raises(UsageError, match="'guidance_scale' reads prompts a second time"):
        again(guidance_scale=2.0)
    assert again().token_ids == clean.generate(second, adapters={"t0": 1.0}, max_new_tokens=3).token_ids
    assert logo.select(second).scores == same_scores(clean.select(second).scores)


@pytest.mark.parametrize("signal", ["norm", "calibrated"])
def test_what_is_known_changes_no_score(signal: str, tmp_path: Path) -> None:
    model = tiny.model("llama", max_position_embeddings=512)
    folder = notes(pool_of(tmp_path, model), "last:4")
    logo, plain = engine(model, folder, signal=signal), engine(model, folder, signal=signal, prefix_cache_gb=0)
    shared = tiny.prompts([150])[0]
    prompts = [[*shared, *tail] for tail in tiny.prompts([5, 40, 90], seed=1)] + tiny.prompts([30, 3, 200], seed=2)
    for batch in (prompts[:1], prompts, prompts[::-1]):
        for one, prompt in zip(logo.select(batch, batch_size=3), batch, strict=True):
            alone = plain.select(prompt)
            assert list(one.scores.values()) == pytest.approx(list(alone.scores.values()), rel=1e-3, abs=1e-4)
            assert one.weights == pytest.approx(alone.weights, abs=1e-5)
    with read_tokens(model) as seen:
        logo.select(prompts[0])
    assert seen == [4]  # all others are cached


@given(st.lists(st.integers(1, 200), min_size=1, max_size=6), st.integers(0, 40_000))
def test_pages_stay_within_the_budget(lengths: list[int], budget: int) -> None:

    model = tiny.model("llama", max_position_embeddings=512)
    kept = PrefixCache(model, budget)
    for number, length in enumerate(lengths):
        row = tiny.prompts([length], seed=number % 3)[0]
        with kept.held():
            cache = kept.cache([row], [length], [length])
            assert cache.get_seq_length() == length
            assert sum(page.tokens for page in kept.find(row, length)) == length
        assert kept.bytes <= budget and kept.bytes == sum(page.bytes for page in kept._pages.values())


def test_without_its_invocation(tmp_path: Path) -> None:
    model = tiny.model("llama", eos_token_id=None)
    folder = pool_of(tmp_path, model, alora_invocation_tokens=INVOKE)
    logo, [prompt] = engine(model, folder), tiny.prompts([12])
    with pytest.warns(UserWarning, match="lacks the invocation tokens of") as told:
        answers = [logo.generate(prompt, adapters={"t0": 1.0}, max_new_tokens=4) for _ in range(3)]
    assert len(told) == 1
    assert answers[0].token_ids == logo.generate(prompt, adapters={}, max_new_tokens=4).token_ids
    with pytest.warns(UserWarning, match="^a prompt lacks the invocation tokens of 't1', 't2', so") as told:
        logo.generate(prompt, adapters=dict.fromkeys(NAMES, 0.5), max_new_tokens=1)
    assert len(told) == 1
    edit_config(folder / "t0", alora_invocation_tokens=[5, 6])  # so that it cannot act where others can
    logo = engine(model, folder)
    chosen = logo.select([*prompt, *INVOKE], k=3)
    assert "t0" not in chosen.adapters and "t0" in logo.select(prompt, k=3).adapters
    assert logo.reselect(chosen) == chosen


def test_what_is_applied_to_cached_tokens_acts_everywhere(tmp_path: Path) -> None:
    latent = nn.ModuleDict({"self_attn": nn.ModuleDict({"kv_b_proj": nn.Linear(4, 4)})})
    latent["self_attn"]["q_proj"] = nn.Linear(4, 4)
    for name in ("q_proj", "kv_b_proj"):
        write_adapter(tmp_path / name, latent, (name,), rank=2, seed=0)
    pool, layout = AdapterPool.open(tmp_path), BaseLayout.of(latent)
    assert pool.fit(layout).names == pool.names
    with pytest.raises(PoolError, match=r"kv_b_proj, where it can only act everywhere, not last:3"):
        pool.fit(layout, activation="last:3")
    assert pool.fit(layout, activation="last:3", on_bad_adapter="skip").names == ("q_proj",)


@pytest.mark.parametrize("name", list(tiny.STATEFUL))
def test_a_model_that_keeps_a_state_selects_and_answers(name: str, tmp_path: Path) -> None:
    model = tiny.model(name, eos_token_id=None)
    modules = {"minimax": ("q_proj",), "rwkv": ("key",)}.get(name, ("in_proj",))
    logo = engine(model, notes(pool_of(tmp_path, model, modules), "last:4"), signal="calibrated")
    assert logo.prefix_cache is None
    prompts = tiny.prompts([60, 9])
    found = logo.select(prompts)
    for one, prompt in zip(found, prompts, strict=True):
        assert list(logo.select(prompt).scores.values()) == pytest.approx(list(one.scores.values()), rel=1e-3, abs=1e-4)
    answers = logo.generate(prompts, adapters=found, max_new_tokens=5)
    for answer, prompt, one in zip(answers, prompts, found, strict=True):
        assert list(answer.token_ids) == masked(model, logo.fitted, prompt, one.mixture, 5)


@pytest.mark.parametrize("context", ["pool", "carry"])
@pytest.mark.parametrize("signal", ["norm", "entropy"])
def test_adapters_that_are_active_while_probing_are_read_apart(signal: str, context: str, tmp_path: Path) -> None:
    model = tiny.model("llama", eos_token_id=None)
    logo = engine(model, notes(pool_of(tmp_path, model), "last:4"), signal=signal, probe_context=context)
    prompts = tiny.prompts([60, 60, 9])
    together = logo.select(prompts, batch_size=3)
    logo.restart()
    for one, prompt in zip(together, prompts, strict=True):
        assert list(logo.select(prompt).scores.values()) == pytest.approx(list(one.scores.values()), rel=1e-3, abs=1e-4)


# -- the signal --------------------------------------------------------------------------------------------------------


def test_calibrations_of_other_tokens_are_other_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts end with the invocation of one kind of adapters; which of their tokens count depends on the other kind."""
    some = [words(8 + seed, seed) for seed in range(30)]
    monkeypatch.setattr(base_reader, "NEUTRAL", some[:20])
    model = tiny.model("llama")
    folder = pool_of(tmp_path / "pool", model, alora_invocation_tokens=INVOKE)
    edit_config(folder / "t1", alora_invocation_tokens=[9])

    def opened(activation: str | None, cache: str) -> LoGo:
        chosen = {"activation": activation, "cache": cache, "calibration_prompts": some[20:]}
        return engine(model, folder, signal="calibrated", **chosen)

    cache = str(tmp_path / "cache")
    own, last = opened(None, cache), opened("last:9", cache)
    [prompt] = invoked((20,), tail=(9, 11, 12))
    same_selection(own.select(prompt), opened(None, "").select(prompt))
    same_selection(last.select(prompt), opened("last:9", "").select(prompt))


@pytest.mark.parametrize("kind", ["last:4", "invocation"])
def test_a_mixture_is_written_with_where_it_acts(kind: str, tmp_path: Path) -> None:
    model = tiny.model("llama", eos_token_id=None)
    folder = pool_of(tmp_path / "pool", model, **({"alora_invocation_tokens": INVOKE} if kind == "invocation" else {}))
    logo = engine(model, notes(folder, kind))
    [prompt] = invoked((30,))
    logo.save_mixture(MIXTURES[0], tmp_path / "out" / "one")
    written = engine(model, tmp_path / "out", k=1)
    assert [str(one) for one in written.fitted.activations] == [kind]
    want = logo.generate(prompt, adapters=MIXTURES[0], max_new_tokens=6)
    assert written.generate(prompt, adapters={"one": 1.0}, max_new_tokens=6).token_ids == want.token_ids


def test_a_mixture_of_two_invocations_is_not_written(tmp_path: Path) -> None:
    """Nor is the user told to let its adapters act everywhere, where they were not trained to act."""
    model = tiny.model("llama", eos_token_id=None)
    folder = pool_of(tmp_path / "pool", model, alora_invocation_tokens=INVOKE)
    edit_config(folder / "t1", alora_invocation_tokens=[9])
    with pytest.raises(UsageError) as refused:
        engine(model, folder).save_mixture({"t0": 0.5, "t1": 0.5}, tmp_path / "out")
    assert str(refused.value) == (
        "the mixture's adapters act on different tokens ('t0' from the tokens [7, 8] on, 't1' from the tokens [9] on): "
        "write those that act on the same tokens alone"
    )


@pytest.mark.parametrize("kind", ["hybrid", "static"])
def test_a_checkpoint_that_names_its_cache(kind: str, tmp_path: Path) -> None:
    model: Any = tiny.model("gemma3", eos_token_id=None)
    logo = engine(model, notes(pool_of(tmp_path, model), "last:4"))
    prompt = tiny.prompts([40])[0]
    want = logo.generate(prompt, max_new_tokens=3)
    with read_tokens(model) as seen:
        found = logo.generate(prompt, max_new_tokens=3, cache_implementation=kind)
    assert found.token_ids == want.token_ids
    assert seen == ([4, 4, 1, 1] if kind == "hybrid" else [4, 40, 1, 1])


# -- on our server -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [512, 16], ids=["whole prompts", "prompts in parts"])
@pytest.mark.parametrize("kind", ["last:4", "invocation", "mixed"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_answers_are_those_of_the_engine(name: str, kind: str, step: int, tmp_path: Path) -> None:
    model = tiny.model(name)
    modules = ("q_proj", "v_proj") if name != "gpt2" else ("c_attn",)
    folder = pool_of(tmp_path, model, modules)
    if kind == "last:4":
        notes(folder, kind)
    for adapter in ("t0",) if kind == "mixed" else ("t0", "t1", "t2") if kind == "invocation" else ():
        edit_config(folder / adapter, alora_invocation_tokens=INVOKE)
    if kind == "mixed":
        with pytest.warns(UserWarning, match="act on every token"):
            logo = engine(model, folder)
    else:
        logo = engine(model, folder)
    rows = [*invoked((20, 5, 80, 40, 70)), [*INVOKE, 9], [5, *INVOKE]]
    requests = [MixtureRequest(adapters=mixture) for mixture in MIXTURES] + [MixtureRequest()] * 3

    async def use(service: Service) -> Any:
        jobs = (serving.answer(service, ids, wanted, Sampling(9)) for ids, wanted in zip(rows, requests, strict=True))
        found = await asyncio.gather(*jobs)
        again = [await serving.answer(service, ids, MixtureRequest(), Sampling(9)) for ids in rows[4:]]
        return [*found, *again]

    asked = zip([*rows, *rows[4:]], [*requests, *requests[4:]], strict=True)
    answers = serving.served(logo, use, memory=Memory(4, step_tokens=step))
    for (ids, wanted), (tokens, _, chosen) in zip(asked, answers, strict=True):
        [want] = serving.alone(logo, [ids], [wanted], 9)
        assert (tokens, chosen.chosen.selection.adapters) == (want[0], want[2])


@pytest.mark.parametrize(("cached", "read"), [({}, [100, 3, 1, 1, 1]), ({"prefix_cache_gb": 0}, [100, 99, 1, 1, 1])])
def test_a_prompt_is_read_once_unless_it_was_dropped(cached: dict[str, int], read: list[int], tmp_path: Path) -> None:
    model = tiny.model("llama", eos_token_id=None)
    logo = engine(model, notes(pool_of(tmp_path, model), "last:4"), **cached)
    prompt = tiny.prompts([100])[0]

    async def use(service: Service) -> Any:
        with read_tokens(model) as seen:
            tokens, *_ = await serving.answer(service, prompt, MixtureRequest(), Sampling(3))
            assert seen == read
            await serving.answer(service, prompt, MixtureRequest(options={"k": 1}), Sampling(3))
        return seen[len(read) :], tokens

    again, tokens = serving.served(logo, use)
    assert cached or again == [4, 3, 1, 1, 1]
    assert tokens == serving.alone(logo, [prompt], [MixtureRequest()], 3)[0][0]
