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
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerFast

import tiny
from logo import LoGo
from logo.adapters.examples import write_examples
from logo.baselines import get_method
from logo.decoding import call_config
from logo.errors import ModelError, UsageError
from logo.evaluation.answer import Answerer, engine_identity, order_dependence, rows_digest
from logo.evaluation.datasets import Dataset, find_datasets
from logo.evaluation.results import Partial, differences
from logo.evaluation.run import Run, answer_datasets, in_this_process
from logo.files import Store
from logo.identity import base_digest, sampled, tokenizer_digest, weights_digest
from logo.rows import Row
from logo.selection.calibration import Reading
from logo.selection.signals import get_signal
from logo.selection.texts import Texts
from logo.vllm.options import affecting_answers
from logo.vllm.skeleton import skeleton
from test_engine import engine
from written import write_rows

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tiny_logo(llama: nn.Module, adapters: Path) -> LoGo:
    return engine(llama, adapters, k=2)


def test_sampling_is_seen_wherever_it_is_asked_for(tiny_logo: LoGo) -> None:
    """By what the engine would really generate with."""
    for generation, samples in (
        ({"do_sample": True}, True),
        ({"do_sample": True, "temperature": 0.7}, True),
        ({"generation_config": GenerationConfig(do_sample=True)}, True),
        ({"generation_config": GenerationConfig(), "do_sample": True}, True),
        ({"generation_config": GenerationConfig(do_sample=True), "do_sample": False}, False),
        ({"generation_config": GenerationConfig()}, False),
        ({"stop_at_newline": True}, False),
        ({}, False),
    ):
        options = {name: generation[name] for name in ("do_sample", "temperature") if name in generation}
        config = call_config(tiny_logo.prompts, generation.get("generation_config"), options, 4)
        assert bool(config.do_sample) is samples
        reason = order_dependence(tiny_logo, generation)
        assert (reason is not None) is samples
        assert reason is None or reason == "answers are sampled"


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


def test_anything_that_changes_how_texts_are_read() -> None:
    for changes in (
        {"merges": [("b", "c"), ("a", "b")]},
        {"normalizer": normalizers.Lowercase()},
        {"template": "<s> $A"},
        {"added": "<tool>"},
        {"eos": "<s>"},
    ):
        used, before = words(), tokenizer_digest(words())
        used(["a", "b c a"], padding=True, truncation=True, max_length=2)  # which changes nothing
        assert tokenizer_digest(used) == before != tokenizer_digest(words(**changes))


def test_a_tokenizer_without_a_backend(tmp_path: Path) -> None:
    class Slow(transformers.ByT5Tokenizer):  # type: ignore[misc]
        pass

    assert not hasattr(Slow(), "backend_tokenizer")
    assert tokenizer_digest(Slow()) == tokenizer_digest(Slow()) != tokenizer_digest(Slow(extra_ids=3))


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
    free = {"gpu_memory_utilization": 0.5, "enforce_eager": True}
    for options, expected in ((given, ["engine_options"]), (free, [])):
        monkeypatch.setattr(LoGo, "engine_options", affecting_answers(options))
        now = engine_identity(tiny_logo, "M", {})
        assert [name for name, _, _ in differences(plain, now)] == expected
        assert now.get("engine_options", {}) == {name: options[name] for name in options if name in list(given)[:2]}


def test_the_model_and_the_tokenizer_are_part_of_the_identity(tiny_logo: LoGo, monkeypatch: pytest.MonkeyPatch) -> None:
    before = engine_identity(tiny_logo, "M", {})
    assert before["tokenizer"] == tokenizer_digest(tiny_logo.tokenizer)
    assert before["weights"] == weights_digest(tiny_logo.model)
    model = tiny_logo.model
    monkeypatch.setattr(model.config, "name_or_path", "elsewhere")
    monkeypatch.setattr(model.config, "transformers_version", "9.9")
    assert engine_identity(tiny_logo, "M", {}) == before
    monkeypatch.setattr(model.config, "rms_norm_eps", 0.5)
    for name, value in (("eos_token_id", 7), ("stop_strings", ["x"])):
        monkeypatch.setattr(model.generation_config, name, value)
    changed = ["config", "eos_token_id", "stop_strings"]
    assert [name for name, _, _ in differences(before, engine_identity(tiny_logo, "M", {}))] == changed
    for name, value in (("chat_template", "{{ messages }}"), ("clean_up_tokenization_spaces", True)):
        with monkeypatch.context() as changes:
            changes.setattr(tiny_logo.tokenizer, name, value)
            found = differences(before, engine_identity(tiny_logo, "M", {}))
            assert {one for one, _, _ in found} == {*changed, "template"}


def on_the_host(model: nn.Module, folder: Path) -> nn.Module:
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)


