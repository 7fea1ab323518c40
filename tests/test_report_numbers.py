"""The report's numbers: means and marks, one run against another, weights, similarity, ranks."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from logo.errors import DataError
from logo.evaluation.comparison import compare
from logo.evaluation.datasets import OFFICIAL
from logo.evaluation.intervals import Interval, proportion
from logo.evaluation.paired import ALPHA, TESTS
from logo.evaluation.report import adapters, analyse, as_latex, page, summary
from logo.evaluation.report.numbers import Cell, dataset_lines, group_lines, marked, overall
from logo.evaluation.report.published import CAVEAT, read_published, shipped
from logo.evaluation.report.versus import Mark, Pairing, shared_rows
from logo.evaluation.runs import Run, read_run, read_runs
from logo.evaluation.tables import p_value
from report_runs import write_result

ROUGE = ("rouge-1", "rouge-2", "rouge-L")
FRACTION = st.floats(0, 1, width=32)
CELL = st.builds(lambda value, rows: Cell(value, Interval(0.0, 1.0), rows), FRACTION, st.integers(1, 2))


def rows_of(*prompts: str) -> list[dict[str, str]]:
    return [{"context": prompt, "completion": "gold"} for prompt in prompts]


@given(cells=st.lists(st.none() | CELL, max_size=6))
def test_only_cells_that_stand_on_as_much_as_any_are_judged(cells: list[Cell | None]) -> None:
    most = max((cell.rows for cell in cells if cell), default=0)

    def marks(values: Sequence[float | None]) -> list[Mark]:
        assert list(values) == [cell.value if cell and cell.rows == most else None for cell in cells]
        return ["" if value is None else "tied" for value in values]

    found = marked(cells, marks)
    assert [cell is None for cell in found] == [cell is None for cell in cells]
    assert all(cell.complete == (cell.rows == most) == (cell.mark == "tied") for cell in found if cell)
    assert not any(cell.mark for cell in marked(cells) if cell)


@given(
    columns=st.lists(st.lists(st.integers(0, 1), min_size=24, max_size=24), min_size=1, max_size=4),
    certain=st.sampled_from([[], [1] * 24, [0] * 24]),
)
@settings(max_examples=25, deadline=None)
def test_bold_is_who_is_significantly_better_than_every_other(
    columns: list[list[int]], certain: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    columns = [*columns, *([certain] if certain else [])]
    root = tmp_path_factory.mktemp("marks")
    for number, values in enumerate(columns):
        write_result(root / f"run{number}" / "d.x", values, rows=rows_of(*map(str, range(24))))
    pairing = Pairing(tuple(read_runs([root])))
    [line] = dataset_lines(pairing)
    marks = [cell.mark for cell in line.cells if cell]
    means = [float(np.mean(values)) for values in columns]
    if len(set(means)) < 2:
        assert set(marks) == {""}  # nothing is better than anything
        return
    top = means.index(max(means))
    ps = {
        n: binomtest(
            wins(columns[top], columns[n]), wins(columns[top], columns[n]) + wins(columns[n], columns[top])
        ).pvalue
        if columns[n] != columns[top]
        else 1.0
        for n in range(len(columns))
        if n != top
    }
    worse = {n for n, p in zip(ps, holm_by_hand(list(ps.values())), strict=True) if p < ALPHA}
    tied = set(ps) - worse
    assert marks[top] == ("tied" if tied else "best")
    assert {n for n, mark in enumerate(marks) if mark == "tied"} == (tied | {top} if tied else set())
    assert marks.count("best") <= 1


def wins(a: list[int], b: list[int]) -> int:
    return sum(x > y for x, y in zip(a, b, strict=True))


def holm_by_hand(ps: list[float]) -> list[float]:
    ranked = sorted(range(len(ps)), key=lambda n: ps[n])
    found, least = [0.0] * len(ps), 0.0
    for place, n in enumerate(ranked):
        least = max(least, min(1.0, ps[n] * (len(ps) - place)))
        found[n] = least
    return found


def test_runs_that_were_asked_other_things_are_never_called_worse(tmp_path: Path) -> None:
    write_result(tmp_path / "a" / "d.x", [1] * 30, rows=rows_of(*map(str, range(30))))
    write_result(tmp_path / "b" / "d.x", [0] * 30, rows=rows_of(*map(str, range(1, 31))))
    [line] = dataset_lines(Pairing(tuple(read_runs([tmp_path]))))
    assert [cell.mark for cell in line.cells if cell] == ["tied", "tied"]


def test_groups_and_intervals(tmp_path: Path) -> None:
    """Datasets count alike in a group; a group of one has that dataset's interval."""
    rouge = [{"rouge-1": 0.5, "rouge-2": 0.25, "rouge-L": 0.375}] * 2
    old = {"official_intervals": {"em": [1.0, 1.0]}}  # as a bootstrap has it
    write_result(tmp_path / "a" / "wmt14.fr-en", [0.5] * 4)
    write_result(tmp_path / "a" / "wmt16.de-en", [0.25])
    write_result(tmp_path / "a" / "gem.dart", rouge)
    write_result(tmp_path / "a" / "bbh.navigate", [1, 1], metrics=old)
    pairing = Pairing(tuple(read_runs([tmp_path])))
    groups = {(line.group, line.metric): line.cells[0] for line in group_lines(pairing)}
    translation = groups["Translation", "bleu"]
    assert translation is not None and translation.value == 0.375
    assert (translation.datasets, translation.rows, translation.interval) == (2, 5, None)
    text = groups["Struct-to-Text", "rouge-2"]
    assert text is not None and (text.value, text.interval) == (0.25, None)
    [cell] = overall(pairing).cells
    assert cell is not None and cell.value == pytest.approx((1 + 0.5 + 0.25 + 0.375) / 4)
    cells = {(line.dataset, line.metric): line.cells[0] for line in dataset_lines(pairing)}
    two_of_two, group = cells["bbh.navigate", "em"], groups["BIG-Bench Hard", "em"]
    assert two_of_two is not None and group is not None
    assert two_of_two.interval == group.interval == proportion(2, 2)


