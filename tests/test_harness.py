"""LoGo inside lm-evaluation-harness: its numbers beside the harness's own `hf` model, and beside `logo evaluate`."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import make_adapters
from logo import UsageError
from logo.cli.app import run
from logo.cli.lm_eval import completed
from logo.demo import heldout
from written import write_base, write_rows

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from logo.evaluation.harness import LoGoLM, common_text  # noqa: E402
from tolerances import same_scores  # noqa: E402

pytestmark = pytest.mark.slow

LONG = " ".join(f"w{3 + i % 80}" for i in range(300))  # the tiny models read 128 tokens
PAIRS = [
    ("w3 w4 w5", " w6 w7"),
    ("w3 w4 w5", " w8"),
    ("w3 w4 w5", " w9"),
    ("w30 w31 w32 w33 w34 w35 w36 ", "w37"),  # the blank at the end goes to the continuation
    ("", "w20 w21"),
    ("<s> w3", " w4"),  # as from a chat template: no second one is put in front
    (LONG, " w5 w6"),
    ("w9", " w10 w11 w12 w13 w14"),
]
ROLLING = [("w3 w4 w5 w6",), ("w7",), (LONG,), ("<s> w3 w9 w9",)]
QUESTIONS: list[tuple[str, dict[str, Any]]] = [
    ("w3 w4 w5", {"until": ["w9"], "max_gen_toks": 12}),
    ("w40", {"until": ["w1", "w2"], "max_gen_toks": 12}),
    ("w40 w41 w42 w43 w44", {"until": "w3", "max_gen_toks": 12}),
    ("w50 w51", {"until": [], "max_gen_toks": 5, "temperature": 0.0}),
    ("<s> w60 w61", {"until": ["w9"], "max_gen_toks": 12}),
    (LONG, {"until": ["\n"], "max_new_tokens": 9}),
]


def asked(model: Any, kind: Any, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    """The answers of a model to these requests, in order."""
    instances = [Instance(request_type=kind, doc={}, arguments=each, idx=i) for i, each in enumerate(arguments)]
    found: list[Any] = getattr(model, kind)(instances, disable_tqdm=True)
    return found


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """The harness and what it brings along warn about themselves; what is cut is tested elsewhere."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def pools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`one`: a pool of one adapter, whose weight is 1 by every signal; `three`: it with two others."""
    root = tmp_path_factory.mktemp("pools")
    for name, seed in (("a", 1), ("b", 2), ("c", 3)):
        make_adapters.write_peft(root / "three" / name, seed=seed)
    shutil.copytree(root / "three" / "a", root / "one" / "a")
    return root


@pytest.fixture(scope="module")
def logo_lm(base: Path, pools: Path) -> LoGoLM:
    return LoGoLM(str(base), str(pools / "one"), signal="norm", batch_size=3, device="cpu")


@pytest.fixture(scope="module")
def hf_lm(base: Path, pools: Path) -> HFLM:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return HFLM(pretrained=str(base), peft=str(pools / "one" / "a"), batch_size=3, device="cpu", dtype="float32")


def test_it_measures_what_the_hf_model_with_peft_does(logo_lm: LoGoLM, hf_lm: HFLM) -> None:
    # Of a long prompt it cuts the special token too; and it asks only the first prompt of a batch whether it has one.
    templated = [question for question in QUESTIONS if question[0].startswith("<s>")]
    others = [question for question in QUESTIONS if question not in templated and question[0] != LONG]
    for questions in (templated, others):
        ours, theirs = (asked(model, "generate_until", questions) for model in (logo_lm, hf_lm))
        assert ours == theirs and any(ours) and "w9" not in ours[0]
    ours, theirs = (asked(model, "loglikelihood_rolling", ROLLING) for model in (logo_lm, hf_lm))
    assert ours == same_scores(theirs)
    ours, theirs = (asked(model, "loglikelihood", PAIRS) for model in (logo_lm, hf_lm))
    assert [total for total, _ in ours] == same_scores([total for total, _ in theirs])
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    with pytest.raises(UsageError, match="the model reads 128 at once"):
        asked(logo_lm, "loglikelihood", [("w3", f" {LONG}")])


