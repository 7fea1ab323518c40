"""Grids: what is read as an axis, names of cells, means that are drawn alike, and tables that hold the same."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from logo.adapters.format import LoraWeights
from logo.baselines.fixed import OwnSelector
from logo.baselines.registry import register_method
from logo.cli.axes import AXES, Common, make_cells, read_grid
from logo.cli.methods import MethodOptions
from logo.cli.options import EngineOptions
from logo.errors import UsageError
from logo.evaluation.corpus import mean_of
from logo.evaluation.intervals import Interval, of_mean
from logo.evaluation.paired import Pair, difference, holm, significance
from logo.evaluation.stored import Result
from logo.evaluation.sweep.grid import Axis, Value, cell_name, numbers, product, split
from logo.evaluation.sweep.means import means, standings
from logo.evaluation.sweep.plots import plots
from logo.evaluation.sweep.running import Cell, Outcome, runs
from logo.evaluation.sweep.table import table
from logo.evaluation.tables import as_csv, as_parquet
from logo.mixing import Merge
from logo.mixing.merges import register_merge
from logo.selection.settings import SelectionSettings

NAMES = st.sampled_from(["k", "signal", "probe-layer", "probe-points", "weighting"])
TEXTS = st.one_of(
    st.text(min_size=1, max_size=200),
    st.text("aA.=_-~+/\\ ", min_size=1, max_size=12),
    st.integers(-5, 300).map(str),
)
VALUES = st.dictionaries(NAMES, TEXTS, max_size=4)
COMMON = Common(EngineOptions(signal="norm"), MethodOptions(), 0)


@given(VALUES, VALUES)
def test_different_cells_have_different_names_that_are_safe(one: dict[str, Value], other: dict[str, Value]) -> None:
    names = [cell_name(one), cell_name(other)]
    assert (one == other) == (names[0].lower() == names[1].lower())
    for name in names:
        assert re.fullmatch(r"[A-Za-z0-9+._=~-]+", name) and name[0] not in ".-" and name[-1] != "."
        assert len(name) < 200  # a journal's name has room to be longer
    assert cell_name(dict(reversed(one.items()))) == names[0]  # axes in another order are the same cell


def test_a_value_cannot_pass_for_another_axis() -> None:
    assert cell_name({"k": "1_signal=norm"}) != cell_name({"k": "1", "signal": "norm"})
    assert cell_name({"probe-module": "Q"}).lower() != cell_name({"probe-module": "q"}).lower()
    assert cell_name({"k": 3, "signal": "norm_z"}) == "k=3_signal=norm_z"
    assert cell_name({}) == "defaults"


@given(st.lists(st.text(st.characters(exclude_characters=",", exclude_categories=["Zs", "Cc", "Cs"]), min_size=1)))
def test_what_is_split_is_what_was_joined(values: list[str]) -> None:
    values = [value for value in (value.strip() for value in values) if value]
    text = f"probe_layer={','.join(values)}"
    if not values:
        with pytest.raises(UsageError, match="expected AXIS=VALUE"):
            split(text)
        return
    assert split(text) == ("probe-layer", tuple(values))


@given(st.lists(st.integers(1, 3), min_size=1, max_size=3))
def test_a_product_has_every_combination_once(sizes: list[int]) -> None:
    axes = [Axis(f"a{number}", tuple(range(size))) for number, size in enumerate(sizes)]
    found = list(product(axes))
    assert len(found) == math.prod(sizes) == len({tuple(cell.items()) for cell in found})


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((1, 3), [1, 3]),
        ((0.5, 1), [0.5, 1.0]),
        (("0", "-1"), [0, -1]),
        (("0", "last"), None),
        (("0+5", "1"), None),
        (("01",), None),
        ((0.5, "default"), None),
    ],
)
def test_which_values_are_numbers(values: tuple[Value, ...], expected: list[Any] | None) -> None:
    assert numbers(values) == expected


# -- options as axes ------------------------------------------------------------------------------------------------


def grid(*texts: str, common: Common = COMMON) -> tuple[list[Cell], list[str]]:
    cells, skipped = make_cells(read_grid(texts), common)
    return cells, [one.reason for one in skipped]


def test_values_are_read_as_their_options_read_them() -> None:
    cells, skipped = grid("K=1,03", "weighting=default,softmax", "probe_layer=0+5,last", "keep-mass=default,0.90")
    assert len(cells) == 16 and not skipped
    settings = cells[-1].settings
    assert (settings.k, settings.weighting, settings.probe_layer, settings.keep_mass) == (3, "softmax", ["last"], 0.9)
    assert cells[0].settings.weighting is cells[0].settings.keep_mass is None
    assert cells[0].settings.probe_layer == ["0", "5"]
    assert cells[-1].values == {"k": 3, "weighting": "softmax", "probe-layer": "last", "keep-mass": 0.9}
    cells, _ = grid("k=default,3", "signal=default,calibrated")
    assert [(cell.settings.k, cell.settings.signal) for cell in cells] == [
        (k, signal) for k in (None, 3) for signal in ("norm", "calibrated")
    ]
    assert [cell.values["k"] for cell in cells] == ["default", "default", 3, 3]
    [[cell], _] = grid("selection-strategy=calibrated")
    assert cell.settings.signal == "calibrated"
    [[cell], _] = grid("probe-points=4.v_proj+6.up_proj")
    assert cell.settings.probe_points == ["4.v_proj", "6.up_proj"]
    [cells, _] = grid("merge=mixture,ties,arrow", "seed=0,7")
    assert [cell.method and cell.method.merging.kind for cell in cells[::2]] == [None, "ties", "arrow"]
    assert cells[-1].seed == 7 and cells[-1].method is not None and cells[-1].method.seed == 7


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["k=1", "k=2"], "axis 'k' is given twice"),
        (["k=3,03"], "the value 3 is given twice"),
        (["sginal=norm"], "no axis 'sginal' .did you mean 'signal'.+; known: k, signal, "),
        (["signal=calibratd"], "unknown signal 'calibratd' .did you mean 'calibrated'"),
        (["method=logo,orcale"], "unknown method 'orcale' .did you mean 'oracle'"),
        (["merge=tise"], "grid merge=tise: unknown merge 'tise' .did you mean 'ties'"),
        (["probe-context=bsae"], "no value 'bsae' .did you mean 'base'.+known: base, pool, carry, default"),
        (["keep-mass=1.5"], "grid keep-mass=1.5: keep_mass: expected a share"),
        (["weight-temperature=hot"], "grid weight-temperature: expected a number, found 'hot'"),
        (["k=0,3"], "grid k=0: number of selected adapters"),
        (["seed=-1"], "grid seed: expected 0 or more, found -1"),
        (["method=loraretriever"], "expected --adapter-samples DIR"),
        (["k="], "expected AXIS=VALUE"),
        (["=1"], "expected AXIS=VALUE"),
        ([], "expected at least one axis"),
        (["weighting=adaptive"], r"none of the combinations \(1\) is possible; the first: weighting 'adaptive'"),
    ],
)
def test_grids_that_cannot_be_used(texts: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        grid(*texts)


def test_combinations_that_cannot_be_are_left_out() -> None:
    cells, reasons = grid("signal=norm,calibrated", "weighting=linear,adaptive", "probe-context=base,carry")
    kept = [tuple(cell.values.values()) for cell in cells]
    assert kept == [
        ("norm", "linear", "base"),
        ("norm", "linear", "carry"),
        ("calibrated", "linear", "base"),
        ("calibrated", "adaptive", "base"),
    ]
    assert len(reasons) == 4 and sum("no scale of its own" in reason for reason in reasons) == 2


def test_cells_in_which_an_axis_makes_no_difference_share_a_run() -> None:
    cells, skipped = grid("k=1,3", "signal=norm,calibrated", "method=logo,base,random,arrow", "merge=default,ties")
    by_method: dict[str, set[str]] = {}
    for cell in cells:
        by_method.setdefault(str(cell.values["method"]), set()).add(cell.name)
    assert {name: len(names) for name, names in by_method.items()} == {"logo": 8, "base": 2, "random": 4, "arrow": 1}
    assert len(runs(cells)) == 15 and len(skipped) == 4
    # Whichever of them is run first, the run is the same: else it would not be known again.
    for cell in cells:
        [first] = [other for other in runs(cells) if other.name == cell.name]
        assert (first.settings, first.method, first.seed) == (cell.settings, cell.method, cell.seed)
    [cells, _] = grid("weighting=linear,softmax", "weight-temperature=0.1,0.5", "merge-density=0.3,0.5")
    assert {cell.name for cell in cells} == {
        "weighting=linear",
        "weight-temperature=0.1_weighting=softmax",
        "weight-temperature=0.5_weighting=softmax",
    }
    [cells, _] = grid("signal=calibrated", "when-unsure=mix,base", "unsure-below=0.1,0.2")
    assert {cell.name for cell in cells} == {
        "signal=calibrated_when-unsure=mix",
        "signal=calibrated_unsure-below=0.1_when-unsure=base",
        "signal=calibrated_unsure-below=0.2_when-unsure=base",
    }


@pytest.mark.usefixtures("plugins_forgotten")
def test_whatever_a_plugin_may_read_makes_a_difference() -> None:
    @register_method
    @dataclass(frozen=True, kw_only=True)
    class Same(OwnSelector):
        """The engine's choice."""

        name = "same"

    @register_merge("same")
    def same(merge: Merge, parts: Sequence[LoraWeights], weights: Sequence[float], generator: Any) -> LoraWeights:
        return parts[0]

    cells, _ = grid("method=same,random", "signal=norm,calibrated", "k=1,3", "merge-density=0.5,1")
    assert {cell.name for cell in cells} == {
        *(f"k={k}_method=same_signal={signal}" for k in (1, 3) for signal in ("norm", "calibrated")),
        *(f"k={k}_method=random" for k in (1, 3)),
    }
    cells, _ = grid("merge=same,linear", "merge-density=0.5,1", "arrow-top-k=1,2")
    assert [cell.moot for cell in cells[:4]] == [frozenset()] * 4
    assert {cell.moot for cell in cells[4:]} == {frozenset({"merge-density", "arrow-top-k"})}


