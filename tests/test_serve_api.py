"""The server as its users meet it: the command as a process, the official OpenAI client, and clients that misbehave."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from http_server import eventually
from local_server import LocalServer
from logo import LoGo
from logo.demo import adapters_dir
from serving import Served, endless, served
from test_engine import ids_of
from tolerances import PATIENCE, same_scores, same_weights
from warm import logo, python

pytestmark = pytest.mark.slow

PROMPTS = ["What is 7 plus 5?", "Reverse the word: house", "What is the opposite of hot?", "Spell the word: tree"]


@pytest.fixture(scope="module")
def engine() -> LoGo:
    return LoGo.from_pretrained("demo", k=3, signal="calibrated")


@pytest.fixture(scope="module")
def changes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder from which the server takes adapters: one that is good, one that is not, and a way out."""
    root = tmp_path_factory.mktemp("changes")
    source, other, *_ = [path for path in sorted(adapters_dir().iterdir()) if path.is_dir()]
    shutil.copytree(source, root / "good")
    shutil.copytree(other, root / "other")
    shutil.copytree(source, root / "bad")
    (root / "bad" / "adapter_model.safetensors").write_bytes(b"not safetensors")
    (root / "out").symlink_to(source)
    return root


@pytest.fixture(scope="module")
def server(changes: Path) -> Iterator[Served]:
    options = ("--signals", "norm", "--allow-adapter-changes", str(changes))
    with served("--base-model", "demo", *options, key="secret") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0) as made:
        yield made


def refused(call: Any) -> dict[str, Any]:
    """What an HTTP error says, and its status."""
    with pytest.raises(urllib.error.HTTPError) as caught:
        call()
    with caught.value as answer:
        body = json.loads(answer.read())
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return {**body["error"], "status": caught.value.code}


def test_an_adapter_that_nobody_could_ask_for_is_refused(tmp_path: Path) -> None:
    """It has the name of the base model, or that of the model that selects; each would answer in its place."""
    shutil.copytree(adapters_dir() / "antonym", tmp_path / "logo")
    for options in (["--served-model-name", "antonym"], ["--adapters", str(tmp_path)]):
        command = [*python(), "-m", "logo.cli", "serve", "--base-model", "demo", "--port", "0", *options]
        found = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
        assert found.returncode == 2 and "nobody could ask for" in found.stderr, found.stderr


# -- the official client -------------------------------------------------------------------------------------------


def test_a_completion_is_what_the_library_answers(client: openai.OpenAI, engine: LoGo) -> None:
    for prompt in PROMPTS:
        want = engine.generate(prompt, max_new_tokens=24)
        got = client.completions.create(
            model="logo", prompt=prompt, max_tokens=24, temperature=0, extra_body={"return_token_ids": True}
        )
        [choice] = got.choices
        assert choice.text == want.text
        assert tuple(choice.token_ids) == want.token_ids  # type: ignore[attr-defined]
        assert choice.finish_reason == want.finish_reason
        assert got.logo["adapters"] == list(want.selection.adapters)  # type: ignore[attr-defined]
        assert got.logo["weights"] == same_weights(want.selection.weights)  # type: ignore[attr-defined]
        assert got.usage is not None
        assert got.usage.prompt_tokens == len(ids_of(engine, [prompt])[0])
        assert got.usage.completion_tokens == len(want.token_ids)


def test_names_of_adapters_force_them_and_that_of_the_base_model_uses_none(client: openai.OpenAI, engine: LoGo) -> None:
    for model, mixture in (("demo", {}), ("antonym", {"antonym": 1.0})):
        want = engine.generate(PROMPTS[0], adapters=mixture, max_new_tokens=24)
        got = client.completions.create(model=model, prompt=PROMPTS[0], max_tokens=24, temperature=0)
        assert got.choices[0].text == want.text
        assert got.logo["adapters"] == list(mixture)  # type: ignore[attr-defined]


