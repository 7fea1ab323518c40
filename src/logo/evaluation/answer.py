"""`Answerer`: an engine and a method that answer the rows of datasets, and judge the answers.

    rows -> prompts -> (method: a selection each) -> generations -> answers -> values -> one record per row

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
from logo.evaluation.metrics import METRICS, answer_in, measure, zero
from logo.identity import (
    config_digest,
    fingerprint,
    library_versions,
    template_digest,
    tokenizer_digest,
    weights_digest,
)
from logo.prompts import around_answer, no_warnings_of_cuts
from logo.recorded import without_secrets
from logo.rows import Row
from logo.selection.encoder import encoder_digest
from logo.selection.signals import SIGNALS

if TYPE_CHECKING:
    from logo.core import Generation, Prompt
    from logo.engine import LoGo
    from logo.evaluation.datasets import Dataset

LOGO = "logo"  # the method that is the engine's own selection


@dataclass(frozen=True)
class Facts:
    """What a result records of an engine, in a form that can be sent to another process.

    Attributes:
        identity: what answers depend on beside the rows: base model, pool, settings, method, generation.
        environment: what they were made on, and agree up to rounding: versions of libraries, the kind of device.
        settings: the settings as they were used; `signal`: the one that scores, or the method that does instead.
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
        kinds = {
            torch.cuda.get_device_name(device) if device.type == "cuda" else device.type for device in logo.devices
        }
        devices = ", ".join(sorted(kinds))
        identity = engine_identity(logo, self.base_model, self.generation)
        identity["method"] = {"method": LOGO} if self.method is None else method_identity(self.method)
        identity |= {"seed": self.seed, "max_new_tokens": self.max_new_tokens}
        settings = asdict(logo.settings)
        settings |= {"k": logo.k, "points": list(logo.points), "probe_context": logo.probe_context}
        return Facts(
            identity=identity,
            environment={**library_versions(), **logo.versions, "device": devices},
            settings=settings,
            signal=logo.settings.signal if self.method is None else self.method.name,
            order=order_dependence(logo, self.generation),
            device=f"{logo.devices[0]} ({devices})",
        )

    def answer(self, dataset: Dataset, block: range) -> tuple[list[dict[str, Any]], Mapping[str, Any]]:
        """The records of some consecutive rows, which are answered together; and what the method found out about the
        dataset, of which it learns first if it has to. A row that is refused has an error and no answer.

        Raises:
            UsageError, DataError: the dataset lacks what the method needs.
            StorageError, HubError, RuntimeError: the engine fails for other reasons than a row.
        """
        prepared = self._prepared_for(dataset)
        rows = dataset.rows[block.start : block.stop]
        forms = [
            AnswerForm(row.whole and not self.first_lines, *around_answers_to(self.logo, row), self.first_lines)
            for row in rows
        ]
        began = time.perf_counter()
        outcomes = self._outcomes(prepared, rows, self._options(forms))
        seconds = (time.perf_counter() - began) / max(1, len(rows))
        records = [
            record(index, row, outcome, form, dataset.metric, seconds)
            for index, row, outcome, form in zip(block, rows, outcomes, forms, strict=True)
        ]
        for line in records:
            if prepared.routed and line["error"] is None:  # by the method's own engine, with weights that vary
                line["selected"] = list(prepared.routed)
                line["weights"] = [None] * len(prepared.routed)
        return records, prepared.record

    def _prepared_for(self, dataset: Dataset) -> Prepared:
        """The method as it is prepared for a dataset, before whose first row the engine begins anew."""
        if self._prepared is None or self._prepared[0] != dataset.name:
            import torch

            torch.manual_seed(self.seed)
            self.logo.restart()
            self._prepared = None  # which may hold a model
            prepared = Prepared(None) if self.method is None else self.method.prepare(self.logo, task_of(dataset))
            self._prepared = dataset.name, prepared
        return self._prepared[1]

    def _options(self, forms: Sequence[AnswerForm]) -> dict[str, Any]:
        """The options of `LoGo.generate` for answers of these forms, which are generated together."""
        options = {"max_new_tokens": self.max_new_tokens, **self.generation}
        if any(form.whole or "\n" in form.front for form in forms):
            options["stop_at_newline"] = False
        return options

    def _outcomes(self, prepared: Prepared, rows: Sequence[Row], options: Mapping[str, Any]) -> list[Outcome]:
        """What came of each row: if rows are refused together, each is asked alone."""
        if not rows:
            return []
        prompts = [row.prompt for row in rows]
        read: Sequence[Prompt] = ()
        try:
            with no_warnings_of_cuts():
                read = self.logo.prompts.read(prompts, self.max_new_tokens)
                selections = None if prepared.select is None else prepared.select(prompts, len(prompts))
            engine = prepared.engine or self.logo
            answers = engine.generate(read, adapters=selections, batch_size=len(read), **options)
            return [Outcome(answer, prompt.cut) for answer, prompt in zip(answers, read, strict=True)]
        except (StorageError, HubError):
            raise
        except LoGoError as error:
            if len(rows) == 1:
                return [Outcome(error.with_traceback(None), read[0].cut if read else 0)]
        return [outcome for row in rows for outcome in self._outcomes(prepared, [row], options)]


@dataclass(frozen=True)
class AnswerForm:
    """How an answer is read from a generated text: `whole`, or its first line alone, between the `front` and
    the `end` that the chat template writes; `official`: as the official code takes the first line."""

    whole: bool
    front: str
    end: str
    official: bool