def test_every_axis_can_be_used() -> None:
    values = {
        "k": "2",
        "signal": "entropy",
        "keep-mass": "0.5",
        "probe-module": "q_proj",
        "probe-layer": "0",
        "probe-points": "4",
        "seed": "1",
        "method": "uniform",
        "merge": "ties",
        "shots": "3",
    }
    for axis in AXES:
        [[cell], _] = grid(f"{axis}={values.get(axis, 'default')}")
        assert list(cell.values) == [axis]


# -- numbers and pictures of what came out --------------------------------------------------------------------------


def outcomes(axes: list[Axis], datasets: dict[str, int], lacking: frozenset[tuple[int, str]] = frozenset()) -> Any:
    random = np.random.default_rng(1)
    found = []
    for number, values in enumerate(product(axes)):
        cell = Cell(values, SelectionSettings())
        for name, rows in datasets.items():
            right = random.random(rows) < 0.3 + 0.1 * number
            if (number, name) in lacking:
                continue
            folder = f"runs/{cell.name}/{name}"
            result = Result(
                dataset=name,
                folder=Path(folder),
                values=tuple(map(int, right)),
                predictions=("",) * rows,
                selected=((),) * rows,
                weights=((),) * rows,
                columns=(),
                scores=np.empty((rows, 0)),
                seconds={"inference": 2.0, "generate": 1.5},
                prompts=None,
                official={"em": float(right.mean())},
                official_intervals={"em": Interval(0.0, 1.0)},
                extra={"f1": 1 / 3},
                run={"metric": "em"},
            )
            found.append(Outcome(cell, result, folder))
    return found


