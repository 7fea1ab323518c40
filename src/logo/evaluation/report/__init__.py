"""A report of runs, as `logo.evaluation.runs` reads them: `analyse`, then `page`, `pictures` and `png`, `latex`, or
`summary`."""

from logo.evaluation.report.analysis import Analysis, analyse, summary
from logo.evaluation.report.latex import latex
from logo.evaluation.report.page import page
from logo.evaluation.report.pictures import pictures
from logo.evaluation.report.png import png

__all__ = ["Analysis", "analyse", "latex", "page", "pictures", "png", "summary"]
