"""`logo eval merge`: the shards of an evaluation put together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from logo.cli.scoreboard import Score, show


def merge_results(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="RESULTS",
            help="Shards' folders, or folders in which all shards are meant, of one machine or of several.",
            show_default=False,
        ),
    ],
    mix_environments: Annotated[
        bool,
        typer.Option(
            "--mix-environments", help="Shards may have run under several versions or on several kinds of device."
        ),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a whole result of another run.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the lines.")] = False,
) -> None:
    """Put the shards of an evaluation together: the same files as from a run that was never cut.

    Each whole result appears beside its first shard. All shards have to be there, once, and of one and the same run;
    they are left as they are.

    Example: `logo eval merge results`
    """
    from logo.evaluation.merging import find_shards, merge
    from logo.evaluation.resume import Wish

    scores = []
    for merged in merge(find_shards(folders), Wish(overwrite, mix_environments)):
        score = Score(merged.files["run.json"]["dataset"]["name"], merged.folder, merged.files)
        scores.append(score)
    if not json:
        for score in scores:
            heading = [score.dataset] if len(scores) > 1 else []
            print(*heading, score.line, score.folder, sep="\n", flush=True)
    show(scores, json=json)
