"""A running server beside the library: both answer the same prompts, and the answers are compared (`logo verify`)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import zip_longest
from statistics import fmean
from typing import TYPE_CHECKING, Any

from logo.cli.output import one_line
from logo.errors import LoGoError, Unsure

if TYPE_CHECKING:
    from urllib.error import HTTPError

    from logo.core import Prompt
    from logo.engine import LoGo
    from logo.selection.settings import SelectionSettings

TOKENS = 8  # of an answer at most
# An adapter's answers may be so many times as far from the library's as those of the base model are, or as far as the
# least at any rate. A base model whose answers are farther than the largest is another one.
TIMES = 3.0
LEAST_WITH_LOGPROBS = 0.01
LEAST_WITHOUT = 0.1
LARGEST = 0.3
ROUNDING = 1e-4  # nats, which are nothing
WEIGHTS = 1e-3  # how far the weights of a selection may be apart
TIMEOUT = 600.0  # seconds
UNWATCHED = {"shadow": False}  # of requests of a check, which a server's shadow is not to count
Mixture = dict[str, float]
Tokens = tuple[int, ...]


class Refused(LoGoError):
    """The server's answer is an error with this `code` in OpenAI's form."""

    def __init__(self, message: str, code: str | None) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class ServedPool:
    """What a server says of its pool.

    Attributes:
        base_model: its name in requests.
        adapters: the names of adapters that requests may name.
        settings: how it selects.
        max_model_len: tokens of a prompt and its answer.
        has_own_texts: whether it was calibrated on prompts of its own, so that its scores differ from the library's.
    """

    base_model: str
    adapters: frozenset[str]
    settings: SelectionSettings
    max_model_len: int
    has_own_texts: bool


@dataclass(frozen=True)
class Endpoint:
    """A server with LoGo's API."""

    url: str
    key: str | None = field(default=None, repr=False)

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON with which a request is answered; Refused: it is an error; LoGoError: there is none."""
        from http.client import HTTPException
        from urllib.request import HTTPError, ProxyHandler, Request, build_opener  # slow: not for every command

        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = Request(self.url + path, None if body is None else json.dumps(body).encode(), headers)
        try:
            with build_opener(ProxyHandler({})).open(request, timeout=TIMEOUT) as response:
                return json.load(response)
        except HTTPError as error:
            with error:
                raise self._refused(path, error) from None
        except (OSError, HTTPException) as error:
            problem = f"no answer ({getattr(error, 'reason', error)}); is it running?"
        except ValueError:
            problem = "an answer that is not JSON; is it a server of LoGo?"
        raise LoGoError(f"server {self.url}: {path}: {problem}")

    def _refused(self, path: str, error: HTTPError) -> Refused:
        message = error.read().decode(errors="replace")
        code = None
        with suppress(ValueError, KeyError, TypeError):
            fields = json.loads(message)["error"]
            message = str(fields["message"])
            code = fields.get("code")
        return Refused(f"server {self.url}: {path}: status {error.code}: {one_line(message, 300)}", code)

    def pool(self) -> ServedPool:
        """What it says of its pool; LoGoError as `ask`."""
        from logo.selection.settings import SelectionSettings  # slow, as it imports torch

        models = self.ask("/v1/models")["data"]
        about = self.ask("/v1/logo/adapters")
        names = {card["id"] for card in about["data"]} & {card["id"] for card in models}
        [base] = [card for card in models if card["id"] == about["base_model"]]
        return ServedPool(
            about["base_model"],
            frozenset(names),
            SelectionSettings.of(**about["settings"], k=about["default_k"]),
            base["max_model_len"],
            bool(about.get("has_own_calibration_prompts")),
        )

    def has_logprobs(self, model: str) -> bool:
        """Whether it tells log-probabilities, as vLLM's does and our own does not."""
        try:
            body = {"model": model, "prompt": "a", "max_tokens": 1, "logprobs": 1, "logo": UNWATCHED}
            return bool(self.ask("/v1/completions", body))
        except LoGoError as error:
            if "logprobs" not in str(error):
                raise
            return False


@dataclass(frozen=True)
class Case:
    """A prompt that an adapter (None: the base model alone) answers."""

    adapter: str | None
    prompt: Prompt

    @property
    def mixture(self) -> Mixture:
        """What answers it."""
        return {} if self.adapter is None else {self.adapter: 1.0}


