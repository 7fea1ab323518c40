"""Baselines: one interface, selections that a seed repeats, and what each of them is by definition, or in PEFT."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import logo.selection.encoder as embedding
import tiny
from encoders import HeldEncoder
from logo import LoGo, Selection
from logo.adapters.examples import write_examples
from logo.adapters.peft import EXAMPLES, RECORD
from logo.baselines import Method, Task, get_method, get_methods
from logo.baselines.best_single import labelled
from logo.baselines.lorahub import minimise, objective
from logo.cli.app import run
from logo.cli.options import MethodOptions
from logo.core import Prompt
from logo.demo import heldout
from logo.errors import DataError, HubError, LoGoError, ModelError, UsageError
from logo.rows import Row
from logo.scoring import Scored
from logo.selection.evidence import FEW_KNOWN, KINDS, RESPONSE, Kind
from logo.selection.settings import SelectionSettings
from make_adapters import edit_weights, write_peft
from test_engine import PROMPTS, engine, hooks, write_adapter
from tolerances import PATIENCE, same_scores, same_tensor, same_weights
from warm import python
from written import write_rows

pytestmark = pytest.mark.slow

ALL = ("base", "uniform", "random", "target", "best-single", "lorahub", "loraretriever")
SAMPLES = {f"t{i}": tuple(f"w{10 * i + j} w{20 + i}" for j in range(3, 6)) for i in range(4)}
SHORT: dict[str, Any] = {"lorahub": {"k": 3, "budget": 6, "rows": 2}, "random": {"k": 2}, "best-single": {"rows": 2}}
TRAIN = tuple(Row(f"w{i} w{i + 1}", ("w50", "w51") if i % 2 else "w50 w51") for i in range(3, 9))
TASK = Task("main.t2", PROMPTS, lambda: TRAIN)


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A real sentence-transformers model, tiny and random, in a folder: a T5 encoder with mean pooling."""
    from sentence_transformers import SentenceTransformer
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    root = tmp_path_factory.mktemp("sentences")
    words = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(3, 90))])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("w[0-9]+"), "isolated")
    made.normalizer = normalizers.Replace(" ", "")
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=64, **special).save_pretrained(root / "t5")
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    T5EncoderModel(T5Config(vocab_size=len(words), **sizes)).eval().save_pretrained(root / "t5")
    # Of a plain encoder, the library makes one with mean pooling.
    SentenceTransformer(str(root / "t5"), device="cpu").save_pretrained(str(root / "model"))
    return str(root / "model")


