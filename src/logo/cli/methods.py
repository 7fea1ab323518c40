"""Options that say which method selects adapters, and the `Method` that they describe."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from logo.cli.choices import Variant
from logo.cli.options import rare, usual
from logo.errors import UsageError
from logo.rows import Row

if TYPE_CHECKING:
    from logo.baselines import Method

METHOD = "Method"
DEFAULT_EMBEDDING = "sentence-transformers/all-MiniLM-L6-v2"
_method = functools.partial(rare, panel=METHOD)


@dataclass(frozen=True)
class MethodOptions:
    """Which method, and its own options."""

    method: str = usual(
        "logo",
        "`logo`, `base`, `uniform`, `random`, `oracle`, `best-single`, `lorahub` or `loraretriever`.",
    )
    shots: int | None = _method(None, "Labelled rows to learn from.", "best-single: 16; lorahub: 5")
    lorahub_budget: int = _method(40, "Mixtures that `lorahub` tries per dataset.")
    retriever_variant: Variant = _method(
        "mixture",
        "`loraretriever`: mix the outputs of the k closest adapters, or take the closest.",
    )
    adapter_samples: Path | None = _method(
        None, "Folder of NAME.jsonl with rows of the training task of adapter NAME, for `loraretriever`.", metavar="DIR"
    )
    samples_per_adapter: int = _method(
        20, "Number of rows to read from each of these files, or of the held-out ones, as samples."
    )
    embedding_model: str = _method(DEFAULT_EMBEDDING, "Any sentence-transformers model: a folder or a Hub id.")
    embedding_instruction: str = _method("", "Instruction before every text that is embedded.")


def make_method(
    options: MethodOptions, *, k: int | None = None, seed: int = 0, held: Mapping[str, Sequence[Row]] | None = None
) -> Method:
    """The method that the options describe; reads the adapters' samples where the method asks for them.

    Args:
        k: adapters per prompt, where the user asked for a number; None: the method's own.
        seed: of everything random in it.
        held: labelled rows by name, which serve as samples if no folder of them is named.

    Raises:
        UsageError: a method that does not exist, or an option out of range.
        DataError: the samples are needed but cannot be used.
    """
    from logo.baselines import get_method
    from logo.baselines.registry import method_class

    kind = method_class(options.method)
    given: dict[str, Any] = {
        "seed": seed,
        "budget": options.lorahub_budget,
        "variant": options.retriever_variant,
        "embedding_model": options.embedding_model,
        "instruction": options.embedding_instruction,
    }
    given |= {name: value for name, value in (("k", k), ("rows", options.shots)) if value is not None}
    known = {field.name for field in fields(kind)}
    if "samples" in known:
        count = options.samples_per_adapter
        samples = {name: tuple(row.context for row in rows[:count]) for name, rows in (held or {}).items()}
        given["samples"] = samples if samples and options.adapter_samples is None else _samples(options)
    return get_method(options.method, **{name: value for name, value in given.items() if name in known})


def _samples(options: MethodOptions) -> dict[str, tuple[str, ...]]:
    from logo.evaluation.datasets import find_datasets

    if options.adapter_samples is None:
        raise UsageError(
            f"--method {options.method} compares prompts with samples of each adapter's training task: "
            "expected --adapter-samples DIR with NAME.jsonl for every adapter"
        )
    tasks = find_datasets(options.adapter_samples, limit=options.samples_per_adapter, answers=False)
    return {task.name: tuple(row.context for row in task.rows) for task in tasks}
