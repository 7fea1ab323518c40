"""The report as one HTML page that needs nothing else: no network, no folder beside it, and no script for its tables.

What the page may do is written in it: its own style and script by their hashes, pictures from `data:` URIs, nothing
else. All text from results goes through `markup`, and all data for the script through `payload`.
"""

from __future__ import annotations

import base64
import hashlib
from importlib import resources
from string import Template

from logo.evaluation.paired import ALPHA, TESTS
from logo.evaluation.report import tables
from logo.evaluation.report.analysis import Analysis
from logo.evaluation.report.markup import Html, element, escape, join
from logo.evaluation.report.payload import blocks
from logo.evaluation.report.pictures import differences, scores, similarity, spread, spread_words, time, weights
from logo.evaluation.report.published import CAVEAT
from logo.evaluation.report.scene import Scene
from logo.evaluation.report.svg import svg

LONGEST_TITLE = 60  # characters of runs
MARKS = (
    f"Bold: the highest, and significantly better than every other run of that line. Dotted: where no run is, the "
    f"highest and all that are not significantly worse. Significant: p below {ALPHA} by {TESTS['mcnemar']} where the "
    f"answers to one dataset are right or wrong, else by {TESTS['randomisation']}; corrected by Holm’s method for the "
    "runs of the line."
)
INTERVALS = (
    "Intervals are Wilson’s where answers are right or wrong, else bootstrap percentiles over instances, of ten "
    "instances or more. A mean’s interval comes from its datasets’, squared and added: it is about other instances of "
    "the same datasets."
)
ALL = "All: the mean over datasets of accuracy, BLEU or ROUGE-L, whichever a dataset has."
THRESHOLD = "An answer counts as right when it is worth at least one half; exact match is worth one or nothing."


def page(analysis: Analysis, title: str | None = None) -> str:
    """The whole page.

    Args:
        title: its heading; the base models and what was run if None.
    """
    style, script = _asset("page.css"), _asset("page.js")
    policy = (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )
    sections = [section for section in (_overview(analysis), _datasets(analysis), _versus(analysis)) if section]
    sections += [_adapters(analysis), _time(analysis)]
    names = [(name, heading) for name, heading, _ in sections] + [("instances", "Instances")]
    links = (element("li", element("a", heading, href=f"#{name}")) for name, heading in names)
    data = (
        element("script", Html(block), type="text/plain", id=f"b-{name}") for name, block in blocks(analysis).items()
    )
    return Template(_asset("page.html")).substitute(
        policy=escape(policy),
        version=escape(_version()),
        title=escape(title or title_of(analysis)),
        style=style,
        lede=_lede(analysis),
        links=join(*links),
        sections=join(*(_section(*section) for section in sections)),
        threshold=escape(THRESHOLD),
        footer=_footer(analysis),
        blocks=join(*data),
        script=script,
    )


def title_of(analysis: Analysis) -> str:
    """`Gemma-2B: norm, entropy`; how many runs where their names would be too long."""
    bases = list(dict.fromkeys(run.base for run in analysis.runs if run.base))
    base = ", ".join(bases[:3]) + (" and others" if len(bases) > 3 else "")
    labels = analysis.labels
    what = ", ".join(labels)
    if len(what) > LONGEST_TITLE:
        what = f"{len(labels)} runs"
    return f"{base}: {what}" if base else what


def _lede(analysis: Analysis) -> Html:
    count = f"{analysis.instances:,}".replace(",", " ")
    what = f"{_counted(len(analysis.runs), 'run')}, {_counted(len(analysis.datasets), 'dataset')}, {count} answers."
    best = [n for n, cell in enumerate(analysis.overall.cells) if cell is not None and cell.mark == "best"]
    told: list[object] = [what]
    if len(best) == 1:
        cell = analysis.overall.cells[best[0]]
        assert cell is not None
        number = f"{100 * cell.value:.1f}"
        told += [" Best on average over all datasets: ", tables.run_name(analysis, best[0]), f", {number} "]
        if cell.interval is not None:
            told.append(element("small", f"({'–'.join(f'{100 * end:.1f}' for end in cell.interval)})", class_="ci"))
        told.append(".")
    return element("p", *told, class_="lede")


def _overview(analysis: Analysis) -> tuple[str, str, Html]:
    options = tables.options_table(analysis)
    versions = tables.versions_table(analysis.runs[0])
    told = [MARKS] if len(analysis.runs) > 1 else []
    told.append(INTERVALS)
    told += [ALL] if len({line.group for line in analysis.groups}) > 1 else []
    notes = element("p", " ".join(told), class_="key")
    return (
        "overview",
        "Overview",
        join(
            tables.groups_table(analysis),
            notes,
            tables.runs_table(analysis),
            _details("Options that differ", options),
            _details("Versions", versions),
        ),
    )


