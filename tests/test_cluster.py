"""Rows of evaluations answered by Ray actors, and replicas through Ray Serve: real Ray and whole commands."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from http_server import eventually
from logo import AdapterPool
from logo.baselines import get_method
from logo.cli.app import run
from logo.cli.cluster import anywhere
from logo.cli.options import MethodOptions
from logo.cluster.processes import ClusterError, Expected, Layout
from logo.cluster.replicas import LOAD, UNLOAD, ReplicaPlan, serve_replicas
from logo.cluster.workers import in_workers
from logo.demo import adapters_dir, heldout
from logo.errors import LoGoError, ModelError, PoolError
from logo.evaluation.answer import Opening
from test_evaluate import contents
from tolerances import PATIENCE
from written import write_rows

ray = pytest.importorskip("ray")
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # actors do not find this file by its name

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("plugins_forgotten")]

# A metric that ends the process as often as a file says, at one row; and a method that refuses prompts.
PLUGIN = """
import os, signal
from pathlib import Path
from logo import Prepared, Selection, register_method, register_metric
from logo.errors import UsageError

FOLDER = Path(__file__).parent

@register_metric("deadly")
def deadly(prediction, golds):
    left = int((FOLDER / "deaths").read_text())
    if left and golds[0] == (FOLDER / "gold").read_text():
        (FOLDER / "deaths").write_text(str(left - 1))
        os.kill(os.getpid(), signal.SIGKILL)
    return float(prediction in golds)

@register_method()
def refusing(logo, task):
    refused = set((FOLDER / "refused").read_text().splitlines())
    def choose(prompts, batch_size):
        if refused & {"all", *prompts}:
            raise UsageError("this prompt is refused")
        return [Selection.forced({logo.names[0]: 1.0}) for _ in prompts]
    return Prepared(choose)
"""


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Rows of three tasks, in the folder of the plugin."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "of_test_cluster.py").write_text(PLUGIN)
    for name in ("antonym", "capital", "plural"):
        write_rows(tmp_path / "rows" / f"{name}.jsonl", heldout()[name][:5])
    (tmp_path / "gold").write_text(heldout()["plural"][1]["completion"])
    return tmp_path / "rows"


def evaluate(out: str, *more: str) -> int:
    asked = ["eval", "run", "--base-model", "demo", "--rows", "rows", "--batch-size", "2", "--max-new-tokens", "6"]
    return run([*asked, "--result-dir", str(out), "--plugin", "of_test_cluster:deadly", *more])


def files(out: str) -> dict[str, object]:
    """What has to be the same, whoever answered."""
    return {file.parent.name: contents(file.parent) for file in Path(out).rglob("eval_results.json")}


def test_two_workers_write_what_one_does_though_one_is_killed(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deaths = rows.parent / "deaths"
    deaths.write_text("0")
    assert evaluate("one", "--metric", "deadly") == 0
    deaths.write_text("3")  # once, and at both of Ray's repetitions
    assert evaluate("two", "--metric", "deadly", "--workers", "2") == 1
    said = capsys.readouterr().err
    assert said.count("logo: error:") == 1 and "a worker died 3 times over the same work" in said
    assert deaths.read_text() == "0" and files("two") != files("one")
    deaths.write_text("1")
    assert evaluate("two", "--metric", "deadly", "--workers", "2") == 0
    assert deaths.read_text() == "0" and files("two") == files("one")
    assert evaluate("two", "--metric", "deadly") == 0
    assert "plural is done already" in capsys.readouterr().err


def test_refused_rows_are_those_of_one_process(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Some rows of a dataset; and all of them, with which nothing is written."""
    plural = [row["context"] for row in heldout()["plural"]]
    refused = rows.parent / "refused"
    for some in (plural[1:4], ["all"]):
        refused.write_text("\n".join(some))
        said = []
        for name, more in (("one", ()), ("two", ("--workers", "2"))):
            code = evaluate(name, "--method", "refusing", "--overwrite", "--batch-size", "1", *more)
            said.append((code > 0, [line for line in capsys.readouterr().err.splitlines() if "refused" in line]))
        assert said[0] == said[1] and files("one") == files("two")
    [line] = said[0][1]
    assert line.startswith("logo: error: dataset ") and line.endswith(": this prompt is refused")


