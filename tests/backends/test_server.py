"""vLLM's own server of two ranks with one flag more: what a plain `openai` client sees is what the library answers."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import socket
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from vllm_server import ASSETS, KEY, Server, environment

from http_server import eventually
from logo import LoGo
from logo.adapters.examples import write_examples
from logo.cli.app import run
from test_engine import ids_of, write_adapter

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% if not loop.last %}\n{% endif %}{% endfor %}"


@pytest.fixture(scope="module")
def server(serve: Callable[..., Server], tmp_path_factory: Any) -> Server:
    folder = tmp_path_factory.mktemp("template")
    template = folder / "chat.jinja"
    template.write_text(TEMPLATE)
    return serve(
        *("--max-loras", "18", "--max-lora-rank", "8", "--max-model-len", "256"),  # two more than the pool has
        *("--tensor-parallel-size", "2", "--served-model-name", "base", "other", "--chat-template", str(template)),
        *("--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--enable-prompt-tokens-details"),
        *("--num-gpu-blocks-override", "24"),  # so few that they are soon used again
        env=environment(k=4, log="prompts", shadow=str(folder / "shadow.jsonl"))
        | {
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            "VLLM_ENABLE_RESPONSES_API_STORE": "1",
        },
    )


def shadow_of(server: Server) -> Path:
    """What the server would select where requests name adapters."""
    [found] = re.findall(r'"shadow": "([^"]+)"', environment_of(server))
    return Path(found)


def environment_of(server: Server) -> str:
    """LoGo's options, as its process has them."""
    return Path(f"/proc/{server.process.pid}/environ").read_text()


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=300)


def told(answer: Any) -> Any:
    return answer.model_dump()["logo"]


def test_a_chat_is_probed_by_what_the_user_said_last(client: openai.OpenAI, logo: LoGo, rows: list[str]) -> None:
    before: Any = [{"role": "system", "content": "Speak French."}, {"role": "assistant", "content": []}]
    messages: Any = [{"role": "system", "content": "You answer briefly."}, {"role": "user", "content": rows[5]}]
    answer = client.chat.completions.create(model="logo", messages=before + messages[1:], max_tokens=2)
    assert told(answer)["adapters"] == list(logo.select(rows[5], k=4).adapters)
    answer = client.chat.completions.create(model="logo", messages=messages, max_tokens=8, temperature=0)
    chosen, alone = (logo.select(asked, k=4).adapters for asked in (messages, rows[5]))
    assert told(answer)["adapters"] == list(chosen) == list(alone)


def test_responses_are_answered_with_a_mixture(client: openai.OpenAI, logo: LoGo, rows: list[str]) -> None:
    answer = client.responses.create(model="logo", input=rows[3], max_output_tokens=16, temperature=0)
    chat = client.chat.completions.create(model="base", messages=[{"role": "user", "content": rows[3]}], max_tokens=1)
    assert answer.usage is not None and chat.usage is not None
    assert answer.usage.input_tokens == chat.usage.prompt_tokens  # and no special token twice
    assert told(answer)["adapters"] == list(logo.select(rows[3], k=4).adapters)
    assert answer.model == "logo"


def test_a_response_that_goes_on_is_selected_by_the_whole_conversation(
    client: openai.OpenAI, logo: LoGo, rows: list[str]
) -> None:
    """As in the loop of an agent, where only the output of a tool is new."""
    first = client.responses.create(model="logo", input=rows[3], max_output_tokens=16, temperature=0)
    output: Any = {"type": "function_call_output", "call_id": "call-1", "output": "12"}
    ask: dict[str, Any] = {"model": "logo", "max_output_tokens": 16, "temperature": 0}
    answer = client.responses.create(**ask, previous_response_id=first.id, input=[output])
    assert told(answer)["adapters"] == list(logo.select(rows[3], k=4).adapters)
    assert answer.usage is not None and first.usage is not None
    assert answer.usage.input_tokens > first.usage.input_tokens  # of vLLM's own prompt
    further = client.responses.create(**ask, previous_response_id=answer.id, input=rows[40])
    assert told(further)["adapters"] == list(logo.select(rows[40], k=4).adapters)
    with pytest.raises(openai.NotFoundError, match="there is no response 'resp_none'"):
        client.responses.create(**ask, previous_response_id="resp_none", input=[output])


