"""`LoGo` end to end on tiny models: selecting, mixed batches, forcing, streaming, a pool that changes; one reading of
each prompt, which is cut in the same place and begun once; and options that exist."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import CompileConfig, GenerationConfig, PreTrainedTokenizerFast

import tiny
import warm
from logo import AdapterPool, Generation, LoGo, PoolError, Selection, SelectionSettings, Truncation, UsageError
from logo.adapters.layout import linear_modules, linear_shape
from logo.cli.app import run
from logo.decoding import call_config
from logo.errors import CacheFull
from logo.opening import LOCAL_OPTIONS
from logo.prompts import chat, cut_left
from tolerances import PATIENCE, same_scores, same_weights

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


def engine(model: nn.Module, adapters: Path, bos: bool = True, **options: Any) -> LoGo:
    own = {name: options.pop(name) for name in (*LOCAL_OPTIONS, "truncation") if name in options}
    chosen = SelectionSettings.of(**{"signal": "norm", "k": 3, **options})
    return LoGo(model, tokenizer(bos), AdapterPool.open(adapters), settings=chosen, **own)


def ids_of(logo: LoGo, prompts: Sequence[Any], room: int = 0) -> list[list[int]]:
    """Token ids of prompts."""
    return [list(prompt.ids) for prompt in logo.prompts.read(prompts, room)]


OTHERS = [token for token in range(len(WORDS)) if token != 1]  # all tokens but the one that ends an answer
PROMPTS = ["w3 w4 w5", "w9", "w20 w21 w22 w23 w24 w25 w26", "w7 w8", "w40 w41 w42 w43"]


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3", "gpt2", "opt", "falcon", "phi3", "gpt_neox", "mistral"])
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


def test_forced_and_base_only(llama: nn.Module, adapters: Path) -> None:
    logo = engine(llama, adapters)
    ids = torch.tensor(ids_of(logo, [PROMPTS[0]]))
    plain = llama.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=2)[0, ids.shape[1] :].tolist()
    assert list(logo.generate(PROMPTS[0], adapters={}, max_new_tokens=8).token_ids) == plain
    forced = logo.generate(PROMPTS[0], adapters={"tasks/t4": 1.0}, max_new_tokens=8)
    assert forced.selection.adapters == ("tasks/t4",) and forced.selection.scores == {}
    assert list(forced.token_ids) != plain
    selected = logo.generate(PROMPTS[0], max_new_tokens=8)
    again = logo.generate([PROMPTS[0], PROMPTS[1]], adapters=[selected.selection, None], max_new_tokens=8)
    assert again[0].token_ids == selected.token_ids
    assert again[1].selection == logo.select(PROMPTS[1])


def test_a_stream_is_the_answer_in_pieces_and_ends_where_it_is_left(llama: nn.Module, adapters: Path) -> None:
    logo = engine(llama, adapters)
    pieces = list(logo.stream(PROMPTS[2], max_new_tokens=10))
    assert "".join(pieces) == logo.generate(PROMPTS[2], max_new_tokens=10).text and len(pieces) > 1
    before = hooks(llama)
    stream = logo.stream(PROMPTS[2], max_new_tokens=100)
    next(stream)
    stream.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "logo-stream"]
    assert hooks(llama) == before


def streaming() -> bool:
    """Whether a stream is being generated."""
    return any(thread.name == "logo-stream" for thread in threading.enumerate())


def test_a_stream_that_is_left_is_ended_by_whoever_has_it(llama: nn.Module, adapters: Path) -> None:
    logo = engine(llama, adapters)
    long = {"max_new_tokens": 100, "suppress_tokens": [1]}
    with logo.stream(PROMPTS[2], **long) as stream:
        for _ in stream:
            assert streaming()
            break
    assert not streaming() and list(stream) == []
    for _ in logo.stream(PROMPTS[2], **long):
        break
    assert not streaming()
    stream = logo.stream(PROMPTS[2], **long)
    assert next(stream)
    del stream
    assert not streaming()
    logo.stream(PROMPTS[2], **long).close()  # before anything is read
    assert not streaming()
    answers: list[Generation] = []
    with logo.stream(PROMPTS[2], **long) as stream:
        next(stream)
        waiting = threading.Thread(target=lambda: answers.append(logo.generate(PROMPTS[2], max_new_tokens=2)))
        waiting.start()
        stream.close()  # after which the model is free, although this thread goes on
        waiting.join(PATIENCE)
    assert answers == [logo.generate(PROMPTS[2], max_new_tokens=2)] or len(answers) == 1


def test_a_stream_that_waits_for_another_one_can_be_closed(llama: nn.Module, adapters: Path) -> None:
    logo = engine(llama, adapters)
    first, second = (logo.stream(PROMPTS[2], max_new_tokens=6, suppress_tokens=[1]) for _ in range(2))
    go_on = threading.Event()
    passes: list[None] = []

    def wait_in_the_middle(*_: Any) -> None:
        passes.append(None)
        if len(passes) == 3:
            assert go_on.wait(PATIENCE)

    hook = llama.register_forward_pre_hook(wait_in_the_middle)
    begun = next(first)
    reader = threading.Thread(target=lambda: list(second))
    reader.start()
    try:
        while sum(thread.name == "logo-stream" for thread in threading.enumerate()) < 2:
            pass
        second.close()
        reader.join(PATIENCE)
        assert not reader.is_alive() and not go_on.is_set()
    finally:
        go_on.set()
        hook.remove()
    assert begun + "".join(first) == logo.generate(PROMPTS[2], max_new_tokens=6, suppress_tokens=[1]).text


ENDS = {"end": 0, "raise RuntimeError('mine')": 1, "sys.exit(3)": 3}


@pytest.mark.slow
@pytest.mark.parametrize("end", ENDS)
def test_a_program_may_end_in_the_middle_of_a_stream(end: str) -> None:
    script = f"""