def test_what_workers_cannot_do(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more, message in (
        (["--device", "cuda:1"], "--device: workers get their devices from Ray"),
        (["--ray", "nowhere"], "'nowhere' (--ray or RAY_ADDRESS): expected auto, local or HOST:PORT"),
        (["--ray", "http://127.0.0.1:8265"], "'http://127.0.0.1:8265' (--ray or RAY_ADDRESS)"),
    ):
        assert evaluate("out", "--workers", "1", *more) == 2
        assert message in capsys.readouterr().err


# -- actors -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Facts:
    number: int
    device: str = "cpu"


def alike() -> SimpleNamespace:
    warnings.warn("said while opening", UserWarning, stacklevel=2)
    return SimpleNamespace(facts=Facts(1, device=str(os.getpid())))  # equal engines may be on different devices


def unlike() -> SimpleNamespace:
    return SimpleNamespace(facts=Facts(os.getpid()))


def refused() -> SimpleNamespace:
    raise ModelError("no model here")


def tripled(held: SimpleNamespace, dataset: SimpleNamespace, rows: range) -> int:
    return 3 * rows.start


EXPECTED = functools.partial(Expected.of, functools.partial(AdapterPool.open, adapters_dir()))
TWO = Layout(2)


def workers(open_: object, expected: Expected | None = None, layout: Layout = TWO) -> Iterator[tuple[int, int]]:
    """Numbers without end, and their triples."""
    blocks = ((SimpleNamespace(name="x"), range(number, number + 1)) for number in itertools.count())
    with in_workers(layout, expected or EXPECTED(), open_, tripled) as (facts, work):  # type: ignore[arg-type]
        assert isinstance(facts, Facts)
        for (_, rows), found in work(blocks):
            yield rows.start, found


def test_every_worker_has_to_find_what_the_command_found() -> None:
    """And all of them have to open the same."""
    with pytest.warns(UserWarning, match="said while opening") as warned:
        found = dict(itertools.islice(workers(alike), 40))
    assert len(found) == 40 and all(found[number] == 3 * number for number in found)
    assert len([one for one in warned if "said while opening" in str(one.message)]) == 1
    with pytest.raises(ClusterError, match=r"finds something else than the command: pool is .*, not .another"):
        next(workers(alike, replace(EXPECTED(), found={**EXPECTED().found, "pool": "another"})))
    with pytest.raises(ModelError, match=r"^no model here$"):
        next(workers(refused))
    with pytest.raises(ClusterError, match="a worker differs from the first one: number is"):
        list(workers(unlike))


def test_a_cluster_that_cannot_be_used_is_told_in_one_line() -> None:
    with pytest.raises(ClusterError, match="no room for 2 processes with 1 GPUs each: there are 0 GPUs"):
        next(workers(alike, layout=Layout(2, gpus=1)))
    with pytest.raises(ClusterError, match=r"127.0.0.1:1 does not answer \(.*Connection refused\)"):
        next(workers(alike, layout=Layout(2, address="127.0.0.1:1")))


ALONE = """
import sys
from logo.cli.app import run
from logo.cluster.processes import Layout, connected

run(["--help"])
assert "ray" not in sys.modules
with connected(Layout(1)):
    import ray

    assert {node["NodeManagerAddress"] for node in ray.nodes()} == {"127.0.0.1"}
"""


def test_ray_is_imported_where_it_is_used_and_listens_on_the_loopback_interface() -> None:
    subprocess.run([sys.executable, "-c", ALONE], check=True, timeout=PATIENCE, stdout=subprocess.DEVNULL)


def test_paths_mean_the_same_in_another_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("base", "encoder", "query", "demo"):
        Path(name).mkdir()
    Path("base/config.json").write_text("{}")
    for encoder, expected in (("encoder", str(tmp_path / "encoder")), ("org/encoder", "org/encoder")):
        options = MethodOptions(method="loraretriever", method_args=f"embedding_model={encoder},instruction=query")
        found = anywhere(Opening("base", "org/pool", {"model_dir": "hf_models"}, options.make(None, 0)))
        assert (found.base_model, found.pool) == (str(tmp_path / "base"), "org/pool")
        assert found.options["model_dir"] == str(tmp_path / "hf_models")  # not there yet
        assert found.method == get_method("loraretriever", embedding_model=expected, instruction="query")
    assert anywhere(Opening("demo", None, {})).base_model == "demo"


# -- replicas: a small app in place of vLLM's, which says what pool it has ---------------------------------------------

PORT, FOLDER = 18730, "LOGO_TEST_FOLDER"


class State:
    """LoGo's part of the app; the adapter "here" can be added by a request only, as if other nodes lacked its files."""

    pool = SimpleNamespace(names=("start",))

    async def change(self, kind: str, name: str, folder: str | None) -> None:
        if name == "here" and kind == "add":
            raise LoGoError("no such folder")
        self.put(kind, name)

    def put(self, kind: str, name: str) -> None:
        names = self.pool.names
        if (name in names) == (kind == "add") or (kind == "remove" and len(names) == 1):
            raise PoolError(f"{kind} {name}")
        left = tuple(one for one in names if one != name)
        self.pool = SimpleNamespace(names=left if kind == "remove" else (*left, name))


async def small_app() -> Starlette:
    state = State()

    async def pool(request: Request) -> Response:
        return JSONResponse([os.getpid(), sorted(state.pool.names)])

    async def slow(request: Request) -> Response:
        folder = Path(os.environ[FOLDER])
        (folder / "begun").touch()
        while not (folder / "go").exists():
            await asyncio.sleep(0.05)
        return JSONResponse("done")

    async def change(request: Request) -> Response:
        name = (await request.json())["lora_name"]
        left = asyncio.create_task(request.receive())  # whether the client has left, as vLLM looks for it
        await asyncio.sleep(0)
        try:
            state.put("add" if request.url.path == LOAD else "remove", name)
        except PoolError as error:
            return JSONResponse(str(error), 400)
        finally:
            left.cancel()
        return JSONResponse("done")

    changes = [Route(path, change, methods=["POST"]) for path in (LOAD, UNLOAD)]
    app = Starlette(routes=[Route("/pool", pool), Route("/slow", slow), *changes])
    app.state.logo, app.state.engine_client = state, SimpleNamespace(errored=False)
    return app


def serve() -> None:
    plan = functools.partial(ReplicaPlan, small_app, {FOLDER: sys.argv[1]}, EXPECTED(), 2)
    serve_replicas(TWO, plan, "127.0.0.1", PORT, functools.partial(print, flush=True))


def ask(path: str, name: str | None = None) -> tuple[int, Any]:
    data = None if name is None else json.dumps({"lora_name": name, "lora_path": "anywhere"}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{PORT}{path}", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def pools() -> dict[int, list[str]]:
    """Process -> adapters, of those that answer some requests."""
    return {process: names for _, (process, names) in (ask("/pool") for _ in range(30))}


def wait_for(server: subprocess.Popen[str], line: str) -> None:
    assert server.stdout is not None
    said = []
    while not said or said[-1] != line:
        said.append(server.stdout.readline().strip())
        assert said[-1], said


def test_a_change_reaches_all_replicas_and_those_that_start_later(tmp_path: Path) -> None:
    command, both = [sys.executable, __file__, str(tmp_path)], "2 of 2 replicas take requests"
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server, contextlib.ExitStack() as end:
        end.callback(server.kill)
        wait_for(server, f"Serving on http://127.0.0.1:{PORT}")
        wait_for(server, both)
        processes = set(pools())
        assert len(processes) == 2
        # In this order, so that one that starts later must not remove "start" before it has added "new".
        assert ask(LOAD, "other") == (200, "done") and ask(UNLOAD, "start") == (200, "done")
        assert ask(LOAD, "new") == (200, "done")
        assert pools() == {process: ["new", "other"] for process in processes}  # none was started again
        assert ask(UNLOAD, "other") == (200, "done")
        assert [ask(LOAD, "new") for _ in range(4)] == [(400, "add new")] * 4  # as its app says

        os.kill(min(processes), signal.SIGKILL)
        wait_for(server, both)
        eventually(lambda: list(pools().values()) == [["new"]] * 2)

        status, said = ask(LOAD, "here")
        assert status == 500 and said["error"]["message"] == (
            "adapter 'here': changed here, but not in every replica: no such folder; unload it, or try again"
        )
        assert list(pools().values()) == [["here", "new"]]  # the other one does not answer with another pool
        assert ask(UNLOAD, "here") == (200, "done")
        wait_for(server, both)
        eventually(lambda: list(pools().values()) == [["new"]] * 2)

        answers: list[tuple[int, Any]] = []
        client = threading.Thread(target=lambda: answers.append(ask("/slow")))
        client.start()
        eventually((tmp_path / "begun").exists)
        server.send_signal(signal.SIGTERM)
        assert server.poll() is None  # it waits for what it has accepted
        (tmp_path / "go").touch()
        client.join()
        assert answers == [(200, "done")] and server.wait() == 0


if __name__ == "__main__":
    serve()