def test_a_log_with_prompts_gives_adapters_their_examples(
    client: openai.OpenAI, server: Server, rows: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [f"{row} ({number})" for number, row in enumerate(rows[:4])]
    for prompt in asked:
        client.completions.create(model="antonym", prompt=prompt, max_tokens=2)
        client.chat.completions.create(
            model="capital", messages=[{"role": "user", "content": prompt + "!"}], max_tokens=2
        )
    shutil.copytree(ASSETS / "adapters", tmp_path / "pool")
    for file in (tmp_path / "pool").glob("*/examples.jsonl"):
        file.unlink()
    eventually(lambda: server.log.read_text().count(asked[-1]) >= 2)
    assert run(["pool", "examples", str(tmp_path / "pool"), "--from-log", str(server.log), "--json"]) == 0
    counts = json.loads(capsys.readouterr().out)
    assert counts["antonym"] >= 4 and counts["capital"] >= 4


def test_its_shadow_says_what_would_be_selected(
    client: openai.OpenAI, server: Server, logo: LoGo, rows: list[str]
) -> None:
    asked = [f"{row} <{number}>" for number, row in enumerate(rows[::15])]
    for prompt in asked:
        client.completions.create(model="antonym", prompt=prompt, max_tokens=2)
        chat: Any = [{"role": "user", "content": prompt + "!"}]
        client.chat.completions.create(model="base", messages=chat, max_tokens=2)
    wanted = {prompt + end for prompt in asked for end in ("", "!")}

    def lines() -> dict[str, Any]:
        found = [json.loads(line) for line in shadow_of(server).read_text().splitlines()]
        return {line["prompt"]: line for line in found if line["prompt"] in wanted}

    eventually(lambda: len(lines()) == len(wanted))
    for prompt, line in lines().items():
        expected = logo.select(prompt, k=4)
        assert line["first"][0]["adapter"] == expected.adapters[0]
        assert line["confidence"] == pytest.approx(expected.confidence, abs=1e-3)
        assert line["adapter"] == (None if prompt.endswith("!") else "antonym")
    selected = re.search(r'logo:shadow_total{outcome="selected"} (\S+)', server.ask("/metrics")[1])
    assert selected is not None and float(selected[1]) >= len(wanted)


def tokens_read(server: Server) -> float:
    """The tokens of prompts and probes that vLLM has read."""
    [found] = re.findall(r"^vllm:prompt_tokens_total{.*} (\S+)$", server.ask("/metrics")[1], re.M)
    return float(found)


def test_a_prompt_that_was_probed_a_moment_ago_is_not_read_again(server: Server, rows: list[str]) -> None:
    body = {"prompt": f"{rows[0]} once more"}
    before = tokens_read(server)
    first = server.ask("/v1/logo/select", body)[1]
    eventually(lambda: tokens_read(server) > before)
    after = tokens_read(server)
    second = server.ask("/v1/logo/select", body)[1]
    assert second["scores"] == first["scores"] and tokens_read(server) == after


def test_nobody_finds_out_that_a_salted_prompt_was_here(server: Server, rows: list[str]) -> None:
    prompt = f"{rows[0]} in secret"
    before = tokens_read(server)
    salted = {"model": "logo", "prompt": prompt, "max_tokens": 1, "cache_salt": "secret"}
    tokens = server.ask("/v1/completions", salted)[1]["usage"]["prompt_tokens"]
    eventually(lambda: tokens_read(server) >= before + 2 * tokens)  # the probe and the prompt
    after = tokens_read(server)
    server.ask("/v1/logo/select", {"prompt": prompt})
    eventually(lambda: tokens_read(server) == after + tokens)


def test_several_prompts_have_several_mixtures(client: openai.OpenAI, logo: LoGo, rows: list[str]) -> None:
    """A stream tells them first, and never again."""
    ask: dict[str, Any] = {"model": "logo", "prompt": rows[::18][:5], "max_tokens": 8}
    expected = logo.generate(ask["prompt"], k=4, max_new_tokens=8)
    answer = client.completions.create(**ask, temperature=0)
    assert answer.usage is not None and answer.usage.completion_tokens > 5
    details = answer.usage.prompt_tokens_details
    assert details is None or details.cached_tokens >= 0  # of all prompts together
    drawn = client.completions.create(**ask, temperature=0.5, n=2)
    assert [choice.index for choice in drawn.choices] == list(range(10))
    assert len(told(drawn)) == 5
    chunks = list(client.completions.create(**ask, temperature=0, stream=True))
    assert [one["adapters"] for one in told(chunks[0])] == [list(one.selection.adapters) for one in expected]
    assert all("logo" not in (chunk.model_extra or {}) for chunk in chunks[1:])
    assert {chunk.model for chunk in chunks} == {"logo"}
    for i, one in enumerate(expected):
        text = "".join(choice.text for chunk in chunks for choice in chunk.choices if choice.index == i)
        assert text.rstrip() == one.text.rstrip() == answer.choices[i].text.rstrip()


def test_what_is_listed(server: Server, logo: LoGo, rows: list[str]) -> None:
    _, models = server.ask("/v1/models")
    roles = {card["id"]: card.get("logo", {}).get("role") for card in models["data"]}
    assert roles == {"base": "base", "other": "base", "logo": "auto", **dict.fromkeys(logo.names, "adapter")}
    long = " ".join(rows[2:10])  # of which the probe reads the beginning and the end
    status, selection = server.ask("/v1/logo/select", {"prompt": long})
    expected = logo.select(long, k=4)
    assert status == 200 and selection["adapters"] == list(expected.adapters)
    assert selection["tokens"] == len(ids_of(logo, [long])[0]) > 64
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": long}]
    status, chat = server.ask("/v1/logo/select", {"messages": messages})
    assert status == 200 and chat["adapters"] == list(expected.adapters) and chat["tokens"] > selection["tokens"]
    status, cards = server.ask("/v1/logo/adapters")
    assert status == 200 and [card["id"] for card in cards["data"]] == list(logo.names)
    assert cards["default_k"] == 4 and cards["signals"] == ["calibrated", "norm"]


@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/logo/select", "/v1/load_lora_adapter"]
)
def test_nothing_is_read_without_a_key(server: Server, path: str) -> None:
    for key in (None, "another"):
        found, said = sent(server, path, key, "Content-Length: 10000")  # and never a byte of it
        assert found == 401, said
    assert sent(server, "/v1/completions", KEY, "Content-Length: 2", b"{}")[0] == 400


