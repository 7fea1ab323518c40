"""`LoGo` end to end on tiny models: selecting, mixed batches, forcing, streaming, a pool that changes."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerFast

import tiny
from logo import AdapterPool, LoGo, PoolError, SelectionSettings, Truncation, UsageError
from logo.adapters.layout import linear_modules, linear_shape
from logo.errors import StoreFull
from tolerances import same_scores, same_weights

WORDS = ["<s>", "</s>", "<pad>", *(f"w{i}" for i in range(3, 90)), "\n", "a\n", "b", "c", "d", "<unk>"]


def tokenizer(bos: bool = True) -> PreTrainedTokenizerFast:
    """One word, one token."""
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    if bos:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def write_adapter(
    folder: Path, model: nn.Module, names: tuple[str, ...], rank: int, seed: int, scale: float = 0.2
) -> None:
    """A random adapter on every linear module whose name ends in one of `names`."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for path, module in linear_modules(model):
        shape = linear_shape(module)
        if path.endswith(names) and shape is not None:
            a = torch.randn(rank, shape.in_features, generator=generator) * scale
            b = torch.randn(shape.out_features, rank, generator=generator) * scale
            tensors |= {f"base_model.model.{path}.lora_A.weight": a, f"base_model.model.{path}.lora_B.weight": b}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank}))


def engine(model: nn.Module, adapters: Path, bos: bool = True, fold: bool | None = None, **settings: Any) -> LoGo:
    chosen = SelectionSettings.of(**{"signal": "norm", "k": 3, **settings})
    return LoGo(model, tokenizer(bos), AdapterPool.from_directory(adapters), settings=chosen, fold=fold)


PROMPTS = ["w3 w4 w5", "w9", "w20 w21 w22 w23 w24 w25 w26", "w7 w8", "w40 w41 w42 w43"]


def test_batches_equal_single_prompts(llama: nn.Module, adapters: Path) -> None:
    logo = engine(llama, adapters)
    one_by_one = [logo.generate(prompt, max_new_tokens=12) for prompt in PROMPTS]
    for size in (2, 5):
        batched = logo.generate(PROMPTS, max_new_tokens=12, batch_size=size)
        assert [answer.token_ids for answer in batched] == [answer.token_ids for answer in one_by_one]
        assert [answer.selection.adapters for answer in batched] == [a.selection.adapters for a in one_by_one]
        assert [answer.text for answer in batched] == [answer.text for answer in one_by_one]
    assert len({answer.selection.adapters for answer in one_by_one}) > 1  # rows really differ


@pytest.mark.parametrize("name", ["qwen2", "gemma3", "gpt2", "opt", "falcon", "phi3", "gpt_neox", "mistral"])
def test_every_architecture_selects_and_generates(name: str, tmp_path: Path) -> None:
    model = tiny.model(name)
    query = ("q_proj", "qkv_proj", "query_key_value", "c_attn")
    for i in range(4):
        write_adapter(tmp_path / f"t{i}", model, query, rank=2, seed=i)
    logo = engine(model, tmp_path, k=2)
    batched = logo.generate(PROMPTS, max_new_tokens=6, batch_size=5)
    for prompt, answer in zip(PROMPTS, batched, strict=True):
        alone = logo.generate(prompt, max_new_tokens=6)
        assert answer.token_ids == alone.token_ids
        assert answer.selection.weights == same_weights(alone.selection.weights)
        base = logo.generate(prompt, adapters={}, max_new_tokens=6)
        assert base.selection.adapters == ()


def test_selection_is_the_formula(llama: nn.Module, adapters: Path) -> None:
    """norm and entropy, computed the long way from ΔW and the model's hidden states."""
    for signal in ("norm", "entropy"):
        logo = engine(llama, adapters, signal=signal)
        ids = torch.tensor(logo.prompts.encode([PROMPTS[2]]))
        hidden = llama(input_ids=ids, output_hidden_states=True).hidden_states[2][0, -1].detach()
        expected = {}
        for adapter in logo.pool:
            weights = adapter.read()["model.layers.2.self_attn.q_proj"]
            response = (weights.B @ weights.A @ hidden) * weights.scaling
            q = response.softmax(-1)
            h = -(q * (q + 1e-8).log()).sum()
            expected[adapter.name] = float(response.norm() if signal == "norm" else 1 / (h + 1e-6))
        selection = logo.select(PROMPTS[2])
        assert selection.scores == same_scores(expected)
        best = sorted(expected, key=lambda name: -expected[name])[:3]
        assert list(selection.adapters) == best
        assert sum(selection.weights) == pytest.approx(1)
        assert selection.weights[0] == same_weights(expected[best[0]] / sum(expected[n] for n in best))