@pytest.mark.parametrize(
    ("folder", "dataset", "shown"),
    [
        ("Llama-3.1-8B_selection_norm_n_20_seed_0", "bbh.boolean_expressions", True),
        ("Llama-3.1-8B_selection_norm_n_20_seed_0_mine", "bbh.boolean_expressions", True),
        ("Llama-3.1-8B_selection_entropy_n_20_seed_0", "bbh.boolean_expressions", False),
        ("Llama-3.1-8B_selection_norm_n_3_seed_0", "bbh.boolean_expressions", False),
        ("Qwen2.5-7B_selection_norm_n_20_seed_0", "bbh.boolean_expressions", False),
        ("Llama-3.1-8B_method_uniform_n_20_seed_0", "bbh.boolean_expressions", False),
        ("Llama-3.1-8B_selection_norm_n_20_seed_0", "bbh.navigate", False),
    ],
)
def test_published_numbers_stand_beside_the_same_experiment(
    tmp_path: Path, folder: str, dataset: str, shown: bool
) -> None:
    write_result(tmp_path / folder / dataset, [1, 0])
    analysis = analyse(read_runs([tmp_path]))
    [line] = analysis.lines
    [cell] = line.cells
    assert cell is not None and (cell.published is not None) == shown
    for text in (page(analysis), as_latex(analysis)):
        assert ("published 71.33" in text) == ("README of the authors" in text) == shown
    [written] = summary(analysis)["datasets"]
    [told] = written["runs"].values()
    assert (told["published"] is not None and told["published"]["value"] == 0.7133) == shown
    assert shown or told["published"] is None


OFFICIAL_RUN = {"preset": "official", "limit": None, "adapters": None, "weighting": None, "rows": None}