def test_the_field_logo_overrides(client: openai.OpenAI, engine: LoGo) -> None:
    forced = {"antonym": 0.5, "add_numbers": 0.5}
    want = engine.generate(PROMPTS[0], adapters=forced, max_new_tokens=24)
    got = client.completions.create(
        model="logo", prompt=PROMPTS[0], max_tokens=24, temperature=0, extra_body={"logo": {"adapters": forced}}
    )
    assert got.choices[0].text == want.text
    for options, count in (({"k": 2, "weighting": "linear"}, 2), ({"signal": "norm"}, 3)):
        got = client.completions.create(
            model="logo", prompt=PROMPTS[0], max_tokens=4, temperature=0, extra_body={"logo": options}
        )
        assert len(got.logo["adapters"]) == count  # type: ignore[attr-defined]


def test_a_stream_adds_up_to_the_answer(client: openai.OpenAI, engine: LoGo) -> None:
    want = engine.generate(PROMPTS[1], max_new_tokens=24)
    stream = client.chat.completions.create(
        model="logo",
        messages=[{"role": "user", "content": PROMPTS[1]}],
        max_tokens=24,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert chunks[0].logo["adapters"] == list(want.selection.adapters)  # type: ignore[attr-defined]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == want.text
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == want.finish_reason
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(want.token_ids)


def test_several_prompts_and_choices_keep_their_places(client: openai.OpenAI, engine: LoGo) -> None:
    got = client.completions.create(model="logo", prompt=PROMPTS, max_tokens=12, temperature=0, n=2)
    want = [answer.text for answer in engine.generate(PROMPTS, max_new_tokens=12, batch_size=1) for _ in range(2)]
    assert [choice.text for choice in sorted(got.choices, key=lambda c: c.index)] == want
    assert len(got.logo) == len(PROMPTS)  # type: ignore[attr-defined]


def test_a_seed_repeats_and_choices_differ(client: openai.OpenAI) -> None:
    def ask() -> list[str]:
        got = client.completions.create(model="demo", prompt="The", max_tokens=16, temperature=1.5, n=3, seed=11)
        return [choice.text for choice in got.choices]

    first = ask()
    assert first == ask()
    assert len(set(first)) > 1


def test_models_selection_and_the_pool_are_told(client: openai.OpenAI, server: Served, engine: LoGo) -> None:
    names = [model.id for model in client.models.list()]
    assert names == ["logo", "demo", *engine.names]
    pool = server.get("/v1/logo/adapters")
    assert [card["id"] for card in pool["data"]] == list(engine.names)
    selection = server.post("/v1/logo/select", {"prompt": PROMPTS[2]})
    want = engine.select(PROMPTS[2])
    assert selection["adapters"] == list(want.adapters)
    assert selection["scores"] == same_scores(want.scores)
    before = {card["id"]: card["selected"] for card in pool["data"]}
    client.completions.create(model="antonym", prompt="hot", max_tokens=2)
    after = {card["id"]: card["selected"] for card in server.get("/v1/logo/adapters")["data"]}
    assert after["antonym"] == before["antonym"] + 1


def test_what_prometheus_reads(server: Served, client: openai.OpenAI) -> None:
    before = _values(server)
    client.completions.create(model="logo", prompt=PROMPTS[0], max_tokens=4, temperature=0)
    values = _values(server)
    assert values["logo:generation_tokens_total"] > before["logo:generation_tokens_total"]
    assert values["logo:probe_seconds_count"] > 0
    assert values['logo:steps_total{form="gate"}'] > 0
    assert values['logo:adapter_selected_total{adapter="add_numbers"}'] > 0
    assert values["logo:num_requests_running"] == 0
    assert values["logo:selection_confidence_count"] == before["logo:selection_confidence_count"] + 1
    assert "process_resident_memory_bytes" in values


def _values(server: Served) -> dict[str, float]:
    """Sample -> its value, with the labels in the sample's name."""
    lines = [line.rsplit(" ", 1) for line in server.text("/metrics").splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines}


# -- what cannot be answered ---------------------------------------------------------------------------------------

COMPLETION = {"model": "logo", "prompt": "x"}


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("completions", {**COMPLETION, "model": "nope"}, 404, "model"),
        ("completions", {"model": "nope", "prompt": "word " * 5000}, 404, "model"),
        ("completions", {**COMPLETION, "max_tokens": -1}, 400, "max_tokens"),
        ("completions", {**COMPLETION, "max_tokens": 10**30}, 400, "max_tokens"),
        ("completions", {**COMPLETION, "max_tokens": 512}, 400, "max_tokens"),
        ("completions", {**COMPLETION, "prompt": ["x", "word " * 5000]}, 400, "prompt"),
        ("completions", {**COMPLETION, "prompt": "word " * 100_000, "max_tokens": 1}, 400, "max_tokens"),
        ("completions", {**COMPLETION, "prompt": [10**9]}, 400, "prompt"),
        ("completions", {**COMPLETION, "prompt": []}, 400, "prompt"),
        ("completions", {**COMPLETION, "temperature": "hot"}, 400, "temperature"),
        ("completions", {**COMPLETION, "logo": {"adapters": {"nope": 1}}}, 400, None),
        ("completions", {**COMPLETION, "logo": {"signal": "nope"}}, 400, "logo.signal"),
        ("completions", {**COMPLETION, "logo": {"signal": "entropy"}}, 400, "logo.signal"),
        ("logo/select", {"prompt": "x", "logo": {"signal": "entropy"}}, 400, "logo.signal"),
        ("completions", {**COMPLETION, "prompt": ["x"] * 64, "n": 16}, 400, None),
        ("completions", {**COMPLETION, "model": "antonym", "logo": {"k": 2}}, 400, "logo"),
        ("chat/completions", {"model": "logo", "messages": []}, 400, "messages"),
        ("chat/completions", {"model": "logo", "messages": [{"role": "user"}]}, 400, "messages[0].content"),
        ("logo/select", {}, 400, None),
    ],
)
def test_what_cannot_be_answered_says_why(
    path: str, body: dict[str, Any], status: int, param: str | None, server: Served
) -> None:
    error = refused(lambda: server.post(f"/v1/{path}", body))
    assert (error["status"], error["param"]) == (status, param)
    assert "\n" not in error["message"]


