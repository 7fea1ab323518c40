"""`logo verify`: whether a running server answers with the base model and the adapters that it should."""

from __future__ import annotations

import json as jsons
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from itertools import zip_longest
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.text import Text

from logo.cli.opening import open_base
from logo.cli.options import PoolOptions, positive
from logo.cli.output import BASE_ALONE, natural_width, note, one_line, out, plain_table, print_json, screen
from logo.cli.prompts import or_demo
from logo.errors import LoGoError, Unsure, UsageError
from logo.prompts import Truncation
from logo.selection.texts import REQUESTS

if TYPE_CHECKING:
    from logo.core import Prompt
    from logo.engine import LoGo

TOKENS = 8  # of an answer at most
AT_ONCE = 32  # requests, of different adapters
# An adapter's answers may be so many times as far from the library's as those of the base model are, or as far as the
# least at any rate. A base model whose answers are farther than the largest is another one.
TIMES, LEAST, LARGEST = 3.0, {True: 0.01, False: 0.1}, 0.3  # the least: with log-probabilities, and without
VERDICTS = ("other adapters", "other answers", "other answers under load", "no effect seen")
ROUNDING = 1e-4  # nats, which are nothing
WEIGHTS = 1e-3  # how far the weights of a selection may be apart
Mixture = dict[str, float]
Gaps = list[tuple[float, ...]]
Answer = tuple[tuple[int, ...], float, Mixture]  # tokens, their mean log-probability (0 if it is not told), who gave it


class Refused(LoGoError):
    """The server's answer is an error with this `code` in OpenAI's form."""

    def __init__(self, message: str, code: str | None) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Endpoint:
    """A server with LoGo's API."""

    url: str
    key: str | None = field(default=None, repr=False)

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON with which a request is answered; Refused: it is an error; LoGoError: there is none."""
        from http.client import HTTPException
        from urllib.request import HTTPError, ProxyHandler, Request, build_opener  # slow: not for every command

        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {self.key}"} if self.key else {})}
        data, where = None if body is None else jsons.dumps(body).encode(), f"server {self.url}: {path}"
        direct, code = build_opener(ProxyHandler({})), None
        try:
            with direct.open(Request(self.url + path, data, headers), timeout=600.0) as answer:
                return jsons.load(answer)
        except HTTPError as error:
            with error, suppress(ValueError, KeyError, TypeError):
                said = error.read().decode(errors="replace")
                told = jsons.loads(said)["error"]
                said, code = str(told["message"]), told.get("code")
            raise Refused(f"{where}: status {error.code}: {one_line(said, 300)}", code) from None
        except (OSError, HTTPException) as error:
            found = f"no answer ({getattr(error, 'reason', error)}); is it running?"
        except ValueError:
            found = "an answer that is not JSON; is it a server of LoGo?"
        raise LoGoError(f"{where}: {found}")

    def has_logprobs(self, model: str) -> bool:
        """Whether it tells log-probabilities, as vLLM's does and our own does not."""
        try:
            return bool(self.ask("/v1/completions", {"model": model, "prompt": "a", "max_tokens": 1, "logprobs": 1}))
        except LoGoError as error:
            if "logprobs" not in str(error):
                raise
            return False


