"""The report's numbers: means and marks, one run against another, weights, ranks."""

from __future__ import annotations

import itertools
from dataclasses import asdict
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from logo.evaluation.comparison import compare
from logo.evaluation.intervals import proportion
from logo.evaluation.paired import ALPHA, TESTS
from logo.evaluation.report import adapters, analyse, as_latex, page, summary
from logo.evaluation.report.versus import Pairing, shared_rows
from logo.evaluation.runs import Run, read_run, read_runs
from logo.evaluation.tables import p_value
from report_runs import write_result

ROUGE = ("rouge-1", "rouge-2", "rouge-L")


def rows_of(*prompts: str) -> list[dict[str, str]]:
    return [{"context": prompt, "completion": "gold"} for prompt in prompts]


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
    [line] = analyse(read_runs([root])).lines
    marks = [cell.mark for cell in line.cells if cell]
    means = [float(np.mean(values)) for values in columns]
    if len(set(means)) < 2:
        assert set(marks) == {""}  # nothing is better than anything
        return
    top = means.index(max(means))
    # The best is known from the data alone, so every pair counts.
    pairs = list(itertools.combinations(range(len(columns)), 2))
    ps = [by_hand(columns[a], columns[b]) for a, b in pairs]
    worse = {a + b - top for (a, b), p in zip(pairs, holm_by_hand(ps), strict=True) if top in (a, b) and p < ALPHA}
    tied = set(range(len(columns))) - worse - {top}
    assert marks[top] == ("tied" if tied else "best")
    assert {n for n, mark in enumerate(marks) if mark == "tied"} == (tied | {top} if tied else set())
    assert marks.count("best") <= 1


def by_hand(a: list[int], b: list[int]) -> float:
    """McNemar's test."""
    wins, losses = (sum(x > y for x, y in zip(*pair, strict=True)) for pair in ((a, b), (b, a)))
    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


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
    [line] = analyse(read_runs([tmp_path])).lines
    assert [cell.mark for cell in line.cells if cell] == ["tied", "tied"]


def test_runs_that_share_most_instances_have_the_p_value_of_these(tmp_path: Path) -> None:
    """A line of which some instances are not shared is no test, and changes the p-value of no other one."""
    for name, value, first in (("a", 0, 0), ("b", 1, 4)):
        values = [value if first + row in range(4, 20) else 1 for row in range(44)]
        write_result(tmp_path / name / "d.x", values, rows=rows_of(*map(str, range(first, first + 44))))
    analysis = analyse(read_runs([tmp_path]))
    [pair] = analysis.versus
    assert (pair.record.wins, pair.record.losses) == (16, 0)
    assert pair.p_holm == pair.significance.p == pytest.approx(2**-15)
    assert [[cell.mark for cell in line.cells if cell] for line in analysis.lines] == [["tied", "tied"]]


def test_groups_and_intervals(tmp_path: Path) -> None:
    """Datasets count alike in a group; a group of one has that dataset's interval."""
    rouge = [{"rouge-1": 0.5, "rouge-2": 0.25, "rouge-L": 0.375}] * 2
    old = {"official_intervals": {"em": [1.0, 1.0]}}  # as a bootstrap has it
    write_result(tmp_path / "a" / "wmt14.fr-en", [0.5] * 4)
    write_result(tmp_path / "a" / "wmt16.de-en", [0.25])
    write_result(tmp_path / "a" / "gem.dart", rouge)
    write_result(tmp_path / "a" / "bbh.navigate", [1, 1], metrics=old)
    analysis = analyse(read_runs([tmp_path]))
    groups = {(line.group, line.metric): line.cells[0] for line in analysis.groups}
    translation = groups["Translation", "bleu"]
    assert translation is not None and translation.value == 0.375
    assert (translation.datasets, translation.rows, translation.interval) == (2, 5, None)
    text = groups["Struct-to-Text", "rouge-2"]
    assert text is not None and (text.value, text.interval) == (0.25, None)
    [cell] = analysis.overall.cells
    assert cell is not None and cell.value == pytest.approx((1 + 0.5 + 0.25 + 0.375) / 4)
    cells = {(line.dataset, line.metric): line.cells[0] for line in analysis.lines}
    two_of_two, group = cells["bbh.navigate", "em"], groups["BIG-Bench Hard", "em"]
    assert two_of_two is not None and group is not None
    assert two_of_two.interval == group.interval == proportion(2, 2)


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
    assert found is not None
    assert dict(zip(found.adapters, found.values[0], strict=True)) == pytest.approx(
        {"b": 0.725, "a": 0.125, "never": 0}
    )
    chosen = adapters.selected(run)
    assert chosen is not None and chosen.heaviest == pytest.approx(0.725)
    assert chosen.effective == pytest.approx((1 / (0.75**2 + 0.25**2) + 1) / 2)


