"""vLLM's own server with one flag more: what a plain `openai` client sees, compared with the library's answers."""

from __future__ import annotations

import http.client
import json
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

from logo import LoGo
from logo.adapters.examples import write_examples
from test_engine import ids_of

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% if not loop.last %}\n{% endif %}{% endfor %}"


@pytest.fixture(scope="module")
def rows() -> list[str]:
    """Held-out prompts of every task."""
    files = sorted((ASSETS / "heldout").glob("*.jsonl"))
    return [json.loads(line)["context"] for file in files for line in file.read_text().splitlines()[:4]]


@pytest.fixture(scope="module")
def server(serve: Callable[..., Server], tmp_path_factory: Any) -> Server:
    template = tmp_path_factory.mktemp("template") / "chat.jinja"
    template.write_text(TEMPLATE)
    return serve(
        *("--max-loras", "18", "--max-lora-rank", "8", "--max-model-len", "256"),  # two more than the pool has
        *("--chat-template", str(template)),
        *("--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--enable-prompt-tokens-details"),
        env=environment(k=4) | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"},
    )


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=300)


def told(answer: Any) -> Any:
    return answer.model_dump()["logo"]


def test_many_requests_at_once_are_answered_as_by_the_library(
    client: openai.OpenAI, logo: LoGo, rows: list[str]
) -> None:
    with ThreadPoolExecutor(16) as pool:
        answers = list(
            pool.map(
                lambda row: client.completions.create(model="logo", prompt=row, max_tokens=12, temperature=0), rows
            )
        )
    expected = logo.generate(rows, k=4, max_new_tokens=12)
    for answer, one in zip(answers, expected, strict=True):
        assert told(answer)["adapters"] == list(one.selection.adapters)
        assert told(answer)["weights"] == pytest.approx(one.selection.weights, abs=1e-4)
        assert answer.choices[0].text.rstrip() == one.text.rstrip()
        assert answer.model == "logo"


def test_a_stream_tells_the_mixture_first(client: openai.OpenAI, logo: LoGo, rows: list[str]) -> None:
    stream = client.completions.create(model="logo", prompt=rows[0], max_tokens=12, temperature=0, stream=True)
    chunks = list(stream)
    assert told(chunks[0])["adapters"] == list(logo.select(rows[0], k=4).adapters)
    assert all("logo" not in (chunk.model_extra or {}) for chunk in chunks[1:])
    assert {chunk.model for chunk in chunks} == {"logo"}
    text = "".join(choice.text for chunk in chunks for choice in chunk.choices)
    assert text.rstrip() == logo.generate(rows[0], k=4, max_new_tokens=12).text.rstrip()


def test_a_chat_is_probed_by_what_the_user_said_last(client: openai.OpenAI, logo: LoGo, rows: list[str]) -> None:
    messages: Any = [{"role": "system", "content": "You answer briefly."}, {"role": "user", "content": rows[5]}]
    answer = client.chat.completions.create(model="logo", messages=messages, max_tokens=8, temperature=0)
    assert (
        told(answer)["adapters"]
        == list(logo.select(messages, k=4).adapters)
        == list(logo.select(rows[5], k=4).adapters)
    )
    streamed = client.chat.completions.create(model="logo", messages=messages, max_tokens=8, temperature=0, stream=True)
    text = "".join(choice.delta.content or "" for chunk in streamed for choice in chunk.choices)
    assert text == answer.choices[0].message.content


def test_responses_are_answered_with_a_mixture(client: openai.OpenAI, logo: LoGo, rows: list[str]) -> None:
    answer = client.responses.create(model="logo", input=rows[3], max_output_tokens=16, temperature=0)
    assert told(answer)["adapters"] == list(logo.select(rows[3], k=4).adapters)
    assert answer.model == "logo"


def test_several_prompts_have_several_mixtures(client: openai.OpenAI, logo: LoGo, rows: list[str]) -> None:
    prompts = rows[::9][:5]
    answer = client.completions.create(model="logo", prompt=prompts, max_tokens=8, temperature=0)
    expected = logo.generate(prompts, k=4, max_new_tokens=8)
    assert [choice.index for choice in answer.choices] == list(range(5))
    for i, one in enumerate(expected):
        assert told(answer)[i]["adapters"] == list(one.selection.adapters)
        assert answer.choices[i].text.rstrip() == one.text.rstrip()
    assert answer.usage is not None and answer.usage.completion_tokens > 5
    details = answer.usage.prompt_tokens_details
    assert details is None or details.cached_tokens >= 0  # of all prompts together
    drawn = client.completions.create(model="logo", prompt=prompts, max_tokens=8, temperature=0.5, n=2)
    assert [choice.index for choice in drawn.choices] == list(range(10))
    assert len(told(drawn)) == 5
    chunks = list(client.completions.create(model="logo", prompt=prompts, max_tokens=8, temperature=0, stream=True))
    assert [one["adapters"] for one in told(chunks[0])] == [list(one.selection.adapters) for one in expected]
    for i, one in enumerate(expected):
        text = "".join(choice.text for chunk in chunks for choice in chunk.choices if choice.index == i)
        assert text.rstrip() == one.text.rstrip()


