"""The report as one self-contained HTML page: no network, no other files, and no script for its tables.

The layout is in `templates`, which escape all text. The page's content security policy allows its own style and script
by their hashes, and its empty icon from a `data:` URI. All data for the script goes through `payload`.
"""

from __future__ import annotations

import base64
import hashlib
import re
from importlib import resources
from typing import TYPE_CHECKING

from logo import __version__
from logo.errors import need
from logo.evaluation.report import tables
from logo.evaluation.report.analysis import Analysis
from logo.evaluation.report.payload import blocks
from logo.evaluation.tables import counted

if TYPE_CHECKING:
    from jinja2 import Environment

LONGEST_TITLE = 60  # characters of the runs' names
# Not allowed in HTML, and half of a surrogate pair is no character at all.
_FORBIDDEN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


def page(analysis: Analysis, title: str | None = None) -> str:
    """The whole page.

    Args:
        title: its heading; None: the base models and the runs.
    """
    templates = environment()
    from markupsafe import Markup  # which comes with Jinja2

    style, script = _asset("page.css"), _asset("page.js")
    policy = (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )
    sections = {"overview": "Overview", "datasets": "Datasets", "versus": "Head to head", "adapters": "Adapters"}
    sections |= {"time": "Time", "instances": "Instances"}
    if not analysis.versus:
        del sections["versus"]
    best = [n for n, cell in enumerate(analysis.overall.cells) if cell is not None and cell.mark == "best"]
    return templates.get_template("page.html").render(
        analysis=analysis,
        title=title or title_of(analysis),
        version=__version__,
        policy=policy,
        style=Markup(style),
        script=Markup(script),
        blocks=blocks(analysis),
        sections=sections,
        best=best[0] if best else None,
        tables=tables,
    )


def environment() -> Environment:
    """The environment of the templates. Text that is not markup already is escaped, so data cannot become markup.
    Fractions are written with at most two digits after the point.

    Raises:
        MissingLibrary: Jinja2 is not installed.
    """
    need("a report's page", "jinja2")
    from jinja2 import Environment, PackageLoader, StrictUndefined

    found = Environment(
        loader=PackageLoader("logo.evaluation.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        finalize=_shown,
    )
    found.globals.update(counted=counted, spaced=tables.spaced)
    return found


def title_of(analysis: Analysis) -> str:
    """The title, such as `Gemma-2B: norm, entropy`, with the number of runs instead of names that are too long."""
    bases = list(dict.fromkeys(run.base for run in analysis.runs if run.base))
    base = ", ".join(bases[:3]) + (" and others" if len(bases) > 3 else "")
    what = ", ".join(analysis.labels)
    if len(what) > LONGEST_TITLE:
        what = f"{len(analysis.labels)} runs"
    return f"{base}: {what}" if base else what


def _shown(value: object) -> object:
    """A value as a template writes it, before it is escaped."""
    if isinstance(value, float):
        return f"{round(value, 2) + 0.0:.2f}".rstrip("0").rstrip(".")  # + 0.0: no negative zero
    return _FORBIDDEN.sub("\ufffd", value) if type(value) is str else value


def _asset(name: str) -> str:
    return (resources.files(__package__) / "assets" / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
