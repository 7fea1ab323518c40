"""The field's table of `logo eval study`: methods beside signals, generated answers, interruptions."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as profile
from hypothesis import strategies as st

from dying import dying
from logo import LoGo, UsageError
from logo.baselines import Method, get_method
from logo.baselines.method import Answering, Prepared
from logo.baselines.method import Task as MethodTask
from logo.baselines.registry import register_method
from logo.cli.field_table import field_table, looks_at
from logo.cli.run import run
from logo.demo import heldout
from logo.evaluation.arms import Arms
from logo.evaluation.contest import LEFT_OUT, OWN, UNSEEN, Contest, Lesson
from logo.evaluation.datasets import Dataset, find_datasets
from logo.evaluation.journal import Journal
from logo.evaluation.metrics import first_line, measure
from logo.evaluation.relative import relative
from logo.evaluation.study import journal_of, study, study_so_far
from logo.evaluation.summary import Measured
from test_baselines import SAMPLES, sentences  # noqa: F401 - a fixture
from test_study import Engines, engines, rows, write_rows  # noqa: F401 - fixtures
from tolerances import same_scores

NEW = 4  # tokens of an answer


@pytest.fixture(scope="module")
def methods(sentences: str) -> dict[str, Method]:  # noqa: F811
    samples = {**SAMPLES, "t4": ("w5 w6",)}
    texts = {"embedding_model": sentences, "samples": samples}
    return {
        "loraretriever": get_method("loraretriever", k=2, **texts),
        "loraretriever/selection": get_method("loraretriever", variant="selection", **texts),
        "best-single": get_method("best-single", rows=2),
        "random": get_method("random", k=2),
    }


def asking(tasks: list[Dataset], methods: Mapping[str, Method], **options: Any) -> Contest:
    known = {one.name: MethodTask(one.name, [row.context for row in one.rows], one.rows) for one in tasks}
    return Contest(**{"new_tokens": NEW, "methods": methods, "tasks": known, "metrics": {"t3": "rouge"}, **options})


@pytest.fixture(scope="module")
def done(engines: Engines, rows: Path, methods: dict[str, Method], tmp_path_factory: pytest.TempPathFactory) -> Any:  # noqa: F811
    journal, tasks = tmp_path_factory.mktemp("out") / "journal", find_datasets(rows)
    contest = asking(tasks, methods)
    return study(Arms(engines, contest), tasks, journal, settings={"base_model": "tiny"}, contest=contest)


# -- what is measured -------------------------------------------------------------------------------------------


def answered(logo: LoGo, method: Method, task: Dataset, contest: Contest, kind: str) -> tuple[list[str], list[float]]:
    """What a method says to a task's rows, asked as `logo evaluate` asks it, and what that is worth."""
    answering = Answering(logo, method, contest.tasks[task.name], stop_at_newline=True)
    made = answering.generate([row.context for row in task.rows], max_new_tokens=NEW, batch_size=3)
    texts = [first_line(one.text) for one in made]
    worth = [measure(kind, text, row.completion) for text, row in zip(texts, task.rows, strict=True)]  # type: ignore[arg-type]
    return texts, [one["rouge-L"] if isinstance(one, dict) else one for one in worth]


@pytest.mark.parametrize("label", ["loraretriever", "loraretriever/selection", "best-single", "random"])
def test_methods_answer_as_they_do_everywhere(
    label: str,
    done: Any,
    engines: Engines,  # noqa: F811
    rows: Path,  # noqa: F811
    methods: dict[str, Method],
) -> None:
    """With every adapter there, and, without a row's own, as an engine that never had it."""
    logo, tasks = engines["norm"], find_datasets(rows)
    contest, method = asking(tasks, methods), methods[label]
    for task in tasks:
        kind = "rouge" if task.name == "t3" else "em"
        texts, worth = answered(logo, method, task, contest, kind)
        mine = [row for row in done.rows if row.task == task.name]
        assert [row.predictions["answers"]["methods"][label] for row in mine] == texts
        assert [row.answers["methods"][label]["generated"] for row in mine] == same_scores(worth)
        if task.name not in logo.names:
            continue
        smaller = logo.pool.subset([name for name in logo.names if name != task.name])
        without = LoGo(logo.model, logo.tokenizer, smaller, settings=logo.settings)
        other = method
        if label.startswith("loraretriever"):
            other = replace(method, samples={name: some for name, some in method.samples.items() if name != task.name})  # type: ignore[attr-defined, call-arg]
        texts, _ = answered(without, other, task, contest, kind)
        assert [row.predictions["left_out"]["methods"][label] for row in mine] == texts


