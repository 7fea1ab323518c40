"""Adapters that act from a position of the prompt on: as PEFT's aLoRA does, and as a mask on the gates would."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import tiny
from logo import AdapterPool, LoGo, SelectionSettings
from logo.adapters.activation import EVERYWHERE, Activation, acting, earliest, last_occurrence
from logo.adapters.examples import write_examples
from logo.errors import AdapterError, StorageError, UsageError
from logo.selection import scorers
from logo.selection.once import OnceReader
from logo.selection.probe import Probe
from logo.selection.signature import described
from make_adapters import edit_config, load_peft, write, write_peft
from test_engine import tokenizer, write_adapter
from test_prefixes import read_tokens, words

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
    settings = SelectionSettings.of(**{"signal": "norm", "k": 2, "cache": "", **chosen})
    return LoGo(model, tokenizer(bos=False), AdapterPool.from_directory(folder), settings=settings)


def invoked(lengths: Sequence[int], tail: Sequence[int] = (11, 12)) -> list[list[int]]:
    """Prompts with the invocation tokens near their end."""
    return [[*row, *INVOKE, *tail] for row in tiny.prompts(list(lengths))]


# -- where it begins ---------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 3), max_size=12), st.lists(st.integers(0, 3), min_size=1, max_size=3))
def test_the_last_occurrence_is_the_last(prompt: list[int], tokens: list[int]) -> None:
    found = last_occurrence(prompt, tokens)
    places = [i for i in range(len(prompt)) if prompt[i : i + len(tokens)] == tokens]
    assert found == (places[-1] if places else None)


def test_peft_counts_the_same() -> None:
    from peft.tuners.lora.variants import calculate_alora_offsets

    class Config:
        alora_invocation_tokens = INVOKE

    for prompt in ([7, 8, 1, 7, 8, 2], [7, 8], [1, 2, 7], [7, 7, 8], [8, 7]):
        [offset] = calculate_alora_offsets({"a": Config()}, "a", torch.tensor([prompt]))  # type: ignore[dict-item]
        begin = Activation(tuple(INVOKE)).begin(prompt)
        assert (None if offset is None else len(prompt) - offset) == begin


def test_counting_from_the_end() -> None:
    assert Activation.parse("last:4").begin(range(10)) == 6
    assert Activation.parse("last:4").begin(range(3)) == 0
    assert Activation.parse("everywhere").begin(range(3)) == 0
    assert earliest([Activation(last=2), Activation(last=4)], range(10)) == 6  # type: ignore[arg-type]
    assert earliest([Activation(tokens=(99,))], range(10)) == 9  # type: ignore[arg-type]
    assert (
        str(Activation(last=3)) == "last:3"
        and str(Activation((1,))) == "invocation"
        and str(EVERYWHERE) == "everywhere"
    )


@pytest.mark.parametrize("text", ["last", "last:", "last:-1", "first:2", "", None, 4, "last:1.5"])
def test_what_is_no_activation(text: Any) -> None:
    with pytest.raises(UsageError, match="expected everywhere, invocation or last:N"):
        Activation.parse(text)


def test_nothing_would_act_on_the_first_token_of_the_answer() -> None:
    with pytest.raises(UsageError, match="last:0: no adapter would act"):
        Activation.parse("last:0")


def test_what_a_user_forces() -> None:
    assert acting(Activation((1,)), "last:2", None) == Activation(last=2)
    assert acting(Activation((1,)), "everywhere", "error") == EVERYWHERE
    assert acting(Activation((1,)), "invocation", "last:2").without == "last:2"
    with pytest.raises(UsageError, match="no invocation tokens"):
        acting(EVERYWHERE, "invocation")
    for text in ("everywhere", "sometimes", "last:0"):
        with pytest.raises(UsageError, match="when_not_invoked"):
            SelectionSettings(when_not_invoked=text)


# -- opening -----------------------------------------------------------------------------------------------------------


def test_where_it_is_said(tmp_path: Path) -> None:
    write(tmp_path / "pool" / "plain")
    write(tmp_path / "pool" / "invoked", alora_invocation_tokens=INVOKE)
    write(tmp_path / "pool" / "deep" / "one")
    notes(tmp_path / "pool", "last:4")
    notes(tmp_path / "pool" / "deep", "last:2")
    for _ in range(2):  # the second time from the cache
        pool = AdapterPool.from_directory(tmp_path / "pool", cache=tmp_path / "cache")
        assert {a.name: str(a.activation) for a in pool} == {
            "plain": "last:4",
            "invoked": "invocation",
            "deep/one": "last:2",
        }
    assert pool.read_once and pool["invoked"].activation.tokens == tuple(INVOKE)
    alone = AdapterPool()
    assert str(alone.add(tmp_path / "pool" / "plain").activation) == "last:4"  # its pool's notes lie above it
    notes(tmp_path / "pool", "everywhere")
    assert not AdapterPool.from_directory(tmp_path / "pool", cache=tmp_path / "cache").read_once


@pytest.mark.parametrize("tokens", [[], ["a"], [-1], "x", [1.5], [True]])
def test_invocation_tokens_that_cannot_be(tmp_path: Path, tokens: Any) -> None:
    write(tmp_path / "a", alora_invocation_tokens=tokens)
    with pytest.raises(AdapterError, match="alora_invocation_tokens must be a list of one token id or more"):
        AdapterPool().add(tmp_path / "a")


def test_notes_that_name_no_activation(tmp_path: Path) -> None:
    write(tmp_path / "a")
    notes(tmp_path, "last:x")
    with pytest.raises(StorageError, match=r"pool\.json: activation: expected everywhere"):
        AdapterPool.from_directory(tmp_path, cache="")


# -- as PEFT answers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(QUERY))
def test_one_alone_answers_as_in_peft(name: str, tmp_path: Path) -> None:
    write_peft(tmp_path / "pool" / "a", tiny.model(name), target_modules=[QUERY[name]], alora_invocation_tokens=INVOKE)
    reference: Any = load_peft(tmp_path / "pool" / "a", tiny.model(name))
    logo = engine(tiny.model(name), tmp_path / "pool", k=1)
    prompts = [*invoked((9, 30, 70)), [*INVOKE, 5], *tiny.prompts([8])]  # the last one never invokes it
    with pytest.warns(UserWarning, match="lacks its invocation tokens"):
        together = logo.generate(prompts, adapters={"a": 1.0}, max_new_tokens=8, batch_size=8)
    for prompt, answer in zip(prompts, together, strict=True):
        ids = torch.tensor([prompt])
        want = reference.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        assert list(answer.token_ids) == want[0, len(prompt) :].tolist()
        assert logo.generate(prompt, adapters={"a": 1.0}, max_new_tokens=8).token_ids == answer.token_ids
    assert logo.not_invoked == {"a": 2}


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


def test_an_output_head_that_gets_some_positions_has_the_gates_of_these(tmp_path: Path) -> None:
    write_peft(tmp_path / "a", target_modules=["q_proj", "lm_head"], save={"save_embedding_layers": False})
    logo = engine(tiny.model("llama"), notes(tmp_path, "last:4"), k=1)
    ids, some = torch.tensor([list(range(10, 20))]), torch.tensor([2, 5, 6, 9])
    with torch.no_grad(), logo._mixer.active(logo.pool, [{"a": 1.0}], begins=[{"a": 6}]):
        every = logo.model(input_ids=ids).logits
        found = logo.model(input_ids=ids, logits_to_keep=some).logits
    assert torch.allclose(found, every[:, some], atol=1e-5)


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
    found = logo.generate(prompts, adapters=mixtures, max_new_tokens=6, batch_size=4)
    for prompt, mixture, answer in zip(prompts, mixtures, found, strict=True):
        assert list(answer.token_ids) == masked(model, logo.fitted, prompt, mixture, 6)
    forced = logo.generate(prompts, adapters=mixtures, max_new_tokens=6, batch_size=4, activation="last:2")
    late = logo.fitted.acting("last:2")
    for prompt, mixture, answer in zip(prompts, mixtures, forced, strict=True):
        assert list(answer.token_ids) == masked(model, late, prompt, mixture, 6)


def test_beams_and_samples_keep_their_rows(tmp_path: Path) -> None:
    model = tiny.model("llama", eos_token_id=None)
    logo = engine(model, notes(pool_of(tmp_path, model), "last:4"))
    prompts = tiny.prompts([30, 8, 70])
    together = logo.generate(prompts, max_new_tokens=5, num_beams=3, batch_size=3)
    for prompt, answer in zip(prompts, together, strict=True):
        alone = logo.generate(prompt, max_new_tokens=5, num_beams=3)
        assert alone.token_ids == answer.token_ids


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
        again = logo.generate(prompt, max_new_tokens=3, k=1, weighting="linear")
    assert seen == [4, 4, 1, 1]
    with read_tokens(model) as seen:
        chosen = logo.generate(prompt, adapters=first.selection, max_new_tokens=3)
    assert seen == [4, 1, 1]
    assert chosen.token_ids == first.token_ids and again.selection.adapters == first.selection.adapters[:1]
    with read_tokens(model) as seen:  # a budget of nothing keeps a prompt as long as it is answered
        without = other.generate(prompt, max_new_tokens=3)
    assert seen == [100, 4, 1, 1] and without.token_ids == first.token_ids
    assert other.beginnings is not None and other.beginnings.bytes == 0


def test_prompts_are_described_by_the_tokens_on_which_adapters_act(tmp_path: Path) -> None:
    model = tiny.model("llama", eos_token_id=None)
    folder = notes(pool_of(tmp_path, model), "last:4")
    write_examples(folder / "t0", ["Take the opposite of hot.", "Take the opposite of far."])
    scorer = engine(model, folder, signal="calibrated").scorer
    assert isinstance(scorer._reader, OnceReader) and scorer.signatures is not None
    rows = torch.tensor(tiny.prompts([40, 40]))
    hidden = Probe(model, scorer.points, "projection", "each")(rows, torch.ones_like(rows))
    for _ in range(2):  # the second time, the beginnings come from the cache
        found = scorer._reader(rows, torch.ones_like(rows)).descriptions
        for description, point in zip(found, scorer.signatures.points, strict=True):
            tail = hidden[point].view(2, 39, -1)[:, -4:]
            expected = described(tail.flatten(0, 1), torch.arange(2).repeat_interleave(4), 2)
            torch.testing.assert_close(description, expected)
            assert not torch.allclose(*description.unbind(1))


def test_a_stream_reads_its_prompt_once(tmp_path: Path) -> None:
    model = tiny.model("llama", eos_token_id=None)
    logo = engine(model, notes(pool_of(tmp_path, model), "last:4"), prefix_cache_gb=0)
    prompt, other = tiny.prompts([100, 90])
    want = logo.generate(prompt, max_new_tokens=3)
    assert logo.beginnings is not None
    with read_tokens(model) as seen:
        stream = logo.stream(prompt, max_new_tokens=3)
        logo.stream(other, max_new_tokens=3)  # nobody reads it
        logo.select(other, max_new_tokens=3)
        assert logo.beginnings.bytes == 0
        assert "".join(stream) == want.text
    assert seen == [100, 90, 90, 4, 1, 1] and logo.beginnings.bytes == 0


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
    assert logo.beginnings is not None and logo.beginnings.found > 0


@given(st.lists(st.integers(1, 200), min_size=1, max_size=6), st.integers(0, 40_000))
def test_pages_stay_within_the_budget(lengths: list[int], budget: int) -> None:
    from logo.selection.beginnings import Beginnings

    model = tiny.model("llama", max_position_embeddings=512)
    kept = Beginnings(model, budget)
    for number, length in enumerate(lengths):
        row = tiny.prompts([length], seed=number % 3)[0]
        with kept.held():
            cache = kept.cache([row], [length], [length])
            assert cache.get_seq_length() == length
            assert sum(page.tokens for page in kept.find(row, length)) == length
        assert kept.bytes <= budget and kept.bytes == sum(page.bytes for page in kept._pages.values())


def test_what_stays_of_a_prompt_is_found(tmp_path: Path) -> None:
    """The last pages are dropped first, since pages are found from the first one on."""
    from logo.selection.beginnings import PAGE, Beginnings

    model = tiny.model("llama")
    row, other = tiny.prompts([6 * PAGE, 2 * PAGE])
    kept = Beginnings(model, 10**9)
    kept.cache([row[:PAGE]], [PAGE], [PAGE])
    kept.budget = 4 * kept.bytes
    for end, found in ((6, 4), (5, 4)):  # the second time, some are known
        kept.cache([row], [end * PAGE], [end * PAGE])
        assert len(kept.find(row, 6 * PAGE)) == found == len(kept._pages)
    kept.cache([other], [2 * PAGE], [2 * PAGE])
    assert len(kept.find(row, 6 * PAGE)) == 2 == len(kept.find(other, 2 * PAGE))


def test_a_shared_beginning_is_read_once(tmp_path: Path) -> None:
    model = tiny.model("llama", max_position_embeddings=512)
    logo = engine(model, notes(pool_of(tmp_path, model), "last:4"))
    shared = tiny.prompts([128])[0]
    prompts = [[*shared, *tail] for tail in tiny.prompts([20, 20, 20], seed=1)]
    with read_tokens(model) as seen:
        logo.select(prompts, batch_size=3)
    assert seen == [128, 60]


def test_without_its_invocation(tmp_path: Path) -> None:
    model = tiny.model("llama", eos_token_id=None)
    folder = pool_of(tmp_path, model, alora_invocation_tokens=INVOKE)
    logo, [prompt] = engine(model, folder), tiny.prompts([12])
    with pytest.warns(UserWarning, match="lacks its invocation tokens") as told:
        answers = [logo.generate(prompt, adapters={"t0": 1.0}, max_new_tokens=4) for _ in range(3)]
    assert len(told) == 1 and logo.not_invoked == {"t0": 3}
    assert answers[0].token_ids == logo.generate(prompt, adapters={}, max_new_tokens=4).token_ids
    with pytest.warns(UserWarning, match="^adapters 't1', 't2': a prompt lacks their invocation tokens") as told:
        logo.generate(prompt, adapters=dict.fromkeys(NAMES, 0.5), max_new_tokens=1)
    assert len(told) == 1 and logo.not_invoked == {"t0": 4, "t1": 1, "t2": 1}
    instead = engine(model, folder, when_not_invoked="last:2").generate(prompt, adapters={"t0": 1.0}, max_new_tokens=4)
    forced = logo.generate(prompt, adapters={"t0": 1.0}, max_new_tokens=4, activation="last:2")
    assert instead.token_ids == forced.token_ids
    with pytest.raises(UsageError, match="adapter 't0': the prompt does not contain the invocation tokens"):
        engine(model, folder, when_not_invoked="error").generate(prompt, adapters={"t0": 1.0}, max_new_tokens=4)


def test_a_model_that_keeps_a_state_reads_all_under_the_mixture(tmp_path: Path) -> None:
    model = tiny.model("llama", eos_token_id=None)
    logo = engine(model, notes(pool_of(tmp_path, model), "last:4"))
    logo._decoder._beginnings = None  # as for a model with a state of its own
    prompt = tiny.prompts([40])[0]
    [answer] = logo.generate([prompt], adapters=MIXTURES[:1], max_new_tokens=5)
    assert list(answer.token_ids) == masked(model, logo.fitted, prompt, MIXTURES[0], 5)


@pytest.mark.parametrize("name", list(tiny.STATEFUL))
def test_such_a_model_selects_and_answers(name: str, tmp_path: Path) -> None:
    model = tiny.model(name, eos_token_id=None)
    modules = ("q_proj",) if name == "minimax" else ("in_proj",)
    logo = engine(model, notes(pool_of(tmp_path, model, modules), "last:4"), signal="calibrated")
    assert logo.beginnings is None
    prompts = tiny.prompts([60, 9])
    found = logo.select(prompts)
    for one, prompt in zip(found, prompts, strict=True):
        assert list(logo.select(prompt).scores.values()) == pytest.approx(list(one.scores.values()), rel=1e-3, abs=1e-4)
    answer = logo.generate(prompts[0], adapters=found[0], max_new_tokens=5)
    assert list(answer.token_ids) == masked(model, logo.fitted, prompts[0], found[0].mixture, 5)


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


@pytest.mark.parametrize("merge", ["ties", "arrow"])
def test_merges_act_where_their_adapters_do(merge: str, tmp_path: Path) -> None:
    model = tiny.model("llama", eos_token_id=None)
    folder = pool_of(tmp_path, model, alora_invocation_tokens=INVOKE)
    logo = engine(model, folder)
    logo.merge = merge  # type: ignore[assignment]
    prompts = invoked((20, 20))
    together = logo.generate(prompts, adapters=MIXTURES[:2], max_new_tokens=4, batch_size=2)
    assert [a.token_ids for a in together] == [
        logo.generate(p, adapters=m, max_new_tokens=4).token_ids for p, m in zip(prompts, MIXTURES[:2], strict=True)
    ]


# -- the signal --------------------------------------------------------------------------------------------------------


def test_adapters_are_compared_on_the_tokens_on_which_they_act(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores follow from the last four tokens alone: whitened by those of all texts, at every point of every layer."""
    from logo.selection.probe import Probe
    from logo.selection.reference import Reference, finished, prompt_means
    from logo.selection.whitening import Whitening

    some = [words(8 + seed, seed) for seed in range(30)]
    monkeypatch.setattr(scorers, "NEUTRAL", some[:20])  # ours have no words that the tiny tokenizer knows
    model = tiny.model("llama")
    folder = notes(pool_of(tmp_path, model), "last:4")
    logo = engine(model, folder, signal="calibrated", calibration_prompts=some[20:])
    scorer, prompts = logo.scorer, tiny.prompts([40, 9])
    assert logo.reads == "the tokens on which the adapters act (last:4), at 6 points, once"
    assert logo.points == tuple(f"{i}.self_attn.{m}_proj" for i in range(3) for m in ("q", "v"))

    def last(rows: list[list[int]]) -> tuple[list[torch.Tensor], torch.Tensor]:
        probe = Probe(model, scorer.points, "projection", "each")
        whole = [probe(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.int64)) for row in rows]
        owners = torch.arange(len(rows)).repeat_interleave(torch.tensor([min(4, len(row)) for row in rows]))
        return [torch.cat([one[i][-4:] for one in whole]) for i in range(len(scorer.points))], owners

    def of_norms(whitening: Whitening, vectors: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        centred = vectors - whitening.mean
        return (centred @ delta.T).norm(dim=1) / (centred @ whitening.sketch().T).norm(dim=1).sqrt()

    texts = logo.prompts.texts(some)
    hidden, owners = last(texts)
    asked, of_asked = last(prompts)
    known, found = [], []
    for point, vectors, own in zip(scorer.points, hidden, asked, strict=True):
        whitening = Whitening.of(vectors)
        responses = []
        for adapter in logo.fitted:
            factors = adapter.read([point.module])[point.module]
            delta = whitening.fold(factors.scaled_b() @ factors.A.float())
            responses.append([of_norms(whitening, part, delta) for part in (vectors, own)])
        for kept, part, who, count in ((known, 0, owners, len(texts)), (found, 1, of_asked, 2)):
            means = prompt_means(torch.stack([one[part] for one in responses], dim=1), who, count)
            kept.append(finished(means, "whitened").T)
    neutral, own = torch.stack(known, dim=1), torch.stack(found, dim=1)  # (adapters, points, texts)
    assert scorer.calibration is not None
    heard = torch.cat([scorer.calibration.neutral, scorer.calibration.requests], dim=2)
    assert torch.allclose(heard, neutral, atol=1e-4)
    read = [
        scorer._reader(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.int64)).responses for row in prompts
    ]
    responses = torch.stack([torch.cat(point) for point in zip(*read, strict=True)], dim=0)  # (points, rows, adapters)
    assert torch.allclose(responses.permute(2, 0, 1), own, atol=1e-4)
    want = Reference.of(heard[:, :, :20], heard[:, :, 20:]).scores(responses.permute(2, 0, 1))
    for selection, row in zip(logo.select(prompts), want, strict=True):
        assert list(selection.scores.values()) == pytest.approx(row.tolist(), rel=1e-4, abs=1e-4)


