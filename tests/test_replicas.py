"""Several replicas through Ray Serve: the real command, real processes, and what clients see of what happens to them.

One server with two replicas for most tests here. Its model never ends an answer by itself, so that there is time to
kill something in the middle of one.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from typer.testing import CliRunner

from clusters import Cluster, asking, check_one_pool, descends, processes, refused, until
from figures import metric
from local_server import SERVING, LocalServer
from logo import AdapterPool, LoGo
from logo.cli.app import app
from logo.demo import adapters_dir, showcase
from serving import Served, endless
from tolerances import PATIENCE

pytest.importorskip("ray")

pytestmark = [pytest.mark.slow, pytest.mark.long]

PROMPTS = [row["context"] for row in showcase()][:6]
COUNT, RUNNING = "logo:generation_tokens_total", "logo:num_requests_running"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("replicas")
    model, pool, changes = endless(folder / "endless"), folder / "pool", folder / "changes"
    shutil.copytree(adapters_dir(), pool)
    shutil.copytree(pool / "antonym", changes / "new")
    shutil.copytree(pool / "antonym", changes / "bad")
    (changes / "bad" / "adapter_model.safetensors").write_bytes(b"no tensors")
    options = ["--replicas", "2", "--base-model", str(model), "--adapters", str(pool)]
    options += ["--allow-adapter-changes", str(changes), "--max-body-mb", "0.1", "--max-concurrent", "16"]
    process = LocalServer(options, {"LOGO_API_KEY": "secret"}, start=PATIENCE, stop=PATIENCE)
    with process, asking(process.url, "secret") as client:
        made = Cluster(process.url, "secret", client, process, pool, changes, model)
        yield made
        # What was accepted is answered, though the command was told to end.
        stream = client.completions.create(model="logo", prompt=PROMPTS[0], max_tokens=300, stream=True)
        next(iter(stream))
        os.kill(process.pid, signal.SIGTERM)
        assert list(stream)[-1].choices[0].finish_reason == "length"
        until(lambda: process.gone)
    assert process.exit_code == 0, process.said
    assert "raylet" not in process.said  # of the replicas that were killed there is one line of ours
    assert not any("secret" in title for _, title in processes())


@pytest.fixture
def two(cluster: Cluster) -> Cluster:
    """The server while two replicas take requests."""
    until(lambda: len(cluster.answered()) == 2)
    return cluster


def test_two_replicas_answer_like_one_engine(two: Cluster) -> None:
    engine = LoGo.from_pretrained(str(two.model), AdapterPool.from_directory(two.pool), device="cpu", dtype="float32")
    expected = engine.generate(PROMPTS, max_new_tokens=12)
    before = {name: 0.0 for name in two.names()}
    for _ in range(3):
        for prompt, wanted in zip(PROMPTS, expected, strict=True):
            body = {"model": "logo", "prompt": prompt, "max_tokens": 12, "temperature": 0, "return_token_ids": True}
            found = two.post("/v1/completions", body)
            assert found["choices"][0]["token_ids"] == list(wanted.token_ids)
            assert found["logo"]["adapters"] == list(wanted.selection.adapters)
    text = two.text("/metrics")
    each = {
        name: metric("\n".join(line for line in text.splitlines() if f'replica="{name}"' in line), COUNT)
        for name in before
    }
    assert len(each) == 2 and all(each.values())  # both have had a part
    assert metric(text, COUNT) == sum(value or 0.0 for value in each.values())


def test_whoever_answers_tells_how_often_all_have_selected(two: Cluster) -> None:
    def counts() -> dict[str, int]:
        return {card["id"]: card["selected"] for card in two.get("/v1/logo/adapters")["data"]}

    before = counts()
    asked = [two.post("/v1/completions", {"model": "logo", "prompt": PROMPTS[0], "max_tokens": 1}) for _ in range(12)]
    chosen = set(asked[0]["logo"]["adapters"])
    expected = {name: count + 12 * (name in chosen) for name, count in before.items()}
    assert [counts() for _ in range(8)] == [expected] * 8


def test_a_stream_arrives_while_it_is_made_and_ends_with_its_client(two: Cluster) -> None:
    stream = two.client.completions.create(model="logo", prompt=PROMPTS[0], max_tokens=400, stream=True)
    pieces = iter(stream)
    assert next(pieces).model == "logo" and next(pieces).choices[0].finish_reason is None
    assert metric(two.text("/metrics"), RUNNING) == 1
    stream.close()
    until(lambda: metric(two.text("/metrics"), RUNNING) == 0, 0.1)


def test_keys_and_sizes_are_looked_at(two: Cluster) -> None:
    with asking(two.url, "other") as stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    with pytest.raises(openai.APIStatusError) as caught:
        two.client.completions.create(model="logo", prompt="x" * 200_000)
    assert caught.value.status_code == 413
    with two.open("/") as page:
        assert b"<html" in page.read().lower()
        assert len(page.headers.get_all("X-Request-Id")) == 1


def test_a_replica_that_is_killed_takes_its_answers_with_it_and_no_others(two: Cluster) -> None:
    before = two.answered()
    outcomes: list[str] = []
    stop = threading.Event()

    def client() -> None:
        while not stop.is_set():
            try:
                two.client.completions.create(model="logo", prompt=PROMPTS[0], max_tokens=24, temperature=0)
                outcomes.append("answered")
            except openai.APIError as error:
                outcomes.append(f"{type(error).__name__} {getattr(error, 'status_code', '')}".strip())

    clients = [threading.Thread(target=client) for _ in range(6)]
    for one in clients:
        one.start()
    until(lambda: len(outcomes) > 20, 0.05)
    os.kill(two.pids()[0], signal.SIGKILL)
    killed = len(outcomes)
    until(lambda: len(two.names()) == 2 and two.names() != before)
    until(lambda: len(two.answered()) == 2)
    stop.set()
    for one in clients:
        one.join(PATIENCE)
    failed = [one for one in outcomes if one != "answered"]
    # At most what it was answering: as many as there are clients. Everything after that is answered by the other one.
    assert len(failed) <= len(clients), failed
    assert set(failed) <= {"InternalServerError 500", "InternalServerError 503", "APIConnectionError"}
    assert outcomes[killed + 2 * len(clients) :].count("answered") >= len(outcomes) - killed - 2 * len(clients)


def test_an_adapter_comes_to_all_replicas_at_once_and_goes_again(two: Cluster) -> None:
    with two.clients("new", 4, PROMPTS[0]) as seen:
        until(lambda: len(seen) > 20, 0.05)
        two.change("load", lora_name="new", lora_path="new")
        added = time.monotonic()
        until(lambda: time.monotonic() > added + 2, 0.1)
        removing = time.monotonic()
        two.change("unload", lora_name="new")
        removed = time.monotonic()
        until(lambda: time.monotonic() > removed + 1, 0.1)
    check_one_pool(seen, added, removing, removed)


def test_an_adapter_that_cannot_be_used_changes_nothing_anywhere(two: Cluster) -> None:
    before = {two.health() for _ in range(20)}
    status, error = refused(lambda: two.change("load", lora_name="bad", lora_path="bad"))
    assert (status, error["param"]) == (400, "lora_path") and "bad" in error["message"]
    assert {two.health() for _ in range(20)} == before
    assert refused(lambda: two.change("unload", lora_name="bad"))[0] == 404


def test_what_has_changed_is_known_to_a_replica_that_comes_later_and_another_pool_gets_nothing(two: Cluster) -> None:
    _, digest = two.health()
    two.change("load", lora_name="later", lora_path="new")
    _, changed = two.health()
    assert changed != digest
    before = two.answered()
    hidden = two.pool.parent / "hidden"
    (two.pool / "antonym").rename(hidden)  # what starts now opens another pool
    os.kill(two.pids()[0], signal.SIGKILL)
    until(lambda: len(two.answered()) == 1)
    [left] = two.answered()
    assert left in before
    end = time.monotonic() + 20
    while time.monotonic() < end:
        assert two.health() == (left, changed)
        time.sleep(0.2)
    hidden.rename(two.pool / "antonym")
    until(lambda: len(two.answered()) == 2)
    assert {pool for _, pool in (two.health() for _ in range(20))} == {changed}
    for _ in range(10):
        two.client.completions.create(model="later", prompt=PROMPTS[0], max_tokens=2)
    two.change("unload", lora_name="later")
    assert two.health()[1] == digest


def test_a_cluster_keeps_its_address_and_loses_the_application_with_its_command() -> None:
    from ray.cluster_utils import Cluster as Machines

    machines = Machines(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 80_000_000})
    urls = []
    try:
        for count in ("2", "1"):  # there is room for one
            options = [
                "--ray",
                machines.address,
                "--replicas",
                count,
                "--base-model",
                "demo",
                "--cpus-per-replica",
                "1",
            ]
            with LocalServer(options, start=PATIENCE, stop=PATIENCE) as server:
                body = {"model": "logo", "prompt": "What is 7 plus 5?", "temperature": 0}
                assert Served(server.url).post("/v1/completions", body)["choices"][0]["text"] == " 12"
            assert server.exit_code == 0, server.said
            urls.append(server.url)
            with pytest.raises(urllib.error.HTTPError) as caught:
                Served(server.url).text("/health")
            with caught.value as gone:
                assert gone.code == 404  # the cluster goes on, and serves nothing
    finally:
        machines.shutdown()
    assert urls[0] == urls[1]


def test_there_are_as_many_as_requests_ask_for() -> None:
    options = ["--autoscale", "1", "2", "--autoscale-after", "1", "1", "--base-model", "demo", "--max-concurrent", "2"]
    with LocalServer(options, start=PATIENCE, stop=PATIENCE) as server, asking(server.url, "none") as client:
        one = Cluster(server.url, client=client, process=server)
        assert len(one.answered()) == 1
        with one.clients("logo", 12, PROMPTS[0]):
            until(lambda: len(one.answered()) == 2)
        until(lambda: len(one.names()) == 1)
        assert len(one.answered()) == 1
    assert server.exit_code == 0, server.said
    assert "2 replicas take requests, 1 did" in server.said and "1 replica takes requests, 2 did" in server.said


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])  # as with one process
def test_a_signal_ends_the_server_and_leaves_nothing_behind(number: signal.Signals, code: int, tmp_path: Path) -> None:
    """A terminal sends Ctrl-C to all of its processes at once, Ray's included."""
    command = [sys.executable, "-m", "logo.cli", "serve", "--replicas", "2", "--port", "0", "--base-model"]
    command.append(str(endless(tmp_path / "endless")))
    process = subprocess.Popen(
        [*command, "--adapters", str(adapters_dir())], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stderr is not None
    try:
        url = next(found[1] for line in process.stderr if (found := SERVING.search(line)))
        ours = [pid for pid, _ in processes() if descends(pid, process.pid) and pid != process.pid]
        assert len(ours) > 4
        with asking(url, "none") as client:
            stream = client.completions.create(model="logo", prompt=PROMPTS[0], max_tokens=200, stream=True)
            next(iter(stream))
            (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
            assert list(stream)[-1].choices[0].finish_reason == "length"
        said = process.stderr.read()
        assert process.wait(PATIENCE) == code, said
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.stderr.close()
    assert "Traceback" not in said
    until(lambda: not [pid for pid, title in processes() if title and pid in ours])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--ray", "127.0.0.1:9"], "127.0.0.1:9 does not answer"),
        (["--ray", "nowhere"], "expected auto, local or HOST:PORT"),
        (["--replicas", "2", "--cpus-per-replica", "2", "--gpus-per-replica", "4"], "no room for 2"),
        (["--gpus-per-replica", "1"], "needs --replicas or --ray"),
        (["--replicas", "2", "--autoscale-after", "1", "2"], "--autoscale-after needs --autoscale"),
        (["--autoscale", "1", "2", "--autoscale-after", "1", "-2"], "expected 0 seconds or more, found 1 -2"),
        (["--autoscale", "1", "2", "--autoscale-after", "nan", "nan"], "expected 0 seconds or more, found nan nan"),
        (["--autoscale", "1", "2", "--autoscale-after", "inf", "1"], "expected 0 seconds or more, found inf 1"),
        (["--autoscale", "3", "2"], "expected a MIN of 1 or more and a MAX not below it, found 3 2"),
        (["--autoscale", "1", "2", "--replicas", "2"], "give only one of them"),
        (["--replicas", "2", "--device", "cuda:1"], "use --gpus-per-replica"),
        (["--replicas", "2", "--adapters", "/nowhere/at/all"], "/nowhere/at/all"),
    ],
)
def test_what_cannot_be_is_one_line(options: list[str], said: str) -> None:
    found = CliRunner().invoke(app, ["serve", "--base-model", "demo", "--port", "0", *options])
    assert found.exception is not None
    assert said in str(found.exception) and "\n" not in str(found.exception)