# -- adapters under way --------------------------------------------------------------------------------------------


def test_an_adapter_comes_and_goes(server: Served, client: openai.OpenAI) -> None:
    load, unload = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
    answer = server.text(load, {"lora_name": "new", "lora_path": "good"})
    assert answer == "Success: LoRA adapter 'new' added successfully."
    assert client.completions.create(model="new", prompt="x", max_tokens=2).logo["adapters"] == ["new"]  # type: ignore[attr-defined]
    assert "new" in server.post("/v1/logo/select", {"prompt": "x"})["scores"]
    error = refused(lambda: server.text(load, {"lora_name": "new", "lora_path": "good"}))
    assert (error["status"], error["param"]) == (400, "lora_name")
    answer = server.text(unload, {"lora_name": "new"})
    assert answer == "Success: LoRA adapter 'new' removed successfully."
    assert refused(lambda: server.text(unload, {"lora_name": "new"}))["status"] == 404
    assert refused(lambda: server.post("/v1/completions", {**COMPLETION, "model": "new"}))["status"] == 404


def test_a_page_elsewhere_changes_nothing(server: Served) -> None:
    """Without asking first, a browser only sends forms and plain text to other servers."""
    before = server.get("/v1/models")
    for path, body in (("unload", {"lora_name": "antonym"}), ("load", {"lora_name": "new", "lora_path": "good"})):
        for kind in ("text/plain", "application/x-www-form-urlencoded"):
            headers = {"Authorization": "Bearer secret", "Content-Type": kind, "Origin": "https://elsewhere.test"}
            answer = httpx.post(f"{server.url}/v1/{path}_lora_adapter", content=json.dumps(body), headers=headers)
            assert answer.status_code == 400 and "application/json" in answer.json()["error"]["message"]
    assert server.get("/v1/models") == before


@pytest.mark.parametrize(
    ("name", "path", "status"),
    [
        ("new", "bad", 400),
        ("new", "nothing", 404),
        ("new", "../..", 403),
        ("new", "/etc", 403),
        ("new", "out", 403),
        ("new", "good/../../..", 403),
        ("../x", "good", 400),
        ("logo", "good", 400),
        ("demo", "good", 400),
        ("new", "a" * 5000, 400),
        ("new", "a\0b", 400),
    ],
)
def test_what_cannot_be_added_changes_nothing(name: str, path: str, status: int, server: Served) -> None:
    before = server.get("/v1/models")
    error = refused(lambda: server.text("/v1/load_lora_adapter", {"lora_name": name, "lora_path": path}))
    assert error["status"] == status
    assert server.get("/v1/models") == before