def test_texts_of_a_calibration_invoke_the_adapters(tmp_path: Path) -> None:
    model = tiny.model("llama")
    logo = engine(model, pool_of(tmp_path, model, alora_invocation_tokens=INVOKE), signal="calibrated")
    cache = logo.scorer.cache
    assert cache is not None and all(row[-2:] == INVOKE for row in cache.texts.rows)


def test_calibrations_of_other_tokens_are_other_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts end with the invocation of one kind of adapters; which of their tokens count depends on the other kind."""
    some = [words(8 + seed, seed) for seed in range(30)]
    monkeypatch.setattr(scorers, "NEUTRAL", some[:20])
    model = tiny.model("llama")
    folder = pool_of(tmp_path / "pool", model, alora_invocation_tokens=INVOKE)
    edit_config(folder / "t1", alora_invocation_tokens=[9])

    def opened(without: str, cache: str) -> LoGo:
        chosen = {"when_not_invoked": without, "cache": cache, "calibration_prompts": some[20:]}
        return engine(model, folder, signal="calibrated", **chosen)

    cache = str(tmp_path / "cache")
    off, error, last = (opened(without, cache) for without in ("off", "error", "last:9"))
    [prompt] = invoked((20,), tail=(9, 11, 12))
    assert off.select(prompt) == error.select(prompt)
    assert last.select(prompt) == opened("last:9", "").select(prompt)


@pytest.mark.parametrize("count", [3, 40])
def test_few_vectors_borrow_the_directions_of_all(count: int) -> None:
    from logo.selection.whitening import Whitening

    hidden = torch.randn(60, 16, generator=torch.Generator().manual_seed(0)) + torch.linspace(0, 1, 60)[:, None]
    some = torch.arange(60) < count
    made = Whitening.of_some(hidden, some)
    assert torch.allclose(made.mean, hidden[some].mean(dim=0), atol=1e-6)
    assert torch.equal(made.basis, Whitening.of(hidden[some] if count > 16 else hidden).basis)


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


def test_what_acts_on_different_tokens_is_no_single_adapter(tmp_path: Path) -> None:
    model = tiny.model("llama")
    folder = pool_of(tmp_path / "pool", model, alora_invocation_tokens=INVOKE)
    edit_config(folder / "t0", alora_invocation_tokens=[9])
    with pytest.raises(UsageError, match="act on different tokens"):
        engine(model, folder).save_mixture(MIXTURES[0], tmp_path / "out")


def test_a_prompt_that_invokes_nothing_is_still_scored(tmp_path: Path) -> None:
    model = tiny.model("llama")
    logo = engine(model, pool_of(tmp_path, model, alora_invocation_tokens=INVOKE), when_not_invoked="error")
    [prompt] = tiny.prompts([12])
    assert len(logo.select(prompt).scores) == 3
    with pytest.raises(UsageError, match="does not contain the invocation tokens"):
        logo.generate(prompt, max_new_tokens=2)


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


def test_prompt_lookup_changes_no_answer(tmp_path: Path) -> None:
    """Assisted decoding of transformers feeds the whole prompt to any cache, also one that holds its beginning."""
    model = tiny.model("llama", eos_token_id=None)
    logo = engine(model, notes(pool_of(tmp_path, model), "last:4"))
    prompt = tiny.prompts([20])[0] * 2
    for mixture in MIXTURES:
        want = logo.generate(prompt, adapters=mixture, max_new_tokens=12)
        found = logo.generate(prompt, adapters=mixture, max_new_tokens=12, prompt_lookup_num_tokens=3)
        assert found.token_ids == want.token_ids