def test_base_context_does_not_depend_on_order_or_pool(llama: nn.Module, adapters: Path) -> None:
    logo = engine(llama, adapters)
    forward = logo.select(PROMPTS)
    assert logo.select(PROMPTS[::-1])[::-1] == forward
    smaller = LoGo(
        llama, tokenizer(), logo.pool.subset(["tasks/t0", "tasks/t3"]), settings=SelectionSettings("norm", k=2)
    )
    assert smaller.select(PROMPTS[0]).scores["tasks/t3"] == same_scores(forward[0].scores["tasks/t3"])


def test_carry_depends_on_the_prompt_before(llama: nn.Module, adapters: Path) -> None:
    first = engine(llama, adapters, probe_context="carry").select(PROMPTS)
    pool = engine(llama, adapters, probe_context="pool").select(PROMPTS, batch_size=1)
    assert first[0] == pool[0]
    assert first[1].scores != same_scores(pool[1].scores)
    logo = engine(llama, adapters, probe_context="carry")
    assert [logo.select(prompt) for prompt in PROMPTS] == first  # remembered between calls


def test_forced_and_base_only(llama: nn.Module, adapters: Path) -> None:
    logo = engine(llama, adapters)
    ids = torch.tensor(logo.prompts.encode([PROMPTS[0]]))
    plain = llama.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=2)[0, ids.shape[1] :].tolist()
    assert list(logo.generate(PROMPTS[0], adapters={}, max_new_tokens=8).token_ids) == plain
    forced = logo.generate(PROMPTS[0], adapters={"tasks/t4": 1.0}, max_new_tokens=8)
    assert forced.selection.adapters == ("tasks/t4",) and forced.selection.scores == {}
    assert list(forced.token_ids) != plain
    selected = logo.generate(PROMPTS[0], max_new_tokens=8)
    again = logo.generate([PROMPTS[0], PROMPTS[1]], adapters=[selected.selection, None], max_new_tokens=8)
    assert again[0].token_ids == selected.token_ids
    assert again[1].selection == logo.select(PROMPTS[1])


@pytest.mark.parametrize(
    ("forced", "error", "message"),
    [
        ({"tasks/t9": 1.0}, PoolError, "did you mean 'tasks/t"),
        ({"tasks/t0": float("nan")}, UsageError, "expected a number between -1e6 and 1e6"),
        ([{}], UsageError, "expected one entry for each of 2 prompts, found 1"),
    ],
)
def test_forcing_what_cannot_be(llama: nn.Module, adapters: Path, forced: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        engine(llama, adapters).generate(PROMPTS[:2], adapters=forced)


def test_stream_joins_to_generate(llama: nn.Module, adapters: Path) -> None:
    logo = engine(llama, adapters)
    pieces = list(logo.stream(PROMPTS[2], max_new_tokens=10))
    assert "".join(pieces) == logo.generate(PROMPTS[2], max_new_tokens=10).text
    assert len(pieces) > 1


def test_a_stream_ends_as_generate_does(llama: nn.Module, adapters: Path) -> None:
    logo = engine(llama, adapters)
    words = logo.generate(PROMPTS[2], max_new_tokens=10).text.split()
    for stop in (words[4], [" ".join(words[3:5]), "w1000"]):
        text = logo.generate(PROMPTS[2], max_new_tokens=10, stop=stop).text
        assert "".join(logo.stream(PROMPTS[2], max_new_tokens=10, stop=stop)) == text
        assert len(text.split()) < 10


def test_leaving_a_stream_ends_it(llama: nn.Module, adapters: Path) -> None:
    logo = engine(llama, adapters)
    before = hooks(llama)
    stream = logo.stream(PROMPTS[2], max_new_tokens=100)
    next(stream)
    stream.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "logo-stream"]
    assert hooks(llama) == before


