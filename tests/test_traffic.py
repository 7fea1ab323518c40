"""What logs say about a pool: counted right whatever the lines, and read from what a real server wrote."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from logo.bench.local_server import LocalServer
from logo.cli.run import run
from logo.demo import heldout
from logo.protocol import MixtureRequest
from logo.selection import Selection
from logo.selection.selector import Selector
from logo.serving.app import AppSettings, create_app
from logo.serving.logged import LEADING, entry
from logo.serving.logs import AccessLog, JsonLines
from logo.serving.traffic import KEPT, OFTEN, Reading, Traffic
from logo.serving.traffic_picture import picture
from logo.serving.unserved import EXAMPLES, groups
from serving import Served
from test_serving_any_engine import Scripted
from tolerances import PATIENCE
from warm import logo

BEGAN = datetime(2026, 11, 25, tzinfo=timezone.utc)
NAMES = ("a", "b", "c", "d")


def selected(
    first: str, second: str | None = None, weights: Sequence[float] = (0.6, 0.4), **more: Any
) -> dict[str, Any]:
    names = [first] if second is None else [first, second]
    scores = dict(zip(names, (5.0, 3.0), strict=False))
    found = {"adapters": names, "weights": list(weights)[: len(names)], "scores": scores}
    return {**found, "confidence": 0.75, "unsure": False, **more}


def line(at: int, *selections: Any) -> str:
    time = (BEGAN + timedelta(minutes=at)).isoformat(timespec="milliseconds")
    return json.dumps({"time": time, "logger": "logo.access", "path": "/v1/completions", "selections": selections})


def read(*lines: str) -> Traffic:
    reading = Reading()
    for number, text in enumerate(lines, start=1):
        reading.take(text, f"day.log:{number}")
    return reading.traffic()


POOL = json.dumps({"time": BEGAN.isoformat(), "logger": "logo.serving", "message": "", "pool": NAMES})

CONFIDENCE = st.none() | st.floats(0, 1)


@st.composite
def entries(draw: st.DrawFn) -> dict[str, Any]:
    names = draw(st.lists(st.sampled_from(NAMES), max_size=3, unique=True))
    weights = draw(st.lists(st.floats(0, 1), min_size=len(names), max_size=len(names)))
    confidence = draw(CONFIDENCE)
    return {
        "adapters": names,
        "weights": weights,
        "scores": draw(st.sampled_from([{}, {"a": 1.0}])),
        "confidence": confidence,
        "unsure": confidence is not None and confidence < 0.2,
        "prompt": draw(st.text()),
    }


# -- reading --------------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(entries(), max_size=3), max_size=20), st.randoms(use_true_random=False))
def test_what_is_counted(requests: list[list[dict[str, Any]]], random: Any) -> None:
    """By hand, and whatever the order of lines: logs of several servers are read one after the other."""
    lines = [line(at, *found) for at, found in enumerate(requests)]
    found = read(POOL, *random.sample(lines, len(lines)))
    flat = [one for request in requests for one in request]
    scored = [one for one in flat if one["scores"]]
    won = Counter(one["adapters"][0] for one in scored if one["adapters"])
    assert (found.prompts, found.forced) == (len(scored), len(flat) - len(scored))
    assert {one.name: one.wins for one in found.adapters} == {name: won[name] for name in NAMES}
    assert found.unsure == sum(one["unsure"] for one in scored)
    assert sum(found.confidence) == found.known == sum(one["confidence"] is not None for one in scored)
    for adapter in found.adapters:
        weights = [
            w for one in scored for n, w in zip(one["adapters"], one["weights"], strict=True) if n == adapter.name
        ]
        assert adapter.parts == len(weights)
        assert adapter.weight == pytest.approx(sum(weights) / max(1, len(weights)))
        first, second = len(scored) // 2, len(scored) - len(scored) // 2
        assert adapter.halves[0] * first + adapter.halves[1] * second == pytest.approx(adapter.wins)
    assert not found.bad and found.logged == sum(one["unsure"] for one in scored)


def test_an_empty_prompt_was_logged() -> None:
    found = read(POOL, line(0, selected("a", confidence=0.1, unsure=True, prompt="")))
    assert (found.unsure, found.logged, found.unserved) == (1, 1, ("",)) and groups(found.unserved) == []
    assert not read(POOL, line(0, selected("a", confidence=0.1, unsure=True))).logged


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
KEYS = ("adapters", "weights", "scores", "confidence", "unsure", "prompt")
ODD = st.one_of(
    st.text().map(lambda text: text.replace("\n", " ")),
    st.builds(lambda value: json.dumps({"time": BEGAN.isoformat(), "selections": value}), JSON),
    st.builds(lambda value, time: json.dumps({"time": time, "selections": [value]}), entries(), JSON),
    st.builds(lambda value: json.dumps({"time": BEGAN.isoformat(), "pool": value}), JSON),
    st.builds(
        lambda good, key, value: json.dumps({"time": BEGAN.isoformat(), "selections": [{**good, key: value}]}),
        entries(),
        st.sampled_from(KEYS),
        JSON,
    ),
)


@given(st.lists(ODD, max_size=8))
def test_no_line_is_fatal(lines: list[str]) -> None:
    found = read(*lines)
    assert found.bad <= len(lines) and (found.first_bad is None) == (found.bad == 0)
    assert picture(found).startswith(b"\x89PNG") if len(lines) == 1 else True
    "".join([*found.unserved, *(one.name for one in found.adapters)]).encode("utf-8")  # can be printed


@pytest.mark.parametrize(
    "odd",
    [
        "Serving on http://127.0.0.1:8000",
        "[1, 2]",
        "[" * 5000,
        line(1, selected("a"))[:-9],
        line(1, selected("a", weights=())),
        line(1, selected("a", weights=(float("nan"),))),
        line(1, selected("a", confidence=1.5)),
        line(1, selected("a", confidence="high")),
        line(1, 7),
        line(1, selected("a")).replace("2026-11-25T", "yesterday "),
    ],
)
def test_a_bad_line_is_counted_and_named(odd: str) -> None:
    found = read(POOL, line(0, selected("a")), odd, line(2, selected("b")), odd)
    assert (found.prompts, found.bad, found.first_bad) == (2, 2, "day.log:3")


def test_who_is_in_the_pool() -> None:
    """Without the server's own line, adapters that never won are known as far as they are named."""
    lines = [line(at, selected("a", "gone")) for at in range(3)]
    named, told = read(*lines), read(POOL, *lines)
    assert not named.pool_known and [one.name for one in named.adapters] == ["a", "gone"]
    assert told.pool_known and [one.name for one in told.adapters] == ["a", "b", "c", "d"]
    assert [one.name for one in read(POOL, line(0, selected("gone"))).adapters] == ["gone", *NAMES]