TWO = [Axis("k", (1, 20)), Axis("signal", ("norm", 'a,"b"\n'))]


def test_means_are_those_of_each_cell_alone() -> None:
    found = outcomes(TWO, {"bbh.a": 12, "bbh.b": 7, "anli.r1": 5}, frozenset({(2, "bbh.b")}))
    together = means(found, ["bbh.a", "bbh.b"], seed=3)
    assert [cell.values for cell, _ in together] == [values for i, values in enumerate(product(TWO)) if i != 2]
    for cell, mean in together:
        columns = [one.result.values for one in found if one.cell.key == cell.key and one.dataset.startswith("bbh")]
        alone = [mean_of(column) for column in columns]
        assert mean.value == pytest.approx(np.mean([one.value for one in alone]))
        assert mean.interval == of_mean([one.value for one in alone], [one.interval() for one in alone])
        assert mean.datasets == 2
    ranked = standings(found)
    assert [standing.complete for standing in ranked] == [True, True, True, False]
    whole = [standing.mean.value for standing in ranked[:3]]
    assert whole == sorted(whole, reverse=True)
    assert set(ranked[-1].groups) == {"NLI"} and ranked[-1].mean.datasets == 2 and ranked[-1].seconds == 4.0
    assert standings([]) == []


def test_cells_are_compared_with_the_best_row_by_row() -> None:
    found = outcomes(TWO, {"bbh.a": 40, "bbh.b": 30})
    best, *others = standings(found, seed=3)
    assert best.behind is None and all(other.behind for other in others)
    columns = {one.cell.key + (one.dataset,): mean_of(one.result.values) for one in found}
    ps = []
    for other in others:
        names = ("bbh.a", "bbh.b")
        pairs = [Pair(columns[(*best.cell.key, name)], columns[(*other.cell.key, name)]) for name in names]
        assert other.behind is not None
        assert other.behind.difference == difference(pairs, seed=3)
        assert other.behind.significance == significance(pairs, seed=3)
        assert other.behind.difference.value == pytest.approx(other.mean.value - best.mean.value)
        ps.append(other.behind.significance.p)
    assert [other.behind and other.behind.p_holm for other in others] == holm(ps)


