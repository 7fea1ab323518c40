"""`logo eval shadow`: how what LoGo would select agrees with what the requests of a server have named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.text import Text

from logo.cli.output import one_line, out, plain_table, print_json
from logo.errors import UsageError

_SHOWN = 10


def shadow(log: list[Path], /, *, json: bool = False) -> None:
    """Show how a shadow's selections (logo serve --shadow FILE) agree with the adapters that requests have named.

    Example: logo eval shadow shadow.jsonl

    Args:
        log: Files that --shadow has written.
        json: Print JSON instead, with all rows of clear disagreement.
    """
    from logo.evaluation.shadow import CLEAR, read_log, review

    if not log:
        raise UsageError("expected a file that `logo serve --shadow FILE` has written, found none")
    report = review(*read_log(log))
    if json:
        print_json(report)
        return
    _say_agreement(report)
    _say_clear(report, CLEAR)
    _say_adapters(report, log)
    _say_threshold(report)


def _say_agreement(report: dict[str, Any]) -> None:
    rows = f"{report['rows']} requests: {report['named_one_adapter']} named one adapter"
    out.print(f"{rows}, {report['named_the_base_model']} the base model", highlight=False)
    if report["unreadable"]:
        out.print(f"lines that are none of a shadow, left out: {report['unreadable']}", highlight=False)
    if report["agreement"] is not None:
        low, high = report["interval"]
        share = f"{report['agreement']:.2f} ({low:.2f} to {high:.2f})"
        in_three = f"{report['in_first_three']:.2f}"
        out.print(
            f"the named adapter comes first for {share} of them, among the first three for {in_three}", highlight=False
        )
    if report["confusions"]:
        table = plain_table("named", "would be first", ">requests")
        for line in report["confusions"]:
            table.add_row(Text(line["named"]), Text(line["first"]), str(line["rows"]))
        out.print()
        out.print(table)


def _say_clear(report: dict[str, Any], clear: float) -> None:
    rows = report["clear"]
    out.print(f"\nother adapter with a probability of {clear:g} or more: {len(rows)} requests", highlight=False)
    if rows:
        table = plain_table("time", "named", "would be first", ">probability", "prompt")
        for row in rows[:_SHOWN]:
            prompt = one_line(row.get("prompt", ""), 48)
            named = row["named"] or "(base model)"
            table.add_row(row["time"], Text(named), Text(row["first"]), f"{row['probability']:.2f}", Text(prompt))
        out.print(table)
        if len(rows) > _SHOWN:
            out.print(f"and {len(rows) - _SHOWN} more (--json)", highlight=False)


def _say_adapters(report: dict[str, Any], log: list[Path]) -> None:
    table = plain_table("adapter", ">requests", ">agreement", ">confidence", "")
    for name, adapter in report["adapters"].items():
        confidence = "-" if adapter["confidence"] is None else f"{adapter['confidence']:.2f}"
        needs = "needs example prompts" if adapter["needs_examples"] else ""
        table.add_row(Text(name), str(adapter["rows"]), f"{adapter['agreement']:.2f}", confidence, needs)
    if report["adapters"]:
        out.print()
        out.print(table)
    if any(adapter["needs_examples"] for adapter in report["adapters"].values()):
        files = " ".join(map(str, log))
        advice = f"logo pool examples POOL --from-log {files} takes some of their prompts, if the log has prompts"
        out.print(advice, markup=False, highlight=False)


def _say_threshold(report: dict[str, Any]) -> None:
    threshold = report["threshold"]
    if threshold is None:
        out.print("\nno request has named the base model, so nothing says when it should answer", highlight=False)
        return
    out.print(
        f"\n--when-unsure base with unsure_below {threshold['unsure_below']:g} would answer {threshold['right']} of "
        f"{threshold['rows']} requests as named, {threshold['right_without']} without: {threshold['base']} by the base "
        f"model, which {threshold['base_named']} of them have named",
        highlight=False,
    )
