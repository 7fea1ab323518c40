"""The server as its users meet it: the command as a process, the official OpenAI client, and clients that misbehave."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from safetensors.torch import load_file, save_file

from http_server import eventually
from logo import LoGo
from logo.bench.local_server import LocalServer
from logo.demo import adapters_dir
from serving import Served, endless, served
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
        assert got.usage.prompt_tokens == len(engine.prompts.encode([prompt])[0])
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


def test_stop_texts_end_an_answer_before_them(client: openai.OpenAI, engine: LoGo) -> None:
    full = engine.generate(PROMPTS[1], max_new_tokens=24).text
    stop = full.strip()[2:4]
    for stream in (False, True):
        answer: Any = client.completions.create(
            model="logo", prompt=PROMPTS[1], max_tokens=24, temperature=0, stop=[stop], stream=stream
        )
        parts = list(answer) if stream else [answer]
        assert "".join(part.choices[0].text for part in parts) == full[: full.index(stop)]
        assert parts[-1].choices[0].finish_reason == "stop"


def test_logprobs_in_both_shapes(client: openai.OpenAI) -> None:
    text = client.completions.create(model="logo", prompt=PROMPTS[0], max_tokens=6, temperature=0, logprobs=2)
    chat = client.chat.completions.create(
        model="logo",
        messages=[{"role": "user", "content": PROMPTS[0]}],
        max_tokens=6,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
    )
    old, new = text.choices[0].logprobs, chat.choices[0].logprobs
    assert old is not None and new is not None and new.content is not None
    assert old.tokens == [entry.token for entry in new.content]
    assert old.token_logprobs == same_scores([entry.logprob for entry in new.content])
    for token, top, entry in zip(old.tokens or [], old.top_logprobs or [], new.content, strict=True):
        assert max(top, key=lambda t: top[t]) == token  # greedy
        assert [other.token for other in entry.top_logprobs] == list(top)


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


def test_unknown_fields_are_kept_and_a_missing_key_is_told(server: Served) -> None:
    assert server.post("/v1/completions", {**COMPLETION, "some_field": {"a": 1}, "max_tokens": 1})["choices"]
    error = refused(lambda: Served(server.url).post("/v1/completions", COMPLETION))
    assert (error["status"], error["code"]) == (401, "invalid_api_key")
    assert Served(server.url).text("/health") == "ok"


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


def test_an_adapter_whose_file_is_gone_is_an_error_of_the_server(changes: Path, server: Served) -> None:
    shutil.copytree(changes / "good", changes / "gone")
    server.text("/v1/load_lora_adapter", {"lora_name": "gone", "lora_path": "gone"})
    shutil.rmtree(changes / "gone")
    error = refused(lambda: server.post("/v1/completions", {**COMPLETION, "model": "gone"}))
    assert (error["status"], error["code"]) == (500, "adapter_unusable")
    assert error["message"].startswith("adapter 'gone': adapter_model.safetensors cannot be read")
    assert server.post("/v1/completions", {**COMPLETION, "model": "antonym", "max_tokens": 1})["choices"]
    pool = server.get("/v1/logo/adapters")
    assert "gone" in {card["id"] for card in pool["data"]} and pool["signals"] == ["calibrated", "norm"]
    server.text("/v1/load_lora_adapter", {"lora_name": "after", "lora_path": "other"})  # of no concern to others
    for name in ("gone", "after"):
        server.text("/v1/unload_lora_adapter", {"lora_name": name})


def test_an_adapter_that_overflows_fails_its_own_requests(changes: Path, server: Served) -> None:
    shutil.copytree(changes / "good", changes / "huge")
    file = changes / "huge" / "adapter_model.safetensors"
    save_file({key: tensor.float() * 1e20 for key, tensor in load_file(file).items()}, file)
    server.text("/v1/load_lora_adapter", {"lora_name": "huge", "lora_path": "huge"})
    try:
        for temperature in (0, 0.8):
            body = {**COMPLETION, "model": "huge", "temperature": temperature}
            error = refused(lambda body=body: server.post("/v1/completions", body))
            assert (error["status"], error["code"]) == (500, "not_finite")
        with server.open("/v1/completions", {**COMPLETION, "model": "huge", "stream": True}) as answer:
            assert '"code": "not_finite"' in answer.read().decode()
        error = refused(lambda: server.post("/v1/logo/select", {"prompt": "x", "logo": {"signal": "norm"}}))
        assert (error["status"], error["code"]) == (500, "not_finite") and "'huge'" in error["message"]
        assert server.post("/v1/completions", {**COMPLETION, "model": "antonym", "max_tokens": 3})["choices"][0]["text"]
    finally:
        server.text("/v1/unload_lora_adapter", {"lora_name": "huge"})


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


def test_more_than_may_wait_are_turned_away_and_told_when_to_come_back(narrow: Served) -> None:
    seen: list[tuple[int, str | None]] = []

    def ask() -> None:
        body = {"model": "demo", "prompt": "The", "max_tokens": 200, "temperature": 1.5, "n": 1}
        try:
            seen.append((200, None if narrow.post("/v1/completions", body) else ""))
        except urllib.error.HTTPError as error:
            with error:
                seen.append((error.code, error.headers["Retry-After"]))

    while {status for status, _ in seen} != {200, 429}:  # on a busy machine eight may happen to queue up nicely
        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {status for status, _ in seen} <= {200, 429}
    assert all(retry == "1" for status, retry in seen if status == 429)
    # Where waiting would be of no use, nobody is told to wait.
    error = refused(lambda: narrow.post("/v1/completions", {"model": "demo", "prompt": "The", "n": 3}))
    assert error["status"] == 400 and "asks for 3 answers, and this server takes at most 2" in error["message"]


def test_who_hangs_up_is_forgotten(tmp_path: Path) -> None:
    with served("--base-model", str(endless(tmp_path / "demo")), "--adapters", str(adapters_dir())) as server:
        for stream in (True, False):
            body = {"model": "demo", "prompt": "The", "max_tokens": 450, "stream": stream, "n": 4, "temperature": 1}
            text = json.dumps(body).encode()
            host, port = server.url.removeprefix("http://").split(":")
            with socket.create_connection((host, int(port))) as line:
                head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\n"
                head += f"Content-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
                line.sendall(head.encode() + text)
                eventually(lambda: load(server)[0])
            eventually(lambda: not any(load(server)))


def load(server: Served) -> list[float]:
    """What is running, waiting and held."""
    lines = server.text("/metrics").splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return [
        float(values[f"logo:{name}"]) for name in ("num_requests_running", "num_requests_waiting", "kv_blocks_used")
    ]


def test_a_request_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    model = str(endless(tmp_path / "demo"))
    with served("--base-model", model, "--adapters", str(adapters_dir()), "--request-timeout", "0.05") as server:
        body = {"model": "demo", "prompt": "The", "max_tokens": 480, "n": 16, "temperature": 1}
        error = refused(lambda: server.post("/v1/completions", body))
        assert (error["status"], error["code"]) == (504, "timeout")
        eventually(lambda: not any(load(server)))


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
            [
                *python(),
                "-c",
                "from logo.cli import main; main()",
                "serve",
                "--base-model",
                "demo",
                "--port",
                port,
            ],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
    assert found.returncode == 2
    assert found.stderr.count("\n") == 1
    assert f"cannot listen on 127.0.0.1:{port}" in found.stderr
