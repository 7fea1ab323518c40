"""Candidates over HTTP, and API keys that are bound to adapters: what they may use, see and change."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest

from logo import LoGo
from logo.demo import adapters_dir
from logo.errors import StorageError, UsageError
from logo.serving.keys import read_key_adapters
from serving import Served, served
from test_serving_api import refused
from tolerances import same_scores, same_weights

pytestmark = pytest.mark.slow

PROMPT = "What is 7 plus 5?"
COMPLETION = {"prompt": PROMPT, "max_tokens": 6, "temperature": 0}
TEAM = ["add_numbers", "count_letters", "count_words", "find_name", "first_letter", "last_letter"]
PATTERNS = ["add_numbers", "count_*", "f*_name", "*_letter", "new/*"]


@pytest.fixture(scope="module")
def engine() -> LoGo:
    return LoGo.from_pretrained("demo")


@pytest.fixture(scope="module")
def changes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("changes")
    shutil.copytree(adapters_dir() / "french", root / "french")
    return root


@pytest.fixture(scope="module")
def everyone(tmp_path_factory: pytest.TempPathFactory, changes: Path) -> Iterator[Served]:
    """A server as the one sees it whose key may use everything."""
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    file.write_text(json.dumps({"team": PATTERNS, "nobody": ["later/*"]}))
    options = ("--key-adapters", str(file), "--signals", "norm", "--allow-adapter-changes", str(changes))
    with served("--base-model", "demo", *options, key="operator") as running:
        yield running


@pytest.fixture(scope="module")
def team(everyone: Served) -> Served:
    return replace(everyone, key="team")


def models(server: Served) -> list[str]:
    return [card["id"] for card in server.get("/v1/models")["data"]]


def test_a_key_sees_its_own_adapters_only(everyone: Served, team: Served, engine: LoGo) -> None:
    assert models(team) == ["logo", "demo", *TEAM]
    assert models(everyone) == ["logo", "demo", *engine.names]
    assert [card["id"] for card in team.get("/v1/logo/adapters")["data"]] == TEAM


@pytest.mark.parametrize("signal", ["calibrated", "norm"])
def test_a_key_selects_among_its_own(signal: str, team: Served, engine: LoGo) -> None:
    found = team.post("/v1/logo/select", {"prompt": PROMPT, "logo": {"signal": signal}})
    want = engine.select(PROMPT, signal=signal, candidates=TEAM)
    assert found["adapters"] == list(want.adapters) and set(found["scores"]) == set(TEAM)
    assert found["weights"] == same_weights(list(want.weights))
    assert found["scores"] == same_scores(want.scores)


def test_a_keys_answers_are_the_librarys(team: Served, engine: LoGo) -> None:
    want = engine.generate(PROMPT, candidates=TEAM, max_new_tokens=6)
    found = team.post("/v1/completions", {**COMPLETION, "model": "logo"})
    assert found["choices"][0]["text"] == want.text
    assert found["logo"]["adapters"] == list(want.selection.adapters)
    base = team.post("/v1/completions", {**COMPLETION, "model": "demo"})
    assert base["choices"][0]["text"] == engine.generate(PROMPT, adapters={}, max_new_tokens=6).text
    own = team.post("/v1/completions", {**COMPLETION, "model": "find_name"})
    assert own["logo"]["adapters"] == ["find_name"]


@pytest.mark.parametrize(
    "body",
    [
        {"model": "french"},
        {"model": "logo", "logo": {"adapters": {"french": 1.0}}},
        {"model": "logo", "logo": {"adapters": {"add_numbers": 0.5, "french": 0.5}}},
        {"model": "logo", "logo": {"candidates": ["add_numbers", "french"]}},
        {"model": "demo", "logo": {"adapters": {"french": 1.0}}},
    ],
    ids=str,
)
def test_what_others_have_is_as_good_as_missing(body: dict[str, Any], team: Served, everyone: Served) -> None:
    """Neither used nor told apart from what does not exist; the name of no other adapter is in the answer."""
    renamed = json.loads(json.dumps(body).replace("french", "frenh"))
    errors = [refused(lambda b=b: team.post("/v1/completions", {**COMPLETION, **b})) for b in (body, renamed)]
    assert errors[0]["message"].replace("french", "frenh") == errors[1]["message"]
    assert {**errors[0], "message": ""} == {**errors[1], "message": ""}
    assert "french" not in errors[1]["message"]
    assert everyone.post("/v1/completions", {**COMPLETION, **body})["logo"]["adapters"]


def test_a_request_narrows_what_its_key_may_use(team: Served, everyone: Served, engine: LoGo) -> None:
    few = ["count_words", "first_letter"]
    for server in (team, everyone):
        found = server.post("/v1/logo/select", {"prompt": PROMPT, "logo": {"candidates": few, "k": 9}})
        assert sorted(found["adapters"]) == sorted(found["scores"]) == few
    client = openai.OpenAI(base_url=f"{everyone.url}/v1", api_key="operator", max_retries=0)
    options: dict[str, Any] = {"candidates": TEAM, "k": 4, "weighting": "linear", "signal": "norm"}
    with client:
        got = client.completions.create(
            model="logo", prompt=PROMPT, max_tokens=6, temperature=0, extra_body={"logo": options}
        )
    want = engine.generate(PROMPT, max_new_tokens=6, **options)
    assert got.choices[0].text == want.text
    assert got.logo["adapters"] == list(want.selection.adapters)  # type: ignore[attr-defined]
    assert got.logo["weights"] == same_weights(list(want.selection.weights))  # type: ignore[attr-defined]


def test_a_bound_key_changes_nothing_and_counts_nothing(team: Served, everyone: Served) -> None:
    for path, body in (
        ("/v1/load_lora_adapter", {"lora_name": "new/one", "lora_path": "french"}),
        ("/v1/unload_lora_adapter", {"lora_name": "add_numbers"}),
        ("/metrics", None),
    ):
        error = refused(lambda path=path, body=body: team.text(path, body))
        assert (error["status"], error["code"]) == (403, "forbidden")
    assert "french" in everyone.text("/metrics")


def test_what_is_loaded_later_is_matched_too(team: Served, everyone: Served) -> None:
    nobody = replace(everyone, key="nobody")
    assert models(nobody) == ["logo", "demo"]
    assert nobody.post("/v1/completions", {**COMPLETION, "model": "demo"})["choices"]
    error = refused(lambda: nobody.post("/v1/completions", {**COMPLETION, "model": "logo"}))
    assert error["message"] == "none of the adapters that this API key may use is in the pool"
    everyone.text("/v1/load_lora_adapter", {"lora_name": "new/french", "lora_path": "french"})
    try:
        assert "new/french" in models(team) and "new/french" not in models(nobody)
        assert team.post("/v1/completions", {**COMPLETION, "model": "new/french"})["logo"]["adapters"] == ["new/french"]
    finally:
        everyone.text("/v1/unload_lora_adapter", {"lora_name": "new/french"})
    assert "new/french" not in models(team)


# -- the file ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "found no JSON"),
        ("[]", "found list"),
        ("{}", "found an empty object"),
        ('{"a": ["x"], "secret": "x"}', "found no list of names for key number 2"),
        ('{"secret": []}', "found no list of names for key number 1"),
        ('{"secret": [1]}', "found no list of names for key number 1"),
    ],
)
def test_a_file_that_cannot_be_used(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    file.write_text(content)
    with pytest.raises(UsageError, match=message) as caught:
        read_key_adapters(file)
    assert "secret" not in str(caught.value)
    with pytest.raises(StorageError, match="cannot be read"):
        read_key_adapters(tmp_path / "none.json")
