"""`logo verify` against real servers: one that is right, one with another adapter than the pool says, and none."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest
from safetensors.torch import load_file, save_file
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from http_server import eventually, serving
from logo.adapters.examples import write_examples
from logo.cli.app import run
from logo.demo import adapters_dir, model_dir
from logo.selection.texts import REQUESTS
from serving import Served, served

pytestmark = pytest.mark.slow

KEY = "right-key"
NAMES = ("antonym", "french", "plural", "upper_case")


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pool")
    for name in NAMES:
        shutil.copytree(adapters_dir() / name, root / name)
    (root / "plural" / "examples.jsonl").unlink()  # it is asked bundled requests
    return root


@pytest.fixture(scope="module")
def server(pool: Path) -> Iterator[Served]:
    with served("--base-model", "demo", "--adapters", str(pool), key=KEY) as running:
        yield running


@pytest.fixture
def changed(pool: Path, tmp_path: Path) -> Path:
    """A copy of the pool, to be changed."""
    return shutil.copytree(pool, tmp_path / "changed")


def verified(server: Served, pool: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, Any]:
    asked = ["verify", server.url, "--base-model", "demo", "--adapters", str(pool), "--api-key", KEY, "--json"]
    code = run([*asked, *options])
    return code, json.loads(capsys.readouterr().out)


def test_a_server_that_answers_as_the_library(
    server: Served, pool: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, found = verified(server, pool, capsys)
    assert code == 0 and found["ok"] and found["wrong"] == [] and found["selections"] == 16
    base, *rows = found["rows"]
    assert base["adapter"] is None and base["answered_by"] == [] and base["error"] < 1e-4
    assert [row["adapter"] for row in rows] == list(NAMES)
    for row in rows:
        assert row["answered_by"] == [row["adapter"]] and row["verdict"] == "ok"
        assert max(row["error"], row["under_load"]) < 1e-4 < 0.1 < row["effect"]
    monkeypatch.setenv("LOGO_API_KEY", KEY)
    assert run(["verify", f"{server.url}/v1/", "--base-model", "demo", "--adapters", str(pool), "--limit", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == ["adapter", "base", *NAMES]
    assert lines[2].rstrip().endswith("ok") and lines[-1].endswith("4 selections, 0 of them not the library's")


def test_a_server_that_selects_otherwise_and_has_less_room(
    changed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It refuses prompts that no adapter fits, an example is longer than its context, and it has a shadow, which does
    not count these requests."""
    write_examples(changed / "french", ["Translate the word into French: house. " * 200])
    kv_cache_gb = 200 * 2 * 4 * 6 * 32 * 4 / 1e9  # 200 tokens: the model itself could read more
    shadow = tmp_path / "shadow.jsonl"
    options = ["--prior", "0.3", "--when-unsure", "refuse", "--kv-cache-gb", f"{kv_cache_gb:.9f}"]
    options += ["--shadow", str(shadow)]
    with served("--base-model", "demo", "--adapters", str(changed), *options, key=KEY) as running:
        assert running.get("/v1/models")["data"][0]["max_model_len"] < 512
        with pytest.raises(HTTPError) as refused:
            for text in REQUESTS:
                running.post("/v1/logo/select", {"prompt": text})
        with refused.value as error:
            assert json.load(error)["error"]["code"] == "no_adapter_fits"
        code, found = verified(running, changed, capsys)
        running.post("/v1/completions", {"model": "plural", "prompt": "Last one", "max_tokens": 1})
        eventually(shadow.read_text)
    assert code == 0 and found["ok"] and found["wrong"] == [], found
    [line] = map(json.loads, shadow.read_text().splitlines())
    assert line["adapter"] == "plural"


def test_another_pool_or_base_model(
    server: Served, pool: Path, changed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another file under an adapter's name, another name, or another base model."""

    def rare(found: Any) -> dict[str | None, str]:
        return {row["adapter"]: row["verdict"] for row in found["rows"] if row["verdict"] != "ok"}

    shutil.copy(adapters_dir() / "capital" / "adapter_model.safetensors", changed / "french")
    code, found = verified(server, changed, capsys)
    assert code == 1 and not found["ok"] and rare(found) == {"french": "other answers"}
    (changed / "french").rename(changed / "german")
    code, found = verified(server, changed, capsys, "--limit", "1")
    assert code == 1 and found["wrong"][:2] == ["not on the server: german", "not in the pool: french"]
    assert all("instead of {'plural'" in line for line in found["wrong"][2:])  # the unit of scores is the pool's own
    assert rare(found) == {"plural": "no effect seen"}  # by one request of another kind
    file = Path(shutil.copytree(model_dir(), tmp_path / "other")) / "model.safetensors"
    tensors = load_file(file)
    save_file({name: -tensor if "down_proj" in name else tensor for name, tensor in tensors.items()}, file)
    code, found = verified(server, pool, capsys, "--base-model", str(file.parent), "--limit", "1")
    assert code == 1 and found["rows"][0]["verdict"] == "other answers"


def test_the_base_model_in_place_of_an_adapter_under_load(
    server: Served, pool: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def passed(request: Request) -> JSONResponse:
        """What the server answers, but for requests that force one adapter by its weight."""
        body = await request.json() if request.method == "POST" else None
        if body and "french" in body.get("logo", {}).get("adapters", ()):
            body["logo"]["adapters"] = {}
        try:
            said = json.loads(await run_in_threadpool(server.text, request.url.path, body))
            return JSONResponse(said | {"has_own_calibration_prompts": True})
        except HTTPError as error:
            with error:
                return JSONResponse(json.load(error), error.code)

    with serving(Starlette(routes=[Route("/{path:path}", passed, methods=["GET", "POST"])])) as url:
        code, found = verified(Served(url), pool, capsys)
    assert code == 1 and found["selections"] == 0
    verdicts = {row["adapter"]: (row["verdict"], row["answered_by"]) for row in found["rows"]}
    assert verdicts["french"] == ("other adapters", []) and verdicts["antonym"] == ("ok", ["antonym"])


def test_what_cannot_be_asked_is_one_line(server: Served, pool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        gone = f"http://127.0.0.1:{taken.getsockname()[1]}"
    for options, code, said in (
        ([gone], 1, f"server {gone}: /v1/models: no answer"),
        ([server.url, "--api-key", "wrong"], 1, "/v1/models: status 401: expected a valid API key"),
        (["http://localhost:port"], 1, "server http://localhost:port: /v1/models: no answer (nonnumeric port"),
        (["localhost:8000"], 2, "URL localhost:8000: expected an address that begins with http:// or https://"),
    ):
        assert run(["verify", *options, "--base-model", "demo", "--adapters", str(pool)]) == code
        [line] = capsys.readouterr().err.splitlines()
        assert said in line