def test_signals_and_mixtures_answer_too(done: Any, engines: Engines, rows: Path) -> None:  # noqa: F811
    logo = engines["entropy"]
    for row in done.rows:
        prompt = next(task for task in find_datasets(rows) if task.name == row.task).rows[row.index].context
        options: dict[str, Any] = {"max_new_tokens": NEW, "stop_at_newline": True}
        said = row.predictions["answers"]
        assert said["signals"]["entropy"] == first_line(logo.generate(prompt, **options).text)
        assert said["mixtures"]["base"] == first_line(logo.generate(prompt, adapters={}, **options).text)
        if row.task == "other":
            assert "oracle" not in said["mixtures"] and row.left_out is None
            continue
        alone = logo.generate(prompt, adapters={row.task: 1.0}, **options)
        assert said["mixtures"]["oracle"] == first_line(alone.text)
        others = logo.generate(prompt, candidates=[name for name in logo.names if name != row.task], **options)
        assert row.predictions["left_out"]["signals"]["entropy"] == first_line(others.text)


def test_what_the_report_has_more(done: Any, methods: dict[str, Method]) -> None:
    report = done.report
    assert list(report["methods"]) == list(report["unseen"]["methods"]) == list(methods)
    assert set(report["seconds"]) == {"loading", "select", "score", "generate"}
    assert report["settings"]["generate"] == NEW and report["settings"]["methods"]["random"]["k"] == 2
    lessons = {(one["method"], one["of"], one["about"]) for one in report["learnt"]}
    assert lessons == {
        *(("best-single", task, about) for task in ("t1", "t3") for about in (OWN, LEFT_OUT)),
        ("best-single", "other", OWN),
    }
    found = report["relative"]
    assert found["metric"] == "generated" and found["own"]["mixtures"]["oracle"]["of_oracle"] == 1.0
    assert "oracle" not in found["left_out"]["mixtures"] and "oracle" not in found["unseen"]["mixtures"]
    assert json.loads(json.dumps(report, allow_nan=False)) == report


@pytest.mark.parametrize("protocols", [(OWN,), (LEFT_OUT,), (UNSEEN,), (OWN, UNSEEN)])
def test_protocols(protocols: tuple[str, ...], done: Any, engines: Engines, rows: Path, tmp_path: Path) -> None:  # noqa: F811
    tasks = find_datasets(rows)
    contest = asking(tasks, {"random": get_method("random", k=2)}, protocols=protocols)
    found = study(Arms(engines, contest), tasks, tmp_path / "journal", settings={}, contest=contest).report
    assert set(found["tasks"]) == ({"other"} if UNSEEN in protocols else set()) | (
        {"t1", "t3"} if {OWN, LEFT_OUT} & set(protocols) else set()
    )
    for protocol, part in ((OWN, "own"), (LEFT_OUT, "left_out"), (UNSEEN, "unseen")):
        table = found["relative"][part]
        if part == "own" and protocols == (LEFT_OUT,):  # the oracle is what the others are compared with
            assert set(table) == {"tasks", "without_oracle", "mixtures"} and set(table["mixtures"]) == {"oracle"}
            continue
        assert (table is not None) == (protocol in protocols)
        if table is not None:
            for name, entry in table["signals"].items():
                assert entry["value"] == same_scores(done.report["relative"][part]["signals"][name]["value"])
            assert "random" in table["methods"]