def pool_line(at: int, *names: str, logger: str = "logo.serving") -> str:
    time = (BEGAN + timedelta(minutes=at)).isoformat()
    return json.dumps({"time": time, "logger": logger, "message": "", "pool": names})


def pool_of(*files: Sequence[str]) -> set[str]:
    reading = Reading()
    for lines in files:
        reading.begin_file()
        for text in lines:
            reading.take(text, "day.log")
    return {adapter.name for adapter in reading.traffic().adapters}


def test_the_pool_is_that_at_the_end_whatever_the_order_of_files() -> None:
    """Files that follow each other are one server's, rotated; files of the same time are those of several servers."""
    old = [pool_line(0, "a", "old"), line(1, selected("a")), pool_line(2, "a", "older")]
    new = [pool_line(6, "a", "new"), line(9, selected("a")), pool_line(5, "a", "late")]
    rotated = [line(3, selected("a"))]
    beside = [pool_line(4, "b", "idle"), line(8, selected("b"))]
    for files in itertools.permutations((old, rotated, new)):
        assert pool_of(*files) == {"a", "new"}
    for files in itertools.permutations((old, new, beside)):
        assert pool_of(*files) == {"a", "new", "b", "idle"}


def test_pools_of_other_programs_do_not_count() -> None:
    assert pool_of([pool_line(0, "a"), line(1, selected("a")), pool_line(2, "main", logger="db")]) == {"a"}
    found = read(POOL, json.dumps({"level": "info", "pool": "main"}))
    assert found.bad == 0 and {adapter.name for adapter in found.adapters} == {*NAMES}


