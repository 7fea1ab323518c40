"""The contract of servers (`server_contract.py`) on our own one."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from local_server import LocalServer
from logo import LoGo
from logo.demo import adapters_dir
from make_adapters import edit_config
from server_contract import *  # noqa: F403
from server_contract import KEY, Server, completion, refused, write_changes, write_keys
from serving import endless

pytestmark = pytest.mark.slow

LIMIT = 1_000_000  # bytes of a body
SELECT, KIND = "/v1/logo/select", {"Content-Type": "application/json"}


@contextlib.contextmanager
def started(changes: Path, *options: str, key: str = "") -> Iterator[Server]:
    with LocalServer(options, {"LOGO_API_KEY": key} if key else {}) as running:

        def start(*options: str, key: str = "") -> contextlib.AbstractContextManager[Server]:
            return started(changes, *options, key=key)

        yield Server(running.url, "demo", "local", frozenset(), changes, lambda: running.said, start, key)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    (folder / "changes").mkdir()
    changes, keys = write_changes(folder / "changes"), write_keys(folder)
    options = ["--key-adapters", str(keys), "--allow-adapter-changes", str(changes), "--log", "json"]
    options += ["--allow-host", "logo.test", "--cors", "https://ok.test"]
    with started(changes, "--base-model", "demo", *options, key=KEY) as running:
        yield running


@pytest.fixture(scope="module")
def library() -> LoGo:
    return LoGo.from_pretrained("demo")


def test_the_options_of_the_guards_reach_them(server: Server) -> None:
    """What they do: `test_guards.py`."""
    stranger = replace(server, key="")
    assert stranger.ask("/").status_code == 200 and stranger.ask("/page/page.js").status_code == 200
    assert refused(stranger.ask("/v1/models"), 401).endswith("found none")
    assert server.ask("/health", Host="logo.test").status_code == 200
    refused(server.ask("/health", Host="evil.test"), 403)
    own_page = server.ask(SELECT, {"prompt": "x"}, Origin="https://ok.test")
    assert own_page.headers["access-control-allow-origin"] == "https://ok.test"
    refused(server.ask(SELECT, {"prompt": "x"}, Origin="https://evil.test"), 403)
    for kind in ("text/plain", "application/x-www-form-urlencoded"):  # what browsers send without asking first
        refused(server.ask(SELECT, b'{"prompt": "x"}', **{"Content-Type": kind}), 400)
    fits = json.dumps({"prompt": "x", "user": ""}).encode()
    fits = fits.replace(b'""', b'"' + b"y" * (LIMIT - len(fits)) + b'"')
    assert len(fits) == LIMIT and server.ask(SELECT, fits, **KIND).status_code == 200
    assert refused(server.ask(SELECT, b"x" * (LIMIT + 1), **KIND), 413).startswith("expected a body of at most")


def test_checkpoints_and_adapters_are_taken_as_by_the_library(tmp_path: Path) -> None:
    """Stop texts of the checkpoint, a token that the model lacks, and adapters whose invocation a prompt lacks."""
    model = endless(tmp_path / "model")
    tokens = AutoTokenizer.from_pretrained(model)
    tokens.add_tokens(["<extra>"])
    tokens.save_pretrained(model)
    (model / "generation_config.json").write_text(json.dumps({"stop_strings": ["1"]}))
    for name in ("add_numbers", "antonym"):
        shutil.copytree(adapters_dir() / name, tmp_path / "pool" / name)
        invocation = tokens("?", add_special_tokens=False)["input_ids"]
        edit_config(tmp_path / "pool" / name, alora_invocation_tokens=invocation)
    library = LoGo.from_pretrained(str(model), tmp_path / "pool", device="cpu")
    with started(tmp_path, "--base-model", str(model), "--adapters", str(tmp_path / "pool")) as running:
        found = completion(running, prompt="What is 7 plus 5?")
        expected = library.generate("What is 7 plus 5?", max_new_tokens=8)
        assert found["choices"][0]["text"] == expected.text and expected.text.endswith("1")
        for body in ({"prompt": "Hi <extra>"}, {"messages": [{"role": "user", "content": "Hi <extra>"}]}):
            assert "the token '<extra>'" in refused(running.ask(SELECT, body), 400)
        silent = completion(running, prompt="the opposite of hot is", model="antonym", max_tokens=2)
        base = completion(running, prompt="the opposite of hot is", model="model", max_tokens=2)
        assert silent["choices"][0]["text"] == base["choices"][0]["text"]
        assert "a prompt lacks the invocation tokens of 'antonym'" in running.said()
        assert re.search(r'POST /v1/completions 200 .*adapters=\["add_numbers".*confidence=[01]', running.said())


def test_a_server_that_only_selects(library: LoGo, tmp_path: Path) -> None:
    prompt = "What is 7 plus 5?"
    with started(tmp_path, "--base-model", "demo", "--select-only") as running:
        want = library.select(prompt)
        selected = running.ask(SELECT, {"prompt": prompt}).json()
        assert selected["adapters"] == list(want.adapters) and set(selected["scores"]) == set(library.names)
        assert running.ask("/classify", {"inputs": prompt}).json()[0]["label"] == want.adapters[0]
        refused(running.ask("/v1/completions", {"model": "logo", "prompt": prompt}), 404)
        assert running.ask("/ready").status_code == 200
        assert f'logo:adapter_selected_total{{adapter="{want.adapters[0]}"}} 2.0' in running.metrics()
        assert not re.search("num_requests_running", running.metrics())
