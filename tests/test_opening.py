"""`LoGo.from_pretrained`: what transformers takes under its own names, presets, and quantised base models."""

from __future__ import annotations

import copy
import json
import shutil
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn
from transformers import TextIteratorStreamer, TextStreamer

import tiny
from logo import AdapterPool, LoGo, LoGoError, PoolError, SelectionSettings, UsageError
from logo.adapters.sources import spec_of
from logo.cli.app import run
from logo.decoding import call_config
from logo.demo import heldout
from logo.mixing.merge import mergeable
from logo.vllm.offline import _folder_of
from test_engine import PROMPTS, engine, tokenizer
from tolerances import same_selection


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny.model("llama").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


# -- loading -----------------------------------------------------------------------------------------------------------


def test_options_of_transformers_reach_it(base: Path, adapters: Path) -> None:
    def open_(**options: Any) -> LoGo:
        return LoGo.from_pretrained(str(base), adapters, device="cpu", k=3, unscorable="skip", **options)

    assert open_().model.dtype == torch.float32
    of_a_path = LoGo.from_pretrained(base, adapters, device="cpu", k=3, unscorable="skip")
    assert of_a_path.names == open_().names
    for dtype in (torch.bfloat16, "bfloat16"):
        assert open_(dtype=dtype).model.dtype == torch.bfloat16
    assert open_(attn_implementation="eager").model.config._attn_implementation == "eager"
    assert open_(model_kwargs={"attention_dropout": 0.25}).model.config.attention_dropout == 0.25
    assert open_(device_map={"": "cpu"}).model.device.type == "cpu"
    for options, message in (
        ({"dtype": torch.int8}, "dtype torch.int8: expected 'auto', 'float32', 'bfloat16' or 'float16'"),
        ({"trust_remote_code": True}, "trust_remote_code cannot be set: a model's own code .* are never run"),
        ({"model_kwargs": {"trust_remote_code": True}}, "trust_remote_code cannot be set"),
        ({"model_kwargs": {"use_safetensors": False}}, "use_safetensors cannot be set"),
        ({"model_kwargs": {"dtype": "float16"}}, "model_kwargs: give 'dtype' as an option of its own"),
        ({"preset": "oficial"}, "preset: expected one of 'official', None, found 'oficial'"),
    ):
        with pytest.raises(UsageError, match=message):
            open_(**options)


def test_the_token_is_also_that_of_the_pool(base: Path, adapters: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, found = list[Any](), AdapterPool.open(adapters)

    def opened(sources: Any, options: Any) -> AdapterPool:
        asked.append((spec_of(sources), options["token"]))
        return found

    monkeypatch.setattr(AdapterPool, "opened", opened)
    LoGo.from_pretrained(base, "org/pool", device="cpu", k=3, unscorable="skip", signal="norm", token="secret")
    assert asked == [("org/pool", "secret")]


def test_vllms_processes_open_no_other_pool_than_the_given_one(adapters: Path) -> None:
    def opened(pool: AdapterPool, **settings: Any) -> str:
        return _folder_of(pool, SelectionSettings.of(cache="", **settings), "error")

    pool = AdapterPool.open(adapters)
    told = AdapterPool(replace(adapter, examples=("other",)) for adapter in pool)
    assert Path(opened(pool)) == adapters == Path(opened(told, examples="ignore"))
    for other in (told, pool.acting("last:2"), pool.subset(pool.names[1:])):
        with pytest.raises(PoolError, match="expected all adapters in one folder"):
            opened(other)


def test_several_places_may_have_commas(base: Path, adapters: Path, tmp_path: Path) -> None:
    for name in ("a,b", "other"):
        shutil.copytree(adapters, tmp_path / name / name[-1])
    places = [tmp_path / "a,b", str(tmp_path / "other")]
    logo = LoGo.from_pretrained(base, places, device="cpu", k=3, unscorable="skip", signal="norm")
    assert {name[0] for name in logo.names} == {"b", "r"}


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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("config", [quanto, torchao])
def test_a_quantised_base_answers_as_what_it_stands_for(base: Path, adapters: Path, config: Callable[[], Any]) -> None:
    options = {"signal": "norm", "k": 3, "unscorable": "skip"}
    logo = LoGo.from_pretrained(str(base), adapters, device="cpu", quantization_config=config(), merge=True, **options)
    modules = {path for adapter in logo.fitted for path in adapter.modules}
    assert not any(mergeable(logo.model.get_submodule(path)) for path in modules)
    plain = dequantised(logo.model)
    assert not torch.equal(
        plain.get_submodule(sorted(modules)[0]).weight, tiny.model("llama").get_submodule(sorted(modules)[0]).weight
    )
    exact = engine(plain, adapters, merge=False, **options)
    for mixture in (None, {"tasks/t0": 0.5, "tasks/t3": 0.5}, {}):
        found = logo.generate(PROMPTS, adapters=mixture, max_new_tokens=12)
        expected = exact.generate(PROMPTS, adapters=mixture, max_new_tokens=12)
        for one, other in zip(found, expected, strict=True):
            assert one.token_ids == other.token_ids
            assert one.form in ("gated", "none")
            same_selection(one.selection, other.selection)


# -- presets -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_official_preset_is_that_of_the_command_line(tmp_path: Path) -> None:
    rows = [row for some in heldout().values() for row in some[:1]][:8]
    data = tmp_path / "data" / "demo" / "rows" / "test.jsonl"
    data.parent.mkdir(parents=True)
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
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


# -- transformers' streamers -------------------------------------------------------------------------------------------


def test_streamers_of_transformers_hear_each_token(
    llama: nn.Module, adapters: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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
    with pytest.raises(UsageError, match="streaming: beam search changes sent tokens; leave out num_beams=2"):
        logo.generate(PROMPTS[0], num_beams=2, streamer=streamer)
    with pytest.raises(UsageError, match="streaming: beam search changes sent tokens; leave out num_beams=2"):
        logo.stream(PROMPTS[0], num_beams=2)
