"""What every server of ours does, as its clients meet it: real processes, asked by OpenAI's client and by plain HTTP.

A test module imports these tests and defines two fixtures: `server`, a `Server` of the demo's base model and pool, and
`library`, the `LoGo` of the same. The server was started with `OPTIONS` and with the keys of `write_keys`.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pytest

from http_server import eventually
from logo import LoGo
from logo.demo import adapters_dir
from serving import endless
from test_engine import ids_of
from tolerances import PATIENCE, same_scores, same_weights

KEY, TEAM, NOBODY = "secret-operator", "secret-team", "secret-nobody"
PATTERNS = ["add_numbers", "count_*", "f*_name", "*_letter", "new/*"]
TEAMS = ["add_numbers", "count_letters", "count_words", "find_name", "first_letter", "last_letter"]
PROMPTS = ["What is 7 plus 5?", "Reverse the word: house", "What is the opposite of hot?", "Spell the word: tree"]
WORDS = ["house", "tree", "river", "stone", "green", "bread", "light", "chair", "paper", "cloud"]
MANY = [f"{PROMPTS[i % 4].rpartition(' ')[0]} {WORDS[i // 4 % 10]}{i // 40 or ''}" for i in range(200)]
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        base: the name of the base model alone.
        engine: what generates.
        able: what else it can do: `"tools"`, `"schema"`.
        changes: the folder from which it takes adapters.
        said: the last lines of its log.
        start: another one, until the block ends: `start("--max-queue", "1", key="x")`.
        key: what `ask` and `client` send; empty: none.
    """

    url: str
    base: str
    engine: Literal["local", "vllm"]
    able: frozenset[str]
    changes: Path
    said: Callable[[], str]
    start: Callable[..., AbstractContextManager[Server]]
    key: str = KEY

    def ask(self, path: str, body: Any = None, **headers: str) -> httpx.Response:
        """The answer to a GET, or to a POST of a body: an object, or bytes of no type."""
        headers = {**({"Authorization": f"Bearer {self.key}"} if self.key else {}), **headers}
        if body is None:
            return httpx.get(self.url + path, headers=headers, timeout=PATIENCE)
        content = {"content": body} if isinstance(body, bytes) else {"json": body}
        return httpx.post(self.url + path, headers=headers, timeout=PATIENCE, **content)

    def client(self) -> openai.OpenAI:
        """OpenAI's own client."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key or "none", max_retries=0, timeout=PATIENCE)

    def busy(self) -> float:
        """How many answers are being generated or wait."""
        found = re.findall(r"^(?:logo|vllm):num_requests_(?:running|waiting)(?:{.*})? (\S+)$", self.metrics(), re.M)
        assert len(found) == 2
        return sum(map(float, found))

    def generated(self) -> float:
        """How many tokens were generated."""
        [found] = re.findall(r"^(?:logo|vllm):generation_tokens_total(?:{.*})? (\S+)$", self.metrics(), re.M)
        return float(found)

    def metrics(self) -> str:
        return self.ask("/metrics").text


def write_keys(folder: Path) -> Path:
    """The file of `--key-adapters`; the server's own key is `KEY`."""
    file = folder / "keys.json"
    file.write_text(json.dumps({TEAM: PATTERNS, NOBODY: ["later/*"]}))
    return file


def write_changes(folder: Path) -> Path:
    """The folder of `--allow-adapter-changes`: an adapter that is good, one that is not, and a way out."""
    source = adapters_dir() / "french"
    for name in ("good", "bad"):
        shutil.copytree(source, folder / name)
    (folder / "bad" / "adapter_model.safetensors").write_bytes(b"not safetensors")
    (folder / "out").symlink_to(source)
    return folder