def in_part(model: nn.Module, folder: Path) -> nn.Module:
    devices = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.layers.2": "disk"}
    devices |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk", "scales": "cpu"}
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
    made = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "model", device_map=devices, offload_folder=str(folder / "offloaded"), dtype=torch.float32
    )
    made.register_buffer("scales", model.scales)
    return made


@pytest.mark.parametrize(
    ("name", "offload"),
    [  # qwen2 shares the weights of input and output
        *((name, offload) for name in ("llama", "qwen2") for offload in (on_the_host, in_part)),
        ("llama", whole_layers),
        ("llama", from_a_checkpoint),
    ],
)
def test_offloaded_weights_are_in_the_digest(name: str, offload: Callable[..., nn.Module], tmp_path: Path) -> None:
    # Where a model is loaded its configuration is another one, and weights that are shared are offloaded twice.
    same_base = name == "llama" and offload is not from_a_checkpoint
    digests = (weights_digest, base_digest) if same_base else (weights_digest,)
    whole, changed = tiny.model(name), tiny.model(name)
    changed.model.layers[2].mlp.down_proj.weight.data.mul_(1.5)
    for one in (whole, changed):
        one.register_buffer("scales", torch.ones(4))
    ids = torch.tensor([[5, 6, 7]])
    expected = [digest(one) for one in (whole, changed) for digest in digests]
    assert len(set(expected)) == len(expected)
    logits = whole(ids).logits
    offloaded = [offload(one, tmp_path / str(i)) for i, one in enumerate((whole, changed))]
    assert all(any(parameter.is_meta for parameter in one.parameters()) for one in offloaded)
    assert [digest(one) for one in offloaded for digest in digests] == expected
    assert torch.equal(offloaded[0](ids).logits, logits)  # and it still runs


@pytest.mark.parametrize("digest", [weights_digest, base_digest])
def test_weights_in_buffers_are_in_the_digest(digest: Callable[[Any], str]) -> None:
    """Layers of GPTQ and AWQ have no parameters. Buffers that are not saved follow from the configuration."""
    digests = []
    for kept, value in ((True, 0.0), (True, 1.0), (False, 0.0), (False, 1.0)):
        model = tiny.model("llama")
        linear = model.get_submodule("model.layers.1.self_attn.q_proj")
        linear.register_buffer("scales", torch.full((4,), value), persistent=kept)
        digests.append(digest(model))
    assert digests[0] != digests[1] and digests[2] == digests[3] == digest(tiny.model("llama"))
    one, other = (tiny.model("llama", vocab_size=400) for _ in range(2))
    other.get_input_embeddings().weight.data[7] += 1  # a token that was added, and trained
    assert digest(one) != digest(other)


@pytest.mark.parametrize("shape", [(64, 48), (128, 96), (300, 20), (7, 5)])
def test_no_column_of_a_matrix_is_left_out_by_a_sample(shape: tuple[int, int]) -> None:
    """As evenly spaced numbers would, which all lie in a few columns: heads may have been cut."""
    rows, columns = shape
    drawn = sampled(torch.arange(columns).expand(rows, columns).contiguous())
    assert len(set(drawn.tolist())) >= min(columns, 20, len(drawn))
    assert len(drawn) == (rows if rows >= 4 * columns else min(64, rows * columns))


def test_weights_that_nobody_has(llama: nn.Module) -> None:
    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(llama.config)
    with pytest.raises(ModelError, match=r"weight model.embed_tokens.weight is not in memory"):
        weights_digest(empty)


def key_of(model: nn.Module) -> str:
    return Reading.of(model, get_signal("calibrated"), Texts([[3, 4, 5]], [[8, 9]]), Store(None)).key


