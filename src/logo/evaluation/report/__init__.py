"""A report of runs, as `logo.evaluation.runs` reads them: `analyse`, then `page`, `as_latex`, `as_markdown`, or
`summary`."""

from logo.evaluation.report.analysis import Analysis, analyse, summary
from logo.evaluation.report.page import page
from logo.evaluation.report.tables import as_latex, as_markdown

__all__ = ["Analysis", "analyse", "as_latex", "as_markdown", "page", "summary"]
