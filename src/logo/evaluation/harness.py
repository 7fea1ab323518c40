"""LoGo as a model of lm-evaluation-harness, so that every task of the harness can use per-document mixtures.

The harness makes three kinds of requests: the likelihood of a continuation after a context, the likelihood of a whole
text, and the generation after a context. Likelihoods can be compared only under the same mixture, so adapters are
selected once per document for all its requests, whatever their contexts (`common_text`). Tokenisation is that of the
harness's `hf` models, so that numbers can be compared. Importing this module registers the model as `logo`; see
`logo.cli.lm_eval`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from logo.core import Selection
from logo.engine import LoGo
from logo.errors import UsageError
from logo.prompts import MAX_NEW_TOKENS
from logo.scoring import Scored
from logo.version import __version__

UNKNOWN_CONTEXT = 2048  # tokens, where a model does not say how many it reads
_BATCHES = 8  # batches between two steps of a progress bar; rows are sorted by length, so more make no difference
_WORD = re.compile(r"\s*\S+")

T = TypeVar("T")
Mixture = Mapping[str, float]
Tokens = list[int]


@register_model("logo")  # type: ignore[misc, untyped-decorator, unused-ignore]
class LoGoLM(TemplateLM):  # type: ignore[misc]
    """A base model and a pool of adapters, mixed per document.

    Args:
        base_model: a Hub id, a folder, `demo`, or an official short name.
        adapters: a folder, or a Hub repository `org/name[/folder][@revision]`; None: the base model's own.
        batch_size: rows per forward pass, each with its own mixture.
        device: the harness passes `cuda:0` by default, which counts as `auto` on a machine without a GPU.
        max_gen_toks: new tokens if a task does not set them; None: 256, or half of the context if that is less.
        options: of `LoGo.from_pretrained`, by name: `k`, `signal`, `dtype`, ...

    Raises:
        UsageError: an option that does not exist or cannot be used.
        ModelError, PoolError, HubError: the model or the pool cannot be opened.
    """

    def __init__(
        self,
        base_model: str = "",
        adapters: str | None = None,
        *,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        max_gen_toks: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if not base_model:
            raise UsageError("--model_args: expected base_model=..., a Hub id, a folder or demo; found none")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UsageError("lm-eval: expected one process; start it without torchrun and accelerate launch")
        if "token" in options:
            raise UsageError("--model_args: token would be written to the results; set HF_TOKEN instead")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise UsageError(f"--batch_size {batch_size}: expected a number, 1 or more; LoGo does not find it itself")
        self.batch_size = int(batch_size)
        no_gpu = device is None or (device.startswith("cuda") and not torch.cuda.is_available())
        options = {"model_dir": "./hf_models", "device": "auto" if no_gpu else device} | options
        try:
            self.logo = LoGo.from_pretrained(base_model, adapters, **options)
        except UsageError as error:
            raise UsageError(f"--model_args: {error}") from None
        self._revision = options.get("revision") or "main"
        self._max_gen_toks = max_gen_toks
        self._weights: Counter[str] = Counter()  # sums over all selections
        self._selections = 0

    @property
    def tokenizer(self) -> Any:
        """The base model's tokenizer."""
        return self.logo.tokenizer

    @property
    def tokenizer_name(self) -> str:
        """The key of the harness's cache of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def max_length(self) -> int:
        """Number of tokens in the model's context."""
        return self.logo.prompts.context or UNKNOWN_CONTEXT

    @property
    def max_gen_toks(self) -> int:
        """New tokens, if a task does not set them."""
        return self._max_gen_toks or min(MAX_NEW_TOKENS, self.max_length // 2)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> Tokens:
        """Token ids of a text. By default, special tokens are added unless the text begins with the prefix token."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode(self.prefix_token_id))
        ids: Tokens = self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        return ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the base model's tokenizer writes it."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log likelihood of each continuation in nats, and whether it is what greedy decoding would write; all requests
        about one document under one mixture."""
        self._texts = document_texts(requests)
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return answers

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], Tokens, Tokens]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """`loglikelihood`, which calls this with the same requests, as texts and as token ids."""
        pairs = []
        for _texts, context, following in requests:
            room = self.max_length + 1 - len(following)  # the last token is not read
            if room < 1:
                raise UsageError(
                    f"a continuation has {len(following)} tokens, but the model reads {self.max_length} at once"
                )
            pairs.append((context[-room:], following))
        scored = self._scored(pairs, self._selected(self._texts, disable_tqdm), disable_tqdm)
        answers = [(score.log_likelihood, score.exact_match) for score in scored]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", request[0], answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log likelihood in nats of each whole text, every token once, with as much context as the model reads.

        Adapters are selected once per text, on the text itself.
        """
        texts = [request.args[0] for request in requests]
        parts: list[tuple[int, tuple[Tokens, Tokens]]] = []  # number of the text, context and continuation
        for number, text in enumerate(texts):
            windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            parts += [(number, make_disjoint_window(window)) for window in windows]
        mixtures = self._selected(texts, disable_tqdm)
        scored = self._scored([pair for _, pair in parts], [mixtures[number] for number, _ in parts], disable_tqdm)
        totals = [0.0] * len(texts)
        for (number, _), score in zip(parts, scored, strict=True):
            totals[number] += score.log_likelihood
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The generation after each context, up to the first of its `until` texts; greedy unless the task samples."""
        groups: dict[str, list[int]] = {}  # options as JSON -> requests that have them
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(number)
        answers: dict[int, str] = {}
        for numbers in groups.values():
            task_options = requests[numbers[0]].args[1]
            options = self._decoding(task_options)
            numbers.sort(key=lambda number: -len(requests[number].args[0]))
            for part in self._parts(numbers, "Generating", disable_tqdm):
                contexts = [requests[number].args[0] for number in part]
                generations = self.logo.generate(contexts, batch_size=self.batch_size, **options)
                self._count([generation.selection for generation in generations])
                for number, context, generation in zip(part, contexts, generations, strict=True):
                    answers[number] = generation.text
                    self.cache_hook.add_partial("generate_until", (context, task_options), generation.text)
        return [answers[number] for number in range(len(requests))]

    def get_model_info(self) -> dict[str, Any]:
        """The facts for the harness's record: the base model, the pool, and the settings of the mixture."""
        pool = self.logo.pool.sha256()
        model = self.logo.model
        means = {name: round(self._weights[name] / self._selections, 6) for name in pool if self._weights[name]}
        return {
            "model_num_parameters": model.num_parameters(),
            "model_dtype": model.dtype,
            "model_revision": self._revision,
            "model_sha": getattr(model.config, "_commit_hash", None) or "",
            "peft_sha": hashlib.sha256(json.dumps(pool).encode()).hexdigest(),
            "logo": {
                "version": __version__,
                "settings": {**asdict(self.logo.settings), "k": self.logo.k, "points": list(self.logo.points)},
                "pool": pool,
                "selections": self._selections,
                "mean_weights": means,
            },
        }

    def _selected(self, texts: Sequence[str], quiet: bool) -> list[Mixture]:
        """The mixture of each text; equal texts are selected once."""
        mixtures: dict[str, Mixture] = {}
        for part in self._parts(list(dict.fromkeys(texts)), "Selecting adapters", quiet):
            selections = self.logo.select(part, max_new_tokens=1, batch_size=self.batch_size)
            self._count(selections)
            mixtures |= {text: selection.mixture for text, selection in zip(part, selections, strict=True)}
        return [mixtures[text] for text in texts]

    def _count(self, selections: Sequence[Selection]) -> None:
        self._selections += len(selections)
        for selection in selections:
            self._weights.update(selection.mixture)

    def _scored(self, pairs: Sequence[tuple[Tokens, Tokens]], mixtures: Sequence[Mixture], quiet: bool) -> list[Scored]:
        scored: dict[int, Scored] = {}
        # Continuations of one context stay together, so that those of a single token are one row.
        order = sorted(range(len(pairs)), key=lambda i: (-len(pairs[i][0]), pairs[i][0]))
        for part in self._parts(order, "Scoring", quiet):
            pairs_of_part = [pairs[i] for i in part]
            mixtures_of_part = [mixtures[i] for i in part]
            scores = self.logo.score_pairs(pairs_of_part, mixtures_of_part, batch_size=self.batch_size)
            scored |= zip(part, scores, strict=True)
        return [scored[number] for number in range(len(pairs))]

    def _parts(self, items: Sequence[T], heading: str, quiet: bool) -> Iterator[list[T]]:
        """The items, some batches at a time, with a progress bar."""
        step = self.batch_size * _BATCHES
        with tqdm(total=len(items), desc=heading, disable=quiet) as bar:
            for start in range(0, len(items), step):
                yield list(items[start : start + step])
                bar.update(len(items[start : start + step]))

    def _decoding(self, task_options: Mapping[str, Any]) -> dict[str, Any]:
        """The options of `LoGo.generate` that do what a task asks."""
        options: dict[str, Any] = dict(normalize_gen_kwargs(dict(task_options), self.max_gen_toks))
        options |= {"stop": options.pop("until"), "max_new_tokens": options.pop("max_gen_toks")}
        dropped = {"max_length"}
        if not (options.get("do_sample") and options.get("temperature", 1.0)):
            options["do_sample"] = False
            dropped |= {"temperature", "top_p", "top_k"}
        return {name: value for name, value in options.items() if name not in dropped}