@dataclass(frozen=True)
class ServerAnswer:
    """A server's greedy answer.

    Attributes:
        logprob: mean log-probability of its tokens, in nats; 0 if it is not told.
        mixture: what gave it.
    """

    tokens: Tokens
    logprob: float
    mixture: Mixture


@dataclass(frozen=True)
class Distances:
    """How far a server's answers are from the library's, in nats per token.

    Attributes:
        error: of one that was asked for alone.
        effect: of the same from the library's base model.
        under_load: of one that was asked for among others.
    """

    error: float
    effect: float
    under_load: float


@dataclass(frozen=True)
class Check:
    """Asks a server, whose name of the base model is `base`, and the library the same.

    Attributes:
        workers: threads that ask under load.
        logprobs: whether the server tells log-probabilities.
    """

    server: Endpoint
    logo: LoGo
    base: str
    workers: ThreadPoolExecutor
    logprobs: bool

    def rows(self, prompts_of: Mapping[str, Sequence[Prompt]], prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
        """What is found of the base model (None) on all prompts, and of adapters on their own.

        `effect` is how far the server's answers are from those of the library's base model, `error` and `under_load`
        how far from the library's own, `allowed` how far they may be. The noise is the base model's error.
        """
        cases = [Case(None, prompt) for prompt in prompts]
        # In turns, so that requests that are answered together are for different adapters.
        for turn in zip_longest(*prompts_of.values()):
            cases += [Case(name, prompt) for name, prompt in zip(prompts_of, turn, strict=True) if prompt]
        alone = [self._named_answer(case) for case in cases]
        under_load = list(self.workers.map(self._forced_answer, cases))
        distances = self.distances(cases, alone, under_load)
        of_base = distances[: len(prompts)]
        noise = max(ROUNDING, fmean(error for row in of_base for error in (row.error, row.under_load)))
        rows = []
        for name in (None, *prompts_of):
            indices = [i for i, case in enumerate(cases) if case.adapter == name]
            mixtures = [answers[i].mixture for answers in (alone, under_load) for i in indices]
            rows.append(self._row(name, [distances[i] for i in indices], mixtures, noise))
        return rows

    def _row(
        self, adapter: str | None, distances: Sequence[Distances], mixtures: Sequence[Mixture], noise: float
    ) -> dict[str, Any]:
        """What is found of one adapter, from all its cases and the mixtures that have answered them."""
        error = fmean(row.error for row in distances)
        effect = fmean(row.effect for row in distances)
        under_load = fmean(row.under_load for row in distances)
        least = LEAST_WITH_LOGPROBS if self.logprobs else LEAST_WITHOUT
        allowed = LARGEST if adapter is None else max(least, TIMES * noise)
        expected = {} if adapter is None else {adapter: 1.0}
        answered_by = next((mixture for mixture in mixtures if mixture != expected), expected)
        if answered_by != expected:
            verdict = "other adapters"
        elif error > allowed:
            verdict = "other answers"
        elif under_load > allowed:
            verdict = "other answers under load"
        elif adapter is not None and effect <= noise:
            verdict = "no effect seen"
        else:
            verdict = "ok"
        numbers = {"effect": effect, "error": error, "under_load": under_load, "allowed": allowed}
        return {"adapter": adapter, **numbers, "answered_by": list(answered_by), "verdict": verdict}

    def answer(self, prompt: Prompt, chosen: dict[str, Any]) -> ServerAnswer:
        """A greedy answer of the adapters that these fields of a request choose."""
        body = {"prompt": prompt.ids, "max_tokens": TOKENS, "temperature": 0, "return_token_ids": True, **chosen}
        if self.logprobs:
            body["logprobs"] = 1
        reply = self.server.ask("/v1/completions", body)
        try:
            [choice] = reply["choices"]
            selection = reply.get("logo") or {"adapters": (), "weights": ()}
            logprob = fmean(choice["logprobs"]["token_logprobs"]) if self.logprobs else 0.0
            mixture = dict(zip(selection["adapters"], selection["weights"], strict=True))
            return ServerAnswer(tuple(choice["token_ids"]), logprob, mixture)
        except (KeyError, TypeError, ValueError):
            raise LoGoError(f"server {self.server.url}: expected token_ids, found {one_line(str(reply))}") from None

    def _named_answer(self, case: Case) -> ServerAnswer:
        return self.answer(case.prompt, {"model": case.adapter or self.base, "logo": UNWATCHED})

    def _forced_answer(self, case: Case) -> ServerAnswer:
        return self.answer(case.prompt, {"model": "logo", "logo": {"adapters": case.mixture, **UNWATCHED}})

    def distances(
        self, cases: Sequence[Case], alone: Sequence[ServerAnswer], under_load: Sequence[ServerAnswer]
    ) -> list[Distances]:
        """How far the answers of each case are from the library's."""
        mixtures = [case.mixture for case in cases]
        base: list[Mixture] = [{} for _ in cases]
        own: list[Tokens] = []
        own_base: list[Tokens] = []
        if not self.logprobs:
            ids = [case.prompt.ids for case in cases]
            generations = self.logo.generate(ids, adapters=mixtures, max_new_tokens=TOKENS)
            own = [tuple(generation.token_ids) for generation in generations]
            by_base = {case.prompt: tokens for case, tokens in zip(cases, own, strict=True) if case.adapter is None}
            own_base = [by_base[case.prompt] for case in cases]
        errors = self._apart(cases, mixtures, alone, own)
        effects = self._apart(cases, base, alone, own_base)
        errors_under_load = self._apart(cases, mixtures, under_load, own)
        return [Distances(*numbers) for numbers in zip(errors, effects, errors_under_load, strict=True)]

    def _apart(
        self, cases: Sequence[Case], mixtures: Sequence[Mixture], answers: Sequence[ServerAnswer], own: Sequence[Tokens]
    ) -> list[float]:
        """How far answers are from the library's under these mixtures: by their log-probability where the server tells
        it, else by how much likelier the library finds its `own` answers."""
        nlls = self._nlls(cases, mixtures, [answer.tokens for answer in answers])
        if self.logprobs:
            return [abs(answer.logprob + nll) for answer, nll in zip(answers, nlls, strict=True)]
        own_nlls = self._nlls(cases, mixtures, own)
        return [max(0.0, nll - own_nll) for nll, own_nll in zip(nlls, own_nlls, strict=True)]

    def _nlls(self, cases: Sequence[Case], mixtures: Sequence[Mixture], completions: Sequence[Tokens]) -> list[float]:
        pairs = [(case.prompt.ids, completion) for case, completion in zip(cases, completions, strict=True)]
        return [scored.nll for scored in self.logo.score_pairs(pairs, mixtures)]

    def selection(self, prompt: Prompt) -> Mixture | None:
        """What the server selects for a prompt; None: it refuses to, since no adapter fits."""
        try:
            reply = self.server.ask("/v1/logo/select", {"prompt": prompt.ids})
        except Refused as error:
            if error.code != "no_adapter_fits":
                raise
            return None
        return dict(zip(reply["adapters"], reply["weights"], strict=True))

    def differing_selections(self, prompts: Sequence[Prompt]) -> Iterator[str]:
        """A line for each prompt whose selection is not the library's."""
        outcomes = self.logo.outcomes(prompts, [self.logo.options()] * len(prompts))
        selections = self.workers.map(self.selection, prompts)
        for prompt, selection, outcome in zip(prompts, selections, outcomes, strict=True):
            if isinstance(outcome, LoGoError) and not isinstance(outcome, Unsure):
                raise outcome
            expected = None if isinstance(outcome, Unsure) else outcome.mixture
            if not _alike(selection, expected):
                yield f"{one_line(prompt.text or '')!r} selects {_shown(selection)} instead of {_shown(expected)}"


def _alike(mixture: Mixture | None, expected: Mixture | None) -> bool:
    if mixture is None or expected is None:
        return mixture is expected
    if list(mixture) != list(expected):
        return False
    return all(abs(mixture[name] - weight) <= WEIGHTS for name, weight in expected.items())


def _shown(mixture: Mixture | None) -> str:
    if mixture is None:
        return "none, since none fits,"
    return str({name: round(weight, 4) for name, weight in mixture.items()})
