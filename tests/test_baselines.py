"""Baselines: one interface, selections that a seed repeats, and what each of them is by definition."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st
from torch import nn

import logo.baselines.loraretriever as embedding
from logo import LoGo, Selection
from logo.adapters.examples import write_examples
from logo.baselines import Method, Task, get_method, get_methods
from logo.baselines.best_single import labelled
from logo.baselines.lorahub import minimise, objective
from logo.baselines.method import METHODS
from logo.errors import DataError, HubError, LoGoError, MissingLibrary, ModelError, UsageError
from logo.scoring import Scored
from test_engine import PROMPTS, engine, hooks, write_adapter
from tolerances import same_scores, same_tensor, same_weights

ALL = ("base", "uniform", "random", "target", "best-single", "lorahub", "loraretriever")
SAMPLES = {f"t{i}": tuple(f"w{10 * i + j} w{20 + i}" for j in range(3, 6)) for i in range(4)}
SHORT: dict[str, dict[str, Any]] = {
    "lorahub": {"k": 3, "budget": 6, "rows": 2},
    "random": {"k": 2},
    "best-single": {"rows": 2},
}


@dataclass(frozen=True)
class Row:
    context: str
    completion: str | tuple[str, ...]

    @property
    def prompt(self) -> str:
        return self.context


TRAIN = tuple(Row(f"w{i} w{i + 1}", ("w50", "w51") if i % 2 else "w50 w51") for i in range(3, 9))
TASK = Task("main.t2", PROMPTS, lambda: TRAIN)


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A real sentence-transformers model, tiny and random, in a folder."""
    from sentence_transformers import SentenceTransformer
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    root = tmp_path_factory.mktemp("sentences")
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *(f"w{i}" for i in range(3, 90))])}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(root / "bert")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = BertConfig(vocab_size=len(words), max_position_embeddings=64, initializer_range=1.0, **sizes)
    BertModel(config).eval().save_pretrained(root / "bert")
    # Of a plain encoder, the library makes one with mean pooling.
    SentenceTransformer(str(root / "bert"), device="cpu").save_pretrained(str(root / "model"))
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


@pytest.fixture(scope="module")
def demo() -> LoGo:
    return LoGo.from_pretrained("demo", signal="calibrated", k=3)


def heldout(name: str) -> list[Row]:
    file = Path(embedding.__file__).parents[1] / "demo" / "assets" / "heldout" / f"{name}.jsonl"
    return [Row(**json.loads(line)) for line in file.read_text().splitlines()]


def made(name: str, sentences: str = "", **options: Any) -> Method:
    if name == "loraretriever":
        options = {"embedding_model": sentences, **options}
    return get_method(name, **{**SHORT.get(name, {}), **options})


def chosen(logo: LoGo, method: Method, task: Task, prompts: Sequence[str], size: int = 8) -> list[Selection]:
    """The selections of a method for a task."""
    select = method.prepare(logo, task).select
    assert select is not None
    return select(prompts, size)


# -- the interface, for all of them -----------------------------------------------------------------------------


def test_there_are_these_methods() -> None:
    listed = {name: (kind.function.__doc__ or "").splitlines()[0] for name, kind in METHODS.items()}
    assert sorted(listed) == sorted((*ALL, "arrow")) and all(10 < len(line) < 120 for line in listed.values())


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
    for selection in selections:
        assert set(selection.adapters) <= set(logo.names)
        assert list(selection.weights) == sorted(selection.weights, reverse=True)
        if name not in ("base", "lorahub"):
            assert sum(selection.weights) == pytest.approx(1)
        if method.picks is not None:
            assert len(selection.adapters) <= method.picks
    assert logo.score("w3", "w4", [{}]) == before
    assert hooks(logo.model) == there
    json.dumps([dict(first.record), method.as_dict()])
    assert method.as_dict()["method"] == name


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lorahup", {}, "unknown method 'lorahup' .did you mean 'lorahub'"),
        ("lorahub", {"bugdet": 3}, "method 'lorahub' has no option 'bugdet' .did you mean 'budget'"),
        ("lorahub", {"budget": 0}, "method 'lorahub': budget: expected a whole number of 1 or more, found 0"),
        ("best-single", {"rows": "many"}, "rows: expected a whole number of 1 or more, found 'many'"),
        ("uniform", {"k": 3}, "method 'uniform' has no number of adapters; leave out -k"),
        ("base", {"rows": 3}, "method 'base' has no option 'rows'; it has none"),
    ],
)
def test_what_cannot_be_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        get_method(name, **options)


