"""LoGo inside lm-evaluation-harness: its numbers beside the harness's own `hf` model, and beside `logo evaluate`."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import make_adapters
import tiny
from logo import UsageError
from logo.cli.app import run
from logo.cli.lm_eval import completed
from logo.models import DEMO_FOLDER
from test_engine import tokenizer

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
TEXTS = ["w3 w4 w5 w6", "w7", LONG, "<s> w3 w9 w9"]
QUESTIONS: list[tuple[str, dict[str, Any]]] = [
    ("w3 w4 w5", {"until": ["w9"], "max_gen_toks": 12}),
    ("w40", {"until": ["w1", "w2"], "max_gen_toks": 12}),
    ("w40 w41 w42 w43 w44", {"until": "w3", "max_gen_toks": 12}),
    ("w50 w51", {"until": [], "max_gen_toks": 5, "temperature": 0.0}),
    ("<s> w60 w61", {"until": ["w9"], "max_gen_toks": 12}),
    (LONG, {"until": ["\n"], "max_new_tokens": 9}),
]


def requests(kind: Any, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=each, idx=i) for i, each in enumerate(arguments)]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """The harness and what it brings along warn about themselves; what is cut is tested elsewhere."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny.model("llama").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


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


# -- beside the harness's own model ---------------------------------------------------------------------------------


def test_likelihoods_are_those_of_the_hf_model_with_peft(logo_lm: LoGoLM, hf_lm: HFLM) -> None:
    ours = logo_lm.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    theirs = hf_lm.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    assert [total for total, _ in ours] == same_scores([total for total, _ in theirs])
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


def test_rolling_likelihoods_are_those_of_the_hf_model_with_peft(logo_lm: LoGoLM, hf_lm: HFLM) -> None:
    asked = [(text,) for text in TEXTS]
    ours = logo_lm.loglikelihood_rolling(requests("loglikelihood_rolling", asked), disable_tqdm=True)
    theirs = hf_lm.loglikelihood_rolling(requests("loglikelihood_rolling", asked), disable_tqdm=True)
    assert ours == same_scores(theirs)


def test_answers_are_those_of_the_hf_model_with_peft(logo_lm: LoGoLM, hf_lm: HFLM) -> None:
    # Of a long prompt it cuts the special token too; and it asks only the first prompt of a batch whether it has one.
    templated = [question for question in QUESTIONS if question[0].startswith("<s>")]
    others = [question for question in QUESTIONS if question not in templated and question[0] != LONG]
    for questions in (templated, others):
        ours = logo_lm.generate_until(requests("generate_until", questions), disable_tqdm=True)
        assert ours == hf_lm.generate_until(requests("generate_until", questions), disable_tqdm=True)
        assert any(ours) and "w9" not in ours[0]


# -- selections -----------------------------------------------------------------------------------------------------