import sys
from logo import LoGo
stream = LoGo.from_pretrained("demo", device="cpu", signal="norm", k=3).stream("What is 7 plus 5?", min_new_tokens=90)
next(stream)
{"" if end == "end" else end}
"""
    done = subprocess.run([*warm.python(), "-c", script], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == ENDS[end], done.stderr
    assert "terminate called" not in done.stderr and ("RuntimeError: mine" in done.stderr) == ("mine" in end)


def hooks(model: nn.Module) -> int:
    """Forward hooks on the model (transformers leaves some of its own once hidden states were asked for)."""
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_a_config_means_what_it_says_and_the_checkpoint_nothing(llama: nn.Module, adapters: Path) -> None:
    """What a config leaves open is greedy decoding or plain sampling, but for the end tokens."""

    def answered(checkpoint: GenerationConfig, config: GenerationConfig | None, **options: Any) -> tuple[int, ...]:
        before, llama.generation_config = llama.generation_config, checkpoint
        try:
            torch.manual_seed(0)
            logo = engine(llama, adapters)
            found = logo.generate(PROMPTS[0], generation_config=config, **options)
            assert llama.generation_config is checkpoint
            return found.token_ids
        finally:
            llama.generation_config = before

    own = {"temperature": 0.01, "top_k": 1, "min_p": 0.9, "typical_p": 0.1, "repetition_penalty": 3.0}
    own |= {"no_repeat_ngram_size": 1, "epsilon_cutoff": 0.5, "eta_cutoff": 0.5, "suppress_tokens": [*range(3, 40)]}
    bare, odd = GenerationConfig(eos_token_id=1), GenerationConfig(do_sample=True, eos_token_id=1, **own)
    greedy = answered(bare, None, max_new_tokens=6)
    assert len(greedy) == 6
    for checkpoint in (bare, odd):
        assert answered(checkpoint, None, max_new_tokens=6) == greedy
        assert answered(checkpoint, GenerationConfig(max_new_tokens=6)) == greedy
        assert answered(checkpoint, GenerationConfig(), max_new_tokens=6, eos_token_id=greedy[2])[-1] == greedy[2]
        with pytest.raises(UsageError, match=r"max_length 14 counts the prompt's tokens.*max_new_tokens"):
            answered(checkpoint, GenerationConfig(max_length=14))
    sampled = answered(bare, None, max_new_tokens=12, do_sample=True)
    assert answered(odd, GenerationConfig(do_sample=True, max_new_tokens=12)) == sampled
    assert answered(odd, odd, max_new_tokens=12) != answered(bare, None, max_new_tokens=12)


def test_an_engine_that_is_made_during_an_answer_knows_the_checkpoints_end_tokens(
    llama: nn.Module, adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama, "generation_config", GenerationConfig(eos_token_id=1))
    logo, made = engine(llama, adapters), list[LoGo]()
    pieces = logo.stream(PROMPTS[0], adapters={}, max_new_tokens=6)
    next(pieces)
    thread = threading.Thread(target=lambda: made.append(engine(llama, adapters)))
    thread.start()
    list(pieces)
    thread.join()
    assert len(made[0].generate(PROMPTS[0], adapters={}, max_new_tokens=4, suppress_tokens=OTHERS).token_ids) == 1


def test_finish_reason_and_end_token(llama: nn.Module, adapters: Path) -> None:
    logo = engine(llama, adapters)
    full = logo.generate(PROMPTS[0], max_new_tokens=12)
    assert full.finish_reason == "length" and len(full.token_ids) == 12
    end = full.token_ids[4]
    cut = full.token_ids.index(end)
    batch = logo.generate(PROMPTS, max_new_tokens=12, eos_token_id=end, batch_size=5)
    assert batch[0].token_ids == full.token_ids[: cut + 1] and batch[0].finish_reason == "stop"
    short = logo.generate(PROMPTS[0], max_new_tokens=12, max_time=1e-9)  # cut after one step, not ended by the model
    assert len(short.token_ids) < 12 and short.finish_reason == "length"


@pytest.mark.slow
def test_stop_at_newline_keeps_the_answer(llama: nn.Module, adapters: Path) -> None:
    """Stopping early gives the same first line as going on."""
    from logo.evaluation.metrics import answer_in

    logo = engine(llama, adapters)
    options: dict[str, Any] = {"max_new_tokens": 30, "do_sample": True, "temperature": 5.0, "suppress_tokens": [1]}
    for seed in range(5):
        torch.manual_seed(seed)
        full = logo.generate(PROMPTS[0], **options)
        torch.manual_seed(seed)
        stopped = logo.generate(PROMPTS[0], stop_at_newline=True, **options)
        assert answer_in(stopped.text) == answer_in(full.text).rstrip()
        assert stopped.token_ids == full.token_ids[: len(stopped.token_ids)]
        torch.manual_seed(seed)
        assert "".join(logo.stream(PROMPTS[0], stop_at_newline=True, **options)) == stopped.text


def test_answers_are_judged_whole_where_gold_texts_have_several_lines(llama: nn.Module, adapters: Path) -> None:
    from logo.evaluation.answer import Answerer
    from logo.evaluation.datasets import Dataset
    from logo.rows import Row

    logo, new = engine(llama, adapters), {"max_new_tokens": 3}
    only: dict[str, Any] = {"suppress_tokens": [i for i in range(len(WORDS)) if WORDS[i] != "a\n"]}
    text = logo.generate(PROMPTS[0], **only, **new).text.strip()
    assert len(text.splitlines()) == 3
    for lines, gold, said in ((False, text, text), (False, "a", "a"), (True, text, "a")):
        answerer = Answerer(logo, "M", **new, generation={"stop_at_newline": not lines, **only}, first_lines=lines)
        [line], _ = answerer.answer(Dataset("d", Path(), (Row(PROMPTS[0], gold),)), range(1))
        assert (line["prediction"], line["value"]) == (said, int(gold == said))


def test_a_call_ends_on_the_pool_on_which_it_began(llama: nn.Module, adapters: Path, tmp_path: Path) -> None:
    """Otherwise an adapter is selected by its scores, and another one of its name answers."""
    for seed, folder in enumerate(("one", "other")):
        write_adapter(tmp_path / folder / "big", llama, ("q_proj", "v_proj"), rank=2, seed=seed, scale=2.0)
    logo = engine(llama, adapters)
    logo.pool.add(tmp_path / "one" / "big")
    expected = logo.generate(PROMPTS, batch_size=1, max_new_tokens=4)

    def replaced(*_: Any) -> None:
        hook.remove()
        logo.pool.remove("big")
        logo.pool.add(tmp_path / "other" / "big")

    hook = llama.register_forward_pre_hook(replaced)
    found = logo.generate(PROMPTS, batch_size=1, max_new_tokens=4)
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    assert [one.selection for one in found] == [one.selection for one in expected]
    assert logo.select(PROMPTS[0]).scores != expected[0].selection.scores  # now it has changed


def test_an_earlier_call_decides_nothing_about_a_changed_pool(llama: nn.Module, adapters: Path, tmp_path: Path) -> None:
    """`norm` reads the last q_proj, which the new adapter lacks; the engine's own signal reads what it has."""
    write_adapter(tmp_path / "new", llama, ("k_proj",), rank=2, seed=9)
    logo = engine(llama, adapters, signal="calibrated")
    logo.select(PROMPTS[0], signal="norm")
    logo.pool.add(tmp_path / "new")
    assert "new" in logo.select(PROMPTS[0]).scores
    with pytest.raises(PoolError, match="do not touch"):
        logo.select(PROMPTS[0], signal="norm")