def _datasets(analysis: Analysis) -> tuple[str, str, Html]:
    scene = scores(analysis)
    extra = None
    if analysis.extra:
        signatures = sorted(
            {
                f"{name}: {text}"
                for run in analysis.runs
                for result in run.results.values()
                for name, text in result.signatures.items()
            }
        )
        told = [element("p", element("code", text), class_="key") for text in signatures]
        extra = join(tables.datasets_table(analysis, analysis.extra, "Further measures, with 95 % intervals"), *told)
    return (
        "datasets",
        "Datasets",
        join(
            tables.figure(scene, svg(scene)),
            tables.datasets_table(analysis, analysis.lines, "Official measures, in percent, with 95 % intervals"),
            _sources(analysis),
            element("p", analysis.left_out, class_="key") if analysis.left_out else None,
            _details("Measures beside the official ones", extra),
        ),
    )


def _sources(analysis: Analysis) -> Html | None:
    """Where published numbers were read."""
    cells = [cell for line in analysis.lines for cell in line.cells if cell is not None]
    sources = {cell.published.source: cell.published.url for cell in cells if cell.published is not None}
    if not sources:
        return None
    told = "; ".join(f"{source}, {url}" for source, url in sources.items())
    return element("p", f"{CAVEAT} From: {told}.", class_="key")


def _versus(analysis: Analysis) -> tuple[str, str, Html] | None:
    scene = differences(analysis)
    if scene is None:
        return None
    used = {pair.significance.test for pair in analysis.versus}
    tests = " or ".join(text for name, text in TESTS.items() if name in used)
    note = (
        f"The same instances are compared in both runs; every dataset counts alike. p: two-sided, by {tests}. "
        + (f"p Holm: corrected for the {len(analysis.versus)} pairs. " if len(analysis.versus) > 1 else "")
        + f"Bold: {'p Holm' if len(analysis.versus) > 1 else 'p'} below {ALPHA}."
    )
    return (
        "versus",
        "Head to head",
        join(tables.figure(scene, svg(scene)), tables.versus_table(analysis), element("p", note, class_="key")),
    )


def _adapters(analysis: Analysis) -> tuple[str, str, Html]:
    parts: list[object] = [tables.selected_table(analysis)]
    if parts[0] is not None:
        note = "Effective number: as many adapters of equal weight would spread the weight as far."
        if any(found is not None and found.known for found in analysis.selected):
            note += " The right adapter is named by the data, or has the dataset’s name; ties count against it."
        parts.append(element("p", note, class_="key"))
    for number in range(len(analysis.runs)):
        content = _of_run(analysis, number)
        if len(analysis.runs) == 1:
            parts.append(content)
        else:
            name = tables.run_name(analysis, number)
            parts.append(element("details", element("summary", name), content, class_="of-run", open=number == 0))
    return "adapters", "Adapters", join(*parts)


def _of_run(analysis: Analysis, number: int) -> Html:
    """The pictures of one run."""
    parts: list[object] = []
    found, scene = analysis.weights[number], weights(analysis, number)
    if scene is not None and found is not None:
        told = _details("In words", tables.weights_table(found))
        left = f"{found.left_out} adapters with less weight, or none, are not shown." if found.left_out else None
        parts.append(tables.figure(scene, svg(scene), _reading(scene), left and element("p", left, class_="key"), told))
    alike, scene = analysis.similarity[number], similarity(analysis, number)
    if scene is not None and alike is not None:
        told = _details("In words", tables.similarity_table(alike))
        parts.append(tables.figure(scene, svg(scene), _reading(scene), told))
    spreads, scene = analysis.spread[number], spread(analysis, number)
    if scene is not None and spreads is not None:
        parts.append(tables.figure(scene, svg(scene), element("p", spread_words(spreads), class_="key")))
    if not parts:
        return element("p", "This run selected no adapters and scored none.", class_="notice")
    return element("div", *parts, class_="figures")


def _reading(scene: Scene) -> Html:
    """Where the script writes the field under the pointer."""
    hint = "Point at a field, or focus the picture and use the arrow keys, to read it."
    return element("p", hint, class_="reading", id=f"reading-{scene.name}", aria_live="polite", data_hint=hint)


def _time(analysis: Analysis) -> tuple[str, str, Html]:
    scene = time(analysis)
    note = (
        "Wall time, summed over datasets. Loading counts once for each process. Times compare only between runs on the "
        "same device with nothing else on it."
    )
    return (
        "time",
        "Time",
        join(tables.figure(scene, svg(scene)), tables.time_table(analysis), element("p", note, class_="key")),
    )


def _footer(analysis: Analysis) -> Html:
    folders = [element("li", element("code", run.folder)) for run in analysis.runs]
    note = (
        "Intervals: 95 %, bootstrap over instances, datasets kept as they are; they say how far numbers would move "
        "with other instances of the same datasets. Where all instances are worth the same, the interval is that "
        "point, which says too little."
    )
    return join(element("p", note), element("p", f"Made by logo {_version()} from:"), element("ul", *folders))


def _section(name: str, heading: str, content: Html) -> Html:
    title = element("h2", heading, id=f"{name}-title")
    return element("section", title, content, id=name, aria_labelledby=f"{name}-title")


def _details(summary: str, content: Html | None) -> Html | None:
    return None if content is None else element("details", element("summary", summary), content)


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _asset(name: str) -> str:
    return (resources.files(__package__) / "assets" / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _version() -> str:
    from logo import __version__

    return __version__
