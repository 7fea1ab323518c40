"""Published numbers, shown beside ours for the same experiment.

`assets/published.json` holds only numbers that were read in a source, and names that source. A number belongs to a base
model, a dataset, a measure, a selection and a number of adapters. All of them have to be equal, and the run has to do
what the authors did. The answers behind it are not available, so there is neither an interval nor a test.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from logo.errors import DataError, StorageError
from logo.evaluation.metrics import KINDS, measures
from logo.evaluation.runs import Run
from logo.evaluation.stored import Result

# Options that make a run another experiment if they have other values than these.
_USUAL = {
    **dict.fromkeys(("limit", "rows", "adapters", "weighting", "probe_text", "activation")),
    **dict.fromkeys(("on_bad_adapter", "unscorable"), "error"),
    "probe_context": "carry",
    "dtype": "float32",
    "max_new_tokens": 256,
}


@dataclass(frozen=True)
class Published:
    """One number.

    Attributes:
        base_model: its name, the last part of its Hub id.
        dataset, metric: by the names that this package uses.
        method: the signal by which LoGo selects, or another method's name.
        k: adapters in a mixture.
        value: a fraction of one.
        source: the publication, with the table if there is one; `url`: its address.
    """

    base_model: str
    dataset: str
    metric: str
    method: str
    k: int
    value: float
    source: str
    url: str


def published(run: Run, dataset: str, metric: str, numbers: Iterable[Published]) -> Published | None:
    """The published number of a run's experiment, or None."""
    if not _as_the_authors(run.results.get(dataset)):
        return None
    wanted = (run.base, dataset, metric, run.method, run.k)
    same = (one for one in numbers if (one.base_model, one.dataset, one.metric, one.method, one.k) == wanted)
    return next(same, None)


def _as_the_authors(result: Result | None) -> bool:
    """Whether a result is of all rows with the base model's own pool and the official preset; or it is of the authors'
    script, which writes no options."""
    if result is None or not result.run:
        return result is not None
    return result.options.get("preset") == "official" and all(
        result.options.get(name, usual) == usual for name, usual in _USUAL.items()
    )


CAVEAT = (
    "Published: what others report of the same base model, dataset, selection and k, beside runs of all rows with the "
    "official preset. It comes without the answers behind it, so there is no test between the two."
)


def shipped() -> tuple[Published, ...]:
    """The numbers that are part of the package."""
    return _numbers((resources.files(__package__) / "assets" / "published.json").read_text(encoding="utf-8"))


def read_published(file: Path) -> tuple[Published, ...]:
    """A user's own numbers, in a file like the one that is shipped.

    Raises:
        DataError: the file is missing, or holds something else.
        StorageError: it cannot be read.
    """
    try:
        return _numbers(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"published numbers {str(file)!r}: expected a file, found none") from None
    except OSError as error:
        raise StorageError(f"published numbers {str(file)!r}: cannot be read ({error.strerror or error})") from error
    except (ValueError, TypeError) as error:
        fields = ", ".join(field.name for field in dataclasses.fields(Published))
        raise DataError(
            f"published numbers {str(file)!r}: expected a JSON list of objects with {fields}, values from 0 to 1, "
            f"found something else ({error})"
        ) from None


def _numbers(text: str) -> tuple[Published, ...]:
    content = json.loads(text)
    if not isinstance(content, list):
        raise TypeError(f"{type(content).__name__}")
    known = list(dict.fromkeys(name for kind in KINDS for name in measures(kind)))
    found = tuple(Published(**entry) for entry in content)
    for number in found:
        texts = [value for name, value in vars(number).items() if name not in ("k", "value")]
        if not all(isinstance(text, str) for text in texts) or type(number.k) is not int:
            raise TypeError(f"{number.dataset!r} with k {number.k!r}")
        if number.metric not in known:
            raise ValueError(f"metric {number.metric!r}, which is none of {', '.join(known)}")
        if not isinstance(number.value, (int, float)) or not 0 <= number.value <= 1:
            raise TypeError(f"value {number.value!r}")
    return found