def load(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    model.load_state_dict(weights)


def assign(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    model.load_state_dict(weights, assign=True)
    model.requires_grad_(False)


@torch.no_grad()
def copy_over(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])


@pytest.mark.parametrize("change", [load, assign, copy_over])
def test_what_was_computed_from_weights_that_changed_is_computed_again(
    change: Callable[..., None], adapters: Path
) -> None:
    model, later = tiny.model("llama"), tiny.model("llama", seed=7)
    logo = engine(model, adapters, signal="calibrated", unscorable="skip", cache="", merge=True)
    mixture = {"tasks/t0": 1.0}
    before = logo.generate(PROMPTS[0], adapters=mixture, max_new_tokens=8)
    logo.select(PROMPTS[0])
    change(model, later.state_dict())
    fresh = engine(later, adapters, signal="calibrated", unscorable="skip", cache="", merge=True)
    found = logo.generate(PROMPTS[0], adapters=mixture, max_new_tokens=8)
    assert found.form == "merged" and found.token_ids != before.token_ids
    assert found.token_ids == fresh.generate(PROMPTS[0], adapters=mixture, max_new_tokens=8).token_ids
    assert logo.select(PROMPTS[0]).scores == same_scores(fresh.select(PROMPTS[0]).scores)


@pytest.mark.parametrize("merge", [True, False])
def test_a_stream_is_of_the_weights_at_its_first_piece(merge: bool, adapters: Path) -> None:
    model, later = tiny.model("llama"), tiny.model("llama", seed=7)
    mixture = {"tasks/t0": 1.0}
    logo = engine(model, adapters, merge=merge)
    logo.generate(PROMPTS[0], adapters=mixture, max_new_tokens=8)
    stream = logo.stream(PROMPTS[0], adapters=mixture, max_new_tokens=8)
    model.load_state_dict(later.state_dict())
    assert "".join(stream) == logo.generate(PROMPTS[0], adapters=mixture, max_new_tokens=8).text


def test_options_that_a_fixed_mixture_leaves_without_effect_are_refused(llama: nn.Module, adapters: Path) -> None:
    logo = engine(llama, adapters)
    fixed: list[Any] = [{"tasks/t0": 1.0}, {}]
    for ask in (
        lambda: logo.generate(PROMPTS[:2], adapters=fixed, max_new_tokens=1, k=1),
        lambda: logo.score(PROMPTS[0], "x", fixed, k=1),
        lambda: logo.stream(PROMPTS[0], adapters={}, prior=0.5),
    ):
        with pytest.raises(UsageError, match="`adapters` fixes the mixture"):
            ask()
    logo.generate(PROMPTS[:2], adapters=[{}, None], max_new_tokens=1, k=1)  # one of them selects
    for evidence in ("responses", ()):
        with pytest.raises(UsageError, match="only: expected some of responses"):
            logo.only(evidence)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="expected finite scores, found nan for 'tasks/t0'"):
        logo.reselect({"tasks/t0": float("nan")})