def test_options_of_several_methods_go_to_those_that_have_them() -> None:
    made = get_methods(["best-single", "lorahub", "base"], {"rows": 3, "budget": 7}, seed=2)
    assert made["best-single"] == get_method("best-single", rows=3, seed=2)
    assert made["lorahub"] == get_method("lorahub", rows=3, budget=7, seed=2) and made["base"].options == {}
    with pytest.raises(UsageError, match="method option 'budget': none of base, best-single has it"):
        get_methods(["base", "best-single"], {"budget": 7})


# -- fixed ones -------------------------------------------------------------------------------------------------


def test_the_bounds(tiny_logo: LoGo) -> None:
    assert chosen(tiny_logo, made("base"), TASK, PROMPTS[:1])[0].mixture == {}
    [whole] = chosen(tiny_logo, made("uniform"), TASK, PROMPTS[:1])
    assert whole.mixture == dict.fromkeys(tiny_logo.names, 0.25)


@budget(deadline=None, max_examples=30)
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


def test_the_target_is_named_by_rows_or_by_the_dataset(tiny_logo: LoGo) -> None:
    def found(task: Task) -> list[str]:
        return [one.adapters[0] for one in chosen(tiny_logo, get_method("target"), task, PROMPTS)]

    def named(name: str, rows: Sequence[str | None] = (), prompts: Sequence[str] = PROMPTS) -> Task:
        return Task(name, prompts, targets=rows)

    rows = ("t0", None, "t3", "t3", "t1")
    assert found(named("main.t2")) == ["t2"] * 5 and found(named("t1")) == ["t1"] * 5
    assert found(named("main.t2", rows)) == ["t0", "t2", "t3", "t3", "t1"]
    everyone = ["t0", "t1", "t2", "t3", "t0"]
    assert found(named("main.other", everyone)) == everyone
    for task, message in (
        (named("main.t22"), "the pool has none called 'main.t22'"),
        (named("t22"), "the pool has none called 't22' .did you mean"),
        (named("main.other", rows), "there are rows that name no adapter"),
        (named("main.t2", ("t0", "tt", None, None, None)), "row 2 names adapter 'tt', which the pool does not have"),
        (named("main.t2", ("t0", "t1"), ["w3", "w3"]), "row 2 names adapter 't1', and an earlier row 't0'"),
    ):
        with pytest.raises(DataError, match=message):
            found(task)


def test_the_target_may_be_in_a_folder(llama: nn.Module, adapters: Path) -> None:
    nested = engine(llama, adapters)
    [selection] = chosen(nested, get_method("target"), Task("main.t3", ["w3"]), ["w3"])
    assert selection.adapters == ("tasks/t3",)


# -- learned ones -----------------------------------------------------------------------------------------------


def test_best_single_is_the_best_of_its_table(tiny_logo: LoGo) -> None:
    prepared = get_method("best-single", rows=4, seed=3).prepare(tiny_logo, TASK)
    pairs = labelled(tiny_logo, TASK, 4, 3)
    assert len({tuple(prompt) for prompt, _ in pairs}) == 4
    for name, entry in prepared.record["table"].items():
        scored = tiny_logo.score_pairs(pairs, [{name: 1.0}] * 4)
        assert entry["nll"] == same_scores(sum(s.nll for s in scored) / 4)
        assert entry["exact_match"] == sum(s.exact_match for s in scored) / 4
    table = prepared.record["table"]
    best = max(table, key=lambda name: (table[name]["exact_match"], -table[name]["nll"]))
    assert prepared.record["adapter"] == best and prepared.select(["w3"], 1)[0].mixture == {best: 1.0}


@pytest.mark.parametrize("name", ["antonym", "add_numbers"])
def test_best_single_finds_the_right_adapter(name: str, demo: LoGo) -> None:
    rows = heldout(name)
    prepared = get_method("best-single", rows=6).prepare(demo, Task(f"demo.{name}", train=lambda: rows))
    assert prepared.record["adapter"] == name


def test_lorahub_finds_weights_that_answer(demo: LoGo) -> None:
    """Against a budget of one, which is the base model; repeated by its seed; another seed draws other rows."""
    rows = heldout("antonym")
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


@pytest.mark.slow
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


def test_lorahub_repeats_itself_by_its_seed(tiny_logo: LoGo) -> None:
    def record(seed: int) -> dict[str, Any]:
        return dict(get_method("lorahub", k=3, budget=12, rows=2, seed=seed).prepare(tiny_logo, TASK).record)

    one, again, other = record(0), record(0), record(1)
    assert one == again and one["seed"] == 0 and len(one["drawn"]) == 3
    assert one["weights"] != other["weights"]