def test_a_body_has_its_limit(server: Server) -> None:
    status, said = sent(server, "/v1/chat/completions", KEY, "Content-Length: 40000000")
    assert status == 413 and "at most 32000000 bytes" in said


# Where vLLM would generate without LoGo, or change what is in LoGo's slots.
CLOSED = ["/invocations", "/generative_scoring", "/inference/v1/generate", "/v1/messages", "/v1/chat/completions/batch"]
CLOSED += ["/cohere/v2/chat", "/v1/systemone", "/v1/audio/transcriptions", "/adapters", "/v1/logo/select/more"]


def test_nothing_answers_without_logo(server: Server, rows: list[str]) -> None:
    body = {"model": "antonym", "prompt": rows[0], "messages": [{"role": "user", "content": rows[0]}], "max_tokens": 2}
    body |= {"name": "new", "src": str(ASSETS / "adapters" / "capital")}
    for path in CLOSED:
        status, said = server.ask(path, body)
        assert status == 404 and said["error"]["code"] == "not_found", (path, said)
        assert said["error"]["message"].startswith(f"POST '{path}': expected one of /v1/completions, ")
        assert server.ask(path, body, key=None)[0] == 401
    gone = urllib.request.Request(f"{server.url}/adapters/antonym", method="DELETE")
    gone.add_header("Authorization", f"Bearer {KEY}")
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(gone)
    assert b" 403 " in upgraded(server, "/v1/realtime")
    for path, posted in (
        ("/tokenize", {"prompt": rows[0]}),
        ("/detokenize", {"tokens": [1, 2]}),
        ("/v1/completions/", {"model": "antonym", "prompt": rows[0], "max_tokens": 2}),
        ("/version", None),
    ):
        assert server.ask(path, posted)[0] in (200, 307) and server.ask(path, posted, key=None)[0] == 401, path
    for path in ("/health", "/ready", "/ping", "/metrics"):
        assert server.ask(path, key=None)[0] == 200