def test_what_no_contest_can_be() -> None:
    with pytest.raises(UsageError, match=r"protocol 'owm' .did you mean 'own'\?.; known: own, left-out, unseen"):
        Contest(protocols=("owm",))
    with pytest.raises(UsageError, match="protocol: expected one or more of own, left-out, unseen, found none"):
        Contest(protocols=())
    with pytest.raises(UsageError, match="generate 0: expected 1 new token or more"):
        Contest(new_tokens=0)


@pytest.mark.usefixtures("plugins_forgotten")
def test_the_signal_that_a_plugins_method_gets_is_recorded(
    engines: Engines,  # noqa: F811
    rows: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    @register_method
    @dataclass(frozen=True, kw_only=True)
    class Chosen(Method):
        """The engine's choice."""

        name = "chosen"

        def prepare(self, logo: LoGo, task: MethodTask) -> Prepared:
            return Prepared(lambda prompts, size: logo.select(list(prompts), candidates=task.candidates(logo)))

    tasks, file = find_datasets(rows, "t3"), tmp_path / "study.json"

    def run_study(given: Engines, method: str, **how: Any) -> dict[str, Any]:
        contest = asking(tasks, {method: get_method(method)}, new_tokens=None)
        return study(Arms(given, contest), tasks, tmp_path / method, settings={}, contest=contest, **how).report

    other_way_round = dict(reversed(engines.items()))
    report = run_study(engines, "chosen")
    assert report["methods"]["chosen"]["nll"] == same_scores(report["signals"]["norm"]["nll"])
    inputs = [one.cells[-1].text for one in field_table(report).rows if one.cells[-1] is not None]
    assert "not known (a plugin; signal norm)" in inputs
    with pytest.raises(UsageError, match=r'methods_signal is "norm", not "entropy"'):
        run_study(other_way_round, "chosen")
    (tmp_path / "chosen").unlink()
    file.write_text(json.dumps(report))
    with pytest.raises(UsageError, match=r'another study \(methods_signal is "norm", not "entropy"'):
        run_study(other_way_round, "chosen", finished=file)
    report = run_study(engines, "uniform")  # reads no signal
    assert "methods_signal" not in {**report["run"], **report["settings"]}
    run_study(other_way_round, "uniform")


# -- numbers ----------------------------------------------------------------------------------------------------

Worth = list[list[tuple[float, float]]]  # by task and row: the method's, the oracle's


def of_tasks(worth: Worth) -> list[Measured]:
    def row(task: int, index: int, method: float, oracle: float) -> Measured:
        named = {"signals": {"norm": {"generated": method}}, "mixtures": {"oracle": {"generated": oracle}}}
        return Measured(f"t{task:02d}", index, named, {"signals": {"norm": {"generated": method / 2}}})

    return [row(t, i, *pair) for t, pairs in enumerate(worth) for i, pair in enumerate(pairs)]


@given(
    worth=st.lists(
        st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.0, 1.0])), min_size=1, max_size=4),
        min_size=1,
        max_size=14,
    ),
    seed=st.integers(0, 3),
)
@profile(max_examples=60, deadline=None)
def test_relative_is_the_mean_of_ratios(worth: Worth, seed: int) -> None:
    names = [f"t{i:02d}" for i in range(len(worth))]
    found = relative(of_tasks(worth), names, generated=True, seed=seed)
    assert found == relative(of_tasks(worth), names, generated=True, seed=seed) and found["unseen"] is None
    means = [tuple(np.mean([pair[side] for pair in pairs]) for side in (0, 1)) for pairs in worth]
    ratios = [method / oracle for method, oracle in means if oracle]
    own, gone = found["own"]["signals"]["norm"], found["left_out"]["signals"]["norm"]
    assert found["own"]["without_oracle"] == [n for n, (_, oracle) in zip(names, means, strict=True) if not oracle]
    assert own["value"] == pytest.approx(np.mean([method for method, _ in means]))
    if not ratios:
        assert own["of_oracle"] is None and own["of_oracle_pooled"] is None
        return
    assert own["of_oracle"] == pytest.approx(np.mean(ratios)) == pytest.approx(2 * gone["of_oracle"])
    pooled = sum(method for method, _ in means) / sum(oracle for _, oracle in means)
    assert own["of_oracle_pooled"] == pytest.approx(pooled)
    for key in ("of_oracle", "of_oracle_pooled"):
        ends = own["intervals"][key]
        assert ends is None or (ends[0] <= own[key] + 1e-9 and own[key] <= ends[1] + 1e-9)
    if len(ratios) < 10:
        assert own["intervals"]["of_oracle"] is None


