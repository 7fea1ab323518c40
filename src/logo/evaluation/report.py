"""One self-contained page of results, and its tables as CSV and LaTeX.

    table of rows -> `analyse` -> `Report`: scores, comparison, weights, notes -> `page`, `frames`, `latex`

The page works offline: charts are Altair's, drawn by the Vega that is written into the page once. Every text of a run
reaches it as escaped HTML or as JSON, which its script shows as text.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from logo.errors import listed
from logo.evaluation.compare import Column, Comparison, Line, column_for, columns_of, compare, lines_of
from logo.evaluation.statistics import ALPHA, interval, of_mean

if TYPE_CHECKING:
    import altair
    import pandas

MOST_ADAPTERS = 40  # in a heat map
BINS = 20  # of confidences
SCORES = ("run", "name", "measure", "datasets", "rows", "score", "low", "high")


@dataclass(frozen=True)
class Report:
    """What a page shows.

    Attributes:
        table: all rows, as `results.read` returns them.
        scores: a line for each run and dataset, or group of several: `SCORES`, fractions of one, with the ends of the
            95 % interval. A run has the mean of a group if it has all of the group's datasets.
        comparison: of each run with the first.
        weights: run, dataset, adapter, and the mean weight that rows gave it.
        notes: what has to be known beside the numbers, one sentence each.
    """

    table: pandas.DataFrame
    scores: pandas.DataFrame
    comparison: Comparison
    weights: pandas.DataFrame
    notes: tuple[str, ...]

    @property
    def runs(self) -> list[str]:
        """The runs' names, in order."""
        return list(dict.fromkeys(self.table["run"]))


def analyse(table: pandas.DataFrame, *, seed: int = 0) -> Report:
    """Finds out what a page shows.

    Args:
        table: as `results.read` returns it.
        seed: of intervals and tests.
    """
    absent = [name for name in ("prompt", "completion", "confidence", "error", "cut") if name not in table]
    table = table.assign(**dict.fromkeys(absent)).astype(object)
    table = table.where(table.notna(), None)
    columns = {key: columns_of(rows) for key, rows in table.groupby(["run", "dataset"], sort=False)}
    comparison = compare(table, seed=seed, strict=False)
    notes = (*comparison.notes, *_official_metrics(table), *_row_notes(table))
    return Report(table, _scores(columns, seed), comparison, _weights(table), notes)


def _scores(columns: Mapping[tuple[str, str], Mapping[str, Column]], seed: int) -> pandas.DataFrame:
    """The lines of `Report.scores`, from the columns of each run and dataset."""
    import pandas

    measured: dict[str, dict[str, None]] = {}
    for (_, dataset), by_measure in columns.items():
        measured.setdefault(dataset, {}).update(dict.fromkeys(by_measure))
    runs = list(dict.fromkeys(run for run, _ in columns))
    scores = []
    for line in lines_of(measured):
        for run in runs:
            members = _members(line, run, columns)
            if members is not None:
                scores.append(_score(run, line, members, seed))
    return pandas.DataFrame(scores, columns=SCORES)


def _members(line: Line, run: str, columns: Mapping[tuple[str, str], Mapping[str, Column]]) -> list[Column] | None:
    """The column of each dataset of a line; None if the run lacks one, whose mean would be of other datasets."""
    members = []
    for dataset in line.datasets:
        column = column_for(line, columns.get((run, dataset), {}))
        if column is None:
            return None
        members.append(column)
    return members


def _score(run: str, line: Line, members: Sequence[Column], seed: int) -> tuple[Any, ...]:
    """One line of `Report.scores`."""
    means = [float(column.values.mean()) for column in members]
    intervals = [interval(column.values, column.scale, seed) for column in members]
    low, high = of_mean(means, intervals) or (None, None)
    rows = sum(len(column.values) for column in members)
    return run, line.name, line.measure, len(members), rows, float(np.mean(means)), low, high


def _weights(table: pandas.DataFrame) -> pandas.DataFrame:
    """The lines of `Report.weights`; adapters whose weight a row does not know are left out."""
    chosen = table[["run", "dataset", "selected", "weights"]].explode(["selected", "weights"]).dropna()
    sums = chosen.astype({"weights": float}).groupby(["run", "dataset", "selected"], sort=False)["weights"].sum()
    means = sums / table.groupby(["run", "dataset"], sort=False).size()
    return means.dropna().rename_axis(["run", "dataset", "adapter"]).reset_index(name="weight")


def _official_metrics(table: pandas.DataFrame) -> Iterator[str]:
    """That means of a run over several datasets hold exact matches with the first gold text alone."""
    official = table[table["metric"] == "em_first"]
    for run, rows in official.groupby("run", sort=False):
        datasets = listed(list(dict.fromkeys(rows["dataset"])))
        yield f"{run}: answers of {datasets} are compared with the first gold text alone (em_first), also in means"