def test_the_right_adapter_is_named_by_the_row_or_the_dataset(tmp_path: Path) -> None:
    rows = [{"context": "p", "completion": "g", "adapter": "x"}, *rows_of("q", "r")]
    scores = {"norm": [[1.0, 3.0], [2.0, 1.0], [2.0, 2.0]]}
    write_result(tmp_path / "r" / "d.y", [1, 1, 1], scores=scores, rows=rows, run_json={"score_columns": ["x", "y"]})
    [run] = read_runs([tmp_path])
    assert adapters.right_ranks(run.results["d.y"]) == [2, 2, 2]  # a tie counts against it
    chosen = adapters.selected(run)
    assert chosen is not None and (chosen.known, chosen.first, chosen.in_three, chosen.reciprocal) == (3, 0.0, 1.0, 0.5)


def test_the_right_adapter_is_ranked_among_those_that_were_scored(tmp_path: Path) -> None:
    rows = [{"context": text, "completion": "g", "adapter": "x"} for text in "pqr"]
    scores = {"norm": [[1.0, 3.0, None], [2.0, None, 1.0], [None, 2.0, 1.0]]}
    run_json = {"score_columns": ["x", "y", "z"]}
    write_result(tmp_path / "r" / "d.y", [1, 1, 1], scores=scores, rows=rows, run_json=run_json)
    [run] = read_runs([tmp_path])
    assert adapters.right_ranks(run.results["d.y"]) == [2, 1, None]


def test_opposite_weights_are_two_adapters(tmp_path: Path) -> None:
    write_result(tmp_path / "r" / "d.x", [1], weights=[[1.0, -1.0]])
    chosen = adapters.selected(read_runs([tmp_path])[0])
    assert chosen is not None and chosen.effective == 2.0


def test_the_best_of_many_runs_is_corrected_for_all_pairs(tmp_path: Path) -> None:
    """The first run beats the last one in nine rows of nine, p = 0.004: much for a pair that somebody has named, and
    little for one of the 45 pairs of ten runs that look alike."""
    for run in range(10):
        values = [1] * 12 + [int(run < 9)] * 9 + [int(run == row) for row in range(8)]
        write_result(tmp_path / f"run{run}" / "d.x", values, rows=rows_of(*map(str, range(29))))
    [line] = analyse(read_runs([tmp_path])).lines
    assert [cell.mark for cell in line.cells if cell] == ["tied"] * 10


def test_one_dataset_of_many_is_corrected_for_all_of_them(tmp_path: Path) -> None:
    """One run beats the other in seven rows of seven, p = 0.016, on one of twelve datasets."""
    for run in range(2):
        for number in range(12):
            values = [1] * 10 + ([run] * 7 if number == 0 else [(row + run) % 2 for row in range(8)])
            rows = rows_of(*map(str, range(len(values))))
            write_result(tmp_path / f"run{run}" / f"d.x{number:02d}", values, rows=rows)
    analysis = analyse(read_runs([tmp_path]))
    marks = [[cell.mark for cell in line.cells if cell] for line in analysis.lines]
    assert marks == [["tied", "tied"], *[["", ""]] * 11]
    [pair] = analysis.versus
    assert pair.p_holm > pair.significance.p  # which is corrected for the lines beside it, too


def test_a_dataset_of_another_metric_makes_no_comparison_tied(tmp_path: Path) -> None:
    """Within a group, and where one run is right in all rows and the other in none."""
    for name, value in (("a", 1), ("b", 0)):
        for dataset in ("d.x", "d.y"):
            write_result(tmp_path / name / dataset, [value] * 40, rows=rows_of(*map(str, range(40))))
        judged = {"metric": "bleu", "dataset": {"name": "d.z"}}
        write_result(tmp_path / name / "d.z", [0.5] * 3, rows=rows_of(*"xyz"), run_json=judged)
    lines = {line.metric: line for line in analyse(read_runs([tmp_path])).groups}
    assert [cell.mark for cell in lines["em"].cells if cell] == ["best", ""]