def test_intervals_are_of_tasks_and_paired() -> None:
    """As wide as statistics says of the spread between tasks; the oracle itself has none."""
    random_ = np.random.default_rng(0)
    oracle = random_.uniform(0.5, 1.0, 60)
    worth = [[(float(o * r), float(o))] for o, r in zip(oracle, random_.normal(0.8, 0.1, 60), strict=True)]
    found = relative(of_tasks(worth), [f"t{i:02d}" for i in range(60)], generated=True)["own"]
    low, high = found["signals"]["norm"]["intervals"]["of_oracle"]
    assert high - low == pytest.approx(2 * 1.96 * 0.1 / 60**0.5, rel=0.25)
    assert found["mixtures"]["oracle"]["intervals"] == {"of_oracle": None, "of_oracle_pooled": None}


def test_draws_without_a_ratio_do_not_count() -> None:
    """The oracle answers one task of twelve: a third of the draws do not have this task."""
    worth = [[(0.25, 1.0)], *[[(0.0, 0.0)]] * 11]
    names = [f"t{i:02d}" for i in range(12)]
    own = relative(of_tasks(worth), names, generated=True)["own"]["signals"]["norm"]
    assert own["of_oracle_pooled"] == 0.25 and own["intervals"]["of_oracle_pooled"] is None  # the same in every draw
    worth[1] = [(0.5, 1.0)]
    own = relative(of_tasks(worth), names, generated=True)["own"]["signals"]["norm"]
    assert own["intervals"]["of_oracle_pooled"] == [0.25, 0.5]


def test_unseen_is_held_against_uniform() -> None:
    def row(task: int, nll: float, uniform: float) -> Measured:
        mixtures = {"uniform": {"exact_match": 0.0, "nll": uniform}}
        return Measured(
            f"u{task}", 0, {"signals": {"norm": {"exact_match": 1.0, "nll": nll}}, "mixtures": mixtures}, None
        )

    numbers = [(2.0 + 0.01 * i, 2.5 + 0.02 * i) for i in range(12)]
    found = relative([row(i, *pair) for i, pair in enumerate(numbers)], ["t0"], generated=False)
    assert found["own"] is None and found["metric"] == "exact_match"
    entry = found["unseen"]["signals"]["norm"]
    assert entry["nll_over_uniform"] == pytest.approx(np.mean([a - b for a, b in numbers]))
    assert entry["intervals"]["nll_over_uniform"][1] < 0 < entry["value_over_uniform"] == entry["value"]


# -- interruptions ----------------------------------------------------------------------------------------------