def _row_notes(table: pandas.DataFrame) -> Iterator[str]:
    """How many rows have no answer, and how many prompts were cut."""
    failed = int(table["error"].notna().sum())
    if failed:
        yield f"{failed} rows have no answer, and count as wrong"
    cut = table[table["cut"].map(bool)]
    for (run, dataset), rows in cut.groupby(["run", "dataset"], sort=False):
        of_all = int(((table["run"] == run) & (table["dataset"] == dataset)).sum())
        yield f"{run}: {len(rows)} of {of_all} prompts of {dataset} were cut, by up to {max(rows['cut'])} tokens"


# -- tables ------------------------------------------------------------------------------------------------------------


def frames(report: Report) -> dict[str, pandas.DataFrame]:
    """The numbers by the name of their table, for CSV: `results`, `comparisons`, `adapters` and `rows`."""
    import pandas

    lines = []
    for line in report.comparison.lines:
        low, high = line.pair.interval or (None, None)
        lines.append({**line.as_json(), "low": low, "high": high})
    compared = pandas.DataFrame(lines).drop(columns="interval", errors="ignore")
    rows = report.table.map(
        lambda cell: json.dumps(cell, ensure_ascii=False) if isinstance(cell, list | dict) else cell
    )
    return {"results": report.scores, "comparisons": compared, "adapters": report.weights, "rows": rows}


def results_table(report: Report) -> pandas.DataFrame:
    """Scores in percent with intervals, as texts: a line for each dataset or group and measure, a column per run."""
    import pandas

    lines: dict[tuple[str, str], dict[str, str]] = {}
    for run, name, measure, datasets, _, score, *ends in report.scores.itertuples(index=False, name=None):
        cell = _percent(score, None if pandas.isna(ends[0]) else ends)
        lines.setdefault((_counted(name, datasets), measure), {})[run] = cell
    rows = [(*line, *(cells.get(run, "-") for run in report.runs)) for line, cells in lines.items()]
    return pandas.DataFrame(rows, columns=["dataset", "measure", *report.runs])


def comparisons_table(report: Report) -> pandas.DataFrame:
    """The comparison in percent, as texts; `marked` says which lines are significant."""
    import pandas

    columns = ["A", "B", "dataset", "measure", "rows", "mean A", "mean B", "B − A", "better", "worse", "p", "p Holm"]
    lines = []
    for line in report.comparison.lines:
        pair = line.pair
        means = (_percent(pair.a), _percent(pair.b), _percent(pair.difference, pair.interval, "+"))
        test = (pair.better, pair.worse, f"{pair.p:.3g}", f"{pair.p_holm:.3g}", pair.is_marked)
        place = (line.a, line.b, _counted(line.name, line.datasets), line.measure)
        lines.append((*place, pair.rows, *means, *test))
    return pandas.DataFrame(lines, columns=[*columns, "marked"])


def latex(report: Report) -> str:
    """The results and the comparison as LaTeX tables (package booktabs)."""
    compared = comparisons_table(report).drop(columns="marked")
    holm = f"p Holm: corrected for {len(compared)} together"
    tables = {"Results": results_table(report), f"Comparisons ({holm})": compared}
    texts = []
    for heading, frame in tables.items():
        if len(frame):
            caption = rf"{heading}, in percent with 95 \% intervals"
            texts.append(frame.to_latex(caption=caption, index=False, escape=True).replace("−", "$-$"))
    return "\n".join(texts)


def _percent(value: float, interval: Sequence[float] | None = None, sign: str = "") -> str:
    """`71.33 [65.2, 77.0]`."""
    ends = "" if interval is None else " [{:{}.1f}, {:{}.1f}]".format(100 * interval[0], sign, 100 * interval[1], sign)
    return f"{100 * value:{sign}.2f}{ends}"


def _counted(name: str, datasets: int) -> str:
    """`Translation (6)`."""
    return name if datasets == 1 else f"{name} ({datasets})"


# -- page --------------------------------------------------------------------------------------------------------------


def page(report: Report) -> str:
    """The page as HTML; its heading names the runs."""
    import jinja2

    table = report.table
    runs = report.runs
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("report.html.j2").render(
        title=f"LoGo: {listed(runs)}",
        runs=runs,
        counts={"run": len(runs), "dataset": table["dataset"].nunique(), "row": len(table)},
        notes=report.notes,
        results=results_table(report),
        compared=comparisons_table(report),
        alpha=ALPHA,
        most=MOST_ADAPTERS,
        charts=_charts(report),
        data=_rows(report),
        vega=_vega(),
    )


@functools.cache
def _vega() -> str:
    """The script that draws charts, of the version that Altair writes them for; bundling it takes seconds."""
    import altair
    import vl_convert

    version = altair.SCHEMA_VERSION[1:].rpartition(".")[0]
    script: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", version)
    return script


