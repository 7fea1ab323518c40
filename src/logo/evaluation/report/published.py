"""Numbers that others have published, to stand beside ours where the experiment is the same.

`assets/published.json` holds only what was read in a source, and names that source. A number belongs to a base model, a
dataset, a measure, a selection and a number of adapters; all of them have to be the same. It comes without the answers
it was made from, so there is neither an interval nor a test.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from importlib import resources

from logo.evaluation.runs import Run


@dataclass(frozen=True)
class Published:
    """One number.

    Attributes:
        base_model: its name, the last part of its Hub id.
        dataset, metric: as ours are called.
        method: the signal by which LoGo selects, or another method's name.
        k: adapters in a mixture.
        value: a fraction of one.
        source: in which it was read, with the table where there is one; `url`: where that is.
    """

    base_model: str
    dataset: str
    metric: str
    method: str
    k: int
    value: float
    source: str
    url: str


def published(run: Run, dataset: str, metric: str) -> Published | None:
    """What was published of the experiment that a run has done, or None."""
    wanted = (run.base, dataset, metric, run.method, run.k)
    same = (one for one in known() if (one.base_model, one.dataset, one.metric, one.method, one.k) == wanted)
    return next(same, None)


@functools.cache
def known() -> tuple[Published, ...]:
    """All numbers that are shipped."""
    text = (resources.files(__package__) / "assets" / "published.json").read_text(encoding="utf-8")
    return tuple(Published(**entry) for entry in json.loads(text))