@pytest.fixture(scope="module")
def pool(llama: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pool")
    for i, names in enumerate([("q_proj", "v_proj"), ("q_proj",), ("q_proj", "down_proj"), ("q_proj", "v_proj")]):
        write_adapter(root / f"t{i}", llama, names, rank=2, seed=i, scale=0.4)
        write_examples(root / f"t{i}", SAMPLES[f"t{i}"])
    return root


@pytest.fixture(scope="module")
def tiny_logo(llama: nn.Module, pool: Path) -> LoGo:
    return engine(llama, pool, k=2)


def made(name: str, sentences: str = "", **options: Any) -> Method:
    if name == "loraretriever":
        options = {"embedding_model": sentences, **options}
    return get_method(name, **{**SHORT.get(name, {}), **options})


def chosen(logo: LoGo, method: Method, task: Task, prompts: Sequence[str], size: int = 8) -> list[Selection]:
    """The selections of a method for a task."""
    select = method.prepare(logo, task).select
    assert select is not None
    return select(prompts, size)


@pytest.mark.parametrize("name", ALL)
def test_every_method(name: str, tiny_logo: LoGo, sentences: str) -> None:
    """Selections are the pool's, repeat themselves, and do not depend on what is asked for together with what."""
    logo, method = tiny_logo, made(name, sentences)
    before, there = logo.score("w3", "w4", [{}]), hooks(logo.model)
    first, again = (method.prepare(logo, TASK) for _ in range(2))
    assert first.select is not None and again.select is not None
    selections = first.select(PROMPTS, 2)
    assert again.select(PROMPTS, 2) == selections and again.record == first.record
    alone = [first.select([prompt], 1)[0] for prompt in reversed(PROMPTS)][::-1]
    for others in (again.select(PROMPTS, 5), alone):
        for one, other in zip(selections, others, strict=True):
            assert one.adapters == other.adapters and one.weights == same_weights(other.weights)
            # A batch's shape changes the last digit of what it reads.
            assert one.scores == same_scores(other.scores)
    if name in ("base", "uniform"):
        assert selections[0].mixture == ({} if name == "base" else dict.fromkeys(logo.names, 0.25))
    for selection in selections:
        assert set(selection.adapters) <= set(logo.names)
        assert list(selection.weights) == sorted(selection.weights, reverse=True)
        if name not in ("base", "lorahub"):
            assert sum(selection.weights) == pytest.approx(1)
        if method.picks is not None:
            assert len(selection.adapters) <= (len(logo.names) if method.picks == "pool" else method.picks)
    assert logo.score("w3", "w4", [{}]) == before
    assert hooks(logo.model) == there
    json.dumps([dict(first.record), method.as_dict()])
    assert method.as_dict()["method"] == name


def test_options_go_to_methods_that_have_them() -> None:
    made = get_methods(["best-single", "lorahub", "base"], {"rows": 3, "budget": 7}, seed=2)
    assert made["best-single"] == get_method("best-single", rows=3, seed=2)
    assert made["lorahub"] == get_method("lorahub", rows=3, budget=7, seed=2) and made["base"].options == {}
    assert get_methods(["random", "base"], {"k": "2"})["random"] == get_method("random", k=2)
    assert get_methods(["random", "base"], {}, k=2)["random"] == get_method("random", k=2)
    assert get_methods(["random"], {"k": "3"}, k=2)["random"] == get_method("random", k=3)
    with pytest.raises(UsageError, match="method option 'budget': none of base, best-single has it"):
        get_methods(["base", "best-single"], {"budget": 7})
    for name, options, message in (
        ("lorahup", {}, "unknown method 'lorahup' .did you mean 'lorahub'"),
        ("lorahub", {"bugdet": 3}, "method 'lorahub' has no option 'bugdet' .did you mean 'budget'"),
        ("lorahub", {"budget": 0}, "method 'lorahub': budget: expected a whole number of 1 or more, found 0"),
        ("lorahub", {"k": "x"}, "method 'lorahub': k: expected a whole number of 1 or more, found 'x'"),
        ("uniform", {"k": 3}, "method 'uniform' has no number of adapters; leave out -k"),
        ("base", {"rows": 3}, "method 'base' has no option 'rows'; it has none"),
    ):
        with pytest.raises(UsageError, match=message):
            get_method(name, **options)


def test_options_on_the_command_line_are_of_the_kind_of_their_defaults() -> None:
    def options(method: str, text: str) -> Any:
        made = MethodOptions(method=method, method_args=text).make(None, 0)
        assert made is not None
        return made.options

    for text in ("Represent the sentence for similar task retrieval: ", "yes", "1", "null"):
        assert options("loraretriever", f"instruction={text}")["instruction"] == text
    found = options("lorahub", "penalty=1e-3,bound=2,rows=3")
    assert (found["penalty"], found["bound"], found["rows"]) == (0.001, 2.0, 3)
    assert options("random", "k=5") == {"k": 5, "seed": 0}
    for text, message in (("penalty=high", "a number, found 'high'"), ("rows=1e1", "1 or more, found '1e1'")):
        with pytest.raises(UsageError, match=message):
            options("lorahub", text)


@settings(deadline=None, max_examples=30)
@given(prompts=st.lists(st.text(min_size=1), min_size=1, max_size=6), seed=st.integers(0, 99), k=st.integers(1, 6))
def test_random_depends_on_seed_and_prompt_alone(tiny_logo: LoGo, prompts: list[str], seed: int, k: int) -> None:
    method = get_method("random", seed=seed, k=k)
    select = method.prepare(tiny_logo, TASK).select
    drawn = select(prompts, 8)
    assert select(prompts[::-1], 1) == drawn[::-1]
    assert all(len(set(selection.adapters)) == min(k, 4) for selection in drawn)


def test_random_draws_differ(tiny_logo: LoGo) -> None:
    texts = [f"w{i}" for i in range(3, 60)]
    one, other = (get_method("random", seed=s, k=2).prepare(tiny_logo, TASK).select(texts, 8) for s in (0, 1))
    assert len({selection.adapters for selection in one}) > 5
    assert one != other
    assert {name for selection in one for name in selection.adapters} == set(tiny_logo.names)


def test_the_target_is_named_by_rows_or_by_the_dataset(tiny_logo: LoGo, llama: nn.Module, adapters: Path) -> None:
    def found(name: str, rows: Sequence[str | None] = (), prompts: Sequence[str] = PROMPTS) -> list[str]:
        task = Task(name, prompts, targets=rows)
        return [one.adapters[0] for one in chosen(tiny_logo, get_method("target"), task, PROMPTS)]

    rows, everyone = ("t0", None, "t3", "t3", "t1"), ["t0", "t1", "t2", "t3", "t0"]
    assert found("main.t2") == ["t2"] * 5 and found("t1") == ["t1"] * 5
    assert found("main.t2", rows) == ["t0", "t2", "t3", "t3", "t1"] and found("main.other", everyone) == everyone
    for task, message in (
        (("main.t22",), "the pool has none called 'main.t22'"),
        (("t22",), "the pool has none called 't22' .did you mean"),
        (("main.other", rows), "there are rows that name no adapter"),
        (("main.t2", ("t0", "tt", None, None, None)), "row 2 names adapter 'tt', which the pool does not have"),
        (("main.t2", ("t0", "t1"), ["w3", "w3"]), "row 2 names adapter 't1', and an earlier row 't0'"),
    ):
        with pytest.raises(DataError, match=message):
            found(*task)
    nested = chosen(engine(llama, adapters), get_method("target"), Task("main.t3", ["w3"]), ["w3"])
    assert nested[0].adapters == ("tasks/t3",)


def test_best_single_is_the_best_of_its_table(tiny_logo: LoGo) -> None:
    prepared = get_method("best-single", rows=4, seed=3).prepare(tiny_logo, TASK)
    pairs, table = labelled(tiny_logo, TASK, 4, 3), prepared.record["table"]
    assert len({tuple(prompt) for prompt, _ in pairs}) == 4
    for name, entry in table.items():
        scored = tiny_logo.score_pairs(pairs, [{name: 1.0}] * 4)
        assert entry["nll"] == same_scores(sum(s.nll for s in scored) / 4)
        assert entry["exact_match"] == sum(s.exact_match for s in scored) / 4
    best = max(table, key=lambda name: (table[name]["exact_match"], -table[name]["nll"]))
    assert prepared.record["adapter"] == best and prepared.select(["w3"], 1)[0].mixture == {best: 1.0}


def test_lorahub_finds_weights_that_answer() -> None:
    """Against a budget of one, which is the base model."""
    demo = LoGo.from_pretrained("demo", signal="calibrated", k=3)
    rows = [Row(row["context"], row["completion"]) for row in heldout()["antonym"]]
    task = Task("demo.antonym", train=lambda: rows[8:])
    found = get_method("lorahub", k=16, seed=1).prepare(demo, task)
    weights = found.record["weights"]
    assert list(weights) == list(demo.names) and max(weights, key=lambda name: weights[name]) == "antonym"
    assert all(abs(weight) <= 1.5 for weight in weights.values())
    plain = get_method("lorahub", k=16, seed=1, budget=1).prepare(demo, task)
    assert found.record["loss"] < plain.record["loss"] / 2
    assert found.select is not None
    texts = [row.context for row in rows[:8]]
    answers = demo.generate(texts, adapters=found.select(texts, 8), max_new_tokens=8)
    right = sum(answer.text.strip() == row.completion for answer, row in zip(answers, rows[:8], strict=True))
    assert right >= 5


def test_lorahubs_objective_is_the_authors(tiny_logo: LoGo) -> None:
    """Their loss of one batch is the mean over its tokens, and is divided once more by the number of rows."""
    scored = [Scored(False, 2.0, 3), Scored(True, 0.5, 1), Scored(False, 1.0, 4)]
    assert objective(scored, [0.5, -1.5, 0.0, 1.0], 0.05) == pytest.approx((10.5 / 8) / 3 + 0.05 * 3.0 / 4)

    options = {"k": 3, "budget": 1, "rows": 5}  # a budget of one is the first point that is tried: all zeros
    found = get_method("lorahub", **options).prepare(tiny_logo, TASK).record
    assert not any(found["weights"].values())
    rows = tiny_logo.score_pairs(labelled(tiny_logo, TASK, 5, 0), [{}] * 5)
    of_tokens = sum(row.nll * row.tokens for row in rows) / sum(row.tokens for row in rows)
    assert found["loss"] == same_scores(of_tokens / 5)
    assert labelled(tiny_logo, TASK, 5, 0) != labelled(tiny_logo, TASK, 5, 1)


@pytest.mark.parametrize("size", [2, 4, 16])
def test_minimise(size: int) -> None:
    """Sizes for which nevergrad takes a meta-model, another with CMA in it, and Cobyla, which answers by default."""
    target = [0.9, -0.4, 0.1, -1.2] * 4

    def loss(weights: Sequence[float]) -> float:
        return sum((w - t) ** 2 for w, t in zip(weights, target[:size], strict=True))

    before = numpy.random.get_state()[1].tolist()
    weights, found = minimise(loss, size, 200, 1.5, 0)
    assert found == loss(weights) < loss([0.0] * size) / 10  # how near it comes depends on nevergrad's version
    assert minimise(loss, size, 200, 1.5, 0) == (weights, found)
    assert numpy.random.get_state()[1].tolist() == before
    assert all(abs(weight) <= 1.5 for weight in weights)


def test_what_nevergrad_warns_of_stays_inside() -> None:
    """Of its import, and of its threads."""
    code = (
        "import warnings; warnings.simplefilter('always')\n"
        "from logo.baselines.lorahub import minimise\n"
        "for size, budget in (3, 1), (16, 40): minimise(lambda w: sum(x * x for x in w), size, budget, 1.5, 0)"
    )
    done = subprocess.run([*python(), "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", ["best-single", "lorahub"])
def test_learning_needs_rows_that_can_be_scored(name: str, tiny_logo: LoGo) -> None:
    assert get_method(name).needs == "train"
    with pytest.raises(DataError, match=r"dataset 'main.x': a train row cannot be scored: completion '' has no tokens"):
        get_method(name).prepare(tiny_logo, Task("main.x", train=lambda: [Row("w3", "")]))


# -- retrieval --------------------------------------------------------------------------------------------------


def vectors(sentences: str, texts: Sequence[str], instruction: str = "") -> torch.Tensor:
    """Straight from the library, one text at a time."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(sentences, device="cpu", local_files_only=True)
    rows = [torch.tensor(model.encode(instruction + text, show_progress_bar=False)) for text in texts]
    return torch.stack([row / row.norm() for row in rows])


@pytest.mark.parametrize("instruction", ["", "w88 w89 "])
@pytest.mark.parametrize("k", [1, 3])
def test_loraretriever(k: int, instruction: str, tiny_logo: LoGo, sentences: str) -> None:
    method = made("loraretriever", sentences, k=k, instruction=instruction)
    selections = chosen(tiny_logo, method, Task("main.x"), PROMPTS)
    means = torch.stack([vectors(sentences, SAMPLES[name], instruction).mean(dim=0) for name in tiny_logo.names])
    for prompt, selection in zip(PROMPTS, selections, strict=True):
        expected = (means @ vectors(sentences, [prompt], instruction)[0]).tolist()
        assert list(selection.scores) == list(tiny_logo.names)
        assert list(selection.scores.values()) == same_scores(expected)
        best = sorted(selection.scores, key=lambda name: -selection.scores[name])
        assert list(selection.adapters) == best[:k] and selection.weights == (1 / k,) * k
    assert len({selection.adapters for selection in selections}) > 1


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("base", "target")])
def test_some_adapters_are_like_a_pool_of_them(name: str, tiny_logo: LoGo, sentences: str) -> None:
    """A task that says whom to choose among, against an engine that has nobody else."""
    among = tuple(one for one in tiny_logo.names if one != "t2")
    smaller = LoGo(tiny_logo.model, tiny_logo.tokenizer, tiny_logo.pool.subset(among), settings=tiny_logo.settings)
    method = made(name, sentences)
    here = chosen(tiny_logo, method, Task("main.t2", PROMPTS, lambda: TRAIN, among=among), PROMPTS)
    there = chosen(smaller, method, Task("main.t2", PROMPTS, lambda: TRAIN), PROMPTS)
    for one, other in zip(here, there, strict=True):
        assert "t2" not in one.mixture and one.adapters == other.adapters and one.weights == same_weights(other.weights)


def test_instructor_leaves_the_instruction_out_of_the_mean(
    sentences: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its definition, from the encoder itself; a model of another name counts the instruction's tokens too."""
    from transformers import AutoTokenizer, T5EncoderModel

    instructor = tmp_path / "instructor-tiny"
    shutil.copytree(sentences, instructor)
    kept = json.loads((instructor / "1_Pooling" / "config.json").read_text())
    assert kept.pop("include_prompt") is True  # the published ones have no word about instructions
    (instructor / "1_Pooling" / "config.json").write_text(json.dumps(kept))
    encoder, tokenizer = T5EncoderModel.from_pretrained(instructor), AutoTokenizer.from_pretrained(instructor)
    instruction, texts = "w80 w81 w82 ", [" w3 w4 w5", "w6", "w7 w8 w9 w10 w11 w12"]

    def by_definition(left_out: int) -> torch.Tensor:
        with torch.no_grad():
            ids = [tokenizer(instruction.strip() + text.strip(), return_tensors="pt") for text in texts]
            vectors = [encoder(**each).last_hidden_state[0, left_out:].mean(dim=0) for each in ids]
        return torch.stack([vector / vector.norm() for vector in vectors])

    ours = embedding.embed(texts, str(instructor), instruction)
    same_tensor(ours, by_definition(3))
    shutil.copytree(instructor, tmp_path / "encoder")
    named_otherwise = embedding.embed(texts, str(tmp_path / "encoder"), instruction)
    same_tensor(named_otherwise, by_definition(0))
    # That of LoraRetriever is one too, though its Hub id does not say so; the library is given what was fetched.
    monkeypatch.setattr(embedding, "_fetch", lambda model: str(instructor))
    same_tensor(embedding.embed(texts, "Styxxxx/lora_retriever", instruction), ours)
    embedding.load_encoder.cache_clear()


def test_examples_are_needed_for_every_adapter(llama: nn.Module, pool: Path, tmp_path: Path, sentences: str) -> None:
    shutil.copytree(pool, tmp_path / "pool")
    (tmp_path / "pool" / "t1" / "examples.jsonl").unlink()
    with pytest.raises(DataError, match=r"found none of t1; give them some with `logo pool examples`"):
        made("loraretriever", sentences).prepare(engine(llama, tmp_path / "pool"), TASK)


def test_a_model_that_is_missing_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    embedding.load_encoder.cache_clear()

    def said(model: str, kind: type[LoGoError]) -> str:
        with pytest.raises(kind) as error:
            embedding.embed(["w3"], model)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "no such folder, and not a Hub id" in said("/nowhere/at all", ModelError)
    assert f"text encoder '{tmp_path}' cannot be loaded" in said(str(tmp_path), ModelError)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "Hub repo sentence-transformers/none: not in the cache" in said("none", HubError)


# -- a text encoder as evidence beside the base model ----------------------------------------------------------------


def test_a_text_encoder_is_evidence(llama: nn.Module, pool: Path, sentences: str, tmp_path: Path) -> None:
    """Its cosines, in units of how far apart ordinary texts lie, are added to the scores; what it has read is kept."""
    settings = SelectionSettings(cache=str(tmp_path))
    logo = engine(llama, pool)
    without = LoGo(logo.model, logo.tokenizer, logo.pool, settings=settings)
    encoding = LoGo(logo.model, logo.tokenizer, logo.pool, settings=replace(settings, encoder=sentences))
    texts = [logo.prompts.text_of(row) for row in logo.prompts.texts(PROMPTS)]
    means = torch.stack([vectors(sentences, SAMPLES[name]).mean(dim=0) for name in logo.names])
    cosines = vectors(sentences, texts) @ torch.nn.functional.normalize(means, dim=1).T

    def scores(engine: LoGo) -> torch.Tensor:
        return torch.tensor([list(selection.scores.values()) for selection in engine.select(PROMPTS)])

    added = scores(encoding) - scores(without)
    unit = float(added.norm() / cosines.norm())
    assert unit > 1
    torch.testing.assert_close(added, unit * cosines, atol=1e-3, rtol=1e-3)
    read = [file for file in tmp_path.rglob("encoded/*.safetensors")]
    assert len(read) == 1 + len(logo.names)


def test_an_encoder_counts_by_what_it_computes_and_not_by_its_path(sentences: str, tmp_path: Path) -> None:
    whole = embedding.encoder_digest(sentences)
    copy = tmp_path / "copy"
    shutil.copytree(sentences, copy)
    assert embedding.encoder_digest(str(copy)) == whole
    other = tmp_path / "other"
    shutil.copytree(sentences, other)
    [file] = other.glob("*Pooling/config.json")
    pooling = json.loads(file.read_text())
    file.write_text(
        json.dumps(pooling)
        .replace('mean_tokens": true', 'mean_tokens": false')
        .replace('cls_token": false', 'cls_token": true')
        .replace('"mean"', '"cls"')
    )
    assert embedding.encoder_digest(str(other)) != whole


def test_what_a_text_encoder_has_read_is_not_read_again(
    llama: nn.Module, pool: Path, sentences: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = engine(llama, pool)
    settings = SelectionSettings(cache=str(tmp_path), encoder=sentences)
    logo = LoGo(opened.model, opened.tokenizer, opened.pool, settings=settings)
    prompts = [Prompt.of_ids(row) for row in logo.prompts.texts([*PROMPTS, PROMPTS[0]])]
    options = [logo.options()] * len(prompts)
    expected = [same_scores(selection.scores) for selection in logo.outcomes(prompts, options)]
    held = HeldEncoder(monkeypatch, PATIENCE)
    held.go.set()
    embedded = logo.embedded(prompts, options)
    assert held.calls == [len(PROMPTS)]  # together, and each text once
    assert [selection.scores for selection in logo.outcomes(prompts, options, embedded=embedded)] == expected
    assert held.calls == [len(PROMPTS)]
    first = logo.embedded(prompts[:1], options[:1])
    assert [selection.scores for selection in logo.outcomes(prompts, options, embedded=first)] == expected
    assert held.calls == [len(PROMPTS), 1, len(PROMPTS) - 1]
    assert not logo.only(["responses"]).embedded(prompts, options) and not opened.embedded(prompts, options)


def test_each_kind_of_evidence_alone(llama: nn.Module, pool: Path, sentences: str, tmp_path: Path) -> None:
    """What counts in a sum is what counts alone; sums that an engine can have are those of that engine."""
    settings = SelectionSettings(cache=str(tmp_path))
    opened = engine(llama, pool)

    def of(**changes: Any) -> LoGo:
        return LoGo(opened.model, opened.tokenizer, opened.pool.value, settings=replace(settings, **changes))

    whole = of(encoder=sentences)
    assert whole.only(["responses"]).select(PROMPTS) == of(examples="ignore").select(PROMPTS)
    assert whole.only(["responses", "examples"]).select(PROMPTS) == of().select(PROMPTS)
    assert whole.only(KINDS).select(PROMPTS) == whole.select(PROMPTS)
    assert whole.only(["encoder"]).points == ()  # the base model reads nothing
    for among in (None, whole.names[:3]):

        def scores(*kinds: Kind, among: Sequence[str] | None = among) -> torch.Tensor:
            found = whole.only(kinds).select(PROMPTS, candidates=among)
            return torch.tensor([list(selection.scores.values()) for selection in found], dtype=torch.float64)

        same_tensor(scores(*KINDS) - scores("responses", "examples"), scores("encoder"))
        ratios = (scores("responses", "examples") - scores("examples")) / scores("responses")  # one unit a prompt
        torch.testing.assert_close(ratios, ratios[:, :1].expand_as(ratios), rtol=1e-3, atol=0)


def test_an_adapter_without_examples_is_judged_by_evidence_that_it_lacks(
    llama: nn.Module, pool: Path, tmp_path: Path
) -> None:
    """By none, if responses do not count: it is as little like the prompt as most are."""
    folder = shutil.copytree(pool, tmp_path / "pool")
    (folder / "t3" / EXAMPLES).unlink()
    logo = engine(llama, folder, signal="calibrated")
    prompt = SAMPLES["t1"][0]
    scores = logo.only(["examples"]).select(prompt).scores
    others = sorted(scores[name] for name in ("t0", "t2"))
    assert (
        scores["t3"] == pytest.approx(sum(others) / (2 + FEW_KNOWN), abs=1e-4) and max(scores, key=scores.get) == "t1"
    )
    with pytest.raises(UsageError, match="evidence 'encoder': expected a text encoder, found none"):
        logo.only(["encoder"]).select(prompt)
    with pytest.raises(UsageError, match="evidence 'examples': expected example prompts of adapters, found none"):
        engine(llama, folder, signal="calibrated", examples="ignore").only(["examples"]).select(prompt)


def test_a_description_is_evidence_for_a_text_encoder(
    llama: nn.Module, pool: Path, sentences: str, tmp_path: Path
) -> None:
    """It counts as one more example. Of adapters without examples, the base model knows nothing but responses."""
    folder = shutil.copytree(pool, tmp_path / "pool")
    for name in ("t2", "t3"):
        (folder / name / EXAMPLES).unlink()
    described = {"t0": "Counts the vowels of a word.", "t3": "Says what the weather is like."}
    for name, description in described.items():
        (folder / name / RECORD).write_text(f"description: {description}\n", encoding="utf-8")
    logo = engine(llama, folder, signal="calibrated", encoder=sentences)
    said = {name: [*SAMPLES[name]] for name in ("t0", "t1")}
    for name, description in described.items():
        said.setdefault(name, []).append(description)
    texts = [logo.prompts.text_of(row) for row in logo.prompts.texts(PROMPTS)]
    names = sorted(said)
    means = torch.stack([vectors(sentences, said[name]).mean(dim=0) for name in names])
    cosines = vectors(sentences, texts) @ torch.nn.functional.normalize(means, dim=1).T
    found = logo.only(["encoder"]).select(PROMPTS)
    scores = torch.tensor([[selection.scores[name] for name in names] for selection in found])
    torch.testing.assert_close(scores, cosines * (scores.norm() / cosines.norm()), atol=1e-3, rtol=1e-3)

    for file in folder.rglob(EXAMPLES):
        file.unlink()
    alone = engine(llama, folder, signal="calibrated", encoder=sentences)
    for by_all, by_responses, by_encoder in zip(
        alone.select(PROMPTS),
        alone.only(["responses"]).select(PROMPTS),
        alone.only(["encoder"]).select(PROMPTS),
        strict=True,
    ):
        mean = sum(by_responses.scores.values()) / len(alone.names)
        for name, score in by_all.scores.items():
            response = by_responses.scores[name]
            if name in described:
                expected = RESPONSE * response + (response - mean) + by_encoder.scores[name]
                assert score == pytest.approx(expected, rel=1e-4)
    assert by_all.confidence is not None
    with pytest.raises(UsageError, match="evidence 'examples': expected example prompts of adapters, found none"):
        alone.only(["examples"]).select(PROMPTS[0])
    ignored = engine(llama, folder, signal="calibrated", encoder=sentences, examples="ignore")
    with pytest.raises(UsageError, match="evidence 'encoder'"):
        ignored.only(["encoder"]).select(PROMPTS[0])


def test_an_encoder_that_cannot_be_loaded_is_refused_first(llama: nn.Module, pool: Path) -> None:
    logo = engine(llama, pool)
    with pytest.raises(ModelError, match="text encoder 'no such': no such folder, and not a Hub id"):
        LoGo(logo.model, logo.tokenizer, logo.pool, settings=SelectionSettings(encoder="no such"))


# -- arrow ------------------------------------------------------------------------------------------------------


def compiled(weights: dict[str, torch.Tensor]) -> None:
    """Renames tensors as `torch.compile` does."""
    for key in [*weights]:
        weights[key.replace("base_model.model.", "base_model.model._orig_mod.")] = weights.pop(key)


def alike(model: nn.Module, folder: Path, ranks: tuple[int, ...] = (2, 2, 2)) -> Path:
    """Adapters of these ranks on the same modules."""
    for i, rank in enumerate(ranks):
        write_adapter(folder / f"t{i}", model, ("q_proj", "v_proj"), rank=rank, seed=i, scale=2.0)
    return folder


@pytest.mark.parametrize("top_k", [1, 2, 9])
def test_arrow_answers_as_pefts_own_model(top_k: int, llama: nn.Module, tmp_path: Path) -> None:
    """Batches of our engine against `create_arrow_model` and `model.generate`, one prompt at a time."""
    from peft import ArrowConfig, create_arrow_model

    edit_weights(alike(llama, tmp_path / "mine") / "t1", compiled)  # under names that PEFT does not read
    logo, _ = engine(llama, tmp_path / "mine", k=2), alike(llama, tmp_path)
    before = logo.generate(PROMPTS, max_new_tokens=6, adapters={})
    prepared = get_method("arrow", top_k=top_k, temperature=0.5).prepare(logo, Task("main.x", PROMPTS))
    assert prepared.select is not None and prepared.engine is not None
    chosen = prepared.select(PROMPTS, 8)
    found = prepared.engine.generate(PROMPTS, adapters=chosen, max_new_tokens=6, batch_size=3)
    config = ArrowConfig(top_k=min(top_k, 3), router_temperature=0.5, rng_seed=0)
    theirs = create_arrow_model(copy.deepcopy(llama), [str(tmp_path / f"t{i}") for i in range(3)], config).eval()
    for prompt, answer in zip(PROMPTS, found, strict=True):
        [ids] = theirs.generate(**logo.tokenizer(prompt, return_tensors="pt"), max_new_tokens=6, do_sample=False)
        assert logo.tokenizer.decode(ids[-len(answer.token_ids) :]) == logo.tokenizer.decode(answer.token_ids)
    assert [one.token_ids for one in found] != [one.token_ids for one in before]
    again = logo.generate(PROMPTS, max_new_tokens=6, adapters={})
    assert [one.token_ids for one in again] == [one.token_ids for one in before]


@pytest.mark.filterwarnings("ignore:2 of 3 adapters act on every token")
def test_pools_that_arrow_cannot_use(llama: nn.Module, tmp_path: Path) -> None:
    first, late = alike(llama, tmp_path / "ranks", (2, 3)), tmp_path / "late" / "t0"
    write_peft(late, tiny.model("llama"), layers_to_transform=[1, 2])
    for folder in (first, late.parent):
        with pytest.raises(
            UsageError, match="'arrow': expected adapters with the same modules, in all layers, and one"
        ):
            get_method("arrow").prepare(engine(llama, folder, k=1), TASK)
    file = alike(llama, tmp_path / "some") / "t1" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "alora_invocation_tokens": [5]}))
    with pytest.raises(UsageError, match="expected adapters that act on every token, found t1"):
        get_method("arrow").prepare(engine(llama, tmp_path / "some", k=2), TASK)


def test_arrow_in_an_evaluation_but_not_in_a_study(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = str(write_rows(tmp_path / "rows/capital.jsonl", heldout()["capital"][:1]).parent)
    assert run(["eval", "run", "--rows", rows, "--method", "arrow", "--result-dir", str(tmp_path / "r")]) == 0
    [row] = [json.loads(file.read_text()) for file in (tmp_path / "r").rglob("rows.jsonl")]
    assert row["selected"] == sorted(heldout()) and row["weights"] == [None] * 16 and row["error"] is None
    [folder] = (tmp_path / "r").iterdir()
    assert folder.name == "demo_method_arrow_n_16_seed_0"
    assert run(["eval", "report", str(folder), "--save", str(tmp_path / "tables")]) == 0
    assert run(["eval", "study", "--rows", rows, "--methods", "arrow", "--save", str(tmp_path / "s")]) == 2
    assert "method 'arrow' answers with a model of its own: compare it by `logo eval run`" in capfd.readouterr().err