def test_a_calibration_is_kept_for_the_weights_that_it_was_computed_from(adapters: Path, tmp_path: Path) -> None:
    """Also where a selection is chosen again, so that nobody looks at the weights before."""
    cached = {"unscorable": "skip", "cache": str(tmp_path)}
    model = tiny.model("llama")
    logo = engine(model, adapters, **cached)
    adapter = logo.pool["tasks/t1"]
    logo.pool.remove(adapter.name)
    selection = logo.select(PROMPTS[0], signal="calibrated")
    logo.pool.add(adapter)
    logo.select(PROMPTS[0])
    load(model, tiny.model("llama", seed=7).state_dict())
    logo.reselect(selection, k=1)  # for which the adapter that came back is calibrated
    calibration = engine(tiny.model("llama"), adapters, **cached).calibrate("calibrated")
    assert calibration is not None and calibration.measured == 1  # that adapter's, with the weights of before


def test_a_selection_may_be_chosen_again_while_the_pool_changes(llama: nn.Module, adapters: Path) -> None:
    """Whoever reads what the engine knows of its pool reads one moment of it."""
    logo = engine(llama, adapters)
    made = logo.select(PROMPTS[0], signal="entropy")  # of a signal that is calibrated when somebody asks for it
    adapter = logo.pool["tasks/t4"]
    few = {name: score for name, score in made.scores.items() if name != adapter.name}
    ended = threading.Event()
    errors: list[BaseException] = []

    def choose() -> None:
        try:
            while not ended.is_set():
                logo.reselect(few, signal="entropy")
        except BaseException as error:
            errors.append(error)

    reader = threading.Thread(target=choose)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        reader.start()
        for _ in range(100):
            logo.pool.remove(adapter.name)
            logo.select(PROMPTS[0])
            logo.pool.add(adapter)
            logo.select(PROMPTS[0])
    finally:
        ended.set()
        reader.join(PATIENCE)
        sys.setswitchinterval(interval)
    assert not errors


