"""A report of result folders: `read_runs`, then `analyse`, then `page`, `pictures` and `png`, `latex`, `summary`."""

from logo.evaluation.report.analysis import Analysis, analyse, summary
from logo.evaluation.report.latex import latex
from logo.evaluation.report.page import page
from logo.evaluation.report.pictures import pictures
from logo.evaluation.report.png import png
from logo.evaluation.report.results import Result, Run, read_runs

__all__ = ["Analysis", "Result", "Run", "analyse", "latex", "page", "pictures", "png", "read_runs", "summary"]