def refused(answer: httpx.Response, status: int) -> str:
    """The message of an error in OpenAI's form."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert {"message", "type", "param", "code"} <= set(error)
    assert error["message"] and KEY not in answer.text
    return str(error["message"])


def completion(server: Server, **fields: Any) -> dict[str, Any]:
    """A greedy completion of up to eight tokens."""
    body = {"model": "logo", "prompt": PROMPTS[0], "max_tokens": 8, "temperature": 0, **fields}
    found: dict[str, Any] = server.ask("/v1/completions", body).raise_for_status().json()
    return found


# -- answers -------------------------------------------------------------------------------------------------------


def test_a_completion_is_what_the_library_answers_whole_and_streamed(server: Server, library: LoGo) -> None:
    for prompt in PROMPTS:
        want = library.generate(prompt, max_new_tokens=24)
        with server.client() as client:
            ask: dict[str, Any] = {"model": "logo", "prompt": prompt, "max_tokens": 24, "temperature": 0}
            got: Any = client.completions.create(**ask, extra_body={"return_token_ids": True})
            chunks = list(client.completions.create(**ask, stream=True))
        [choice] = got.choices
        assert (choice.text, choice.finish_reason) == (want.text, want.finish_reason)
        assert tuple(choice.token_ids) == want.token_ids
        assert got.logo["adapters"] == chunks[0].logo["adapters"] == list(want.selection.adapters)
        assert got.logo["weights"] == same_weights(want.selection.weights)
        assert got.usage is not None and got.usage.completion_tokens == len(want.token_ids)
        assert got.usage.prompt_tokens == len(ids_of(library, [prompt])[0])
        assert "".join(c.choices[0].text for c in chunks if c.choices) == want.text


def test_a_chat_is_what_the_library_answers_whole_and_streamed(server: Server, library: LoGo) -> None:
    messages: list[Any] = [{"role": "system", "content": "Be nice."}, {"role": "user", "content": PROMPTS[1]}]
    [want] = library.generate([messages], max_new_tokens=24)
    with server.client() as client:
        ask: dict[str, Any] = {"model": "logo", "messages": messages, "max_tokens": 24, "temperature": 0}
        whole = client.chat.completions.create(**ask)
        assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == (want.text, want.finish_reason)
        chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].logo["adapters"] == whole.logo["adapters"] == list(want.selection.adapters)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == want.text
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == want.finish_reason
    assert chunks[-1].usage is not None and chunks[-1].usage == whole.usage
    assert whole.usage.prompt_tokens == len(ids_of(library, [messages])[0])


def test_several_prompts_and_choices_keep_their_places(server: Server, library: LoGo) -> None:
    n = 2 if server.engine == "local" else 1  # vLLM refuses several greedy answers
    found = completion(server, prompt=PROMPTS, n=n, max_tokens=12)
    want = [answer.text for answer in library.generate(PROMPTS, max_new_tokens=12) for _ in range(n)]
    assert [choice["text"] for choice in sorted(found["choices"], key=lambda one: one["index"])] == want
    assert len(found["logo"]) == len(PROMPTS) and len(completion(server, prompt=PROMPTS[:1])["logo"]) == 1
    ids = ids_of(library, PROMPTS[:2])
    assert [one["text"] for one in completion(server, prompt=ids, max_tokens=12)["choices"]] == want[: 2 * n : n]


def test_answers_end_where_they_should(server: Server, library: LoGo) -> None:
    whole = completion(server, prompt=PROMPTS[3], model=server.base, max_tokens=24)["choices"][0]["text"]
    stop = whole.strip()[2:5]
    cut = completion(server, prompt=PROMPTS[3], model=server.base, max_tokens=24, stop=[stop, "never"])["choices"][0]
    assert stop and cut == {**cut, "text": whole[: whole.index(stop)], "finish_reason": "stop"}
    short = completion(server, prompt=PROMPTS[3], model=server.base, max_tokens=2)
    assert short["usage"]["completion_tokens"] == 2 and short["choices"][0]["finish_reason"] == "length"
    ended = completion(server, max_tokens=24)
    assert ended["usage"]["completion_tokens"] < 24 and ended["choices"][0]["finish_reason"] == "stop"
    longest = completion(server, max_tokens=24, ignore_eos=True)
    assert longest["usage"]["completion_tokens"] == 24 and longest["choices"][0]["finish_reason"] == "length"


def test_a_seed_repeats_and_choices_differ(server: Server) -> None:
    def ask(**fields: Any) -> list[str]:
        found = completion(server, model=server.base, prompt="The", max_tokens=16, temperature=1.5, n=3, **fields)
        return [choice["text"] for choice in found["choices"]]

    assert ask(seed=11) == ask(seed=11) and len(set(ask(seed=11))) > 1
    assert ask(seed=12) != ask(seed=11)


def test_adapters_can_be_forced(server: Server, library: LoGo) -> None:
    """By name, by weights in the field `model` or in `logo`; the reply says which adapters answered."""
    for model, logo, mixture in (
        ("base", None, {}),
        ("antonym", None, {"antonym": 1.0}),
        ("antonym:0.7+add_numbers:0.3", None, {"antonym": 0.7, "add_numbers": 0.3}),
        ("antonym:0.5", None, {"antonym": 0.5}),
        ("logo", {"adapters": {"antonym": 0.7, "add_numbers": 0.3}}, {"antonym": 0.7, "add_numbers": 0.3}),
        ("french", {"adapters": {}}, {}),
    ):
        want = library.generate(PROMPTS[0], adapters=mixture, max_new_tokens=8)
        found = completion(server, model=server.base if model == "base" else model, logo=logo)
        assert found["choices"][0]["text"] == want.text
        assert dict(zip(found["logo"]["adapters"], found["logo"]["weights"], strict=True)) == mixture


def test_a_selection_is_the_librarys(server: Server, library: LoGo) -> None:
    messages, some = [{"role": "user", "content": PROMPTS[0]}], {"k": 2, "candidates": TEAMS}
    for body, want in (
        ({"prompt": PROMPTS[2]}, library.select(PROMPTS[2])),
        ({"prompt": ids_of(library, PROMPTS[:1])[0]}, library.select(PROMPTS[0])),
        ({"messages": messages}, library.select([messages])[0]),
        ({"prompt": PROMPTS[2], "logo": some}, library.select(PROMPTS[2], **some)),
        ({"prompt": PROMPTS[2], "logo": {"signal": "norm"}}, library.select(PROMPTS[2], signal="norm")),
    ):
        found = server.ask("/v1/logo/select", body).raise_for_status().json()
        assert found["adapters"] == list(want.adapters) and found["weights"] == same_weights(want.weights)
        assert found["scores"] == same_scores(want.scores) and found["confidence"] == pytest.approx(want.confidence)


def test_a_text_is_classified_for_a_router(server: Server, library: LoGo) -> None:
    """What vllm-project/semantic-router demands of an `http_classify` service: `alignScoresToMapping` in
    src/semantic-router/pkg/classification/http_classifier.go, commit 3d48f8c9."""
    for prompt in [*PROMPTS, "Who was the first emperor of Rome?"]:
        answer = server.ask("/classify", {"inputs": prompt}).raise_for_status().json()
        scores = {one["label"]: one["score"] for one in answer}
        assert len(scores) == len(answer) and set(scores) == {*library.names, server.base}
        assert all(0 <= score <= 1 for score in scores.values()) and sum(scores.values()) == pytest.approx(1)
        want = library.select(prompt)
        assert max(library.names, key=scores.__getitem__) == want.adapters[0]
        assert scores[server.base] == pytest.approx(1 - want.confidence, abs=1e-3)
    assert "inputs" in refused(server.ask("/classify", {"inputs": 7}), 400)
    context = server.ask("/v1/models", None).json()["data"][0]["max_model_len"]
    assert f"{context}" in refused(server.ask("/classify", {"inputs": "word " * 2 * context}), 400)


def test_a_request_says_how_likely_an_adapter_is_and_what_answers_if_unsure(server: Server, library: LoGo) -> None:
    prompt = "Who was the first emperor of Rome?"
    for options in ({"prior": 0.01}, {"prior": 0.5, "when_unsure": "mix"}, {"prior": 1e-6, "when_unsure": "base"}):
        want = library.select(prompt, **options)
        got = completion(server, prompt=prompt, logo=options)["logo"]
        assert got["adapters"] == list(want.adapters)
        assert got["confidence"] == pytest.approx(want.confidence, abs=1e-3)
    assert "confidence" in refused(
        server.ask(
            "/v1/completions",
            {"model": "logo", "prompt": prompt, "logo": {"prior": 1e-6, "when_unsure": "refuse"}},
        ),
        400,
    )
    assert "prior" in refused(
        server.ask("/v1/completions", {"model": "logo", "prompt": prompt, "logo": {"prior": 1}}), 400
    )


def test_the_models_are_told(server: Server, library: LoGo) -> None:
    with server.client() as client:
        assert {one.id for one in client.models.list()} == {"logo", server.base, *library.names}
    pool = server.ask("/v1/logo/adapters").json()
    assert [card["id"] for card in pool["data"]] == list(library.names) and pool["base_model"] == server.base
    settings = library.settings  # which a client needs to select alike, but not the operator's prompts and paths
    assert (pool["settings"]["prior"], pool["settings"]["when_unsure"]) == (settings.prior, settings.when_unsure)
    assert not {"calibration_prompts", "cache"} & pool["settings"].keys() and not pool["has_own_calibration_prompts"]


def test_many_at_a_time_are_each_answered_by_what_the_library_says(server: Server, library: LoGo) -> None:
    wants = library.generate(MANY, max_new_tokens=12)

    async def all_of_them() -> list[Any]:
        url, places = f"{server.url}/v1", asyncio.Semaphore(32)
        async with openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=PATIENCE) as client:

            async def one(prompt: str) -> Any:
                async with places:
                    return await client.completions.create(model="logo", prompt=prompt, max_tokens=12, temperature=0)

            return await asyncio.gather(*map(one, MANY))

    for got, want in zip(asyncio.run(all_of_them()), wants, strict=True):
        assert (got.choices[0].text, got.logo["adapters"]) == (want.text, list(want.selection.adapters))
    eventually(lambda: server.busy() == 0)


# -- what cannot be answered ---------------------------------------------------------------------------------------

COMPLETION = {"model": "logo", "prompt": "x"}


WEIGHTS = "model: expected each adapter once, with a weight between -1e6 and 1e6, as in 'a:0.7+b:0.3', found "
UNANSWERABLE = [
    ("completions", {"model": None}, 400, "model", "model: Field required"),
    ("completions", {"model": "antonyms"}, 404, "model", "'antonyms' does not exist (did you mean 'antonym'"),
    ("completions", {"model": "antonym:0.7+frenh:0.3"}, 404, "model", "'frenh' does not exist"),
    *(
        ("completions", {"model": f"{term}+plural:1"}, 400, "model", f"{WEIGHTS}'{term.rpartition('+')[2]}'")
        for term in ("french", "french:", "french:x", "french:nan", "french:1e6", "antonym:1+antonym:1")
    ),
    ("completions", {"logo": {"adapters": {"antonyms": 1}}}, 404, "logo.adapters", "'antonyms' does not exist"),
    ("completions", {"logo": {"candidates": ["antonyms"]}}, 404, "logo.candidates", "'antonyms' does not exist"),
    ("completions", {"logo": {"signal": "nope"}}, 400, "logo.signal", "logo.signal: expected one of"),
    ("completions", {"logo": {"kk": 1}}, 400, "logo.kk", "logo.kk: Extra inputs are not permitted"),
    ("completions", {"logo": {"k": 0}}, 400, "logo.k", "logo.k: Input should be greater than or equal to 1"),
    ("completions", {"logo": {"k": 1, "adapters": {}}}, 400, "logo", "logo: expected either 'adapters' (this mixt"),
    ("completions", {"k": 1}, 400, "k", "logo"),
    ("completions", {"model": "antonym", "logo": {"k": 2}}, 400, "logo", "does not select adapters; leave out 'k'"),
    ("completions", {"max_tokens": 5000}, 400, "max_tokens", "context"),
    ("completions", {"prompt": "word " * 5000}, 400, "prompt", "context"),
    ("completions", {"prompt": [10**9]}, 400, "prompt", "token"),
    ("completions", {"prompt": None}, 400, "prompt", "prompt"),
    ("chat/completions", {"messages": [{"role": "robot", "content": "x"}]}, 400, "messages[0].role", "role"),
    ("logo/select", {"prompt": "word " * 5000}, 400, "prompt", "context"),
    ("logo/select", {"prompt": "x", "max_tokens": 5000}, 400, "max_tokens", "context"),
    ("logo/select", {"prompt": None}, 400, None, "expected either 'prompt' or 'messages'"),
]


@pytest.mark.parametrize(("path", "fields", "status", "param", "said"), UNANSWERABLE, ids=lambda value: str(value)[:40])
def test_what_cannot_be_answered_says_why(
    path: str, fields: Any, status: int, param: str | None, said: str, server: Server
) -> None:
    if server.engine == "vllm" and (said == "role" or fields.get("model", "") is None):
        pytest.skip("vLLM leaves roles to the chat template, and has a model that it takes where none is given")
    usual = {"messages": [{"role": "user", "content": "x"}]} if path == "chat/completions" else {"prompt": "x"}
    answer = server.ask(f"/v1/{path}", {"model": "logo", **usual, **fields})
    found = refused(answer, status)
    if server.engine == "vllm" and said in ("context", "token"):  # vLLM has words of its own
        return
    assert said in found and (server.engine == "vllm" or answer.json()["error"]["param"] == param)


def test_a_body_that_is_no_request_is_refused(server: Server) -> None:
    for content in (b"", b"{", b"\xff", b"[" * 100_000, b'{"a": NaN}', b'"\\ud800"', b"1" + b"0" * 5000):
        told = refused(server.ask("/v1/completions", content, **{"Content-Type": "application/json"}), 400)
        assert told.startswith("the body is not JSON that can be read: ")
    assert refused(server.ask("/v1/completions", {**COMPLETION, "prompt": "x" * 40_000_000}), 413)


# -- who may do what -----------------------------------------------------------------------------------------------


def test_a_tenant_uses_and_sees_its_own_adapters_only(server: Server, library: LoGo) -> None:
    team, nobody = replace(server, key=TEAM), replace(server, key=NOBODY)
    assert {card["id"] for card in team.ask("/v1/models").json()["data"]} == {"logo", server.base, *TEAMS}
    cards = team.ask("/v1/logo/adapters").json()["data"]
    assert [card["id"] for card in cards] == TEAMS and not any("selected" in card for card in cards)
    want = library.generate(PROMPTS[0], candidates=TEAMS, max_new_tokens=8)
    found = completion(team)
    assert (found["choices"][0]["text"], found["logo"]["adapters"]) == (want.text, list(want.selection.adapters))
    scores = team.ask("/v1/logo/select", {"prompt": PROMPTS[0]}).json()["scores"]
    assert scores == same_scores(library.select(PROMPTS[0], candidates=TEAMS).scores)
    for body in ({"model": "french"}, {"model": "add_numbers:0.5+french:0.5"}, {"logo": {"adapters": {"french": 1.0}}}):
        told = refused(team.ask("/v1/completions", {**COMPLETION, **body}), 404)
        renamed = json.loads(json.dumps(body).replace("french", "frenh"))  # is told in the same words
        assert refused(team.ask("/v1/completions", {**COMPLETION, **renamed}), 404) == told.replace("french", "frenh")
        assert "french" not in told.replace("'french' does not exist", "")
    for path, change in ((LOAD, {"lora_name": "x", "lora_path": "good"}), (UNLOAD, {"lora_name": "french"})):
        refused(team.ask(path, change), 403)
    assert completion(nobody, model=server.base)["choices"]
    assert "none of the adapters" in refused(nobody.ask("/v1/completions", COMPLETION), 400)


# -- adapters that come and go -------------------------------------------------------------------------------------


def test_adapters_come_and_go_under_load(server: Server, library: LoGo) -> None:
    """Whoever asked meanwhile is answered as without the change; tenants get what their patterns match."""
    want = library.generate(PROMPTS[0], adapters={"antonym": 1.0}, max_new_tokens=12).text
    french = library.generate(PROMPTS[0], adapters={"french": 1.0}, max_new_tokens=8).text

    def asking(_: int) -> bool:
        return bool(completion(server, model="antonym", max_tokens=12)["choices"][0]["text"] == want)

    with ThreadPoolExecutor(8) as pool:
        asked = pool.map(asking, range(64))
        for _ in range(3):
            said = server.ask(LOAD, {"lora_name": "new/one", "lora_path": "good"}).raise_for_status().text
            assert "new/one" in said and completion(server, model="new/one")["choices"][0]["text"] == french
            assert completion(replace(server, key=TEAM), model="new/one")["logo"]["adapters"] == ["new/one"]
            assert "new/one" in server.ask("/v1/logo/select", {"prompt": "x"}).json()["scores"]
            again = {"lora_name": "new/one", "lora_path": "good"}
            assert "has already been loaded" in refused(server.ask(LOAD, again), 400)
            server.ask(LOAD, {**again, "load_inplace": True}).raise_for_status()
            server.ask(UNLOAD, {"lora_name": "new/one"}).raise_for_status()
            refused(server.ask("/v1/completions", {**COMPLETION, "model": "new/one"}), 404)
        missing = refused(server.ask(UNLOAD, {"lora_name": "antonyms"}), 404)
        assert "'antonyms' cannot be found. (did you mean 'antonym'?)" in missing
        assert all(asked)


@pytest.mark.parametrize(
    ("name", "path", "status"),
    [("new", "bad", 400), ("new", "nothing", 404), ("new", "../..", 403), ("new", "/etc", 403), ("new", "out", 403),
     ("new", "good/../../..", 403), ("../x", "good", 400), ("logo", "good", 400), ("BASE", "good", 400),
     ("new", "a" * 5000, 400), ("new", "a\0b", 400)],
)  # fmt: skip
def test_what_cannot_be_added_changes_nothing(name: str, path: str, status: int, server: Server) -> None:
    before = server.ask("/v1/logo/adapters").json()["data"]
    body = {"lora_name": name.replace("BASE", server.base), "lora_path": path}
    refused(server.ask(LOAD, body), status)
    assert [one["id"] for one in server.ask("/v1/logo/adapters").json()["data"]] == [one["id"] for one in before]


# -- pressure, and what is told ------------------------------------------------------------------------------------


def test_who_hangs_up_is_forgotten(server: Server, tmp_path: Path) -> None:
    base = endless(tmp_path / "demo")
    with server.start("--base-model", str(base), "--adapters", str(adapters_dir())) as other:
        body = {"model": "demo", "prompt": "The", "max_tokens": 450, "n": 4, "temperature": 1, "stream": True}
        for _ in range(20):  # a busy machine may look only when all of it has been answered
            before = other.generated()
            with httpx.stream("POST", f"{other.url}/v1/completions", json=body, timeout=PATIENCE) as answer:
                next(answer.iter_lines())
            eventually(lambda: other.busy() == 0)
            eventually(lambda: "disconnected=true" in other.said())
            if other.generated() < before + 4 * 450:
                break
        else:
            raise AssertionError("every answer was generated to its end")
        assert other.ask("/v1/completions", {"model": "demo", "prompt": "The", "max_tokens": 3}).status_code == 200


def test_each_request_is_a_line_of_json_in_the_log(server: Server) -> None:
    """No client breaks it into two, and it holds no secret."""
    mine = {"X-Request-Id": "mine-1", "Cookie": "biscuit"}
    private = {**COMPLETION, "prompt": "What is 8 plus 5, dear private diary?"}
    server.ask("/v1/completions?query=hidden", private, **mine).raise_for_status()
    replace(server, key="wrong-key").ask("/v1/models", **mine)
    server.ask("/v1/%0aFAKE%20LINE", **mine)
    server.ask("/health", **mine)
    eventually(lambda: server.said().count('"mine-1"') >= 3)
    first, *others = [json.loads(one) for one in server.said().splitlines() if '"mine-1"' in one]
    assert [(one["path"], one["status"]) for one in others] == [("/v1/models", 401), ("/v1/\\nFAKE LINE", 404)]
    assert (first["path"], first["status"], first["model"]) == ("/v1/completions", 200, "logo") and first["ms"] > 0
    assert first["prompt_tokens"] > 3 and first["time"].endswith("+00:00")
    [selection] = first["selections"]
    assert selection["adapters"] and len(selection["prompt_sha256"]) == 16 and 0 <= selection["confidence"] <= 1
    lines = "".join(one for one in server.said().splitlines() if one.startswith("{"))  # vLLM says other things, too
    for secret in ("diary", KEY, "wrong-key", "hidden", "biscuit", "Bearer"):
        assert secret not in lines


def blanks(library: LoGo) -> dict[str, int]:
    """A field `logit_bias`: a tiny model may write white space for ever where a grammar allows it."""
    texts = enumerate(library.tokenizer.batch_decode([[i] for i in range(len(library.tokenizer))]))
    return {str(i): -100 for i, text in texts if text.isspace()}


def test_a_tool_is_called(server: Server, library: LoGo) -> None:
    if "tools" not in server.able:
        pytest.skip("this engine has no tools, and says so, as `test_serve_bodies.py` tests")
    parameters = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    parameters["additionalProperties"] = False
    tool = {"type": "function", "function": {"name": "add", "parameters": parameters, "strict": True}}
    chosen = {"type": "function", "function": {"name": "add"}}
    body = {"model": "logo", "messages": [{"role": "user", "content": PROMPTS[0]}], "tools": [tool]}
    body |= {"logit_bias": blanks(library), "temperature": 0}
    found = server.ask("/v1/chat/completions", {**body, "tool_choice": chosen, "max_tokens": 64}).json()
    [call] = found["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "add" and found["logo"]["adapters"]


def test_an_answer_follows_a_json_schema(server: Server, library: LoGo) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    how = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    body = {"model": "logo", "messages": [{"role": "user", "content": PROMPTS[0]}], "response_format": how}
    if "schema" not in server.able:
        pytest.skip("this engine has no schemas, and says so, as `test_serve_bodies.py` tests")
    body |= {"logit_bias": blanks(library), "max_tokens": 64, "temperature": 0}
    answer = server.ask("/v1/chat/completions", body)
    assert json.loads(answer.json()["choices"][0]["message"]["content"])["a"] in (1, 2)
