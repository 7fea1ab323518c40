"""`Answerer`: an engine and a method that answer the rows of datasets, and judge the answers.

    rows -> prompts -> (method: a selection each) -> answers -> first lines -> values -> one record per row

A record is a line of `rows.jsonl` (`logo.evaluation.results`). It does not depend on the datasets before its own: the
seed is set and the engine forgets its prompts when a dataset begins.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from logo.baselines.method import Method, Prepared, Task
from logo.errors import HubError, LoGoError, StorageError, Unsure, UsageError
from logo.evaluation.metrics import METRICS, Value, answer_in, measure, zero
from logo.identity import (
    config_digest,
    fingerprint,
    library_versions,
    template_digest,
    tokenizer_digest,
    weights_digest,
)
from logo.prompts import preface
from logo.recorded import without_secrets
from logo.rows import Row
from logo.selection.signals import SIGNALS

if TYPE_CHECKING:
    from logo.core import Generation
    from logo.engine import LoGo
    from logo.evaluation.datasets import Dataset

LOGO = "logo"  # the method that is the engine's own selection


@dataclass(frozen=True)
class Facts:
    """What a result records of an engine, in a form that can be sent to another process.

    Attributes:
        identity: what answers depend on beside the rows: base model, pool, settings, method, generation.
        environment: what they were made on, and agree up to rounding: versions of libraries, the kind of device.
        settings: the settings as they were used; `signal`: the one that scores.
        order: why an answer depends on the rows before it, in words; None if it does not.
        device: in words.
    """

    identity: Mapping[str, Any]
    environment: Mapping[str, str]
    settings: Mapping[str, Any]
    signal: str
    order: str | None
    device: str


@dataclass(eq=False)
class Answerer:
    """An engine, the method that selects for it, and how answers are made.

    Attributes:
        logo: the engine; `base_model`: its model as the user names it.
        method: selects instead of the engine; None: the engine selects.
        max_new_tokens: of an answer.
        seed: of sampling.
        generation: further options of `LoGo.generate`.
        first_lines: judge the first line of every answer, as the official code does, whatever the gold texts are.
    """

    logo: LoGo
    base_model: str
    method: Method | None = None
    max_new_tokens: int = 256
    seed: int = 0
    generation: Mapping[str, Any] = field(default_factory=dict)
    first_lines: bool = False
    _prepared: tuple[str, Prepared] | None = None  # for the dataset of this name

    @cached_property
    def facts(self) -> Facts:
        """What a result records of this."""
        import torch

        logo = self.logo
        kinds = {torch.cuda.get_device_name(one) if one.type == "cuda" else one.type for one in logo.devices}
        device = ", ".join(sorted(kinds))
        method = {"method": LOGO} if self.method is None else self.method.as_dict()
        return Facts(
            identity={
                **engine_identity(logo, self.base_model, self.generation),
                **{"method": method, "seed": self.seed, "max_new_tokens": self.max_new_tokens},
            },
            environment={**library_versions(), **logo.versions, "device": device},
            settings={
                **asdict(logo.settings),
                **{"k": logo.k, "points": list(logo.points), "probe_context": logo.probe_context},
            },
            signal=logo.settings.signal,
            order=order_dependence(logo, self.generation),
            device=f"{logo.devices[0]} ({device})",
        )

    def answer(self, dataset: Dataset, block: range) -> tuple[list[dict[str, Any]], Mapping[str, Any]]:
        """The records of some consecutive rows, which are answered together; and what the method found out about the
        dataset, of which it learns first if it has to. A row that is refused has an error and no answer.

        Raises:
            UsageError, DataError: the dataset lacks what the method needs.
            StorageError, HubError, RuntimeError: the engine fails for other reasons than a row.
        """
        if self._prepared is None or self._prepared[0] != dataset.name:
            import torch

            torch.manual_seed(self.seed)
            self.logo.restart()
            self._prepared = None  # which may hold a model
            learnt = Prepared(None) if self.method is None else self.method.prepare(self.logo, task_of(dataset))
            self._prepared = dataset.name, learnt
        prepared = self._prepared[1]
        rows = dataset.rows[block.start : block.stop]
        whole, fronts = [row.whole and not self.first_lines for row in rows], [front_of(self.logo, row) for row in rows]
        how = {"max_new_tokens": self.max_new_tokens, **self.generation}
        how |= {"stop_at_newline": False} if any(whole) or any("\n" in front for front in fronts) else {}
        began = time.perf_counter()
        answers = self._answers(prepared, rows, how)
        seconds = (time.perf_counter() - began) / max(1, len(rows))
        done = zip(block, rows, answers, zip(whole, fronts, strict=True), strict=True)
        return [record(i, row, one, dataset.metric, seconds, *how) for i, row, one, how in done], prepared.record

    def _answers(self, prepared: Prepared, rows: Sequence[Row], how: Mapping[str, Any]) -> list[Generation | LoGoError]:
        """An answer to each row, or why there is none: if rows are refused together, each is asked alone."""
        if not rows:
            return []
        prompts = [row.prompt for row in rows]
        options = {"batch_size": len(prompts), **how}
        try:
            selections = None if prepared.select is None else prepared.select(prompts, len(prompts))
            return list((prepared.engine or self.logo).generate(prompts, adapters=selections, **options))
        except (StorageError, HubError):
            raise
        except LoGoError as error:
            if len(rows) == 1:
                return [error.with_traceback(None)]
        return [one for row in rows for one in self._answers(prepared, [row], how)]


def front_of(logo: LoGo, row: Row) -> str:
    """What the chat template writes in front of the answer to a row, and adapters have learned to write, as answers are
    decoded; nothing for a row that is refused."""
    front = None
    if not isinstance(row.prompt, str):
        with suppress(UsageError):
            [read] = logo.prompts.read([row.prompt], room=None)
            front = preface(logo.tokenizer, row.prompt, read.text or "")
    ids = logo.tokenizer(front or "", add_special_tokens=False)["input_ids"]
    return str(logo.tokenizer.decode(ids, skip_special_tokens=True))


def task_of(dataset: Dataset, among: Sequence[str] = ()) -> Task:
    """A dataset as a method may look at it; `among`: the adapters it may choose, empty: all."""
    rows = dataset.rows
    texts, targets = [row.context for row in rows], [row.adapter for row in rows]
    return Task(dataset.name, texts, lambda: dataset.train, targets, among)


def record(
    index: int, row: Row, answer: Generation | LoGoError, metric: str, seconds: float, whole: bool, front: str
) -> dict[str, Any]:
    """The line of `rows.jsonl` for a row: see `logo.evaluation.results`."""
    known: dict[str, Any] = {"index": index, "prompt": row.prompt, "completion": row.completion}
    known |= {"references": row.references, "target": row.adapter}
    if isinstance(answer, LoGoError):
        said = {"prediction": "", "value": zero(metric), "error": " ".join(str(answer).split())}
        said |= {"confidence": answer.confidence} if isinstance(answer, Unsure) else {}
        return {**known, **said, "selected": [], "weights": [], "scores": {}, "seconds": {"inference": seconds}}
    prediction, chosen = answer_in(answer.text, whole, front), answer.selection
    value: Value = measure(metric, prediction, row.completion)
    return {
        **known,
        **{"prediction": prediction, "value": value, "error": None},
        **{"selected": list(chosen.adapters), "weights": list(chosen.weights), "scores": dict(chosen.scores)},
        **{"confidence": chosen.confidence, "form": answer.form},
        "seconds": {"inference": seconds, **answer.seconds},
    }


# -- what answers depend on --------------------------------------------------------------------------------------------


def engine_identity(logo: LoGo, base_model: str, generation: Mapping[str, Any]) -> dict[str, Any]:
    """What an engine's answers depend on, as JSON: digests of what was loaded, and settings. Paths, the choice among
    equal devices and the batch size do not belong to it; a base model counts by a sample of its weights.

    Args:
        base_model: as the user names it; its last part counts.
        generation: options of `LoGo.generate`; a `generation_config` counts by its differences from transformers' own.
    """
    options, config = dict(generation), generation.get("generation_config")
    if config is not None:
        said = {name: value for name, value in config.to_diff_dict().items() if not name.startswith("_")}
        options["generation_config"] = {name: value for name, value in said.items() if name != "transformers_version"}
    plugin, configured = SIGNALS.definition(logo.settings.signal), getattr(logo.model, "generation_config", None)
    settings, pool = asdict(logo.settings), logo.pool.value
    found = {
        "base_model": PurePath(base_model).name,
        "weights": weights_digest(logo.model),
        "config": config_digest(logo.model.config),
        "eos_token_id": getattr(configured, "eos_token_id", None),
        **({"stop_strings": stops} if (stops := getattr(configured, "stop_strings", None)) else {}),
        "tokenizer": tokenizer_digest(logo.tokenizer),
        "template": template_digest(logo.tokenizer),
        "dtype": str(logo.model.dtype).removeprefix("torch."),
        "pool": {name: pool[name].key for name in logo.names},
        "settings": {name: value for name, value in settings.items() if name != "cache"}
        | {"probe_context": logo.probe_context, "k": logo.k, "points": list(logo.points), "merge": logo.merge},
        "truncation": asdict(logo.prompts.truncation),
        **({"engine_options": without_secrets(logo.engine_options)} if logo.engine_options else {}),
        "generation": options,
        **({} if plugin is None else {"plugin": plugin}),
    }
    plain: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return plain


def dataset_identity(dataset: Dataset, method: Method | None) -> dict[str, Any]:
    """What values depend on beside the engine: the rows, their metric, and training rows if a method learns."""
    plugin = METRICS.definition(dataset.metric)
    rows = {"rows": len(dataset.rows), "rows_sha256": rows_digest(dataset.rows)}
    learns = method is not None and method.needs == "train"
    return {
        **{"dataset": dataset.name, **rows, "metric": dataset.metric},
        **({} if plugin is None else {"metric_plugin": plugin}),
        **({"train_sha256": rows_digest(dataset.train)} if learns else {}),
    }


def rows_digest(rows: Sequence[Row]) -> str:
    """The SHA-256 of the content of rows, in hex."""
    return fingerprint({"rows": [row.as_dict() for row in rows]})


def order_dependence(logo: LoGo, generation: Mapping[str, Any]) -> str | None:
    """Why an answer depends on the rows before it, in a few words; None if it does not."""
    if logo.probe_context == "carry":
        return "--probe-context carry probes with the adapters of the row before"
    config = generation.get("generation_config")
    if generation.get("do_sample", False if config is None else config.do_sample):
        return "answers are sampled"
    return None


@dataclass(frozen=True)
class Opening:
    """What makes an `Answerer`, in this process or another one.

    Attributes:
        base_model, pool: of `LoGo.from_pretrained`, and its further `options`.
        method: selects instead of the engine; None: the engine selects.
        max_new_tokens, seed: as of `Answerer`.
        stop_at_newline: end an answer after its first line, unless gold texts have several.
    """

    base_model: str
    pool: str | None
    options: Mapping[str, Any]
    method: Method | None = None
    max_new_tokens: int = 256
    seed: int = 0
    stop_at_newline: bool = True

    def __call__(self) -> Answerer:
        """Loads the model and the pool; errors of `LoGo.from_pretrained`."""
        from logo.engine import LoGo

        logo = LoGo.from_pretrained(self.base_model, self.pool, **self.options)
        generation: dict[str, Any] = {"stop_at_newline": self.stop_at_newline}
        if official := self.options.get("preset") == "official":
            generation = {"stop_at_newline": "official" if self.stop_at_newline else False}
            generation["generation_config"] = logo.model.generation_config
        return Answerer(logo, self.base_model, self.method, self.max_new_tokens, self.seed, generation, official)