def upgraded(server: Server, path: str) -> bytes:
    """The first line of the answer to a websocket."""
    host, port = server.url.removeprefix("http://").split(":")
    lines = [f"GET {path} HTTP/1.1", f"Host: {host}:{port}", f"Authorization: Bearer {KEY}", "Connection: Upgrade"]
    lines += ["Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "", ""]
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall("\r\n".join(lines).encode())
        return connection.makefile("rb").readline()


def sent(server: Server, path: str, key: str | None, header: str, body: bytes = b"") -> tuple[int, str]:
    """Status and body of the answer to a request of which no more than this is sent."""
    place = server.url.removeprefix("http://")
    credentials = [] if key is None else [f"Authorization: Bearer {key}"]
    lines = [f"POST {path} HTTP/1.1", f"Host: {place}", "Content-Type: application/json", *credentials, header, "", ""]
    host, port = place.split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall("\r\n".join(lines).encode() + body)
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        return answer.status, answer.read().decode()


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({"logo": {"k": 0}}, "logo.k"),
        ({"logo": {"signal": "entropy"}}, "logo.signal: expected one of calibrated, norm"),
        ({"logo": {"adapters": {"antonym": 17}}}, "expected a weight from -16 to 16"),
        ({"prompt": "word " * 400}, "256"),
        ({"prompt": []}, "prompt"),
        ({"prompt_embeds": "AAAA"}, "by which adapters are selected; leave it out"),
        ({"model": ""}, "model: Field required"),
    ],
)
def test_bad_requests_are_told_what_is_wrong(server: Server, rows: list[str], extra: Any, expected: str) -> None:
    asked = {"model": "logo", "prompt": rows[0], "max_tokens": 2}
    status, answer = server.ask("/v1/completions", {**asked, **extra})
    assert status == 400 and expected in json.dumps(answer)
    assert server.ask("/v1/completions", asked)[0] == 200


def test_who_says_it_is_a_probe_is_answered_as_any_other(server: Server, logo: LoGo, rows: list[str]) -> None:
    forged = {"logo_probe": "x", "logo_signal": "nosignal"}
    messages = [{"role": "user", "content": rows[0]}]
    routes = {
        "/v1/completions": {"prompt": rows[0], "max_tokens": 4, "vllm_xargs": forged},
        "/v1/chat/completions": {"messages": messages, "max_tokens": 4, "vllm_xargs": forged},
        "/v1/responses": {"input": rows[0], "max_output_tokens": 4, "vllm_xargs": forged},
    }
    for path, body in routes.items():
        for model in ("base", "logo"):
            status, answer = server.ask(path, {"model": model, **body})
            assert status == 200, (path, answer)
            if model == "logo":
                assert answer["logo"]["adapters"] == list(logo.select(rows[0], k=4).adapters)