@pytest.mark.parametrize(
    ("change", "rows", "shown"),
    [
        ({}, 2, True),
        ({"preset": None}, 2, False),
        ({"limit": 2}, 2, False),
        ({"rows": "mine"}, 2, False),
        ({"adapters": "mine"}, 2, False),
        ({"weighting": "softmax"}, 2, False),
        ({"keep_mass": 0.9}, 2, False),
        ({"max_new_tokens": 8}, 2, False),
        ({"probe_context": "base"}, 2, False),
        ({"dtype": "bfloat16"}, 2, False),
        ({"probe_points": 4}, 2, False),
        ({"unscorable": "skip"}, 2, False),
        ({"on_bad_adapter": "skip"}, 2, False),
        ({"probe_context": "carry", "dtype": "float32", "unscorable": "error", "on_bad_adapter": "error"}, 2, True),
        ({"max_new_tokens": 256}, 2, True),
        ({}, 1, False),  # fewer than the other run of the report
    ],
)
def test_published_numbers_need_a_run_that_does_what_the_authors_did(
    change: dict[str, object], rows: int, shown: bool, tmp_path: Path
) -> None:
    folder = tmp_path / "Llama-3.1-8B_selection_norm_n_20_seed_0" / "bbh.boolean_expressions"
    write_result(folder, [1] * rows, run_json={"options": OFFICIAL_RUN | change})
    write_result(tmp_path / "Llama-3.1-8B_selection_norm_n_3_seed_0" / folder.name, [1, 0])
    analysis = analyse(read_runs([tmp_path]))
    [line] = analysis.lines
    assert [cell.published is not None for cell in line.cells if cell] == [shown, False]
    assert (CAVEAT in page(analysis)) == (CAVEAT in as_latex(analysis)) == shown


def test_datasets_that_are_judged_by_different_measures(tmp_path: Path) -> None:
    """They are named, and no comparison of the runs holds them."""
    for name, metric, values in (("a", "em_multi", [1, 1]), ("b", "em_first", [0, 1])):
        write_result(tmp_path / name / "nq.open", values, run_json={"metric": metric})
        write_result(tmp_path / name / "bbh.navigate", [1, 1])
    analysis = analyse(read_runs([tmp_path]))
    assert analysis.unlike == ("nq.open",) == tuple(summary(analysis)["unlike"])
    assert [(cell.value, cell.datasets) for cell in analysis.overall.cells if cell] == [(1.0, 1)] * 2
    [pair] = analysis.versus
    assert sum(asdict(pair.datasets).values()) == 1
    for text in (page(analysis), as_latex(analysis)):
        assert "left out of the mean over all datasets" in text and "accuracy (first gold text)" in text


def test_published_numbers_say_where_they_are_from() -> None:
    assert shipped()
    for number in shipped():
        assert 0 <= number.value <= 1 and number.source and number.url.startswith("https://")
        assert number.dataset in OFFICIAL and number.metric in ("em", "bleu", "rouge-1", "rouge-2", "rouge-L")


def test_a_users_own_published_numbers(tmp_path: Path) -> None:
    write_result(tmp_path / "m_selection_norm_n_2_seed_0" / "gem.dart", [dict.fromkeys(ROUGE, 0.5)])
    number = asdict(shipped()[0]) | {
        "base_model": "m",
        "dataset": "gem.dart",
        "k": 2,
        "metric": "rouge-2",
        "value": 0.25,
    }
    file = tmp_path / "numbers.json"
    file.write_text(json.dumps([number]))
    found = analyse(read_runs([tmp_path]), published=read_published(file))
    told = {line.metric: cell.published for line in found.lines for cell in line.cells if cell}
    assert told["rouge-1"] is told["rouge-L"] is None and told["rouge-2"] is not None
    assert told["rouge-2"].value == 0.25 and "published 25.00" in page(found)
    for wrong in ("{}", "[1]", "[", json.dumps([number | {"value": 71.33}]), json.dumps([number | {"k": "2"}]), "[{}]"):
        file.write_text(wrong)
        with pytest.raises(
            DataError, match=r"numbers\.json': expected a JSON list of objects with base_model, dataset"
        ):
            read_published(file)
    file.write_text(json.dumps([number | {"metric": "accuracy"}]))
    with pytest.raises(DataError, match="metric 'accuracy', which is none of em, em_first, bleu, rouge-1"):
        read_published(file)
    with pytest.raises(DataError, match="found none"):
        read_published(tmp_path / "absent.json")


def two_runs(root: Path, a: list[int], b: list[int], prompts_b: list[str] | None = None) -> list[Run]:
    prompts = [f"prompt {i}" for i in range(len(a))]
    write_result(root / "a" / "d.x", a, rows=rows_of(*prompts))
    write_result(root / "b" / "d.x", b, rows=rows_of(*(prompts_b or prompts)))
    return read_runs([root])


