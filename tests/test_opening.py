"""`LoGo` on a model that it loads, with what transformers takes under its own names, presets and quantised base models;
and on one that the caller has loaded: what is refused, and engines that share it."""

from __future__ import annotations

import copy
import json
import os
import shutil
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, TextIteratorStreamer, TextStreamer

import tiny
from hub_server import GOOD_TOKEN, HubServer
from logo import AdapterPool, LoGo, LoGoError, ModelError, PoolError, SelectionSettings, UsageError
from logo.adapters.pool import officially_named, open_pool
from logo.adapters.sources import parse_sources, spec_of
from logo.cli.app import run
from logo.decoding import call_config
from logo.demo import heldout
from logo.errors import NotFinite
from logo.mixing.merge import mergeable
from logo.models import WeightWatch, check_mode, droppers, load_base, pick_device, resolve_base
from logo.vllm.offline import _folder_of
from test_engine import PROMPTS, engine, write_adapter
from test_evaluate import DATA, F1, ROOT
from tolerances import PATIENCE, same_scores, same_selection
from warm import python
from written import write_base, write_rows

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


def test_options_of_transformers_reach_it(base: Path, adapters: Path) -> None:
    def open_(**options: Any) -> LoGo:
        return LoGo.from_pretrained(str(base), adapters, device="cpu", k=3, unscorable="skip", **options)

    assert open_().model.dtype == torch.float32
    assert LoGo.from_pretrained(base, adapters, device="cpu", k=3, unscorable="skip").names == open_().names
    assert {open_(dtype=dtype).model.dtype for dtype in (torch.bfloat16, "bfloat16")} == {torch.bfloat16}
    assert open_(attn_implementation="eager").model.config._attn_implementation == "eager"
    assert open_(model_kwargs={"attention_dropout": 0.25}).model.config.attention_dropout == 0.25
    assert open_(device_map={"": "cpu"}).model.device.type == "cpu"
    for options, message in (
        ({"dtype": torch.int8}, "dtype torch.int8: expected 'auto', 'float32', 'bfloat16' or 'float16'"),
        ({"trust_remote_code": True}, "trust_remote_code cannot be set: a model's own code .* are never run"),
        ({"model_kwargs": {"trust_remote_code": True}}, "trust_remote_code cannot be set"),
        ({"model_kwargs": {"allow_all_kernels": True}}, "allow_all_kernels cannot be set"),
        ({"model_kwargs": {"use_safetensors": False}}, "use_safetensors cannot be set"),
        ({"model_kwargs": {"dtype": "float16"}}, "model_kwargs: give 'dtype' as an option of its own"),
        ({"truncation": 9}, "truncation: expected a logo.prompts.Truncation, found 9"),
        ({"on_bad_adapter": "raise"}, "on_bad_adapter: expected one of error, skip, found 'raise'"),
        ({"preset": "oficial"}, "preset: expected one of official, found 'oficial' .did you mean 'official'"),
    ):
        with pytest.raises(UsageError, match=message):
            open_(**options)


