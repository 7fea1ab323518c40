"""The page and our guards before an app that is not ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import httpx
import pytest
from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from http_server import serving
from logo.backends.vllm.front import Front, FrontSettings
from logo.serve.guards import FOLDER, HEADERS

KEY = "s3cret"


async def _there(request: Request) -> Response:
    return PlainTextResponse(request.url.path)


def app() -> Starlette:
    paths = ("/health", "/version", "/metrics", "/v1/models", "/invocations")
    made = Starlette(routes=[Route(path, _there, methods=["GET", "POST"]) for path in paths])
    made.add_middleware(CORSMiddleware, allow_origins=["https://ok.test"], allow_headers=["*"])
    made.add_middleware(Front)  # as vLLM adds its middlewares: a class without arguments
    return made


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., httpx.Client]]:
    with ExitStack() as stack:

        def start(settings: FrontSettings | None = None, key: str | None = None) -> httpx.Client:
            for name, text in (FrontSettings() if settings is None else settings).environment().items():
                monkeypatch.setenv(name, text)
            monkeypatch.setenv("VLLM_API_KEY", key) if key else monkeypatch.delenv("VLLM_API_KEY", raising=False)
            return stack.enter_context(httpx.Client(base_url=stack.enter_context(serving(app()))))

        yield start


def test_the_page_is_answered_and_all_else_goes_on(client: Callable[..., httpx.Client]) -> None:
    asked = client()
    page = asked.get("/")
    assert page.content == (FOLDER / "index.html").read_bytes()
    assert page.headers["content-security-policy"] == HEADERS["Content-Security-Policy"]
    for file in ("page.js", "page.css"):
        assert asked.get(f"/page/{file}").content == (FOLDER / file).read_bytes()
    assert asked.head("/").status_code == 200
    assert asked.get("/page/nothing").status_code == asked.get("/page/../../app.py").status_code == 404
    assert asked.post("/").status_code == 404  # the app's own answer
    other = asked.get("/v1/models")
    assert other.text == "/v1/models" and "content-security-policy" not in other.headers
    assert asked.get("/invocations").status_code == 200


def test_a_key_is_asked_for_where_vllm_would_not(client: Callable[..., httpx.Client]) -> None:
    asked = client(FrontSettings("127.0.0.1", (), False), KEY)
    assert [asked.get(path).status_code for path in ("/", "/page/page.js", "/health", "/version")] == [200] * 4
    for path in ("/v1/models", "/invocations", "/metrics", "/nothing"):
        assert asked.get(path).status_code == 401, path
        assert asked.post(path, headers={"Authorization": "Bearer other"}).status_code == 401, path
    assert asked.get("/v1/models", headers={"Authorization": f"Bearer {KEY}"}).text == "/v1/models"
    assert client(FrontSettings("127.0.0.1", (), True), KEY).get("/metrics").status_code == 200
    ask = {"Origin": "https://ok.test", "Access-Control-Request-Method": "POST"}
    assert asked.options("/v1/models", headers=ask).headers["access-control-allow-origin"] == "https://ok.test"


def test_other_names_of_the_host_are_refused(client: Callable[..., httpx.Client]) -> None:
    evil = {"Host": "evil.test"}
    asked = client(FrontSettings("127.0.0.1"))
    assert asked.get("/", headers=evil).status_code == asked.get("/v1/models", headers=evil).status_code == 403
    assert client(FrontSettings("127.0.0.1", ("evil.test",))).get("/v1/models", headers=evil).status_code == 200
    assert client(FrontSettings("0.0.0.0")).get("/v1/models", headers=evil).status_code == 200
    assert client(FrontSettings("0.0.0.0", ("good.test",))).get("/v1/models", headers=evil).status_code == 403
