"""`best-single`: the adapter that does best on a few labelled rows of a dataset, for all of its prompts."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING

from logo.baselines.method import Example, Prepared, Task, register_method, same_for_all
from logo.errors import DataError, UsageError
from logo.scoring import encoded

if TYPE_CHECKING:
    from logo.engine import LoGo

_TOGETHER = 32  # adapters that one call scores, each alone: the tensors of so many are in memory at once


@register_method(needs="train", picks=1)
def best_single(logo: LoGo, task: Task, *, rows: int = 16, seed: int = 0) -> Prepared:
    """The adapter with most exact matches on `rows` training rows, teacher-forced; among equal ones that with the lower
    loss. Rows are drawn with the seed; all are taken if there are fewer.

    Raises:
        DataError: there are no training rows, or one cannot be scored.
    """
    pairs = labelled(logo, task, rows, seed)
    names = task.candidates(logo)
    table: dict[str, dict[str, float]] = {}
    for start in range(0, len(names), _TOGETHER):
        adapters = names[start : start + _TOGETHER]
        mixtures = [{name: 1.0} for name in adapters]
        scores_of_rows = [
            logo.score_pairs([pair] * len(adapters), mixtures, batch_size=len(adapters)) for pair in pairs
        ]
        for name, scores in zip(adapters, zip(*scores_of_rows, strict=True), strict=True):
            table[name] = {
                "exact_match": sum(score.exact_match for score in scores) / len(scores),
                "nll": sum(score.nll for score in scores) / len(scores),
            }
    best = min(table, key=lambda name: (-table[name]["exact_match"], table[name]["nll"]))
    return Prepared(same_for_all({best: 1.0}), {"adapter": best, "rows": len(pairs), "table": table})


def labelled(logo: LoGo, task: Task, count: int, seed: int) -> list[tuple[list[int], list[int]]]:
    """The token ids of prompt and gold text of `count` training rows, drawn with the seed; of all if there are fewer.

    Raises:
        DataError: there are none, or one cannot be scored.
    """
    rows: Sequence[Example] = list(task.train())
    drawn = Random(seed).sample(rows, min(count, len(rows)))
    try:
        return [_tokens(logo, row) for row in drawn]
    except UsageError as error:
        raise DataError(f"dataset {task.name!r}: a train row cannot be scored: {error}") from error


def _tokens(logo: LoGo, row: Example) -> tuple[list[int], list[int]]:
    gold = row.completion if isinstance(row.completion, str) else row.completion[0]
    prompt, tokens = encoded(logo.prompts, row.prompt, gold)
    return list(prompt.ids), tokens