def test_a_recipe_is_no_name(server: Server, rows: list[str]) -> None:
    for name in ("logo://0123456789abcdef:1", "nobody"):
        status, said = server.ask("/v1/completions", {"model": name, "prompt": rows[0], "max_tokens": 2})
        assert status == 404, name
        assert said["error"]["code"] == "model_not_found", said


def test_what_is_counted(server: Server, rows: list[str]) -> None:
    """Selections when they are made, and answers when they have ended."""

    def counts() -> tuple[float, float, int]:
        text = server.ask("/metrics")[1]
        assert "logo://" not in text  # no series per mixture
        assert "logo:selection_confidence_count" in text and "vllm:num_requests_running" in text
        answers = re.findall(r"^logo:answers_total{.*} (\S+)$", text, re.M)
        [selections] = re.findall(r"^logo:probe_seconds_count (\S+)$", text, re.M)
        cards = server.ask("/v1/logo/adapters")[1]["data"]
        return sum(map(float, answers)), float(selections), sum(card["selected"] for card in cards)

    answers, selections, selected = counts()
    body = {"model": "logo", "prompt": rows[:2], "max_tokens": 2}
    adapters = server.ask("/v1/completions", body)[1]["logo"]
    server.ask("/v1/completions", {**body, "prompt": rows[0], "stream": True})
    server.ask("/v1/completions", {**body, "prompt": rows[0], "model": "antonym"})  # nothing is selected
    server.ask("/v1/logo/select", {"prompt": rows[0]})
    assert server.ask("/v1/completions", {**body, "prompt": rows[1], "temperature": -1})[0] == 400
    assert server.ask("/v1/completions", {**body, "prompt": rows[1], "max_tokens": 1000})[0] == 400
    first, second = (len(one["adapters"]) for one in adapters)
    # Two prompts, the same first one in a stream and alone, and the second one twice in requests that vLLM refuses.
    assert counts() == (answers + 4, selections + 5, selected + 3 * first + 2 * second)


def test_what_vllm_cuts_selects_nothing(server: Server, logo: LoGo, rows: list[str]) -> None:
    long = f"{rows[0]} {rows[-1]}"
    body = {"model": "logo", "prompt": [long], "max_tokens": 2, "truncate_prompt_tokens": 8}
    status, answer = server.ask("/v1/completions", body)
    [ids] = ids_of(logo, [long])
    assert status == 200 and answer["usage"]["prompt_tokens"] == 8
    assert answer["logo"][0]["adapters"] == list(logo.select(ids[-8:], k=4).adapters)
    assert answer["logo"][0]["adapters"] != list(logo.select(ids, k=4).adapters)


# -- a pool that changes ----------------------------------------------------------------------------------------------


def listed(server: Server) -> list[str]:
    return [card["id"] for card in server.ask("/v1/logo/adapters")[1]["data"]]


def completion(server: Server, model: str, prompt: str) -> tuple[int, str]:
    body = {"model": model, "prompt": prompt, "max_tokens": 10, "temperature": 0}
    status, answer = server.ask("/v1/completions", body)
    return status, answer["choices"][0]["text"].rstrip() if status == 200 else json.dumps(answer)


def change(server: Server, what: str, name: str, folder: Path | None = None, **more: Any) -> tuple[int, str]:
    place = {} if folder is None else {"lora_path": str(folder)}
    status, said = server.ask(f"/v1/{what}_lora_adapter", {"lora_name": name, **place, **more})
    return status, json.dumps(said)


@pytest.fixture
def weaker(tmp_path: Path) -> dict[str, Path]:
    """Two adapters of the demo at nine tenths of their scale: contents that its pool does not have."""
    folders = {}
    for task in ("antonym", "capital"):
        folders[task] = shutil.copytree(ASSETS / "adapters" / task, tmp_path / task)
        config = json.loads((folders[task] / "adapter_config.json").read_text())
        config["lora_alpha"] *= 0.9
        (folders[task] / "adapter_config.json").write_text(json.dumps(config))
    return folders


