"""Options that say which method selects adapters and how they are combined, and the `Method` they describe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from logo.cli.options import Choice

if TYPE_CHECKING:
    from logo.baselines import Method
    from logo.rows import Row

METHOD = "Method"
DEFAULT_EMBEDDING = "sentence-transformers/all-MiniLM-L6-v2"


class Sign(Choice):
    TOTAL = "total"
    FREQUENCY = "frequency"


class Variant(Choice):
    MIXTURE = "mixture"
    FUSION = "fusion"
    SELECTION = "selection"


@dataclass(frozen=True)
class MethodOptions:
    """Which method, and its own options."""

    method: Annotated[
        str,
        typer.Option(
            help="Who selects: `logo`, `base`, `uniform`, `random`, `oracle`, `best-single`, `lorahub`, "
            "`loraretriever`, `adaptersoup`, `lorauter`, `arrow`, `spectr` or `seqr`.",
            rich_help_panel=METHOD,
        ),
    ] = "logo"
    merge: Annotated[
        str | None,
        typer.Option(
            help="How selected adapters are combined: `mixture` (exact), `fusion`, `linear`, `ties`, `dare_linear`, "
            "`dare_ties`, or token by token `arrow`, `spectr` or `seqr`.",
            show_default="the method's: mixture; lorahub, adaptersoup: fusion",
            rich_help_panel=METHOD,
        ),
    ] = None
    merge_density: Annotated[
        float, typer.Option(help="Share of entries that `ties` and `dare` keep.", rich_help_panel=METHOD)
    ] = 0.5
    merge_sign: Annotated[
        Sign,
        typer.Option(
            help="How `ties` elects a sign: by the sum of the entries, or by the number of adapters.",
            rich_help_panel=METHOD,
        ),
    ] = Sign.TOTAL
    arrow_top_k: Annotated[
        int, typer.Option(help="Adapters per token and module of `arrow` and `spectr`.", rich_help_panel=METHOD)
    ] = 3
    arrow_temperature: Annotated[
        float, typer.Option(help="Temperature of the softmax of `arrow` and `spectr`.", rich_help_panel=METHOD)
    ] = 1.0
    shots: Annotated[
        int | None,
        typer.Option(
            help="Labelled rows to learn from; `lorauter`: of each task.",
            show_default="best-single: 16; lorahub: 5; lorauter: 8",
            rich_help_panel=METHOD,
        ),
    ] = None
    lorahub_budget: Annotated[
        int, typer.Option(help="Mixtures that `lorahub` tries per dataset.", rich_help_panel=METHOD)
    ] = 40
    retriever_variant: Annotated[
        Variant,
        typer.Option(
            help="`loraretriever`: mix the outputs of the k closest adapters, fuse their factors, or take the closest.",
            rich_help_panel=METHOD,
        ),
    ] = Variant.MIXTURE
    adapter_samples: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder of NAME.jsonl with rows of the training task of adapter NAME, for `loraretriever` and "
            "`adaptersoup`.",
            rich_help_panel=METHOD,
        ),
    ] = None
    validation_rows: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder of TASK.jsonl with labelled rows, by which `lorauter` finds similar tasks and tries adapters.",
            show_default="as --adapter-samples",
            rich_help_panel=METHOD,
        ),
    ] = None
    samples_per_adapter: Annotated[
        int, typer.Option(help="Number of rows to read from each of these files.", rich_help_panel=METHOD)
    ] = 20
    embedding_model: Annotated[
        str,
        typer.Option(help="Any sentence-transformers model: a folder or a Hub id.", rich_help_panel=METHOD),
    ] = DEFAULT_EMBEDDING
    embedding_instruction: Annotated[
        str, typer.Option(help="Instruction before every text that is embedded.", rich_help_panel=METHOD)
    ] = ""


def make_method(
    options: MethodOptions, *, k: int | None = None, seed: int = 0, held: Mapping[str, Sequence[Row]] | None = None
) -> Method:
    """The method that the options describe; reads the adapters' samples where the method asks for them.

    Args:
        k: adapters per prompt, where the user asked for a number; None: the method's own.
        seed: of everything random in it.
        held: labelled rows by name, which stand for samples and validation rows where no folder of them is named.

    Raises:
        UsageError: a method or merge that does not exist, or an option out of range.
        DataError: the samples are needed but cannot be used.
    """
    from logo.baselines import get_method
    from logo.baselines.registry import method_class

    kind = method_class(options.method)
    given: dict[str, Any] = {
        "merge": options.merge,
        "density": options.merge_density,
        "majority_sign": options.merge_sign.value,
        "arrow_top_k": options.arrow_top_k,
        "arrow_temperature": options.arrow_temperature,
        "seed": seed,
        "budget": options.lorahub_budget,
        "variant": options.retriever_variant.value,
        "embedding_model": options.embedding_model,
        "instruction": options.embedding_instruction,
    }
    given |= {name: value for name, value in (("k", k), ("rows", options.shots)) if value is not None}
    known = {field.name for field in fields(kind)}
    if "samples" in known:
        samples = {name: tuple(row.context for row in rows) for name, rows in (held or {}).items()}
        given["samples"] = samples if samples and options.adapter_samples is None else _samples(options)
    if "validation" in known:
        named = options.validation_rows or options.adapter_samples
        given["validation"] = held if held and named is None else _validation(options)
    return get_method(options.method, **{name: value for name, value in given.items() if name in known})


def _samples(options: MethodOptions) -> dict[str, tuple[str, ...]]:
    from logo.errors import UsageError
    from logo.evaluation.study import find_tasks

    if options.adapter_samples is None:
        raise UsageError(
            f"--method {options.method} compares prompts with samples of each adapter's training task: "
            "expected --adapter-samples DIR with NAME.jsonl for every adapter"
        )
    tasks = find_tasks(options.adapter_samples, limit=options.samples_per_adapter)
    return {task.name: tuple(row.context for row in task.rows) for task in tasks}


def _validation(options: MethodOptions) -> dict[str, tuple[Row, ...]]:
    from logo.errors import UsageError
    from logo.evaluation.study import find_tasks

    folder = options.validation_rows or options.adapter_samples
    if folder is None:
        raise UsageError(
            f"--method {options.method} needs labelled rows of tasks: expected --validation-rows DIR with TASK.jsonl "
            "for every task"
        )
    return {task.name: task.rows for task in find_tasks(folder)}