def test_batches_change_nothing_and_contexts_are_selected_once(
    base: Path, pools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    likelihoods, rolling, answers = (
        [getattr(model, kind)(requests(kind, arguments), disable_tqdm=True) for model in (batched, single)]
        for kind, arguments in (
            ("loglikelihood", PAIRS),
            ("loglikelihood_rolling", [(text,) for text in TEXTS]),
            ("generate_until", QUESTIONS),
        )
    )
    for ours, theirs in zip(*likelihoods, strict=True):
        assert ours[0] == same_scores(theirs[0]) and ours[1] == theirs[1]
    assert rolling[0] == same_scores(rolling[1])
    assert answers[0] == answers[1]
    asked = [*{context or following for context, following in PAIRS}, *TEXTS]  # answers select for themselves
    assert sorted(probed) == sorted(asked)


def test_all_requests_about_a_document_are_scored_under_one_mixture(base: Path, pools: Path) -> None:
    """As Winogrande asks: other contexts, one continuation; and a likelihood without context beside them."""
    model = LoGoLM(str(base), str(pools / "three"), signal="norm", k=2, batch_size=4, device="cpu")
    start, rest = "w3 w4 w5", " w8 w9"
    asked = [(0, f"{start} w30", rest), (0, f"{start} w60 w61", rest), (0, "", rest), (1, "w70 w71", rest)]
    instances = [
        Instance("loglikelihood", {}, (context, following), i, metadata=("task", document, 1))
        for i, (document, context, following) in enumerate(asked)
    ]
    answers = model.loglikelihood(instances, disable_tqdm=True)
    one, other = (model.logo.select(text).mixture for text in (start, "w70 w71"))
    assert one != other and model.logo.select(f"{start} w30").mixture != one  # so that it matters
    for (document, context, following), (total, _) in zip(asked, answers, strict=True):
        [expected] = model.logo.score(context or "<s>", following, [other if document else one])
        if context:  # without one, the special token stands in front once
            assert total == same_scores(expected.log_likelihood)
    alone = model.loglikelihood([Instance("loglikelihood", {}, ("", rest), 0)], disable_tqdm=True)
    assert answers[2] != alone[0]  # that is a document of its own, selected on its continuation


@pytest.mark.parametrize(
    ("pairs", "text"),
    [
        # multiple choice: one context
        ([("Q: two?", " yes"), ("Q: two?", " no")], "Q: two?"),
        # Winogrande: the words before the blank; not the letters that two names share
        ([("it fits as Sarah", " is small"), ("it fits as Sam", " is small")], "it fits as"),
        # the blank comes first: the rest of the sentence
        ([("Ann", " is small"), ("Bob", " is small")], "is small"),
        # acc_mutual_info: likelihoods of the choices alone, too
        ([("Q: two?", " yes"), ("Q: two?", " no"), ("", " yes"), ("", " no")], "Q: two?"),
        # BLiMP: two sentences without a context
        ([("", "The cat purrs."), ("", "The cat purr.")], "The cat"),
        ([("", "Cats purr."), ("", "Dogs bark.")], "Cats purr."),
        ([("  \n", "a"), ("", "a")], "a"),
    ],
)
def test_what_a_document_is_selected_on(pairs: list[tuple[str, str]], text: str) -> None:
    assert common_text(pairs) == text


def test_sampling_is_asked_for_and_honoured(logo_lm: LoGoLM) -> None:
    import torch

    def sampled(seed: int, **options: Any) -> list[str]:
        torch.manual_seed(seed)
        asked = [("w3 w4", {"until": [], "max_gen_toks": 12, **options})]
        found: list[str] = logo_lm.generate_until(requests("generate_until", asked), disable_tqdm=True)
        return found

    hot = {"do_sample": True, "temperature": 3.0, "top_k": 0}
    assert sampled(0, **hot) == sampled(0, **hot) != sampled(1, **hot)
    assert sampled(0) == sampled(1, temperature=0.0) == sampled(2, do_sample=False, temperature=0.7)


# -- what the harness wants to know ---------------------------------------------------------------------------------


def test_results_say_what_they_stand_on(logo_lm: LoGoLM) -> None:
    logo_lm.loglikelihood(requests("loglikelihood", PAIRS[:1]), disable_tqdm=True)
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base_model": ""}, "expected base_model="),
        ({"pretrained": "x"}, "--model_args: unknown setting 'pretrained'"),
        ({"kk": 3}, "--model_args: unknown setting 'kk' .did you mean 'k'"),
        ({"token": "x"}, "token would be written to the results"),
        ({"batch_size": "auto"}, "--batch_size auto: expected a number"),
        ({"batch_size": 0}, "--batch_size 0"),
        ({"signal": "nrom"}, "nrom"),
        ({"probe_context": "poool"}, "probe_context"),
    ],
)
def test_what_cannot_be_used_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        LoGoLM(**{"base_model": "demo", **arguments})


def test_a_continuation_longer_than_the_context_is_refused(logo_lm: LoGoLM) -> None:
    with pytest.raises(UsageError, match="the model reads 128 at once"):
        logo_lm.loglikelihood(requests("loglikelihood", [("w3", f" {LONG}")]), disable_tqdm=True)