@given(pairs=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=12))
@settings(max_examples=30, deadline=None)
def test_one_run_against_another(pairs: list[tuple[int, int]], tmp_path_factory: pytest.TempPathFactory) -> None:
    a, b = ([pair[run] for pair in pairs] for run in (0, 1))
    [found] = Pairing(tuple(two_runs(tmp_path_factory.mktemp("versus"), a, b))).versus()
    wins, losses = sum(y > x for x, y in pairs), sum(y < x for x, y in pairs)
    assert (found.record.wins, found.record.losses, found.record.ties) == (
        wins,
        losses,
        len(a) - wins - losses,
    )
    assert found.difference.value == pytest.approx(np.mean(b) - np.mean(a))
    ends = found.difference.interval
    assert ends is not None and ends.low <= found.difference.value <= ends.high
    assert found.significance.test == "mcnemar" and found.p_holm == found.significance.p
    assert found.datasets.wins + found.datasets.losses + found.datasets.ties == 1
    assert found.datasets.wins == (wins > losses)


@pytest.mark.slow
@given(
    columns=st.dictionaries(
        st.sampled_from(["bbh.a", "bbh.b", "bbh.snarks", "mine/x", "mine/y.z", "anli.r1"]),
        st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=6, max_size=9),
        min_size=1,
        max_size=4,
    ),
    seed=st.integers(0, 3),
)
@settings(max_examples=25, deadline=None)
def test_two_runs_have_one_p_value_wherever_it_is_shown(
    columns: dict[str, list[tuple[int, int]]], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """`compare`'s line for all datasets, and the report's pair of runs and its line for everything."""
    root = tmp_path_factory.mktemp("one")
    for side in (0, 1):
        for name, pairs in columns.items():
            rows = rows_of(*(f"{name} {i}" for i in range(len(pairs))))
            said = {"dataset": {"name": name}, "options": {}}
            write_result(root / "ab"[side] / name, [pair[side] for pair in pairs], rows=rows, run_json=said)
    compared = compare(read_run(root / "a"), read_run(root / "b"), seed=seed)
    line = (compared.groups or compared.datasets)[-1]
    [pair] = Pairing(tuple(read_runs([root])), seed).versus()
    assert (pair.significance, pair.difference) == (line.significance, line.difference)
    assert pair.significance.test == ("mcnemar" if len(columns) == 1 else "randomisation")
    told = summary(analyse(read_runs([root]), seed=seed))["versus"][0]
    assert (told["p"], told["test"]) == (line.significance.p, line.significance.test)
    shown = unescape(page(analyse(read_runs([root]), seed=seed)))
    assert p_value(line.significance.p) in shown and f"two-sided, by {TESTS[line.significance.test]}" in shown


def test_only_shared_instances_are_compared(tmp_path: Path) -> None:
    """Another order, other rows, the same row twice: matched by what was asked, not by place."""
    runs = two_runs(tmp_path, [1, 0, 0], [0, 1, 1], ["prompt 2", "prompt 0", "elsewhere"])
    first, second = (run.results["d.x"] for run in runs)
    assert shared_rows(first, second) == ([0, 2], [1, 0])
    [found] = Pairing(tuple(runs)).versus()
    assert (found.record.wins, found.record.losses, found.record.ties) == (0, 0, 2)
    twice = two_runs(tmp_path / "twice", [1, 0], [0, 1], ["prompt 0", "prompt 0"])
    assert shared_rows(*(run.results["d.x"] for run in twice)) == ([0], [0])


def test_without_prompts_places_count_if_the_files_agree(tmp_path: Path) -> None:
    def digest(text: str) -> dict[str, object]:
        return {"dataset": {"sha256": text}}

    write_result(tmp_path / "a" / "d.x", [1, 0], run_json=digest("1"))
    write_result(tmp_path / "b" / "d.x", [0, 0], run_json=digest("1"))
    write_result(tmp_path / "c" / "d.x", [0, 0], run_json=digest("2"))
    write_result(tmp_path / "d" / "d.x", [0, 0, 0], run_json=digest("1"))
    a, b, c, d = (run.results["d.x"] for run in read_runs([tmp_path]))
    assert shared_rows(a, b) == ([0, 1], [0, 1])
    assert shared_rows(a, c) == ([], []) and shared_rows(a, d) == ([], [])


def test_mean_weights_leave_failed_rows_out(tmp_path: Path) -> None:
    write_result(
        tmp_path / "r" / "d.x",
        [1, 0, 1],
        selected=[["b", "a"], [], ["b"]],
        weights=[[0.75, 0.25], [], [0.7]],
        scores={"norm": [[1.0, 3.0, 0.5], [None] * 3, [1.0, 2.0, 0.5]]},
        run_json={"score_columns": ["a", "b", "never"], "pool": {"a": "", "b": "", "never": ""}},
        metrics={"errors": [{"index": 1, "message": "oops"}]},
    )
    [run] = read_runs([tmp_path])
    found = adapters.weights(run)
    assert found is not None and found.left_out == 1
    assert dict(zip(found.adapters, found.values[0], strict=True)) == pytest.approx({"b": 0.725, "a": 0.125})
    chosen = adapters.selected(run)
    assert chosen is not None and chosen.heaviest == pytest.approx(0.725)
    assert chosen.effective == pytest.approx((1 / (0.75**2 + 0.25**2) + 1) / 2)
    spread = adapters.spread(run)
    assert spread is not None and spread.adapters == ("b", "a", "never")
    assert spread.values[0].tolist() == np.quantile([3.0, 2.0], adapters.QUANTILES).tolist()


def test_the_right_adapter_is_named_by_the_row_or_the_dataset(tmp_path: Path) -> None:
    rows = [{"context": "p", "completion": "g", "adapter": "x"}, *rows_of("q", "r")]
    scores = {"norm": [[1.0, 3.0], [2.0, 1.0], [2.0, 2.0]]}
    write_result(tmp_path / "r" / "d.y", [1, 1, 1], scores=scores, rows=rows, run_json={"score_columns": ["x", "y"]})
    [run] = read_runs([tmp_path])
    assert adapters.right_ranks(run.results["d.y"]) == [2, 2, 2]  # a tie counts against it
    chosen = adapters.selected(run)
    assert chosen is not None and (chosen.known, chosen.first, chosen.in_three, chosen.reciprocal) == (3, 0.0, 1.0, 0.5)


def test_the_right_adapter_is_ranked_among_those_that_were_scored(tmp_path: Path) -> None:
    """As with a two-stage index, which scores other adapters for every row."""
    rows = [{"context": text, "completion": "g", "adapter": "x"} for text in "pqr"]
    scores = {"norm": [[1.0, 3.0, None], [2.0, None, 1.0], [None, 2.0, 1.0]]}
    run_json = {"score_columns": ["x", "y", "z"]}
    write_result(tmp_path / "r" / "d.y", [1, 1, 1], scores=scores, rows=rows, run_json=run_json)
    [run] = read_runs([tmp_path])
    assert adapters.right_ranks(run.results["d.y"]) == [2, 1, None]


@given(
    blocks=st.lists(st.integers(0, 3), min_size=2, max_size=14),
    noise=st.randoms(use_true_random=False),
)
@settings(max_examples=50, deadline=None)
def test_alike_adapters_become_neighbours(blocks: list[int], noise: object) -> None:
    """A matrix made of blocks and then shuffled is put back into blocks."""
    count = len(blocks)
    distance = np.array([[0.1 if a == b else 1.0 for b in blocks] for a in blocks])
    distance += np.array([[noise.random() * 0.01 for _ in range(count)] for _ in range(count)])  # type: ignore[attr-defined]
    distance = (distance + distance.T) / 2
    order = adapters.leaf_order(distance)
    assert sorted(order) == list(range(count))
    told = [blocks[n] for n in order]
    changes = sum(a != b for a, b in itertools.pairwise(told))
    assert changes == len(set(blocks)) - 1


@given(scores=st.lists(st.lists(st.integers(-3, 3), min_size=4, max_size=4), min_size=3, max_size=8))
@settings(max_examples=40, deadline=None)
def test_similarity_is_the_rank_correlation(scores: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> None:
    from scipy.stats import spearmanr

    root = tmp_path_factory.mktemp("similarity")
    write_result(
        root / "r" / "d.x", [0] * len(scores), scores={"norm": scores}, run_json={"score_columns": list("abcd")}
    )
    found = adapters.similarity(read_runs([root])[0])
    assert found is not None and sorted(found.adapters) == list("abcd")
    columns = np.array(scores, dtype=float)[:, ["abcd".index(name) for name in found.adapters]]
    for a in range(4):
        for b in range(4):
            constant = any(len(set(columns[:, n])) == 1 for n in (a, b))
            expected = 1.0 if a == b else 0.0 if constant else spearmanr(columns[:, a], columns[:, b]).statistic
            assert found.values[a, b] == pytest.approx(expected, abs=1e-9)
