"""Replicas of vLLM's server through Ray Serve: the real command, two engines, one address, one pool."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from clusters import Cluster, asking, check_one_pool, refused, until
from figures import metric
from local_server import LocalServer
from logo.demo import adapters_dir

pytest.importorskip("vllm")
pytest.importorskip("ray")

pytestmark = [pytest.mark.slow, pytest.mark.long]

KEY = "a-key-of-ours"
START = 900.0
PROMPT = "What is 7 plus 5?"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("replicas")
    for name in ("new", "bad"):
        shutil.copytree(adapters_dir() / "antonym", folder / name)
    (folder / "bad" / "adapter_model.safetensors").write_bytes(b"no tensors")
    environment = {
        "LOGO_API_KEY": KEY,
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    }
    options = ["--replicas", "2", "--engine", "vllm", "--base-model", "demo", "--kv-cache-gb", "0.2"]
    options += ["--", "--enforce-eager", "--max-model-len", "256", "--max-loras", "18"]
    server = LocalServer(options, environment, start=START, stop=START)
    with server, asking(server.url, KEY) as client:
        yield Cluster(server.url, KEY, client, server, changes=folder)
        ours = psutil.Process(server.pid).children(recursive=True)
    assert server.exit_code == 0, server.said
    _, left = psutil.wait_procs(ours, 30)
    assert not left  # not even an engine


@pytest.fixture
def two(cluster: Cluster) -> Cluster:
    """The server while two replicas take requests."""
    until(lambda: len(cluster.answered()) == 2)
    return cluster


def test_two_engines_answer_at_one_address(two: Cluster) -> None:
    replicas = {two.health() for _ in range(20)}
    assert len(replicas) == 2 and len({pool for _, pool in replicas}) == 1
    body = {"model": "logo", "prompt": PROMPT, "temperature": 0}
    for _ in range(12):
        found = two.post("/v1/completions", body)
        assert found["choices"][0]["text"] == " 12"
        assert found["logo"]["adapters"][0] == "add_numbers"
    lines = [line for line in two.text("/v1/completions", {**body, "stream": True}).splitlines() if line]
    assert len(lines) > 3 and lines[-1] == "data: [DONE]"
    text = two.text("/metrics")
    for name, _ in replicas:
        own = "\n".join(line for line in text.splitlines() if f'replica="{name}"' in line)
        assert metric(own, "vllm:generation_tokens_total")


def test_an_adapter_comes_to_all_engines_at_once_and_goes_again(two: Cluster) -> None:
    with two.clients("new", 4, PROMPT) as seen, two.clients("logo", 2, PROMPT) as others:
        until(lambda: len(seen) > 20, 0.05)
        two.change("load", lora_name="new", lora_path=str(two.changes / "new"))
        added = time.monotonic()
        until(lambda: time.monotonic() > added + 2, 0.1)
        removing = time.monotonic()
        two.change("unload", lora_name="new")
        removed = time.monotonic()
        until(lambda: time.monotonic() > removed + 1, 0.1)
    check_one_pool(seen, added, removing, removed)
    assert all(one.knows for one in others)


def test_a_long_answer_keeps_no_change_waiting(two: Cluster) -> None:
    body = {"prompt": PROMPT, "max_tokens": 200, "ignore_eos": True}
    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(two.post, "/v1/completions", {**body, "model": name}) for name in ("logo", "demo") * 2]
        until(lambda: (metric(two.text("/metrics"), "vllm:num_requests_running") or 0) >= 4, 0.05)
        two.change("load", lora_name="new", lora_path=str(two.changes / "new"))
        two.change("unload", lora_name="new")
        assert not any(one.done() for one in running)
        for one in running:
            assert one.result()["usage"]["completion_tokens"] == 200


def test_an_adapter_that_cannot_be_used_changes_nothing_anywhere(two: Cluster) -> None:
    before = {two.health() for _ in range(20)}
    status, error = refused(lambda: two.change("load", lora_name="bad", lora_path=str(two.changes / "bad")))
    assert (status, error["param"]) == (400, "lora_path") and "bad" in error["message"]
    assert refused(lambda: two.change("unload", lora_name="bad"))[0] == 404
    assert {two.health() for _ in range(20)} == before


def test_one_engine_that_cannot_take_an_adapter_keeps_it_from_all(two: Cluster) -> None:
    before = {two.health() for _ in range(20)}
    worker = psutil.Process(two.pids()[0]).children(recursive=True)[-1]
    usual = resource.prlimit(worker.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(worker.pid, resource.RLIMIT_NOFILE, (3, usual[1]))  # it can open no file
    try:
        status, error = refused(lambda: two.change("load", lora_name="new", lora_path=str(two.changes / "new")))
    finally:
        resource.prlimit(worker.pid, resource.RLIMIT_NOFILE, usual)
    assert status == 400 and "nothing was changed" in error["message"], error
    assert {two.health() for _ in range(20)} == before
    two.change("load", lora_name="new", lora_path=str(two.changes / "new"))
    two.change("unload", lora_name="new")
    assert {two.health() for _ in range(20)} == before


def test_an_engine_that_starts_later_has_what_was_added(two: Cluster) -> None:
    _, digest = two.health()
    two.change("load", lora_name="later", lora_path=str(two.changes / "new"))
    _, changed = two.health()
    assert changed != digest
    before = two.answered()
    replica = psutil.Process(two.pids()[0])
    engine = replica.children(recursive=True)
    assert engine
    os.kill(replica.pid, signal.SIGKILL)
    _, left = psutil.wait_procs(engine, 30)
    assert not left  # it holds the memory that the next one needs
    until(lambda: len(two.answered()) == 2 and two.answered() != before)
    assert {pool for _, pool in (two.health() for _ in range(20))} == {changed}
    for _ in range(10):
        two.client.completions.create(model="later", prompt=PROMPT, max_tokens=2)
    two.change("unload", lora_name="later")
    assert {pool for _, pool in (two.health() for _ in range(20))} == {digest}