def test_nothing_is_learnt_or_answered_twice(
    engines: Engines,  # noqa: F811
    rows: Path,  # noqa: F811
    methods: dict[str, Method],
    done: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tasks, asked, learnt = find_datasets(rows), list[str](), list[Lesson]()
    contest = asking(tasks, methods)
    generate, learn = LoGo.generate, Arms.learnt

    def spy(self: LoGo, prompts: Any, **options: Any) -> Any:
        asked.append(prompts[0])
        return generate(self, prompts, **options)

    monkeypatch.setattr(LoGo, "generate", spy)
    monkeypatch.setattr(Arms, "learnt", lambda self, lesson: learnt.append(lesson) or learn(self, lesson))
    reports = []
    for after in (2, 4, 5, 4, None):  # lessons, or rows once all is learnt
        left = [after]

        def stop(what: object, left: list[int | None] = left) -> None:
            if left[0] is not None:
                left[0] -= 1
                if left[0] == 0:
                    raise KeyboardInterrupt

        try:
            found = study(
                Arms(engines, contest),
                tasks,
                tmp_path / "journal",
                settings={"base_model": "tiny"},
                contest=contest,
                on_progress=stop if len(learnt) == 5 else None,
                on_lesson=stop if len(learnt) < 5 else None,
            )
            reports.append(found.report)
        except KeyboardInterrupt:
            assert after is not None
    assert len(learnt) == len(set(learnt)) == 5
    assert sorted(asked) == sorted(row.context for task in tasks for row in task.rows)
    [again] = reports
    assert json.dumps(again | {"seconds": 0}) == json.dumps(done.report | {"seconds": 0})


IMPORTS = """
import transformers.models.llama.modeling_llama
import logo.cli.app, logo.evaluation.journal, logo.evaluation.arms
from logo import LoGo
"""
STEPS = """
    LoGo.score_pairs, LoGo.generate = counted(LoGo.score_pairs), counted(LoGo.generate)
"""


def study_command(root: Path, out: Path) -> list[str]:
    engine = ["--base-model", "demo", "-k", "3", "--device", "cpu", "--signals", "norm,calibrated", "--generate", "8"]
    method = ["--method", "logo,lorahub,random,uniform", "--lorahub-budget", "5", "--shots", "2"]
    return [
        "eval",
        "study",
        *engine,
        *method,
        "--rows",
        str(root / "rows"),
        "--train-rows",
        str(root / "train"),
        "--save",
        str(out),
    ]


@pytest.fixture(scope="module")
def demo_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rows")
    for folder, some in (("rows", slice(0, 2)), ("train", slice(8, 12))):
        for name in ("antonym", "plural"):
            found = heldout()[name][some]
            write_rows(root / folder, name, [(row["context"], row["completion"]) for row in found])
    return root


@pytest.fixture(scope="module")
def whole(demo_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, Any], int, Any]]:
    out = tmp_path_factory.mktemp("whole") / "study.json"
    with dying("--save", IMPORTS, STEPS) as run_until:
        assert run_until(-1, study_command(demo_rows, out), out.parent / "steps") == 0
        yield json.loads(out.read_text()), int((out.parent / "steps").read_text()), run_until