def test_an_emptied_pool_is_called_so(llama: nn.Module, adapters: Path) -> None:
    logo = engine(llama, adapters)
    for name in logo.names:
        logo.pool.remove(name)
    for call in (lambda: logo.select(PROMPTS[0]), lambda: LoGo(llama, tokenizer(), AdapterPool())):
        with pytest.raises(PoolError, match="the pool has no adapter: expected one or more; add one"):
            call()


@pytest.mark.parametrize("side", ["left", "right"])
def test_long_prompts_are_cut_with_a_warning(llama: nn.Module, adapters: Path, side: Any) -> None:
    """Selecting cuts them where answering does."""
    long, config = " ".join(f"w{3 + i % 80}" for i in range(200)), GenerationConfig(max_new_tokens=10)
    logo = engine(llama, adapters, truncation=Truncation(side=side), generation_config=config)
    with pytest.warns(UserWarning, match="has 201 tokens, more than the 118 that fit"):
        cut, short = logo.prompts.read([long, PROMPTS[0]], 10)
    words = long.split()
    kept = words[:117] if side == "right" else words[-117:]
    assert list(cut.ids) == [0, *logo.tokenizer.convert_tokens_to_ids(kept)]
    assert cut.text is None and short.text == PROMPTS[0]  # the text of its ids, or none
    assert (cut.cut, short.cut) == (83, 0)
    with pytest.warns(UserWarning, match="has 118 tokens, more than the 100 that fit"):
        assert logo.prompts.read([cut], 28)[0].cut == 101  # of the whole prompt, also if it is cut again
    with pytest.warns(UserWarning, match="118 that fit"):
        answer = logo.generate(long)
        assert len(answer.token_ids) == 10 and logo.select(long) == answer.selection


@pytest.mark.parametrize("wrong", [(0,), (-3, "right"), (2.5,), (True,), (5, "middle")], ids=str)
def test_prompts_are_cut_to_a_token_or_more_on_one_of_two_sides(wrong: Any) -> None:
    with pytest.raises(UsageError, match="truncation: expected"):
        Truncation(*wrong)