def test_adapters_come_and_go_while_requests_run(
    server: Server, logo: LoGo, rows: list[str], weaker: dict[str, Path]
) -> None:
    prompt, names = rows[4], list(logo.names)
    one, other = (logo.generate(prompt, adapters={task: 0.9}, max_new_tokens=10).text.rstrip() for task in weaker)
    assert one != other
    assert completion(server, "new", prompt)[0] == 404
    status, said = change(server, "load", "new", weaker["antonym"])
    assert status == 200, said
    assert listed(server) == sorted([*names, "new"])
    assert completion(server, "new", prompt) == (200, one)
    # There is one, and nothing says to replace it.
    assert change(server, "load", "new", weaker["capital"])[0] == 400

    seen: list[tuple[int, str]] = []
    done = False

    def load(model: str) -> None:
        while not done:
            seen.append(completion(server, model, prompt) if model == "new" else completion(server, model, rows[2]))

    with ThreadPoolExecutor(6) as pool:
        running = [pool.submit(load, model) for model in ("new", "new", "new", "logo", "logo", "base")]
        try:
            for task in ("capital", "antonym", "capital"):
                status, said = change(server, "load", "new", weaker[task], load_inplace=True)
                assert status == 200, said
                expected = other if task == "capital" else one
                assert completion(server, "new", prompt) == (200, expected)
        finally:
            done = True
        for job in running:
            job.result()
    assert {status for status, _ in seen} == {200}
    plain = logo.generate(rows[2], adapters={}, max_new_tokens=10).text.rstrip()
    assert {text for _, text in seen} >= {one, other, plain}
    assert change(server, "unload", "new")[0] == 200
    assert completion(server, "new", prompt)[0] == 404
    assert listed(server) == names
    assert completion(server, "logo", rows[2])[1] == logo.generate(rows[2], k=4, max_new_tokens=10).text.rstrip()


def test_an_adapter_that_joins_brings_its_examples(server: Server, logo: LoGo, weaker: dict[str, Path]) -> None:
    """They are run while requests are answered, and count as soon as it is there."""
    asked = "zebra zebra quartz 77 zebra"

    def first() -> str:
        status, found = server.ask("/v1/logo/select", {"prompt": asked})
        assert status == 200, found
        return str(found["adapters"][0])

    before = first()
    assert before == logo.select(asked).adapters[0]
    write_examples(weaker["capital"], [asked])
    status, said = change(server, "load", "new", weaker["capital"])
    assert status == 200, said
    assert first() == "new"
    write_examples(weaker["capital"], ["Something else entirely, in many more words than that."])
    assert change(server, "load", "new", weaker["capital"], load_inplace=True)[0] == 200
    assert first() != "new"
    shutil.rmtree(weaker["capital"])  # the pool is listed without its files
    assert listed(server) == sorted([*logo.names, "new"])
    assert change(server, "unload", "new")[0] == 200
    assert first() == before


def test_an_impossible_change_changes_nothing(server: Server, logo: LoGo, rows: list[str], tmp_path: Path) -> None:
    for what, name, more, expected in (
        ("load", "bad", {"lora_path": str(tmp_path)}, "adapter_config.json"),
        ("load", "logo", {"lora_path": str(ASSETS / "adapters" / "capital")}, "is the name of another model"),
        ("load", "../bad", {"lora_path": str(ASSETS / "adapters" / "capital")}, "lora_name"),
        ("unload", "nobody", {}, "cannot be found"),
    ):
        status, said = change(server, what, name, **more)
        assert status in (400, 404) and expected in said, said
    assert listed(server) == list(logo.names)
    assert completion(server, "logo", rows[2])[1] == logo.generate(rows[2], k=4, max_new_tokens=10).text.rstrip()