@pytest.mark.slow
@pytest.mark.parametrize(("size", "budget"), [(2, 200), (4, 200), (16, 200)])
def test_minimise(size: int, budget: int) -> None:
    """Sizes for which nevergrad takes a meta-model, another with CMA in it, and Cobyla, which answers by default."""
    target = [0.9, -0.4, 0.1, -1.2] * 4

    def loss(weights: Sequence[float]) -> float:
        return sum((w - t) ** 2 for w, t in zip(weights, target[:size], strict=True))

    before = numpy.random.get_state()[1].tolist()
    weights, found = minimise(loss, size, budget, 1.5, 0)
    assert found == loss(weights) < loss([0.0] * size) / 10  # how near it comes depends on nevergrad's version
    assert minimise(loss, size, budget, 1.5, 0) == (weights, found)
    assert numpy.random.get_state()[1].tolist() == before
    assert all(abs(weight) <= 1.5 for weight in weights)


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


@pytest.fixture(scope="module")
def instructor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny INSTRUCTOR model: a T5 encoder with mean pooling, saved as the published ones are, without a word about
    instructions."""
    from sentence_transformers import SentenceTransformer
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    root = tmp_path_factory.mktemp("instructor")
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
    SentenceTransformer(str(root / "t5"), device="cpu").save_pretrained(str(root / "instructor-tiny"))
    pooling = root / "instructor-tiny" / "1_Pooling" / "config.json"
    kept = json.loads(pooling.read_text())
    assert kept.pop("include_prompt") is True
    pooling.write_text(json.dumps(kept))
    return root / "instructor-tiny"


def test_instructor_leaves_the_instruction_out_of_the_mean(instructor: Path, tmp_path: Path) -> None:
    """By its definition, from the encoder itself; a model of another name counts the instruction's tokens too."""
    from transformers import AutoTokenizer, T5EncoderModel

    encoder, tokenizer = T5EncoderModel.from_pretrained(instructor), AutoTokenizer.from_pretrained(instructor)
    instruction, texts = "w80 w81 w82 ", [" w3 w4 w5", "w6", "w7 w8 w9 w10 w11 w12"]

    def by_definition(left_out: int) -> torch.Tensor:
        rows = []
        for text in texts:
            ids = tokenizer(instruction.strip() + text.strip(), return_tensors="pt")
            with torch.no_grad():
                vector = encoder(**ids).last_hidden_state[0, left_out:].mean(dim=0)
            rows.append(vector / vector.norm())
        return torch.stack(rows)

    ours = embedding.embed(texts, str(instructor), instruction)
    same_tensor(ours, by_definition(3))
    shutil.copytree(instructor, tmp_path / "encoder")
    named_otherwise = embedding.embed(texts, str(tmp_path / "encoder"), instruction)
    same_tensor(named_otherwise, by_definition(0))
    assert not torch.allclose(ours, named_otherwise, atol=1e-2)
    pooling = tmp_path / "encoder" / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps({**json.loads(pooling.read_text()), "include_prompt": False}))
    embedding._load.cache_clear()
    same_tensor(embedding.embed(texts, str(tmp_path / "encoder"), instruction), ours)


def test_lora_retrievers_own_model_is_an_instructor(instructor: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its Hub id, whose last part says nothing; the library is given the folder it was fetched to."""
    monkeypatch.setattr(embedding, "_fetch", lambda model: str(instructor))
    for model in ("Styxxxx/lora_retriever", "hkunlp/instructor-large"):
        embedding._load.cache_clear()
        same_tensor(embedding.embed(["w3 w4"], model, "w80"), embedding.embed(["w3 w4"], str(instructor), "w80"))
    embedding._load.cache_clear()


def test_examples_are_needed_for_every_adapter(llama: nn.Module, pool: Path, tmp_path: Path, sentences: str) -> None:
    shutil.copytree(pool, tmp_path / "pool")
    (tmp_path / "pool" / "t1" / "examples.jsonl").unlink()
    with pytest.raises(DataError, match=r"found none of t1; give them some with `logo pool examples`"):
        made("loraretriever", sentences).prepare(engine(llama, tmp_path / "pool"), TASK)


def test_what_is_missing_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, demo: LoGo) -> None:
    embedding._load.cache_clear()

    def said(model: str, kind: type[LoGoError]) -> str:
        with pytest.raises(kind) as error:
            embedding.embed(["w3"], model)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "no such folder, and not a Hub id" in said("/nowhere/at all", ModelError)
    (tmp_path / "empty").mkdir()
    assert f"embedding model '{tmp_path / 'empty'}' cannot be loaded" in said(str(tmp_path / "empty"), ModelError)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "Hub repo sentence-transformers/none: not in the cache" in said("none", HubError)
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    assert 'needs sentence-transformers, which is not installed: pip install "lora-on-the-go[eval]"' in said(
        "none", MissingLibrary
    )
    monkeypatch.setitem(sys.modules, "nevergrad", None)
    with pytest.raises(MissingLibrary, match=r'needs nevergrad, .* "lora-on-the-go\[eval\]"'):
        get_method("lorahub").prepare(demo, Task("demo.antonym", train=lambda: heldout("antonym")))