def test_beam_search_keeps_rows_apart(llama: nn.Module, adapters: Path) -> None:
    logo = engine(llama, adapters)
    alone = [logo.generate(prompt, max_new_tokens=5, num_beams=3).token_ids for prompt in PROMPTS]
    assert [a.token_ids for a in logo.generate(PROMPTS, max_new_tokens=5, num_beams=3, batch_size=5)] == alone


@pytest.mark.parametrize("embedding", ["cpu", "disk"])
def test_device_map_as_accelerate_does_it(llama: nn.Module, adapters: Path, tmp_path: Path, embedding: str) -> None:
    """Dispatched by accelerate with part of the model off the device: same answers."""
    import transformers

    expected = engine(llama, adapters).generate(PROMPTS, max_new_tokens=6)
    llama.save_pretrained(tmp_path / "model")
    parts = ("embed_tokens", "layers.0", "layers.1", "layers.2", "norm", "rotary_emb")
    split = {**dict.fromkeys([f"model.{part}" for part in parts], "cpu"), "lm_head": "cpu"}
    split |= {"model.embed_tokens": embedding, "model.layers.1": "disk"}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=split, offload_folder=str(tmp_path / "off"), dtype=torch.float32
    )
    logo = engine(model.eval(), adapters)
    for ours, theirs in zip(logo.generate(PROMPTS, max_new_tokens=6), expected, strict=True):
        assert ours.token_ids == theirs.token_ids and ours.selection.adapters == theirs.selection.adapters


def test_a_batch_that_does_not_fit_names_the_budget(llama: nn.Module, adapters: Path) -> None:
    pool, settings = AdapterPool.open(adapters), SelectionSettings(signal="norm", k=2)
    roomy = LoGo(llama, tokenizer(), pool, settings=settings)
    names = roomy.names
    one, two, every = ({name: 1.0 for name in names[:count]} for count in (1, 2, len(names)))
    roomy.generate(PROMPTS[0], adapters=one, max_new_tokens=2)
    memory = 2.1e-9 * roomy.adapter_cache.bytes
    logo = LoGo(llama, tokenizer(), pool, settings=settings, adapter_memory_gb=memory)
    for ask in (
        lambda: logo.generate(PROMPTS[:2], adapters=[two, every], max_new_tokens=2),
        lambda: logo.score_pairs([([3, 4, 5], [5, 6])] * 2, [two, every]),
    ):
        with pytest.raises(CacheFull, match=r"the memory for adapters is 0\.\d+ GB, half.*--adapter-memory-gb"):
            ask()
    assert len(logo.generate(PROMPTS[0], adapters=one, max_new_tokens=2).token_ids) == 2


