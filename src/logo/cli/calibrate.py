"""`logo calibrate`: prepares a pool for the calibrated signal, and shows where it will be read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from logo.cli.opening import open_engine
from logo.cli.options import EngineOptions, expanded
from logo.cli.output import bar, err, note, out, print_json
from logo.cli.prompts import or_demo
from logo.errors import UsageError

if TYPE_CHECKING:
    from logo.engine import LoGo
    from logo.selection.calibrator import Calibrated


@expanded
def calibrate(
    engine: EngineOptions,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Let every adapter of a pool hear neutral text once, and choose the points where prompts are read.

    Other commands do this by themselves when they meet a pool for the first time; here it can be done ahead, looked at,
    and overridden with `--probe-points`.

    Example: `logo calibrate --base-model Qwen/Qwen2.5-7B --adapters my/adapters --probe-depth 0.5`
    """
    engine, base_model = or_demo(engine)
    with err.status("Loading and calibrating ..."):
        logo = open_engine(engine, base_model)
    calibrated = logo.router.calibrated
    if calibrated is None:
        raise UsageError(f"the signal {logo.settings.signal!r} needs no calibration; `calibrated` and `norm_z` do")
    if json:
        print_json(_report(logo, calibrated))
        return
    if calibrated.ranking:
        out.print(_table(calibrated))
    known = len(logo.names) - calibrated.listened
    note(
        f"{len(logo.names)} adapters at {len(calibrated.points)} points in {calibrated.seconds:.1f} s "
        f"({calibrated.listened} listened to, {known} known already)"
    )
    if calibrated.file is not None:
        note(f"written to {calibrated.file}; read other points with --probe-points")


def _table(calibrated: Calibrated) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("point")
    table.add_column("contrast", justify="right")
    table.add_column("")
    table.add_column("read")
    most = max((value for _, value in calibrated.ranking), default=0.0) or 1.0
    for point, value in calibrated.ranking:
        read = "✓" if point in calibrated.points else ""
        table.add_row(Text(point.name), f"{value:.2f}", Text(bar(value / most), style="cyan"), read)
    return table


def _report(logo: LoGo, calibrated: Calibrated) -> dict[str, Any]:
    return {
        "signal": logo.settings.signal,
        "adapters": list(logo.names),
        "points": [point.name for point in calibrated.points],
        "ranking": [{"point": point.name, "contrast": value} for point, value in calibrated.ranking],
        "listened": calibrated.listened,
        "seconds": calibrated.seconds,
        "file": None if calibrated.file is None else str(calibrated.file),
    }