def packed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of layers under the names and in the integers of a quantised checkpoint."""
    return {
        name.replace("proj.weight", "proj.weight_packed"): (100 * tensor).to(torch.int32) if "proj" in name else tensor
        for name, tensor in tensors.items()
    }


def without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}


def checkpoint(folder: Path, model: Any, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> str:
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})
    return str(folder)


@pytest.mark.parametrize(("name", "change"), [("llama", dict), ("llama", packed), ("gpt2", without_prefix)])
def test_each_checkpoint_has_its_own_key(name: str, change: Callable[[Any], Any], tmp_path: Path) -> None:
    """Also where the checkpoint has other names for its tensors than transformers, as quantised ones do."""
    model, other = tiny.model(name), tiny.model(name)
    layers = other.model.layers if name == "llama" else other.transformer.h  # type: ignore[union-attr]
    next(module for module in layers[1].modules() if hasattr(module, "weight") and module.weight.dim() > 1).weight += 1
    folders = [checkpoint(tmp_path / str(i), m, change) for i, m in enumerate((model, other, model))]
    one, changed, again = (key_of(skeleton(folder, torch.float32)) for folder in folders)
    assert one == again != changed
    assert (one == key_of(model)) == (change is dict)


def answerer(tiny_logo: LoGo, **options: Any) -> Answerer:
    return Answerer(tiny_logo, "M", max_new_tokens=3, **options)


def evaluated(one: Answerer, rows: Path, folder: Path, **options: Any) -> list[Any]:
    datasets = find_datasets(rows)
    return list(answer_datasets(datasets, Run(folder, one.facts, in_this_process(one), one.method, **options)))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    some = [{"context": f"w{i} w{i + 1}", "completion": "w9"} for i in range(3, 9)]
    return write_rows(tmp_path / "rows" / "x.jsonl", some).parent


def stopping(dataset: Dataset, done: int) -> None:
    if done == 2:
        raise KeyboardInterrupt


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
        evaluated(answerer(tiny_logo, generation=sampled), rows, tmp_path / "cut", tell=stopping)
    evaluated(answerer(tiny_logo, generation=sampled), rows, tmp_path / "cut")
    whole, cut = ((tmp_path / name / "x" / "predictions.json").read_text() for name in ("whole", "cut"))
    assert whole == cut and len(set(json.loads(cut))) > 1


@pytest.mark.parametrize("name", ["torch", "transformers", "logo", "device"])
def test_a_run_goes_on_under_the_same_versions_only(name: str, tiny_logo: LoGo, rows: Path, tmp_path: Path) -> None:
    begun = answerer(tiny_logo)
    with pytest.raises(KeyboardInterrupt):
        evaluated(begun, rows, tmp_path / "r", tell=stopping)
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

    list(answer_datasets([dataset], Run(tmp_path / "r", one.facts, in_this_process(one), one.method, tell=changed)))
    identity = json.loads((tmp_path / "r" / "x" / "run.json").read_text())["identity"]
    assert identity["train_sha256"] == rows_digest([Row("w44 w45 w46", "w7")])


def test_what_another_process_finishes_meanwhile_stays(tiny_logo: LoGo, rows: Path, tmp_path: Path) -> None:
    """A result of the same run is not made again, and that of another one is refused."""
    shutil.copy(rows / "x.jsonl", rows / "y.jsonl")
    second = find_datasets(rows)[1:]

    def skipped(other: Answerer, folder: Path) -> list[bool]:
        told: list[str] = []

        def tell(dataset: Dataset, done: int) -> None:
            told.append(dataset.name)
            if len(told) == 1:
                list(answer_datasets(second, Run(folder, other.facts, in_this_process(other))))

        return [done.skipped for done in evaluated(answerer(tiny_logo), rows, folder, tell=tell)]

    assert skipped(answerer(tiny_logo), tmp_path / "own") == [False, True]
    with pytest.raises(UsageError, match="holds the result of another run: max_new_tokens is 2, not 3"):
        skipped(Answerer(tiny_logo, "M", max_new_tokens=2), tmp_path / "other")
    assert sorted(path.name for path in (tmp_path / "other").iterdir()) == ["x", "y"]


def test_what_another_run_left_unfinished_is_refused_first(tiny_logo: LoGo, rows: Path, tmp_path: Path) -> None:
    shutil.copy(rows / "x.jsonl", rows / "y.jsonl")
    other, told = Answerer(tiny_logo, "M", max_new_tokens=2), list[Dataset]()
    with pytest.raises(KeyboardInterrupt):
        run = Run(tmp_path, other.facts, in_this_process(other), tell=stopping)
        list(answer_datasets(find_datasets(rows)[1:], run))
    with pytest.raises(UsageError, match=r"left by an unfinished run .*max_new_tokens is 2, not 3"):
        evaluated(answerer(tiny_logo), rows, tmp_path, tell=lambda dataset, done: told.append(dataset))
    assert not told


def test_what_a_method_found_out_is_known_after_an_interruption(
    tiny_logo: LoGo, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the last row and the files."""
    one, train = answerer(tiny_logo, method=get_method("best-single", rows=1)), tmp_path / "train.jsonl"
    train.write_text('{"context": "w44 w45 w46", "completion": "w7"}')
    datasets = [replace(each, train_file=train) for each in find_datasets(rows)]

    def found_out(folder: Path) -> Any:
        list(answer_datasets(datasets, Run(folder, one.facts, in_this_process(one), one.method)))
        return json.loads((folder / "x" / "run.json").read_text())["found_out"]

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as changes, pytest.raises(KeyboardInterrupt):
        changes.setattr(Partial, "finish", interrupted)
        found_out(tmp_path / "cut")
    assert found_out(tmp_path / "cut") == found_out(tmp_path / "whole") != {}