def test_forced_adapters_single_ones_and_the_base_answer_beside_each_other(
    client: openai.OpenAI, logo: LoGo, rows: list[str]
) -> None:
    names = logo.names
    forced = {names[0]: 0.7, names[5]: 0.3}

    def ask(job: tuple[str, Any]) -> str:
        model, extra = job
        answer = client.completions.create(model=model, prompt=rows[1], max_tokens=10, temperature=0, extra_body=extra)
        return answer.choices[0].text.rstrip()

    jobs: list[tuple[str, Any]] = [
        ("logo", {"logo": {"adapters": forced}}),
        ("logo", {"logo": {"adapters": {}}}),
        ("base", None),
        *((name, None) for name in names),
    ]
    with ThreadPoolExecutor(len(jobs)) as pool:
        answers = list(pool.map(ask, jobs))
    mixtures = [forced, {}, {}, *({name: 1.0} for name in names)]
    expected = logo.generate([rows[1]] * len(jobs), adapters=mixtures, max_new_tokens=10, batch_size=19)
    assert answers == [one.text.rstrip() for one in expected]


def test_a_request_says_how_to_select(client: openai.OpenAI, logo: LoGo, rows: list[str]) -> None:
    for options in ({"k": 2}, {"signal": "norm"}, {"candidates": list(logo.names[:5]), "k": 3}):
        answer = client.completions.create(
            model="logo", prompt=rows[7], max_tokens=1, temperature=0, extra_body={"logo": options}
        )
        expected = logo.select(rows[7], **{"k": 4, **options})  # type: ignore[call-overload]
        assert told(answer)["adapters"] == list(expected.adapters), options
        assert told(answer)["weights"] == pytest.approx(expected.weights, abs=1e-4)


def test_a_tool_may_be_called(client: openai.OpenAI, logo: LoGo) -> None:
    a = {"a": {"type": "boolean"}}
    parameters = {"type": "object", "properties": a, "required": ["a"], "additionalProperties": False}
    tool: Any = {"type": "function", "function": {"name": "look", "parameters": parameters, "strict": True}}
    choice: Any = {"type": "function", "function": {"name": "look"}}
    messages: Any = [{"role": "user", "content": "look"}]
    # A tiny model may write white space for ever where a grammar allows it.
    blank = {str(i): -100 for i in range(len(logo.tokenizer)) if logo.tokenizer.decode([i]).isspace()}
    answer = client.chat.completions.create(
        model="logo",
        messages=messages,
        tools=[tool],
        tool_choice=choice,
        max_tokens=80,
        temperature=0,
        logit_bias=blank,
    )
    assert "logo" in answer.model_dump()
    calls = answer.choices[0].message.tool_calls
    assert calls and calls[0].function.name == "look", answer.choices[0]  # type: ignore[union-attr]


def test_what_is_listed(server: Server, logo: LoGo, rows: list[str]) -> None:
    _, models = server.ask("/v1/models")
    roles = {card["id"]: card.get("logo", {}).get("role") for card in models["data"]}
    assert roles == {"base": "base", "logo": "auto", **dict.fromkeys(logo.names, "adapter")}
    long = " ".join(rows[2:10])  # of which the probe reads the beginning and the end
    status, selection = server.ask("/v1/logo/select", {"prompt": long})
    expected = logo.select(long, k=4)
    assert status == 200 and selection["adapters"] == list(expected.adapters)
    assert selection["scores"] == pytest.approx(expected.scores, rel=1e-4)
    assert selection["tokens"] == len(ids_of(logo, [long])[0]) > 64
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": long}]
    status, chat = server.ask("/v1/logo/select", {"messages": messages})
    assert status == 200 and chat["adapters"] == list(expected.adapters) and chat["tokens"] > selection["tokens"]
    status, cards = server.ask("/v1/logo/adapters")
    assert status == 200 and [card["id"] for card in cards["data"]] == list(logo.names)
    assert cards["default_k"] == 4 and cards["signals"] == ["calibrated", "norm"]


def test_nothing_answers_without_a_key(server: Server, rows: list[str]) -> None:
    asked = [
        ("/v1/completions", {"model": "logo", "prompt": rows[0]}),
        ("/v1/completions", {"model": "logo", "prompt": rows[0], "logo": {"adapters": {"nobody": 1}}}),
        ("/v1/chat/completions", {"model": "logo", "messages": [{"role": "user", "content": "hi"}]}),
        ("/v1/logo/select", {"prompt": rows[0]}),
        ("/v1/logo/select", {"prompt": rows[0], "logo": {"k": "many"}}),
        ("/v1/logo/adapters", None),
        ("/v1/models", None),
    ]
    for path, body in asked:
        status, answer = server.ask(path, body, key=None)
        assert status == 401, path
        assert "nobody" not in json.dumps(answer)