def test_adapters_that_always_tie() -> None:
    def tied(count: int, alone: int, second: float = 4.8) -> list[tuple[tuple[str, str], int, int]]:
        """The second adapter may be left out of the mixture; its score is in the log."""
        pairs = [("b", "a") if i % 2 else ("a", "b") for i in range(count)]
        scores = [{"c": 0.1, other: second, one: 5.0} for one, other in pairs]
        lines = [line(i, selected(one, scores=scores[i])) for i, (one, _) in enumerate(pairs)]
        lines += [line(100 + i, selected("a", "c", (0.9, 0.1))) for i in range(alone)]
        return [(tie.adapters, tie.tied, tie.won) for tie in read(*lines).ties]

    assert tied(OFTEN, 0) == [(("a", "b"), OFTEN, OFTEN)]
    assert tied(OFTEN, OFTEN - 1) == [(("a", "b"), OFTEN, 2 * OFTEN - 1)]
    assert tied(OFTEN - 1, 0) == tied(OFTEN, OFTEN) == tied(OFTEN, 0, second=4.7) == tied(OFTEN, 0, second=-5.0) == []


def test_what_has_moved() -> None:
    lines = [line(i, selected("a" if i % 2 or i < 50 else "b", unsure=i % 10 == 0)) for i in range(100)]
    found = read(*lines)
    assert {one.name: one.moved for one in found.adapters} == {"a": True, "b": True}
    assert found.adapters[1].halves == (0.0, 0.5) and found.hours == pytest.approx(99 / 60)
    assert found.unsure_halves == (0.1, 0.1) and not found.unsure_moved
    assert not any(one.moved for one in read(*[line(i, selected("ab"[i % 2])) for i in range(100)]).adapters)


def test_many_unserved_prompts_are_sampled() -> None:
    one = [selected("a", unsure=True, confidence=0.1, prompt=f"prompt {i}") for i in range(3 * KEPT)]
    found = read(line(0, *one))
    assert found.logged == 3 * KEPT and len(found.unserved) == len(set(found.unserved)) == KEPT
    places = [int(text.split()[1]) for text in found.unserved]
    assert places == sorted(places) and 0.45 < sum(places) / KEPT / (3 * KEPT) < 0.55


# -- prompts that no adapter serves ---------------------------------------------------------------------------------


def test_prompts_of_a_kind_are_put_together() -> None:
    tables = [f"Book a table for {n} at seven tonight." for n in ("two", "four", "six", "nine")]
    weather = [f"How warm will it be in {city} tomorrow?" for city in ("Oslo", "Lima", "Rome")]
    found = groups([*tables, "Why?", *weather, "", "…"])
    assert [one.size for one in found] == [4, 3]
    assert set(found[0].examples) <= set(tables) and len(found[1].examples) == EXAMPLES


@given(st.lists(st.text(max_size=20) | st.sampled_from(["same words here", "other"]), max_size=12))
def test_groups_are_parts_of_the_prompts(prompts: list[str]) -> None:
    found = groups(prompts)
    assert sum(one.size for one in found) <= len(prompts)
    for one in found:
        assert one.size > 1 and 1 <= len(one.examples) <= EXAMPLES and set(one.examples) <= set(prompts)
    same = prompts.count("same words here")
    assert same < 2 or any(one.size >= same for one in found)


# -- writing --------------------------------------------------------------------------------------------------------


def test_what_is_logged_of_a_selection() -> None:
    names = [f"t{i}" for i in range(20)]
    scores = {name: float(i) for i, name in enumerate(names)}
    chosen = Selection(tuple(names[::-1]), tuple(0.05 for _ in names), scores, 0.123456)
    found = entry(chosen)
    assert found["adapters"] == names[::-1] and len(found["weights"]) == 20  # else mean weights would be too high
    assert list(found["scores"]) == names[::-1][:LEADING]
    assert (found["confidence"], found["unsure"]) == (0.1235, True) and "prompt" not in found
    assert entry(chosen, "said")["prompt"] == "said"
    forced = entry(Selection.forced({"t1": 1.0}))
    assert forced == {"adapters": ["t1"], "weights": [1.0], "scores": {}}


