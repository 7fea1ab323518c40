"""`logo verify`: whether a running server answers with the base model and the adapters that it should."""

from __future__ import annotations

import json as jsons
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from itertools import zip_longest
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.text import Text

from logo.cli.opening import open_engine
from logo.cli.options import EngineOptions, PoolOptions, positive
from logo.cli.output import BASE_ALONE, natural_width, note, one_line, out, plain_table, print_json, screen
from logo.cli.prompts import or_demo
from logo.errors import LoGoError, UsageError
from logo.selection.texts import REQUESTS

if TYPE_CHECKING:
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


@dataclass(frozen=True)
class Endpoint:
    """A server with LoGo's API."""

    url: str
    key: str | None = field(default=None, repr=False)

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON with which a request is answered; LoGoError if there is no such answer."""
        from urllib.request import HTTPError, ProxyHandler, Request, build_opener  # slow: not for every command

        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {self.key}"} if self.key else {})}
        data = None if body is None else jsons.dumps(body).encode()
        direct = build_opener(ProxyHandler({}))
        try:
            with direct.open(Request(self.url + path, data, headers), timeout=600.0) as answer:
                return jsons.load(answer)
        except HTTPError as error:
            with error, suppress(ValueError, KeyError, TypeError):
                said = error.read().decode(errors="replace")
                said = str(jsons.loads(said)["error"]["message"])
            found = f"status {error.code}: {one_line(said, 300)}"
        except OSError as error:
            found = f"no answer ({getattr(error, 'reason', error)}); is it running?"
        except ValueError:
            found = "an answer that is not JSON; is it a server of LoGo?"
        raise LoGoError(f"server {self.url}: {path}: {found}")

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

    def answer(self, prompt: str, chosen: dict[str, Any]) -> Answer:
        """A greedy answer of the adapters that these fields of a request choose."""
        asked = {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "return_token_ids": True, **chosen}
        reply = self.server.ask("/v1/completions", asked | ({"logprobs": 1} if self.logprobs else {}))
        try:
            [choice], mixed = reply["choices"], reply.get("logo") or {"adapters": (), "weights": ()}
            mean = fmean(choice["logprobs"]["token_logprobs"]) if self.logprobs else 0.0
            return tuple(choice["token_ids"]), mean, dict(zip(mixed["adapters"], mixed["weights"], strict=True))
        except (KeyError, TypeError, ValueError):
            raise LoGoError(f"server {self.server.url}: expected token_ids, found {one_line(str(reply))}") from None

    def distances(self, prompts: list[str], mixtures: list[Mixture], alone: list[Answer], loaded: list[Answer]) -> Gaps:
        """How far each answer is from the library's, from its base model's, and under load from the library's: by its
        log-probability where the server tells it, else by how much likelier the library finds an answer of its own."""
        answers, count = [*alone, *alone, *loaded], len(prompts)
        every = [*mixtures, *({} for _ in prompts), *mixtures]
        ids = [prompt.ids for prompt in self.logo.prompts.read(prompts, TOKENS)] * 3
        scored = self.logo.score_pairs([(one, tokens) for one, (tokens, _, _) in zip(ids, answers, strict=True)], every)
        if self.logprobs:
            gaps = [abs(mean + one.nll) for (_, mean, _), one in zip(answers, scored, strict=True)]
        else:
            own = [one.token_ids for one in self.logo.generate(prompts, adapters=mixtures, max_new_tokens=TOKENS)]
            base = {text: tokens for text, mixture, tokens in zip(prompts, mixtures, own, strict=True) if not mixture}
            best = self.logo.score_pairs(
                [*zip(ids, [*own, *(base[text] for text in prompts), *own], strict=True)], every
            )
            gaps = [max(0.0, one.nll - other.nll) for one, other in zip(scored, best, strict=True)]
        return [*zip(gaps[:count], gaps[count : 2 * count], gaps[2 * count :], strict=True)]

    def rows(self, own: Mapping[str, Sequence[str]], prompts: Sequence[str]) -> Iterator[dict[str, Any]]:
        """What is found of the base model (None) on all prompts, and of adapters on their own.

        `effect` is how far the server's answers are from those of the library's base model, `error` and `under_load`
        how far from the library's own, `allowed` how far they may be. The noise floor is the base model's error.
        """
        cases: list[tuple[str | None, str]] = [(None, text) for text in prompts]
        # In turns, so that requests that are answered together are for different adapters.
        turns = zip_longest(*own.values())
        cases += [(name, text) for turn in turns for name, text in zip(own, turn, strict=True) if text]
        asked, mixtures = [text for _, text in cases], [{} if name is None else {name: 1.0} for name, _ in cases]
        alone = [self.answer(text, {"model": name or self.base}) for name, text in cases]
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

    def selections(self, prompts: Sequence[str]) -> Iterator[str]:
        """A line for each prompt whose selection is not the library's."""
        replies = self.workers.map(lambda text: self.server.ask("/v1/logo/select", {"prompt": text}), prompts)
        for prompt, reply, wanted in zip(prompts, replies, self.logo.select(prompts), strict=True):
            found = dict(zip(reply["adapters"], reply["weights"], strict=True))
            if [*found] != [*wanted.adapters] or any(abs(found[n] - w) > WEIGHTS for n, w in wanted.mixture.items()):
                shown = [{name: round(weight, 4) for name, weight in one.items()} for one in (found, wanted.mixture)]
                yield "{!r} selects {} instead of {}".format(one_line(prompt), *shown)


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
    library's answers; selections have to be the library's. The exit code is 1 if something is wrong.

    Example: logo verify http://localhost:8000 --base-model demo

    Args:
        url: The server's address, such as http://localhost:8000.
        limit: Prompts of each adapter: its examples, or else requests of many kinds.
        api_key: Key of the server.
        json: Print JSON instead.
    """
    if not url.startswith(("http://", "https://")):
        raise UsageError(f"URL {url}: expected an address that begins with http:// or https://")
    server = Endpoint(url.rstrip("/").removesuffix("/v1"), api_key)
    known, found = server.ask("/v1/models"), server.ask("/v1/logo/adapters")
    served = {card["id"] for card in found["data"]} & {card["id"] for card in known["data"]}
    # The server says by which signal it selects, and how many.
    said = {"signal": found["signal"], "n_selected_modules": found["default_k"]}
    engine = EngineOptions(**vars(pool), **said)
    base, common = found["base_model"], REQUESTS[:: max(1, len(REQUESTS) // limit)][:limit]
    with closing(open_engine(engine, or_demo(pool))) as logo, ThreadPoolExecutor(AT_ONCE) as workers:
        wrong = [f"not on the server: {name}" for name in logo.names if name not in served]
        wrong += [f"not in the pool: {name}" for name in sorted(served.difference(logo.names))]
        own = {name: logo.fitted[name].examples[:limit] or common for name in logo.names if name in served}
        prompts = list(dict.fromkeys(text for texts in own.values() for text in texts)) or list(common)
        check = Check(server, logo, base, workers, server.has_logprobs(base))
        note(f"asking {server.url}: {len(own)} adapters, {AT_ONCE} requests at a time")
        rows, different = list(check.rows(own, prompts)), list(check.selections(prompts))
    wrong += different
    ok = not wrong and {row["verdict"] for row in rows} <= {"ok", "no effect seen"}
    measure = "nats per token, " + ("by log-probabilities" if check.logprobs else "by the tokens alone")
    if json:
        print_json({"ok": ok, "measure": measure, "rows": rows, "selections": len(prompts), "wrong": wrong})
    else:
        table = plain_table("adapter", ">effect", ">error", ">under load", ">allowed", "answered by", "")
        for row in rows:
            name, *numbers, by, verdict = row.values()
            texts = (name or BASE_ALONE, *(f"{one:.4f}" for one in numbers), ", ".join(by) or BASE_ALONE, verdict)
            table.add_row(*(Text(one_line(text)) for text in texts))
        screen(natural_width(table)).print(table)
        summary = f"numbers: {measure}; {len(prompts)} selections, {len(different)} of them not the library's"
        out.print(Text("\n".join([summary, *wrong])))
    return 0 if ok else 1