def test_batches_change_nothing_and_select_once(base: Path, pools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three adapters, so that rows of a batch have mixtures of their own."""
    single, batched = (
        LoGoLM(str(base), str(pools / "three"), signal="norm", k=2, batch_size=size, device="cpu") for size in (1, 5)
    )
    probed: list[str] = []
    select = batched.logo.select

    def counted(prompts: Any, **options: Any) -> Any:
        probed.extend(prompts)
        return select(prompts, **options)

    monkeypatch.setattr(batched.logo, "select", counted)
    kinds = {"loglikelihood": PAIRS, "loglikelihood_rolling": ROLLING, "generate_until": QUESTIONS}
    likelihoods, rolling, answers = (
        [asked(model, kind, arguments) for model in (batched, single)] for kind, arguments in kinds.items()
    )
    for ours, theirs in zip(*likelihoods, strict=True):
        assert ours[0] == same_scores(theirs[0]) and ours[1] == theirs[1]
    assert rolling[0] == same_scores(rolling[1])
    assert answers[0] == answers[1]
    texts = {context or following for context, following in PAIRS}  # answers select for themselves
    assert sorted(probed) == sorted([*texts, *(text for (text,) in ROLLING)])


def test_all_requests_about_a_document_are_scored_under_one_mixture(base: Path, pools: Path) -> None:
    """As Winogrande asks: other contexts, one continuation; and a likelihood without context beside them."""
    model = LoGoLM(str(base), str(pools / "three"), signal="norm", k=2, batch_size=4, device="cpu")
    start, rest = "w3 w4 w5", " w8 w9"
    pairs = [(0, f"{start} w30", rest), (0, f"{start} w60 w61", rest), (0, "", rest), (1, "w70 w71", rest)]
    instances = [
        Instance("loglikelihood", {}, (context, following), i, metadata=("task", document, 1))
        for i, (document, context, following) in enumerate(pairs)
    ]
    answers = model.loglikelihood(instances, disable_tqdm=True)
    one, other = (model.logo.select(text).mixture for text in (start, "w70 w71"))
    assert one != other and model.logo.select(f"{start} w30").mixture != one  # so that it matters
    for (document, context, following), (total, _) in zip(pairs, answers, strict=True):
        [expected] = model.logo.score(context or "<s>", following, [other if document else one])
        if context:  # without one, the special token stands in front once
            assert total == same_scores(expected.log_likelihood)
    [alone] = asked(model, "loglikelihood", [("", rest)])
    assert answers[2] != alone  # that is a document of its own, selected on its continuation


def test_what_a_document_is_selected_on() -> None:
    choices = [("Q: two?", " yes"), ("Q: two?", " no")]
    for pairs, text in (
        (choices, "Q: two?"),
        # Winogrande: the words before the blank, not the letters that two names share; or else the rest of the sentence
        ([("it fits as Sarah", " is small"), ("it fits as Sam", " is small")], "it fits as"),
        ([("Ann", " is small"), ("Bob", " is small")], "is small"),
        ([("The trophy", " does not fit."), ("The suitcase", " does not fit.")], "does not fit."),
        # acc_mutual_info: likelihoods of the choices alone, too
        ([*choices, ("", " yes"), ("", " no")], "Q: two?"),
        # BLiMP: two sentences without a context
        ([("", "The cat purrs."), ("", "The cat purr.")], "The cat"),
        ([("", "Cats purr."), ("", "Dogs bark.")], "Cats purr."),
        ([("  \n", "a"), ("", "a")], "a"),
    ):
        assert common_text(pairs) == text


def test_sampling_is_asked_for_and_honoured(logo_lm: LoGoLM) -> None:
    import torch

    def sampled(seed: int, **options: Any) -> list[str]:
        torch.manual_seed(seed)
        return asked(logo_lm, "generate_until", [("w3 w4", {"until": [], "max_gen_toks": 12, **options})])

    hot = {"do_sample": True, "temperature": 3.0, "top_k": 0}
    assert sampled(0, **hot) == sampled(0, **hot) != sampled(1, **hot)
    assert sampled(0) == sampled(1, temperature=0.0) == sampled(2, do_sample=False, temperature=0.7)


def test_results_say_what_they_stand_on(logo_lm: LoGoLM) -> None:
    asked(logo_lm, "loglikelihood", PAIRS[:1])
    info = logo_lm.get_model_info()
    assert info["model_num_parameters"] == logo_lm.logo.model.num_parameters()
    assert info["logo"]["pool"] == logo_lm.logo.pool.sha256() and len(info["peft_sha"]) == 64
    assert info["logo"]["settings"]["signal"] == "norm" and info["logo"]["settings"]["k"] == 1
    assert info["logo"]["mean_weights"] == {"a": 1.0} and info["logo"]["selections"] >= 1
    assert logo_lm.max_length == 128 and logo_lm.max_gen_toks == 64
    assert "/" not in logo_lm.tokenizer_name


def test_chat_templates_are_the_tokenizers(base: Path, pools: Path) -> None:
    model = LoGoLM(str(base), str(pools / "one"), signal="norm", device="cpu")
    model.tokenizer.chat_template = (
        "<s>{% for message in messages %} {{ message['content'] }}{% endfor %}"
        "{% if add_generation_prompt %} w90{% endif %}"
    )
    chat = [{"role": "user", "content": "w3 w4"}]
    assert model.chat_template(True) == model.tokenizer.chat_template
    assert model.apply_chat_template(chat) == "<s> w3 w4 w90"
    assert model.apply_chat_template(chat, add_generation_prompt=False) == "<s> w3 w4"
    assert model.tok_encode("<s> w3") == model.tok_encode(" w3") == model.tok_encode("w3")
    assert model.tok_encode("w3", add_special_tokens=False) == model.tok_encode("w3")[1:]


def test_what_cannot_be_used_is_named() -> None:
    for arguments, message in (
        ({"base_model": ""}, "expected base_model="),
        ({"kk": 3}, "--model_args: unknown setting 'kk' .did you mean 'k'"),
        ({"token": "x"}, "token would be written to the results"),
        ({"batch_size": "auto"}, "--batch_size auto: expected a number"),
        ({"signal": "nrom"}, "nrom"),
    ):
        with pytest.raises(UsageError, match=message):
            LoGoLM(**{"base_model": "demo", **arguments})


# -- the command ----------------------------------------------------------------------------------------------------


def test_arguments_are_handed_over(capsys: pytest.CaptureFixture[str]) -> None:
    """The help is ours until a command is named."""
    for given, expected in (
        (["--tasks", "x"], ["run", "--model", "logo", "--tasks", "x"]),
        (["--model", "hf", "--tasks", "x"], ["run", "--model", "hf", "--tasks", "x"]),
        (["--model=hf"], ["run", "--model=hf"]),
        (["run", "-C", "x.yaml"], ["run", "-C", "x.yaml"]),
        (["ls", "tasks"], ["ls", "tasks"]),
        ([], []),
    ):
        assert completed(given) == expected
    assert run(["eval", "lm-eval", "--help"]) == 0
    assert "Example: logo eval lm-eval" in " ".join(capsys.readouterr().out.replace("`", "").split())
    assert run(["eval", "lm-eval", "run", "--help"]) == 0
    assert "--include_path" in capsys.readouterr().out


TASK = """
task: demo_generated
dataset_path: json
dataset_kwargs:
  data_files:
    test: data/demo/mixed/test.jsonl
test_split: test
output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: "{{completion}}"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 12
filter_list:
  - name: answer
    filter:
      - function: remove_whitespace
      - function: take_first
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    ignore_case: true
    regexes_to_ignore: ["\\\\."]
"""


def test_the_harness_and_logo_evaluate_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row for name in ("add_numbers", "antonym", "french", "reverse_word") for row in heldout()[name][:8]]
    write_rows(tmp_path / "data" / "demo" / "mixed" / "test.jsonl", rows)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "generated.yaml").write_text(TASK)
    monkeypatch.chdir(tmp_path)
    ours = ["eval", "run", "--dataset", "demo.mixed", "--base_model", "demo", "--signal", "calibrated"]
    assert run([*ours, "--max_new_tokens", "12", "--batch_size", "8", "--device", "cpu", "--json"]) == 0
    [summary] = json.loads(capsys.readouterr().out)
    exact = summary["scores"]["em"]["value"]
    asked = ("eval", "lm-eval", "--model_args", "base_model=demo,signal=calibrated", "--include_path", "tasks")
    asked += ("--tasks", "demo_generated", "--batch_size", "8", "--log_samples", "--output_path", "out")
    assert run(asked) == 0
    assert "demo_generated" in capsys.readouterr().out
    [results] = [json.loads(path.read_text()) for path in (tmp_path / "out").rglob("results_*.json")]
    assert results["results"]["demo_generated"]["exact_match,answer"] == exact
    assert 0.5 < exact < 1  # so that agreeing means something
    logo = results["config"]["logo"]
    assert logo["settings"]["k"] == 3 and logo["selections"] == len(rows)
    [file] = (tmp_path / "out").rglob("samples_demo_generated_*.jsonl")
    samples = sorted(map(json.loads, file.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    predictions = json.loads((tmp_path / summary["folder"] / "predictions.json").read_text())
    assert [sample["filtered_resps"][0].strip() for sample in samples] == predictions