@pytest.fixture(scope="module")
def narrow() -> Iterator[Served]:
    """A server with room for no adapter, and for two requests of which one waits."""
    room = ("--adapter-memory-gb", "0.000001", "--max-concurrent", "1", "--max-queue", "1")
    with served("--base-model", "demo", *room) as running:
        yield running


def test_adapters_that_do_not_fit_into_memory_are_told_with_what_helps(narrow: Served) -> None:
    error = refused(lambda: narrow.post("/v1/completions", {"model": "antonym", "prompt": "x"}))
    assert error["status"] == 503 and "'antonym'" in error["message"] and "--adapter-memory-gb" in error["message"]
    assert narrow.post("/v1/completions", {"model": "demo", "prompt": "x"})["choices"][0]["text"]


# -- pressure ------------------------------------------------------------------------------------------------------


def test_who_hangs_up_is_forgotten(tmp_path: Path) -> None:
    with served("--base-model", str(endless(tmp_path / "demo")), "--adapters", str(adapters_dir())) as server:
        for stream in (True, False):
            body = {"model": "demo", "prompt": "The", "max_tokens": 450, "stream": stream, "n": 4, "temperature": 1}
            text = json.dumps(body).encode()
            host, port = server.url.removeprefix("http://").split(":")
            head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
            running = 0.0
            while not running:  # a busy machine may look only when all of it has been answered
                ended = generated(server) + 4 * 450
                with socket.create_connection((host, int(port))) as line:
                    line.sendall(head.encode() + text)
                    eventually(lambda: load(server)[0] or generated(server) >= ended)  # noqa: B023
                    running = load(server)[0]
            eventually(lambda: not any(load(server)))
            assert generated(server) < ended


def load(server: Served) -> list[float]:
    """What is running, waiting and held."""
    return figures(server, "num_requests_running", "num_requests_waiting", "kv_tokens_used")


def generated(server: Served) -> float:
    """How many tokens were generated so far."""
    return figures(server, "generation_tokens_total")[0]


def figures(server: Served, *names: str) -> list[float]:
    lines = server.text("/metrics").splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return [float(values[f"logo:{name}"]) for name in names]


def test_a_signal_lets_what_was_accepted_end() -> None:
    no_key, program = {"LOGO_API_KEY": ""}, logo()
    with LocalServer(["--base-model", "demo"], no_key, start=PATIENCE, stop=PATIENCE, program=program) as running:

        async def ask(client: openai.AsyncOpenAI, n: int) -> int:
            stream = await client.completions.create(
                model="logo", prompt=PROMPTS[n % 4], max_tokens=60, temperature=1.9, seed=n, stream=True
            )
            reasons = []
            async for chunk in stream:
                reasons += [choice.finish_reason for choice in chunk.choices]
                begun.add(n)
                if len(begun) == 24:
                    started.set()
            return sum(reason is not None for reason in reasons)

        async def traffic() -> list[int]:
            url = f"{running.url}/v1"
            async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
                asking = [asyncio.create_task(ask(client, n)) for n in range(24)]
                await started.wait()
                os.kill(running.pid, signal.SIGTERM)
                with pytest.raises(
                    (openai.InternalServerError, openai.APIConnectionError), match=r"shutting down|Connection"
                ):
                    while True:  # until the signal has been heard
                        await ask(client, 0)
                return await asyncio.gather(*asking)

        begun: set[int] = set()
        started = asyncio.Event()
        assert asyncio.run(traffic()) == [1] * 24
    assert running.exit_code == 0


def test_a_port_that_is_taken_is_one_line_before_anything_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        found = subprocess.run(
            [*python(), "-m", "logo.cli", "serve", "--base-model", "demo", "--port", port],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
    assert found.returncode == 2
    assert found.stderr.count("\n") == 1
    assert f"cannot listen on 127.0.0.1:{port}" in found.stderr