def test_both_formats_hold_the_same_whatever_is_in_them() -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    axes = [*TWO, Axis("probe-layer", ("0", "-1")), Axis("keep-mass", ("default", 0.5))]
    made = table(axes, outcomes(axes, {"x": 3, "gem.é": 2}))
    read = parquet.read_table(io.BytesIO(as_parquet(made)))
    lines = list(csv.reader(io.StringIO(as_csv(made).decode(), newline="")))
    assert read.column_names == lines[0] == [column.name for column in made.columns] and len(lines) == 1 + 16 * 2 * 2
    kinds = {name: str(kind) for name, kind in zip(read.schema.names, read.schema.types, strict=True)}
    assert (kinds["k"], kinds["probe_layer"], kinds["keep_mass"], kinds["value"]) == (
        "int64",
        "int64",
        "string",
        "double",
    )
    for line, row in zip(lines[1:], read.to_pylist(), strict=True):
        for text, value in zip(line, row.values(), strict=True):
            assert (None if text == "" else type(value)(text)) == value


def size(picture: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(picture)) as image:
        image.load()
        return image.size


@pytest.mark.slow
def test_a_picture_for_every_axis_that_varies() -> None:
    axes = [*TWO, Axis("seed", (0,)), Axis("merge", ("mixture", "$ties$"))]
    found = outcomes(axes, {"bbh.a": 4, "gem.dart": 4}, frozenset({(0, "bbh.a"), (3, "gem.dart")}))
    drawn = plots(axes, found)
    assert list(drawn) == ["k.png", "signal.png", "merge.png"]
    assert all(min(size(picture)) > 300 for picture in drawn.values())
    [single] = plots(TWO[:1], outcomes(TWO[:1], {"bbh.a": 4})).values()
    assert size(single)[0] < size(drawn["k.png"])[0] / 2  # one panel, no legend
    assert plots(TWO, []) == {} == plots([Axis("k", (1,))], outcomes([Axis("k", (1,))], {"x": 2}))


@pytest.mark.slow
def test_many_panels_go_on_in_another_picture() -> None:
    axes = [Axis("k", (1, 2)), Axis("seed", (0, 1)), Axis("shots", tuple(range(11)))]
    drawn = plots(axes[:1] + axes[2:] + axes[1:2], outcomes(axes, {"x": 2}))
    assert [name for name in drawn if name.startswith("seed")] == ["seed.png", "seed-2.png"]
