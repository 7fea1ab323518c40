"""`logo eval`: datasets through the engine, and what is made of the results."""

from __future__ import annotations

from logo.cli import compare, evaluate, lm_eval, report, study
from logo.cli.commands import Commands
from logo.cli.expanded import expanded
from logo.cli.options import EVALUATING

app = Commands(help="Evaluate on datasets; compare and report results.", no_args_is_help=True)


app.command("run")(expanded(evaluate.evaluate, defaults=EVALUATING))
app.command("compare")(compare.compare)
app.command("report")(report.report)
app.command("study")(study.study)
app.command("lm-eval", context_settings=lm_eval.CONTEXT)(lm_eval.lm_eval)