def test_places_and_the_token_reach_the_pool(base: Path, adapters: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A place of a list may have commas in its name."""
    asked, found = list[Any](), AdapterPool.open(adapters)

    def opened(sources: Any, options: Any) -> AdapterPool:
        asked.append(([spec_of([one]) for one in sources], options["token"]))
        return found

    monkeypatch.setattr(AdapterPool, "opened", opened)
    places = ["org/pool", adapters / "a,b"]
    LoGo.from_pretrained(base, places, device="cpu", k=3, unscorable="skip", signal="norm", token="secret")
    assert asked == [(list(map(str, places)), "secret")]


def test_vllms_processes_open_no_other_pool_than_the_given_one(adapters: Path) -> None:
    def opened(pool: AdapterPool, **settings: Any) -> str:
        return _folder_of(pool, SelectionSettings.of(cache="", **settings), "error")

    pool = AdapterPool.open(adapters)
    told = AdapterPool(replace(adapter, examples=("other",)) for adapter in pool)
    assert Path(opened(pool)) == adapters == Path(opened(told, examples="ignore"))
    late = AdapterPool(adapter.acting("last:2") for adapter in pool)
    for other in (told, late, pool.subset(pool.names[1:])):
        with pytest.raises(PoolError, match="expected all adapters in one folder"):
            opened(other)


def quanto() -> Any:
    pytest.importorskip("optimum.quanto", reason="needs optimum-quanto")
    from transformers import QuantoConfig

    return QuantoConfig(weights="int8")


def torchao() -> Any:
    pytest.importorskip("torchao", reason="needs torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def dequantised(model: nn.Module) -> nn.Module:
    """The model that these integers stand for, in float32."""
    plain = tiny.model("llama")
    for path, module in plain.named_modules():
        if isinstance(module, nn.Linear):
            weight: Any = model.get_submodule(path).weight
            module.weight.data = (weight if type(weight) is nn.Parameter else weight.dequantize()).detach().float()
    return plain


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("config", [quanto, torchao])
def test_a_quantised_base_answers_as_what_it_stands_for(base: Path, adapters: Path, config: Callable[[], Any]) -> None:
    options = {"signal": "norm", "k": 3, "unscorable": "skip"}
    logo = LoGo.from_pretrained(str(base), adapters, device="cpu", quantization_config=config(), merge=True, **options)
    modules = {path for adapter in logo.fitted for path in adapter.modules}
    assert not any(mergeable(logo.model.get_submodule(path)) for path in modules)
    plain = dequantised(logo.model)
    one, *_ = sorted(modules)
    assert not torch.equal(plain.get_submodule(one).weight, tiny.model("llama").get_submodule(one).weight)
    exact = engine(plain, adapters, merge=False, **options)
    for mixture in (None, {"tasks/t0": 0.5, "tasks/t3": 0.5}, {}):
        found = logo.generate(PROMPTS, adapters=mixture, max_new_tokens=12)
        expected = exact.generate(PROMPTS, adapters=mixture, max_new_tokens=12)
        for one, other in zip(found, expected, strict=True):
            assert one.token_ids == other.token_ids
            assert one.form in ("gated", "none")
            same_selection(one.selection, other.selection)


def test_the_official_preset_is_that_of_the_command_line(tmp_path: Path) -> None:
    rows = [row for some in heldout().values() for row in some[:1]][:8]
    write_rows(tmp_path / "data" / "demo" / "rows" / "test.jsonl", rows)
    place = ["--base_model", "demo", "--data_dir", str(tmp_path / "data"), "--result_dir", str(tmp_path / "results")]
    command = ["evaluate", "--dataset", "demo.rows", "--preset", "official", *place, "--device", "cpu"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert run(command) == 0
    [folder] = {file.parent for file in (tmp_path / "results").rglob("selected_loras.json")}

    def kept(name: str) -> Any:
        return json.loads((folder / name).read_text(encoding="utf-8"))

    logo = LoGo.from_pretrained("demo", device="cpu", preset="official")
    assert logo.settings == SelectionSettings(signal="norm", k=16)
    assert logo.probe_context == "carry"
    assert (logo.prompts.truncation.limit, logo.prompts.truncation.side) == (2048, "right")
    config = call_config(logo.prompts, logo.model.generation_config, {})
    plain = call_config(logo.prompts, None, {})
    assert config.max_new_tokens == 256 and config.to_diff_dict() != plain.to_diff_dict()
    answers = logo.generate([row["context"] for row in rows], batch_size=1)
    assert [list(one.selection.adapters) for one in answers] == kept("selected_loras.json")
    assert [one.text.strip().split("\n")[0] for one in answers] == kept("predictions.json")


def test_streamers_hear_each_token(llama: nn.Module, adapters: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logo = engine(llama, adapters)
    answer = logo.generate(PROMPTS[0], max_new_tokens=12)
    found = logo.generate(PROMPTS[0], max_new_tokens=12, streamer=TextStreamer(logo.tokenizer, skip_prompt=True))
    assert found.token_ids == answer.token_ids
    assert capsys.readouterr().out.split() == logo.tokenizer.decode(answer.token_ids).split()
    pieces = TextIteratorStreamer(logo.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=600)
    worker = threading.Thread(target=lambda: logo.generate([PROMPTS[0]], max_new_tokens=12, streamer=pieces))
    worker.start()
    assert "".join(pieces) == answer.text
    worker.join()


def test_a_streamer_is_ended_by_an_error_too(llama: nn.Module, adapters: Path) -> None:
    broken = copy.deepcopy(llama)
    logo = engine(broken, adapters)
    pieces = TextIteratorStreamer(logo.tokenizer, timeout=600)
    selection = logo.select(PROMPTS[0])

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of memory")

    handle = broken.lm_head.register_forward_pre_hook(fail)  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="out of memory"):
        logo.generate(PROMPTS[0], adapters=selection, max_new_tokens=3, streamer=pieces)
    list(pieces)  # comes to an end
    handle.remove()
    assert len(logo.generate(PROMPTS[0], adapters=selection, max_new_tokens=3).token_ids) == 3
    for wrong in ({"adapters": {"nobody": 1.0}}, {"k": 0}, {"batch_size": 0}):  # nothing is generated at all
        with pytest.raises(LoGoError):
            logo.generate(PROMPTS[0], streamer=pieces, **cast(Any, wrong))
        assert "".join(pieces) == ""


def test_a_streamer_is_of_one_prompt(llama: nn.Module, adapters: Path) -> None:
    logo = engine(llama, adapters)
    streamer = TextStreamer(logo.tokenizer)
    with pytest.raises(UsageError, match="streaming: expected a single prompt, found 2; ask for them one by one"):
        logo.generate(PROMPTS[:2], streamer=streamer)
    for call in (partial(logo.generate, streamer=streamer), logo.stream):
        with pytest.raises(UsageError, match="streaming: beam search changes sent tokens; leave out num_beams=2"):
            call(PROMPTS[0], num_beams=2)


def test_a_model_in_training_mode_is_refused(adapters: Path) -> None:
    """Dropout would make scores random, and they would be kept as the pool's calibration."""
    model = tiny.model("llama", attention_dropout=0.5).train()
    with pytest.raises(UsageError, match=r"training mode.*model\.eval\(\)"):
        engine(model, adapters)
    logo = engine(model.eval(), adapters)
    logo.select(PROMPTS[0])
    model.train()  # between two calls
    for call in (logo.select, logo.generate, logo.stream):
        with pytest.raises(UsageError, match="training mode"):
            call(PROMPTS[0])


def test_layers_of_peft_are_refused(adapters: Path) -> None:
    """Otherwise the adapter of the PeftModel is mixed into every answer."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(cast(Any, tiny.model("llama")), config).eval()
    for model in (wrapped, wrapped.get_base_model()):
        with pytest.raises(UsageError, match=r"layers of PEFT.*model\.unload\(\)"):
            engine(model, adapters)
    engine(wrapped.unload(), adapters).select(PROMPTS[0])


def jittering() -> Any:
    """Routers of experts are as random in training mode as dropout is."""
    model = cast(Any, tiny.model("llama"))
    model.get_submodule("model.layers.0.mlp").router_jitter_noise = 0.01
    return model


def test_what_makes_a_model_random_is_found_wherever_it_is() -> None:
    """Also where only a part of the model is in training mode."""
    for make, part in (
        (lambda: tiny.model("opt", dropout=0.1), ""),  # which keeps its probability in its layers
        (lambda: tiny.model("opt", dropout=0.1), "model"),
        (jittering, "model.layers.0.mlp"),
    ):
        model = make()
        model.get_submodule(part).train()
        with pytest.raises(UsageError, match="training mode"):
            droppers(model)
        found = droppers(model.eval())
        model.get_submodule(part).train()
        with pytest.raises(UsageError, match="training mode"):
            check_mode(found)
        assert not droppers(cast(Any, tiny.model("llama")))


def test_every_change_of_weights_is_noticed_once() -> None:
    model = cast(Any, tiny.model("llama"))
    watch = WeightWatch(model)
    weight = model.get_submodule("model.layers.1.mlp.down_proj").weight

    def scale() -> None:
        with torch.no_grad():
            weight[0, 0] *= 2

    changes: list[Callable[[], object]] = [
        scale,
        lambda: model.load_state_dict(model.state_dict()),
        lambda: model.load_state_dict({name: one.clone() for name, one in model.state_dict().items()}, assign=True),
        lambda: model.to(torch.bfloat16),
        lambda: nn.utils.parametrizations.weight_norm(model.lm_head),
    ]
    for change in changes:
        before = watch.stamp()
        assert watch.stamp() == before
        change()
        assert watch.stamp() != before
    model(input_ids=torch.tensor([[3, 4, 5]]))
    assert watch.stamp() == watch.stamp()
    with torch.inference_mode():
        uncounted = WeightWatch(tiny.model("llama"))
    assert uncounted.stamp() == uncounted.stamp()


def test_a_loaded_model_is_no_name(llama: nn.Module) -> None:
    with pytest.raises(UsageError, match=r"base_model: .*LoGo\(model, tokenizer, pool\)"):
        LoGo.from_pretrained(cast(Any, llama))


def test_engines_on_one_model_take_turns(llama: nn.Module, adapters: Path) -> None:
    """A call of another engine waits until the mixture of a running answer is off the model."""
    first, second = engine(llama, adapters), engine(llama, adapters)
    expected, found = second.select(PROMPTS[0]), []
    threads: list[threading.Thread] = []

    class Intruder:
        """Selects with the other engine while the first one answers."""

        def put(self, value: Any) -> None:
            if len(threads) < 2:  # at the prompt and at the first token
                threads.append(threading.Thread(target=lambda: found.append(second.select(PROMPTS[0]))))
                threads[-1].start()
                threads[-1].join(0.5)

        def end(self) -> None:
            pass

    mixture = {"tasks/t0": 3.0, "tasks/t1": 3.0}
    alone = first.generate(PROMPTS[0], adapters=mixture, max_new_tokens=4)
    answer = first.generate(PROMPTS[0], adapters=mixture, max_new_tokens=4, streamer=cast(Any, Intruder()))
    for thread in threads:
        thread.join(PATIENCE)
    assert answer.token_ids == alone.token_ids
    assert [one.scores for one in found] == [same_scores(expected.scores)] * 2


GOOD, BAD = {"good": 1.0}, {"bad": 1.0}


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory: pytest.TempPathFactory) -> LoGo:
    folder = tmp_path_factory.mktemp("overflow")
    model = tiny.model("llama")
    write_adapter(folder / "good", model, ("q_proj", "v_proj"), rank=2, seed=1)
    write_adapter(folder / "bad", model, ("q_proj", "v_proj"), rank=2, seed=2, scale=1e20)  # each number is finite
    return engine(model, folder, k=1)


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 2}], ids=str)
def test_a_mixture_that_overflows_is_an_error(overflowing: LoGo, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    for prompts, mixtures in (([PROMPTS[0]], [BAD]), (PROMPTS[:2], [GOOD, BAD])):
        with pytest.raises(NotFinite, match=r"not finite with this mixture of adapters.*float32.*'bad'"):
            overflowing.generate(prompts, adapters=mixtures, max_new_tokens=4, **options)
    assert len(overflowing.generate(PROMPTS[0], adapters=GOOD, max_new_tokens=4, **options).token_ids) == 4
    if "num_beams" in options:
        return
    pieces = overflowing.stream(PROMPTS[0], adapters=BAD, max_new_tokens=4, **options)
    with pytest.raises(NotFinite, match="not finite"):
        next(pieces)  # before a single token of it is shown


# ---- base models by name --------------------------------------------------------------------------------------------


def test_names_of_base_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_base("Llama-3.1-8B") == "meta-llama/Llama-3.1-8B"
    assert resolve_base("someone/model") == "someone/model"
    assert resolve_base(str(F1 / "model")) == str(F1 / "model")
    local = tmp_path / "Llama-3.1-8B"
    local.mkdir()
    assert resolve_base("Llama-3.1-8B", tmp_path) == "meta-llama/Llama-3.1-8B"  # an empty folder is no model
    (local / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert resolve_base("Llama-3.1-8B", tmp_path) == str(local) and resolve_base("Llama-3.1-8B") == "Llama-3.1-8B"
    with pytest.raises(ModelError, match=r"did you mean 'Llama-3.1-8B'\?"):
        resolve_base("llama-3.1-8B")
    with pytest.raises(ModelError, match=r"has no config\.json"):
        resolve_base(str(tmp_path))


def test_published_adapters_in_model_dir_come_before_the_hub(tmp_path: Path) -> None:
    (tmp_path / "Qwen2.5-7B-loras-flanv2").symlink_to(F1 / "adapters", target_is_directory=True)
    for name in ("Qwen2.5-7B", "Qwen/Qwen2.5-7B"):
        assert len(open_pool(None, name, tmp_path)) == 12
    with pytest.raises(UsageError, match="has no adapters of its own"):
        open_pool(None, str(F1 / "model"))


def test_a_published_pool_has_official_names_wherever_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = shutil.copytree(F1 / "adapters", tmp_path / "Llama-3.1-8B-loras-flanv2")
    monkeypatch.chdir(home)
    for place in (".", str(home)):
        pool = officially_named(open_pool(place, "Llama-3.1-8B"), "Llama-3.1-8B", parse_sources(place))
        assert pool.names[0] == "Llama-3.1-8B-loras-flanv2/ad00"


def test_device_and_dtype() -> None:
    with pytest.raises(UsageError, match="expected 'auto', 'cpu'"):
        pick_device("gpu0")
    model, _ = load_base(str(F1 / "model"), device="cpu", dtype="bfloat16")
    assert model.dtype == torch.bfloat16 and not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_cpu_computes_in_bfloat16_if_it_can_and_the_model_is_stored_in_it(
    base: Path, adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = tmp_path / "bfloat16"
    load_base(str(base), device="cpu", dtype="bfloat16")[0].save_pretrained(stored)
    for file in base.glob("*token*"):
        shutil.copy(file, stored)

    def loaded(model: Path, **capabilities: bool) -> torch.dtype:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
        return load_base(str(model), device="cpu")[0].dtype

    assert loaded(stored, avx512_bf16=True) == loaded(stored, amx_bf16=True) == torch.bfloat16
    assert loaded(stored, avx512_bf16=False) == loaded(stored) == torch.float32
    assert loaded(base, avx512_bf16=True, amx_bf16=True) == torch.float32
    assert LoGo.from_pretrained(stored, adapters, preset="official", unscorable="skip").model.dtype == torch.float32


def test_the_head_reads_copies_and_answers_as_before() -> None:
    folder = str(F1 / "model")
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    model, _ = load_base(folder, device="cpu", dtype="bfloat16")
    strides: list[tuple[int, ...]] = []
    model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: strides.append(inputs[0].stride()))
    ids = torch.randint(5, 50, (3, 9))
    with torch.inference_mode():
        for keep in (0, 1):
            logits = model(ids, logits_to_keep=keep).logits
            assert torch.equal(logits, plain(ids, logits_to_keep=keep).logits)
    width = model.config.hidden_size
    assert strides == [(9 * width, width, 1), (width, width, 1)]


def test_a_model_that_cannot_be_loaded_is_one_line(tmp_path: Path) -> None:
    for damage in (
        lambda model: os.truncate(model / "model.safetensors", 1000),
        lambda model: (model / "config.json").write_text("{"),
        lambda model: (model / "model.safetensors").rename(model / "pytorch_model.bin"),  # a pickle
    ):
        damage(shutil.copytree(F1 / "model", tmp_path / "model", dirs_exist_ok=True))
        with pytest.raises(ModelError, match="cannot be loaded") as caught:
            load_base(str(tmp_path / "model"), device="cpu")
        assert "\n" not in str(caught.value)


def test_the_official_command_downloads_model_and_adapters(tmp_path: Path) -> None:
    """`python3 main.py --dataset D --base_model Llama-3.1-8B --gpu 0`, gated model and 12 of "260" adapters."""
    collection = tmp_path / "collection"
    for adapter in (F1 / "adapters").iterdir():
        shutil.copytree(adapter, collection / "Llama-3.1-8B-loras-flanv2" / f"flanv2.{adapter.name}")
    repos = {"meta-llama/Llama-3.1-8B": F1 / "model", "archon159/LoGo-loras-collection": collection}
    command = [
        *(*python(), str(ROOT / "main.py"), "--dataset", "bbh.word_sorting", "--base_model", "Llama-3.1-8B"),
        *("--gpu", "0" if not torch.cuda.is_available() else "-1", "--data_dir", str(DATA), "--limit", "1"),
    ]
    with HubServer(repos, gated=["meta-llama/Llama-3.1-8B"]) as hub:
        refused = hub.run(command, tmp_path / "home", cwd=tmp_path)
        assert refused.returncode == 1 and "accept the licence" in refused.stderr.splitlines()[-1]
        assert "Traceback" not in refused.stderr and not list((tmp_path / "results").rglob("*.json"))
        done = hub.run(command, tmp_path / "home", cwd=tmp_path, HF_TOKEN=GOOD_TOKEN)
        assert done.returncode == 0, done.stderr
    folder = "results/Llama-3.1-8B_selection_norm_n_20_seed_0/bbh.word_sorting"
    assert done.stdout.splitlines()[-1] == folder
    selected = json.loads((tmp_path / folder / "selected_loras.json").read_text())
    assert sorted(selected[0]) == [f"Llama-3.1-8B-loras-flanv2/flanv2.ad{i:02}" for i in range(12)]
    assert GOOD_TOKEN not in (tmp_path / folder / "run.json").read_text()
    again = hub.run(command, tmp_path / "home", cwd=tmp_path, HF_HUB_OFFLINE="1")
    assert again.returncode == 0 and again.stdout == done.stdout
