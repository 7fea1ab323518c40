"""`logo eval merge`: the shards of an evaluation put together."""

from __future__ import annotations

from pathlib import Path

from logo.cli.options import Json, argument, usual
from logo.cli.scoreboard import Score, show


def merge_results(
    folders: list[Path] = argument(
        ...,
        metavar="RESULTS",
        help="Folders of shards, or folders that hold shards, of one machine or of several.",
        show_default=False,
    ),
    mix_environments: bool = usual(False, "Accept shards of several versions or kinds of device."),
    overwrite: bool = usual(False, "Replace a merged result of another run."),
    json: Json = False,
) -> None:
    """Merge the shards of an evaluation into the files that one process would have written.

    The merged result appears beside the first shard. All shards of the run have to be there, each once; they are not
    changed.

    Example: `logo eval merge results`
    """
    from logo.evaluation.merging import find_shards, merge
    from logo.evaluation.resume import ResumePolicy

    scores = []
    for merged in merge(find_shards(folders), ResumePolicy(overwrite, mix_environments)):
        score = Score(merged.files["run.json"]["dataset"]["name"], merged.folder, merged.files)
        scores.append(score)
    if not json:
        for score in scores:
            heading = [score.dataset] if len(scores) > 1 else []
            print(*heading, score.line, score.folder, sep="\n", flush=True)
    show(scores, json=json)
