"""`logo pool calibrate`: prepares a pool for the calibrated signal, and shows where it will be read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rich.bar import Bar
from rich.table import Table
from rich.text import Text

from logo.cli.opening import open_engine
from logo.cli.options import ModelOptions
from logo.cli.output import BAR, err, note, out, plain_table, print_json
from logo.cli.prompts import or_demo
from logo.errors import UsageError

if TYPE_CHECKING:
    from logo.engine import LoGo
    from logo.selection.calibration import Calibration


def calibrate(*, json: bool = False, pool: ModelOptions = ModelOptions()) -> None:
    """Run the calibration of a pool on neutral text, and choose the points where prompts are read.

    Other commands do this when they open a pool for the first time. This command does it in advance and prints the
    points and how large the adapters are beside the base model's weights.

    Example: logo pool calibrate --base-model Qwen/Qwen2.5-7B --adapters my/adapters

    Args:
        json: Print JSON instead.
    """
    from logo.selection.selector import USUAL_SIZE

    with err.status("Loading and calibrating ..."):
        logo = open_engine(pool, or_demo(pool))
        calibration = logo.calibrate()
    if calibration is None:
        raise UsageError(f"the signal {logo.settings.signal!r} needs no calibration; `calibrated` does")
    sizes = None if all(map(math.isnan, calibration.weight_norms)) else logo.scorer.selector.sizes
    if json:
        print_json(_report(logo, calibration, sizes))
        return
    if calibration.ranking:
        out.print(_table(calibration))
    read_from_cache = len(logo.names) - calibration.measured
    note(
        f"{len(logo.names)} adapters at {len(calibration.points)} points in {calibration.seconds:.1f} s "
        f"({calibration.measured} calibrated now, {read_from_cache} known already)"
    )
    if sizes is None:
        summary = f"unknown (the base model's weights are quantised or not at hand); each counts as {USUAL_SIZE}"
    else:
        summary = f"{fmean(sizes.values()):.3f} on average, {min(sizes.values()):.3f} to {max(sizes.values()):.3f}"
    note(f"size of the adapters: {summary}")


def _table(calibration: Calibration) -> Table:
    table = plain_table("point", ">contrast", "", "read")
    largest = max((contrast for _, contrast in calibration.ranking), default=0.0) or 1.0
    for point, contrast in calibration.ranking:
        bar = Bar(largest, 0, contrast, width=BAR, color="cyan")
        table.add_row(Text(point.name), f"{contrast:.2f}", bar, "✓" if point in calibration.points else "")
    return table


def _report(logo: LoGo, calibration: Calibration, sizes: Mapping[str, float] | None) -> dict[str, Any]:
    return {
        "signal": logo.settings.signal,
        "adapters": list(logo.names),
        "points": [point.name for point in calibration.points],
        "ranking": [{"point": point.name, "contrast": contrast} for point, contrast in calibration.ranking],
        "measured": calibration.measured,
        "sizes": sizes,
        "seconds": calibration.seconds,
    }