# -- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--tasks", "x"], ["run", "--model", "logo", "--tasks", "x"]),
        (["run", "--tasks", "x"], ["run", "--model", "logo", "--tasks", "x"]),
        (["--model", "hf", "--tasks", "x"], ["run", "--model", "hf", "--tasks", "x"]),
        (["--model=hf"], ["run", "--model=hf"]),
        (["run", "-C", "x.yaml"], ["run", "-C", "x.yaml"]),
        (["run", "--help"], ["run", "--help"]),
        (["ls", "tasks"], ["ls", "tasks"]),
        ([], []),
    ],
)
def test_arguments_are_handed_over(given: list[str], expected: list[str]) -> None:
    assert completed(given) == expected


def test_help_is_ours_until_a_command_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["eval", "lm-eval", "--help"]) == 0
    assert "Example: logo eval lm-eval" in " ".join(capsys.readouterr().out.replace("`", "").split())
    assert run(["eval", "lm-eval", "run", "--help"]) == 0
    assert "--include_path" in capsys.readouterr().out


GENERATED = """
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
CHOSEN = """
task: demo_chosen
dataset_path: json
dataset_kwargs:
  data_files:
    test: data/demo/mixed/test.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_target: 0
doc_to_choice: "{{[completion, 'yes', 'no', '7']}}"
metric_list:
  - metric: acc
"""


@pytest.mark.slow
def test_the_harness_and_logo_evaluate_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        line
        for name in ("add_numbers", "antonym", "french", "reverse_word")
        for line in (DEMO_FOLDER / "heldout" / f"{name}.jsonl").read_text().splitlines()[:8]
    ]
    data = tmp_path / "data" / "demo" / "mixed" / "test.jsonl"
    data.parent.mkdir(parents=True)
    data.write_text("\n".join(rows) + "\n")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "generated.yaml").write_text(GENERATED)
    (tmp_path / "tasks" / "chosen.yaml").write_text(CHOSEN)
    monkeypatch.chdir(tmp_path)
    ours = ["eval", "run", "--dataset", "demo.mixed", "--base_model", "demo", "--signal", "calibrated"]
    assert run([*ours, "--max_new_tokens", "12", "--batch_size", "8", "--device", "cpu", "--json"]) == 0
    [summary] = json.loads(capsys.readouterr().out)
    exact = summary["scores"]["em"]["value"]
    asked = ("eval", "lm-eval", "--model_args", "base_model=demo,signal=calibrated", "--include_path", "tasks")
    asked += ("--tasks", "demo_generated,demo_chosen", "--batch_size", "8", "--log_samples")
    assert run([*asked, "--output_path", "out"]) == 0
    said = capsys.readouterr().out
    [results] = [json.loads(path.read_text()) for path in (tmp_path / "out").rglob("results_*.json")]
    assert results["results"]["demo_generated"]["exact_match,answer"] == exact
    assert 0.5 < exact < 1  # so that agreeing means something
    assert results["results"]["demo_chosen"]["acc,none"] > 0.8
    logo = results["config"]["logo"]
    assert logo["settings"]["k"] == 3
    assert logo["selections"] == 2 * len(rows)
    predictions = json.loads((Path(tmp_path / summary["folder"]) / "predictions.json").read_text())
    for task, metric, count in (("chosen", "acc", 32), ("generated", "exact_match", 32)):
        [file] = (tmp_path / "out").rglob(f"samples_demo_{task}_*.jsonl")
        samples = sorted(map(json.loads, file.read_text().splitlines()), key=lambda sample: sample["doc_id"])
        assert [sample["doc_id"] for sample in samples] == list(range(count))
        [found] = [v for name, v in results["results"][f"demo_{task}"].items() if name.startswith(f"{metric},")]
        assert found == pytest.approx(sum(sample[metric] for sample in samples) / count)
    assert [sample["filtered_resps"][0].strip() for sample in samples] == predictions
    assert "demo_generated" in said


def test_errors_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "generated.yaml").write_text(GENERATED)
    monkeypatch.chdir(tmp_path)
    arguments = ["--model_args", "base_model=demo,kk=3", "--tasks", "demo_generated", "--include_path", "tasks"]
    assert run(["eval", "lm-eval", *arguments]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("logo: error: --model_args: unknown setting 'kk' (did you mean 'k'?)")
