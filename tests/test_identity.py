"""What a run is known by: weights wherever they are kept, the tokenizer, versions, and whether rows depend on order."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerFast

import logo
import tiny
from logo import LoGo
from logo.adapters.examples import write_examples
from logo.baselines import get_method
from logo.decoding import call_config
from logo.errors import ModelError, UsageError
from logo.evaluation.answer import Answerer, engine_identity, order_dependence, rows_digest
from logo.evaluation.datasets import Dataset, find_datasets
from logo.evaluation.results import differences
from logo.evaluation.run import evaluate, in_this_process
from logo.identity import tokenizer_digest, weights_digest
from logo.rows import Row
from logo.vllm.options import affecting_answers
from test_engine import engine

# -- sampling ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_logo(llama: nn.Module, adapters: Path) -> LoGo:
    return engine(llama, adapters, k=2)


@pytest.mark.parametrize(
    ("generation", "sampled"),
    [
        ({"do_sample": True}, True),
        ({"do_sample": True, "temperature": 0.7}, True),
        ({"generation_config": GenerationConfig(do_sample=True)}, True),
        ({"generation_config": GenerationConfig(), "do_sample": True}, True),
        ({"generation_config": GenerationConfig(do_sample=True), "do_sample": False}, False),
        ({"generation_config": GenerationConfig()}, False),
        ({"stop_at_newline": True}, False),
        ({}, False),
    ],
)
def test_sampling_is_seen_wherever_it_is_asked_for(generation: dict[str, Any], sampled: bool, tiny_logo: LoGo) -> None:
    """By what the engine would really generate with."""
    options = {name: generation[name] for name in ("do_sample", "temperature") if name in generation}
    config = call_config(tiny_logo.prompts, generation.get("generation_config"), options, 4)
    assert bool(config.do_sample) is sampled
    reason = order_dependence(tiny_logo, generation)
    assert (reason is not None) is sampled
    assert reason is None or reason == "answers are sampled"


# -- tokenizers -------------------------------------------------------------------------------------------------


def words(**changes: Any) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<s>", "</s>", "<unk>", "a", "b", "c", "ab", "bc"])}
    merges = changes.get("merges", [("a", "b"), ("b", "c")])
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.normalizer = changes.get("normalizer")
    if "template" in changes:
        made.post_processor = processors.TemplateProcessing(changes["template"], special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token=changes.get("eos", "</s>"), pad_token="<unk>"
    )
    if "added" in changes:
        tokenizer.add_tokens([AddedToken(changes["added"])])
    return tokenizer


@pytest.mark.parametrize(
    "changes",
    [
        {"merges": [("b", "c"), ("a", "b")]},
        {"normalizer": normalizers.Lowercase()},
        {"template": "<s> $A"},
        {"added": "<tool>"},
        {"eos": "<s>"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_anything_that_changes_how_texts_are_read(changes: dict[str, Any]) -> None:
    assert tokenizer_digest(words()) == tokenizer_digest(words())
    assert tokenizer_digest(words(**changes)) != tokenizer_digest(words())


def test_using_a_tokenizer_changes_nothing() -> None:
    tokenizer = words()
    before = tokenizer_digest(tokenizer)
    tokenizer(["a", "b c a"], padding=True, truncation=True, max_length=2)
    assert tokenizer_digest(tokenizer) == before


def test_a_tokenizer_without_a_backend(tmp_path: Path) -> None:
    class Slow(transformers.ByT5Tokenizer):  # type: ignore[misc]
        pass

    assert not hasattr(Slow(), "backend_tokenizer")
    assert tokenizer_digest(Slow()) == tokenizer_digest(Slow()) != tokenizer_digest(Slow(extra_ids=3))


def test_the_tokenizer_is_part_of_the_identity(tiny_logo: LoGo) -> None:
    identity = engine_identity(tiny_logo, "M", {})
    assert identity["tokenizer"] == tokenizer_digest(tiny_logo.tokenizer)
    assert identity["weights"] == weights_digest(tiny_logo.model)
    json.dumps(identity)


@pytest.mark.filterwarnings("ignore:.*adapters act on every token")
def test_the_pool_is_part_of_the_identity(tiny_logo: LoGo, adapters: Path, tmp_path: Path) -> None:
    """Weights, scales, where adapters act, and example prompts, adapter by adapter."""
    shutil.copytree(adapters, tmp_path / "pool")
    file = next((tmp_path / "pool").rglob("adapter_config.json"))
    config = json.loads(file.read_text())

    def pool(**changes: Any) -> dict[str, str]:
        file.write_text(json.dumps(config | changes))
        found: dict[str, str] = engine_identity(engine(tiny_logo.model, tmp_path / "pool", k=2), "M", {})["pool"]
        return found

    plain = engine_identity(tiny_logo, "M", {})["pool"]
    assert pool() == plain
    found = [plain, pool(lora_alpha=2 * config["lora_alpha"]), pool(alora_invocation_tokens=[5, 6])]
    write_examples(file.parent, ["w1 w2 w3"])
    found.append(pool())
    for before, now in itertools.combinations(found, 2):
        assert len([name for name in before if before[name] != now[name]]) == 1


def test_given_options_of_vllm_are_part_of_the_identity(tiny_logo: LoGo, monkeypatch: pytest.MonkeyPatch) -> None:
    """If results depend on them; without any, the identity is that of the engine in this process."""
    plain = engine_identity(tiny_logo, "M", {})
    given = {"quantization": "fp8", "max_model_len": 512, "max_loras": 8, "hf_token": "secret"}
    for options, expected in (
        (given, ["engine_options"]),
        ({"gpu_memory_utilization": 0.5, "enforce_eager": True}, []),
    ):
        monkeypatch.setattr(LoGo, "engine_options", affecting_answers(options))
        now = engine_identity(tiny_logo, "M", {})
        assert [name for name, _, _ in differences(plain, now)] == expected
        assert now.get("engine_options", {}) == {name: options[name] for name in options if name in list(given)[:2]}


def test_the_configuration_and_the_end_are_part_of_the_identity(
    tiny_logo: LoGo, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = engine_identity(tiny_logo, "M", {})
    model = tiny_logo.model
    monkeypatch.setattr(model.config, "name_or_path", "elsewhere")
    monkeypatch.setattr(model.config, "transformers_version", "9.9")
    assert engine_identity(tiny_logo, "M", {}) == before
    monkeypatch.setattr(model.config, "rms_norm_eps", 0.5)
    monkeypatch.setattr(model.generation_config, "eos_token_id", 7)
    found = differences(before, engine_identity(tiny_logo, "M", {}))
    assert [name for name, _, _ in found] == ["config", "eos_token_id"]


# -- weights ----------------------------------------------------------------------------------------------------


def on_the_host(model: nn.Module, folder: Path) -> nn.Module:
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def on_the_disk(model: nn.Module, folder: Path) -> nn.Module:
    return accelerate.disk_offload(model, str(folder), execution_device=torch.device("cpu"))


def in_part(model: nn.Module, folder: Path) -> nn.Module:
    devices = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.layers.2": "disk"}
    devices |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
    return accelerate.dispatch_model(model, devices, main_device="cpu", offload_dir=str(folder), force_hooks=True)


def whole_layers(model: nn.Module, folder: Path) -> nn.Module:
    """Hooks that place all that is below a module, as for modules whose parts are not called one by one."""
    accelerate.hooks.attach_align_device_hook(
        model, execution_device=torch.device("cpu"), offload=True, preload_module_classes=["LlamaDecoderLayer"]
    )
    return model


def from_a_checkpoint(model: nn.Module, folder: Path) -> nn.Module:
    model.save_pretrained(folder / "model")
    devices = {"model": "disk", "lm_head": "disk"}
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder / "model", device_map=devices, offload_folder=str(folder / "offloaded"), dtype=torch.float32
    )


@pytest.mark.parametrize(
    ("name", "offload"),
    [  # qwen2 shares the weights of input and output
        *((name, offload) for name in ("llama", "qwen2") for offload in (on_the_host, on_the_disk, in_part)),
        ("llama", whole_layers),
    ],
)
def test_offloaded_weights_are_in_the_digest(
    name: str, offload: Callable[[nn.Module, Path], nn.Module], tmp_path: Path
) -> None:
    expected = weights_digest(tiny.model(name))
    offloaded = offload(tiny.model(name), tmp_path / "same")
    assert any(parameter.device.type == "meta" for parameter in offloaded.parameters())
    assert weights_digest(offloaded) == expected
    changed = tiny.model(name)
    changed.model.layers[2].mlp.down_proj.weight.data.mul_(1.5)
    assert weights_digest(changed) != expected
    assert weights_digest(offload(changed, tmp_path / "changed")) not in (expected, "")
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(offloaded(ids).logits, tiny.model(name)(ids).logits)  # and it still runs


def test_weights_in_buffers_are_in_the_digest() -> None:
    """As in `test_weights_in_buffers_are_in_the_key`."""
    digests = []
    for kept, value in ((True, 0.0), (True, 1.0), (False, 0.0)):
        model = tiny.model("llama")
        linear = model.get_submodule("model.layers.1.self_attn.q_proj")
        linear.register_buffer("scales", torch.full((4,), value), persistent=kept)
        digests.append(weights_digest(model))
    assert digests[0] != digests[1] and digests[2] == weights_digest(tiny.model("llama"))


def test_weights_that_stay_in_their_checkpoint(tmp_path: Path) -> None:
    expected = weights_digest(tiny.model("llama"))
    offloaded = from_a_checkpoint(tiny.model("llama"), tmp_path)
    assert any(parameter.device.type == "meta" for parameter in offloaded.parameters())
    assert weights_digest(offloaded) == expected


def test_weights_that_nobody_has(llama: nn.Module) -> None:
    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(llama.config)
    with pytest.raises(ModelError, match=r"weight model.embed_tokens.weight is not in memory"):
        weights_digest(empty)


# -- versions and devices ---------------------------------------------------------------------------------------


def answerer(tiny_logo: LoGo, **options: Any) -> Answerer:
    return Answerer(tiny_logo, "M", max_new_tokens=3, **options)


def evaluated(one: Answerer, rows: Path, folder: Path, **options: Any) -> list[Any]:
    datasets = find_datasets(rows)
    return list(evaluate(datasets, folder, one.facts, in_this_process(one), method=one.method, **options))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    lines = (json.dumps({"context": f"w{i} w{i + 1}", "completion": "w9"}) for i in range(3, 9))
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "x.jsonl").write_text("\n".join(lines))
    return tmp_path / "rows"


def test_the_environment(tiny_logo: LoGo) -> None:
    assert answerer(tiny_logo).facts.environment == {
        "logo": logo.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": "cpu",
    }


def test_the_version_that_a_generation_config_names_is_no_part_of_the_identity(tiny_logo: LoGo) -> None:
    one, other = GenerationConfig(temperature=0.5), GenerationConfig(temperature=0.5)
    other.transformers_version = "9.9"
    first = engine_identity(tiny_logo, "M", {"generation_config": one})
    assert first == engine_identity(tiny_logo, "M", {"generation_config": other})
    assert first != engine_identity(tiny_logo, "M", {"generation_config": GenerationConfig()})


def test_a_sampled_run_begins_again(tiny_logo: LoGo, rows: Path, tmp_path: Path) -> None:
    sampled = {"do_sample": True, "temperature": 2.0}
    evaluated(answerer(tiny_logo, generation=sampled), rows, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        evaluated(answerer(tiny_logo, generation=sampled), rows, tmp_path / "cut", tell=stop_after(2))
    evaluated(answerer(tiny_logo, generation=sampled), rows, tmp_path / "cut")
    whole, cut = ((tmp_path / name / "x" / "predictions.json").read_text() for name in ("whole", "cut"))
    assert whole == cut and len(set(json.loads(cut))) > 1


def stop_after(count: int) -> Callable[[Dataset, int], None]:
    def tell(dataset: Dataset, done: int) -> None:
        if done == count:
            raise KeyboardInterrupt

    return tell


@pytest.mark.parametrize("name", ["torch", "transformers", "logo", "device"])
def test_a_run_does_not_go_on_under_other_versions_but_stays_finished(
    name: str, tiny_logo: LoGo, rows: Path, tmp_path: Path
) -> None:
    begun = answerer(tiny_logo)
    with pytest.raises(KeyboardInterrupt):
        evaluated(begun, rows, tmp_path / "r", tell=stop_after(2))
    other = answerer(tiny_logo)
    other.facts = replace(other.facts, environment={**other.facts.environment, name: "other"})  # type: ignore[misc]
    with pytest.raises(UsageError, match=rf'environment\.{name} is ".*", not "other"\); repeat'):
        evaluated(other, rows, tmp_path / "r")
    assert [one.skipped for one in evaluated(begun, rows, tmp_path / "r")] == [False]
    assert [one.skipped for one in evaluated(other, rows, tmp_path / "r")] == [True]


def test_training_rows_are_recorded_as_they_were_read(tiny_logo: LoGo, rows: Path, tmp_path: Path) -> None:
    """A file that changes while rows are answered is not what the method has learnt from."""
    train = tmp_path / "train.jsonl"
    train.write_text('{"context": "w44 w45 w46", "completion": "w7"}')
    [dataset] = (replace(one, train_file=train) for one in find_datasets(rows))
    one = answerer(tiny_logo, method=get_method("best-single", rows=1))

    def changed(dataset: Dataset, done: int) -> None:
        train.write_text('{"context": "w42 w43", "completion": "w10"}')

    how: Any = {"method": one.method, "tell": changed}
    list(evaluate([dataset], tmp_path / "r", one.facts, in_this_process(one), **how))
    identity = json.loads((tmp_path / "r" / "x" / "run.json").read_text())["identity"]
    assert identity["train_sha256"] == rows_digest([Row("w44 w45 w46", "w7")])