def _charts(report: Report) -> dict[str, dict[str, Any]]:
    """Vega-Lite specifications by the place where they belong: `results`, `adapters-N` and `confidence-N` of run N."""
    import altair

    order = list(dict.fromkeys(report.scores["name"]))
    charts: dict[str, altair.Chart | altair.LayerChart] = {"results": _scores_chart(report)}
    sums = report.weights.assign(weight=report.weights["weight"].abs()).groupby("adapter")["weight"].sum()
    heaviest = set(sums.nlargest(MOST_ADAPTERS).index)
    for number, run in enumerate(report.runs):
        weights = report.weights[(report.weights["run"] == run) & report.weights["adapter"].isin(heaviest)]
        confident = report.table[(report.table["run"] == run) & report.table["confidence"].notna()]
        if len(weights):
            charts[f"adapters-{number}"] = _adapters_chart(weights, order)
        if len(confident):
            charts[f"confidence-{number}"] = _confidence_chart(confident)
    with altair.data_transformers.enable("default", max_rows=None):
        return {name: chart.properties(width="container").to_dict() for name, chart in charts.items()}


def _scores_chart(report: Report) -> altair.LayerChart:
    """A dot and its interval for each run and line of the results, of ROUGE those of ROUGE-L."""
    import altair

    shown = report.scores[~report.scores["measure"].isin(["rouge-1", "rouge-2"])].copy()
    shown[["score", "low", "high"]] = (100 * shown[["score", "low", "high"]].astype(float)).round(2)
    named = shown[["name", "datasets", "measure"]].itertuples(index=False, name=None)
    shown["line"] = [f"{_counted(name, datasets)} {measure}" for name, datasets, measure in named]
    lines = list(dict.fromkeys(shown["line"]))
    base = altair.Chart(shown, height=max(24, 8 * len(report.runs)) * len(lines)).encode(
        y=altair.Y("line:N", sort=lines, title=None),
        yOffset=altair.YOffset("run:N", sort=report.runs),
        color=altair.Color("run:N", sort=report.runs),
        tooltip=["run:N", "line:N", "rows:Q", "score:Q", "low:Q", "high:Q"],
    )
    across = altair.X("low:Q", title="percent", scale=altair.Scale(domain=[0, 100]))
    return base.mark_rule(strokeWidth=2).encode(x=across, x2="high:Q") + base.mark_circle(opacity=1).encode(x="score:Q")


def _adapters_chart(weights: pandas.DataFrame, order: Sequence[str]) -> altair.Chart:
    """The heat map of a run: the mean weight of adapters by dataset."""
    import altair

    colours: dict[str, Any] = {"scheme": "redblue", "domainMid": 0}
    colours = colours if (weights["weight"] < 0).any() else {"scheme": "blues"}
    chart = altair.Chart(weights.round({"weight": 3}), height=16 * weights["adapter"].nunique()).mark_rect()
    return chart.encode(
        x=altair.X("dataset:N", sort=order, title=None, axis=altair.Axis(labelAngle=-60)),
        y=altair.Y("adapter:N", title=None),
        color=altair.Color("weight:Q", title="mean weight", scale=altair.Scale(**colours)),
        tooltip=["adapter:N", "dataset:N", "weight:Q"],
    )


def _confidence_chart(rows: pandas.DataFrame) -> altair.Chart:
    """The histogram of a run's confidences, by whether the answers are right."""
    import altair
    import pandas

    values = rows["confidence"].astype(float)
    edges = np.linspace(min(0.0, values.min()), max(1.0, values.max()), BINS + 1).round(4)
    places = np.clip(np.digitize(values, edges) - 1, 0, BINS - 1)
    verdicts = np.select([rows["score"] == 1, rows["score"] == 0], ["right", "wrong"], "in part")
    bars = pandas.DataFrame({"start": edges[places], "end": edges[places + 1], "answer": verdicts})
    colours = altair.Scale(domain=["right", "in part", "wrong"], range=["#2a9d8f", "#e9c46a", "#d1495b"])
    across = altair.X("start:Q", bin="binned", title="confidence", scale=altair.Scale(domain=[edges[0], edges[-1]]))
    chart = altair.Chart(bars.value_counts().reset_index(name="rows"), height=180).mark_bar()
    colour = altair.Color("answer:N", title=None, scale=colours)
    return chart.encode(
        x=across, x2="end:Q", y="rows:Q", color=colour, tooltip=["answer:N", "rows:Q", "start:Q", "end:Q"]
    )


def _rows(report: Report) -> dict[str, list[Any]]:
    """Every row as a list of cells: texts that runs share, such as prompts, are written once, and cells are their
    numbers."""
    numbers_of_texts: dict[str, int] = {}
    rows = []
    for line in report.table.to_dict("records"):
        weights = zip(line["selected"], line["weights"], strict=False)
        texts = (
            line["run"],
            line["dataset"],
            _text(line["prompt"]),
            _text(line["completion"]),
            line["prediction"],
            ", ".join(name if weight is None else f"{name} {weight:.2f}" for name, weight in weights),
            line["error"] or "",
        )
        cells = [numbers_of_texts.setdefault(text, len(numbers_of_texts)) for text in texts]
        rows.append([*cells, line["index"] + 1, round(100 * line["score"], 2), line["confidence"]])
    return {"texts": list(numbers_of_texts), "rows": rows}


def _text(value: Any) -> str:
    """A prompt or gold text: a text, a chat's messages, or several texts."""
    if isinstance(value, list):
        return "\n".join(f"{part['role']}: {part['content']}" if isinstance(part, dict) else part for part in value)
    return str(value or "")