def hooks(model: nn.Module) -> int:
    """Forward hooks on the model (transformers leaves some of its own once hidden states were asked for)."""
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_an_error_while_streaming_reaches_the_reader(llama: nn.Module, adapters: Path) -> None:
    logo = engine(llama, adapters)
    with pytest.raises(ValueError, match="sequence_bias"):
        list(logo.stream(PROMPTS[0], sequence_bias={}))


def test_greedy_whatever_the_checkpoint_says(llama: nn.Module, adapters: Path) -> None:
    logo = engine(llama, adapters)
    expected = logo.generate(PROMPTS[0], max_new_tokens=8).token_ids
    before = llama.generation_config
    llama.generation_config = GenerationConfig(do_sample=True, temperature=9.0, repetition_penalty=3.0, eos_token_id=1)
    try:
        assert logo.generate(PROMPTS[0], max_new_tokens=8).token_ids == expected
        torch.manual_seed(0)
        own = logo.generate(PROMPTS[0], max_new_tokens=8, generation_config=llama.generation_config).token_ids
        assert own != expected
    finally:
        llama.generation_config = before


def test_sampling_whatever_the_checkpoint_says(llama: nn.Module, adapters: Path) -> None:
    expected: list[tuple[int, ...]] = []
    before = llama.generation_config
    own = {"temperature": 0.01, "top_k": 1, "top_p": 0.01, "min_p": 0.9, "typical_p": 0.1, "repetition_penalty": 3.0}
    for checkpoint in ({}, own | {"no_repeat_ngram_size": 1, "epsilon_cutoff": 0.5, "eta_cutoff": 0.5}):
        llama.generation_config = GenerationConfig(do_sample=True, eos_token_id=1, **checkpoint)
        try:
            logo = engine(llama, adapters)
            torch.manual_seed(0)
            expected.append(logo.generate(PROMPTS[0], max_new_tokens=12, do_sample=True).token_ids)
            config = logo.prompts.generation_config(None, None, {"do_sample": True})
            drawn = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0}
            assert {name: getattr(config, name) for name in drawn} == drawn
        finally:
            llama.generation_config = before
    assert expected[0] == expected[1]


def test_sampling_is_seeded_by_torch(llama: nn.Module, adapters: Path) -> None:
    logo = engine(llama, adapters)

    def sample(seed: int) -> tuple[int, ...]:
        torch.manual_seed(seed)
        return logo.generate(PROMPTS[0], max_new_tokens=12, do_sample=True, temperature=3.0).token_ids

    assert sample(1) == sample(1) != sample(2)


def test_finish_reason_and_end_token(llama: nn.Module, adapters: Path) -> None:
    logo = engine(llama, adapters)
    full = logo.generate(PROMPTS[0], max_new_tokens=12)
    assert full.finish_reason == "length" and len(full.token_ids) == 12
    end = full.token_ids[4]
    cut = full.token_ids.index(end)
    batch = logo.generate(PROMPTS, max_new_tokens=12, eos_token_id=end, batch_size=5)
    assert batch[0].token_ids == full.token_ids[: cut + 1] and batch[0].finish_reason == "stop"


def test_stop_strings_and_dict_outputs() -> None:
    f1 = Path(__file__).parent / "data" / "golden" / "F1"
    logo = LoGo.from_pretrained(str(f1 / "model"), f1 / "adapters", device="cpu", signal="norm", k=3)
    prompts = ["Hello there", "A", "The garden repairs the broken clock"]
    plain = logo.generate(prompts, max_new_tokens=12, batch_size=3)
    piece = logo.tokenizer.decode(plain[2].token_ids[3:5])
    config = GenerationConfig(stop_strings=[piece], return_dict_in_generate=True, do_sample=False, max_new_tokens=12)
    stopped = logo.generate(prompts, generation_config=config, batch_size=3)
    assert piece in stopped[2].text and len(stopped[2].token_ids) < 12 and stopped[2].finish_reason == "stop"
    assert stopped[2].token_ids == plain[2].token_ids[: len(stopped[2].token_ids)]
    assert "".join(logo.stream(prompts[2], generation_config=config)) == stopped[2].text