@dataclass(frozen=True)
class Check:
    """Asks a server, whose name of the base model is `base`, and the library the same."""

    server: Endpoint
    logo: LoGo
    base: str
    workers: ThreadPoolExecutor
    logprobs: bool

    def answer(self, prompt: Prompt, chosen: dict[str, Any]) -> Answer:
        """A greedy answer of the adapters that these fields of a request choose."""
        asked = {"prompt": prompt.ids, "max_tokens": TOKENS, "temperature": 0, "return_token_ids": True, **chosen}
        reply = self.server.ask("/v1/completions", asked | ({"logprobs": 1} if self.logprobs else {}))
        try:
            [choice], mixed = reply["choices"], reply.get("logo") or {"adapters": (), "weights": ()}
            mean = fmean(choice["logprobs"]["token_logprobs"]) if self.logprobs else 0.0
            return tuple(choice["token_ids"]), mean, dict(zip(mixed["adapters"], mixed["weights"], strict=True))
        except (KeyError, TypeError, ValueError):
            raise LoGoError(f"server {self.server.url}: expected token_ids, found {one_line(str(reply))}") from None

    def distances(
        self, prompts: list[Prompt], mixtures: list[Mixture], alone: list[Answer], loaded: list[Answer]
    ) -> Gaps:
        """How far each answer is from the library's, from its base model's, and under load from the library's: by its
        log-probability where the server tells it, else by how much likelier the library finds an answer of its own."""
        answers, count = [*alone, *alone, *loaded], len(prompts)
        every = [*mixtures, *({} for _ in prompts), *mixtures]
        ids = [prompt.ids for prompt in prompts] * 3
        scored = self.logo.score_pairs([(one, tokens) for one, (tokens, _, _) in zip(ids, answers, strict=True)], every)
        if self.logprobs:
            gaps = [abs(mean + one.nll) for (_, mean, _), one in zip(answers, scored, strict=True)]
        else:
            own = [one.token_ids for one in self.logo.generate(ids[:count], adapters=mixtures, max_new_tokens=TOKENS)]
            base = {one: tokens for one, mixture, tokens in zip(prompts, mixtures, own, strict=True) if not mixture}
            best = self.logo.score_pairs([*zip(ids, [*own, *(base[one] for one in prompts), *own], strict=True)], every)
            gaps = [max(0.0, one.nll - other.nll) for one, other in zip(scored, best, strict=True)]
        return [*zip(gaps[:count], gaps[count : 2 * count], gaps[2 * count :], strict=True)]

    def rows(self, own: Mapping[str, Sequence[Prompt]], prompts: Sequence[Prompt]) -> Iterator[dict[str, Any]]:
        """What is found of the base model (None) on all prompts, and of adapters on their own.

        `effect` is how far the server's answers are from those of the library's base model, `error` and `under_load`
        how far from the library's own, `allowed` how far they may be. The noise floor is the base model's error.
        """
        cases: list[tuple[str | None, Prompt]] = [(None, one) for one in prompts]
        # In turns, so that requests that are answered together are for different adapters.
        turns = zip_longest(*own.values())
        cases += [(name, one) for turn in turns for name, one in zip(own, turn, strict=True) if one]
        asked, mixtures = [one for _, one in cases], [{} if name is None else {name: 1.0} for name, _ in cases]
        alone = [self.answer(one, {"model": name or self.base}) for name, one in cases]
        forced = ({"model": "logo", "logo": {"adapters": mixture}} for mixture in mixtures)
        loaded = list(self.workers.map(self.answer, asked, forced))
        gaps = self.distances(asked, mixtures, alone, loaded)
        floor = fmean(error for one, _, many in gaps[: len(prompts)] for error in (one, many))  # of the base model
        floor = max(floor, ROUNDING)
        for name in (None, *own):
            at = [i for i, case in enumerate(cases) if case[0] == name]
            error, effect, under_load = map(fmean, zip(*(gaps[i] for i in at), strict=True))
            allowed = max(LEAST[self.logprobs], TIMES * floor) if name else LARGEST
            given, wanted = [answers[i][2] for answers in (alone, loaded) for i in at], mixtures[at[0]]
            by = next((mixture for mixture in given if mixture != wanted), wanted)
            found = (by != wanted, error > allowed, under_load > allowed, name is not None and effect <= floor)
            verdict = next((text for text, is_so in zip(VERDICTS, found, strict=True) if is_so), "ok")
            numbers = {"effect": effect, "error": error, "under_load": under_load, "allowed": allowed}
            yield {"adapter": name, **numbers, "answered_by": list(by), "verdict": verdict}

    def selection(self, prompt: Prompt) -> Mixture | None:
        """What the server selects for a prompt; None: it refuses to, since no adapter fits."""
        try:
            reply = self.server.ask("/v1/logo/select", {"prompt": prompt.ids})
        except Refused as error:
            if error.code != "no_adapter_fits":
                raise
            return None
        return dict(zip(reply["adapters"], reply["weights"], strict=True))

    def selections(self, prompts: Sequence[Prompt]) -> Iterator[str]:
        """A line for each prompt whose selection is not the library's."""
        outcomes = self.logo.outcomes(prompts, [self.logo.options()] * len(prompts))
        for prompt, found, outcome in zip(prompts, self.workers.map(self.selection, prompts), outcomes, strict=True):
            if isinstance(outcome, LoGoError) and not isinstance(outcome, Unsure):
                raise outcome
            wanted = None if isinstance(outcome, Unsure) else outcome.mixture
            if not _alike(found, wanted):
                yield f"{one_line(prompt.text or '')!r} selects {_shown(found)} instead of {_shown(wanted)}"