def test_two_ranks_give_the_same_answers(server: Server, logo: LoGo, rows: list[str]) -> None:
    asked = rows[::4]

    def ask(row: str) -> tuple[list[str], str]:
        body = {"model": "logo", "prompt": row, "max_tokens": 10, "temperature": 0}
        status, answer = server.ask("/v1/completions", body)
        assert status == 200, answer
        return answer["logo"]["adapters"], answer["choices"][0]["text"].rstrip()

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, asked))
    expected = logo.generate(asked, k=4, max_new_tokens=10)
    assert answers == [(list(one.selection.adapters), one.text.rstrip()) for one in expected]


def test_an_adapter_that_overflows_changes_no_other_answer(
    server: Server, logo: LoGo, rows: list[str], tmp_path: Path
) -> None:
    """Not at the same time, nor afterwards, in the blocks of keys and values that it had; and its own are errors."""
    write_adapter(tmp_path / "overflows", logo.model, ("q_proj", "v_proj"), rank=2, seed=3, scale=1e20)
    forced: dict[str, Any] = {"base": {"adapters": {}}, "antonym": {"adapters": {"antonym": 1.0}}, "logo": {"k": 4}}
    expected = {
        (model, row): answer.text.rstrip()
        for model, options in forced.items()
        for row, answer in zip(rows[::8], logo.generate(rows[::8], max_new_tokens=10, **options), strict=True)
    }
    asked = list(expected)
    assert change(server, "load", "overflows", tmp_path / "overflows")[0] == 200
    mixed = [pair for model, row in asked for pair in ((model, row), ("overflows", row))]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda pair: completion(server, *pair), mixed))
        assert answers[::2] == [(200, expected[pair]) for pair in asked]
        assert {status for status, _ in answers[1::2]} == {500}
        assert completion(server, "other", rows[0]) == (200, expected["base", rows[0]])
        assert server.ask("/v1/logo/select", {"model": "other", "prompt": rows[0]})[1]["adapters"] == []
        each_is_an_error(server)
        assert change(server, "unload", "overflows")[0] == 200
        answers = list(pool.map(lambda pair: completion(server, *pair), asked))
    assert answers == [(200, expected[pair]) for pair in asked]
    assert server.ask("/health")[0] == 200


def each_is_an_error(server: Server) -> None:
    """Each answer of an adapter that overflows, whole or in a stream, never silent."""
    asked = {"model": "logo", "prompt": "the opposite of hot is", "max_tokens": 12, "temperature": 0}
    for mixture in ({"overflows": 1.0}, {"antonym": 0.5, "overflows": 0.5}):
        bad = {**asked, "n": 2, "temperature": 0.5, "logo": {"adapters": mixture}}
        for limits in ({}, {"allowed_token_ids": [7, 8]}, {"structured_outputs": {"choice": ["yes", "no"]}}):
            status, said = server.ask("/v1/completions", {**bad, **limits})
            assert status == 500 and "logits are NaN" in said["error"]["message"], (limits, said)
            assert said["error"]["code"] == "not_finite"
        _, stream = server.ask("/v1/completions", {**bad, "stream": True})
        *_, last, end = filter(None, stream.splitlines())
        assert "logits are NaN" in json.loads(last.removeprefix("data: "))["error"]["message"]
        assert end == "data: [DONE]"
    asked = {"model": "overflows", "input": "the opposite of hot is", "max_output_tokens": 12}
    assert server.ask("/v1/responses", asked)[1]["error"]["code"] == "not_finite"
    _, stream = server.ask("/v1/responses", {**asked, "stream": True})
    *events, kind, last = filter(None, stream.splitlines())
    assert kind == "event: error" and '"logo"' in events[1]
    error = json.loads(last.removeprefix("data: "))
    assert error["type"] == "error" and error["code"] == "not_finite" and "logits are NaN" in error["message"]