@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/logo/select", "/v1/load_lora_adapter"]
)
def test_nothing_is_read_without_a_key(server: Server, path: str) -> None:
    for key in (None, "another"):
        found, said = sent(server, path, key, "Content-Length: 10000")  # and never a byte of it
        assert found == 401, said
    assert sent(server, "/v1/completions", KEY, "Content-Length: 2", b"{}")[0] == 400


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
        ({"logo": {"adapters": {"nobody": 1.0}}}, "nobody"),
        ({"logo": {"k": 0}}, "logo.k"),
        ({"logo": {"signal": "nosignal"}}, "logo.signal: expected one of calibrated, norm"),
        ({"logo": {"mode": "x"}}, "logo.mode"),
        ({"logo": {"k": 2, "adapters": {}}}, "adapters"),
        ({"logo": {"adapters": {"antonym": 17}}}, "expected a weight from -16 to 16"),
        ({"temperature": 9}, "temperature"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"prompt": "word " * 400}, "256"),
        ({"prompt": []}, "prompt"),
    ],
)
def test_bad_requests_are_told_what_is_wrong(server: Server, rows: list[str], extra: Any, expected: str) -> None:
    status, answer = server.ask("/v1/completions", {"model": "logo", "prompt": rows[0], "max_tokens": 4, **extra})
    assert status == (404 if expected == "nobody" else 400), answer
    assert expected in json.dumps(answer)
    status, _ = server.ask("/v1/completions", {"model": "logo", "prompt": rows[0], "max_tokens": 2})
    assert status == 200


def test_who_says_it_is_a_probe_is_answered_as_any_other(server: Server, logo: LoGo, rows: list[str]) -> None:
    forged = {"logo_probe": "x", "logo_signal": "nosignal"}
    messages = [{"role": "user", "content": rows[0]}]
    routes = {
        "/v1/completions": {"prompt": rows[0], "max_tokens": 4, "vllm_xargs": forged},
        "/v1/chat/completions": {"messages": messages, "max_tokens": 4, "vllm_xargs": forged},
        "/v1/responses": {"input": rows[0], "max_output_tokens": 4, "vllm_xargs": forged},
        "/v1/messages": {"messages": messages, "max_tokens": 4, "vllm_xargs": forged},
    }
    for path, body in routes.items():
        for model in (
            ("base", "logo") if path in ("/v1/completions", "/v1/chat/completions", "/v1/responses") else ("base",)
        ):
            status, answer = server.ask(path, {"model": model, **body})
            assert status == 200, (path, answer)
            if model == "logo":
                assert answer["logo"]["adapters"] == list(logo.select(rows[0], k=4).adapters)


def test_a_recipe_is_no_name(server: Server, rows: list[str]) -> None:
    for name in ("logo://0123456789abcdef:1", "nobody"):
        status, said = server.ask("/v1/completions", {"model": name, "prompt": rows[0], "max_tokens": 2})
        assert status == 404, name
        assert said["error"]["code"] == "model_not_found", said


def test_what_is_counted(server: Server) -> None:
    text = urllib.request.urlopen(f"{server.url}/metrics").read().decode()
    assert "logo://" not in text  # no series per mixture
    assert "logo:selection_confidence_count" in text
    assert "logo:answers_total" in text and "logo:probe_seconds_count" in text and "vllm:num_requests_running" in text


# -- a pool that changes ----------------------------------------------------------------------------------------------


def listed(server: Server) -> list[str]:
    return [card["id"] for card in server.ask("/v1/logo/adapters")[1]["data"]]


def completion(server: Server, model: str, prompt: str) -> tuple[int, str]:
    body = {"model": model, "prompt": prompt, "max_tokens": 10, "temperature": 0}
    status, answer = server.ask("/v1/completions", body)
    return status, answer["choices"][0]["text"].rstrip() if status == 200 else json.dumps(answer)


def change(server: Server, what: str, name: str, folder: Path | None = None, **more: Any) -> tuple[int, str]:
    place = {} if folder is None else {"lora_path": str(folder)}
    return raw_answer(server, f"/v1/{what}_lora_adapter", {"lora_name": name, **place, **more})


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
    assert change(server, "unload", "new")[0] == 200
    assert first() == before


def raw_answer(server: Server, path: str, body: Any) -> tuple[int, str]:
    """Status and text of an answer."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    request = urllib.request.Request(f"{server.url}{path}", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_a_change_that_cannot_be_made_changes_nothing(
    server: Server, logo: LoGo, rows: list[str], tmp_path: Path
) -> None:
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
