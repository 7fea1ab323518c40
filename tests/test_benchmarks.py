"""The scripts in `benchmarks/`: that each part measures what its name says. The measured numbers are not tested."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load_file, save_file

import clients
import cost
import load
import long_rows
import warm
from clients import Answer, Ask
from cost import RATIOS, Plan
from figures import Summary, metric, percentiles
from logo import AdapterPool, LoGo, SelectionSettings
from parts import Lengths, exactly
from peft_arm import PeftArm
from synthetic import Sizes, base_model, prompts, random_mixtures, related_mixtures, write_adapters
from tolerances import same_weights

SMALL = Sizes(hidden=64, layers=3, heads=4, vocabulary=256, rank=2)
SHORT = Lengths(prompt=8, asked=6, new=2, known=70, rest=4)


def test_every_ratio_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = tmp_path / "cost.json"
    plan = Plan(sizes=SMALL, layer=replace(SMALL, layers=1), adapters=6, k=2, lengths=SHORT)
    cost.main(["--rounds", "1", "--json", str(found)], plan)
    report = json.loads(found.read_text())
    assert list(report) == ["about", "ratios", "parts"] and list(report["ratios"]) == list(RATIOS)
    arms = {
        name: {arm: timed["seconds"] for arm, timed in part["arms"].items()} for name, part in report["parts"].items()
    }
    opened, end = arms["open pool"], arms["end to end, batch 1"]
    assert report["ratios"]["open_vs_peft"] == pytest.approx(opened["cold"] / opened["PEFT"])  # a cost: ours to theirs
    assert report["ratios"]["e2e1_vs_peft"] == pytest.approx(end["PEFT"] / end["norm"])  # a speed: ours to theirs
    assert report["ratios"]["e2e1_vs_base"] == pytest.approx(end["calibrated"] / end["base"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in RATIOS) and "medians of 1 rounds" in shown and "6 adapters, k 2" in shown
    assert report["about"]["hardware"] in shown


def test_peft_does_the_same_method(tmp_path: Path) -> None:
    """Same adapters, weights and tokens: what is compared is the same work."""
    write_adapters(tmp_path, SMALL, 6, seed=3)
    for one in tmp_path.iterdir():  # strong enough to change answers
        tensors = load_file(one / "adapter_model.safetensors")
        save_file({key: 12 * value for key, value in tensors.items()}, one / "adapter_model.safetensors")
    arm = PeftArm(*base_model(SMALL), tmp_path, 3)
    logo = LoGo(*base_model(SMALL), AdapterPool.open(tmp_path), settings=SelectionSettings("norm", k=3))
    config = exactly(8)
    asked = prompts(SMALL, 4, 12)
    ours = logo.generate(asked, generation_config=config, batch_size=4)
    plain = logo.generate(asked, adapters={}, generation_config=config, batch_size=4)
    assert [answer.token_ids for answer in ours] != [answer.token_ids for answer in plain]
    for prompt, answer in zip(asked, ours, strict=True):
        weights = arm.select(prompt)
        assert list(weights) == list(answer.selection.adapters)
        assert list(weights.values()) == same_weights(list(answer.selection.weights))
        assert arm.answer(prompt, config) == list(answer.token_ids)
        assert arm.answer_active(prompt, config) == list(answer.token_ids)
    assert arm.answer_batch(asked, config) == [list(answer.token_ids) for answer in ours]


def test_related_rows_overlap_as_measured() -> None:
    names = tuple(f"{i:03}" for i in range(260))
    rows = [set(row) for row in related_mixtures(names, 400, 20)]
    assert all(len(row) == 20 for row in rows)
    pairs = [len(rows[i] & rows[i + 4]) for i in range(0, 396)]
    assert sum(pairs) / len(pairs) == pytest.approx(18.3, abs=0.3)
    fours = [len(rows[i] | rows[i + 4] | rows[i + 8] | rows[i + 12]) for i in range(0, 380)]
    assert sum(fours) / len(fours) == pytest.approx(23.3, abs=0.4)
    assert all(sum(row.values()) == pytest.approx(1) for row in related_mixtures(names, 4, 20))
    assert all(len(row) == 20 for row in random_mixtures(names, 4, 20))


def test_answers_under_other_options_are_not_compared(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load.main(["--verify", "12", "--", "-k", "2"])
    assert "--verify compares with LoGo's defaults: leave out the options after --" in capsys.readouterr().err


@pytest.mark.slow
def test_a_server_under_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(load, "LocalServer", partial(load.LocalServer, program=warm.logo()))
    found = tmp_path / "load.json"
    few = ["--requests", "12", "--concurrency", "4", "--max-new-tokens", "2", "8"]
    assert load.main([*few, "--verify", "12", "--json", str(found)]) == 0
    report = json.loads(found.read_text())
    assert report["problems"] == report["differences"] == []
    assert list(report["arms"]) == ["logo", "base", "one-by-one"]
    assert {arm["ok"] for arm in report["arms"].values()} == {12}
    assert list(report["ratios"]) == [
        *("logo_vs_base", "logo_vs_base_requests", "logo_vs_one_by_one", "logo_vs_one_by_one_requests")
    ]
    for arm in report["arms"].values():
        assert arm["before"] and arm["after"][load.KV_TOKENS] <= arm["before"][load.KV_TOKENS]
        assert arm["first_token"] and arm["inter_token"] and arm["end_to_end"]
    assert "requests/s" in capsys.readouterr().out


def sent(ask: Ask, handler: Callable[[httpx.Request], Any], timeout: float = 60.0) -> Answer:
    async def run() -> Answer:
        async with httpx.AsyncClient(transport=httpx.MockTransport(handler), base_url="http://x") as client:
            return await clients.send(client, "m", 0, ask, timeout)

    return asyncio.run(run())


def whole(ids: list[int], **more: Any) -> dict[str, Any]:
    usage = {"prompt_tokens": 3, "completion_tokens": len(ids)}
    return {"choices": [{"token_ids": ids, "text": "x", "finish_reason": "stop"}], "usage": usage, **more}


def streamed(*events: object) -> httpx.Response:
    data = [event if isinstance(event, str) else json.dumps(event) for event in events]
    return httpx.Response(200, text="".join(f"data: {one}\n\n" for one in data))


def test_what_a_client_receives() -> None:
    said = whole([5, 6], logo={"adapters": ["a"]})
    answer = sent(Ask("p", 4), lambda request: httpx.Response(200, json=said))
    assert (answer.error, answer.token_ids, answer.tokens, answer.prompt_tokens) == ("", (5, 6), 2, 3)
    assert answer.adapters == ("a",) and answer.first is None
    parts = [{"choices": [{"token_ids": [i], "finish_reason": None}]} for i in range(3)]
    end = {"choices": [{"token_ids": [], "finish_reason": "stop"}]}
    last = [end, {"choices": [], "usage": whole([0] * 3)["usage"]}]
    answer = sent(Ask("p", 4, stream=True), lambda request: streamed(*parts, *last, "[DONE]"))
    assert (answer.error, answer.token_ids, answer.tokens) == ("", (0, 1, 2), 3)
    assert answer.first is not None and len(answer.gaps) == 2


def late(request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("refused")


@pytest.mark.parametrize(
    ("stream", "handler", "error"),
    [
        (False, lambda request: httpx.Response(503, json={"error": {"message": "full"}}), "503"),
        (True, lambda request: httpx.Response(503, json={"error": {"message": "full"}}), "503"),
        (False, lambda request: httpx.Response(200, text="no JSON"), "bad answer"),
        (False, lambda request: httpx.Response(200, json={"choices": [{"text": "x"}]}), "bad answer"),
        (
            False,
            lambda request: httpx.Response(200, json={**whole([1]), "usage": {"completion_tokens": 2}}),
            "bad answer",
        ),
        (True, lambda request: streamed({"choices": [{"token_ids": [1]}]}), "broken stream"),
        (True, lambda request: streamed({"error": {"message": "gone"}}), "error in stream"),
        (False, late, "connection"),
    ],
)
def test_what_is_an_error(stream: bool, handler: Callable[[httpx.Request], httpx.Response], error: str) -> None:
    answer = sent(Ask("p", 4, stream=stream), handler)
    assert answer.error == error and answer.message
    summary = Summary.of([answer], 2.0)
    assert (summary.requests, summary.ok, summary.errors) == (1, 0, {error: 1})
    assert next(load.Load([answer], 2.0, {}, {}, 0.0).problems("logo")).startswith(f"logo: 1 × {error}: ")


def test_an_answer_that_takes_too_long_is_an_error() -> None:
    async def slow(request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(3600)
        raise AssertionError

    assert sent(Ask("p", 4), slow, timeout=0.01).error == "timeout"


def test_figures() -> None:
    answers = [Answer(i, seconds=i + 1.0, tokens=4, prompt_tokens=2) for i in range(3)]
    summary = Summary.of(answers, 2.0)
    assert (summary.requests_per_second, summary.output_tokens_per_second, summary.prompt_tokens_per_second) == (
        1.5,
        6,
        3,
    )
    assert summary.end_to_end == pytest.approx((2.0, 2.8, 2.98)) and summary.first_token is None
    assert percentiles([]) is None and percentiles([7.0]) == (7.0, 7.0, 7.0)
    text = '# HELP a b\na{x="1"} 2\na{x="2"} 3\nab 7\n'
    assert metric(text, "a") == 5 and metric(text, "ab") == 7 and metric(text, "b") is None


def test_the_requests_are_drawn_by_the_seed() -> None:
    asks = load.make_asks(["a", "b", "c"], 10, (2, 5), seed=1)
    assert (
        asks
        == load.make_asks(["a", "b", "c"], 10, (2, 5), seed=1)
        != load.make_asks(["a", "b", "c"], 10, (2, 5), seed=2)
    )
    assert sum(ask.stream for ask in asks) == 5 and {ask.max_tokens for ask in asks} <= {2, 3, 4, 5}
    assert {ask.prompt for ask in asks[:3]} == {"a", "b", "c"}


class Words:
    """A tokenizer whose tokens are words."""

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[str]]:
        return {"input_ids": text.split()}

    def decode(self, tokens: list[str]) -> str:
        return " ".join(tokens)


def test_long_rows_place_the_task_as_their_condition_says(tmp_path: Path) -> None:
    plural, other = "Say the plural.\n\nNoun: cat\nPlural:", f"Do it.\n\nText: {'foreign ' * 9}\nAnswer:"
    for name, context in (("plural", plural), ("other", other)):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"context": context, "completion": "cats"}) + "\n")
    tokenizer: Any = Words()
    make = long_rows.Prompts(tmp_path, tokenizer)
    made = {condition: make("plural", 0, condition, 0) for condition in long_rows.CONDITIONS}
    assert made["short"] == plural
    for condition, prompt in made.items():
        size = int(condition.partition("-")[2] or 0)
        assert prompt.split().count("foreign") == size
        places = [prompt.index(part) for part in ("Say the plural.", "Noun: cat", "Plural:")]
        assert places == sorted(places)
    places = [made[f"{place}-500"].index("foreign") for place in ("before", "around", "cued", "after")]
    assert places == [0, len("Say the plural.\n\n"), len(plural) - len("\nPlural:") + 2, len(plural) + 2]
    where = [made[name].index("Say the plural.") for name in ("first", "middle", "last")]
    assert where == sorted(where) and where[0] == 0