def _alike(one: Mixture | None, other: Mixture | None) -> bool:
    if one is None or other is None:
        return one is other
    return [*one] == [*other] and all(abs(one[name] - weight) <= WEIGHTS for name, weight in other.items())


def _shown(mixture: Mixture | None) -> str:
    rounded = {name: round(weight, 4) for name, weight in (mixture or {}).items()}
    return "none, since none fits," if mixture is None else str(rounded)


def verify(
    url: str,
    /,
    *,
    limit: Annotated[int, Parameter(validator=positive)] = 4,
    api_key: Annotated[str | None, Parameter(env_var="LOGO_API_KEY")] = None,
    json: bool = False,
    pool: PoolOptions = PoolOptions(),
) -> int:
    """Check that a running server answers with this base model and these adapters.

    Each adapter has to change answers, to answer where it is named, also among requests for others, and to give the
    library's answers; selections have to be the library's, unless the server has calibration prompts of its own. The
    exit code is 1 if something is wrong.

    Example: logo verify http://localhost:8000 --base-model demo

    Args:
        url: The server's address, such as http://localhost:8000.
        limit: Prompts of each adapter: its examples, or else requests of many kinds.
        api_key: Key of the server.
        json: Print JSON instead.
    """
    from logo.selection.settings import SelectionSettings  # slow, as it imports torch

    if not url.startswith(("http://", "https://")):
        raise UsageError(f"URL {url}: expected an address that begins with http:// or https://")
    server = Endpoint(url.rstrip("/").removesuffix("/v1"), api_key)
    known, found = server.ask("/v1/models"), server.ask("/v1/logo/adapters")
    served = {card["id"] for card in found["data"]} & {card["id"] for card in known["data"]}
    # The server says how it selects, and how long prompts may be.
    how = SelectionSettings.of(**found["settings"], k=found["default_k"])
    base, common = found["base_model"], REQUESTS[:: max(1, len(REQUESTS) // limit)][:limit]
    cut = Truncation(next(card["max_model_len"] for card in known["data"] if card["id"] == base) - TOKENS)
    opened = open_base(pool, or_demo(pool)).engine(how, truncation=cut)
    with closing(opened) as logo, ThreadPoolExecutor(AT_ONCE) as workers:
        wrong = [f"not on the server: {name}" for name in logo.names if name not in served]
        wrong += [f"not in the pool: {name}" for name in sorted(served.difference(logo.names))]
        texts = {name: logo.fitted[name].examples[:limit] or common for name in logo.names if name in served}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # some are cut, for the server and for the library alike
            own = {name: logo.prompts.read(some, TOKENS) for name, some in texts.items()}
        prompts = list(dict.fromkeys(one for some in own.values() for one in some))
        prompts = prompts or logo.prompts.read(common, TOKENS)
        check = Check(server, logo, base, workers, server.has_logprobs(base))
        note(f"asking {server.url}: {len(own)} adapters, {AT_ONCE} requests at a time")
        compared = prompts
        if found.get("has_own_calibration_prompts"):
            note("selections are not compared: the server has calibration prompts of its own")
            compared = []
        rows, different = list(check.rows(own, prompts)), list(check.selections(compared))
    wrong += different
    ok = not wrong and {row["verdict"] for row in rows} <= {"ok", "no effect seen"}
    measure = "nats per token, " + ("by log-probabilities" if check.logprobs else "by the tokens alone")
    if json:
        print_json({"ok": ok, "measure": measure, "rows": rows, "selections": len(compared), "wrong": wrong})
    else:
        table = plain_table("adapter", ">effect", ">error", ">under load", ">allowed", "answered by", "")
        for row in rows:
            name, *numbers, by, verdict = row.values()
            cells = (name or BASE_ALONE, *(f"{one:.4f}" for one in numbers), ", ".join(by) or BASE_ALONE, verdict)
            table.add_row(*(Text(one_line(text)) for text in cells))
        screen(natural_width(table)).print(table)
        summary = f"numbers: {measure}; {len(compared)} selections, {len(different)} of them not the library's"
        out.print(Text("\n".join([summary, *wrong])))
    return 0 if ok else 1
