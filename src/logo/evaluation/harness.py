"""LoGo as a model of lm-evaluation-harness, so that every task of the harness can use per-document mixtures.

The harness makes three kinds of requests: the likelihood of a continuation after a context, the likelihood of a whole
text, and the generation after a context. Adapters are selected once per document for all its requests, whatever their
contexts (`logo.evaluation.documents`); a text without context is its own document. Tokenisation is that of the
harness's `hf` models, so that numbers can be compared. Importing this module registers the model as `logo`; see
`logo.cli.lm_eval`.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from logo import __version__
from logo.adapters.pool import open_pool
from logo.adapters.sources import OnBadAdapter
from logo.decoding import batches_by_length
from logo.engine import LoGo
from logo.errors import UsageError, closest
from logo.evaluation.documents import document_texts
from logo.evaluation.identity import pool_digests
from logo.evaluation.ranks import Ranks
from logo.models import load_config
from logo.opening import LOADING_OPTIONS, LOCAL_OPTIONS
from logo.prompts import MAX_NEW_TOKENS
from logo.scoring import Scored
from logo.selection.settings import SelectionSettings

UNKNOWN_CONTEXT = 2048  # tokens, where a model does not say how many it reads
_BATCHES = 8  # batches between two steps of a progress bar; rows are sorted by length, so more make no difference

Mixture = Mapping[str, float]


@register_model("logo")  # type: ignore[misc, untyped-decorator, unused-ignore]
class LoGoLM(Ranks):
    """A base model and a pool of adapters, mixed per document.

    Args:
        base_model: as `logo --base-model`: a Hub id, a folder, `demo`, or an official short name.
        adapters: a folder, or a Hub repository `org/name[/folder][@revision]`; None: the base model's own.
        k: adapters per document; None: the pool's own number, which is 20 (demo: 3), or all of a smaller pool.
        signal: what scores adapters.
        batch_size: rows per forward pass, each with its own mixture.
        device: `auto`, `cpu`, `cuda:0`, ..., if this process is alone; several processes get one each. The harness
            passes `cuda:0` by default, which counts as `auto` on a machine without a GPU.
        max_gen_toks: new tokens if a task does not set them; None: 256, or half of the context if that is less.
        model_dir: folder that is searched first for base models and adapters.
        on_bad_adapter: `error`, or `skip` those that cannot be used.
        allow_pickle: read `adapter_model.bin` too, tensors only.
        options: all other options of `LoGo.from_pretrained` and `SelectionSettings`, by name.

    Raises:
        UsageError: an option that does not exist or cannot be used.
        ModelError, PoolError, HubError: the model or the pool cannot be opened.
    """

    def __init__(
        self,
        base_model: str = "",
        adapters: str | None = None,
        *,
        k: int | None = None,
        signal: str = "calibrated",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        max_gen_toks: int | None = None,
        model_dir: str = "./hf_models",
        on_bad_adapter: OnBadAdapter = "error",
        allow_pickle: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        _check_options(options)
        if not base_model:
            raise UsageError("--model_args: expected base_model=..., a Hub id, a folder or demo; found none")
        self.batch_size = _batch_size(batch_size)
        settings = SelectionSettings(
            signal=signal, **{name: options.pop(name) for name in _SETTINGS.intersection(options)}
        )
        load_config(base_model, model_dir=model_dir)  # may it be read?
        pool = open_pool(
            adapters,
            base_model,
            model_dir,
            on_bad_adapter=on_bad_adapter,
            allow_pickle=allow_pickle,
            examples=settings.examples,
            verify=True if on_bad_adapter == "skip" else None,
        )
        self.logo = LoGo.from_pretrained(
            base_model,
            pool,
            device=_device(device) if self.accelerator is None else str(self.accelerator.device),
            model_dir=model_dir,
            on_bad_adapter=on_bad_adapter,
            **options,
            **{**vars(settings), "k": k},
        )
        self._device = self.logo.model.device
        self._revision = options.get("revision") or "main"
        self._max_gen_toks = max_gen_toks
        self._mixtures: dict[tuple[str, int | None], Mixture] = {}  # by `_keys`
        self._documents: list[str] = []  # parallel to the requests that are being scored

    # -- tokens -------------------------------------------------------------------------------------------------------

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

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text. By default, special tokens are added unless the text begins with the prefix token."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode(self.prefix_token_id))
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
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

    # -- what the harness asks ----------------------------------------------------------------------------------------

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log likelihood of each continuation in nats, and whether it is what greedy decoding would write; all requests
        about one document under one mixture."""
        self._documents = document_texts(requests)
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """`loglikelihood`, which calls this with the same requests.

        Args:
            requests: (context, continuation) as text, and the token ids of both.
        """
        mixtures = self._select(self._documents, disable_tqdm)
        pairs = [(self._cut(context, len(following)), following) for _, context, following in requests]
        scored = self._score(pairs, mixtures, disable_tqdm)
        answers = [(found.log_likelihood, found.exact_match) for found in scored]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", request[0], answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log likelihood in nats of each whole text, every token once, with as much context as the model reads.

        Adapters are selected once per text, on the text itself.
        """
        texts = [request.args[0] for request in requests]
        mixtures = self._select(texts, disable_tqdm)
        pairs: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        for number, text in enumerate(texts):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            parts = [make_disjoint_window(window) for window in windows]
            pairs += parts
            owners += [number] * len(parts)
        totals = [0.0] * len(texts)
        scored = self._score(pairs, [mixtures[owner] for owner in owners], disable_tqdm)
        for owner, found in zip(owners, scored, strict=True):
            totals[owner] += found.log_likelihood
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The generation after each context, up to the first of its `until` texts; greedy unless the task samples."""
        contexts = [request.args[0] for request in requests]
        groups: dict[str, list[int]] = {}  # options as JSON -> requests that have them
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(number)
        answers: dict[int, str] = {}
        with tqdm(total=len(contexts), desc="Generating", disable=disable_tqdm) as bar:
            for numbers in groups.values():
                asked = requests[numbers[0]].args[1]
                options = self._decoding(asked)
                wanted = [contexts[number] for number in numbers]
                mixtures = dict(
                    zip(numbers, self._select(wanted, disable_tqdm, options["max_new_tokens"]), strict=True)
                )
                for part in batches_by_length(list(map(len, wanted)), self.batch_size * _BATCHES):
                    chosen = [numbers[i] for i in part]
                    found = self.logo.generate(
                        [contexts[i] for i in chosen],
                        adapters=[mixtures[i] for i in chosen],
                        batch_size=self.batch_size,
                        **options,
                    )
                    for number, answer in zip(chosen, found, strict=True):
                        answers[number] = answer.text
                        self.cache_hook.add_partial("generate_until", (contexts[number], asked), answer.text)
                    bar.update(len(part))
        return [answers[number] for number in range(len(contexts))]

    def get_model_info(self) -> dict[str, Any]:
        """The facts for the harness's record: the base model, the pool, and the settings of the mixture."""
        pool = pool_digests(self.logo)
        used = list(self._mixtures.values())
        weights = {name: sum(mixture.get(name, 0.0) for mixture in used) / max(1, len(used)) for name in pool}
        points = list(self.logo.points)
        return {
            "model_num_parameters": self.logo.model.num_parameters(),
            "model_dtype": self.logo.model.dtype,
            "model_revision": self._revision,
            "model_sha": getattr(self.logo.model.config, "_commit_hash", None) or "",
            "peft_sha": hashlib.sha256(json.dumps(pool).encode()).hexdigest(),
            "logo": {
                "version": __version__,
                "settings": {**asdict(self.logo.settings), "k": self.logo.k, "points": points},
                "pool": pool,
                "texts": len({text for text, _ in self._mixtures}),
                "mean_weights": {name: round(weight, 6) for name, weight in weights.items() if weight},
            },
        }

    # -- how ----------------------------------------------------------------------------------------------------------

    def _select(self, texts: Sequence[str], quiet: bool, max_new_tokens: int = 1) -> list[Mixture]:
        """The mixture of each text; those that were seen before are not selected again.

        Args:
            max_new_tokens: length of the answers, for which a text that is too long is cut to leave room.
        """
        keys = self._keys(list(dict.fromkeys(texts)), max_new_tokens)
        new = [text for text, key in keys.items() if key not in self._mixtures]
        with tqdm(total=len(new), desc="Selecting adapters", disable=quiet or not new) as bar:
            step = self.batch_size * _BATCHES
            for start in range(0, len(new), step):
                part = new[start : start + step]
                selections = self.logo.select(part, max_new_tokens=max_new_tokens, batch_size=self.batch_size)
                self._mixtures |= {keys[text]: found.mixture for text, found in zip(part, selections, strict=True)}
                bar.update(len(part))
        return [self._mixtures[keys[text]] for text in texts]

    def _keys(self, texts: Sequence[str], max_new_tokens: int) -> dict[str, tuple[str, int | None]]:
        """What the mixture of each text depends on: the text, and, if the text is cut to leave room for the answer, the
        answer's length."""
        context = self.logo.prompts.context
        if context is None:
            return {text: (text, None) for text in texts}
        whole = self.logo.prompts.read(texts, room=None)
        cut = [len(prompt) + max_new_tokens > context for prompt in whole]
        return {text: (text, max_new_tokens if is_cut else None) for text, is_cut in zip(texts, cut, strict=True)}

    def _score(
        self, pairs: Sequence[tuple[list[int], list[int]]], mixtures: Sequence[Mixture], quiet: bool
    ) -> list[Scored]:
        scored: dict[int, Scored] = {}
        with tqdm(total=len(pairs), desc="Scoring", disable=quiet) as bar:
            # Continuations of one context stay together, so that those of a single token are one row.
            order = sorted(range(len(pairs)), key=lambda i: (-len(pairs[i][0]), pairs[i][0]))
            step = self.batch_size * _BATCHES
            for part in (order[start : start + step] for start in range(0, len(order), step)):
                found = self.logo.score_pairs(
                    [pairs[i] for i in part], [mixtures[i] for i in part], batch_size=self.batch_size
                )
                scored |= zip(part, found, strict=True)
                bar.update(len(part))
        return [scored[number] for number in range(len(pairs))]

    def _decoding(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """The options of `LoGo.generate` that do what a task asks."""
        options: dict[str, Any] = dict(normalize_gen_kwargs(dict(asked), self.max_gen_toks))
        options["stop"] = options.pop("until")
        options["max_new_tokens"] = options.pop("max_gen_toks")
        options.pop("max_length", None)
        if not (options.get("do_sample") and options.get("temperature", 1.0)):
            options["do_sample"] = False  # and the options of sampling are dropped
            options = {name: value for name, value in options.items() if name not in ("temperature", "top_p", "top_k")}
        return options

    def _cut(self, context: list[int], following: int) -> list[int]:
        """The end of a context, which leaves room for `following` more tokens, the last of which is not read."""
        room = self.max_length + 1 - following
        if room < 1:
            raise UsageError(f"a continuation has {following} tokens, but the model reads {self.max_length} at once")
        return context[-room:]


_SETTINGS = {field.name for field in fields(SelectionSettings)} - {"k", "signal"}


# Parameters of `LoGo.from_pretrained` and `LoGoLM` that are no options of the harness. A preset is none, because the
# defaults here would override its settings.
_NO_OPTIONS = {"self", "pool", "settings", "options", "truncation", "token", "preset"}


def _check_options(options: Iterable[str]) -> None:
    """Refuses unknown names and suggests the closest one. A Hub token is refused too, because these options are written
    to the results.
    """
    engine = inspect.signature(LoGo.from_pretrained).parameters
    own = inspect.signature(LoGoLM.__init__).parameters
    known = sorted({*_SETTINGS, *engine, *LOADING_OPTIONS, *LOCAL_OPTIONS, *own} - _NO_OPTIONS)
    for name in options:
        if name not in known:
            raise UsageError(f"--model_args: unknown option {name!r}{closest(name, known)}; known: {', '.join(known)}")


def _device(asked: str | None) -> str:
    return "auto" if asked is None or (asked.startswith("cuda") and not torch.cuda.is_available()) else asked


def _batch_size(asked: int | str) -> int:
    try:
        size = int(asked)
    except ValueError:
        size = 0
    if size < 1:
        raise UsageError(f"--batch_size {asked}: expected a number, 1 or more; LoGo does not find it automatically")
    return size