def test_stop_at_newline_keeps_the_answer(llama: nn.Module, adapters: Path) -> None:
    """Stopping early gives the same first line as going on."""
    from logo.evaluation.metrics import first_line

    logo = engine(llama, adapters)
    options: dict[str, Any] = {"max_new_tokens": 30, "do_sample": True, "temperature": 5.0, "suppress_tokens": [1]}
    for seed in range(5):
        torch.manual_seed(seed)
        full = logo.generate(PROMPTS[0], **options)
        torch.manual_seed(seed)
        stopped = logo.generate(PROMPTS[0], stop_at_newline=True, **options)
        assert first_line(stopped.text) == first_line(full.text).rstrip()
        assert stopped.token_ids == full.token_ids[: len(stopped.token_ids)]
        torch.manual_seed(seed)
        assert "".join(logo.stream(PROMPTS[0], stop_at_newline=True, **options)) == stopped.text


def test_the_pool_may_change(llama: nn.Module, adapters: Path, tmp_path: Path) -> None:
    logo = engine(llama, adapters)
    before = logo.select(PROMPTS[0])
    write_adapter(tmp_path / "big", llama, ("q_proj",), rank=2, seed=99, scale=2.0)
    logo.pool.add(tmp_path / "big")
    after = logo.select(PROMPTS[0])
    assert after.adapters[0] == "big" and len(after.scores) == len(before.scores) + 1
    assert logo.generate(PROMPTS[0], max_new_tokens=4).selection == after
    logo.pool.remove("big")
    assert logo.select(PROMPTS[0]) == before


def test_an_adapter_without_the_probed_module(llama: nn.Module, adapters: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "mlp", llama, ("down_proj",), rank=2, seed=5)
    pool = AdapterPool.from_directory(adapters)
    pool.add(tmp_path / "mlp")
    with pytest.raises(PoolError, match=r"1 of 6 adapters do not touch .*q_proj and cannot be scored: mlp"):
        LoGo(llama, tokenizer(), pool, settings=SelectionSettings("norm"))
    logo = LoGo(llama, tokenizer(), pool, settings=SelectionSettings("norm", k=3, unscorable="skip"))
    assert "mlp" not in logo.select(PROMPTS[0]).scores
    assert logo.generate(PROMPTS[0], adapters={"mlp": 1.0}, max_new_tokens=3).selection.adapters == ("mlp",)


def test_a_pool_that_became_unusable_is_refused_until_it_is_mended(
    llama: nn.Module, adapters: Path, tmp_path: Path
) -> None:
    logo = engine(llama, adapters)
    before = logo.select(PROMPTS[0])
    write_adapter(tmp_path / "mlp", llama, ("down_proj",), rank=2, seed=5)
    logo.pool.add(tmp_path / "mlp")
    for _ in range(2):
        with pytest.raises(PoolError, match="cannot be scored: mlp"):
            logo.select(PROMPTS[0])
    logo.pool.remove("mlp")
    assert logo.select(PROMPTS[0]) == before