def document_texts(requests: Sequence[Any]) -> list[str]:
    """For each request the text that selects for its document.

    Args:
        requests: instances of the harness, each with a task's name, the number of a document, and (context,
            continuation) as arguments. One without a number is a document of its own.
    """
    documents: dict[object, list[tuple[str, str]]] = {}
    keys = [
        number if request.doc_id is None else (request.task_name, request.doc_id)
        for number, request in enumerate(requests)
    ]
    for key, request in zip(keys, requests, strict=True):
        documents.setdefault(key, []).append(request.args[:2])
    texts = {key: common_text(pairs) for key, pairs in documents.items()}
    return [texts[key] for key in keys]


def common_text(pairs: Sequence[tuple[str, str]]) -> str:
    """The common text of the requests of one document, given as (context, continuation), so that none is favoured:
    Winogrande puts each of two names into the blank and asks for the likelihood of the rest of the sentence.

    It is the words with which all contexts begin. Empty contexts are ignored, because a likelihood without context may
    be requested too; if no context has text, the continuations are used. If the words with which all requests end,
    continuations included, are longer, it is these; and if both ends differ, the first text.
    """
    texts = [context for context, _ in pairs if context.strip()] or [continuation for _, continuation in pairs]
    if len(set(texts)) == 1:
        return texts[0]
    begin = _common([_WORD.findall(text) for text in texts])
    end = _common([_WORD.findall(context + continuation)[::-1] for context, continuation in pairs])[::-1]
    return max("".join(begin), "".join(end).lstrip(), key=len) or texts[0]


def _common(lists: Sequence[list[str]]) -> list[str]:
    """The common beginning of all lists."""
    alike = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*lists, strict=False))
    return [column[0] for column in alike]