@dataclass(frozen=True)
class Outcome:
    """What came of a row: an answer, or why there is none; and how many tokens of its prompt were cut."""

    answer: Generation | LoGoError
    cut: int = 0


def around_answers_to(logo: LoGo, row: Row) -> tuple[str, str]:
    """What the chat template writes in front of the answer to a row and behind it, and adapters have learned to write,
    as answers are decoded; nothing for a row that is refused."""
    around = None
    if not isinstance(row.prompt, str):
        with suppress(UsageError):
            [read] = logo.prompts.read([row.prompt], room=None)
            around = around_answer(logo.tokenizer, row.prompt, read.text or "")
    front, end = around or ("", "")
    return _decoded(logo, front), _decoded(logo, end)


def _decoded(logo: LoGo, text: str) -> str:
    """A text as it is decoded in an answer: without special tokens."""
    ids = logo.tokenizer(text, add_special_tokens=False)["input_ids"]
    return str(logo.tokenizer.decode(ids, skip_special_tokens=True))


def task_of(dataset: Dataset, among: Sequence[str] = ()) -> Task:
    """A dataset as a method may look at it; `among`: the adapters it may choose, empty: all."""
    prompts = [row.context for row in dataset.rows]
    targets = [row.adapter for row in dataset.rows]
    return Task(dataset.name, prompts, lambda: dataset.train, targets, among)


def record(index: int, row: Row, outcome: Outcome, form: AnswerForm, metric: str, seconds: float) -> dict[str, Any]:
    """The line of `rows.jsonl` for a row: see `logo.evaluation.results`."""
    line: dict[str, Any] = {
        "index": index,
        "prompt": row.prompt,
        "completion": row.completion,
        "references": row.references,
        "target": row.adapter,
        "cut": outcome.cut,
    }
    answer = outcome.answer
    if isinstance(answer, LoGoError):
        line |= {"prediction": "", "value": zero(metric), "error": " ".join(str(answer).split())}
        if isinstance(answer, Unsure):
            line |= {"error": answer.reason, "confidence": answer.confidence}
        return {**line, "selected": [], "weights": [], "scores": {}, "seconds": {"inference": seconds}}
    prediction = answer_in(answer.text, form.whole, form.front, form.end, official=form.official)
    selection = answer.selection
    return {
        **line,
        "prediction": prediction,
        "value": measure(metric, prediction, row.completion),
        "error": None,
        "selected": list(selection.adapters),
        "weights": list(selection.weights),
        "scores": dict(selection.scores),
        "confidence": selection.confidence,
        "form": answer.form,
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
    configured = getattr(logo.model, "generation_config", None)  # by which the checkpoint's own answers end
    settings = {name: value for name, value in asdict(logo.settings).items() if name != "cache"}
    settings |= {"probe_context": logo.probe_context, "k": logo.k, "points": list(logo.points), "merge": logo.merge}
    if logo.settings.encoder is not None:
        settings["encoder"] = encoder_digest(logo.settings.encoder)
    identity: dict[str, Any] = {
        "base_model": PurePath(base_model).name,
        "weights": weights_digest(logo.model),
        "config": config_digest(logo.model.config),
        "eos_token_id": getattr(configured, "eos_token_id", None),
        "tokenizer": tokenizer_digest(logo.tokenizer),
        "template": template_digest(logo.tokenizer),
        "dtype": str(logo.model.dtype).removeprefix("torch."),
        "pool": {name: logo.pool.value[name].key for name in logo.names},
        "settings": settings,
        "truncation": asdict(logo.prompts.truncation),
        "generation": _generation_identity(generation),
    }
    optional = {
        "stop_strings": getattr(configured, "stop_strings", None),
        "engine_options": without_secrets(logo.engine_options),
        "plugin": SIGNALS.definition(logo.settings.signal),
    }
    identity |= {name: value for name, value in optional.items() if value}
    plain: dict[str, Any] = json.loads(json.dumps(identity, default=str))
    return plain


def method_identity(method: Method) -> dict[str, Any]:
    """What a method's answers depend on, as JSON: its name and options; a text encoder counts by its digest."""
    options = method.as_dict()
    if options.get("embedding_model"):
        options["embedding_model"] = encoder_digest(str(options["embedding_model"]))
    plain: dict[str, Any] = json.loads(json.dumps(options, default=str))
    return plain


def _generation_identity(generation: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `LoGo.generate`, with what a `generation_config` has changed in place of the object."""
    config = generation.get("generation_config")
    if config is None:
        return dict(generation)
    changes = {
        name: value
        for name, value in config.to_diff_dict().items()
        if name != "transformers_version" and not name.startswith("_")
    }
    return {**generation, "generation_config": changes}


def dataset_identity(dataset: Dataset, method: Method | None) -> dict[str, Any]:
    """What values depend on beside the engine: the rows, their metric, and training rows if a method learns."""
    identity: dict[str, Any] = {
        "dataset": dataset.name,
        "rows": len(dataset.rows),
        "rows_sha256": rows_digest(dataset.rows),
        "metric": dataset.metric,
    }
    plugin = METRICS.definition(dataset.metric)
    if plugin is not None:
        identity["metric_plugin"] = plugin
    if method is not None and method.needs == "train":
        identity["train_sha256"] = rows_digest(dataset.train)
    return identity


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
        official = self.options.get("preset") == "official"
        generation: dict[str, Any] = {"stop_at_newline": self.stop_at_newline}
        if official:
            generation["generation_config"] = logo.model.generation_config
            if self.stop_at_newline:
                generation["stop_at_newline"] = "official"
        return Answerer(logo, self.base_model, self.method, self.max_new_tokens, self.seed, generation, official)