def test_k_larger_than_the_pool_warns_once(llama: nn.Module, adapters: Path) -> None:
    with pytest.warns(UserWarning, match="k is 9 but the pool has 5 adapters") as caught:
        logo = engine(llama, adapters, k=9)
        assert len(logo.select(PROMPTS)[0].adapters) == 5
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, "expected 1 or more, found 0"),
        ({"signal": "nrom"}, "did you mean 'norm'"),
        ({"probe_context": "all"}, "expected one of base, pool, carry"),
        ({"probe_texts": "all"}, "did you mean 'probe_text'"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SelectionSettings.of(**settings)


def test_empty_prompts(llama: nn.Module, adapters: Path) -> None:
    assert len(engine(llama, adapters).generate("", max_new_tokens=2).token_ids) == 2  # the bos token is a prompt
    with pytest.raises(UsageError, match="prompt 2 is empty"):
        engine(llama, adapters, bos=False).generate(["w3", ""], max_new_tokens=2)
    with pytest.raises(UsageError, match="expected one prompt or more, found an empty list"):
        engine(llama, adapters).generate([])


@pytest.mark.parametrize("side", ["left", "right"])
def test_long_prompts_are_cut_with_a_warning(llama: nn.Module, adapters: Path, side: Any) -> None:
    long = " ".join(f"w{3 + i % 80}" for i in range(200))
    logo = engine(llama, adapters)
    logo.prompts.truncation = Truncation(side=side)
    with pytest.warns(UserWarning, match="has 201 tokens, more than the 118 that fit"):
        [ids] = logo.prompts.encode([long], room=10)
    words = long.split()
    kept = words[:117] if side == "right" else words[-117:]
    assert ids == [0, *logo.tokenizer.convert_tokens_to_ids(kept)]
    with pytest.warns(UserWarning, match="cut"):
        assert len(logo.generate(long, max_new_tokens=10).token_ids) == 10


def test_more_new_tokens_than_context(llama: nn.Module, adapters: Path) -> None:
    with pytest.raises(UsageError, match="max_new_tokens is 128, but the model's context holds 128"):
        engine(llama, adapters).generate("w3", max_new_tokens=128)


def test_beam_search_keeps_rows_apart(llama: nn.Module, adapters: Path) -> None:
    logo = engine(llama, adapters)
    alone = [logo.generate(prompt, max_new_tokens=5, num_beams=3).token_ids for prompt in PROMPTS]
    assert [a.token_ids for a in logo.generate(PROMPTS, max_new_tokens=5, num_beams=3, batch_size=5)] == alone


def test_bfloat16(adapters: Path) -> None:
    model = tiny.model("llama").to(torch.bfloat16)
    answer = engine(model, adapters).generate(PROMPTS[0], max_new_tokens=4)
    assert len(answer.token_ids) == 4 and all(torch.isfinite(torch.tensor(answer.selection.weights)))


def test_device_map_auto_as_accelerate_does_it(llama: nn.Module, adapters: Path, tmp_path: Path) -> None:
    """Dispatched by accelerate with part of the model off the device: same answers."""
    import transformers

    expected = engine(llama, adapters).generate(PROMPTS, max_new_tokens=6)
    llama.save_pretrained(tmp_path / "model")
    split = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "cpu"}
    split |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=split, offload_folder=str(tmp_path / "off"), dtype=torch.float32
    )
    logo = engine(model.eval(), adapters)
    for ours, theirs in zip(logo.generate(PROMPTS, max_new_tokens=6), expected, strict=True):
        assert ours.token_ids == theirs.token_ids and ours.selection.adapters == theirs.selection.adapters


def test_in_little_memory_a_batch_is_answered_in_parts(llama: nn.Module, adapters: Path) -> None:
    pool, settings = AdapterPool.from_directory(adapters), SelectionSettings(signal="norm", k=2)
    roomy = LoGo(llama, tokenizer(), pool, settings=settings)
    expected = roomy.generate(PROMPTS, max_new_tokens=6)
    assert len({frozenset(answer.selection.adapters) for answer in expected}) > 1

    def tight(percent: int) -> LoGo:
        memory = percent / 100 * roomy.store.bytes / 1e9
        return LoGo(llama, tokenizer(), pool, settings=settings, adapter_memory_gb=memory)

    def suffices(percent: int) -> bool:
        try:
            return bool([tight(percent).generate(prompt, max_new_tokens=6) for prompt in PROMPTS])
        except StoreFull as full:
            assert "--adapter-memory-gb" in str(full)
            return False

    least = next(percent for percent in range(1, 101) if suffices(percent))  # for every prompt alone
    logo = tight(least)
    answers = logo.generate(PROMPTS, max_new_tokens=6)
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in expected]
    mixtures = [answer.selection for answer in answers]
    for score in (
        lambda logo: logo.score(PROMPTS[0], "w5 w6", mixtures),
        lambda logo: logo.score_pairs([([3, 4, 5], [5, 6])] * len(mixtures), mixtures),
    ):
        assert [one.nll for one in score(logo)] == same_scores([one.nll for one in score(roomy)])
    assert logo.store.bytes <= logo.store.budget
    together = {name for answer in answers for name in answer.selection.adapters}
    with pytest.raises(StoreFull):
        logo.store.hold([logo.store.source(logo.fitted[name]) for name in together])