class Caller:
    """A streamer that calls something when it is given the first token."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.call, self.seen = call, 0

    def put(self, value: Any) -> None:
        self.seen += 1
        if self.seen == 2:
            self.call()

    def end(self) -> None:
        pass


def test_nothing_else_is_computed_while_a_mixture_is_active(llama: nn.Module, adapters: Path) -> None:
    logo, other = engine(llama, adapters), engine(llama, adapters, signal="entropy")
    expected = logo.select(PROMPTS[1])
    calls: tuple[Callable[[], object], ...] = (
        lambda: logo.select(PROMPTS[1]),
        lambda: logo.calibrate("calibrated"),
        lambda: other.generate(PROMPTS[1], max_new_tokens=2),
        lambda: other.score(PROMPTS[1], "w3", [{}]),
    )
    for call in calls:
        with pytest.raises(UsageError, match="call this once the answer is complete"):
            logo.generate(PROMPTS[0], max_new_tokens=4, streamer=cast(Any, Caller(call)))
    caller = Caller(calls[0])
    logo.generate(PROMPTS[0], adapters={}, max_new_tokens=4, streamer=cast(Any, caller))  # the base model alone
    assert caller.seen > 2 and logo.select(PROMPTS[1]) == expected
    stream = logo.stream(PROMPTS[1], adapters={}, max_new_tokens=2)
    with pytest.raises(UsageError, match="read it once the answer is complete"):  # it would wait for ever
        logo.generate(PROMPTS[0], adapters={}, max_new_tokens=4, streamer=cast(Any, Caller(partial(next, stream))))
    answer = logo.generate(PROMPTS[1], adapters={}, max_new_tokens=2).text
    assert answer and "".join(stream) == answer  # which it can be now


@pytest.mark.slow
def test_a_signal_that_is_asked_for_in_the_middle_of_an_answer_is_calibrated_after_it(tmp_path: Path) -> None:
    """An adapter that came back has no calibration of this signal in memory when a selection is chosen again."""
    opened = partial(LoGo.from_pretrained, "demo", device="cpu", signal="norm", k=3)
    logo, question = opened(cache=str(tmp_path / "one")), "What is the plural of mouse?"
    plural = logo.pool["plural"]
    logo.pool.remove("plural")
    made = logo.select(question, signal="calibrated")
    logo.pool.add(plural)
    found: list[Selection] = []
    thread = threading.Thread(target=lambda: found.append(logo.reselect(made, k=1)))

    def ask() -> None:
        thread.start()
        thread.join(0.5)  # it waits for the answer, however long

    logo.generate(question, adapters={"antonym": 9.0}, max_new_tokens=12, streamer=cast(Any, Caller(ask)))
    thread.join(PATIENCE)
    assert found[0].adapters == made.adapters[:1]
    later, clean = (opened(cache=str(tmp_path / name)) for name in ("one", "two"))
    expected = clean.select(question, signal="calibrated").scores
    assert later.select(question, signal="calibrated").scores == same_scores(expected)
    assert logo.select(question, signal="calibrated").scores == same_scores(expected)


# -- prompts and options -----------------------------------------------------------------------------------------------


CUT = pytest.mark.filterwarnings("ignore:prompt 1 has .* tokens, more than the:UserWarning")


def words(count: int) -> str:
    return " ".join(f"w{3 + i * i % 87}" for i in range(count))


@pytest.mark.slow
@CUT
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


@CUT
def test_the_commands_cut_long_prompts_alike(capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for command in ("select", "generate"):
        assert run([command, words(500), "--base-model", "demo", "--signal", "norm", "--device", "cpu", "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out)["scores"])
    assert found[0] == found[1]


def test_options_that_cannot_be_used_are_refused(llama: nn.Module, adapters: Path) -> None:
    logo = engine(llama, adapters)
    for options, message in (
        ({"temperatur": 3}, "unknown generation option 'temperatur' (did you mean 'temperature'?)"),
        ({"max_tokens": 1}, "generation option 'max_tokens' cannot be used here: give 'max_new_tokens' instead"),
        ({"min_length": 9}, "generation option 'min_length' cannot be used here: give 'min_new_tokens'"),
        ({"input_ids": []}, "unknown generation option 'input_ids'"),
        ({"max_new_tokens": 128}, "max_new_tokens is 128, but the model's context holds 128"),
        ({"min_new_tokens": -2}, "min_new_tokens: expected 0 or more, found -2"),
        ({"do_sample": True, "top_p": 5.0}, "top_p: expected a share above 0 and up to 1, found 5.0"),
        ({"do_sample": True, "temperature": 0.0}, "temperature: expected a number above 0, found 0.0"),
        (
            {"do_sample": True, "temperature": 1e-40},
            "temperature: expected 1e-30 or more, found 1e-40; do_sample=False",
        ),
        ({"num_beams": 2, "length_penalty": "a"}, "length_penalty: expected a number, found 'a'"),
        ({"num_beams": 2, "num_return_sequences": 2}, "with one answer per prompt, found beam_search with 2"),
        ({"prompt_lookup_num_tokens": 3}, "greedy decoding, sampling or beam search .* found assisted_generation"),
        ({"cache_implementation": "foo"}, "generation options: transformers refuses them: Invalid `cache_implementat"),
        ({"stop": [5]}, "stop: expected a text or a list of texts, found [5]"),
        ({"stop_at_newline": "Official"}, "stop_at_newline: expected True, False or 'official', found 'Official'"),
        ({"repetition_penalty": "1"}, "repetition_penalty: expected a number above 0, found '1'"),
        ({"stop_strings": [5]}, "stop_strings: expected a text or a list of texts, found [5]"),
        ({"num_beams": 2.5}, "num_beams: expected a whole number, found 2.5"),
        ({"do_sample": True, "min_p": 2}, "generation options: transformers refuses them: `min_p`"),
    ):
        for ask in (logo.generate, lambda *given, **options: list(logo.stream(*given, **options))):
            with pytest.raises(UsageError) as refused:
                ask(PROMPTS[0], **options)
            assert message in str(refused.value) or re.search(message, str(refused.value))


def test_every_option_of_transformers_passes(llama: nn.Module, adapters: Path) -> None:
    options = {"do_sample": True, "temperature": 2, "repetition_penalty": 2, "min_p": 0.01, "typical_p": 0.9}
    logo = engine(llama, adapters)
    assert len(logo.generate(PROMPTS[0], max_new_tokens=3, min_new_tokens=3, **options).token_ids) == 3
    greedy = ({}, {"temperature": 0.0}, {"stop_strings": ""})  # these change nothing
    assert len({logo.generate(PROMPTS[0], max_new_tokens=4, **some).token_ids for some in greedy}) == 1
    assert call_config(logo.prompts, None, {"length_penalty": 2.0}).length_penalty == 2.0


def test_a_compiled_step_of_the_base_model_is_not_that_of_a_mixture(llama: nn.Module, adapters: Path) -> None:
    """As transformers compiles on GPUs for caches of a fixed size, without being asked."""
    logo = engine(llama, adapters, merge=False)
    config = CompileConfig(backend="eager", mode=None)
    config._compile_all_devices = True
    how = {"cache_implementation": "static", "compile_config": config, "max_new_tokens": 8}
    for mixture in ({}, {"tasks/t0": 1.0}, {}, {"tasks/t3": 2.0}):
        found, expected = (logo.generate(PROMPTS[0], adapters=mixture, **some) for some in (how, {"max_new_tokens": 8}))
        assert found.token_ids == expected.token_ids


def test_the_checkpoint_does_not_say_what_pads(llama: nn.Module, adapters: Path) -> None:
    """Some say -1, and some tokenizers have one more token than their model, which no model can read."""
    logo = engine(llama, adapters)
    logo.tokenizer.add_special_tokens({"pad_token": "<one more>"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logo.model.generation_config, "pad_token_id", -1)
        first, _ = logo.generate(PROMPTS[:2], max_new_tokens=8, adapters={}, generation_config=llama.generation_config)
        ended, other = logo.generate(PROMPTS[:2], max_new_tokens=8, adapters={}, eos_token_id=[first.token_ids[0]])
    assert len(ended.token_ids) == 1 < len(other.token_ids)


def test_a_token_that_the_model_does_not_know_is_named(llama: nn.Module, adapters: Path) -> None:
    logo = engine(llama, adapters)
    logo.tokenizer.add_tokens(["<new>"])
    told = r"has the token '<new>' \(96\), but the model knows tokens up to 95: leave it out of the text"
    chat = [{"role": "user", "content": "w3 <new>"}]
    for call, arguments, what in [
        *((ask, (prompt,), "prompt 1") for ask in (logo.select, logo.generate) for prompt in ("w3 <new>", chat)),
        (logo.score, ("w3 <new>", "w4", [{}]), "prompt 1"),
        (logo.score, ("w3", "w4 <new>", [{}]), "the completion"),
        (logo.score_pairs, ([([3], [4]), ([3], [96])], [{}, {}]), "pair 2"),
    ]:
        with pytest.raises(UsageError, match=f"{what} {told}"):
            call(*arguments)


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
    assert len(logo.generate("", max_new_tokens=2).token_ids) == 2  # the bos token is a prompt
    bare = engine(llama, adapters, bos=False)
    assert ids_of(bare, [begun]) == plain  # nobody adds anything
    with pytest.raises(UsageError, match="prompt 2 is empty"):
        bare.generate(["w3", ""], max_new_tokens=2)


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