@pytest.mark.parametrize("log_prompts", [False, True])
def test_prompts_are_logged_only_where_that_is_asked_for(
    log_prompts: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    app = create_app(Scripted(), AppSettings("base", adapter_changes=tmp_path, log_prompts=log_prompts))

    async def talk() -> None:
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(AccessLog(app))
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                await client.post(
                    "/v1/completions", json={"model": "logo", "prompt": ["a secret", "b"], "max_tokens": 1}
                )
                await client.post("/v1/logo/select", json={"messages": [{"role": "user", "content": "a secret"}]})
                await client.post("/v1/unload_lora_adapter", json={"lora_name": "b"})

    with caplog.at_level(logging.INFO, "logo"):
        asyncio.run(talk())
    written = [JsonLines().format(record) for record in caplog.records]
    found = [one for text in written for one in json.loads(text).get("selections", [])]
    assert len(found) == 3 and ("secret" in "".join(written)) == log_prompts
    assert [one.get("prompt") for one in found] == (["a secret", "b", "a secret"] if log_prompts else [None] * 3)
    assert [json.loads(text)["pool"] for text in written if "pool" in json.loads(text)] == [["a", "b"], ["a"]]
    assert not any("secret" in record.getMessage() or "selections" in record.getMessage() for record in caplog.records)


def test_long_prompts_are_cut_and_marked(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("logo.serving.logged.TOKENS", 20)
    app = create_app(Scripted(), AppSettings("base", log_prompts=True))

    async def talk() -> None:
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(AccessLog(app))
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                asked = {"model": "logo", "prompt": ["short", "one " * 40], "max_tokens": 1}
                answer = await client.post("/v1/completions", json=asked)
                assert answer.status_code == 200, answer.text

    with caplog.at_level(logging.INFO, "logo"):
        asyncio.run(talk())
    written = [json.loads(JsonLines().format(record)) for record in caplog.records]
    short, long = (one for line in written for one in line.get("selections", []))
    assert "cut" not in short and long["cut"] is True and len(long["prompt"]) < len("one " * 40)


def test_refused_prompts_are_in_the_log_and_in_the_metrics(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """With `--when-unsure refuse` these are the prompts for which the pool lacks an adapter."""
    engine = Scripted()
    app = create_app(engine, AppSettings("base", log_prompts=True))
    selector, answered = Selector(1, when_unsure="refuse"), engine.choose

    async def choose(prompt: Any, wanted: MixtureRequest) -> Any:
        if engine.tokenizer.decode(prompt.ids, skip_special_tokens=True) == "strange":
            selector(torch.tensor([0.5, 0.5]), ["a", "b"])
        return await answered(prompt, wanted)

    engine.choose = choose  # type: ignore[method-assign]

    async def talk() -> None:
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(AccessLog(app))
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                for path, prompt in (("/v1/completions", ["known", "strange"]), ("/v1/logo/select", "strange")):
                    answer = await client.post(path, json={"model": "logo", "prompt": prompt})
                    error = answer.json()["error"]
                    assert (answer.status_code, error["code"]) == (400, "no_adapter_fits")
                    assert "--" not in error["message"] and "as 'model'" in error["message"]
                told = (await client.get("/metrics")).text
                assert 'logo:request_failure_total{reason="unsure"} 3.0' in told  # the answer to "known" is not given
                assert "logo:selection_confidence_count 2.0" in told

    with caplog.at_level(logging.INFO, "logo"):
        asyncio.run(talk())
    assert engine.released == ["a"]
    log = tmp_path / "day.log"
    log.write_text("\n".join(JsonLines().format(record) for record in caplog.records), "utf-8")
    assert run(["pool", "health", str(log), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["prompts"], found["unsure"]) == (2, 2) and found["unserved"][0]["size"] == 2


# -- the command ----------------------------------------------------------------------------------------------------


def test_what_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unsure = {"unsure": True, "confidence": 0.1}
    lines = ["Serving on ...", POOL, *(line(i, selected("a", "b", scores={"a": 5.0, "b": 5.0})) for i in range(40))]
    lines += [line(50 + i, selected("c", prompt=f"\x1b[2Jplease do [red]thing {i}", **unsure)) for i in range(40)]
    log, png = tmp_path / "day.log", tmp_path / "day.png"
    log.write_text("\n".join(lines), "utf-8")
    assert run(["pool", "health", str(log), "--png", str(png)]) == 0
    shown, said = capsys.readouterr()
    assert "adapters selected for 80 prompts in 1.5 h, 40 unsure (50%)" in shown and "\x1b[2J" not in shown
    assert "never won 2 of 4 adapters: b, d" in shown
    assert "always tie a, b: side by side in 40 of the 40 prompts that either won" in shown
    assert "moved a: won 100.0% of the first half, 0.0% of the second" in shown
    assert "moved unsure: 0.0% of the first half, 100.0% of the second" in shown
    assert "no adapter for 40 prompts such as: [2Jplease do [red]thing " in shown
    assert f"skipped lines that are not complete JSON objects: 1, the first at {log}:1" in " ".join(said.split())
    assert png.read_bytes().startswith(b"\x89PNG")
    assert run(["pool", "health", str(log), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["prompts"] == 80 and found["never_won"] == ["b", "d"] and found["unserved"][0]["size"] == 40
    assert [one["name"] for one in found["adapters"]] == ["a", "c", "b", "d"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "found a file that cannot be read"),
        ("", "found an empty file"),
        ("hello\n" * 3, "found none of its JSON objects (lines: 3)"),
        ('{"a": 1}\n', "found none of its JSON objects (lines: 1)"),
        (POOL, "no adapter was selected or named for any prompt yet"),
    ],
)
def test_what_is_no_log_is_one_line(
    content: str | None, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "day.log"
    if content is not None:
        log.write_text(content)
    assert run(["pool", "health", str(log)]) == 1
    [said] = capsys.readouterr().err.strip().splitlines()
    assert expected in said and "day.log" in said
    assert run(["pool", "health", str(tmp_path)]) == 1  # a folder
    assert run(["serve", "--base-model", "demo", "--log-prompts"]) == 2
    assert "add --log-json" in capsys.readouterr().err


@pytest.mark.slow
def test_a_real_server_writes_what_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = heldout()
    asked = {task: [row["context"] for row in rows[task][:4]] for task in ("capital", "add_numbers")}
    strange = [f"Book a table for {n} at seven tonight." for n in ("two", "six")]
    options = ["--base-model", "demo", "--log-json", "--log-prompts"]
    log = tmp_path / "day.log"
    with LocalServer(options, start=PATIENCE, stop=PATIENCE, log=log, program=logo()) as process:
        server = Served(process.url)
        body = {"model": "logo", "max_tokens": 2, "temperature": 0}
        answers = [server.post("/v1/completions", {**body, "prompt": prompts}) for prompts in asked.values()]
        server.text("/v1/completions", {**body, "prompt": strange, "stream": True})
        server.post("/v1/completions", {**body, "model": "capital", "prompt": "x"})
    written = [json.loads(line) for line in log.read_text("utf-8").splitlines()]  # every line, also the first ones
    assert any(str(one.get("message")).startswith("Serving on http://") for one in written)
    assert run(["pool", "health", str(log), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["prompts"], found["forced"], len(found["adapters"])) == (10, 1, 16)
    won = {one["name"]: one["wins"] for one in found["adapters"]}
    replied = Counter(one["adapters"][0] for answer in answers for one in answer["logo"])
    assert all(won[name] >= count for name, count in replied.items()) and sum(won.values()) == 10
    assert found["logged"] == found["unsure"] == sum(group["size"] for group in found["unserved"])
    if found["unserved"]:
        assert set(found["unserved"][0]["examples"]) <= set(strange)