@pytest.mark.slow
@pytest.mark.parametrize("moment", [2])
def test_kill_9_at_any_moment(moment: int, demo_rows: Path, whole: Any, tmp_path: Path) -> None:
    report, steps, run_until = whole
    at = random.Random(moment).randrange(moment * steps // 5, (moment + 1) * steps // 5)
    out = tmp_path / "study.json"
    command = study_command(demo_rows, out)
    assert run_until(at, command, tmp_path / "steps") == -signal.SIGKILL
    assert run(command) == 0
    own = {"seconds": 0, "command": "with its own --save"}
    assert json.loads(out.read_text()) | own == report | own
    assert not journal_of(out).exists()


# -- the command ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command(demo_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "study.json"
    assert run(study_command(demo_rows, out)) == 0
    said = capsys.readouterr()
    for words in (
        "own in pool",
        "own removed",
        "mean of",
        "2 labelled rows",
    ):
        assert words in said.out
    report = json.loads(out.read_text())
    assert list(report["methods"]) == ["lorahub", "random"] and report["unseen"] is None
    assert report["relative"]["own"]["signals"]["calibrated"]["of_oracle"] > 0.5


def test_a_study_that_has_only_learnt_says_so(tmp_path: Path) -> None:
    with Journal(tmp_path / "journal", {"pool": {}}) as journal:
        for task in ("t1", "t3"):
            journal.append({"lesson": ["lorahub", task, OWN], "learnt": {}})
    with pytest.raises(UsageError, match="expected measured rows of an unfinished study, found none, but 2 lessons"):
        study_so_far(tmp_path / "journal")


@pytest.mark.slow
def test_what_there_is_so_far(
    demo_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    out = tmp_path / "study.json"
    command = study_command(demo_rows, out)
    assert run([*command, "--so-far"]) == 2
    assert "expected measured rows of an unfinished study, found none" in capsys.readouterr().err
    measured, calls = Arms.measured, []

    def killed(self: Arms, *arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measured(self, *arguments)

    monkeypatch.setattr(Arms, "measured", killed)
    assert run(command) == 130
    assert [arguments[0] for arguments in calls[:2]] == ["antonym", "plural"]  # the first row of each
    before = journal_of(out).read_bytes()
    capsys.readouterr()
    assert run([*command, "--so-far"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "So far: 2 rows." in said and "lorahub" in said
    assert journal_of(out).read_bytes() == before and not out.exists()


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (["--method", "lorahup"], 2, "unknown method 'lorahup' (did you mean 'lorahub'?)"),
        (["--method", "loraretriever/all"], 2, "loraretriever/VARIANT with one of mixture, selection"),
        (["--method", "random/3"], 2, "method 'random/3': expected a name"),
        (["--method", "lorahub"], 2, "the method learns from training rows; name a folder"),
        (["--method", "lorahub", "--train-rows", "nowhere"], 1, "expected the file nowhere/antonym.jsonl, found none"),
        (["--method", "loraretriever"], 2, "expected --adapter-samples DIR"),
        (["--protocol", "own,unsen"], 2, "protocol 'unsen' (did you mean 'unseen'?)"),
        (["--protocol", ","], 2, "protocol: expected one or more"),
        (["--protocol", "unseen"], 2, "expected rows that it asks for, found none: 2 of 2 tasks"),
    ],
)
def test_what_goes_wrong_is_one_line(
    change: list[str], code: int, message: str, demo_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "eval",
        "study",
        "--base-model",
        "demo",
        "--rows",
        str(demo_rows / "rows"),
        "--signals",
        "norm",
        "--device",
        "cpu",
    ]
    assert run([*command, "--save", str(tmp_path / "study.json"), *change]) == code
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("logo: error:")]
    assert len(errors) == 1 and message in errors[0]


def test_a_row_of_the_table_says_which_encoder_it_was() -> None:
    options = {"embedding_model": "/somewhere/all-MiniLM-L6-v2", "samples": {"t0": ("w3",)}}
    method = get_method("loraretriever", **options).as_dict()
    assert looks_at("methods", "loraretriever/selection", method) == (
        "prompt, samples per adapter; encoder all-MiniLM-L6-v2, not its own"
    )
    own = get_method("loraretriever", embedding_model="Styxxxx/lora_retriever").as_dict()
    assert looks_at("methods", "x", own) == "prompt, samples per adapter; encoder lora_retriever"
    assert looks_at("signals", "norm", {}) == "prompt, weights"
    assert looks_at("methods", "mine", {"method": "mine"}) == "not known (a plugin)"
    assert looks_at("methods", "mine", {"method": "mine"}, "norm") == "not known (a plugin; signal norm)"


def test_the_caption_speaks_of_intervals_where_there_are_some() -> None:
    names = [f"t{i:02d}" for i in range(12)]
    worth = [[(i / 12, 1.0)] for i in range(12)]
    captions = []
    for tasks in (3, 12):
        found = relative(of_tasks(worth[:tasks]), names, generated=True)
        captions.append(field_table({"relative": found, "settings": {"generate": 8}}).note)
    assert captions == [
        "In percent, answers of up to 8 tokens.",
        "In percent, answers of up to 8 tokens; 95 % intervals over tasks below.",
    ]
